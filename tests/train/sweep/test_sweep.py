"""`clipkit sweep`: its file, its trunks and branches, its law, and that a kill changes nothing."""

import json
import random
import re
import signal
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from image_shards import picture
from killed_sweeps import PLACES, sweep_until
from ranks import end_ranks
from safetensors.torch import load_file

from clipkit import checkpoint
from clipkit.cli.main import main
from clipkit.errors import UserError
from clipkit.storage.files import lock
from clipkit.train.catalogue import debug
from clipkit.train.loop import train
from clipkit.train.run import Summary
from clipkit.train.sweep import command, run
from clipkit.train.sweep.branches import branch_of, branches_of, samples_trained
from clipkit.train.sweep.grid import read_sweep
from clipkit.train.sweep.law import drops, fit_law, predict
from clipkit.train.sweep.pictures import pareto

SWEEP = """
base = "debug"
data = {data}
budgets = [80, "160"]
cooldown = 0.2

[eval]
data = {heldout}
templates = "plain"

[set]
stages.0.warmup_samples = 16

[image]
tokens = [16, 4]

[text]
tokens = [16]
"""
LARGE = """
seeds = [0, 1]
studies = ["small"]
held_out = "large-i9-resize-t16"
[sizes.small]
[sizes.large]
model.image = { width = 64, depth = 3 }
[eval]
"""


