"""What `clipkit purge` leaves behind in place of the records: who was removed, when, and because of which list.

`clipkit/purge-log.jsonl` is for people: a line for each removed record, and one for each purge.
`clipkit/purged.parquet` is for the commands that fetch: every value of every list, those that matched nothing here
included, for an image that failed to be fetched yesterday must not come tomorrow. No image and no caption is in either.

A purge that was killed may have written its lines already. Both files are therefore written anew, without the lines of
the same purge, beside their place and then renamed.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from clipkit.formats.manifest import CLIPKIT_FOLDER
from clipkit.storage.files import local_copy, write_beside
from clipkit.tfrecord_tools.account.purged import PURGED_TABLE, purged_path
from clipkit.tfrecord_tools.purge.removals import LINES, RemovalList, UInt64Array, find, read_values


def log_path(folder: Path) -> Path:
    return folder / CLIPKIT_FOLDER / "purge-log.jsonl"


def rewrite_lines(path: Path, purge: str, lines: Iterable[dict[str, Any]]) -> None:
    """Add JSON lines to a file in the place of those that the same purge has added before."""
    with write_beside(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        if path.exists():
            with local_copy(path) as local, local.open(encoding="utf-8", errors="replace") as before:
                for line in before:
                    if f'"purge": "{purge}"' not in line:
                        file.write(line if line.endswith("\n") else line + "\n")
        for values in lines:
            file.write(json.dumps({**values, "purge": purge}, ensure_ascii=False) + "\n")


def was_recorded(folder: Path, removals: RemovalList) -> bool:
    """Whether a purge by this very list and column has been written down."""
    path = log_path(folder)
    if not path.exists():
        return False
    with local_copy(path) as local, local.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if f'"list_sha256": "{removals.sha256}"' in line and json.loads(line).get("by") == removals.by:
                return True
    return False


def write_purged(
    folder: Path,
    purge: str,
    removals: RemovalList,
    wanted: UInt64Array,
    removed: Iterable[dict[str, Any]],
    matched: npt.NDArray[np.bool_],
) -> None:
    """Add a purge to `purged.parquet`: the removed records, then the list's values that matched none, once each."""
    path = purged_path(folder)
    with write_beside(path) as temporary, pq.ParquetWriter(temporary, PURGED_TABLE, compression="zstd") as writer:
        if path.exists():
            with local_copy(path) as local, pq.ParquetFile(local) as before:
                for batch in before.iter_batches(LINES):
                    writer.write_batch(batch.filter(pa.compute.not_equal(batch["purge"], purge)))
        rows = ({"purge": purge, "by": removals.by, "matched": True, **row} for row in removed)
        for some in _batches(rows):
            writer.write_table(pa.Table.from_pylist(some, schema=PURGED_TABLE))
        written = matched.copy()
        for values in read_values(removals):
            filled = [value for value in values if value]
            new = []
            for value, place in zip(filled, find(wanted, filled).tolist(), strict=True):
                if place >= 0 and not written[place]:
                    written[place] = True
                    new.append(value.decode("utf-8", "replace"))
            unmatched = [{"purge": purge, "by": removals.by, "value": value, "matched": False} for value in new]
            if unmatched:
                writer.write_table(pa.Table.from_pylist(unmatched, schema=PURGED_TABLE))


def _batches(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    some: list[dict[str, Any]] = []
    for row in rows:
        some.append(row)
        if len(some) == LINES:
            yield some
            some = []
    if some:
        yield some


def purged_before(folder: Path, removals: RemovalList, wanted: UInt64Array) -> npt.NDArray[np.bool_]:
    """Which entries of the list were removed from this dataset by an earlier purge: bool[entries]."""
    before = np.zeros(wanted.shape[1], bool)
    path = purged_path(folder)
    if path.exists() and len(before):
        with local_copy(path) as local, pq.ParquetFile(local) as file:
            for batch in file.iter_batches(LINES, columns=["by", "value", "matched"]):
                rows = batch.filter(pa.compute.and_(batch["matched"], pa.compute.equal(batch["by"], removals.by)))
                places = find(wanted, [str(value).encode() for value in rows["value"].to_pylist()])
                before[places[places >= 0]] = True
    return before
