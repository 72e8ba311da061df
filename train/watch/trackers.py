"""Weights & Biases and MLflow, for runs that are asked to log there too.

Each is a writer beside the run's own files. Projects, servers and logins are the libraries' business, by their own
environment variables. What they know the run by is kept in its folder, so that a resumed run goes on in the same place.
"""

import os
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from clipkit.config import to_json
from clipkit.errors import UserError, one_line
from clipkit.log import MetricsWriter, Writer, warn_on_stderr
from clipkit.storage.files import read_json, write_json
from clipkit.train.catalogue import assignments
from clipkit.train.recipes import Recipe
from clipkit.train.start import Start, by_number

Tracker = Literal["wandb", "mlflow"]
NAME = "clipkit"  # of the project or experiment, where the environment gives none
IDS_FILE = "trackers.json"
MOST_PARAMETERS = 100  # that MLflow takes at once
REMEDIES = {
    "wandb": "run `wandb login`, or set WANDB_MODE=offline",
    "mlflow": "set MLFLOW_TRACKING_URI to your server",
}


def open_writers(folder: Path, recipe: Recipe, start: Start, log_to: Sequence[Tracker]) -> Writer:
    """The run's own files and the trackers that were asked for. Raises UserError for a tracker that doesn't answer, or
    whose package isn't installed.
    """
    ids_path = folder / IDS_FILE
    ids: dict[str, str] = read_json(ids_path) if start.own and ids_path.exists() else {}
    settings = dict(line.split("=", 1) for line in assignments(by_number(to_json(recipe))))
    trackers: list[Writer] = []
    for name in log_to:
        try:
            make = WandbWriter if name == "wandb" else MlflowWriter
            tracker = make(folder, settings, ids.get(name))
        except ImportError as error:
            raise UserError(f"--log-to {name} needs a package ({error}): pip install 'clipkit[{name}]'") from error
        except Exception as error:  # both raise errors of many kinds: of networks, logins, their own
            raise UserError(f"--log-to {name} failed ({one_line(error)}): {REMEDIES[name]}") from error
        ids[name] = tracker.id
        trackers.append(tracker)
    if trackers:
        write_json(ids_path, ids)
    return RunWriter(MetricsWriter(folder, start.samples_seen), trackers)


class RunWriter(Writer):
    """The run's own files first, then the trackers: one that fails, with whatever error, is warned of once and left.
    Days of training mustn't end because a server did.
    """

    def __init__(self, own: Writer, trackers: list[Writer]) -> None:
        self.own, self.trackers = own, trackers

    def write(self, values: dict[str, float | int | str]) -> None:
        """Write one line of metrics everywhere."""
        self.own.write(values)
        for tracker in list(self.trackers):
            try:
                tracker.write(values)
            except Exception as error:
                self.trackers.remove(tracker)
                warn_on_stderr(f"{type(tracker).__name__} gets no more metrics, training goes on: {one_line(error)}")

    def rewind(self, samples_seen: int) -> None:
        """Drop lines from the run's own files. Trackers keep theirs: the new ones have the same places."""
        self.own.rewind(samples_seen)

    def close(self) -> None:
        """Close all of them."""
        self.own.close()
        for tracker in self.trackers:
            try:
                tracker.close()
            except Exception as error:
                warn_on_stderr(f"{type(tracker).__name__} didn't end well: {one_line(error)}")


def numbers(values: Mapping[str, float | int | str]) -> dict[str, float]:
    """The numbers of a line of metrics."""
    return {name: float(value) for name, value in values.items() if not isinstance(value, str)}


class WandbWriter(Writer):
    """Weights & Biases: project WANDB_PROJECT, or NAME; offline with WANDB_MODE=offline."""

    def __init__(self, folder: Path, settings: Mapping[str, str], known: str | None) -> None:
        """Go on with the run of the id `known`, or begin one."""
        import wandb

        self.id = known or secrets.token_hex(4)
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", NAME),
            name=folder.resolve().name,
            id=self.id,
            resume="allow",
            dir=folder,
            config=dict(settings),
            settings=wandb.Settings(console="off"),  # the progress line isn't for a file
        )
        self.run.define_metric("samples_seen")
        self.run.define_metric("*", step_metric="samples_seen")

    def write(self, values: dict[str, float | int | str]) -> None:
        """Log one line over samples seen."""
        self.run.log(numbers(values))

    def close(self) -> None:
        """Send the rest."""
        self.run.finish()


class MlflowWriter(Writer):
    """MLflow: the server or folder MLFLOW_TRACKING_URI, experiment MLFLOW_EXPERIMENT_NAME, or NAME."""

    def __init__(self, folder: Path, settings: Mapping[str, str], known: str | None) -> None:
        """Go on with the run of the id `known`, or begin one."""
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self.metric, self.client = Metric, MlflowClient()
        if known:
            self.id = known
            self.client.update_run(known, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", NAME)
        experiment = self.client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self.client.create_experiment(name)
        self.id = self.client.create_run(number, run_name=folder.resolve().name).info.run_id
        parameters = [Param(key, value) for key, value in settings.items()]
        for first in range(0, len(parameters), MOST_PARAMETERS):
            self.client.log_batch(self.id, params=parameters[first : first + MOST_PARAMETERS])

    def write(self, values: dict[str, float | int | str]) -> None:
        """Queue one line; its step is the samples seen. A server that is slow to answer holds up nothing."""
        now, step = int(time.time() * 1000), int(values["samples_seen"])
        metrics = [self.metric(name, value, now, step) for name, value in numbers(values).items()]
        self.client.log_batch(self.id, metrics, synchronous=False)

    def close(self) -> None:
        """Send the rest."""
        import mlflow

        mlflow.flush_async_logging()
        self.client.set_terminated(self.id)