@pytest.fixture(scope="module")
def heldout(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("heldout") / "shades"
    for number in range(6):
        place = folder / ("dark" if number % 2 else "light")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.png").write_bytes(picture(number))
    return folder


@pytest.fixture(scope="module")
def write(tmp_path_factory, pairs_dataset, heldout):
    """Writes a sweep's file, with replacements."""

    def write(*changes: tuple[str, str]) -> Path:
        text = SWEEP.format(data=json.dumps(str(pairs_dataset)), heldout=json.dumps(str(heldout)))
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path_factory.mktemp("sweeps") / "mine.toml"
        path.write_text(text)
        return path

    return write


LARGER = (
    ("[eval]\n", LARGE),
    ("tokens = [16, 4]", 'tokens = [16, 9, 4]\nways = ["resize", "random"]'),
)


@pytest.fixture(scope="module")
def larger(write):
    """Two sizes, three lengths of images, two seeds, and a point held out."""
    return read_sweep(write(*LARGER))


@pytest.fixture(scope="module")
def whole(write, tmp_path_factory):
    """An unbroken sweep: its file and its folder."""
    path, folder = write(), tmp_path_factory.mktemp("whole")
    command.run_sweep(read_sweep(path), folder, device="cpu", workers=0)
    return path, folder


# ---- The file --------------------------------------------------------------------------------------------------------


def test_a_file_is_sizes_by_lengths_by_ways_by_seeds(larger):
    names = [each.name for each in larger.configurations if each.seed == 1]
    small = ["i16-t16", "i9-resize-t16", "i9-random-t16", "i4-resize-t16", "i4-random-t16"]
    assert names == [f"small-{each}" for each in small] + [f"large-{each}" for each in small if "random" not in each]
    by_name = {each.name: each for each in larger.configurations}
    resized, masked = (by_name[f"small-i9-{way}-t16"].recipe.stages[0] for way in ("resize", "random"))
    assert (resized.image_size, resized.image_keep) == (24, None)
    assert (masked.image_size, masked.image_keep, masked.image_reduction) == (32, 9, "random")
    assert by_name["large-i16-t16"].weights > 3 * by_name["small-i16-t16"].weights
    assert {(each.recipe.seed, each.recipe.ema_decay) for each in larger.configurations} == {(0, None), (1, None)}


def test_texts_are_varied_with_all_image_tokens(write):
    read = read_sweep(write(("tokens = [16]\n", 'tokens = [16, 8]\nways = ["truncate", "block"]\n')))
    assert [each.name for each in read.configurations][2:] == ["base-i16-t8-truncate", "base-i16-t8-block"]
    assert read.configurations[3].recipe.stages[0].text_reduction == "block"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("budgets", "budgts", r"unknown key budgts; did you mean budgets\?"),
        ("templates", "template", r"unknown key eval.template; did you mean templates\?"),
        ("tokens = [16, 4]", "token = [16, 4]", r"unknown key image.token; did you mean tokens\?"),
        ("tokens = [16, 4]", "tokens = [16, 5]", "image.tokens 5: no square of patches: set 4 or 9"),
        ("tokens = [16, 4]", 'tokens = [16, 4]\nways = ["rezise"]', "unknown way 'rezise'; did you mean resize"),
        ("tokens = [16, 4]", "tokens = [16, 16]", "image.tokens names a number twice"),
        ("tokens = [16, 4]", "tokens = 16", "image.tokens is 16: set a list"),
        ('base = "debug"', 'base = "debgu"', r"unknown recipe 'debgu': did you mean debug\?"),
        ('base = "debug"', 'base = "debug"\nheld_out = "base-i4-t16"', "did you mean .*base-i4-resize-t16"),
        ('base = "debug"', 'base = "debug"\nstudies = ["big"]', "unknown size 'big'"),
        ("cooldown = 0.2", "cooldown = 2", "cooldown is 2: set the share"),
        ('[80, "160"]', "[80, 85]", "budgets: 85 leaves 64 samples before its cool-down, and 80 are needed"),
        ('[80, "160"]', "[16]", "budgets: 16 leaves 0 samples"),
        ('[80, "160"]', '["many"]', "budgets=many: takes a whole number"),
        ("stages.0.warmup", "stages.0.warmpu", "did you mean .*warmup_samples"),
        ("[set]", "[set", "isn't TOML"),
        ("data = ", "datum = ", "unknown key"),
        ("tokens = [16, 4]", "tokens = [16, 4]\nways = []", r"image.ways is \[\]: set a list of names"),
        ("tokens = [16, 4]", 'tokens = [16, 4]\nways = ["grid", "grid"]', "image.ways names one twice"),
        ("tokens = [16, 4]", "tokens = [16, 4]\nways = 3", "image.ways is 3: set a list of names"),
        ("[image]", "[sizes]\nsmall = 3\n[image]", "sizes.small is 3: make it a table"),
        ("[image]", '[sizes."../large"]\n[image]', "sizes: '../large' can't be the name of a folder"),
        ('base = "debug"', 'base = "debug"\nstudies = 3', "studies is 3: set a list of names"),
        ('base = "debug"\ndata = ', 'base = "debug"\ndata = {a = 1} # ', "it has no data"),
        ("[eval]\ndata = ", "[eval]\ndata = 3 # ", "it measures nothing"),
    ],
)
def test_a_bad_file_is_one_line(write, old, new, said):
    done = CliRunner().invoke(main, ["sweep", str(write((old, new))), "--dry-run"])
    assert done.exit_code == 2 and len(done.stderr.splitlines()) == 1
    assert re.search(said, done.stderr), done.stderr


@pytest.mark.parametrize("missing", ["data", "eval"])
def test_without_data_there_is_no_sweep(tmp_path, missing):
    path = tmp_path / "s.toml"
    path.write_text('base = "debug"\n' + ('[eval]\ndata = "x"' if missing == "data" else 'data = "x"'))
    with pytest.raises(UserError, match=r"has no data" if missing == "data" else r"measures nothing"):
        read_sweep(path)


# ---- Trunk and branches ----------------------------------------------------------------------------------------------


@given(st.lists(st.integers(40, 4000), min_size=4, max_size=4, unique=True))
def test_four_lengths_cost_at_most_one_and_a_half_times_the_longest(steps):
    stage = debug().stages[0]
    try:
        branches = branches_of(stage, sorted(each * stage.batch_size for each in steps), 0.15)
    except UserError as error:
        assert "before its cool-down" in str(error)  # two budgets whose forks are less than a batch apart
        return
    assert samples_trained(branches) <= 1.5 * branches[-1].samples


