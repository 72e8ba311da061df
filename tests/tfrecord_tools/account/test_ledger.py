"""A ledger keeps what became of each row, and those of earlier versions are read as they are meant."""

import json
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from clipkit.tfrecord_tools.account.ledger import ledger_table, read_ledger, write_failures, write_ledger
from clipkit.tfrecord_tools.account.shard_state import DownloadFiles, DownloadState, load_state
from clipkit.tfrecord_tools.outcome import RowOutcome

OUTCOMES = [
    RowOutcome(None, http_status=200, attempts=1, body_bytes=9, jpg_bytes=8, width=2, height=1, offset=16),
    RowOutcome("empty caption", "not fetched"),
    RowOutcome("dns", "no such name", attempts=2),
    RowOutcome("purged", "by the purge p"),
]


def write(path: Path) -> None:
    rows = pa.table({"url": ["u0", "u1", "u2", "u3"], "caption": ["c0", "", "c2", "c3"]})
    write_ledger(path, ledger_table(["k0", "k1", "k2", "k3"], [4, 5, 6, 7], rows["url"], rows["caption"], OUTCOMES))


def test_captions_are_kept_of_failures_only(tmp_path: Path) -> None:
    write(tmp_path / "0.parquet")
    ledger = pq.read_table(tmp_path / "0.parquet")
    assert ledger["row"].to_pylist() == [4, 5, 6, 7]
    assert ledger["caption"].to_pylist() == [None, "", "c2", None]


def test_the_reason_of_earlier_versions_has_its_present_name(tmp_path: Path) -> None:
    write(tmp_path / "0.parquet")
    outcomes = read_ledger(tmp_path / "0.parquet")
    assert [outcome.reason for outcome in outcomes] == [None, "empty-caption", "dns", "purged"]
    assert outcomes[0] == OUTCOMES[0] and outcomes[2:] == OUTCOMES[2:]
    write_failures(tmp_path / "failures.parquet", [("00000", tmp_path / "0.parquet")])
    failures = pq.read_table(tmp_path / "failures.parquet")
    assert failures["reason"].to_pylist() == ["empty-caption", "dns", "purged"]
    failed = {"dns": 1, "empty caption": 1, "purged": 1}
    state = DownloadState(4, 1, 3, 0, failed, 1, {}, 8, 9, 0.0, 1.0, 0, {"ledger": 1})
    (tmp_path / "0.json").write_text(json.dumps(asdict(state)))
    found = load_state(DownloadFiles(tmp_path / "0.tar", tmp_path / "0.parquet", tmp_path / "0.json"))
    assert found is not None and found.failed == {"dns": 1, "empty-caption": 1, "purged": 1}
