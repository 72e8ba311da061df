"""What a download is going to be like: some rows from all over the table, fetched and thrown away."""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from clipkit.formatting import duration, size_text
from clipkit.intervals import wilson
from clipkit.jobs.run import run_jobs
from clipkit.tfrecord_tools import reasons
from clipkit.tfrecord_tools.download.plan import Plan
from clipkit.tfrecord_tools.reasons import ADVICE, EMPTY_CAPTION
from clipkit.tfrecord_tools.sample import caption_problem
from clipkit.tfrecord_tools.web.settings import FetchSettings

SEED = 0
LOWER = {
    reasons.HTTP_4XX: "; lower --probe-floor to take what is left",
    reasons.DISALLOWED: "; lower --probe-floor to go on",
}
RECORD_BYTES = 1_000  # of a record beside its image: caption, columns, its row in the ledger


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


def probe(plan: Plan, count: int, network: FetchSettings, processes: int) -> ProbeResult:
    """Fetch `count` of the wanted rows from all over the tables, the same each time, and say what the whole will be.

    Works with as many processes and connections as the download will. Raises UserError for tables that can't be read.
    """
    from clipkit.tfrecord_tools.download.probe_worker import ProbePart, fetch_part, name_part, sample_rows

    sample = sample_rows(plan, count, SEED)
    urls = sample["url"].to_pylist()
    counts: Counter[str] = Counter()
    wanted = []
    for url, caption in zip(urls, sample["caption"].to_pylist(), strict=True):
        if plan.output.format == "tfds" and caption_problem(caption) is not None:
            counts[EMPTY_CAPTION] += 1
        elif url is None:
            counts[reasons.BAD_URL] += 1
        else:
            wanted.append(url)
    parts = [ProbePart(tuple(wanted[i::processes]), network, plan.output.pictures) for i in range(processes)]
    parts = [part for part in parts if part.urls]
    found = [result for _, result in run_jobs(fetch_part, parts, workers=len(parts), describe=name_part, isolate=True)]
    for result in found:
        counts.update(result.counts)
    ok = counts.pop("ok", 0)
    low, high = wilson(ok / len(urls), len(urls))
    rate = sum(result.rate for result in found) * len(urls) / max(len(wanted), 1)
    image_bytes = sum(result.image_bytes for result in found) / max(ok, 1)
    images = round(plan.rows * ok / len(urls))
    return ProbeResult(
        rows=len(urls),
        of=plan.rows,
        ok=ok,
        failed=dict(counts.most_common()),
        success=ok / len(urls),
        low=low,
        high=high,
        rows_per_second=rate,
        images_per_second=rate * ok / len(urls),
        image_bytes=image_bytes,
        body_bytes=sum(result.body_bytes for result in found) / max(sum(result.bodies for result in found), 1),
        images=images,
        disk_bytes=round(images * (image_bytes + RECORD_BYTES)),
        seconds=plan.rows / rate if rate else 0.0,
    )