def test_a_branch_has_the_weights_of_the_run_from_its_first_sample(whole, pairs_dataset, tmp_path):
    path, folder = whole
    (first, _) = read_sweep(path).configurations
    for branch in first.branches:
        train(
            branch_of(first.recipe, branch), pairs_dataset, tmp_path / str(branch.samples), device_name="cpu", workers=0
        )
        ours, theirs = (
            load_file(checkpoint.find(place / str(branch.samples)) / "model.safetensors")
            for place in (tmp_path, folder / first.name / "seed0")
        )
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_killed_ten_times_it_ends_with_the_same_table(whole, tmp_path):
    path, folder = whole
    chance, kills = random.Random(14), 0
    while kills < 10:
        place = chance.choice(sorted(PLACES))
        (ended,) = end_ranks(
            sweep_until, path, tmp_path, place, chance.randint(1, 3 if place == "step" else 2), ranks=1
        )
        assert ended.code in (0, -9), ended.err
        kills += 1
    (ended,) = end_ranks(sweep_until, path, tmp_path, ranks=1)
    assert ended.code == 0, ended.err
    assert (tmp_path / command.TABLE).read_bytes() == (folder / command.TABLE).read_bytes()


def test_finished_runs_are_never_made_again(whole, monkeypatch):
    path, folder = whole
    monkeypatch.setattr(run, "train", lambda *_, **__: pytest.fail("trained again"))
    before = (folder / command.TABLE).read_bytes()
    command.run_sweep(read_sweep(path), folder, device="cpu")
    assert (folder / command.TABLE).read_bytes() == before


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("warmup_samples = 16", "warmup_samples = 32", r"made by another sweep \(recipe.stages.0.warmup_samples: 16"),
        ('[80, "160"]', '[48, 80, "160"]', "beyond the fork of the budget 48"),
    ],
)
def test_another_sweep_needs_another_folder(whole, write, old, new, said):
    with pytest.raises(UserError, match=said):
        command.run_sweep(read_sweep(write((old, new))), whole[1], device="cpu", workers=0)


# ---- The law ---------------------------------------------------------------------------------------------------------


def row_of(configuration, branch, inverse, noise=0.0):
    """A result by a law: more by size and samples, less by halvings of tokens, by `inverse` less of that by size."""
    size, halvings = np.log2(configuration.weights) - 15, np.log2(16 / configuration.image.tokens)
    logits = -1 + 0.3 * size + 0.2 * np.log2(branch.samples / 80) - halvings * (0.5 - inverse * size) + noise
    return {
        "configuration": configuration.name, "size": configuration.size, "weights": configuration.weights,
        "image_tokens": configuration.image.tokens, "image_way": configuration.image.way,
        "text_tokens": configuration.text.tokens, "text_way": configuration.text.way, "seed": configuration.seed,
        "samples": branch.samples, "flops": float(configuration.weights * branch.samples * configuration.image.tokens),
        "accuracy": 1 / (1 + np.exp(-logits)), "measured_on": 10**9, "seconds": 1.0,
        "trunk_seconds": branch.samples / 16,
    }  # fmt: skip


def rows_of(sweep, inverse, noise):
    chance = np.random.default_rng(0)
    return [
        row_of(each, branch, inverse, noise * chance.normal())
        for each in sweep.configurations
        for branch in each.branches
    ]


