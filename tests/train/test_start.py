"""Where a run starts: what may change when it goes on, at which stage it may begin, and that ranks start alike."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from ranks import command, end_ranks, run_ranks
from safetensors.torch import load_file

from clipkit import checkpoint
from clipkit.cli.main import main
from clipkit.config import set_values
from clipkit.device import pick
from clipkit.errors import UserError
from clipkit.log import read_metrics
from clipkit.train.catalogue import debug
from clipkit.train.loop import train
from clipkit.train.sources.open import open_source
from clipkit.train.start import Start, recipe_of, refuse_different_starts, weights_digest

CPU = {"device_name": "cpu", "workers": 1}


@pytest.fixture(scope="module")
def whole(pairs_dataset, tmp_path_factory):
    """A finished run, with a checkpoint in each stage and at the end of the first."""
    run = tmp_path_factory.mktemp("whole")
    recipe = set_values(debug(), ["cadence.keep_checkpoints=9", "cadence.checkpoint_samples=32"])
    assert train(recipe, pairs_dataset, run, **CPU).finished
    return run


def stopped_at(whole: Path, run: Path, samples: int) -> Path:
    """A copy of the run as it was at a checkpoint."""
    shutil.copytree(whole, run)
    for path in checkpoint.checkpoints(run):
        if int(path.name) > samples:
            shutil.rmtree(path)
    return run


def weights(path):
    return load_file(checkpoint.find(path) / "model.safetensors")


def assert_same_weights(one, other):
    ours, theirs = weights(one), weights(other)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("samples", [128, 192, 256])
@pytest.mark.parametrize(
    "setting", ["max_bad=0.5", "checkpoint_activations=true", "cadence.log_samples=64", "cadence.keep_checkpoints=1"]
)
def test_what_changes_nothing_that_is_learned_may_change(whole, pairs_dataset, tmp_path, capsys, samples, setting):
    run = stopped_at(whole, tmp_path / "run", samples)
    recipe = set_values(debug(), [setting])
    assert train(recipe, pairs_dataset, run, **CPU, resume=True).finished
    assert_same_weights(run, whole)
    key = setting.partition("=")[0]
    assert re.search(rf"^going on from {samples} samples with {key}: \S+ -> \S+$", capsys.readouterr().err, re.M)
    (logged,) = json.loads((run / "config.json").read_text())["changes"]
    assert logged["samples_seen"] == samples
    assert any(line.startswith(f"{key}: ") for line in logged["changed"])


def test_a_second_stage_that_ran_out_of_memory_goes_on_in_micro_batches(whole, pairs_dataset, tmp_path):
    run = stopped_at(whole, tmp_path / "run", 192)
    train(set_values(debug(), ["micro_batch=4"]), pairs_dataset, run, **CPU, resume=True)
    ours, theirs = ([line["loss"] for line in read_metrics(path) if "loss" in line] for path in (run, whole))
    assert ours == pytest.approx(theirs, abs=2e-5)
    # Every resume with other settings is kept.
    train(set_values(debug(), ["max_bad=0.5"]), pairs_dataset, run, **CPU, resume=True)
    changes = json.loads((run / "config.json").read_text())["changes"]
    assert [entry["samples_seen"] for entry in changes] == [192, 320]


LATER = ["stages.1.batch_size=8", "stages.1.learning_rate=2e-4", "stages.1.samples=256", "stages.1.warmup_samples=0"]


@pytest.mark.parametrize("samples", [128, 192])
@pytest.mark.parametrize("setting", LATER)
def test_a_stage_that_has_not_begun_may_change_where_that_is_asked_for(
    whole, pairs_dataset, tmp_path, capsys, samples, setting
):
    run = stopped_at(whole, tmp_path / "run", samples)
    recipe = set_values(debug(), [setting, "cadence.keep_checkpoints=9"])
    with pytest.raises(UserError, match=rf"other later stages \({setting.partition('=')[0]}: .*add --allow-changes"):
        train(recipe, pairs_dataset, run, **CPU, resume=True)
    summary = train(recipe, pairs_dataset, run, **CPU, resume=True, allow_changes=True)
    assert summary.finished
    assert summary.samples_seen == recipe.samples
    assert f"going on from {samples} samples with {setting.partition('=')[0]}" in capsys.readouterr().err
    # As if it had been so from the beginning.
    train(recipe, pairs_dataset, tmp_path / "other", **CPU)
    assert_same_weights(run, tmp_path / "other")


@pytest.mark.parametrize("schedule", ["constant", "inverse_sqrt"])
def test_a_rate_that_does_not_know_the_end_can_be_extended_and_cooled_down(pairs_dataset, tmp_path, schedule):
    """As if the longer run, or the one with a cool-down, had been asked for from the beginning."""
    base = [f"stages.0.schedule={schedule}", "cadence.checkpoint_samples=32", "cadence.keep_checkpoints=9"]
    longer = [*base, "stages.0.samples=320", "stages.0.cooldown_samples=96"]
    train(set_values(debug(), base), pairs_dataset, tmp_path / "short", **CPU)
    train(set_values(debug(), longer), pairs_dataset, tmp_path / "long", **CPU)
    branch = stopped_at(tmp_path / "short", tmp_path / "branch", 192)
    shutil.rmtree(branch / "checkpoints" / f"{192:012d}")  # the end of the stage, where the next one would begin
    assert train(set_values(debug(), longer), pairs_dataset, branch, **CPU, resume=True).finished
    assert_same_weights(branch, tmp_path / "long")


@pytest.mark.parametrize(
    ("begun_with", "setting"),
    [
        ([], "stages.0.samples=320"),  # a cosine
        (["stages.0.schedule=constant", "stages.0.cooldown_samples=96"], "stages.0.samples=320"),  # in the cool-down
        (["stages.0.schedule=constant"], "stages.0.samples=128"),  # it has seen more
    ],
)
def test_a_rate_that_knows_its_end_cannot_be_extended(pairs_dataset, tmp_path, begun_with, setting):
    base = [*begun_with, "cadence.checkpoint_samples=32", "cadence.keep_checkpoints=9"]
    train(set_values(debug(), base), pairs_dataset, tmp_path / "whole", **CPU)
    run = stopped_at(tmp_path / "whole", tmp_path / "run", 160)
    with pytest.raises(UserError, match=r"was made by another recipe .stages\.0\.samples: 192 -> "):
        train(set_values(debug(), [*base, setting]), pairs_dataset, run, **CPU, resume=True)


def test_a_finished_run_may_get_another_stage(whole, pairs_dataset, tmp_path):
    run = stopped_at(whole, tmp_path / "run", 320)
    stages = debug().stages
    recipe = replace(debug(), stages=(*stages, replace(stages[1], name="more", samples=64)))
    assert train(recipe, pairs_dataset, run, **CPU, resume=True, allow_changes=True).samples_seen == 384


@pytest.mark.parametrize(
    ("samples", "setting"),
    [
        (128, "stages.0.learning_rate=1"),
        (192, "stages.0.samples=96"),
        (256, "stages.1.learning_rate=1"),
        (128, "seed=1"),
        (192, "optimizer.beta1=0.5"),
        (192, "precision=bfloat16"),
        (192, "block_size=8"),
        (192, "model.embed_dim=64"),
    ],
)
@pytest.mark.parametrize("allow_changes", [False, True])
def test_what_was_learned_with_may_not_change(whole, pairs_dataset, tmp_path, samples, setting, allow_changes):
    run = stopped_at(whole, tmp_path / "run", samples)
    key = setting.partition("=")[0]
    with pytest.raises(UserError, match=rf"made by another recipe \({key}: .*--init"):
        train(set_values(debug(), [setting]), pairs_dataset, run, **CPU, resume=True, allow_changes=allow_changes)


def test_a_run_may_begin_at_a_stage_with_the_weights_of_another(whole, pairs_dataset, tmp_path):
    border = whole / "checkpoints" / f"{192:012d}"
    summary = train(debug(), pairs_dataset, tmp_path, **CPU, init=border, from_stage="full")
    assert (summary.finished, summary.samples_seen) == (True, 320)
    assert_same_weights(tmp_path, whole)
    assert [line["samples_seen"] for line in read_metrics(tmp_path)] == list(range(208, 321, 16))
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["init"], config["start"]) == (str(border), {"samples_seen": 192, "seconds": 0.0})
    # The same command with --resume has nothing left to do.
    train(debug(), pairs_dataset, tmp_path, **CPU, init=border, from_stage="full", resume=True)
    again = json.loads((tmp_path / "config.json").read_text())
    assert (again["init"], again["start"]) == (config["init"], config["start"])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"from_stage": "full"}, "--from-stage full needs the weights of a checkpoint: name it with --init"),
        ({"from_stage": "ful", "init": Path("x")}, "has no such stage; did you mean full?"),
        ({"allow_changes": True}, "--allow-changes is for a run that goes on: add --resume"),
    ],
)
def test_options_that_go_with_others_are_refused_without_them(pairs_dataset, tmp_path, options, says):
    with pytest.raises(UserError, match=re.escape(says)):
        train(debug(), pairs_dataset, tmp_path, **CPU, **options)


# ---- Ranks -----------------------------------------------------------------------------------------------------------


class Ranks:
    """A device of two ranks; the other one gives `other`."""

    world = 2

    def __init__(self, other=None):
        self.other = other or {}

    def gather(self, ours):
        changed = {name: ours[name] | new if isinstance(new, dict) else new for name, new in self.other.items()}
        return [ours, ours | changed]


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"seen": 0, "weights": weights_digest(None)}, "rank 1 starts at 0 samples and rank 0 at 320: --out"),
        ({"weights": "other"}, "rank 1 starts at 320 samples and rank 0 at 320, with other weights: --out"),
        ({"recipe": {"seed": 5}}, "another recipe than rank 0 (seed: 0 -> 5): give"),
        ({"data": {"records": 9}}, "other data than rank 0 (records: 96 -> 9): give"),
        ({"versions": "clipkit 9"}, "rank 1 has clipkit 9, rank 0 has clipkit 0.1.0 with torch "),
        ({"vocabulary": "other"}, "rank 1 has another vocabulary than rank 0: give all ranks the same --tokenizer"),
    ],
)
def test_ranks_that_start_differently_are_refused(whole, pairs_dataset, other, says):
    own = checkpoint.load(whole)
    data = open_source(pairs_dataset)
    start = Start(own.samples_seen, own.tensors, own)
    refuse_different_starts(start, debug(), data, whole, Ranks())
    refuse_different_starts(start, debug(), data, whole, pick("cpu"))
    with pytest.raises(UserError, match=re.escape(says)):
        refuse_different_starts(start, debug(), data, whole, Ranks(other))


def test_the_digest_of_weights_sees_each_change():
    weights = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1.0), "c": torch.zeros(0)}
    others = [
        {**weights, "a": weights["a"].reshape(3, 2)},
        {**weights, "a": weights["a"] + 1},
        {**weights, "b": torch.tensor(2.0)},
        {"a": weights["a"], "b": weights["b"], "d": weights["c"]},
        None,
    ]
    digests = {weights_digest(found) for found in (weights, *others)}
    assert len(digests) == 6
    assert weights_digest(dict(reversed(weights.items()))) == weights_digest(weights)


def train_on_a_node(data, folder, *more):
    """`clipkit train` into a folder of the rank's own."""
    out = folder / f"node{os.environ['RANK']}"
    options = ("--data", str(data), "--recipe", "debug", "--device", "cpu", "--workers", "1", "--out", str(out), *more)
    command("train", *options)


