"""A loss that goes wrong: what is written of it, and that a run which goes back goes on the same however it is cut."""

import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from broken_ranks import train_with_a_broken_batch
from PIL import Image
from ranks import run_ranks
from safetensors.torch import load_file

from clipkit import checkpoint
from clipkit.config import set_values
from clipkit.counter_rng import sample_keys
from clipkit.errors import UserError
from clipkit.log import read_metrics
from clipkit.text.tokenizer import Tokenizer
from clipkit.train import loop
from clipkit.train.catalogue import debug, emoji_demo
from clipkit.train.checks import loader_config
from clipkit.train.loader.captions import caption_draws, draw_caption, text_of
from clipkit.train.loader.samples import SampleMaker
from clipkit.train.loop import train
from clipkit.train.sources.source import Pair, Source
from clipkit.train.watch import diagnosis
from clipkit.train.watch.diagnosis import StuckLoss, describe_batch

CPU = {"device_name": "cpu", "workers": 1}
SKIP = ["on_bad_loss=skip", "cadence.log_samples=48"]


class KilledError(Exception):
    """Stands for SIGKILL."""


def breaking(monkeypatch, at, kill_at=None):
    """Make the step at `at` samples seen give a gradient that isn't finite, each time that it is taken."""
    real, place = loop.train_step, []

    def is_skipped(run, before):
        place[:] = [before]
        return diagnosis.is_skipped(run, before)

    def step(model, *arguments):
        if place == [kill_at]:
            raise KilledError
        found = real(model, *arguments)
        if place != [at]:
            return found
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(torch.nan)
        return found._replace(grad_norm=found.grad_norm * torch.nan, grad_norms_P=found.grad_norms_P * torch.nan)

    monkeypatch.setattr(loop, "is_skipped", is_skipped)
    monkeypatch.setattr(loop, "train_step", step)


def weights(run):
    return load_file(checkpoint.find(run) / "model.safetensors")


def assert_same_weights(one, other):
    ours, theirs = weights(one), weights(other)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def trained(run):
    return [line["samples_seen"] for line in read_metrics(run) if "loss" in line]


def recipe(*settings):
    return set_values(debug(), [*SKIP, *settings])


@pytest.fixture(scope="module")
def rolled_back(pairs_dataset, tmp_path_factory):
    """A run that broke at 80 samples, of a log line at 96, after a checkpoint at 64."""
    run = tmp_path_factory.mktemp("rolled_back")
    with pytest.MonkeyPatch.context() as patch:
        breaking(patch, 80)
        assert train(recipe(), pairs_dataset, run, **CPU).finished
    return run


def test_a_run_that_stops_says_what_broke_it(pairs_dataset, tmp_path, monkeypatch):
    breaking(monkeypatch, 80)
    says = "the loss or its gradient isn't finite before 96 samples: begin a new run with --init .*064 and a lower"
    with pytest.raises(UserError, match=says) as error:
        train(recipe("on_bad_loss=stop"), pairs_dataset, tmp_path, **CPU)
    assert "\n" not in str(error.value)
    path = tmp_path / "diagnosis-000000000096.json"
    assert f"{path} has the batch" in str(error.value)
    found = json.loads(path.read_text())
    assert (found["stage"], found["samples_seen"]) == ("reduced", 96)
    assert [step["before"] for step in found["steps"]] == list(range(0, 96, 16))
    assert found["steps"][-1]["grad_norm"] == "nan"
    assert found["steps"][-1]["learning_rate"] == pytest.approx(0.96e-3, rel=0.1)
    norms = found["norms"]["text.token_embedding.weight"]
    assert (norms["weight"], norms["gradient"]) == ("nan", "nan")
    assert norms["gradient_one_step_before"] > 0
    assert len(found["keys"]) == len(found["shown"]) == 16
    assert [sample["key"] for sample in found["shown"]] == found["keys"]
    assert all(re.fullmatch(r"a \w+ square, number \d+ of many others", each["caption"]) for each in found["shown"])
    assert found["features"]["image"]["norm_mean"] == "nan"
    with Image.open(path.with_suffix(".png")) as sheet:
        assert sheet.size == (8 * 34, 2 * 34)


class Told(Source):
    """Records with two captions each and an added one of two long sentences."""

    @property
    def num_records(self):
        return 64

    def key(self, record):
        return str(record)

    def pairs(self, records):
        long = "The {0} dog runs fast over the green field. The {0} cat sleeps all day on the warm red roof."
        for record in records:
            yield Pair(b"", [f"first {record}", f"second {record}"], added={"synthetic": [long.format(record)]})


