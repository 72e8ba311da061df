"""Reading ahead: the blocks that the order wants next are got while earlier ones are used.

The trainer's process asks for the order of coming samples, and from this it is known, a whole window of the order
ahead, which blocks will be wanted. A few threads get them into the cache that the workers read from. What fails here is
left to the worker that really needs it, and fails or is told there.
"""

import queue
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from clipkit.counter_rng import UInt64Array
from clipkit.storage.cache import BlockCache
from clipkit.storage.ranges import Reopenable
from clipkit.train.order import WINDOW_BLOCKS, Int64Array
from clipkit.train.sources.source import AroundSource, Source

THREADS = 16
END_SECONDS = 1.0
_REMEMBERED = 8 * WINDOW_BLOCKS
# More than this is not asked for: then it is the network that is too slow, and the oldest wishes come first.
_MOST_WAITING = 2 * WINDOW_BLOCKS

Fill = Callable[[int], int]


class Cached(Protocol):
    """What reads through a cache, or would. `fill` is as in AheadSource."""

    @property
    def cache(self) -> BlockCache | None: ...

    def fill(self, record: int, /) -> int: ...


def read_ahead(source: Source, cached: Cached, block_records: int) -> Source:
    """The source, with reading ahead where `cached`, which it reads from, has a cache."""
    return source if cached.cache is None else AheadSource(source, cached.fill, block_records)


class AheadSource(Reopenable, AroundSource):
    """A source with reading ahead, `block_records` neighbours at a time.

    `fill` gets a record near, with what is got together with it, and returns the first record behind that.
    """

    def __init__(self, source: Source, fill: Fill, block_records: int) -> None:
        super().__init__(source)
        self.fill, self.block_records = fill, block_records
        self._start()

    def _start(self) -> None:
        self._wishes: queue.Queue[int] = queue.Queue(_MOST_WAITING)
        self._asked: OrderedDict[int, None] = OrderedDict()
        self._threads: list[threading.Thread] = []

    def records_at(self, positions_B: UInt64Array, seed: int, block_size: int) -> Int64Array:
        """The order, unchanged; the records a window later are wished for too."""
        records_B = super().records_at(positions_B, seed, block_size)
        later_B = np.asarray(positions_B).astype(np.uint64) + np.uint64(WINDOW_BLOCKS * block_size)
        for wanted_B in (records_B, self.source.records_at(later_B, seed, block_size)):
            blocks_B, firsts_B = np.unique(wanted_B // self.block_records, return_index=True)
            self._wish(blocks_B[np.argsort(firsts_B)].tolist())
        return records_B

    def _wish(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            if block in self._asked:
                continue
            try:
                self._wishes.put_nowait(block)
            except queue.Full:
                return
            self._asked[block] = None
            if len(self._asked) > _REMEMBERED:
                self._asked.popitem(last=False)
        if not self._threads:
            self._threads = [
                threading.Thread(
                    target=_work, args=(self._wishes, self.fill, self.block_records, self.num_records), daemon=True
                )
                for _ in range(THREADS)
            ]
            for thread in self._threads:
                thread.start()
            # The threads hold the queue and not this object, so they can be told when it is gone. At the process's end
            # that comes before the cache is removed, which was there first: whoever still wrote would make it again.
            weakref.finalize(self, _end, self._wishes, self._threads)


def _end(wishes: "queue.Queue[int]", threads: Sequence[threading.Thread]) -> None:
    """Have the threads end after the block at hand, and wait for those that don't hang in the network."""
    with wishes.mutex:
        wishes.queue.clear()
    for _ in threads:
        wishes.put_nowait(-1)
    deadline = time.monotonic() + END_SECONDS
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(max(0.0, deadline - time.monotonic()))


def _work(wishes: "queue.Queue[int]", fill: Fill, block_records: int, num_records: int) -> None:
    while (block := wishes.get()) >= 0:
        record, end = block * block_records, min((block + 1) * block_records, num_records)
        try:
            while record < end:
                record = fill(record)
        except Exception:
            continue
