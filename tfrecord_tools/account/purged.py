"""Rows of a table that were purged from the dataset made of it, for a shard that is fetched whole once more.

A purge notes in each shard's ledger which rows must not come back. A shard that was lost has no ledger that could be
trusted, so its rows are looked up in the list of all that was ever purged.
"""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clipkit.formats.manifest import CLIPKIT_FOLDER
from clipkit.storage.files import local_copy
from clipkit.tfrecord_tools.account.shard_state import SPLIT

PURGED_TABLE = pa.schema(
    [
        ("purge", pa.string()),
        ("by", pa.string()),
        ("value", pa.string()),
        ("matched", pa.bool_()),
        ("url", pa.string()),
        ("key", pa.string()),
        ("split", pa.string()),
        ("shard", pa.string()),
    ]
)
LINES = 10_000  # rows of a list that are held at a time
COLUMNS = ["purge", "by", "value", "url", "key", "split"]


def purged_path(folder: Path) -> Path:
    """Where everything that must not come back is listed: rows of PURGED_TABLE."""
    return folder / CLIPKIT_FOLDER / "purged.parquet"


def purged_rows(folder: Path, urls: Sequence[str | None], keys: Sequence[str]) -> dict[int, str]:
    """Of a shard's rows, the purged ones by number, and the purge that did it; `folder` is the dataset's.

    A row is purged when its URL or its key was on a list, or is that of a removed record. The list of all purges is
    read in parts, so no more is held than the shard's own rows.
    """
    path = purged_path(folder)
    if not path.exists():
        return {}
    wanted = {"url": pa.array(urls, pa.string()), "key": pa.array(keys, pa.string())}
    purges: dict[str, dict[str, str]] = {"url": {}, "key": {}}
    with local_copy(path) as local, pq.ParquetFile(local) as file:
        for batch in file.iter_batches(LINES, columns=COLUMNS):
            for column, found in purges.items():
                listed = batch.filter(pc.and_(pc.equal(batch["by"], column), pc.is_in(batch["value"], wanted[column])))
                found.update(zip(listed["value"].to_pylist(), listed["purge"].to_pylist(), strict=True))
                removed = batch.filter(pc.is_in(batch[column], wanted[column], skip_nulls=True))
                if column == "key":  # another split numbers its own samples, maybe by the same keys
                    removed = removed.filter(pc.equal(removed["split"], SPLIT))
                found.update(zip(removed[column].to_pylist(), removed["purge"].to_pylist(), strict=True))
    rows = {}
    for row, (url, key) in enumerate(zip(urls, keys, strict=True)):
        purge = purges["key"].get(key) or (None if url is None else purges["url"].get(url))
        if purge is not None:
            rows[row] = purge
    return rows
