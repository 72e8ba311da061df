"""Downloads on Ray and Spark for real, and from and to object stores: the same bytes as on this machine."""

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from bad_server import BadServer, bad_server
from download_site import fetch, file_bytes, numbered, write_numbered
from object_store import s3 as s3
from object_store import s3_server as s3_server

from clipkit.errors import UserError
from clipkit.formats.dataset import open_dataset
from clipkit.storage.files import as_path, remove
from clipkit.tfrecord_tools.reasons import DEFAULT_RETRY

COUNT, SHARD = 12, 3


@pytest.fixture(scope="module")
def server() -> Iterator[BadServer]:
    with bad_server(numbered(COUNT)) as made:
        yield made


@pytest.fixture(scope="module")
def urls(server: BadServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_numbered(tmp_path_factory.mktemp("urls") / "urls.parquet", server.url(""), COUNT)


@pytest.fixture(scope="module")
def whole(urls: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a download on this machine."""
    return file_bytes(fetch(urls, tmp_path_factory.mktemp("whole"), samples_per_shard=SHARD).out)


# ---------------------------------------------------------------------------------------------------------------------
# Engines
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["ray", "spark"])
def test_on_a_cluster_started_for_it(urls: Path, whole: dict[str, bytes], tmp_path: Path, engine: str) -> None:
    """The command as a user runs it: neither Ray nor a JVM enters the process of the tests."""
    command = ["download", str(urls), str(tmp_path), "--engine", engine, "--processes", "2", "--allow-private-hosts"]
    command += ["--samples-per-shard", str(SHARD), "--image-size", "32", "--timeout", "60", "--deadline", "60"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "clipkit", *command], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.startswith(f"{COUNT} of {COUNT} images (100.0%)")
    assert f"download: {COUNT}/{COUNT} rows" in result.stderr and "100.0% ok" in result.stderr
    assert file_bytes(tmp_path / "urls" / "1.0.0") == whole


# ---------------------------------------------------------------------------------------------------------------------
# Stores
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["tfds", "webdataset", "parquet"])
def test_from_and_to_memory(urls: Path, server: BadServer, tmp_path: Path, format: str) -> None:
    """Table and output in a store, with a condition; killed, gone on with, and retried there."""
    store = as_path(f"memory://{uuid.uuid4().hex}")
    (store / "in" / "urls.parquet").write_bytes(urls.read_bytes())
    options = {"format": format, "samples_per_shard": SHARD, "where": "number < 9", "keep_columns": ["number"]}
    local = fetch(urls, tmp_path, **options)
    server.site = {path: body for path, body in numbered(COUNT).items() if path != "/4.jpg"}
    there = fetch(f"{store}/in/urls.parquet", f"{store}/out", **options)
    assert (there.downloaded, there.failed, there.left_out) == (8, {"http-4xx": 1}, 3)
    server.site = numbered(COUNT)
    files = [path for path in there.out.rglob("*") if path.is_file()]
    remove(next(path for path in files if path.name in ("00001.json", "00000_stats.json")))
    again = fetch(f"{store}/in/urls.parquet", f"{store}/out", retry_failed="http-4xx", **options)
    assert (again.downloaded, again.failed) == (9, {})
    found = {str(path)[len(str(again.out)) + 1 :]: path.read_bytes() for path in again.out.rglob("*") if path.is_file()}
    expected = file_bytes(local.out)
    assert [name for name in expected if name != "clipkit/plan.json" and found[name] != expected[name]] == []
    assert not [name for name in found if "pending" in name or name.endswith(".lock")]
    asked = len(server.requests)
    assert fetch(f"{store}/in/urls.parquet", f"{store}/out", **options).downloaded == 9
    assert len(server.requests) == asked


def test_to_s3_with_workers(urls: Path, whole: dict[str, bytes], s3: str) -> None:
    """Through real sockets, by two worker processes that find the store by the environment."""
    summary = fetch(urls, f"{s3}/data", samples_per_shard=SHARD, processes=2)
    assert str(summary.out) == f"{s3}/data/urls/1.0.0" and summary.downloaded == COUNT
    found = {
        str(path)[len(str(summary.out)) + 1 :]: path.read_bytes() for path in summary.out.rglob("*") if path.is_file()
    }
    assert {name: data for name, data in found.items() if name in whole} == whole
    dataset = open_dataset(summary.out)
    assert [dataset.example(i)["txt"] for i in range(COUNT)] == [f"caption {i}" for i in range(COUNT)]
    assert fetch(urls, f"{s3}/data", samples_per_shard=SHARD, retry_failed=DEFAULT_RETRY) == summary


def test_table_in_s3(urls: Path, s3: str, tmp_path: Path) -> None:
    """CSV too, which is copied; a table that changes there is noticed."""
    table = as_path(f"{s3}/urls.csv")
    rows = pq.read_table(urls).slice(0, 2).to_pylist()
    table.write_bytes(("url,caption\n" + "".join(f"{row['url']},a\n" for row in rows)).encode())
    assert fetch(str(table), tmp_path, format="webdataset").downloaded == 2
    table.write_bytes(table.read_bytes() + b"u,b\n")
    with pytest.raises(UserError, match=r"urls\.csv isn't the table that .* was begun with"):
        fetch(str(table), tmp_path, format="webdataset")
    with pytest.raises(UserError, match=r"URL table s3://.*/gone\.csv doesn't exist"):
        fetch(f"{s3}/gone.csv", tmp_path)
    with pytest.raises(UserError, match=r"its bucket doesn't exist"):
        fetch(urls, f"s3://{uuid.uuid4().hex}/out")
