"""Training straight from a folder of images with a table of file names and captions.

Only two columns of the table are copied, once, to where workers map them into memory (`index`), so
that ten million captions cost no more than ten. Hugging Face's image folders are of this kind.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

import pyarrow as pa

from clipkit.errors import UserError
from clipkit.formats.captions import captions_of
from clipkit.formats.tables import USUAL, read_columns, read_schema
from clipkit.pixels.images import ImageError
from clipkit.storage.cache import BlockCache
from clipkit.storage.files import is_remote, means_absent, read_json, remove, write_beside, write_json
from clipkit.storage.ranges import Reopenable, read_object
from clipkit.storage.stores import StoredFile
from clipkit.train.sources.index import index_place, waiting_lock
from clipkit.train.sources.source import Pair, Source

_BATCH_ROWS = 4_096
_SCHEMA = pa.schema([("file", pa.large_string()), ("captions", pa.list_(pa.large_string()))])
_FORMAT = 3  # of the copy: one of an older clipkit, which left quotes in the captions of TSV, is made again


class FolderSource(Reopenable, Source):
    """The rows of a folder's table. Made by `open_folder`. With a `cache`, images are kept in it, each for itself."""

    def __init__(self, folder: Path, table: StoredFile, rows: Path, cache: BlockCache | None = None) -> None:
        self.folder, self.table, self.rows, self.cache = folder, table, rows, cache
        self._start()

    def _start(self) -> None:
        self._columns = pa.ipc.open_file(pa.memory_map(str(self.rows))).read_all()

    def __repr__(self) -> str:
        return f"<FolderSource {self.folder}: {self.num_records} rows of {self.table.name}>"

    @property
    def num_records(self) -> int:
        return int(self._columns.num_rows)

    def key(self, record: int) -> str:
        return f"{self.table.name}:{record} ({self._row(record)[0]})"

    def pairs(self, records: Sequence[int]) -> Iterator[Pair | UserError]:
        for record in records:
            name, captions = self._row(record)
            if not name:
                yield ImageError("the row names no image")
                continue
            try:
                image = self._image(name)
            except (OSError, ValueError) as error:
                if not means_absent(error):
                    raise UserError(f"can't read {self.folder / name} ({error}): check the disk") from error
                if not is_remote(self.folder) and not self.folder.is_dir():
                    raise UserError(f"{self.folder} is gone: put the images back") from error
                yield ImageError(f"the image {self.folder / name[:200]} doesn't exist")
                continue
            yield Pair(image, captions if len(captions) > 1 else "".join(captions))

    def fill(self, record: int) -> int:
        """Get a record's image into the cache, where there is one; returns the next record."""
        name = self._row(record)[0]
        if self.cache is not None and name:
            self.cache.ensure(f"image {self.folder / name}", lambda: self._fetch(name))
        return record + 1

    def _row(self, record: int) -> tuple[str | None, list[str]]:
        chunk, place = divmod(record, _BATCH_ROWS)
        file, captions = (column.chunk(chunk)[place].as_py() for column in self._columns.columns)
        return file, captions

    def _image(self, name: str) -> bytes:
        if self.cache is None:
            return self._fetch(name)
        return self.cache.read(f"image {self.folder / name}", lambda: self._fetch(name))

    def _fetch(self, name: str) -> bytes:
        path = self.folder / name
        return read_object(path) if is_remote(path) else path.read_bytes()


def open_folder(folder: Path, table: StoredFile, cache: BlockCache | None = None) -> FolderSource:
    """Open a folder of images with its table, which is copied on first use and when it has changed.

    Raises UserError when the table lacks a column or can't be read to its end.
    """
    place = index_place(folder)
    stem = f"table-{hashlib.blake2b(table.name.encode(), digest_size=6).hexdigest()}"
    rows, mark = place / f"{stem}.arrow", place / f"{stem}.json"
    wanted = {"format": _FORMAT, "name": table.name, "bytes": table.bytes, "version": table.version}
    with waiting_lock(place / f".{stem}.lock"):
        known = None
        with contextlib.suppress(UserError):
            known = read_json(mark) if mark.exists() and rows.exists() else None
        if known != wanted:
            remove(mark)  # a new copy with an old mark must never be seen
            try:
                _copy(folder / table.name, rows)
            except UserError as error:
                if "--quoting" not in str(error):
                    raise
                raise UserError(f"{error}, of clipkit build-tfds, and train on the dataset that it makes") from None
            write_json(mark, wanted)
        return FolderSource(folder, table, rows, cache)


def _copy(table: Path, rows: Path) -> None:
    """Write file names and captions in batches of _BATCH_ROWS, the last one shorter."""
    schema = read_schema(table)
    columns = USUAL.require_file(schema.names, table), USUAL.require_caption(schema, table)
    pairs = chain.from_iterable(_pairs(batch, *columns, table) for batch in read_columns(table, columns))
    with (
        write_beside(rows) as temporary,
        pa.OSFile(str(temporary), "wb") as file,
        pa.ipc.new_file(file, _SCHEMA) as writer,
    ):
        while some := list(islice(pairs, _BATCH_ROWS)):
            columns_of_some = zip(zip(*some, strict=True), _SCHEMA.types, strict=True)
            arrays = [pa.array(column, kind) for column, kind in columns_of_some]
            writer.write_batch(pa.record_batch(arrays, _SCHEMA))


def _pairs(batch: pa.RecordBatch, file: str, caption: str, table: Path) -> Iterator[tuple[str | None, list[str]]]:
    files, captions = batch.column(file).to_pylist(), batch.column(caption).to_pylist()
    for name, value in zip(files, captions, strict=True):
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        yield None if name is None else str(name), captions_of(value, table)
