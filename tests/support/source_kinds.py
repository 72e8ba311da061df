"""Four kinds of sources with the same pairs, as their own tools write them, for the tests of what training reads."""

import csv
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from image_shards import img2dataset_writer, pair, picture, write_tar
from small_dataset import pair_columns, write_dataset

from clipkit.train.loader.loader import LoaderConfig
from clipkit.train.sources.source import Pair, Source

COUNTS = (70, 0, 50, 40)
TOTAL = sum(COUNTS)
CONFIG = LoaderConfig(image_size=16, context_length=8, batch_size=40, block_size=8)


def jpg(number: int) -> bytes:
    """A different one for each number below 400."""
    return picture(number % 20 * 12, size=16 + number // 20)


def caption(number: int) -> str:
    return f"picture number {number}"


# ---- The kinds, each written as its own tools do ---------------------------------------------------------------------


def dataset(folder: Path) -> Path:
    first, parts = 0, []
    for count in COUNTS:
        parts.append([pair_columns(first + i, jpg=jpg(first + i)) for i in range(count)])
        first += count
    return write_dataset(folder, {"train": parts})


def tars(folder: Path) -> Path:
    first = 0
    for shard, count in enumerate(COUNTS):
        write_tar(folder / f"{shard:05d}.tar", [pair(first + i, jpg=jpg(first + i)) for i in range(count)])
        first += count
    return folder


def parquet(folder: Path) -> Path:
    """Through img2dataset's own writer, in row groups of 20."""
    folder.mkdir(parents=True, exist_ok=True)
    writer_module = img2dataset_writer()
    schema = pa.schema([("caption", pa.string()), ("key", pa.string())])
    first = 0
    for shard, count in enumerate(COUNTS):
        writer = writer_module.ParquetSampleWriter(shard, str(folder), True, 5, schema, "jpg")
        writer.buffered_parquet_writer.buffer_size = 20
        for number in range(first, first + count):
            writer.write(jpg(number), f"{number:09d}", caption(number), {"caption": caption(number), "key": "k"})
        writer.close()
        first += count
    return folder


def image_folder(folder: Path) -> Path:
    (folder / "images").mkdir(parents=True)
    with (folder / "metadata.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "text"])
        for number in range(TOTAL):
            (folder / "images" / f"{number}.jpg").write_bytes(jpg(number))
            table.writerow([f"images/{number}.jpg", caption(number)])
    return folder


KINDS: dict[str, Callable[[Path], Path]] = {
    "dataset": dataset,
    "tars": tars,
    "parquet": parquet,
    "folder": image_folder,
}


@pytest.fixture(scope="module", params=sorted(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("kinds")
    return {name: write(folder / name) for name, write in KINDS.items()}


@pytest.fixture
def place(kind: str, written: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of one kind, to be spoilt."""
    return Path(shutil.copytree(written[kind], tmp_path / kind))


@pytest.fixture(autouse=True)
def own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Scratch and the user's cache in the test's own folder; no scratch is left at the end."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return scratch


def upload(folder: Path, target: str) -> str:
    """Copy a folder into a store, without what clipkit keeps beside an index."""
    fs, root = fsspec.core.url_to_fs(target)
    for file in sorted(folder.rglob("*")):
        if file.is_file() and not file.name.startswith("."):
            name = f"{root}/{file.relative_to(folder).as_posix()}"
            if target.startswith("memory:"):
                fs.makedirs(name.rpartition("/")[0], exist_ok=True)
            fs.pipe_file(name, file.read_bytes())
    return target


def check_pairs(source: Source) -> None:
    """All pairs, in any order, and what the loader needs besides."""
    assert source.num_records == TOTAL
    order = np.random.default_rng(1).permutation(TOTAL).tolist()
    for number, found in zip(order, source.pairs(order), strict=True):
        assert isinstance(found, Pair)
        assert (bytes(found.image), found.caption) == (jpg(number), caption(number))
    assert len({source.key(number) for number in range(TOTAL)}) == TOTAL
    for number in (0, 69, 70, TOTAL - 1):
        assert number in source.block(number, 8)
        assert all(0 <= other < TOTAL for other in source.block(number, 8))
