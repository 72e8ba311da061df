"""From a table of URLs to shards of images and captions, with every row accounted for.

The table's rows are cut into shards in order (`download_plan.py`), and workers fetch one shard at a time (`fetch.py`).
A shard is done when its statistics lie beside it and its files have the sizes that these name; so a run that was killed
goes on when the same command runs again. What clipkit writes for itself lies in OUT/clipkit/, because img2dataset takes
any `*.json` in OUT for a finished shard.
"""

import importlib.util
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from clipkit import jobs
from clipkit.errors import InternalError, UserError
from clipkit.files import disk_errors, lock, read_json, remove, require_writable, write_json
from clipkit.log import Progress
from clipkit.tfrecord_tools.download_plan import Plan, choose_columns, make_plan
from clipkit.tfrecord_tools.failures import write_failures
from clipkit.tfrecord_tools.fetch import ShardFiles, fetch_shard, shard_files
from clipkit.tfrecord_tools.url_table import find_tables

RESIZE_MODES = ("no", "keep_ratio", "center_crop", "border", "keep_ratio_largest")


@dataclass(frozen=True)
class DownloadSummary:
    """What became of the rows: `rows == downloaded + sum(failed.values())`, `failed` by reason, most frequent first.

    `empty_captions` counts rows whose caption is null or blank: their images are fetched like the others and get an
    empty text; building a dataset is where they are left out.
    """

    rows: int
    downloaded: int
    failed: dict[str, int]
    empty_captions: int
    shards: int
    out: Path

    def to_json(self) -> dict[str, Any]:
        """The counts, and the path as text."""
        return {**asdict(self), "out": str(self.out)}

    def text(self) -> str:
        """Two or three lines for a person."""
        lines = [f"{self.downloaded:,} of {self.rows:,} images ({self.downloaded / self.rows:.1%}) in {self.out}"]
        if self.failed:
            reasons = ", ".join(f"{reason} {number:,}" for reason, number in self.failed.items())
            lines.append(f"failed: {reasons}; each row in {self.out / 'clipkit' / 'failures.parquet'}")
        if self.empty_captions:
            lines.append(f"rows without a caption: {self.empty_captions:,}; build-tfds leaves them out")
        return "\n".join(lines)


def download(
    urls: Path,
    out: Path,
    *,
    preset: str | None = None,
    url_column: str | None = None,
    caption_column: str | None = None,
    keep_columns: Sequence[str] | None = None,
    image_size: int = 256,
    resize_mode: str = "keep_ratio",
    resize_only_if_bigger: bool = True,
    quality: int = 95,
    min_image_size: int = 0,
    samples_per_shard: int = 10_000,
    processes: int | None = None,
    threads: int = 32,
    timeout: float = 10.0,
    retries: int = 0,
) -> DownloadSummary:
    """Fetch the images of a URL table (parquet, CSV, TSV, or a folder of them) into image–text shards in `out`.

    A shard is `00000.tar` (KEY.jpg, KEY.txt, KEY.json), `00000.parquet` (all its rows with their status) and
    `00000_stats.json`, named as img2dataset names them. `clipkit/download.json` holds the summary and
    `clipkit/failures.parquet` each row that gave no image, with its reason.
    `image_size` is in pixels, `timeout` in seconds; `processes` of None takes every core. Running it again finishes
    what was begun, and does nothing when all is there.

    Raises UserError, before anything is fetched, for a missing, unreadable or empty table, missing columns, an output
    that can't be written or belongs to another download, and when img2dataset isn't installed.
    """
    for name, value in (("image size", image_size), ("samples per shard", samples_per_shard), ("threads", threads)):
        if value < 1:
            raise UserError(f"the {name} must be at least 1, not {value}")
    if resize_mode not in RESIZE_MODES:
        raise UserError(f"unknown resize mode {resize_mode!r}: choose one of {', '.join(RESIZE_MODES)}")
    if not 1 <= quality <= 100:
        raise UserError(f"the JPEG quality must be from 1 to 100, not {quality}")
    if timeout <= 0 or retries < 0:
        raise UserError(f"the timeout must be above 0 s and retries at least 0, not {timeout} and {retries}")
    columns = choose_columns(preset, url_column, caption_column, keep_columns)
    tables = find_tables(urls)
    if importlib.util.find_spec("img2dataset") is None:
        raise UserError("img2dataset isn't installed, and downloading is built on it: pip install 'clipkit[download]'")
    images = {
        "image_size": image_size,
        "resize_mode": resize_mode,
        "resize_only_if_bigger": resize_only_if_bigger,
        "quality": quality,
        "min_image_size": min_image_size,
        "samples_per_shard": samples_per_shard,
    }
    own = out / "clipkit"
    require_writable(out)
    with lock(own), disk_errors(out):
        plan = make_plan(urls, tables, columns, keep_columns is not None, images, own)
        fetch = partial(fetch_shard, out=out, output=plan.output, threads=threads, timeout=timeout, retries=retries)
        fetched = fetch_missing(plan, out, partial(fetch, work=own / "work"), processes)
        return finish(plan, out, fetched, str(urls))


