"""Training straight from parquet files that hold the images, as img2dataset or Hugging Face leave them.

Parquet gives a row only with the others of its row group, so a group is decoded once, laid down in parts that any
worker reads from (`clipkit.storage.cache`), and left there while the order goes on among the same blocks. Groups of
more than some hundred rows make the order wait for rows that it doesn't want yet: `clipkit build-tfds` helps.
"""

import io
import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipkit.errors import UserError
from clipkit.formats.captions import REPEATED, captions_of, merge_captions
from clipkit.formats.tables import USUAL, find_image_column, unreadable
from clipkit.pixels.images import ImageError
from clipkit.storage.cache import BlockCache
from clipkit.storage.ranges import RangeReader, Reopenable
from clipkit.storage.stores import StoredFile
from clipkit.train.sources.index import FolderIndex, open_index
from clipkit.train.sources.source import Pair, Source

PART_ROWS = 64
_BUFFER_BYTES = 1 << 20
_KEPT_FOOTERS = 16
_SEVERAL = b"\xff"
_PLACES = struct.Struct("<QQQ")
ROW_GROUPS = np.dtype([("group", "<u4"), ("rows", "<u4")])


class ParquetSource(Reopenable, Source):
    """The rows of a folder's parquet files, in the order of the files' names. Made by `open_parquets`."""

    packed = "parquet of captions"
    """What is laid down in the cache: the beginning of its names there."""

    def __init__(self, folder: Path, shards: Sequence[StoredFile], index: FolderIndex, cache: BlockCache) -> None:
        self.folder, self.shards, self.index, self.cache = folder, tuple(shards), index, cache
        self._start()

    def _start(self) -> None:
        rows = self.index.rows()
        self._groups = np.asarray(rows["group"])
        self._files_of = np.repeat(np.arange(len(self.shards)), self.index.counts)
        self._ends = np.cumsum(rows["rows"], dtype=np.int64)
        self.largest_group = int(rows["rows"].max(initial=1))
        self._reader = RangeReader(self.folder, self.shards)
        self._footer = lru_cache(_KEPT_FOOTERS)(partial(read_footer, self._reader))

    def __repr__(self) -> str:
        return f"<ParquetSource {self.folder}: {self.num_records} rows in {len(self.shards)} files>"

    @property
    def num_records(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def key(self, record: int) -> str:
        place, _ = self._locate(record)
        file = int(self._files_of[place])
        first = np.searchsorted(self._files_of, file)
        start = int(self._ends[first - 1]) if first else 0
        return f"{self.shards[file].name}:{record - start}"

    def block(self, record: int, block_size: int) -> range:
        """Records of other row groups: where one row can't be read, none of its group can."""
        step = self.largest_group
        return range(record % step, self.num_records, step)

    def pairs(self, records: Sequence[int]) -> Iterator[Pair | UserError]:
        for record in records:
            try:
                yield self._pair(record)
            except _DamagedError as error:
                yield ImageError(str(error))

    def columns(self, schema: pa.Schema, path: Path) -> tuple[str, ...]:
        """What `pack` needs of a file."""
        return pair_columns(schema, path)

    def pack(self, batch: pa.RecordBatch, columns: Sequence[str]) -> bytes:
        """The rows of a batch as bytes, as `_pair` reads them."""
        images, captions, *repeated = (batch.column(batch.schema.names.index(name)) for name in columns)
        if pa.types.is_struct(images.type):
            images = images.field(images.type.get_field_index("bytes"))
        elif pa.types.is_fixed_size_list(images.type):
            images = vector_bytes(images)
        texts = captions.to_pylist()
        for lists in repeated:
            texts = [
                merge_captions(text, {REPEATED: each}) for text, each in zip(texts, lists.to_pylist(), strict=True)
            ]
        return join_rows((data.as_py() or b"" for data in images), texts)

    def fill(self, record: int) -> int:
        """Get the part of the row group that holds a record into the cache; returns the first record behind it."""
        place, row = self._locate(record)
        part = row // PART_ROWS
        self.cache.ensure(self._key(place, part), lambda: self._decode(place, part), self._key(place, -1))
        return min(record - row + (part + 1) * PART_ROWS, int(self._ends[place]))

    def _locate(self, record: int) -> tuple[int, int]:
        """The place of the row group in the index, and the row in it."""
        if not 0 <= record < self.num_records:
            raise IndexError(f"record {record} of {self.num_records}")
        place = int(np.searchsorted(self._ends, record, side="right"))
        return place, record - (int(self._ends[place - 1]) if place else 0)

    def _pair(self, record: int) -> Pair | UserError:
        place, row = self._locate(record)
        part, number = divmod(row, PART_ROWS)
        key, lock = self._key(place, part), self._key(place, -1)

        def read(start: int, length: int) -> bytes:
            return self.cache.read(key, lambda: self._decode(place, part), start, length, lock)

        places = read(number * 16, _PLACES.size)
        start, middle, end = _PLACES.unpack(places)
        data = read(start, end - start)
        if len(data) < end - start:
            self.cache.drop(key)
            return ImageError("the decoded row is cut off")
        if middle == start:
            return ImageError("the row has no image")
        return self.pair(memoryview(data)[: middle - start], unpack_captions(data[middle - start :]))

    def pair(self, image: memoryview, caption: str | list[str]) -> Pair:
        """The pair of a row's image and caption."""
        return Pair(image, caption)

    def _key(self, place: int, part: int) -> str:
        file = int(self._files_of[place])
        shard = self.shards[file]
        path = self._reader.path(file)
        return f"{self.packed} {path} {shard.bytes} {shard.version} {self._groups[place]} {part}"

    def _decode(self, place: int, wanted: int) -> bytes:
        """One part of a row group; the others are put into the cache on the way."""
        file = int(self._files_of[place])
        found: bytes | None = None
        path = self._reader.path(file)
        with _Ranges(self._reader, file) as ranges:
            try:
                with pq.ParquetFile(
                    ranges, metadata=self._footer(file), pre_buffer=False, buffer_size=_BUFFER_BYTES
                ) as table:
                    columns = self.columns(table.schema_arrow, path)
                    batches = table.iter_batches(
                        PART_ROWS, row_groups=[int(self._groups[place])], columns=list(dict.fromkeys(columns))
                    )
                    for part, batch in enumerate(batches):
                        data = self.pack(batch, columns)
                        if part == wanted:
                            found = data
                        else:
                            self.cache.put(self._key(place, part), data)
            except UserError:
                raise
            except (pa.ArrowException, OSError, EOFError) as error:
                if ranges.failed is not None:
                    raise ranges.failed from error
                reason = " ".join(str(error).split())
                raise _DamagedError(f"row group {self._groups[place]} of {path} can't be decoded ({reason})") from error
        if found is None:
            raise _DamagedError(f"row group {self._groups[place]} of {path} has fewer rows than its file says")
        return found


class _DamagedError(Exception):
    """A row group that can't be decoded."""


class _Ranges(io.RawIOBase):
    """A file for pyarrow, read through a RangeReader. What that raised is kept: pyarrow would change it."""

    def __init__(self, reader: RangeReader, number: int) -> None:
        self.reader, self.number = reader, number
        self.bytes, self.place = reader.files[number].bytes, 0
        self.failed: UserError | None = None

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.place = offset + (0, self.place, self.bytes)[whence]
        return self.place

    def tell(self) -> int:
        return self.place

    def read(self, size: int = -1) -> bytes:
        end = self.bytes if size < 0 else min(self.place + size, self.bytes)
        try:
            data = self.reader.read(self.number, self.place, end) if end > self.place else b""
        except UserError as error:
            self.failed = error
            raise
        self.place += len(data)
        return data

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def pair_columns(schema: pa.Schema, path: Path) -> tuple[str, ...]:
    """Image and caption, and where img2dataset has written a list of captions as text, the list."""
    image, caption = USUAL.require_image(schema, path), USUAL.require_caption(schema, path)
    lists = caption == "txt" and REPEATED in schema.names and pa.types.is_nested(schema.field(REPEATED).type)
    return (image, caption, REPEATED) if lists else (image, caption)


def join_rows(images: Iterable[bytes], captions: Iterable[Any]) -> bytes:
    """Rows as bytes: where each image and each caption begins (2n + 1 uint64), then image, caption, …"""
    parts: list[bytes] = []
    for data, found in zip(images, captions, strict=True):
        parts += (data, pack_captions(found))
    sizes = [8 * (len(parts) + 1), *map(len, parts)]
    return b"".join([np.cumsum(sizes, dtype=np.uint64).tobytes(), *parts])


def vector_bytes(vectors: pa.FixedSizeListArray) -> list[pa.Scalar]:
    """The numbers of each vector as bytes; null where there is none."""
    rows = iter(np.asarray(vectors.drop_null().flatten()).reshape(-1, vectors.type.list_size))
    return [pa.scalar(next(rows).tobytes() if each else None, pa.binary()) for each in vectors.is_valid().to_pylist()]


def pack_captions(value: Any) -> bytes:
    """A caption in UTF-8; several as JSON behind a byte that UTF-8 never has."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace").encode()
    captions = captions_of(value, "the table")
    if len(captions) > 1:
        return _SEVERAL + json.dumps(captions).encode()
    return "".join(captions).encode("utf-8", "replace")


def unpack_captions(data: bytes) -> str | list[str]:
    """What `pack_captions` was given."""
    if data[:1] == _SEVERAL:
        return [str(caption) for caption in json.loads(data[1:])]
    return data.decode("utf-8", "replace")


def read_footer(reader: RangeReader, number: int) -> pq.FileMetaData:
    """The metadata of a parquet file. Raises UserError when it isn't one."""
    with _Ranges(reader, number) as ranges:
        try:
            return pq.read_metadata(ranges)
        except (pa.ArrowException, OSError, EOFError) as error:
            if ranges.failed is not None:
                raise ranges.failed from error
            raise unreadable(reader.path(number), error) from error


def open_parquets(
    folder: Path, shards: Sequence[StoredFile], cache: BlockCache, stem: str = "parquet"
) -> ParquetSource:
    """Open a folder's parquet files; on first use the sizes of their row groups are put down.

    `stem` names the index: other sets of the folder's files have other ones.
    Raises UserError for a file that is damaged or lacks a column.
    """
    return ParquetSource(folder, shards, open_index(folder, shards, stem, index_shard), cache)


def index_shard(folder: Path, shard: StoredFile) -> np.ndarray:
    """One row of ROW_GROUPS for each row group of a file that has any rows."""
    footer = read_footer(RangeReader(folder, [shard]), 0)
    pair_columns(footer.schema.to_arrow_schema(), folder / shard.name)
    return index_groups(folder, shard)


def index_groups(folder: Path, shard: StoredFile) -> np.ndarray:
    """The same of a file whose columns are known."""
    footer = read_footer(RangeReader(folder, [shard]), 0)
    counts = [(group, footer.row_group(group).num_rows) for group in range(footer.num_row_groups)]
    return np.array([count for count in counts if count[1]], ROW_GROUPS)


def has_images(folder: Path, shard: StoredFile) -> bool:
    """Whether a parquet file has a column with images; beside its tars img2dataset leaves files that have none."""
    footer = read_footer(RangeReader(folder, [shard]), 0)
    return find_image_column(footer.schema.to_arrow_schema()) is not None
