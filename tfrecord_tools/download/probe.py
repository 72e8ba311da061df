"""What a download is going to be like: some rows from all over the table, fetched and thrown away."""

import itertools
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clipkit.formats.tables import RowReader, open_parquet, row_group_starts
from clipkit.formatting import duration, size_text
from clipkit.intervals import wilson
from clipkit.jobs.run import run_jobs
from clipkit.tfrecord_tools import reasons
from clipkit.tfrecord_tools.download.plan import DownloadPlan, Output, load_mask, wanted_rows
from clipkit.tfrecord_tools.pictures.hash_check import CHANGED, check_hash
from clipkit.tfrecord_tools.pictures.picture import PictureError
from clipkit.tfrecord_tools.reasons import ADVICE, EMPTY_CAPTION
from clipkit.tfrecord_tools.sample import caption_problem
from clipkit.tfrecord_tools.web.settings import FetchOutcome, FetchSettings

SEED = 0
LOWER = {
    reasons.HTTP_4XX: "; lower --probe-floor to take what is left",
    reasons.DISALLOWED: "; lower --probe-floor to go on",
}
RECORD_BYTES = 1_000  # of a record beside its image: caption, columns, its row in the ledger
# A row group must be unpacked to find rows in it, and those of published tables hold a million: so many are opened.
MAX_ROW_GROUPS = 64
Hash = str | int | None
# The last rows are the slow ones, and a download overlaps them with the next: the rate is taken before they begin.
RATE_SHARE = 0.8


@dataclass(frozen=True)
class ProbeResult:
    """What a probe found. Shares are of 1; `low` and `high` are the 95% interval of `success` (Wilson's).

    `failed` is by reason. Rates are a second, of all processes together; `image_bytes` is what an image takes as
    stored, `body_bytes` as fetched, on average. `images`, `disk_bytes` and `seconds` are what the whole should be.
    """

    rows: int
    of: int
    ok: int
    failed: dict[str, int]
    success: float
    low: float
    high: float
    rows_per_second: float
    images_per_second: float
    image_bytes: float
    body_bytes: float
    images: int
    disk_bytes: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return asdict(self)

    def text(self) -> str:
        """A few lines for a person."""
        lines = [
            f"probe: {self.ok:,} of {self.rows:,} rows gave an image ({self.success:.1%}; "
            f"95%: {self.low:.1%} to {self.high:.1%})"
        ]
        if self.failed:
            lines.append("failed: " + ", ".join(f"{reason} {n / self.rows:.1%}" for reason, n in self.failed.items()))
        lines += [
            f"{self.images_per_second:,.0f} images/s; {size_text(self.image_bytes)} an image, "
            f"{size_text(self.body_bytes)} as fetched",
            f"all {self.of:,} rows: about {self.images:,} images, {size_text(self.disk_bytes)} of disk, "
            f"{duration(self.seconds)} at this rate",
        ]
        return "\n".join(lines)

    def refusal(self, floor: float) -> str | None:
        """The one line that says why not to go on, when fewer succeed than the share `floor`."""
        if self.success >= floor:
            return None
        leading = next(iter(self.failed), None)
        advice = ADVICE.get(leading or "", f"most fail as {leading}")
        advice += LOWER.get(leading or "", "")
        return f"only {self.success:.1%} of the probed rows gave an image, below --probe-floor {floor:g}: {advice}"


def probe(plan: DownloadPlan, count: int, network: FetchSettings, processes: int) -> ProbeResult:
    """Fetch `count` of the wanted rows from all over the tables, the same each time, and say what the whole will be.

    Works with as many processes and connections as the download will. Raises UserError for tables that can't be read.
    """
    sample = sample_rows(plan, count, SEED)
    counts: Counter[str] = Counter()
    wanted: list[tuple[str, Hash]] = []
    for url, caption, expected in sample:
        if plan.output.format == "tfds" and caption_problem(caption) is not None:
            counts[EMPTY_CAPTION] += 1
        elif url is None:
            counts[reasons.BAD_URL] += 1
        else:
            wanted.append((url, expected))
    rows = len(sample)
    parts = [part for i in range(processes) if (part := wanted[i::processes])]
    fetch = partial(fetch_part, network=network, output=plan.output)
    found = [
        result
        for _, result in run_jobs(
            fetch, parts, workers=len(parts), describe=lambda part: f"a probe of {len(part)} rows", isolate=True
        )
    ]
    for result in found:
        counts.update(result.counts)
    ok = counts.pop("ok", 0)
    low, high = wilson(ok / rows, rows)
    rate = sum(result.rate for result in found) * rows / max(len(wanted), 1)
    image_bytes = sum(result.image_bytes for result in found) / max(ok, 1)
    images = round(plan.rows * ok / rows)
    return ProbeResult(
        rows=rows,
        of=plan.rows,
        ok=ok,
        failed=dict(counts.most_common()),
        success=ok / rows,
        low=low,
        high=high,
        rows_per_second=rate,
        images_per_second=rate * ok / rows,
        image_bytes=image_bytes,
        body_bytes=sum(result.body_bytes for result in found) / max(sum(result.bodies for result in found), 1),
        images=images,
        disk_bytes=round(images * (image_bytes + RECORD_BYTES)),
        seconds=plan.rows / rate if rate else 0.0,
    )


