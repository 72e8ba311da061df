"""Every row is an image or a failure with its reason, in each format, whatever is killed or changed on the way."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bad_server import bad_server
from download_site import (
    CAPTIONS,
    COUNT,
    JPEG,
    NETWORK,
    PICTURES,
    REASONS,
    encoded,
    examples,
    fetch,
    file_bytes,
    members,
    numbered,
    port_of,
    site,
    table,
    write_numbered,
    write_urls,
)
from PIL import Image
from tensorflow_process import with_tensorflow
from webdataset import tariterators

from clipkit.cli.demo_server import Answer, serve
from clipkit.errors import UserError
from clipkit.formats.dataset import open_dataset
from clipkit.formats.manifest import read_manifest
from clipkit.jobs.run import Engine
from clipkit.pixels.phash import perceptual_hash_of
from clipkit.tfrecord_tools.account.ledger import read_ledger
from clipkit.tfrecord_tools.download import work
from clipkit.tfrecord_tools.download.command import divide_requests
from clipkit.tfrecord_tools.download.finish import DownloadSummary
from clipkit.tfrecord_tools.download.plan import DownloadJob, cut
from clipkit.tfrecord_tools.reasons import DEFAULT_RETRY

Finished = dict[str, tuple[Path, Path, DownloadSummary]]
FORMATS = ("tfds", "webdataset", "parquet")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """By format: a URL table, the folder made of it in one go, and the summary; for reading alone."""
    folder = tmp_path_factory.mktemp("download")
    made = {}
    with site() as base_url:
        pq.write_table(table(base_url), folder / "urls.parquet")
        for format in FORMATS:
            summary = fetch(folder / "urls.parquet", folder / format, preset="laion400m", format=format)
            made[format] = (folder / "urls.parquet", summary.out, summary)
    return made


def expected_reasons(format: str) -> list[str | None]:
    """What becomes of each row: a dataset takes no pair without a caption."""
    if format != "tfds":
        return REASONS
    return [
        "empty-caption" if not (caption or "").strip() else reason
        for caption, reason in zip(CAPTIONS, REASONS, strict=True)
    ]


@pytest.mark.parametrize(
    ("per_host", "processes", "each", "says"),
    [
        (8, 2, 4, ""),
        (8, 3, 2, ""),
        (
            2,
            3,
            1,
            "3 processes may send one host 3 requests at a time, more than --per-host 2: --processes 2 keeps to it",
        ),
    ],
)
def test_the_processes_share_what_one_host_is_asked(
    per_host: int, processes: int, each: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert divide_requests(replace(NETWORK, per_host=per_host), processes).per_host == each
    assert capsys.readouterr().err == (f"download: {says}\n" if says else "")


@pytest.mark.parametrize("format", FORMATS)
def test_counts_add_up(finished: Finished, format: str) -> None:
    _, out, summary = finished[format]
    expected = Counter(reason for reason in expected_reasons(format) if reason)
    assert (summary.rows, summary.left_out, summary.failed) == (COUNT, 0, dict(expected))
    assert list(summary.failed.values()) == sorted(summary.failed.values(), reverse=True)
    assert summary.downloaded == COUNT - expected.total()
    assert (summary.empty_captions, summary.shards) == (2, 3)
    told = json.loads((out / "clipkit" / "download.json").read_text())
    assert told["rows"] == told["left_out"] + told["downloaded"] + sum(told["failed"].values()) == COUNT
    folder, pattern = (out / "clipkit" / "shards", "*.json") if format == "tfds" else (out, "*_stats.json")
    stats = [json.loads(path.read_text()) for path in sorted(folder.glob(pattern))]
    assert [each["count"] for each in stats] == [6, 6, 3]
    assert sum(each["successes"] for each in stats) == summary.downloaded
    assert sum(each["failed_to_download"] + each["failed_to_resize"] for each in stats) == expected.total()


@pytest.mark.parametrize("format", FORMATS)
def test_each_row_has_a_line_in_the_ledger(finished: Finished, format: str) -> None:
    urls, out, _ = finished[format]
    lines = [row for path in sorted((out / "clipkit" / "ledger").iterdir()) for row in pq.read_table(path).to_pylist()]
    assert [line["reason"] for line in lines] == expected_reasons(format)
    assert [line["url"] for line in lines] == pq.read_table(urls)["URL"].to_pylist()
    assert [line["row"] for line in lines] == list(range(COUNT))
    assert [line["key"] for line in lines] == [f"{i // 6 * 10 + i % 6:06d}" for i in range(COUNT)]
    first, gone = lines[0], lines[9]
    assert (first["http_status"], first["attempts"], first["body_bytes"]) == (200, 1, len(JPEG))
    assert first["sha256"] == hashlib.sha256(JPEG).hexdigest() and first["caption"] is None
    assert (first["width"], first["height"], first["original_width"], first["original_height"]) == (38, 32, 48, 40)
    assert (gone["http_status"], gone["body_bytes"], gone["caption"]) == (410, None, "gone")
    assert all(line["message"] for line in lines if line["reason"])


@pytest.mark.parametrize("format", FORMATS)
def test_failures_name_row_and_reason(finished: Finished, format: str) -> None:
    urls, out, _ = finished[format]
    failures = pq.read_table(out / "clipkit" / "failures.parquet").to_pylist()
    rows = pq.read_table(urls).to_pylist()
    expected = [(i, reason) for i, reason in enumerate(expected_reasons(format)) if reason]
    assert [(f["url"], f["caption"], f["reason"]) for f in failures] == [
        (rows[i]["URL"], rows[i]["TEXT"], reason) for i, reason in expected
    ]
    assert [(f["shard"], f["key"]) for f in failures] == [
        (f"{i // 6:05d}", f"{i // 6 * 10 + i % 6:06d}") for i, _ in expected
    ]


# ---------------------------------------------------------------------------------------------------------------------
# The formats
# ---------------------------------------------------------------------------------------------------------------------


def test_tars_hold_images_and_texts(finished: Finished) -> None:
    _, out, _ = finished["webdataset"]
    samples = members(out)
    assert list(samples) == ["000000", "000001", "000002", "000003", "000004"]  # in the order of the rows
    captions = [sample["txt"].decode() for sample in samples.values()]
    assert captions == ["a plain one", "naïve “quotes”, 二つ", "", "  ", "grey"]
    for sample in samples.values():
        with Image.open(io.BytesIO(sample["jpg"])) as image:
            image.load()
            assert image.format == "JPEG" and min(image.size) == 32
    columns = json.loads(samples["000001"]["json"])
    assert columns["LICENSE"] == "CC0" and columns["similarity"] == 0.01 and "HEIGHT" not in columns
    assert json.loads(samples["000000"]["json"])["LICENSE"] is None
    assert columns["original_width"] == 48 and columns["status"] == "success"
    rows = pq.read_table(out / "00001.parquet").to_pylist()
    assert [row["key"] for row in rows] == [f"{key:06d}" for key in range(10, 16)]
    assert rows[0]["status"] == "failed_to_resize" and rows[0]["error_message"].startswith("truncated: ")
    assert rows[3]["status"] == "failed_to_download"


def test_webdataset_reads_the_tars(finished: Finished) -> None:
    _, out, _ = finished["webdataset"]
    with (out / "00000.tar").open("rb") as file:
        tar = {"url": "00000.tar", "stream": file}
        samples = list(tariterators.group_by_keys(tariterators.tar_file_expander([tar])))
    assert [sample["__key__"] for sample in samples] == [f"{key:06d}" for key in range(5)]
    assert sorted(name for name in samples[0] if not name.startswith("__")) == ["jpg", "json", "txt"]


def test_parquet_has_the_images_beside(finished: Finished) -> None:
    tars = list(members(finished["webdataset"][1]).values())
    _, out, _ = finished["parquet"]
    tables = [pq.read_table(path) for path in sorted(out.glob("*.parquet"))]
    assert len({t.schema for t in tables}) == 1
    rows = pa.concat_tables(tables).to_pylist()
    assert [row["jpg"] is None for row in rows] == [reason is not None for reason in REASONS]
    assert [row["jpg"] for row in rows if row["jpg"]] == [sample["jpg"] for sample in tars]
    assert [row["caption"] for row in rows] == CAPTIONS


def test_dataset_has_a_manifest(finished: Finished) -> None:
    _, out, summary = finished["tfds"]
    assert out.parts[-2:] == ("laion400m", "1.0.0")
    assert [path.name for path in sorted(out.glob("*tfrecord*"))] == [
        f"laion400m-train.tfrecord-0000{i}-of-00003" for i in range(3)
    ]
    manifest = read_manifest(out)["train"]
    assert (manifest.samples, manifest.records, manifest.skipped) == (COUNT, 3, dict(sorted(summary.failed.items())))
    assert manifest.formats == {"jpeg": 3}


READ = """
import tensorflow_datasets as tfds
builder = tfds.builder_from_directory(arguments[0])
rows = [
    [list(e["jpg"].shape), e["txt"].decode(), e["key"].decode(), float(e["similarity"]), int(e["width"])]
    for e in tfds.as_numpy(builder.as_dataset(split="train"))
]
result = [builder.info.splits["train"].num_examples, sorted(rows, key=lambda row: row[2])]
"""


def test_tfds_reads_the_dataset(finished: Finished) -> None:
    count, rows = with_tensorflow(READ, finished["tfds"][1])
    assert count == 3
    assert [row[1:3] for row in rows] == [
        ["a plain one", "000000"],
        ["naïve “quotes”, 二つ", "000001"],
        ["grey", "000004"],
    ]
    assert rows[0][0] == [32, 38, 3] and rows[2][3] == np.float32(0.04) and rows[0][4] == 38


@pytest.mark.parametrize("format", FORMATS)
def test_same_answers_give_the_same_bytes(finished: Finished, format: str, tmp_path: Path) -> None:
    """Another number of processes and connections, and answers in another order."""
    urls, out, summary = finished[format]
    with site(port_of(urls)):
        again = fetch(
            urls, tmp_path, preset="laion400m", format=format, processes=3, network=replace(NETWORK, connections=2)
        )
    assert replace(again, out=out) == summary
    assert file_bytes(again.out) == file_bytes(out)


def test_columns_that_differ_between_shards_get_one_kind(tmp_path: Path) -> None:
    """Whole numbers too large for 64 bits become text, and so do lists with holes: in all shards, fetched once."""
    count = 6
    with serve({"/a.jpg": Answer(JPEG)}) as base_url:
        numbers = pa.array([1, 2, 3, 4, 5, 2**64 - 1], pa.uint64())
        lists = pa.array([[1], [2], [None], [3], [4], [5]])
        urls = write_urls(
            tmp_path / "u.parquet", url=[f"{base_url}/a.jpg"] * count, caption=["a"] * count, big=numbers, holes=lists,
            flag=[True, None] * 3, none=pa.nulls(count),
        )  # fmt: skip
        summary = fetch(urls, tmp_path, samples_per_shard=2, keep_columns=["big", "holes", "flag", "none"])
    found = examples(summary.out)
    assert [each["big"] for each in found] == [str(n) for n in [1, 2, 3, 4, 5, 2**64 - 1]]
    assert [each["holes"] for each in found] == ["[1]", "[2]", "[null]", "[3]", "[4]", "[5]"]
    assert [each["flag"] for each in found] == [1, None] * 3
    assert "none" not in open_dataset(summary.out).features
    assert len({path.stat().st_size for path in (summary.out / "clipkit" / "pending").glob("*")}) == 0


def test_ids_that_pandas_made_floats_of_stay_what_they_are(tmp_path: Path) -> None:
    """As LAION-400M's SAMPLE_ID is: the first shard's would go into float32, those of the others wouldn't."""
    ids = [1.0, None, 2741800501.0, 3.0, 12345678901.0, None]
    with serve({"/a.jpg": Answer(JPEG)}) as base_url:
        urls = write_urls(
            tmp_path / "u.parquet", url=[f"{base_url}/a.jpg"] * 6, caption=["a"] * 6, id=pa.array(ids, pa.float64())
        )
        summary = fetch(urls, tmp_path, samples_per_shard=2, keep_columns=["id"])
    assert [each["id"] for each in examples(summary.out)] == ["1", None, "2741800501", "3", "12345678901", None]