@pytest.mark.parametrize(
    ("inverse", "verdict"), [(0.15, "yes"), (-0.15, "the opposite"), (0.0, "not told apart from chance")]
)
def test_the_fit_finds_the_law_that_made_the_rows(larger, inverse, verdict):
    exact = fit_law(rows_of(larger, inverse, 0.0), larger.ways)
    values = {term.name: term.value for term in exact.terms}
    assert values["image halvings x size"] == pytest.approx(inverse, abs=1e-6)
    assert (values["size"], values["samples"]) == (pytest.approx(0.3, abs=1e-6), pytest.approx(0.2, abs=1e-6))
    noisy = fit_law(rows_of(larger, inverse, 0.03), larger.ways)
    (term,) = (term for term in noisy.terms if term.name == "image halvings x size")
    assert term.low < term.value < term.high and term.low < inverse < term.high
    assert noisy.to_json()["holds"] == {"image": verdict}


def test_a_prediction_is_the_law_at_the_place_with_the_scatter_of_a_run(larger):
    rows = rows_of(larger, 0.1, 0.05)
    told = [row for row in rows if row["configuration"] == larger.held_out]
    law = fit_law([row for row in rows if row["configuration"] != larger.held_out], larger.ways)
    for row in told:
        found = predict(law, row)
        assert found["low"] < found["value"] < found["high"]
        assert found["value"] == pytest.approx(row["accuracy"], abs=0.06)
        assert 0.01 < found["high"] - found["low"] < 0.2


def test_too_few_sizes_or_lengths_are_no_law(larger):
    rows = rows_of(larger, 0.1, 0.0)
    for some in (
        [],
        [row for row in rows if row["size"] == "small"],
        [row for row in rows if row["image_tokens"] == 16],
    ):
        assert fit_law(some, larger.ways) is None


def test_what_is_lost_is_against_all_tokens_of_the_same_seed(larger):
    found = drops(rows_of(larger, 0.1, 0.0), "image", larger.ways)
    assert [(each["size"], each["tokens"]) for each in found] == [
        (s, t) for s in ("small", "large") for t in (16, 9, 4)
    ]
    assert [each["drop"] for each in found if each["tokens"] == 16] == [0, 0]
    small, large = (each["drop"] for each in found if each["tokens"] == 4)
    assert 0 < large < small


def test_nothing_as_cheap_beats_the_front(larger):
    rows = rows_of(larger, 0.1, 0.0)
    front = pareto(rows)
    assert front == sorted(front) and len({value for _, value in front}) == len(front) > 2
    assert all(any(flops <= row["flops"] and value >= row["accuracy"] - 1e-9 for flops, value in front) for row in rows)


# ---- The held-out point, and the page --------------------------------------------------------------------------------


@pytest.fixture
def made_up(larger, monkeypatch):
    """A sweep whose trainings are made up; the list of what was trained."""
    trained: list[str] = []

    def train_configuration(sweep, how, configuration):
        (how.folder / configuration.name).mkdir(parents=True, exist_ok=True)
        if configuration.name == sweep.held_out:
            assert (how.folder / command.PREDICTION).exists(), "trained before it was predicted"
        trained.append(configuration.name)
        return [row_of(configuration, branch, 0.1) for branch in configuration.branches]

    monkeypatch.setattr(run, "train_configuration", train_configuration)
    return trained


def test_the_held_out_point_is_predicted_before_it_is_trained_and_kept(larger, made_up, tmp_path):
    result = command.run_sweep(larger, tmp_path)
    assert made_up[-2:] == [larger.held_out] * 2 and larger.held_out not in made_up[:-2]
    stored = json.loads((tmp_path / command.PREDICTION).read_text())
    for point in result["held_out"]["points"]:
        assert point["value"] == pytest.approx(point["measured"], abs=1e-3)
    changed = {**stored, "points": [{**point, "value": 0.5} for point in stored["points"]]}
    (tmp_path / command.PREDICTION).write_text(json.dumps(changed))
    again = command.run_sweep(larger, tmp_path)
    assert [point["value"] for point in again["held_out"]["points"]] == [0.5, 0.5]
    (tmp_path / command.PREDICTION).unlink()
    with pytest.raises(UserError, match="was trained before it was predicted"):
        command.run_sweep(larger, tmp_path)


