"""The files that data pass on their way, found by running: `python tests/support/walks.py` prints them as JSON.

A walk is measured by the calls of a real run. For `row` and `record` it is every file of ours of which each further
row, or record, calls a function once more. For `checkpoint` it is every file of ours that is called from the
checkpoint on the disk to the numbers, but for those that only read pictures or show progress.
"""

import contextlib
import dataclasses
import io
import json
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from rooms import ROOT, STAGES

CALLS: Counter[str] = Counter()
_FILES: dict[str, str] = {}


def count_call(frame: FrameType, event: str, argument: Any) -> None:
    """A profile function: counts each call of a function of ours by its file, in the order in which they are met."""
    if event != "call" or frame.f_code.co_name == "<module>":
        return
    name = frame.f_code.co_filename
    if name not in _FILES:
        path = Path(name).resolve()
        inside = path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in ("clipkit", *STAGES)
        _FILES[name] = path.relative_to(ROOT).as_posix() if inside else ""
    if _FILES[name]:
        CALLS[_FILES[name]] += 1


@contextlib.contextmanager
def counted() -> Iterator[Counter[str]]:
    """The calls of the block, and of the threads that it starts."""
    CALLS.clear()
    found: Counter[str] = Counter()
    threading.setprofile(count_call)
    sys.setprofile(count_call)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield found
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    found.update(CALLS)


def walk_of_a_row(folder: Path) -> list[str]:
    """From a URL to its TFRecord: the download of one shard, in this process."""
    from bad_server import bad_server
    from download_site import fetch, numbered, write_numbered

    calls = []
    for count in (4, 4, 8):  # the first fills caches
        with bad_server(numbered(count)) as server:
            urls = write_numbered(folder / f"{len(calls)}.parquet", server.url(""), count)
            with counted() as found:
                fetch(urls, folder / str(len(calls)), samples_per_shard=100)
            calls.append(found)
    return [name for name in calls[2] if calls[2][name] > calls[1][name]]


def walk_of_a_record(folder: Path) -> list[str]:
    """From a record to its batch: the loader without workers."""
    from small_dataset import write_pairs

    from clipkit.train.loader.loader import batches
    from clipkit.train.loader.samples import LoaderConfig
    from clipkit.train.sources.open import open_source

    write_pairs(folder / "data", [16, 16])
    calls = []
    for size in (8, 8, 16):
        source = open_source(folder / "data").source()
        with counted() as found:
            read = batches(source, LoaderConfig(batch_size=size, image_size=32, context_length=16), 0, size, workers=0)
            next(read)
            read.close()
        calls.append(found)
    return [name for name in calls[2] if calls[2][name] > calls[1][name]]


def walk_of_a_checkpoint(folder: Path) -> list[str]:
    """From a checkpoint to a zero-shot number; what reads the pictures is called on its own first."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from image_shards import picture

    from clipkit import checkpoint
    from clipkit.eval import evaluation
    from clipkit.eval.classification import task
    from clipkit.eval.classification.labelled import open_labelled
    from clipkit.model.clip import build
    from clipkit.model.config import ImageConfig, ModelConfig, TextConfig
    from clipkit.pixels.images import Preprocess, decode, eval_transform

    images = [picture(number) for number in range(8)]
    pq.write_table(pa.table({"image": images, "label": ["cat", "dog"] * 4}), folder / "data.parquet")
    image = ImageConfig("vit_tiny_patch16_224", image_size=32, patch_size=8, width=32, depth=1, heads=2)
    config = ModelConfig(32, image, TextConfig(context_length=32, width=32, depth=1, heads=2))
    preprocess = Preprocess(size=32)
    described = checkpoint.describe(config, preprocess, NamedRecipe())
    state = {"samples_seen": 64, "stage": "full", "seconds": 1.0, "bad_samples": 0}
    run = folder / "run"
    checkpoint.save(
        checkpoint.folder_of(run, 64), tensors=build(config, seed=1).state_dict(), config=described, state=state
    )
    with counted() as reading:
        for image in open_labelled(folder / "data.parquet").read():
            eval_transform(decode(image), 32)
    load, measure = checkpoint.load, task.measure
    found: list[str] = []

    def load_counted(path: Path, **options: Any) -> Any:
        CALLS.clear()
        return load(path, **options)

    def measure_counted(*arguments: Any) -> Any:
        numbers = measure(*arguments)
        found.extend(CALLS)
        return numbers

    checkpoint.load, task.measure = load_counted, measure_counted
    with counted():
        evaluation.zeroshot(run, task.open_task(folder / "data.parquet", templates_name="plain"), device="cpu")
    return [name for name in found if name not in reading and name != "clipkit/log.py"]


@dataclasses.dataclass(frozen=True)
class NamedRecipe:
    """What a checkpoint must name."""

    name: str = "none"


def main() -> None:
    """Print the walks."""
    walks = {"row": walk_of_a_row, "record": walk_of_a_record, "checkpoint": walk_of_a_checkpoint}
    with tempfile.TemporaryDirectory() as scratch:
        answer = {}
        for name, walk in walks.items():
            (Path(scratch) / name).mkdir()
            answer[name] = walk(Path(scratch) / name)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
