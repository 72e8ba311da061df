"""A build on Ray, on Spark and in stores gives the bytes of a build on this machine."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import uuid

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_shards import pair, picture, write_tar
from object_store import s3 as s3
from object_store import s3_server as s3_server

from clipkit.storage.files import as_path
from clipkit.storage.stores import as_upath
from clipkit.tfrecord_tools.build.command import build_tfds

OPTIONS = {"dedup": "caption", "shuffle": 7, "split": "train=0.8,test=0.2", "where": "width > 1"}
OPTIONS |= {"keep_best": 0.9, "by": "similarity", "balance": "builtin", "limit": 12}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines") / "shards"
    for shard in range(3):
        samples = [pair(10 * shard + i, **({"txt": "the same"} if i % 4 == 1 else {})) for i in range(10)]
        write_tar(folder / f"{shard}.tar", samples)
    return folder


def contents(folder) -> dict[str, str]:
    """Every file below a local or remote folder by its path, with a hash."""
    return {
        str(path)[len(str(folder)) :]: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture(scope="module")
def expected(shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("expected")
    build_tfds(shards, folder, "pairs", shard_megabytes=0.02, progress=lambda _: None, **OPTIONS)
    return contents(folder)


# Neither Ray nor a JVM enters the process of the tests. The user has the engine running; else each pass starts its own.
ON_AN_ENGINE = """
import sys
if sys.argv[3] == "ray":
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="CRITICAL")
else:
    from pyspark import SparkConf, SparkContext

    settings = {"spark.ui.enabled": "false", "spark.log.level": "OFF"}
    settings |= {"spark.driver.bindAddress": "127.0.0.1", "spark.driver.host": "127.0.0.1"}
    SparkContext(conf=SparkConf().setMaster("local[2,3]").setAll(list(settings.items())))
from clipkit.tfrecord_tools.build.command import build_tfds
shards, out, engine, options = sys.argv[1], sys.argv[2], sys.argv[3], eval(sys.argv[4])
build_tfds(shards, out, "pairs", shard_megabytes=0.02, engine=engine, workers=2, progress=lambda _: None, **options)
"""


@pytest.mark.parametrize("engine", ["ray", "spark"])
def test_engines_change_nothing(shards, expected, tmp_path, engine):
    folder = tempfile.mkdtemp(prefix="ray-")  # a short path, because sockets lie below it
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ON_AN_ENGINE, str(shards), str(tmp_path / "out"), engine, repr(OPTIONS)],
        cwd=tmp_path,
        env={**os.environ, "RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0", "PYSPARK_PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    shutil.rmtree(folder, ignore_errors=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize("store", ["memory", "s3"])
def test_stores_change_nothing(shards, expected, request, store):
    root = as_path(request.getfixturevalue("s3") if store == "s3" else f"memory://{uuid.uuid4().hex}")
    fs = as_upath(root).fs
    for path in shards.iterdir():
        fs.pipe_file(as_upath(root / "shards" / path.name).path, path.read_bytes())
    summary = build_tfds(
        root / "shards",
        root / "out",
        "pairs",
        shard_megabytes=0.02,
        workers=2 if store == "s3" else 1,
        progress=lambda _: None,
        **OPTIONS,
    )
    assert contents(root / "out") == expected
    assert summary.records == 18


@pytest.mark.parametrize("kind", ["parquet", "images", "dataset"])
def test_sources_in_a_store(tmp_path, kind):
    if kind == "parquet":
        rows = [{"jpg": picture(i), "txt": f"words {i}", "key": f"{i:09d}"} for i in range(9)]
        (tmp_path / "in").mkdir()
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in" / "0.parquet", row_group_size=2)
    elif kind == "images":
        (tmp_path / "in" / "below").mkdir(parents=True)
        for i in range(9):
            (tmp_path / "in" / "below" / f"{i}.jpg").write_bytes(picture(i))
        lines = [f"below/{i}.jpg,words {i}\n" for i in range(9)]
        (tmp_path / "in" / "metadata.csv").write_text("file_name,text\n" + "".join(lines))
    else:
        write_tar(tmp_path / "0.tar", [pair(i) for i in range(9)])
        build_tfds(tmp_path / "0.tar", tmp_path / "in", "one", progress=lambda _: None)
    root = as_path(f"memory://{uuid.uuid4().hex}")
    fs = as_upath(root).fs
    for path in (tmp_path / "in").rglob("*"):
        if path.is_file():
            fs.pipe_file(as_upath(root / "in" / str(path.relative_to(tmp_path / "in"))).path, path.read_bytes())
    for source, out in [(tmp_path / "in", tmp_path / "out"), (root / "in", root / "out")]:
        summary = build_tfds(source, out, "pairs", shard_megabytes=0.002, progress=lambda _: None)
        assert summary.records == 9 and summary.shards > 1
    assert contents(root / "out") == contents(tmp_path / "out")