def sample_rows(plan: DownloadPlan, count: int, seed: int) -> list[tuple[str | None, str | None, Hash]]:
    """URL, caption and hash of `count` wanted rows (of all, if there are no more), from row groups all over the tables.

    Every row is as likely as any other where all row groups are looked into; of more than MAX_ROW_GROUPS some are
    chosen by their size, which leaves rows of one group a little alike. Raises UserError for tables that can't be read.
    """
    random = np.random.default_rng(seed)
    groups: list[tuple[Path, Path | None, int, int]] = []
    sizes: list[int] = []  # wanted rows of each
    for table, mask in dict.fromkeys((shard.table, shard.mask) for shard in plan.shards):
        with open_parquet(table) as file:
            starts = row_group_starts(file).tolist()
        bits = None if mask is None else load_mask(mask)
        for start, stop in itertools.pairwise(starts):
            wanted = stop - start if bits is None else len(wanted_rows(bits, start, stop))
            if wanted:
                groups.append((table, mask, start, stop))
                sizes.append(wanted)
    if len(groups) > MAX_ROW_GROUPS:
        weights = np.array(sizes, np.float64)
        chosen = np.sort(random.choice(len(groups), MAX_ROW_GROUPS, replace=False, p=weights / weights.sum()))
        groups, sizes = [groups[i] for i in chosen], [sizes[i] for i in chosen]
    shares = random.multivariate_hypergeometric(np.array(sizes), min(count, sum(sizes)))
    columns = plan.output.columns
    found: list[tuple[str | None, str | None, Hash]] = []
    for (table, mask, start, stop), share in zip(groups, shares.tolist(), strict=True):
        if share:
            rows = np.arange(start, stop) if mask is None else wanted_rows(load_mask(mask), start, stop)
            numbers = np.sort(random.choice(rows, share, replace=False))
            with RowReader(table, columns.read) as reader:
                aligned = columns.align(reader.pick(numbers), table)
                hashes = [None] * share if aligned.hashes is None else aligned.hashes.to_pylist()
                found += zip(aligned.urls.to_pylist(), aligned.captions.to_pylist(), hashes, strict=True)
    return found


class PartResult(NamedTuple):
    """What one process saw; `rate` is in rows a second."""

    counts: Counter[str]
    image_bytes: int
    body_bytes: int
    bodies: int
    rate: float


def fetch_part(rows: Sequence[tuple[str, Hash]], network: FetchSettings, output: Output) -> PartResult:
    """Fetch rows and make pictures of them, as a download does, and keep only the counts; in a worker."""
    from clipkit.tfrecord_tools.download.worker import fetch_loop, picture_maker

    make = picture_maker(output.pictures)
    kind = output.columns.hash_kind if output.drop_changed else None
    counts: Counter[str] = Counter()
    sizes: list[tuple[int, int]] = []
    ends: list[float] = []

    def handle(outcome: FetchOutcome) -> None:
        reason = outcome.reason
        if outcome.body is not None:
            try:
                stored = len(make(outcome.body).jpg)
            except PictureError as error:
                reason, stored = error.reason, 0
            else:
                if kind is not None and check_hash(outcome.body, rows[outcome.index][1], kind) in CHANGED:
                    reason, stored = reasons.HASH_CHANGED, 0
            sizes.append((stored, len(outcome.body)))
        counts[reason or "ok"] += 1
        ends.append(time.monotonic())

    loop = fetch_loop(network)
    began = time.monotonic()
    loop.fetch(enumerate(url for url, _ in rows), handle).result()
    most = math.ceil(RATE_SHARE * len(ends))
    rate = most / max(sorted(ends)[most - 1] - began, 1e-9)
    image_bytes, body_bytes = sum(stored for stored, _ in sizes), sum(fetched for _, fetched in sizes)
    return PartResult(counts, image_bytes, body_bytes, len(sizes), rate)
