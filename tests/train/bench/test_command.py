"""The loader's own measurement: what is counted, what follows from the numbers, and how it is told."""

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from natural_images import encoded, natural
from small_dataset import write_pairs

from clipkit.cli.main import main
from clipkit.config import set_values
from clipkit.device import pick
from clipkit.errors import UserError
from clipkit.text.tokenizer import Tokenizer
from clipkit.train.bench import command as module
from clipkit.train.bench.command import compact_side, measure_reading, plain_config, step_need, try_compact
from clipkit.train.bench.findings import PUBLISHED, Compact, Findings, Need, Reading, advice
from clipkit.train.catalogue import debug
from clipkit.train.fit import trial
from clipkit.train.loader.augment import Augmentation
from clipkit.train.sources.source import Pair, Source
from clipkit.train.step import train_step

FOUND = Findings(
    data="data",
    records=1000,
    image_size=112,
    text_reduction="truncate",
    workers=2,
    cores=8,
    samples=2000,
    seconds=1.0,
    phases_us={"read": 100.0, "image": 800.0, "colour": 20.0, "text": 60.0, "assemble": 20.0},
    busy=0.95,
    reading=Reading(500.0, 34_000.0, 0.0, precomputed=False),
    compact=None,
    needs=(Need("a GPU", 5000.0),),
)


def pair(number: int, height: int = 300, width: int = 320) -> Pair:
    return Pair(encoded(natural(height, width, number), quality=95), f"picture {number}")


class Photos(Source):
    """Ten photos of 300 px, again and again; `wait` is slept before each."""

    def __init__(self, wait: Callable[[], None] = lambda: None, count: int = 1000) -> None:
        self.kept, self.wait, self.count = [pair(number) for number in range(10)], wait, count

    @property
    def num_records(self) -> int:
        return self.count

    def key(self, record: int) -> str:
        return f"photo:{record}"

    def pairs(self, records: Sequence[int]) -> Iterator[Pair | UserError]:
        for record in records:
            self.wait()
            yield self.kept[record % 10]


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(main, ["bench-data", *map(str, arguments)])


# ---- The command -----------------------------------------------------------------------------------------------------


def test_it_measures_and_tells(pairs_dataset: Path) -> None:
    result = run(pairs_dataset, "--image-size", "32", "--workers", "1", "--seconds", "0.2", "--need", "1e9")
    assert result.exit_code == 0, result.output
    words = " ".join(result.stdout.split())
    assert "samples/s at 32 px with 1 worker" in words
    assert all(phase in words for phase in ("read", "image", "colour", "text", "assemble"))
    assert "1,000,000,000" in words
    assert "More workers:" in words


def test_json_holds_the_same_and_what_follows(pairs_dataset: Path) -> None:
    result = run(pairs_dataset, "--recipe", "debug", "--workers", "2", "--seconds", "0.2", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["image_size"], found["text_reduction"], found["records"]) == (32, "random", 96)
    assert found["samples_per_s"] == pytest.approx(found["samples"] / found["seconds"])
    assert found["samples_per_core_s"] == pytest.approx(1e6 / sum(found["phases_us"].values()))
    assert [each["who"] for each in found["needs"]] == [each.who for each in PUBLISHED]
    for each in found["needs"]:
        assert each["cores"] == math.ceil(each["samples_per_s"] / found["samples_per_core_s"])
    assert 0 < found["busy"] <= 1


def test_mixtures_and_changed_recipes_are_measured(pairs_dataset: Path, tmp_path: Path) -> None:
    other = write_pairs(tmp_path / "other", [20])
    changes = ["--set", "stages.0.image_size=48", "--set", "stages.0.text_reduction=block", "--cache", tmp_path]
    result = run(f"{pairs_dataset}=3", f"{other}=1", "--recipe", "debug", *changes, "--seconds", 0.1, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["image_size"], found["text_reduction"]) == (48, "block")
    assert str(pairs_dataset) in str(found["data"])
    assert str(other) in str(found["data"])


# ---- What is counted -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_phases_add_up_to_the_processors_time(workers: int) -> None:
    began, computed = time.monotonic(), time.process_time()
    samples, elapsed, phases = module.run_loader(Photos(), plain_config(112), Tokenizer(), workers, 0.5, pick("cpu"))
    whole = time.process_time() - computed
    assert samples % module.BATCH == 0
    assert 0.5 <= elapsed < time.monotonic() - began
    assert set(phases) == {"read", "image", "colour", "text", "assemble"}
    assert 0 < sum(phases.values()) <= whole
    assert phases["image"] > 0.7 * sum(phases.values())


def test_a_device_adds_the_phase_of_the_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    brought: list[int] = []

    class Far:
        kind = "far"

        def batch(self, arrays: dict[str, Any]) -> None:
            brought.append(len(arrays["image_BHWC"]))
            sum(range(1_000_000))

    far: Any = Far()
    samples, _, phases = module.run_loader(Photos(), plain_config(16), Tokenizer(), 1, 0.2, far)
    assert sum(brought) == samples
    assert phases["transfer"] > 0.001 * len(brought)


def test_reading_knows_waiting_from_working() -> None:
    config = plain_config(64)
    slow, pairs = measure_reading(Photos(lambda: time.sleep(0.002), 50), config, first=0)
    assert slow.waiting > 0.7
    assert len(pairs) == 50
    busy, _ = measure_reading(Photos(lambda: sum(range(200_000)) and None, 50), config, first=0)
    assert busy.waiting < 0.3
    assert busy.image_bytes == pytest.approx(sum(len(pair(n).image) for n in range(10)) / 10)
    assert not busy.precomputed


