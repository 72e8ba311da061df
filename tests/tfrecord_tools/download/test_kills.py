"""SIGKILL at many moments of a download and of a retry: no row is lost or doubled, and no half shard is ever left."""

import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from bad_server import bad_server
from download_site import encoded, file_bytes, numbered, write_numbered
from killed_downloads import Driver, driver

from clipkit.formats.records import read_records
from clipkit.tfrecord_tools.readers.tar import read_tar

COUNT, SHARD = 12, 4
KILLS = 50
LATENCY = 0.02  # of each answer, so that kills fall into the fetching too


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    with driver(tmp_path_factory.mktemp("driver") / "log.txt") as made:
        yield made


def check(root: Path) -> None:
    """Every file under a final name is whole, and every state tells the truth."""
    for path in root.glob("*.tfrecord-*"):
        assert len(list(read_records(path))) <= SHARD
    for path in root.glob("*.tar"):
        assert len(list(read_tar(path))) <= SHARD
    for path in (root / "clipkit" / "ledger").glob("[0-9]*.parquet"):
        assert pq.read_metadata(path).num_rows == SHARD
    states = [*root.glob("*_stats.json"), *(root / "clipkit" / "shards").glob("[0-9]*.json")]
    for path in states:
        state = json.loads(path.read_text())
        assert state["count"] == state["successes"] + sum(state["failed"].values()) == SHARD
    # What says that all is there says it of all.
    if (root / "dataset_info.json").exists() or (root / "clipkit" / "download.json").exists():
        assert len(states) == COUNT // SHARD


def root_of(out: Path, format: str) -> Path:
    return out / "urls" / "1.0.0" if format == "tfds" else out


def same(root: Path, whole: dict[str, bytes]) -> None:
    """The same files with the same bytes, and nothing else."""
    found = file_bytes(root)
    assert sorted(found) == sorted(whole)
    assert [name for name in whole if found[name] != whole[name]] == []
    told = json.loads((root / "clipkit" / "download.json").read_text())
    assert told["rows"] == told["downloaded"] == COUNT


def test_killed_at_random_moments(runs: Driver, tmp_path: Path) -> None:
    """Each run goes on from where the last was killed; one that comes to its end is compared and begun anew."""
    moments = random.Random(0)
    options = {"samples_per_shard": SHARD, "keep_columns": ["number"]}
    with bad_server(numbered(COUNT), latency=LATENCY) as server:
        urls = write_numbered(tmp_path / "urls.parquet", server.url(""), COUNT)
        finished, length = runs.run(urls, tmp_path / "whole", **options)
        assert finished
        root = root_of(tmp_path / "out", "tfds")
        whole = file_bytes(root_of(tmp_path / "whole", "tfds"))
        kills = ends = 0
        while kills < KILLS:
            from_scratch = not (tmp_path / "out").exists()
            finished, took = runs.run(urls, tmp_path / "out", seconds=moments.uniform(0, length), **options)
            check(root)
            if finished:
                same(root, whole)
                if from_scratch:  # the first run was cold, or the machine busy: the kills are to fall within a run
                    length = min(length, took)
                shutil.rmtree(tmp_path / "out")
            kills += not finished
            ends += finished
        finished, _ = runs.run(urls, tmp_path / "out", **options)
        assert finished
        same(root, whole)
        assert ends < KILLS


@pytest.mark.parametrize(
    ("format", "retry"), [("tfds", False), ("tfds", True), ("webdataset", True), ("parquet", False)]
)
def test_killed_at_each_rename(runs: Driver, tmp_path: Path, format: str, retry: bool) -> None:
    """Of a download, and of a retry of the half of the rows that had failed before."""
    options = {"samples_per_shard": SHARD, "format": format}
    with bad_server(numbered(COUNT)) as server:
        urls = write_numbered(tmp_path / "urls.parquet", server.url(""), COUNT)
        assert runs.run(urls, tmp_path / "whole", **options)[0]
        if retry:
            server.site = {path: body for path, body in server.site.items() if int(path[1:-4]) % 2}
            assert runs.run(urls, tmp_path / "before", **options)[0]
            server.site = numbered(COUNT)
            options["retry_failed"] = "http-4xx"
        whole = file_bytes(root_of(tmp_path / "whole", format))
        for renames in range(1_000):
            out = tmp_path / f"out-{renames}"
            if retry:
                shutil.copytree(tmp_path / "before", out)
            asked = len(server.requests)
            killed = not runs.run(urls, out, renames=renames, **options)[0]
            check(root_of(out, format))
            if killed:
                assert runs.run(urls, out, **options)[0]
            if retry:  # what had come before isn't asked for again
                assert all(int(path[1:-4]) % 2 == 0 for path in server.paths()[asked:])
            same(root_of(out, format), whole)
            shutil.rmtree(out)
            if not killed:
                break
        assert COUNT // SHARD * 3 <= renames < 1_000


def test_killed_while_a_damaged_shard_is_made_again(runs: Driver, tmp_path: Path) -> None:
    """The host has other images by then, and the new tar happens to be as long as the old."""
    options = {"samples_per_shard": SHARD, "format": "webdataset"}
    with bad_server(numbered(SHARD)) as server:
        urls = write_numbered(tmp_path / "urls.parquet", server.url(""), SHARD)
        assert runs.run(urls, tmp_path / "before", **options)[0]
        length = (tmp_path / "before" / "00000.tar").stat().st_size
        os.truncate(tmp_path / "before" / "00000.tar", 512)
        server.site = {f"/{number}.jpg": encoded("JPEG", seed=100 + number) for number in range(SHARD)}
        assert runs.run(urls, tmp_path / "whole", **options)[0]
        assert (tmp_path / "whole" / "00000.tar").stat().st_size == length
        for renames in range(1_000):
            out = tmp_path / f"out-{renames}"
            shutil.copytree(tmp_path / "before", out)
            killed = not runs.run(urls, out, renames=renames, **options)[0]
            if killed:
                assert runs.run(urls, out, **options)[0]
            assert file_bytes(out) == file_bytes(tmp_path / "whole")
            if not killed:
                break
