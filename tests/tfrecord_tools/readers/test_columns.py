"""Columns that no record can hold are left out and told; all others arrive as they were."""

import decimal
import uuid

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from image_shards import picture

from clipkit.cli.main import main
from clipkit.formats.dataset import open_dataset

IMAGE = {"bytes": picture(1), "path": "1.jpg"}
COLUMNS = {
    "text": pa.array(["a", "b"]),
    "conditioning_image": pa.array([IMAGE, IMAGE]),
    "mask": pa.array([picture(2, "PNG"), None]),
    "crops": pa.array([[IMAGE, IMAGE], []]),
    "embedding": pa.array([b"\xff\0\xfe\1", b"\0\0\0\0"]),
    "half": pa.array([b"\0\xff", b"\1\2"], pa.binary(2)),
    "lang": pa.array([b"en", "café".encode()]),  # as Spark writes text without its annotation
    "boxes": pa.array([[{"x": 1, "y": 2}], []]),
    "uid": pa.array([uuid.UUID(int=7).bytes, uuid.UUID(int=8).bytes], pa.binary(16)).cast(pa.binary(16)),
    "price": pa.array([decimal.Decimal("1.50"), None]),
    "kind": pa.array(["x", "y"]).dictionary_encode(),
    "nothing": pa.nulls(2),
}
LEFT_OUT = ["conditioning_image", "mask", "crops", "embedding", "half", "uid"]


@pytest.mark.parametrize("source", ["parquet", "table"])
def test_what_no_record_holds_is_left_out_and_told(source, tmp_path):
    (tmp_path / "in").mkdir()
    if source == "parquet":
        pq.write_table(pa.table({"image": [IMAGE, IMAGE], **COLUMNS}), tmp_path / "in" / "0.parquet")
    else:
        (tmp_path / "in" / "1.jpg").write_bytes(picture(1))
        pq.write_table(pa.table({"file_name": ["1.jpg", "1.jpg"], **COLUMNS}), tmp_path / "in" / "metadata.parquet")
    result = CliRunner().invoke(main, ["build-tfds", str(tmp_path / "in"), str(tmp_path / "out"), "--name", "x"])
    assert result.exit_code == 0, result.output
    assert f"left out, as no record holds bytes: {', '.join(LEFT_OUT)}" in result.stderr
    one, two = (open_dataset(tmp_path / "out").example(i) for i in range(2))
    assert one["jpg"] == picture(1)
    assert [(row["txt"], row["lang"], row["price"], row["kind"]) for row in (one, two)] == [
        ("a", "en", "1.50", "x"),
        ("b", "café", None, "y"),
    ]
    assert one["boxes"] == '[{"x": 1, "y": 2}]'
    assert not set(LEFT_OUT) & set(one)


def test_bytes_that_stop_being_text_are_escaped(tmp_path):
    (tmp_path / "in").mkdir()
    rows = 70
    columns = {"image": [IMAGE] * rows, "text": ["a"] * rows, "lang": [b"en"] * (rows - 1) + [b"caf\xe9"]}
    pq.write_table(pa.table(columns), tmp_path / "in" / "0.parquet")
    result = CliRunner().invoke(main, ["build-tfds", str(tmp_path / "in"), str(tmp_path / "out"), "--name", "x"])
    assert result.exit_code == 0, result.output
    dataset = open_dataset(tmp_path / "out")
    assert [dataset.example(i)["lang"] for i in (0, rows - 1)] == ["en", "caf\\xe9"]