def test_records_with_ids_need_no_tokens_computed() -> None:
    source = Photos(count=20)
    source.kept = [each._replace(ids=[1, 2]) for each in source.kept]
    assert measure_reading(source, plain_config(64), first=0)[0].precomputed


def test_what_cannot_be_read_is_no_measurement() -> None:
    class Gone(Photos):
        def pairs(self, records: Sequence[int]) -> Iterator[Pair | UserError]:
            return itertools.repeat(UserError("gone"), len(records))

    with pytest.raises(UserError, match="none of 20 records"):
        measure_reading(Gone(count=20), plain_config(64), first=0)


def test_a_compact_copy_is_tried_on_the_images() -> None:
    crop = Augmentation(crop_area=(0.4, 1.0))
    pairs = [pair(number, 500, 640) for number in range(8)]
    found = try_compact(pairs, 64, crop)
    assert found is not None
    assert found.side == 96
    assert found.image_gain > 1.5
    assert found.bytes_gain > 8
    assert try_compact([pair(number, 90, 120) for number in range(4)], 64, crop) is None
    assert try_compact(pairs, 64, Augmentation(rotation=5.0)) is None
    assert try_compact([Pair(b"no-image", "x")], 64, crop) is None


@pytest.mark.parametrize(("image_size", "side"), [(64, 96), (96, 128), (112, 128), (224, 256), (336, 384)])
def test_copies_are_a_little_larger_than_the_input(image_size: int, side: int) -> None:
    assert compact_side(image_size) == side


@pytest.mark.parametrize("settings", [[], ["distill.weight=1"]])
def test_a_step_says_what_a_device_needs(settings: list[str]) -> None:
    recipe = set_values(debug(), settings)
    need = step_need(recipe, recipe.stages[0], pick("cpu"), seconds=0.2)
    assert need.samples_per_s > 1
    assert "debug" in need.who


def test_a_frozen_tower_is_not_trained_in_the_measured_step(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, trained = set_values(debug(), ["model.image.frozen=true"]), set[str]()

    def seen(model: torch.nn.Module, *rest: Any) -> Any:
        trained.update(name for name, each in model.named_parameters() if each.requires_grad)
        return train_step(model, *rest)

    monkeypatch.setattr(trial, "train_step", seen)
    step_need(recipe, recipe.stages[0], pick("cpu"), seconds=0.01)
    assert trained and not [name for name in trained if name.startswith("image.")]


# ---- What follows from the numbers -----------------------------------------------------------------------------------


def one(lines: list[str], words: str) -> str:
    """The only line with these words."""
    found = [line for line in lines if words in line]
    assert len(found) == 1, lines
    return found[0]


def test_cores_follow_from_what_one_gives() -> None:
    assert FOUND.samples_per_core_s == pytest.approx(1000)
    assert FOUND.cores_for(Need("", 5000.0)) == 5
    assert FOUND.cores_for(Need("", 5001.0)) == 6
    assert "5 cores give 5,000 samples/s" in one(advice(FOUND), "More workers")
    assert "--workers 5" in one(advice(FOUND), "More workers")
    assert "this machine has 4" in one(advice(replace(FOUND, cores=4)), "More workers")


def test_a_missing_compiler_is_told() -> None:
    assert "install a C compiler" in one(advice(replace(FOUND, compiled=False)), "JPEGs take twice as long")
    assert not [line for line in advice(FOUND) if "compile" in line]


def test_enough_is_enough() -> None:
    lines = advice(replace(FOUND, needs=(Need("a small GPU", 1500.0),)))
    assert lines == ["The loader gives what is needed (a small GPU)."]


def test_a_compact_copy_saves_what_images_cost() -> None:
    found = replace(FOUND, compact=Compact(128, image_gain=4.0, bytes_gain=4.2))
    assert found.compact_gain == pytest.approx(1000 / (200 + 200))
    line = one(advice(found), "compact copy")
    assert "--resize 128 --quality 90" in line
    assert "2.5 times as many samples/s, 24% of the bytes; 2 cores would do" in line
    assert not [line for line in advice(replace(found, compact=Compact(128, 1.1, 1.1))) if "compact copy" in line]


def test_a_slow_disk_is_told_from_a_busy_machine() -> None:
    idle = replace(FOUND, busy=0.4)
    slow = replace(idle, reading=replace(FOUND.reading, waiting=0.8, megabytes_per_s=20.0))
    assert "wait 60% of their time, and one that only reads 80%" in one(advice(slow), "faster disk")
    assert "one reader 20 MB/s" in one(advice(slow), "faster disk")
    assert "compute 40% of their time" in one(advice(idle), "other processes")
    assert not [line for line in advice(FOUND) if "disk" in line or "other processes" in line]


def test_costly_tagging_is_to_be_stored() -> None:
    found = replace(FOUND, text_reduction="syntax", phases_us={"read": 100.0, "image": 700.0, "text": 200.0})
    assert "Text takes 20%" in one(advice(found), "--precompute tokens,syntax.")
    stored = replace(found, reading=replace(FOUND.reading, precomputed=True))
    for other in (stored, replace(found, text_reduction="truncate"), replace(found, tokenizer="wordpiece")):
        assert not [line for line in advice(other) if "precompute" in line]


def test_costly_reading_is_named() -> None:
    found = replace(FOUND, phases_us={"read": 400.0, "image": 600.0})
    assert "Reading takes 40%" in one(advice(found), "Reading")