def test_the_law_is_of_the_way_that_the_sweep_names_first(write, monkeypatch, tmp_path):
    """Where all sizes have all ways too, and of the held-out size the first way isn't trained yet."""
    all_sizes = LARGE.replace('studies = ["small"]', "")
    ways = 'tokens = [16, 9, 4]\nways = ["resize", "random", "block"]'
    sweep = read_sweep(write(("[eval]\n", all_sizes), ("tokens = [16, 4]", ways)))

    def train_configuration(sweep, how, configuration):
        (how.folder / configuration.name).mkdir(parents=True, exist_ok=True)
        worse = 0.0 if configuration.image.way in ("all", "resize") else -1.0
        return [row_of(configuration, branch, 0.1, worse) for branch in configuration.branches]

    monkeypatch.setattr(run, "train_configuration", train_configuration)
    result = command.run_sweep(sweep, tmp_path)
    (halvings,) = (term["value"] for term in result["law"]["terms"] if term["name"] == "image halvings")
    assert result["law"]["residual"] == pytest.approx(0, abs=1e-6)
    size = np.mean([np.log2(row["weights"]) - 15 for row in result["rows"] if row["image_way"] in ("all", "resize")])
    assert halvings == pytest.approx(0.1 * size - 0.5, abs=1e-6)
    for point in result["held_out"]["points"]:
        assert point["value"] == pytest.approx(point["measured"], abs=1e-3)


def test_a_budget_that_is_left_out_later_is_left_out_of_the_prediction(write, made_up, tmp_path):
    command.run_sweep(read_sweep(write(*LARGER)), tmp_path)
    less = read_sweep(write(*LARGER, ('[80, "160"]', "[80]")))
    (point,) = command.run_sweep(less, tmp_path)["held_out"]["points"]
    assert point["samples"] == 80


def test_the_page_has_the_figures_and_the_law(larger, made_up, tmp_path):
    result = command.run_sweep(larger, tmp_path)
    page = Path(result["page"]).read_text()
    for said in (
        "trained in 3m 12s",  # 16 trunks of 9 or 10 s, 32 branches of 1 s
        "small: accuracy by image+text tokens",
        "large: accuracy by image+text tokens",
        "front of all sizes",
        "accuracy lost to fewer image tokens",
        "small: ways to fewer image tokens",
        "image halvings x size",
        "larger encoders less? Yes.",
        f"Predicted before it was trained: {larger.held_out}",
    ):
        assert said in page, said
    assert "large: ways to fewer" not in page


# ---- The command -----------------------------------------------------------------------------------------------------


def sweep_command(*arguments, code=0):
    done = CliRunner().invoke(main, ["sweep", *map(str, arguments)])
    assert done.exit_code == code, done.output
    return done


def test_a_dry_run_prices_every_configuration_and_writes_nothing(write, tmp_path):
    path = write(*LARGER)
    values = json.loads(sweep_command(path, "--dry-run", "--json", "--devices", "2xH100-SXM", "--price", 2).stdout)
    assert values["configurations"] == 16 and values["runs"] == 32
    assert values["samples"] == 16 * samples_trained(read_sweep(path).configurations[0].branches)
    assert values["hours"] == pytest.approx(values["device_hours"] / 2)
    assert values["money"] == pytest.approx(2 * values["device_hours"])
    hours = {row["configuration"]: row["hours"] for row in values["rows"]}
    assert hours["large-i16-t16"] > hours["large-i4-resize-t16"] > hours["small-i4-resize-t16"] > 0
    text = sweep_command(path, "--dry-run").stdout
    assert "32 runs from 16 trunks, 1.10 times the longest runs" in text and "large-i9-resize-t16" in text
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_measure_calibrates_the_dry_run(write, monkeypatch):
    from clipkit.train.plan import measure
    from clipkit.train.plan.step import Calibration

    slow = Calibration(0.007, 0.008, 64.0, 0.1)
    monkeypatch.setattr(measure, "measured_calibration", lambda chip: slow)
    path = write()
    plain, measured = (
        json.loads(sweep_command(path, "--dry-run", "--json", *more).stdout)["hours"] for more in ([], ["--measure"])
    )
    assert measured > 20 * plain


