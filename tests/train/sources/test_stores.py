"""What is in a store gives the same pairs as on a disk, and is asked for as little as can be."""

import json
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.s3.responses import S3Response
from natural_images import encoded, natural
from object_store import s3 as s3
from object_store import s3_server as s3_server
from small_dataset import pair_columns, write_dataset
from source_kinds import CONFIG, TOTAL, check_pairs, upload
from source_kinds import kind as kind
from source_kinds import own_places as own_places
from source_kinds import written as written

from clipkit.errors import UserError
from clipkit.formats.records import RecordError
from clipkit.storage import ranges as range_reader
from clipkit.storage.files import as_path
from clipkit.train.loader.loader import batches
from clipkit.train.sources import ahead as ahead_source
from clipkit.train.sources.ahead import AheadSource
from clipkit.train.sources.open import open_source


def test_in_a_store(kind: str, written: dict[str, Path], s3: str, own_places: Path) -> None:
    source = open_source(upload(written[kind], f"{s3}/data"), block_size=8).source()
    check_pairs(source)
    check_pairs(pickle.loads(pickle.dumps(source)))
    assert list(own_places.glob("clipkit-blocks-*"))
    del source
    deadline = time.monotonic() + 60
    while list(own_places.glob("clipkit-blocks-*")) and time.monotonic() < deadline:
        time.sleep(0.01)  # threads that read ahead end one after the other
    assert not list(own_places.glob("clipkit-blocks-*"))


READ_ONE_BATCH = """
import sys
from clipkit.train.loader.samples import LoaderConfig
from clipkit.train.loader.loader import batches
from clipkit.train.sources.open import open_source
source = open_source(sys.argv[1], block_size=8).source()
next(batches(source, LoaderConfig(16, 8, 8), workers=1))
"""


