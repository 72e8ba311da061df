"""A probe says how a download will go, keeps nothing, and stops what would fail."""

import hashlib
import json
import re
from http import HTTPStatus
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from download_site import JPEG, PICTURES, fetch, write_urls

from clipkit.cli.demo_server import Answer, serve
from clipkit.cli.main import main
from clipkit.errors import UserError
from clipkit.tfrecord_tools.download.plan import Output, make_plan
from clipkit.tfrecord_tools.download.probe import LOWER, MAX_ROW_GROUPS, ProbeResult, sample_rows
from clipkit.tfrecord_tools.reasons import ADVICE, remedy_after_download
from clipkit.tfrecord_tools.tables.url_table import TableColumns

ANSWERS = {"/ok.jpg": Answer(JPEG), "/busy.jpg": Answer(b"", status=HTTPStatus.BAD_GATEWAY)}


def test_probe_says_how_it_will_go(tmp_path: Path) -> None:
    """Of 40 rows, half of them probed: 3 of 4 are images."""
    found: list[ProbeResult] = []
    with serve(ANSWERS) as base_url:
        names = ["ok", "ok", "busy", "ok"] * 10
        urls = write_urls(tmp_path / "u.parquet", url=[f"{base_url}/{name}.jpg" for name in names], caption=["a"] * 40)
        summary = fetch(urls, tmp_path, probe_rows=20, tell_probe=found.append, processes=2)
        assert (summary.downloaded, summary.probe) == (30, found[0])
        again = fetch(urls, tmp_path, probe_rows=20, tell_probe=found.append)  # it has begun: there is nothing to ask
        assert again.probe is None and len(found) == 1
    told = found[0]
    assert (told.rows, told.of, told.ok + told.failed["http-5xx"]) == (20, 40, 20)
    assert told.success == told.ok / 20 and told.low < told.success < told.high
    assert told.images == round(40 * told.success)
    assert told.body_bytes == len(JPEG) and 500 < told.image_bytes < 3 * len(JPEG)
    assert told.disk_bytes == round(told.images * (told.image_bytes + 1000))
    assert told.rows_per_second > 0 and told.seconds == pytest.approx(40 / told.rows_per_second)
    assert f"all 40 rows: about {told.images} images, " in told.text() and "http-5xx" in told.text()
    assert summary.to_json()["probe"] == told.to_json() and "probe" not in again.to_json()


def test_probe_below_the_floor_stops(tmp_path: Path) -> None:
    urls = write_urls(tmp_path / "u.parquet", url=["http://127.0.0.1:1/a.jpg"] * 9 + [None], caption=["a"] * 10)
    with pytest.raises(
        UserError, match=r"only 0.0% of the probed rows gave an image, below --probe-floor 0.5: hosts can't"
    ):
        fetch(urls, tmp_path, probe_rows=10)
    assert not (tmp_path / "u" / "1.0.0" / "clipkit" / "ledger").exists()
    result = CliRunner().invoke(
        main, ["download", str(urls), str(tmp_path), "--probe", "5", "--json", "--image-size", "32"]
    )
    assert result.exit_code == 2
    told = json.loads(result.stdout)["probe"]
    assert (told["rows"], told["ok"]) == (5, 0) and set(told["failed"]) <= {"blocked-address", "bad-url"}
    assert "--allow-private-hosts, if these servers are your own" in result.stderr
    assert "Error: only" in result.stderr.splitlines()[-1]


def test_probe_counts_what_drop_changed_leaves_out(tmp_path: Path) -> None:
    digests = [hashlib.md5(JPEG).hexdigest(), "0" * 32] * 2
    with serve({"/a.jpg": Answer(JPEG)}) as base_url:
        urls = write_urls(tmp_path / "u.parquet", url=[f"{base_url}/a.jpg"] * 4, caption=["a"] * 4, md5=digests)
        options = {"hash_column": "md5", "hash_kind": "md5", "probe_rows": 4}
        changed = fetch(urls, tmp_path / "dropped", drop_changed=True, **options)
        kept = fetch(urls, tmp_path / "kept", **options)
    assert changed.probe is not None and kept.probe is not None
    assert (changed.probe.ok, changed.probe.failed) == (changed.downloaded, changed.failed) == (2, {"hash-changed": 2})
    assert (kept.probe.ok, kept.downloaded) == (4, 4)


def test_advice_names_options_that_exist() -> None:
    known = {name for command in main.commands.values() for option in command.params for name in option.opts}
    for line in [*ADVICE.values(), *LOWER.values(), *map(remedy_after_download, ADVICE)]:
        assert [word for word in re.split("[ :,;=]+", line) if word.startswith("--") and word not in known] == []


def plan_of(folder: Path, own: Path, where: str | None = None) -> object:
    columns = TableColumns("url", "caption", pa.schema([]))
    output = Output("parquet", "", columns, PICTURES, False, 1000)
    return make_plan(folder, sorted(folder.iterdir()), output, where, own, lambda schemas: columns)


def test_every_wanted_row_is_as_likely(tmp_path: Path) -> None:
    """Tables of 30 and 10 rows in row groups of 7: over many seeds each row comes as often as any other."""
    (tmp_path / "urls").mkdir()
    for part, count in enumerate([30, 10]):
        rows = [f"{part}/{n}" for n in range(count)]
        pq.write_table(
            pa.table({"url": rows, "caption": rows}), tmp_path / "urls" / f"{part}.parquet", row_group_size=7
        )
    plan = plan_of(tmp_path / "urls", tmp_path / "own", "url NOT LIKE '%3'")
    counts: dict[str, int] = {}
    for seed in range(400):
        for url, *_ in sample_rows(plan, 6, seed):
            counts[url] = counts.get(url, 0) + 1
    assert len(counts) == 36 and not any(url.endswith("3") for url in counts)
    expected = 400 * 6 / 36
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 70  # chi-squared of 35: p < 0.001
    assert sample_rows(plan, 6, 3) == sample_rows(plan, 6, 3)
    assert sorted(url for url, *_ in sample_rows(plan, 1000, 0)) == sorted(counts)


def test_of_many_row_groups_some_are_opened(tmp_path: Path) -> None:
    (tmp_path / "urls").mkdir()
    rows = [str(n) for n in range(400)]
    pq.write_table(pa.table({"url": rows, "caption": rows}), tmp_path / "urls" / "a.parquet", row_group_size=2)
    plan = plan_of(tmp_path / "urls", tmp_path / "own")
    groups = {int(url) // 2 for url, *_ in sample_rows(plan, 100, 0)}
    assert len(groups) <= MAX_ROW_GROUPS and np.ptp(list(groups)) > 150