# ---------------------------------------------------------------------------------------------------------------------
# Going on
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_finished_download_does_nothing(finished: Finished, format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    urls, out, summary = finished[format]
    monkeypatch.setattr(work, "run_jobs", None)

    def changes() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != ".lock"}

    before = changes()
    folder = out.parent.parent if format == "tfds" else out
    assert fetch(urls, folder, preset="laion400m", format=format) == summary
    assert changes() == before


@pytest.mark.parametrize("format", FORMATS)
def test_damaged_and_missing_shards_are_made_again(finished: Finished, format: str, tmp_path: Path) -> None:
    """All three shards are fetched anew, and have the same bytes."""
    urls, whole, summary = finished[format]
    out = tmp_path / "laion400m" / "1.0.0" if format == "tfds" else tmp_path
    shutil.copytree(whole, out, dirs_exist_ok=True)
    states = sorted((out / "clipkit" / "shards").iterdir() if format == "tfds" else out.glob("*_stats.json"))
    data = sorted(out.glob({"tfds": "*.tfrecord*", "webdataset": "*.tar", "parquet": "*.parquet"}[format]))
    os.truncate(data[0], 100)
    states[1].unlink()
    states[2].write_text('{"count": ')
    (out / f".{data[2].name}.999990000000000").write_bytes(b"left over")
    (out / "clipkit" / "pending" / "00001.99999").mkdir(parents=True)
    (out / "clipkit" / "pending" / "00001.99999" / data[1].name).write_bytes(b"half")
    with site(port_of(urls)):
        again = fetch(urls, tmp_path, preset="laion400m", format=format)
    assert replace(again, out=whole) == summary
    assert file_bytes(out) == file_bytes(whole)
    assert not list(out.glob(".*")) and not list((out / "clipkit" / "pending").iterdir())