def test_ranks_without_a_common_folder_start_together_and_do_not_resume(pairs_dataset, tmp_path):
    run_ranks(train_on_a_node, pairs_dataset, tmp_path)
    ended = end_ranks(train_on_a_node, pairs_dataset, tmp_path, "--resume")
    assert [each.code for each in ended] == [2, 2], ended
    for each in ended:
        assert "Error: rank 1 starts at 0 samples and rank 0 at 320: --out" in each.err


# ---- A cool-down that branches off ---------------------------------------------------------------------------------


COOLED = ["cadence.checkpoint_samples=32", "cadence.keep_checkpoints=9", "ema_decay=0.9"]


@pytest.fixture(scope="module", params=["constant", "inverse_sqrt"])
def steady(request, pairs_dataset, tmp_path_factory):
    """A run whose first stage knows no end."""
    run = tmp_path_factory.mktemp("steady") / "run"
    train(set_values(debug(), [*COOLED, f"stages.0.schedule={request.param}"]), pairs_dataset, run, **CPU)
    return run


def clipkit(*arguments):
    return CliRunner().invoke(main, [str(each) for each in arguments])


def cool(pairs_dataset, init, out, *more, cooldown=96):
    plain = ("--data", pairs_dataset, "--device", "cpu", "--workers", "1", "--out", out)
    return clipkit("train", *plain, "--init", init, "--cooldown", cooldown, *more)


