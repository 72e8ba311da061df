"""What a downloaded shard becomes on the disk: records, a tar, or a parquet file, all from the same rows in one order.

Answers come in any order, and so do the images in the spool. Written in the order of the rows, the same answers give
the same bytes, and training sees them in the same order.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clipkit.formats.kinds import KindWidenedError, own_name
from clipkit.formats.records import decode_example, read_records
from clipkit.storage.files import local_copy, write_beside
from clipkit.tfrecord_tools.account.shard_state import DownloadFiles, Format
from clipkit.tfrecord_tools.outcome import RowOutcome
from clipkit.tfrecord_tools.readers.tar import read_tar
from clipkit.tfrecord_tools.tables.url_table import WantedRows
from clipkit.tfrecord_tools.writing.pair_tar import PairTar
from clipkit.tfrecord_tools.writing.pair_writer import PairWriter

SUCCESS, NOT_FETCHED, NOT_USABLE = "success", "failed_to_download", "failed_to_resize"
# Rows whose metadata are Python objects at a time, and images of a row group of a parquet file.
BATCH_ROWS = 512
GROUP_BYTES = 64 << 20
COPIED_FIELDS = ("width", "height", "original_width", "original_height", "exif", "sha256")

Image = Callable[[int], bytes]


@dataclass(frozen=True)
class DataFacts:
    """What is known of a written TFRecord file, where each row's record begins too; empty for the other formats."""

    crc32c: str = ""
    kinds: dict[str, str] = field(default_factory=dict)
    present: dict[str, int] = field(default_factory=dict)
    offsets: dict[int, int] = field(default_factory=dict)


def status_of(outcome: RowOutcome) -> str:
    """img2dataset's word for what became of a row."""
    if outcome.reason is None:
        return SUCCESS
    return NOT_FETCHED if outcome.body_bytes is None else NOT_USABLE


def rows_table(
    rows: WantedRows, ledger: pa.Table, outcomes: Sequence[RowOutcome], names: Mapping[str, str]
) -> pa.Table:
    """All rows with what became of them, in the columns of img2dataset's tables, and `hash_check` where they have a
    hash. `names` say what the download's own columns are called.
    """
    messages = [None if o.reason is None else f"{o.reason}: {o.message}" for o in outcomes]
    added = {
        "caption": rows.captions,
        "url": rows.urls,
        "key": ledger["key"],
        "status": pa.array([status_of(outcome) for outcome in outcomes], pa.string()),
        "error_message": pa.array(messages, pa.string()),
        **{name: ledger[name] for name in COPIED_FIELDS},
    }
    if rows.hashes is not None:
        added["hash_check"] = pc.if_else(pc.equal(ledger["hash_check"], ""), None, ledger["hash_check"])
    columns = [*rows.kept.columns, *added.values()]
    return pa.Table.from_arrays(columns, [*rows.kept.column_names, *(names[name] for name in added)])


def write_data(
    format: Format,
    files: DownloadFiles,
    table: pa.Table,
    outcomes: Sequence[RowOutcome],
    names: Mapping[str, str],
    image: Image,
    kinds: Mapping[str, str],
) -> DataFacts:
    """Write a shard's data in its format; `image(i)` gives the stored bytes of row `i`.

    `kinds` are the TFRecord columns' to begin with. Raises UserError when the disk or the store refuses.
    """
    if format == "tfds":
        account = [names["status"], names["error_message"]]
        return write_records(files.data, table.drop_columns(account), outcomes, names["caption"], image, kinds)
    if format == "webdataset":
        assert files.rows is not None
        with write_beside(files.data) as temporary, PairTar(temporary) as tar:
            for i, row in numbered_rows(table):
                if outcomes[i].reason is None:
                    tar.add(row[names["key"]], image(i), row[names["caption"]] or "", row)
        with write_beside(files.rows) as temporary:
            pq.write_table(table, temporary)
        return DataFacts()
    write_parquet(files.data, table, outcomes, names["jpg"], image)
    return DataFacts()


def numbered_rows(table: pa.Table) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a table by column, numbered, a few at a time as Python objects."""
    i = 0
    for batch in table.to_batches(max_chunksize=BATCH_ROWS):
        for row in batch.to_pylist():
            yield i, row
            i += 1


def write_records(
    path: Path,
    table: pa.Table,
    outcomes: Sequence[RowOutcome],
    caption: str,
    image: Image,
    kinds: Mapping[str, str],
) -> DataFacts:
    """A TFRecord file of the rows that have an image, as building a dataset from tars of them would write it.

    A value that doesn't fit widens its column's kind, and the file is begun again.
    """
    while True:
        try:
            offsets = {}
            with write_beside(path) as temporary, PairWriter(temporary, kinds) as writer:
                for i, row in numbered_rows(table):
                    if outcomes[i].reason is None:
                        writer.put(image(i), row.pop(caption), row)
                        offsets[i] = writer.offsets[-1]
            kinds, present = dict(sorted(writer.kinds.items())), dict(sorted(writer.present.items()))
            return DataFacts(writer.crc32c, kinds, present, offsets)
        except KindWidenedError as widened:
            kinds = widened.kinds


def write_parquet(path: Path, table: pa.Table, outcomes: Sequence[RowOutcome], image_name: str, image: Image) -> None:
    """A parquet file of all rows with a column of images, null where there is no image, as img2dataset writes it."""
    schema = table.schema.append(pa.field(image_name, pa.binary()))
    with write_beside(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for start, stop in row_groups(outcomes):
            images = [image(i) if outcomes[i].reason is None else None for i in range(start, stop)]
            part = table.slice(start, stop - start)
            writer.write_table(part.append_column(schema.field(image_name), pa.array(images, pa.binary())))


def row_groups(outcomes: Sequence[RowOutcome]) -> Iterator[tuple[int, int]]:
    """Start and stop of row groups that fit into memory, whatever the images' size."""
    start = size = 0
    for i, outcome in enumerate(outcomes):
        if i > start and (i - start == BATCH_ROWS or size + (outcome.jpg_bytes or 0) > GROUP_BYTES):
            yield start, i
            start, size = i, 0
        size += outcome.jpg_bytes or 0
    yield start, len(outcomes)


def read_images(format: Format, path: Path) -> Iterator[bytes]:
    """The images of a finished shard, in order. Raises UserError when the file is gone or damaged."""
    with local_copy(path) as local:
        if format == "tfds":
            for record in read_records(local):
                (jpg,) = decode_example(record)["jpg"]
                yield jpg
        elif format == "webdataset":
            for sample in read_tar(local, captions="first"):
                assert sample.image is not None
                yield sample.image
        else:
            with pq.ParquetFile(local) as file:
                for batch in file.iter_batches(BATCH_ROWS, columns=[own_name(file.schema_arrow.names, "jpg")]):
                    yield from batch.column(0).drop_null().to_pylist()