@pytest.mark.parametrize("reduction", ["truncate", "sentence"])
def test_a_diagnosis_has_the_captions_that_were_drawn(reduction):
    """The ids that the loader makes at this place are those of the captions that are shown."""
    stage = replace(debug().stages[0], text_reduction=reduction, batch_size=32, context_length=16)
    asked = set_values(debug(), ["captions.original=1", "captions.synthetic=1", "seed=3"])
    tokenizer, source = Tokenizer(), Told()
    positions_B = np.arange(64, 96, dtype=np.uint64)
    records_B = source.records_at(positions_B, asked.seed, asked.block_size)
    shown = SimpleNamespace(records_B=records_B)
    captions = [each["caption"] for each in describe_batch(source, asked, stage, 64, shown, tokenizer)["shown"]]
    maker, keys_B = SampleMaker(source, loader_config(asked, stage), tokenizer), sample_keys(asked.seed, positions_B)
    texts = [
        draw_caption(text_of(pair, maker.weights, tokenizer.clean), draw, tokenizer.clean)
        for pair, draw in zip(source.pairs(records_B.tolist()), caption_draws(keys_B).tolist(), strict=True)
    ]
    assert maker.ids(texts, keys_B) == tokenizer.encode(captions)
    assert {each.split()[0].lower() for each in captions} == {"first", "second", "the"}
    assert any(each.count(".") == 2 for each in captions) == (reduction == "truncate")


def test_a_run_that_goes_back_leaves_out_the_data_from_the_bad_step_to_the_log_line(rolled_back):
    lines = read_metrics(rolled_back)
    (change,) = [line for line in lines if "skipped_from" in line]
    assert (change["samples_seen"], change["skipped_from"], change["skipped_to"]) == (64, 80, 96)
    assert trained(rolled_back) == [48, 96, 144, 192, 240, 288, 320]
    assert all(math.isfinite(line["loss"]) for line in lines if "loss" in line)
    (logged,) = json.loads((rolled_back / "config.json").read_text())["changes"]
    assert logged["samples_seen"] == 64
    assert "samples from 80 to 96 skipped" in logged["changed"][0]
    assert checkpoint.load(rolled_back).state["skipped"] == [[80, 96]]


def test_skipped_samples_count_in_no_rate(rolled_back):
    """Between 64 samples, from where it went on, and the line at 96, one of two steps was taken."""
    by_samples = {line["samples_seen"]: line for line in read_metrics(rolled_back) if "loss" in line}
    seconds = by_samples[96]["seconds"] - by_samples[48]["seconds"]
    assert by_samples[96]["samples_per_s"] * seconds == pytest.approx(16, rel=0.1)


def test_what_is_left_out_is_all_that_differs(rolled_back, pairs_dataset, tmp_path, monkeypatch):
    """As if the run had been told from the beginning."""
    monkeypatch.setattr(loop, "is_skipped", lambda run, before: before == 80)
    train(recipe(), pairs_dataset, tmp_path, **CPU)
    assert_same_weights(tmp_path, rolled_back)


@pytest.mark.parametrize("kill_at", [64, 96, 128, 144, 208])
def test_a_run_that_went_back_and_was_killed_goes_on_to_the_same_weights(
    rolled_back, pairs_dataset, tmp_path, monkeypatch, kill_at
):
    with pytest.MonkeyPatch.context() as patch:
        breaking(patch, 80, kill_at)
        with pytest.raises(KilledError):
            train(recipe("cadence.checkpoint_samples=32"), pairs_dataset, tmp_path, **CPU)
    breaking(monkeypatch, 80)
    assert train(recipe("cadence.checkpoint_samples=32"), pairs_dataset, tmp_path, **CPU, resume=True).finished
    assert_same_weights(tmp_path, rolled_back)
    assert trained(tmp_path) == trained(rolled_back)


@pytest.mark.parametrize("at", [0, 176, 192, 304])
def test_a_run_goes_back_to_its_beginning_and_over_the_ends_of_stages(pairs_dataset, tmp_path, monkeypatch, at):
    breaking(monkeypatch, at)
    summary = train(recipe("cadence.log_samples=16"), pairs_dataset, tmp_path, **CPU)
    assert summary.finished
    assert trained(tmp_path) == [seen + 16 for seen in range(0, 320, 16) if seen != at]
    assert {int(path.name) for path in checkpoint.checkpoints(tmp_path)} >= {192, 320}


