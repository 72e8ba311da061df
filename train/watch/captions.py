"""Looks at a run's first captions, and says so when there is nothing in them to learn from.

Pairs of one caption aren't each other's negatives, so a column of equal captions trains to a loss of zero at once.
"""

import numpy as np

from clipkit.formatting import share
from clipkit.train.loader.loader import Batch
from clipkit.train.sources.source import Pair, Source

ENOUGH, MOST = 16, 100_000  # captions to judge by
MUCH = 0.5  # this share of them is worth a word
SHOWN = 60
REMEDY = "is that the right column?"


class FirstCaptions:
    """The captions up to the first log line, each record's once."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.caption_of: dict[int, int] = {}
        self.wordless: set[int] = set()
        self.done = False

    def take(self, batch: Batch) -> None:
        """Take note of a batch's captions."""
        if self.done or len(self.caption_of) >= MOST:
            return
        records = batch.records_B.tolist()
        self.caption_of.update(zip(records, batch.caption_B.tolist(), strict=True))
        self.wordless.update(records[place] for place in batch.wordless)

    def report(self) -> tuple[float, list[str]] | None:
        """The share of captions that another record has too, and what is wrong with them; None when that was said, or
        when too few have been seen.
        """
        seen = len(self.caption_of)
        if self.done or seen < min(ENOUGH, self.source.num_records):
            return None
        self.done = True
        records = list(self.caption_of)
        captions = np.array(list(self.caption_of.values()), np.int64)
        _, place_N, count_N = np.unique(captions, return_inverse=True, return_counts=True)
        equal = float((count_N[place_N] > 1).mean())
        warnings = []
        if self.source.num_records == 1:
            warnings.append("the data have one record: there is no other to tell it from")
        elif (most := count_N.max()) >= MUCH * seen:
            warnings.append(self.warning(int(most), "are the same", records[int(np.argmax(count_N[place_N]))]))
        if len(self.wordless) >= MUCH * seen:
            warnings.append(self.warning(len(self.wordless), "have no letter or digit", min(self.wordless)))
        return equal, warnings

    def warning(self, count: int, what: str, record: int) -> str:
        """A line on what is wrong with so many captions, of which the record has one."""
        seen = len(self.caption_of)
        much = "all" if count == seen else share(count / seen) + " of the"
        return f"{much} {seen:,} captions seen so far {what} ({self.caption(record)!r}): {REMEDY}"

    def caption(self, record: int) -> str:
        """A record's caption, short enough for a line."""
        pair = next(iter(self.source.pairs([record])))
        if not isinstance(pair, Pair):
            return ""
        text = " ".join(pair.caption.split() if isinstance(pair.caption, str) else pair.caption)
        return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
