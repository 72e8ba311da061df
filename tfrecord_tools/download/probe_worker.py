"""Which rows a probe takes, and what a worker does with them."""

import itertools
import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from clipkit.formats.tables import RowReader, open_parquet, row_group_starts
from clipkit.tfrecord_tools.download.plan import Plan, load_mask, wanted_rows
from clipkit.tfrecord_tools.download.worker import fetch_loop, picture_maker
from clipkit.tfrecord_tools.pictures.picture import PictureError, PictureSettings
from clipkit.tfrecord_tools.web.settings import Fetched, FetchSettings

# A row group must be unpacked to find rows in it, and those of published tables hold a million: so many are opened.
MAX_ROW_GROUPS = 64
# The last rows are the slow ones, and a download overlaps them with the next: the rate is taken before they begin.
RATE_SHARE = 0.8


@dataclass(frozen=True)
class RowGroup:
    """A row group of a table: its rows from `start` to `stop`, of which `wanted` are wanted."""

    table: Path
    mask: Path | None
    start: int
    stop: int
    wanted: int

    def rows(self) -> npt.NDArray[np.int64]:
        """int64[wanted]: the numbers of the wanted rows in the table."""
        if self.mask is None:
            return np.arange(self.start, self.stop)
        return wanted_rows(load_mask(self.mask), self.start, self.stop)


def row_groups(plan: Plan) -> Iterator[RowGroup]:
    """The row groups of all tables that have wanted rows."""
    for table, mask in dict.fromkeys((shard.table, shard.mask) for shard in plan.shards):
        with open_parquet(table) as file:
            starts = row_group_starts(file).tolist()
        bits = None if mask is None else load_mask(mask)
        for start, stop in itertools.pairwise(starts):
            wanted = stop - start if bits is None else len(wanted_rows(bits, start, stop))
            if wanted:
                yield RowGroup(table, mask, start, stop, wanted)


def sample_rows(plan: Plan, count: int, seed: int) -> pa.Table:
    """`url` and `caption` of `count` wanted rows (of all, if there are no more), from row groups all over the tables.

    Every row is as likely as any other where all row groups are looked into; of more than MAX_ROW_GROUPS some are
    chosen by their size, which leaves rows of one group a little alike. Raises UserError for tables that can't be read.
    """
    random = np.random.default_rng(seed)
    groups = list(row_groups(plan))
    if len(groups) > MAX_ROW_GROUPS:
        sizes = np.array([group.wanted for group in groups], np.float64)
        chosen = np.sort(random.choice(len(groups), MAX_ROW_GROUPS, replace=False, p=sizes / sizes.sum()))
        groups = [groups[i] for i in chosen]
    wanted = np.array([group.wanted for group in groups])
    shares = random.multivariate_hypergeometric(wanted, min(count, int(wanted.sum())))
    columns, tables = plan.output.columns, []
    for group, share in zip(groups, shares.tolist(), strict=True):
        if share:
            numbers = np.sort(random.choice(group.rows(), share, replace=False))
            with RowReader(group.table, columns.read) as reader:
                tables.append(columns.align(reader.pick(numbers)).select(["url", "caption"]))
    return pa.concat_tables(tables)


@dataclass(frozen=True)
class ProbePart:
    """The rows that one process fetches."""

    urls: tuple[str, ...]
    network: FetchSettings
    pictures: PictureSettings


@dataclass(frozen=True)
class PartResult:
    """What one process saw; `rate` is in rows a second."""

    counts: Counter[str]
    image_bytes: int
    body_bytes: int
    bodies: int
    rate: float


def name_part(part: ProbePart) -> str:
    """What an error says it was working on."""
    return f"a probe of {len(part.urls)} rows"


def fetch_part(part: ProbePart) -> PartResult:
    """Fetch rows and make pictures of them, as a download does, and keep nothing but the counts."""
    make = picture_maker(part.pictures)
    counts: Counter[str] = Counter()
    sizes: list[tuple[int, int]] = []
    ends: list[float] = []

    def handle(fetched: Fetched) -> None:
        reason = fetched.reason
        if fetched.body is not None:
            try:
                stored = len(make(fetched.body).jpg)
            except PictureError as error:
                reason, stored = error.reason, 0
            sizes.append((stored, len(fetched.body)))
        counts[reason or "ok"] += 1
        ends.append(time.monotonic())

    loop = fetch_loop(part.network)
    began = time.monotonic()
    loop.fetch(enumerate(part.urls), handle).result()
    most = math.ceil(RATE_SHARE * len(ends))
    rate = most / max(sorted(ends)[most - 1] - began, 1e-9)
    stored, fetched = (sum(each) for each in zip(*sizes, strict=True)) if sizes else (0, 0)
    return PartResult(counts, stored, fetched, len(sizes), rate)