def fetch_missing(plan: Plan, out: Path, fetch: Any, processes: int | None) -> int:
    """Fetch the shards that aren't done, with a line of progress; return how many there were."""
    clear_leftovers(out)
    totals: Counter[str] = Counter()
    missing = []
    for shard in plan.shards:
        stats = read_stats(shard_files(out, plan.name(shard)))
        if stats is None:
            missing.append(shard)
        else:
            count(totals, stats)
    if not missing:
        return 0
    # It says that all is there, which building relies on.
    (out / "clipkit" / "download.json").unlink(missing_ok=True)
    with Progress("download", plan.rows, "rows", start=totals.total()) as progress:
        progress.update(totals.total(), note(totals))
        work = jobs.run(fetch, missing, workers=processes, describe=lambda s: f"shard {plan.name(s)}", isolate=True)
        for index, _ in work:
            stats = read_stats(shard_files(out, plan.name(missing[index])))
            if stats is None:
                raise InternalError(
                    f"shard {plan.name(missing[index])} is missing from {out}: run the same command again"
                )
            count(totals, stats)
            progress.update(totals.total(), note(totals))
    clear_leftovers(out)
    return len(missing)


def clear_leftovers(out: Path) -> None:
    """Remove what a killed run was working on: its folders, and files not yet renamed into place."""
    for path in [out / "clipkit" / "work", *out.glob(".[0-9]*")]:
        remove(path)


def finish(plan: Plan, out: Path, fetched: int, urls: str) -> DownloadSummary:
    """Write failures and summary, unless nothing was fetched and they are there."""
    own = out / "clipkit"
    files = [shard_files(out, plan.name(shard)) for shard in plan.shards]
    if fetched == 0 and (own / "failures.parquet").exists() and (own / "download.json").exists():
        told = read_json(own / "download.json")
        counts = {each: told[each] for each in ("rows", "downloaded", "failed", "empty_captions", "shards")}
        return DownloadSummary(**counts, out=out)
    failed = write_failures(own / "failures.parquet", (shard.parquet for shard in files))
    stats = [read_json(shard.stats) for shard in files]
    summary = DownloadSummary(
        rows=plan.rows,
        downloaded=sum(shard["successes"] for shard in stats),
        failed=dict(failed.most_common()),
        empty_captions=sum(shard["empty_captions"] for shard in stats),
        shards=len(files),
        out=out,
    )
    if summary.rows != summary.downloaded + failed.total():
        raise InternalError(
            f"the counts of {out} don't add up ({summary}): report this, and download into another folder"
        )
    write_json(own / "download.json", {**summary.to_json(), "urls": urls, "output": asdict(plan.output)})
    return summary


def read_stats(files: ShardFiles) -> dict[str, Any] | None:
    """The statistics of a finished shard; None when it isn't there, or its files aren't the ones they speak of."""
    try:
        stats: dict[str, Any] = read_json(files.stats)
        sizes = (files.tar.stat().st_size, files.parquet.stat().st_size)
    except (UserError, OSError):
        return None
    return stats if sizes == (stats.get("tar_bytes"), stats.get("parquet_bytes")) else None


def count(totals: Counter[str], stats: dict[str, Any]) -> None:
    """Add a shard's images (under `ok`) and failures by reason to the totals."""
    totals.update({"ok": stats["successes"], **stats["failed"]})


def note(totals: Counter[str]) -> str:
    """The share of success and the three most frequent errors."""
    if not totals:
        return ""
    share = f"{totals['ok'] / totals.total():.1%} ok"
    errors = [f"{reason} {number:,}" for reason, number in totals.most_common() if reason != "ok" and number]
    return ", ".join([share, *errors[:3]])
