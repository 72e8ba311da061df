"""The line of a download counts live, over all workers, and says what goes wrong."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from bad_server import bad_server
from download_site import NETWORK, fetch, numbered, write_numbered

from clipkit.log import Progress
from clipkit.tfrecord_tools.download import progress as download_progress
from clipkit.tfrecord_tools.download.progress import DownloadLine, LiveCounts, note, read_counts, watch
from clipkit.tfrecord_tools.reasons import REASONS


def test_workers_counts_are_added_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for pid in (11, 12):
        monkeypatch.setattr(download_progress.os, "getpid", lambda pid=pid: pid)
        counts = LiveCounts(str(tmp_path))
        counts.add(None, 1000 * pid, pid)
        counts.add("dns", 1000 * pid, pid)
        counts.add_refused(["bad-url", "something else"])
    LiveCounts(str(tmp_path)).add(None, 5000, 3)  # the same process goes on
    (tmp_path / "13").write_bytes(b"half")
    total = read_counts(str(tmp_path))
    by_name = dict(zip(download_progress.NAMES, total.tolist(), strict=False))
    assert {name: count for name, count in by_name.items() if count} == {"ok": 3, "dns": 2, "bad-url": 2, "other": 2}
    assert total[download_progress.BYTES] == 11_000 + 5000 and total[download_progress.REQUESTS] == 11 + 3
    assert set(REASONS) < set(download_progress.NAMES)


def test_note_names_the_top_errors() -> None:
    counts = Counter({"ok": 750, "http-4xx": 120, "dns": 100, "timeout": 20, "tls": 10})
    assert note(counts, (312.4, 11.25), 96) == (
        "312 images/s, 11.2 MB/s, 96 at once, 75.0% ok, http-4xx 120, dns 100, timeout 20"
    )
    assert note(Counter(), (0, 0), 0) == "waiting for the first answers"


def test_rates_are_of_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(download_progress.time, "monotonic", lambda: clock.now)
    line = DownloadLine(Progress("download", 10_000, "rows", quiet=True), Counter({"ok": 5}), str(tmp_path))
    counts = LiveCounts(str(tmp_path))
    line.draw()
    for second in range(1, 31):
        clock.now = float(second)
        for _ in range(100 if second > 15 else 1):
            counts.add(None, second * 1_000_000, 8)
        line.draw()
    assert line.rates() == pytest.approx((100, 1.0), rel=0.1)
    assert line.line.done == 5 + 15 + 1500


def test_the_line_has_one_rate_of_late_and_at_the_end_that_of_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(download_progress.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(download_progress, "DRAW_SECONDS", 3600.0)
    with watch(1000, Counter({"ok": 500}), live=True) as line:
        counts = LiveCounts(line.folder)
        for second in range(1, 51):
            clock.now = float(second)
            if second <= 20:
                for _ in range(20):
                    counts.add(None, second * 1_000_000, 8)
            line.draw()
        assert line.line.text() == "900/1,000 rows · 0 images/s, 0.0 MB/s, 8 at once, 100.0% ok"
    assert not Path(line.folder).exists()
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "download: 900/1,000 rows · 8 images/s, 0.4 MB/s, 8 at once, 100.0% ok"


def test_a_cluster_tells_by_runs() -> None:
    with watch(10, Counter({"ok": 1}), live=False) as line:
        assert line.folder is None
        line.finished(Counter({"ok": 3, "dns": 2}))
        assert line.line.done == 6 and line.line.note.endswith("66.7% ok, dns 2")


def test_line_moves_within_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one shard of which the server answers slowly, parts are counted before it is done."""
    seen: list[int] = []
    monkeypatch.setattr(download_progress, "DRAW_SECONDS", 0.01)
    monkeypatch.setattr(Progress, "update", lambda self, done, note="": seen.append(done))
    with bad_server(numbered(12), latency=0.1) as server:
        urls = write_numbered(tmp_path / "urls.parquet", server.url(""), 12)
        assert fetch(urls, tmp_path, samples_per_shard=12, network=replace(NETWORK, per_host=2)).downloaded == 12
    assert any(0 < done < 12 for done in seen) and seen[-1] == 12 and seen == sorted(seen)
