"""A machine's own calibration: exact where the model of the step holds, refused for another machine's chip."""

import json

import pytest
from click.testing import CliRunner

from clipkit.cli.main import main
from clipkit.train.plan import measure
from clipkit.train.plan.step import Calibration


def test_two_measured_steps_give_back_the_shares_that_they_were_made_with():
    device, chip = measure.here()
    true = Calibration(0.4, 0.9, overhead=0.0)
    steps = [measure.step_of(recipe, device, chip, true) for recipe in measure.PROBES]
    found = measure.calibrate(steps, [sum(step.seconds()) for step in steps])
    assert (found.matrix, found.memory) == (pytest.approx(0.4), pytest.approx(0.9))
    odd = measure.calibrate(steps, [5.0, 0.001])  # no shares explain these
    assert odd.matrix == odd.memory > 0


def test_steps_are_really_taken():
    device, _ = measure.here()
    tiny = measure.small_recipe(64, 1, 32, 8, batch=4)
    assert 0 < measure.measure_step(tiny, device, seconds=0.02) < 5


def test_the_plan_takes_what_was_measured(monkeypatch):
    monkeypatch.setattr(measure, "measure_step", lambda recipe, device: 2.0)
    arguments = ["plan", "--recipe", "emoji-demo", "--devices", "cpu", "--measure", "--json"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    values = json.loads(done.output)
    assert "calibration of two small models here" in " ".join(values["assumptions"])
    assert values["hours"] > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--recipe", "debug", "--devices", "H200"], "this machine has cpu, not H200"),
        (["--budget", "5"], "give --recipe"),
    ],
)
def test_another_machines_devices_cannot_be_measured_here(arguments, said):
    done = CliRunner().invoke(main, ["plan", "--measure", *arguments])
    assert done.exit_code == 2
    assert said in done.output
