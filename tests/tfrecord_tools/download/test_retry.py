"""Rows that failed are fetched again when they are asked for, and no others, and join the shards they belong to."""

import dataclasses
import json
from http import HTTPStatus
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from download_site import JPEG, examples, fetch, file_bytes, members, write_urls

from clipkit.cli.demo_server import Answer, serve
from clipkit.errors import UserError
from clipkit.formats.dataset import open_dataset
from clipkit.tfrecord_tools import reasons
from clipkit.tfrecord_tools.account.shard_state import DownloadState
from clipkit.tfrecord_tools.download import work
from clipkit.tfrecord_tools.download.plan import DownloadShard
from clipkit.tfrecord_tools.download.progress import NAMES
from clipkit.tfrecord_tools.download.work import NOT_RETRIED, RETRY_FILE, begin_retry, parse_reasons, retry_jobs
from clipkit.tfrecord_tools.reasons import DEFAULT_RETRY

GOOD, BUSY, GONE = Answer(JPEG), Answer(b"", status=HTTPStatus.BAD_GATEWAY), Answer(b"", status=HTTPStatus.NOT_FOUND)
PATHS = [f"/{number}.jpg" for number in range(8)]


@pytest.mark.parametrize("format", ["tfds", "webdataset", "parquet"])
def test_failed_rows_are_merged(tmp_path: Path, format: str) -> None:
    """The shards end with the bytes that they would have had at once; a shard without such rows isn't touched."""
    first = {path: {1: BUSY, 2: GONE, 4: GONE, 5: BUSY}.get(number % 6, GOOD) for number, path in enumerate(PATHS)}
    first["/6.jpg"] = first["/7.jpg"] = GOOD
    with serve(first) as base_url:
        port = int(base_url.rpartition(":")[2])
        urls = write_urls(tmp_path / "u.parquet", url=[base_url + path for path in PATHS], caption=PATHS)
        options = {"format": format, "samples_per_shard": 3}
        summary = fetch(urls, tmp_path / "out", **options)
        assert summary.failed == {"http-4xx": 2, "http-5xx": 2}
    second = {**dict.fromkeys(PATHS, GOOD), "/5.jpg": BUSY}
    data = sorted(path for path in summary.out.iterdir() if "0002" in path.name and path.suffix != ".json")
    untouched = {path: path.stat().st_mtime_ns for path in data}
    with serve(second, port):
        assert fetch(urls, tmp_path / "out", **options) == summary  # nothing that failed is fetched, or done, by itself
        retried = fetch(urls, tmp_path / "out", retry_failed=DEFAULT_RETRY, **options)
        assert (retried.failed, retried.downloaded, retried.retries) == ({"http-4xx": 2, "http-5xx": 1}, 5, 1)
        assert {path: path.stat().st_mtime_ns for path in data} == untouched
        failures = pq.read_table(summary.out / "clipkit" / "failures.parquet")
        assert failures["url"].to_pylist() == [f"{base_url}/{number}.jpg" for number in (2, 4, 5)]
        told = json.loads((summary.out / "clipkit" / "download.json").read_text())
        assert told["rows"] == told["downloaded"] + sum(told["failed"].values()) == 8
    with serve(dict.fromkeys(PATHS, GOOD), port):
        last = fetch(urls, tmp_path / "out", retry_failed="http-4xx,http-5xx", **options)
        at_once = fetch(urls, tmp_path / "at-once", **options)
    assert dataclasses.replace(last, out=at_once.out, retries=0) == at_once
    assert file_bytes(last.out) == file_bytes(at_once.out)
    if format == "tfds":
        assert [each["txt"] for each in examples(last.out)] == PATHS
        assert open_dataset(last.out).num_records == 8
    elif format == "webdataset":
        assert [sample["txt"].decode() for sample in members(last.out).values()] == PATHS


def test_rows_without_a_reason_to_pass_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve({"/a.jpg": GOOD}) as base_url:
        urls = write_urls(
            tmp_path / "u.parquet", url=[f"{base_url}/a.jpg", f"{base_url}/b.jpg", "nonsense"], caption=list("abc")
        )
        summary = fetch(urls, tmp_path)
        monkeypatch.setattr(work, "run_jobs", None)
        assert fetch(urls, tmp_path, retry_failed=DEFAULT_RETRY) == summary
    assert not (summary.out / "clipkit" / "retry.json").exists()


