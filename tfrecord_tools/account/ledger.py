"""The account of a shard, row by row: what became of each, and all that is known of its image but the pixels.

It stays beside the dataset (`clipkit/ledger/00000.parquet`). A retry goes on from it, and whoever wants to know why a
row isn't there, or what a host's headers said, finds it here. `message` is for people; `reason` is what is counted.
"""

from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clipkit.errors import UserError
from clipkit.storage.files import local_copy, write_beside
from clipkit.tfrecord_tools.outcome import RowOutcome
from clipkit.tfrecord_tools.reasons import PURGED

LEDGER_FOLDER = "ledger"
FAILURES_FILE = "failures.parquet"

_TYPES = {
    "http_status": pa.int16(),
    "attempts": pa.int16(),
    "body_bytes": pa.int64(),
    "jpg_bytes": pa.int32(),
    "width": pa.int32(),
    "height": pa.int32(),
    "original_width": pa.int32(),
    "original_height": pa.int32(),
    "offset": pa.int64(),
}
OUTCOME_FIELDS = tuple(field.name for field in fields(RowOutcome))
LEDGER = pa.schema(
    [
        ("key", pa.string()),
        ("row", pa.int64()),
        ("url", pa.string()),
        ("caption", pa.string()),
        *((name, _TYPES.get(name, pa.string())) for name in OUTCOME_FIELDS),
    ]
)
FAILURES = pa.schema(
    [
        ("shard", pa.string()),
        *(
            LEDGER.field(name)
            for name in ("key", "row", "url", "caption", "reason", "message", "http_status", "decision", "attempts")
        ),
    ]
)


def ledger_table(
    keys: Sequence[str],
    numbers: Sequence[int],
    urls: pa.ChunkedArray | pa.Array,
    captions: pa.ChunkedArray | pa.Array,
    outcomes: list[RowOutcome],
) -> pa.Table:
    """The ledger of a shard. `numbers` are the rows' numbers in their table.

    Captions are kept of failures, but of a purged row nothing but its place.
    """
    columns = {name: [getattr(outcome, name) for outcome in outcomes] for name in OUTCOME_FIELDS}
    failed = pa.array([reason not in (None, PURGED) for reason in columns["reason"]])
    arrays = [
        pa.array(keys, pa.string()),
        pa.array(numbers, pa.int64()),
        urls,
        pc.if_else(failed, captions, None),
        *(pa.array(values, LEDGER.field(name).type) for name, values in columns.items()),
    ]
    return pa.Table.from_arrays(arrays, schema=LEDGER)


def write_ledger(path: Path, ledger: pa.Table) -> None:
    """Write the ledger of a shard, whole or not at all."""
    with write_beside(path) as temporary:
        pq.write_table(ledger, temporary, compression="zstd")


def read_ledger(path: Path) -> list[RowOutcome]:
    """The outcomes of a shard's rows, in their order. Raises UserError when the file is gone or damaged."""
    columns = _read(path, list(OUTCOME_FIELDS)).to_pydict()
    return [RowOutcome(*values) for values in zip(*(columns[name] for name in OUTCOME_FIELDS), strict=True)]


def read_offsets(path: Path) -> npt.NDArray[np.uint64]:
    """uint64[records]: where the records of a shard begin in its file, in bytes. Raises UserError."""
    return _read(path, ["offset"])["offset"].drop_null().to_numpy().astype(np.uint64)


def _read(path: Path, columns: list[str]) -> pa.Table:
    try:
        with local_copy(path) as local:
            table = pq.read_table(local, columns=columns, partitioning=None)
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"ledger {path} can't be read ({str(error).partition(chr(10))[0]}): remove it, and the same download "
            "fetches its shard again"
        ) from error
    if "reason" in columns:  # earlier versions spelt one "empty caption"
        place = columns.index("reason")
        table = table.set_column(place, "reason", pc.replace_substring(table["reason"], " ", "-"))
    return table


def write_failures(path: Path, ledgers: Iterable[tuple[str, Path]]) -> None:
    """Write the failed rows of all shards into one parquet file; `ledgers` are each shard's name and ledger.

    One shard at a time is held in memory.
    """
    with write_beside(path) as temporary, pq.ParquetWriter(temporary, FAILURES, compression="zstd") as writer:
        for name, ledger in ledgers:
            table = _read(ledger, FAILURES.names[1:])
            table = table.filter(pc.is_valid(table["reason"]))
            table = table.add_column(0, FAILURES.field("shard"), pa.array([name] * table.num_rows, pa.string()))
            writer.write_table(table.select(FAILURES.names))