@pytest.mark.parametrize(
    ("arguments", "said"),
    [((), "--out names the folder"), (("--out", "o", "--measure"), "are for --dry-run"),
     (("--out", "o", "--devices", "cpu"), "are for --dry-run"), (("--out", "o", "--price", "1"), "are for --dry-run")],
)  # fmt: skip
def test_options_that_go_together(write, arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said in sweep_command(write(), *arguments, code=2).stderr


def test_the_command_sweeps_and_prints_json(whole):
    path, folder = whole
    printed = sweep_command(path, "--out", folder, "--json", "--device", "cpu", "--workers", 0, "--engine", "local")
    values = json.loads(printed.stdout.splitlines()[-1])
    assert len(values["rows"]) == 4 and values["law"] is None and values["held_out"] is None
    assert "the page: " in sweep_command(path, "--out", folder).stdout


def test_a_metric_that_the_task_lacks_is_one_line(write, tmp_path):
    path = write(("templates", 'metric = "top9"\ntemplates'))
    assert "has no top9" in sweep_command(path, "--out", tmp_path, "--device", "cpu", "--workers", 0, code=2).stderr


def test_a_length_that_a_way_can_not_reach_is_refused_before_any_training(write, tmp_path):
    path = write(("tokens = [16, 4]", 'tokens = [16, 9]\nways = ["resize", "grid"]'))
    error = sweep_command(path, "--out", tmp_path, "--device", "cpu", code=2).stderr
    assert "base-i9-grid-t16: can't keep 9 patches of 4 x 4 by grid: choose 1, 4, 16" in error
    assert not list(tmp_path.glob("base*"))
    assert sweep_command(path, "--dry-run", code=2).stderr == error


def test_a_signal_ends_the_sweep_and_says_how_to_go_on(whole, tmp_path, monkeypatch):
    stopped = Summary(tmp_path, None, 32, 1.0, 2.0, False, True, signal.SIGINT)
    monkeypatch.setattr(run, "train", lambda *_, **__: stopped)
    done = sweep_command(whole[0], "--out", tmp_path, "--device", "cpu", code=130)
    assert "stopped at 32 samples: the same command goes on" in done.stderr


def test_each_configuration_has_a_gpu_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "gpus", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "7")
    how = run.How(tmp_path, tmp_path)
    with lock(tmp_path / "gpus" / "0"), run.one_gpu(how):
        assert run.os.environ["LOCAL_RANK"] == "1"
        with pytest.raises(UserError, match="all 2 GPUs are taken"), run.one_gpu(how):
            pass
    assert run.os.environ["LOCAL_RANK"] == "7"


def test_the_embedded_pairs_are_split_by_style(tmp_path):
    name = "embedded:emoji-choice"
    text = f'base = "emoji-demo"\ndata = "{name}"\nbudgets = ["64K"]\n[eval]\ndata = "{name}"\n'
    (tmp_path / "s.toml").write_text(text + "[image]\ntokens = [9]\n[text]\ntokens = [8]\n")
    sweep = read_sweep(tmp_path / "s.toml")
    run.prepare_data(sweep, tmp_path)
    training, heldout = run.embedded_paths(tmp_path, name)
    rows, left = pq.read_table(training / "pairs.parquet"), pq.read_table(heldout)
    assert set(left["vendor"].to_pylist()) == {run.CHOICE_STYLE}
    assert run.CHOICE_STYLE not in set(rows["vendor"].to_pylist())
    assert set(left["label"].to_pylist()) <= set(rows["label"].to_pylist())
    assert len(run.open_task(sweep, tmp_path)) == left.num_rows > 400
    with pytest.raises(UserError, match=r"did you mean embedded:emoji"):
        run.embedded_paths(tmp_path, "embedded:emojis")