def test_a_bad_record_is_not_counted_again_by_going_back(pairs_dataset, tmp_path, monkeypatch):
    real = loop.batches
    monkeypatch.setattr(loop, "batches", lambda *a, **k: (replace(batch, bad=1) for batch in real(*a, **k)))
    breaking(monkeypatch, 80)
    summary = train(recipe(), pairs_dataset, tmp_path, **CPU)
    assert summary.bad_samples == 320 // 16
    counts = {line["samples_seen"]: line["bad_samples"] for line in read_metrics(tmp_path) if "loss" in line}
    assert counts == {seen: seen // 16 for seen in counts}


def test_the_end_of_a_stage_is_a_log_line_too(pairs_dataset, tmp_path, monkeypatch):
    breaking(monkeypatch, 176)
    assert train(recipe("cadence.log_samples=80"), pairs_dataset, tmp_path, **CPU).finished
    assert checkpoint.load(tmp_path).state["skipped"] == [[176, 192]]
    assert trained(tmp_path) == [80, 160, 192, 240, 320]


def test_a_stopped_run_can_be_told_to_leave_the_batches_out(rolled_back, pairs_dataset, tmp_path, monkeypatch):
    breaking(monkeypatch, 80)
    with pytest.raises(UserError, match="--resume --set on_bad_loss=skip"):
        train(recipe("on_bad_loss=stop"), pairs_dataset, tmp_path, **CPU)
    assert train(recipe(), pairs_dataset, tmp_path, **CPU, resume=True).finished
    assert_same_weights(tmp_path, rolled_back)


def test_a_run_that_always_breaks_is_given_up(pairs_dataset, tmp_path):
    broken = recipe("stages.0.learning_rate=1e30", "optimizer.grad_clip=1e30", "cadence.log_samples=16")
    with pytest.raises(UserError, match="10 stretches of the data were skipped before"):
        train(broken, pairs_dataset, tmp_path, **CPU)


def test_a_diagnosis_that_fails_costs_nothing_else(pairs_dataset, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError("no disk")

    breaking(monkeypatch, 80)
    monkeypatch.setattr(diagnosis, "first_samples", fail)
    with pytest.raises(UserError, match="isn't finite before 96 samples"):
        train(recipe("on_bad_loss=stop"), pairs_dataset, tmp_path, **CPU)
    found = json.loads((tmp_path / "diagnosis-000000000096.json").read_text())
    assert found["incomplete"] == "no disk"
    assert found["steps"]


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_all_ranks_meet_what_broke_one(rolled_back, pairs_dataset, tmp_path, policy):
    printed = "".join(run_ranks(train_with_a_broken_batch, pairs_dataset, tmp_path / "run", policy))
    assert (tmp_path / "run" / "diagnosis-000000000096.json").is_file()
    if policy == "stop":
        assert printed.count("the loss became nan before 96 samples") == 2
    else:
        assert printed == ""
        ours, theirs = ([line.get("loss") for line in read_metrics(run)] for run in (tmp_path / "run", rolled_back))
        assert ours == pytest.approx(theirs, abs=2e-5)


# ---- Stuck at chance -------------------------------------------------------------------------------------------------

STILL = ["stages.0.learning_rate=1e-12", "stages.0.warmup_samples=32", "model.logit_scale_init=0.01"]


def test_a_loss_that_stays_at_chance_stops_the_run(pairs_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(diagnosis, "STUCK_STEPS", 5)
    monkeypatch.setattr(diagnosis, "STUCK_LINES", 3)
    says = r"the loss has stayed at 2\.77, that of chance, for 5 steps up to 112 samples: look at .*on_stuck_loss=warn$"
    with pytest.raises(UserError, match=says):
        train(set_values(debug(), STILL), pairs_dataset, tmp_path / "stop", **CPU)
    found = json.loads((tmp_path / "stop" / "diagnosis-000000000112.json").read_text())
    assert len(found["steps"]) == 7
    assert 0 < found["features"]["image"]["cosine_mean"] <= 1
    assert found["norms"]["text.token_embedding.weight"]["gradient"] > 0


def test_a_loss_that_stays_at_chance_may_be_warned_of_only(pairs_dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(diagnosis, "STUCK_STEPS", 5)
    monkeypatch.setattr(diagnosis, "STUCK_LINES", 3)
    still = set_values(debug(), [*STILL, "on_stuck_loss=warn"])
    assert train(still, pairs_dataset, tmp_path, **CPU).finished
    assert capsys.readouterr().err.count("Warning: the loss has stayed at 2.77") == 1  # in the stage that is stuck


def test_chance_is_that_of_equal_features():
    for kind, loss in (("info_nce", math.log(256)), ("sigmoid", math.log(256) + 1)):
        found = StuckLoss(set_values(emoji_demo(), [f"loss={kind}"]), emoji_demo().stages[0])
        assert found.chance == pytest.approx(loss, abs=0.003)
    taught = StuckLoss(set_values(emoji_demo(), ["distill.weight=0.75"]), emoji_demo().stages[0])
    seen = range(0, 10_000_000, 25_600)
    assert not any(taught.look(math.log(256), 100, each) for each in seen), "a mixture that happens to be ln(batch)"


@pytest.mark.parametrize("falls_at", [900, 1500])
def test_only_a_long_stay_after_the_warm_up_is_stuck(falls_at):
    """Five steps a line, a warm-up of 60 steps, and a loss that begins to fall some time later."""
    stage = emoji_demo().stages[0]
    watched = StuckLoss(emoji_demo(), stage)
    said = []
    for step in range(5, 2000, 5):
        loss = math.log(256) * (1.0 if step < falls_at else 0.98)
        if watched.look(loss, 5, step * 256):
            said.append(step)
    assert said[:1] == ([] if falls_at == 900 else [1060])
