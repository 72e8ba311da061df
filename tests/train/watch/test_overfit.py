"""The health check: what learns by heart and what can't, on one rank and on two."""

import pytest
from click.testing import CliRunner
from colour_pairs import pairs, write_tar
from ranks import command, run_ranks

from clipkit.cli.main import main
from clipkit.config import set_values
from clipkit.train.catalogue import debug
from clipkit.train.watch.overfit import overfit

# Eight tokens would cut all of these captions before they differ.
WHOLE = ["--set", "stages.0.context_length=16", "--set", "stages.0.text_reduction=truncate"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_tar(folder / "00000.tar", pairs(32))
    return folder


def check(*arguments):
    return CliRunner().invoke(main, ["train", "--recipe", "debug", "--device", "cpu", *map(str, arguments)])


def test_a_sound_recipe_learns_a_few_samples_by_heart(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = check("--data", data, "--overfit", 32, *WHOLE)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("good: loss 3.")
    assert "on 32 samples" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_more_samples_than_there_are_means_all(data):
    recipe = set_values(debug(), WHOLE[1::2])
    assert overfit(recipe, data, 1000, device_name="cpu").samples == 32


def test_captions_that_are_all_cut_to_the_same_are_not_learned(data, monkeypatch):
    monkeypatch.setattr("clipkit.train.watch.overfit.STEPS", 60)
    result = check("--data", data, "--overfit", 32, "--set", "stages.0.context_length=4")
    assert result.exit_code == 1
    assert result.stdout.startswith("not learned: loss ")
    assert "look whether images or captions (or their first tokens) are the same" in result.stdout


def test_json_says_the_same(data, monkeypatch):
    result = check("--data", data, "--overfit", 16, *WHOLE, "--json")
    assert '"learned": true' in result.stdout


def test_two_ranks_learn_together(data):
    arguments = ["train", "--data", str(data), "--recipe", "debug", "--device", "cpu", "--overfit", "32", *WHOLE]
    assert "".join(run_ranks(command, *arguments)).count("good: ") == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "Missing option '--out'"),
        (["--overfit", 8, "--out", "run"], "leave out --out"),
        (["--overfit", 8, "--resume"], "leave out --resume"),
        (["--overfit", 1], "'--overfit'"),
    ],
)
def test_what_does_not_go_together_is_refused(data, arguments, says):
    result = check("--data", data, *arguments)
    assert result.exit_code == 2
    assert says in result.stderr
