"""What one worker is given at a time: a batch of neighbouring shards.

The last rows of a shard are the slow ones, up to a URL's whole deadline. So a worker has several shards under way:
while the last answers to one are awaited, the next are being fetched with the connections that it leaves idle. The
event loop with its connections and its DNS cache lives as long as the process, through many batches.
"""

import asyncio
import gc
import threading
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import ExitStack
from functools import cache, partial

import pyarrow as pa

from clipkit.formats.tables import RowReader
from clipkit.tfrecord_tools.account.shard_state import DownloadState, finished_state, recover
from clipkit.tfrecord_tools.download.plan import DownloadJob, DownloadShard, JobSettings, load_mask, wanted_rows
from clipkit.tfrecord_tools.download.progress import LiveCounts
from clipkit.tfrecord_tools.download.shard import OpenShard
from clipkit.tfrecord_tools.pictures.picture import PictureMaker, PictureSettings
from clipkit.tfrecord_tools.pictures.resizer import hidden
from clipkit.tfrecord_tools.tables.url_table import TableColumns, WantedRows
from clipkit.tfrecord_tools.web.calls import Handle
from clipkit.tfrecord_tools.web.fetcher import Fetcher
from clipkit.tfrecord_tools.web.settings import FetchOutcome, FetchSettings

# Each holds its rows in memory and its images on the disk.
SHARDS_UNDER_WAY = 4


def fetch_batch(batch: tuple[DownloadJob, ...], settings: JobSettings) -> Counter[str]:
    """Fetch the shards of a batch and publish each; the counts of all their rows, images under `ok`.

    A shard that is there already is left as it is, so that a batch may be given to another worker at any moment.
    Raises UserError when the disk refuses or a table is gone.
    """
    total: Counter[str] = Counter()
    counts = LiveCounts(settings.counters)
    loop = fetch_loop(settings.network)
    make = picture_maker(settings.output.pictures)
    tune_process()

    def handle(shard: OpenShard, outcome: FetchOutcome) -> None:
        """In a thread of the fetcher."""
        shard.take(outcome, make)
        counts.add(outcome.reason, loop.fetcher.exchange.bytes_in, loop.fetcher.concurrency.limit)

    def publish_finished() -> None:
        """Wait until a shard has all its answers, and write its files."""
        done, _ = wait(under_way, return_when=FIRST_COMPLETED)
        for future in done:
            shard = under_way.pop(future)
            future.result()
            total.update(shard.publish().row_counts)

    under_way: dict[Future[None], OpenShard] = {}
    try:
        with ShardReader(settings.output.columns) as reader:
            for job in batch:
                state = state_of_done(settings, job)
                if state is not None:
                    total.update(state.row_counts)
                    continue
                while len(under_way) >= SHARDS_UNDER_WAY:
                    publish_finished()
                shard = OpenShard(settings, job, *reader.read(job.shard))
                if job.retry is None:
                    counts.add_refused(outcome.reason for outcome in shard.outcomes if outcome is not None)
                rows = [(i, url) for i in shard.missing if (url := shard.urls[i]) is not None]
                under_way[loop.fetch(rows, partial(handle, shard))] = shard
        while under_way:
            publish_finished()
    finally:
        for future in under_way:
            future.cancel()
    return total


def state_of_done(settings: JobSettings, job: DownloadJob) -> DownloadState | None:
    """The state of a shard on which nothing is left to do."""
    if job.retry is not None:
        recover(settings.layout, job.shard.number)
    state = finished_state(settings.layout.files(job.shard.number))
    if state is None or job.retry is None:
        return state
    done = state.round >= settings.round if job.retry else not state.is_narrower(settings.kinds)
    return state if done else None


class ShardReader(ExitStack):
    """The rows of shards in rising order, each table opened once. Use it as a context manager."""

    def __init__(self, columns: TableColumns) -> None:
        super().__init__()
        self.columns = columns
        self.shard: DownloadShard | None = None

    def read(self, shard: DownloadShard) -> tuple[WantedRows, list[int]]:
        """The wanted rows of a shard, as `TableColumns.align` has them, and their numbers in the table.

        Raises UserError.
        """
        if self.shard is None or self.shard.table != shard.table:
            self.close()
            self.reader = self.enter_context(RowReader(shard.table, self.columns.read))
            self.bits = None if shard.mask is None else load_mask(shard.mask)
        self.shard = shard
        if self.bits is None:
            numbers, rows = list(range(shard.start, shard.stop)), self.reader.read(shard.start, shard.stop)
        else:
            wanted = wanted_rows(self.bits, shard.start, shard.stop)
            numbers, rows = wanted.tolist(), self.reader.pick(wanted)
        return self.columns.align(rows, shard.table), numbers


# ---------------------------------------------------------------------------------------------------------------------
# What lives as long as the process
# ---------------------------------------------------------------------------------------------------------------------


class FetchLoop:
    """A Fetcher in a thread of its own, for as long as the process lives: get it by `fetch_loop`."""

    def __init__(self, settings: FetchSettings) -> None:
        """Raises UserError for invalid settings."""
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, name="fetch", daemon=True).start()
        self.fetcher = Fetcher(settings)
        asyncio.run_coroutine_threadsafe(self.fetcher.__aenter__(), self.loop).result()

    def fetch(self, rows: Iterable[tuple[int, str]], handle: Handle) -> Future[None]:
        """`Fetcher.fetch_many` as a future; several may be under way."""
        return asyncio.run_coroutine_threadsafe(self.fetcher.fetch_many(rows, handle), self.loop)


fetch_loop = cache(FetchLoop)


@cache
def tune_process() -> None:
    """Ready the process for many small objects, once all is imported.

    What is imported need not be looked through for garbage again and again: that is a tenth of the time. And Arrow's
    own pool would keep much of what large row groups took for a moment.
    """
    gc.collect()
    gc.freeze()
    pa.set_memory_pool(pa.system_memory_pool())


@cache
def picture_maker(settings: PictureSettings) -> PictureMaker:
    """The process's maker of pictures: img2dataset takes a while to import.

    So does pandas, which pyarrow imports, where it finds it, for the first array that it is asked for: it must not.
    """
    with hidden("pandas"):
        pa.array([""])
    return PictureMaker(settings)
