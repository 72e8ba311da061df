"""Training straight from webdataset tars, as img2dataset leaves them, with any sample at any time.

The tars are gone through once for the places of their members (`index`). Of a sample its image and caption
are then read in one piece, for they stand side by side.
"""

import json
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from clipkit.errors import UserError
from clipkit.formats.captions import captions_of, merge_captions
from clipkit.formats.dataset import ShardedRecords
from clipkit.formats.records import RecordError
from clipkit.formats.tar import index_tar
from clipkit.pixels.images import ImageError
from clipkit.storage.cache import BlockCache
from clipkit.storage.files import is_remote
from clipkit.storage.ranges import RangeReader
from clipkit.storage.stores import StoredFile
from clipkit.train.sources.index import FolderIndex, open_index
from clipkit.train.sources.source import Pair, Source

# Enough for the headers and small members between two images.
_LOCAL_AHEAD = 8 << 10
_REMOTE_AHEAD = 8 << 20


class TarSource(ShardedRecords, Source):
    """The samples of a folder's tars, in the order of the tars' names. Made by `open_tars`."""

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
        self._open(self.folder, self.shards, self.index.counts)
        self._rows = self.index.rows()

    def __repr__(self) -> str:
        return f"<TarSource {self.folder}: {self.num_records} samples in {len(self.shards)} tars>"

    def pairs(self, records: Sequence[int]) -> Iterator[Pair | UserError]:
        for record in records:
            yield self._pair(record)

    def _range(self, shard: int, first: int, last: int) -> tuple[int, int]:
        start, end = self._ends[shard] - self.index.counts[shard], self._ends[shard]
        stop = int(self._rows[start + last]["start"]) if start + last < end else self.shards[shard].bytes
        return int(self._rows[start + first]["start"]), stop

    def _pair(self, record: int) -> Pair | UserError:
        start, image, image_bytes, text, text_bytes, meta, meta_bytes = self._rows[record].item()
        if not image_bytes:
            return ImageError("the sample has no image")
        members = [(image, image_bytes), (text, text_bytes)]
        if not text:
            members[1] = (meta, meta_bytes)
        begin = min(place for place, _ in members if place)
        end = max(place + size for place, size in members)
        shard = self.locate(record)[0]
        data = self._read(record, shard, start + begin, start + end)
        if len(data) < end - begin:
            return RecordError(self._files.path(shard), start, "the file ends inside a record")
        stored = data[text - begin : text - begin + text_bytes] if text else b""
        written = stored.removeprefix(BOM_UTF8).decode("utf-8", "replace")
        caption: str | list[str] = written
        # img2dataset writes "nan" where the metadata's caption is null, and Python's repr of a list of captions.
        if meta_bytes and (not text or stored == b"nan" or stored[:1] in (b"[", b"{")):
            metadata = self._read(record, shard, start + meta, start + meta + meta_bytes)
            caption = _captions(written if text else None, metadata, self.key(record))
        return Pair(memoryview(data)[image - begin : image - begin + image_bytes], caption)

    def _read(self, record: int, shard: int, start: int, end: int) -> bytes:
        if self._blocks is None:
            return self._files.read(shard, start, end)
        return self._blocks.read(shard, self._block(record), start, end)


def _captions(text: str | None, metadata: bytes, key: str) -> str | list[str]:
    """The captions of a sample with metadata. Raises UserError for a struct."""
    try:
        columns = json.loads(metadata)
    except (ValueError, RecursionError):
        columns = None
    if not isinstance(columns, dict):
        return text or ""
    found = captions_of(merge_captions(text, columns), key)
    return found if len(found) > 1 else "".join(found)


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