def assert_same_files(one, other):
    for name in ("model", "optimizer", "ema"):
        ours, theirs = (load_file(checkpoint.find(run) / f"{name}.safetensors") for run in (one, other))
        assert ours.keys() == theirs.keys()
        assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


@pytest.mark.parametrize("seen", [128, 192])
def test_a_cool_down_branches_off_as_if_it_had_been_planned(steady, pairs_dataset, tmp_path, seen):
    before = {path: path.stat().st_mtime_ns for path in steady.rglob("*")}
    result = cool(pairs_dataset, checkpoint.folder_of(steady, seen), tmp_path / "cool")
    assert result.exit_code == 0, result.output
    assert {path: path.stat().st_mtime_ns for path in steady.rglob("*")} == before
    recipe = recipe_of(checkpoint.latest(steady))
    planned = replace(recipe, stages=(replace(recipe.stages[0], samples=seen + 96, cooldown_samples=96),))
    train(planned, pairs_dataset, tmp_path / "planned", **CPU)
    assert checkpoint.latest(tmp_path / "cool").name == f"{seen + 96:012d}"
    assert_same_files(tmp_path / "cool", tmp_path / "planned")
    rates, theirs = (
        [line["lr"] for line in read_metrics(tmp_path / run) if line["samples_seen"] > seen and "lr" in line]
        for run in ("cool", "planned")
    )
    assert rates == theirs
    assert len(rates) == 6
    assert rates[-1] < rates[0] / 5


