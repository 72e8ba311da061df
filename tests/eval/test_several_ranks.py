"""Several ranks share an evaluation, and find what one process finds: the same numbers, files and cache."""

import dataclasses
import json
import os
import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from ranks import command, end_ranks, run_ranks
from small_encoder import small_run
from torch import Tensor

from clipkit import embedded
from clipkit.config import set_values
from clipkit.device import pick
from clipkit.embedding.encoder import Compute, Encoder
from clipkit.errors import UserError
from clipkit.eval.classification.task import open_task
from clipkit.eval.evaluation import Outcome, evaluate
from clipkit.interop.load import load
from clipkit.log import read_metrics
from clipkit.pixels.images import Preprocess
from clipkit.train import loop
from clipkit.train.catalogue import debug

BROKEN = 17


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Emoji, of which one can't be read."""
    path = tmp_path_factory.mktemp("data") / "emoji.parquet"
    table = pq.read_table(embedded.emoji_parquet("heldout")).slice(0, 110)
    images = table["image"].to_pylist()
    images[BROKEN] = b"<html>"
    pq.write_table(table.set_column(table.column_names.index("image"), "image", [images]), path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(tmp_path_factory.mktemp("model"))


def arguments(model: Path, data: Path, folder: Path) -> list[str]:
    given = ["zeroshot", "--ckpt", str(model), "--data", str(data), "--templates", "openai-7", "--device", "cpu"]
    return [*given, "--json", "--batch-size", "32", "--cache", str(folder / "cache"), "--out", str(folder / "run")]


@pytest.fixture(scope="module")
def alone(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What one process prints and writes."""
    folder = tmp_path_factory.mktemp("alone")
    (printed,) = run_ranks(command, *arguments(model, data, folder), ranks=1)
    return printed, folder


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_find_and_write_what_one_process_does(
    model: Path, data: Path, alone: tuple[str, Path], tmp_path: Path, ranks: int
) -> None:
    expected, before = alone
    ended = end_ranks(command, *arguments(model, data, tmp_path), ranks=ranks)
    assert [each.code for each in ended] == [0] * ranks, ended[0].err
    assert [each.out for each in ended] == [expected] + [""] * (ranks - 1)
    assert [each.err for each in ended[1:]] == [""] * (ranks - 1)
    assert json.loads(expected.splitlines()[0])["unreadable"] == 1
    one, several = ((folder / "run" / "results.jsonl").read_text() for folder in (before, tmp_path))
    assert several == one
    name = "predictions-emoji.parquet"
    assert pq.read_table(tmp_path / "run" / name).equals(pq.read_table(before / "run" / name))
    kept = [{path.name for path in (folder / "cache").glob("??/*")} for folder in (before, tmp_path)]
    assert kept[0] == kept[1] and len(kept[0]) >= 5


def deal_as_rank(fails: int) -> None:
    """Deal seven batches; batch `fails` fails, in reading if it is odd."""
    compute, done = Compute(pick("cpu")), []

    def begin(numbers: range, own: int) -> int:
        assert own in numbers
        if own == fails and own % 2:
            raise UserError(f"batch {own} can't be read")
        return own

    def work(number: int) -> int:
        if number == fails:
            raise ZeroDivisionError(f"batch {number}")
        done.append(number)
        return number * number

    try:
        print(list(compute.deal(7, begin, work)), done)
    except (UserError, ZeroDivisionError) as error:
        print(type(error).__name__, error)


def test_batches_are_dealt_in_turn_and_gathered() -> None:
    squares = [number**2 for number in range(7)]
    printed = [f"{squares} {done}\n" for done in ([0, 3, 6], [1, 4, 6], [2, 5, 6])]
    assert run_ranks(deal_as_rank, 99, ranks=3) == printed
    device = dataclasses.replace(pick("cpu"), rank=2, world=3)
    assert Compute(device).own_numbers(7) == [2, 5, 6] and Compute(device).own_numbers(0) == []


@pytest.mark.parametrize(("fails", "says"), [(3, "UserError batch 3 can't be read"), (4, "ZeroDivisionError batch 4")])
def test_what_fails_on_one_rank_ends_the_others_too(fails: int, says: str) -> None:
    assert run_ranks(deal_as_rank, fails) == [f"{says}\n"] * 2


def test_ranks_of_other_data_are_told() -> None:
    (first, second) = run_ranks(deal_so_many)
    assert first == second == "the ranks don't see the same data: give the processes of all machines the same files\n"


def deal_so_many() -> None:
    device = pick("cpu")
    try:
        list(Compute(device).deal(3 + device.rank, lambda _, own: own, str))
    except UserError as error:
        print(error)


# ---- While training ------------------------------------------------------------------------------------------------


class Accidents:
    """A task in whose second evaluation the second rank's model fails; in the third, that rank gets SIGTERM."""

    name = "emoji"

    def __init__(self, data: Path) -> None:
        self.task, self.measured = open_task(data, templates_name="plain"), 0

    def measure(self, encoder: Encoder, compute: Compute) -> Outcome:
        self.measured += 1
        compute = dataclasses.replace(compute, batch_size=16)
        if compute.device.rank == 0 or self.measured not in (2, 3):
            return self.task.measure(encoder, compute)
        encoder.model.encode_image = self.run_out_of_memory if self.measured == 2 else self.get_signal
        try:
            return self.task.measure(encoder, compute)
        finally:
            del encoder.model.encode_image

    def run_out_of_memory(self, image_BCHW: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no memory for a batch")

    def get_signal(self, image_BCHW: Tensor) -> Tensor:
        os.kill(os.getpid(), signal.SIGTERM)
        return torch.zeros(len(image_BCHW), 32)


def train_and_evaluate(pairs: Path, data: Path, run: Path) -> None:
    recipe, task = set_values(debug(), ["cadence.evaluate_samples=64"]), Accidents(data)
    loop.train(recipe, pairs, run, device_name="cpu", workers=1, task=task, resume=(run / "checkpoints").exists())
    print(len(task.task.pictures.kept(Preprocess(32), 16) or task.task.pictures.kept(Preprocess(48), 16)))


def test_all_ranks_evaluate_while_training(pairs_dataset: Path, data: Path, tmp_path: Path) -> None:
    ended = end_ranks(train_and_evaluate, pairs_dataset, data, tmp_path)
    assert [each.code for each in ended] == [0, 0], ended
    # Eight batches, which each rank decoded and keeps a half of.
    assert [each.out for each in ended] == ["4\n", "4\n"]
    lines = [line for line in read_metrics(tmp_path) if "emoji/top1" in line or "evaluation_error" in line]
    assert [line["samples_seen"] for line in lines] == [64, 128]
    assert lines[1]["evaluation_error"].startswith("no memory for a batch")
    assert ended[0].err.count("Warning: no evaluation at 128 samples, training goes on: no memory for a batch") == 1
    assert "no memory" not in ended[1].err
    # The resumed run makes the evaluation that the signal ended.
    run_ranks(train_and_evaluate_in_peace, pairs_dataset, data, tmp_path)
    lines = [line for line in read_metrics(tmp_path) if "emoji/top1" in line]
    assert [line["samples_seen"] for line in lines] == [64, 192, 256, 320]
    task, compute = open_task(data, templates_name="plain"), Compute(pick("cpu"), batch_size=16)
    for line in lines[-2:]:
        encoder = load(tmp_path / "checkpoints" / f"{line['samples_seen']:012d}")
        assert dict(evaluate(encoder, task, compute)).items() <= line.items()


def train_and_evaluate_in_peace(pairs: Path, data: Path, run: Path) -> None:
    recipe = set_values(debug(), ["cadence.evaluate_samples=64"])
    task = open_task(data, templates_name="plain")
    loop.train(recipe, pairs, run, device_name="cpu", workers=1, task=task, resume=True)
