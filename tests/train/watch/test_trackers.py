"""W&B and MLflow for real: offline, and in a folder."""

import json
import sys

import pytest

from clipkit.errors import UserError
from clipkit.log import Writer, read_metrics
from clipkit.train.catalogue import debug
from clipkit.train.loop import train
from clipkit.train.watch import trackers

CPU = {"device_name": "cpu", "workers": 1}


class KilledError(Exception):
    """Stands for SIGKILL."""


@pytest.fixture
def mlflow(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())


def test_a_run_logs_to_both_and_goes_on_there(pairs_dataset, tmp_path, monkeypatch, mlflow):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    real, written = trackers.RunWriter.write, []

    def write(self, values):
        written.append(values)
        if len(written) == 7:
            raise KilledError
        real(self, values)

    monkeypatch.setattr(trackers.RunWriter, "write", write)
    with pytest.raises(KilledError):
        train(debug(), pairs_dataset, run, **CPU, log_to=("wandb", "mlflow"))
    ids = json.loads((run / "trackers.json").read_text())
    assert train(debug(), pairs_dataset, run, **CPU, log_to=("wandb", "mlflow"), resume=True).finished
    assert json.loads((run / "trackers.json").read_text()) == ids

    lines = {line["samples_seen"]: line["loss"] for line in read_metrics(run)}
    found = mlflow.get_metric_history(ids["mlflow"], "loss")
    assert {each.step: each.value for each in found} == lines
    assert len(found) == len(lines) + 2  # 80 and 96 came twice, with the same numbers
    tracked = mlflow.get_run(ids["mlflow"])
    assert tracked.info.status == "FINISHED"
    assert tracked.info.run_name == "run"
    assert tracked.data.params["stages.0.batch_size"] == "16"
    assert mlflow.get_experiment(tracked.info.experiment_id).name == "clipkit"

    files = sorted(run.glob(f"wandb/offline-run-*-{ids['wandb']}/run-{ids['wandb']}.wandb"))
    contents = b"".join(path.read_bytes() for path in files)
    assert len(files) == 2
    assert all(repr(loss).encode() in contents for loss in list(lines.values())[:5])
    assert b"accuracy_image_to_text" in contents


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_named_with_its_extra(pairs_dataset, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"--log-to {name} needs a package .*: pip install 'clipkit\[{name}\]'"):
        train(debug(), pairs_dataset, tmp_path / "run", **CPU, log_to=(name,))


def test_a_tracker_that_cannot_begin_says_why_in_one_line(pairs_dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://x")
    with pytest.raises(UserError, match=r"--log-to mlflow failed \(.*\): set MLFLOW_TRACKING_URI") as error:
        train(debug(), pairs_dataset, tmp_path / "run", **CPU, log_to=("mlflow",))
    assert "\n" not in str(error.value)


def test_a_tracker_that_fails_is_left_and_costs_nothing(capsys):
    class Broken(Writer):
        def write(self, values):
            raise ConnectionError("gone")

        def close(self):
            raise AssertionError("it was left")

    class Own(Writer):
        def write(self, values):
            written.append(values)

    written = []
    writer = trackers.RunWriter(Own(), [Broken()])
    for seen in (1, 2):
        writer.write({"samples_seen": seen})
    writer.close()
    assert len(written) == 2
    assert capsys.readouterr().err.count("Broken gets no more metrics, training goes on: gone") == 1
