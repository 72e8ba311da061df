"""Training straight from webdataset tars, as img2dataset leaves them, with any sample at any time.

The tars are gone through once for the places of their members (`train.source_index`). Of a sample its image and caption
are then read in one piece, for they stand side by side.
"""

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from clipkit.errors import UserError
from clipkit.formats.records import RecordError
from clipkit.formats.tar import index_tar
from clipkit.pixels.images import ImageError
from clipkit.storage.cache import BlockCache, CachedRanges
from clipkit.storage.files import is_remote
from clipkit.storage.ranges import RangeReader
from clipkit.storage.stores import StoredFile
from clipkit.train.sources.index import FolderIndex, open_index
from clipkit.train.sources.source import Pair, Source

# Enough for the headers and small members between two images.
_LOCAL_AHEAD = 8 << 10
_REMOTE_AHEAD = 8 << 20


class TarSource(Source):
    """The samples of a folder's tars, in the order of the tars' names. Made by `open_tars`.

    With a `cache`, `block_records` neighbours are got at once and kept in it.
    """

    def __init__(
        self,
        folder: Path,
        shards: Sequence[StoredFile],
        index: FolderIndex,
        cache: BlockCache | None = None,
        block_records: int = 64,
    ) -> None:
        self.folder, self.shards, self.index = folder, tuple(shards), index
        self.cache, self.block_records = cache, block_records
        self._start()

    def _start(self) -> None:
        self._ends = list(accumulate(self.index.counts))
        self._rows = self.index.rows()
        self._files = RangeReader(self.folder, self.shards)
        self._blocks = CachedRanges(self._files, self.cache) if self.cache else None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def __repr__(self) -> str:
        return f"<TarSource {self.folder}: {self.num_records} samples in {len(self.shards)} tars>"

    @property
    def num_records(self) -> int:
        return self._ends[-1] if self._ends else 0

    def key(self, record: int) -> str:
        shard, number = self._locate(record)
        return f"{self.shards[shard].name}:{number}"

    def pairs(self, records: Sequence[int]) -> Iterator[Pair | UserError]:
        for record in records:
            yield self._pair(record)

    def fill(self, record: int) -> int:
        """Get the block of a record into the cache, where there is one; returns the first record behind the block."""
        shard, _ = self._locate(record)
        if self._blocks is not None:
            self._blocks.fill(shard, self._block(record))
        return min((record // self.block_records + 1) * self.block_records, self._ends[shard])

    def _locate(self, record: int) -> tuple[int, int]:
        if not 0 <= record < self.num_records:
            raise IndexError(f"record {record} of {self.num_records}")
        shard = bisect_right(self._ends, record)
        return shard, record - (self._ends[shard - 1] if shard else 0)

    def _block(self, record: int) -> tuple[int, int]:
        """The bytes of the samples that are got together with this one, in its tar."""
        shard, number = self._locate(record)
        offset = record - number
        begin = record // self.block_records * self.block_records
        end = min(begin + self.block_records, self._ends[shard])
        begin = max(begin, offset)
        stop = int(self._rows[end]["start"]) if end < self._ends[shard] else self.shards[shard].bytes
        return int(self._rows[begin]["start"]), stop

    def _pair(self, record: int) -> Pair | UserError:
        start, image, image_bytes, text, text_bytes, meta, meta_bytes = self._rows[record].item()
        if not image_bytes:
            return ImageError("the sample has no image")
        members = [(image, image_bytes), (text, text_bytes)]
        if not text:
            members[1] = (meta, meta_bytes)
        begin = min(place for place, _ in members if place)
        end = max(place + size for place, size in members)
        shard = self._locate(record)[0]
        data = self._read(record, shard, start + begin, start + end)
        if len(data) < end - begin:
            return RecordError(self._files.path(shard), start, "the file ends inside a record")
        caption = data[text - begin : text - begin + text_bytes] if text else b""
        if not text or caption == b"nan":  # img2dataset writes that where the metadata's caption is null
            caption = self._caption(record, shard, start + meta, meta_bytes, caption)
        return Pair(memoryview(data)[image - begin : image - begin + image_bytes], caption.decode("utf-8", "replace"))

    def _caption(self, record: int, shard: int, start: int, size: int, otherwise: bytes) -> bytes:
        """The caption that a sample's metadata give."""
        try:
            caption = json.loads(self._read(record, shard, start, start + size)).get("caption", "")
        except (ValueError, AttributeError):
            return otherwise
        return otherwise if caption == "" else b"" if caption is None or caption != caption else str(caption).encode()

    def _read(self, record: int, shard: int, start: int, end: int) -> bytes:
        if self._blocks is None:
            return self._files.read(shard, start, end)
        return self._blocks.read(shard, self._block(record), start, end)


def open_tars(
    folder: Path,
    shards: Sequence[StoredFile],
    cache: BlockCache | None = None,
    block_records: int = 64,
    stem: str = "tars",
) -> TarSource:
    """Open a folder's tars; on first use they are indexed, which reads local ones' headers, remote ones whole.

    `stem` names the index: other sets of the folder's tars have other ones.
    Raises UserError for a tar that is damaged or gone.
    """
    index = open_index(folder, shards, stem, index_shard)
    return TarSource(folder, shards, index, cache, block_records)


def index_shard(folder: Path, shard: StoredFile) -> np.ndarray:
    """The rows of one tar (`clipkit.formats.tar.INDEX_DTYPE`)."""
    reader = RangeReader(folder, [shard])
    ahead = _REMOTE_AHEAD if is_remote(folder) else _LOCAL_AHEAD
    chunk, base = b"", 0

    def read(offset: int, length: int) -> bytes:
        nonlocal chunk, base
        if not base <= offset <= offset + length <= base + len(chunk):
            end = min(shard.bytes, offset + max(length, ahead))
            base, chunk = offset, reader.read(0, offset, end) if offset < end else b""
        return chunk[offset - base : offset - base + length]

    return index_tar(read, folder / shard.name, shard.bytes)