@pytest.mark.parametrize("format", ["tfds", "webdataset"])
def test_rows_without_a_url_stay_as_they_are(tmp_path: Path, format: str) -> None:
    with serve({"/a.jpg": GOOD}) as base_url:
        urls = write_urls(tmp_path / "u.parquet", url=[f"{base_url}/a.jpg", None, "nonsense"], caption=list("abc"))
        summary = fetch(urls, tmp_path / "out", format=format)
        again = fetch(urls, tmp_path / "out", format=format, retry_failed="bad-url")
    assert (again.downloaded, again.failed) == (summary.downloaded, summary.failed) == (1, {"bad-url": 2})


def test_a_retry_comes_with_what_was_missing(tmp_path: Path) -> None:
    """A run that was killed and is now told to retry fetches both: the shards not made, and the rows that failed."""
    with serve({path: BUSY if path == "/0.jpg" else GOOD for path in PATHS}) as base_url:
        port = int(base_url.rpartition(":")[2])
        urls = write_urls(tmp_path / "u.parquet", url=[base_url + path for path in PATHS], caption=PATHS)
        summary = fetch(urls, tmp_path, samples_per_shard=4)
    (summary.out / "clipkit" / "shards" / "00001.json").unlink()
    with serve(dict.fromkeys(PATHS, GOOD), port):
        again = fetch(urls, tmp_path, samples_per_shard=4, retry_failed=DEFAULT_RETRY)
    assert (again.downloaded, again.failed) == (8, {})


def state(round: int = 0, **failed: int) -> DownloadState:
    failed = {name.replace("_", "-"): count for name, count in failed.items()}
    count = 10
    return DownloadState(
        count, count - sum(failed.values()), sum(failed.values()), 0, failed, 0, {}, 0, 0, 0.0, 0.0, round, {}
    )


def test_a_killed_retry_goes_on_where_it_was(tmp_path: Path) -> None:
    shards = [DownloadShard(number, Path("t"), 0, 10, 10) for number in range(4)]
    states = [state(dns=1), state(http_4xx=2), None, state(1, dns=1)]
    dns, more = frozenset({"dns"}), frozenset({"dns", "http-4xx"})
    assert begin_retry(tmp_path, dns, states) == 2
    assert [job.shard.number for job in retry_jobs(shards, states, dns, 2)] == [0, 3]
    states[0] = state(2, dns=1)  # it failed again
    assert begin_retry(tmp_path, dns, states) == 2
    assert [job.shard.number for job in retry_jobs(shards, states, dns, 2)] == [3]
    assert begin_retry(tmp_path, more, states) == 3
    assert [job.shard.number for job in retry_jobs(shards, states, more, 3)] == [0, 1, 3]
    (tmp_path / RETRY_FILE).unlink()
    assert begin_retry(tmp_path, dns, states) == 3


def test_reasons_by_name() -> None:
    assert parse_reasons("dns, http-5xx,") == {"dns", "http-5xx"}
    assert parse_reasons(",".join(reasons.REASONS)) == set(reasons.REASONS)
    assert "http-4xx" not in DEFAULT_RETRY and "blocked-address" not in DEFAULT_RETRY
    assert parse_reasons(DEFAULT_RETRY) == reasons.PASSING and parse_reasons("dns", allow_private_hosts=True) == {"dns"}
    assert parse_reasons(DEFAULT_RETRY, allow_private_hosts=True) == reasons.PASSING | {"blocked-address"}
    with pytest.raises(UserError, match="unknown reason '404' in --retry-failed=404: choose among dns, connect, tls"):
        parse_reasons("404")


def test_every_reason_that_a_download_reports_is_taken_or_refused_with_the_reason_why(tmp_path: Path) -> None:
    """Rows fail for what a fetch or a picture ends in, and for what is never fetched into a dataset."""
    reported = set(NAMES) - {"ok"}
    assert reported == set(reasons.REASONS) | set(NOT_RETRIED)
    for reason in reported - set(NOT_RETRIED):
        assert parse_reasons(reason) == {reason}
    with pytest.raises(UserError, match="can't be fetched again for empty-caption, a dataset takes no pair without"):
        parse_reasons("dns,empty-caption")
    urls = write_urls(tmp_path / "u.parquet", url=["http://127.0.0.1:1/a.jpg"], caption=["a"])
    with pytest.raises(UserError, match="can't be fetched again for purged, what was purged must not come back"):
        fetch(urls, tmp_path, retry_failed="purged")
