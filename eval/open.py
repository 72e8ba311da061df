"""Data and a kind of task: one way to open them all, in which an option that a kind can't heed is refused."""

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from clipkit.errors import UserError
from clipkit.eval.datasets import refuse_several
from clipkit.eval.evaluation import EvaluationTask

TaskKind = Literal["classification", "retrieval", "choice", "linear-probe", "few-shot", "knn"]
KINDS: tuple[TaskKind, ...] = get_args(TaskKind)
# Options whose Python names aren't theirs.
NAMES = {"templates_name": "templates"}


def open_data(kind: TaskKind, data: Path, **options: Any) -> EvaluationTask:
    """The task of a kind on some data; options that are None weren't given.

    Raises UserError for one that the kind can't heed, for data that it can't read, and for a folder of datasets.
    """
    opener = opener_of(kind)
    given = {name: value for name, value in options.items() if value is not None}
    for name in given.keys() - inspect.signature(opener).parameters.keys():
        option = f"--{NAMES.get(name, name).replace('_', '-')}"
        raise UserError(f"{option} can't be heeded: a {kind} task has no use for it: leave it out, or choose --task")
    refuse_several(data)
    return opener(data, **given)


def opener_of(kind: TaskKind) -> Callable[..., EvaluationTask]:
    """What opens the data of a kind of task; its keywords are the options that it heeds."""
    match kind:
        case "classification":
            from clipkit.eval.classification.task import open_task

            return open_task
        case "retrieval":
            from clipkit.eval.retrieval.task import open_retrieval

            return open_retrieval
        case "choice":
            from clipkit.eval.choice.task import open_choice

            return open_choice
        case "linear-probe" | "few-shot" | "knn":
            from clipkit.eval.probe.task import open_probe

            return partial(open_probe, kind)