def test_summary_is_withdrawn_while_shards_are_missing(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls, whole, _ = finished["tfds"]
    out = tmp_path / "laion400m" / "1.0.0"
    shutil.copytree(whole, out)
    (out / "clipkit" / "shards" / "00001.json").unlink()
    monkeypatch.setattr(work, "run_jobs", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        fetch(urls, tmp_path, preset="laion400m", processes=1)
    assert not (out / "clipkit" / "download.json").exists() and not (out / "dataset_info.json").exists()
    with pytest.raises(UserError):
        open_dataset(out)


def test_what_was_purged_does_not_come_back(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dataset of which the manifest tells another shard than was downloaded is left as it is."""
    urls, whole, summary = finished["tfds"]
    out = tmp_path / "laion400m" / "1.0.0"
    shutil.copytree(whole, out)
    path = out / "clipkit" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["splits"]["train"]["shards"][0]["records"] -= 1
    path.write_text(json.dumps(manifest))
    os.truncate(out / "laion400m-train.tfrecord-00000-of-00003", 100)
    monkeypatch.setattr(work, "run_jobs", None)
    assert replace(fetch(urls, tmp_path, preset="laion400m"), out=whole) == summary
    with pytest.raises(UserError, match=r"was changed since it was downloaded \(clipkit purge\?\)"):
        fetch(urls, tmp_path, preset="laion400m", retry_failed="connect")


def test_not_one_image_is_an_error_and_can_be_tried_again(tmp_path: Path) -> None:
    with serve({}) as base_url:
        urls = write_urls(tmp_path / "u.parquet", url=[f"{base_url}/a.jpg"] * 2, caption=["a", "b"])
        with pytest.raises(
            UserError,
            match=r"not one of 2 .*\(http-4xx 2; each is in .*\): links are dead.*--retry-failed=http-4xx",
        ):
            fetch(urls, tmp_path)
        port = int(base_url.rpartition(":")[2])
    assert pq.read_table(tmp_path / "u" / "1.0.0" / "clipkit" / "failures.parquet").num_rows == 2
    with serve({"/a.jpg": Answer(JPEG)}, port):
        assert fetch(urls, tmp_path, retry_failed="http-4xx").downloaded == 2


# ---------------------------------------------------------------------------------------------------------------------
# Hashes, time, and what stays out
# ---------------------------------------------------------------------------------------------------------------------


def test_hash_is_compared_and_told(tmp_path: Path) -> None:
    other = encoded("JPEG", seed=9)
    digests = [hashlib.md5(JPEG).hexdigest(), hashlib.md5(JPEG).hexdigest().upper(), None, "no digest"]
    with serve({"/a.jpg": Answer(JPEG), "/b.jpg": Answer(other)}) as base_url:
        columns = {"url": [f"{base_url}/{name}.jpg" for name in "abab"], "caption": ["a"] * 4, "h": digests}
        urls = write_urls(tmp_path / "u.parquet", **columns)
        hashed = {"hash_column": "h", "hash_kind": "md5"}
        summary = fetch(urls, tmp_path / "all", **hashed)
        assert summary.hash_check == {"differs": 1, "exact": 1, "unchecked": 2}
        assert [each["hash_check"] for each in examples(summary.out)] == ["exact", "differs", "unchecked", "unchecked"]
        dropped = fetch(urls, tmp_path / "dropped", drop_changed=True, **hashed)
    assert dropped.failed == {"hash-changed": 1} and dropped.downloaded == 3
    assert [o.hash_check for o in read_ledger(dropped.out / "clipkit" / "ledger" / "00000.parquet")][:2] == [
        "exact",
        "differs",
    ]


@pytest.mark.parametrize("kind", [pa.string(), pa.int64(), pa.uint64()])
def test_perceptual_hash_tells_re_encoded_from_changed(tmp_path: Path, kind: pa.DataType) -> None:
    number = perceptual_hash_of(JPEG)
    assert number >> 63  # as ImageHash's have it
    expected = {pa.string(): f"{number:016x}", pa.int64(): number - (1 << 64), pa.uint64(): number}[kind]
    answers = {"/again.jpg": Answer(encoded("JPEG", quality=60)), "/other.jpg": Answer(encoded("JPEG", seed=5))}
    with serve(answers) as base_url:
        urls = write_urls(
            tmp_path / "u.parquet",
            url=[base_url + path for path in answers],
            caption=["a", "b"],
            p=pa.array([expected] * 2, kind),
        )
        summary = fetch(urls, tmp_path, hash_column="p", hash_kind="phash")
    assert [each["hash_check"] for each in examples(summary.out)] == ["re-encoded", "changed"]


@pytest.mark.parametrize(
    ("url", "caption", "hint"),
    [
        (
            "http://127.0.0.1:1/a.jpg",
            "a",
            "--allow-private-hosts, if .*; then the same .* with --retry-failed tries",
        ),
        ("ftp://x.org/a.jpg", "a", "name another with --url-column, and another output$"),
        ("http://127.0.0.1:1/a.jpg", "", "--format webdataset, and another output$"),
    ],
)
def test_the_last_line_helps_against_the_most_frequent_reason(
    tmp_path: Path, url: str, caption: str, hint: str
) -> None:
    urls = write_urls(tmp_path / "u.parquet", url=[url] * 2 + [None], caption=[caption] * 3)
    with pytest.raises(UserError, match=hint):
        fetch(urls, tmp_path, network=replace(NETWORK, allow_private_hosts=False))


def test_a_server_that_says_nothing_is_a_timeout(tmp_path: Path) -> None:
    with serve({"/silent.jpg": Answer(None)}) as base_url:
        urls = write_urls(tmp_path / "u.parquet", url=[f"{base_url}/silent.jpg"], caption=["silent"])
        summary = fetch(urls, tmp_path / "out", format="webdataset", network=replace(NETWORK, timeout=0.2))
    assert (summary.downloaded, summary.failed) == (0, {"timeout": 1})


def test_private_addresses_are_refused_unless_allowed(tmp_path: Path) -> None:
    with serve({"/a.jpg": Answer(JPEG)}) as base_url:
        urls = write_urls(tmp_path / "u.parquet", url=[f"{base_url}/a.jpg"], caption=["a"])
        network = replace(NETWORK, allow_private_hosts=False)
        assert fetch(urls, tmp_path / "out", format="parquet", network=network).failed == {"blocked-address": 1}
        # They who forgot to allow them say so in the retry.
        for allowed, downloaded in [(False, 0), (True, 1)]:
            network = replace(NETWORK, allow_private_hosts=allowed)
            summary = fetch(urls, tmp_path / "out", format="parquet", network=network, retry_failed=DEFAULT_RETRY)
            assert summary.downloaded == downloaded


DRIVER = """
import sys
sys.path.insert(0, sys.argv[1])
from download_site import fetch

if __name__ == "__main__":
    summary = fetch(sys.argv[2], sys.argv[3], format="webdataset", processes=1)
    print(summary.downloaded, [name for name in ("img2dataset", "albumentations", "torch") if name in sys.modules])
"""


def test_the_process_that_leads_imports_nothing_heavy(tmp_path: Path) -> None:
    """In one of its own: what other tests have imported is in this one."""
    with serve({"/a.jpg": Answer(JPEG)}) as base_url:
        urls = write_urls(tmp_path / "u.parquet", url=[f"{base_url}/a.jpg"], caption=["a"])
        (tmp_path / "driver.py").write_text(DRIVER)
        command = [sys.executable, str(tmp_path / "driver.py"), str(Path(__file__).parents[2] / "support"), str(urls)]
        done = subprocess.run([*command, str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "1 []"


@pytest.mark.parametrize(
    ("shards", "workers", "engine", "lengths"),
    [
        (1, 2, "local", {1}),
        (3, 2, "local", {2, 1}),
        (8, 2, "local", {4}),
        (100, 2, "local", {12, 4}),
        (10_000, 2, "local", {16}),
        (10_000, 2, "spark", {4}),
        (10, 50, "local", {1}),
    ],
)
def test_runs_overlap_shards_and_leave_work_for_every_worker(
    shards: int, workers: int, engine: Engine, lengths: set[int]
) -> None:
    todo = [DownloadJob(shard) for shard in cut([Path("t")], [shards], [None], 1)]
    runs = work.cut_batches(todo, workers, engine)
    assert {len(run) for run in runs} == lengths
    assert [job for run in runs for job in run] == todo


def test_images_are_as_asked(tmp_path: Path) -> None:
    with serve({"/a.jpg": Answer(JPEG)}) as base_url:
        urls = write_urls(tmp_path / "u.parquet", url=[f"{base_url}/a.jpg"], caption=["a"])
        small = fetch(urls, tmp_path / "small", format="webdataset", pictures=replace(PICTURES, image_size=16))
        refused = fetch(urls, tmp_path / "min", format="webdataset", pictures=replace(PICTURES, min_image_size=41))
        kept = fetch(urls, tmp_path / "kept", format="webdataset", pictures=replace(PICTURES, resize_mode="no"))
    assert json.loads(members(small.out)["000000"]["json"])["height"] == 16
    assert refused.failed == {"too-small": 1}
    assert members(kept.out)["000000"]["jpg"] == JPEG


def test_a_slow_row_holds_up_no_other_shard(tmp_path: Path) -> None:
    """The first shard has a row that says nothing for five seconds; others of the run are done before it."""
    with serve({"/a.jpg": Answer(JPEG), "/silent.jpg": Answer(None)}) as base_url:
        names = ["silent", *["a"] * 99]
        urls = write_urls(tmp_path / "u.parquet", url=[f"{base_url}/{name}.jpg" for name in names], caption=names)
        summary = fetch(urls, tmp_path, format="parquet", samples_per_shard=4, network=replace(NETWORK, timeout=5))
    ends = [json.loads(path.read_text())["end_time"] for path in sorted(tmp_path.glob("*_stats.json"))]
    assert summary.failed == {"timeout": 1} and len(ends) == 25
    assert sum(end < ends[0] for end in ends) >= 4


def test_requests_to_one_host_are_bounded_over_all_processes(tmp_path: Path) -> None:
    with bad_server(numbered(24), latency=0.05) as server:
        urls = write_numbered(tmp_path / "u.parquet", server.url(""), 24)
        fetch(urls, tmp_path, processes=2, samples_per_shard=4, network=replace(NETWORK, per_host=4))
        assert 2 <= server.most_open_requests <= 4
