"""Tables of all kinds give the same rows, and files that are hidden aren't among them."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipkit.formats.tables import RowReader, copy_table, find_tables, read_columns, read_schema

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


def test_hidden_files_are_no_tables(tmp_path: Path) -> None:
    write(tmp_path / "._a.parquet")
    path = write(tmp_path / "a.parquet")
    assert find_tables(tmp_path) == [path]