def test_a_branch_is_killed_and_resumed_without_the_run_it_left(steady, pairs_dataset, tmp_path):
    init = shutil.copytree(checkpoint.folder_of(steady, 128), tmp_path / "run" / "checkpoints" / f"{128:012d}")
    assert cool(pairs_dataset, init, tmp_path / "whole").exit_code == 0
    branch = stopped_at(tmp_path / "whole", tmp_path / "branch", 160)
    shutil.rmtree(tmp_path / "run")
    other = cool(pairs_dataset, init, branch, "--resume", cooldown=64)
    assert (other.exit_code, "cools down over 96 samples, not 64" in other.stderr) == (2, True)
    assert cool(pairs_dataset, init, branch, "--resume").exit_code == 0
    assert_same_files(branch, tmp_path / "whole")
    trunk = {
        "samples_seen": 128,
        "seconds": json.loads((checkpoint.folder_of(steady, 128) / "state.json").read_text())["seconds"],
    }
    assert json.loads((branch / "config.json").read_text())["start"] == trunk


def test_a_cool_down_heeds_what_may_change(steady, pairs_dataset, tmp_path):
    init = checkpoint.folder_of(steady, 128)
    assert cool(pairs_dataset, init, tmp_path / "a", "--set", "max_bad=0.5").exit_code == 0
    refused = cool(pairs_dataset, init, tmp_path / "b", "--set", "optimizer.beta2=0.9")
    assert (refused.exit_code, "another recipe (optimizer.beta2: 0.95 -> 0.9)" in refused.stderr) == (2, True)
    refused = cool(pairs_dataset, init, tmp_path / "c", "--recipe", "debug")  # which is on a cosine
    assert (refused.exit_code, "is on a cosine" in refused.stderr) == (2, True)


def test_where_no_cool_down_can_branch_off(whole, steady, pairs_dataset, tmp_path):
    at, out = checkpoint.folder_of(steady, 128), tmp_path / "out"
    assert cool(pairs_dataset, at, tmp_path / "cool").exit_code == 0
    begin = ("train", "--data", pairs_dataset, "--out", out, "--device", "cpu")
    for result, says in [
        (cool(pairs_dataset, checkpoint.folder_of(whole, 128), out), "is on a cosine"),
        (cool(pairs_dataset, checkpoint.folder_of(steady, 256), out), "is on a cosine"),  # its second stage
        (cool(pairs_dataset, checkpoint.folder_of(tmp_path / "cool", 160), out), "take a checkpoint of at most 128"),
        (cool(pairs_dataset, at, out, cooldown=90), "--cooldown 90 is not a multiple of batch_size 16: give 96"),
        (cool(pairs_dataset, at, out, cooldown=2**64), "set at most"),
        (cool(pairs_dataset, at, steady), "give the branch another --out"),
        (cool(pairs_dataset, at, steady, "--resume"), "give the branch another --out"),
        (cool(pairs_dataset, at, out, "--from-stage", "full"), "no --from-stage"),
        (clipkit(*begin, "--cooldown", 96), "name it with --init"),
        (clipkit(*begin), "Missing option '--recipe'"),
    ]:
        assert result.exit_code == 2, result.output
        assert says in result.stderr.splitlines()[-1]
        assert "Traceback" not in result.output
    assert checkpoint.latest(out) is None