def test_a_process_that_ends_while_it_reads_ahead_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The threads end before the cache is removed, else they would write into it again."""
    images = [encoded(natural(40, 60, number)) for number in range(20)]
    table = pa.table({"jpg": images * 100, "caption": [f"picture {number}" for number in range(2000)]})
    (tmp_path / "data").mkdir()
    pq.write_table(table, tmp_path / "data" / "a.parquet", row_group_size=100)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    for _ in range(3):
        command = [sys.executable, "-c", READ_ONE_BATCH, str(tmp_path / "data")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, "Fatal" in done.stderr) == (0, False), done.stderr
        assert not list((tmp_path / "tmp").glob("clipkit-blocks-*"))


@pytest.mark.parametrize("where", ["tars", "dataset"])
def test_a_store_without_the_shard_any_more(where: str, written: dict[str, Path], s3: str) -> None:
    target = upload(written[where], f"{s3}/data")
    source = open_source(target, block_size=8).source()
    name = "00003.tar" if where == "tars" else "pairs-train.tfrecord-00003-of-00004"
    fsspec.core.url_to_fs(target)[0].rm(f"{target}/{name}")
    with pytest.raises(UserError, match="is gone: put the shard back"):
        list(source.pairs(range(TOTAL - 5, TOTAL)))


def count_requests(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    from fsspec.implementations.memory import MemoryFileSystem

    asked: list[str] = []
    for name in ("cat_file", "info", "ls", "_open"):
        real = getattr(MemoryFileSystem, name)

        def counted(self: Any, *arguments: Any, _name: str = name, _real: Any = real, **named: Any) -> Any:
            asked.append(_name)
            return _real(self, *arguments, **named)

        monkeypatch.setattr(MemoryFileSystem, name, counted)
    return asked


@pytest.mark.parametrize("processes", [False, True])
def test_each_block_is_asked_for_once_whoever_reads(
    processes: bool, written: dict[str, Path], s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = upload(written["tars"], f"{s3}/tars")
    sources = [open_source(target, cache=tmp_path / "cache", block_size=10).source() for _ in range(3)]
    asked: list[str] = []  # of the server, which serves this process's threads and all others
    real = S3Response.get_object

    def counted(self: S3Response) -> Any:
        asked.append(f"{self.path} {self.headers.get('range')}")
        return real(self)

    monkeypatch.setattr(S3Response, "get_object", counted)
    for source in sources[:2]:
        list(batches(source, CONFIG, 0, 2 * TOTAL, workers=2, processes=processes))
    assert len(asked) == len(set(asked)) == TOTAL // 10
    list(batches(sources[2], CONFIG, 0, TOTAL, workers=2, processes=processes))
    assert len(asked) == TOTAL // 10


def test_the_order_alone_brings_the_next_windows_blocks_near(
    kind: str, written: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead_source, "WINDOW_BLOCKS", 4)
    source = open_source(
        upload(written[kind], f"memory://ahead/{kind}"), cache=tmp_path / "cache", block_size=8
    ).source()
    monkeypatch.undo()
    asked = count_requests(monkeypatch)
    positions = np.arange(TOTAL, dtype=np.uint64)  # an epoch: all blocks
    source.records_at(positions, 0, 8)
    deadline = time.monotonic() + 60
    entries = {"dataset": 21, "tars": 21, "parquet": 9, "folder": TOTAL}[kind]  # blocks are cut where a shard ends
    while len(list((tmp_path / "cache").glob("??/[0-9a-f]*"))) < entries + (kind == "dataset"):  # and its index
        assert time.monotonic() < deadline
        time.sleep(0.01)
    asked.clear()
    check_pairs(source)
    assert "cat_file" not in asked


def test_a_store_that_stalls_is_asked_again_and_told(
    written: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    source = open_source(upload(written["dataset"], "memory://stalls/dataset"), block_size=8).source()
    expected = [batch.image_BHWC.tobytes() for batch in batches(source, CONFIG, 0, 80, workers=0)]
    monkeypatch.setattr(range_reader, "STALL_SECONDS", 0.3)
    monkeypatch.setattr(AheadSource, "_wish", lambda *_: None)
    real, calls, go = MemoryFileSystem.cat_file, [], threading.Event()

    def stalled(self: Any, *arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) in (3, 4):
            go.wait(60)
        return real(self, *arguments, **named)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", stalled)
    other = open_source("memory://stalls/dataset", cache=tmp_path / "cache", block_size=8)
    found = [batch.image_BHWC.tobytes() for batch in batches(other.source(), CONFIG, 0, 80, workers=1)]
    go.set()
    assert found == expected
    assert "no answer in time; asked again" in capfd.readouterr().err


def test_ten_million_records_open_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A made-up index: 1,000 shards of 10,000 records, each shard a sparse file."""
    folder = write_dataset(tmp_path / "data", {"train": [[pair_columns(0)] for _ in range(2)]})
    record = (folder / "pairs-train.tfrecord-00000-of-00002").read_bytes()
    info = json.loads((folder / "dataset_info.json").read_text())
    manifest = json.loads((folder / "clipkit" / "manifest.json").read_text())
    count, each = 1000, 10_000
    step = -(-len(record) // 512) * 512
    shard = manifest["splits"]["train"]["shards"][0]
    names = [f"pairs-train.tfrecord-{number:05d}-of-{count:05d}" for number in range(count)]
    info["splits"][0]["shardLengths"] = [str(each)] * count
    manifest["splits"]["train"]["shards"] = [
        {**shard, "file": name, "records": each, "bytes": step * each} for name in names
    ]
    for name in names:
        with (folder / name).open("wb") as file:
            file.truncate(step * each)
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (folder / "clipkit" / "manifest.json").write_text(json.dumps(manifest))
    np.save(folder / "clipkit" / "index-train.npy", np.tile(np.arange(each, dtype=np.uint64) * np.uint64(step), count))

    began = time.process_time()
    source = open_source(folder).source()
    order = source.records_at(np.arange(256, dtype=np.uint64), 0, 64)
    found = list(source.pairs(order[:8].tolist()))
    assert time.process_time() - began < 3
    assert source.num_records == count * each
    assert all(isinstance(each_, RecordError) for each_ in found)  # the shards are empty: the places were read

    target = upload_metadata(folder, names, step * each)
    asked = count_requests(monkeypatch)
    began = time.process_time()
    source = open_source(target).source()
    assert time.process_time() - began < 3
    assert source.num_records == count * each
    assert len(asked) < 100


def upload_metadata(folder: Path, names: list[str], size: int) -> str:
    """The dataset in a store whose shards are only said to be there."""
    from fsspec.implementations.memory import MemoryFileSystem

    target = upload_small(folder, "memory://ten-million")
    real = MemoryFileSystem.ls

    def with_shards(self: Any, path: str, detail: bool = True, **named: Any) -> Any:
        found = real(self, path, detail=detail, **named)
        if detail and path.rstrip("/").endswith("ten-million"):
            found = [*found, *({"name": f"{path}/{name}", "size": size, "type": "file"} for name in names)]
        return found

    MemoryFileSystem.ls = with_shards  # count_requests puts its own over it, and pytest puts this back
    return target


def upload_small(folder: Path, target: str) -> str:
    for name in ("dataset_info.json", "features.json", "clipkit/manifest.json", "clipkit/index-train.npy"):
        path = as_path(f"{target}/{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((folder / name).read_bytes())
    return target
