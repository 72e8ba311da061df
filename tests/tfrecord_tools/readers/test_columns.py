"""Columns that no record can hold are left out and told; all others arrive as they were."""

import decimal
import uuid

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from image_shards import pair, picture, write_tar

from clipkit.cli.main import main
from clipkit.errors import UserError
from clipkit.formats.dataset import open_dataset
from clipkit.tfrecord_tools.readers.shards import find_shards, open_shard, read_shard

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


def build(folder, out):
    return CliRunner().invoke(main, ["build-tfds", str(folder), str(out), "--name", "x"])


def test_two_columns_of_one_name_are_refused(tmp_path):
    for name in ("x", "text"):
        columns = [pa.array([IMAGE]), *(pa.array([each]) for each in "abc")]
        pq.write_table(pa.Table.from_arrays(columns, ["image", "text", name, name]), tmp_path / "0.parquet")
        with pytest.raises(UserError, match=rf"0\.parquet has . columns '{name}': rename all but one"):
            open_shard(find_shards(tmp_path)[0])


def test_a_key_that_is_no_number_is_missing(tmp_path):
    keys = pa.array([float("nan"), 7.0, None])
    pq.write_table(pa.table({"image": [IMAGE] * 3, "text": ["a"] * 3, "key": keys}), tmp_path / "0.parquet")
    assert [sample.key for sample in read_shard(tmp_path / "0.parquet")] == ["0-0", "7.0", "0-2"]


def test_half_a_surrogate_pair_is_a_question_mark(tmp_path):
    metadata = b'{"caption": "a \\ud83d", "\\ud83d": 1, "n": "\\udc00"}'
    write_tar(tmp_path / "tar" / "0.tar", [pair(0, txt=None, json=metadata)])
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "0.jpg").write_bytes(picture(0))
    (tmp_path / "lines" / "metadata.jsonl").write_bytes(b'{"file_name": "0.jpg", ' + metadata[1:])
    for source in ("tar", "lines"):
        assert build(tmp_path / source, tmp_path / f"out-{source}").exit_code == 0
        example = open_dataset(tmp_path / f"out-{source}").example(0)
        assert (example["txt"], example["?"], example["n"]) == ("a ?", 1, "?")


@pytest.mark.parametrize(
    ("name", "table", "message"),
    [
        ("metadata.jsonl", b'{"file_name": "0.jpg", "text": "caf\xe9"}\n', "line 1 isn't UTF-8: convert"),
        ("metadata.jsonl", b'{"a": ' + b"[" * 3_000 + b"]" * 3_000 + b"}", "line 1 isn't JSON (maximum recursion"),
        ("metadata.jsonl", b"[1]\n", "line 1 isn't a JSON object"),
        ("metadata.csv", b"", "can't be read as csv (Empty CSV file)"),
        ("metadata.csv", b"file_name,text\n", "(there are none)"),
        ("metadata.csv", b"file_name,text,key\nimg/0.jpg,a,7\n", "in/img/0.jpg doesn't exist: mend the paths"),
        ("metadata.csv", b"file_name,text\nalbum.jpg,a\n", "in/album.jpg doesn't exist"),
        ("metadata.csv", b"file_name,text\n" + b"Q" * 9_000 + b",a\n", f"in/{'Q' * 200} doesn't exist"),
        ("metadata.csv", b"file_name,text\n0.jpg,\n", "name another column with --caption-column"),
    ],
)
def test_a_table_that_cannot_be_used_gets_one_line(name, table, message, tmp_path):
    (tmp_path / "in" / "album.jpg").mkdir(parents=True)
    (tmp_path / "in" / "0.jpg").write_bytes(picture(0))
    (tmp_path / "in" / name).write_bytes(table)
    result = build(tmp_path / "in", tmp_path / "out")
    assert result.exit_code == 2
    assert message in result.stderr.splitlines()[-1]


def test_a_byte_order_mark_is_no_part_of_a_table(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.jpg").write_bytes(picture(0))
    (tmp_path / "in" / "metadata.jsonl").write_bytes(b'\xef\xbb\xbf{"file_name": "0.jpg", "text": "x"}\n')
    assert build(tmp_path / "in", tmp_path / "out").exit_code == 0
