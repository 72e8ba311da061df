"""Tables of all kinds give the same rows, and files that are hidden aren't among them."""

import errno
import gzip
import json
import os
import uuid
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipkit.errors import UserError
from clipkit.formats.tables import RowReader, find_tables, read_columns, read_schema, table_errors
from clipkit.storage.files import as_path
from clipkit.tfrecord_tools.tables.copies import copy_table

ROWS = [{"url": f"http://x/{i}.jpg", "caption": f"0{i}", "score": i} for i in range(5)]


def write(path: Path) -> Path:
    if path.name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif path.name.endswith(".jsonl"):
        path.write_text("\n".join(map(json.dumps, ROWS)))
    else:
        delimiter = "," if ".csv" in path.name else "\t"
        lines = [delimiter.join(ROWS[0]), *(delimiter.join(map(str, row.values())) for row in ROWS)]
        content = "\n".join(lines).encode()
        path.write_bytes(gzip.compress(content) if path.name.endswith(".gz") else content)
    return path


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz", "a.TSV.gz", "a.jsonl", "a.parquet"])
def test_every_kind_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name)
    assert set(read_schema(path).names) == {"url", "caption", "score"}
    found = [row for batch in read_columns(path, ["caption", "url"]) for row in batch.to_pylist()]
    assert found == [{"caption": row["caption"], "url": row["url"]} for row in ROWS]
    assert copy_table(path, tmp_path / "copy.parquet", lambda column: column != "score") == len(ROWS)
    with RowReader(tmp_path / "copy.parquet", ["url", "caption", "score"]) as reader:
        assert reader.read(1, 4).to_pylist() == ROWS[1:4]


@pytest.mark.parametrize("name", ["t.parquet", "t.csv"])
def test_a_column_that_is_missing_or_there_twice_is_one_line(tmp_path: Path, name: str) -> None:
    if name.endswith(".csv"):
        (tmp_path / name).write_text("url,url\na,a\n")
    else:
        pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 2, ["url", "url"]), tmp_path / name)
    for column, count in (("url", 2), ("key", 0)):
        with pytest.raises(UserError, match=rf"{name} has {count} columns '{column}': url, url"):
            list(read_columns(tmp_path / name, [column]))


def test_hidden_files_are_no_tables(tmp_path: Path) -> None:
    write(tmp_path / "._a.parquet")
    path = write(tmp_path / "a.parquet")
    assert find_tables(tmp_path) == [path]


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def refuse(*arguments: object, **options: object) -> None:
    raise FULL


def test_a_full_disk_is_no_fault_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a copy is written, while a remote table is fetched, and in whatever else stands in the block."""
    table, copy = write(tmp_path / "a.csv"), tmp_path / "copy.parquet"
    with (
        pytest.raises(UserError, match=f"^the disk is full while writing what is made of {table}: "),
        table_errors(table),
    ):
        refuse()
    with monkeypatch.context() as patch, pytest.raises(UserError, match=f"^the disk is full while writing {copy}: "):
        patch.setattr(pq.ParquetWriter, "write_batch", refuse)
        copy_table(table, copy, lambda column: False)
    remote = as_path(f"memory://{uuid.uuid4().hex}/a.csv")
    remote.write_bytes(table.read_bytes())
    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(UserError, match=r"^can't write temporary files \(No space left .*, or set TMPDIR$"):
        copy_table(remote, copy, lambda column: False)
    assert list(tmp_path.iterdir()) == [table]
