import io
import pickle
import struct
from pathlib import Path

import google_crc32c
import pytest
from hypothesis import given
from hypothesis import strategies as st
from record_columns import COLUMNS, LIST, SCALAR, as_lists
from tensorflow_process import with_tensorflow

from clipkit.errors import UserError
from clipkit.formats import records
from clipkit.formats import records as record_files
from clipkit.formats.records import (
    FOOTER_BYTES,
    HEADER_BYTES,
    RecordError,
    RecordWriter,
    decode_example,
    encode_column,
    encode_example,
    index_records,
    masked_crc32c,
    read_framed,
    read_range,
    read_records,
    unframe,
    with_column,
)

# TensorFlow on both sides, in a process of its own, where our message classes live beside TensorFlow's.
WITH_TENSORFLOW = """
from pathlib import Path
from clipkit.formats.records import RecordWriter, decode_example, encode_example, read_records
import tensorflow as tf
from hypothesis import given, settings
from record_columns import COLUMNS, as_lists

folder = Path(arguments[0])
records = [bytes([n % 256]) * n for n in (0, 1, 100, 0, 70000)]

with tf.io.TFRecordWriter(str(folder / "theirs")) as writer:
    for record in records:
        writer.write(record)
assert list(read_records(folder / "theirs")) == records

with RecordWriter(folder / "ours") as writer:
    for record in records:
        writer.write(record)
assert list(tf.data.TFRecordDataset(str(folder / "ours")).as_numpy_iterator()) == records
assert (folder / "ours").read_bytes() == (folder / "theirs").read_bytes()

@settings(max_examples=150, deadline=None, database=None)
@given(COLUMNS)
def same_messages(columns):
    ours = encode_example(columns)
    parsed = tf.train.Example.FromString(ours)
    theirs = {}
    for name, feature in parsed.features.feature.items():
        kind = feature.WhichOneof("kind")
        theirs[name] = list(getattr(feature, kind).value) if kind else []
    assert theirs == as_lists(columns), (theirs, columns)
    assert decode_example(parsed.SerializeToString()) == as_lists(columns)
    assert parsed.SerializeToString(deterministic=True) == ours

same_messages()
result = "the same"
"""


def write(path: Path, records) -> list[int]:
    with RecordWriter(path) as writer:
        return [writer.write(record) for record in records]


def test_tensorflow_reads_ours_and_we_read_tensorflows(tmp_path):
    assert with_tensorflow(WITH_TENSORFLOW, tmp_path) == "the same"


def test_masked_crc_is_that_of_the_standard():
    assert google_crc32c.value(b"123456789") == 0xE3069283
    rotated = (0xE3069283 >> 15 | 0xE3069283 << 17) & 0xFFFFFFFF
    assert masked_crc32c(b"123456789") == (rotated + 0xA282EAD8) % 2**32


@given(st.lists(st.binary(max_size=2000), max_size=6))
def test_every_way_of_reading_gives_what_was_written(tmp_path_factory, records):
    path = tmp_path_factory.mktemp("records") / "some.tfrecord"
    with RecordWriter(path) as writer:
        offsets = [writer.write(record) for record in records]
        assert writer.records == len(records)
    contents = path.read_bytes()
    assert (writer.bytes, writer.checksum) == (len(contents), google_crc32c.value(contents))
    assert list(read_records(path)) == records
    assert index_records(path).tolist() == offsets
    ends = [*offsets[1:], len(contents)][: len(offsets)]
    assert [unframe(contents[a:b], a, path) for a, b in zip(offsets, ends, strict=True)] == records


@given(COLUMNS)
def test_examples_come_back(columns):
    encoded = encode_example(columns)
    assert decode_example(encoded) == as_lists(columns)
    assert encode_example(dict(reversed(columns.items()))) == encoded


# Names that begin with one another, values of any size a length may take, numbers out of the range of 32 bits.
WIRE_VALUES = st.one_of(SCALAR, LIST, st.binary(min_size=120, max_size=140), st.floats(), st.lists(st.floats()))


@given(st.dictionaries(st.text("ab\0é", max_size=140), WIRE_VALUES, max_size=8))
def test_examples_are_to_the_byte_what_protobuf_makes_of_them(columns):
    message = records._Example()
    for name, values in as_lists(columns).items():
        feature = message.features.feature[name]
        feature.SetInParent()
        if values:
            kind = {bytes: feature.bytes_list, int: feature.int64_list, float: feature.float_list}[type(values[0])]
            kind.value.extend(values)
    assert encode_example(columns) == message.SerializeToString(deterministic=True)


def test_long_values_are_to_the_byte_what_protobuf_makes_of_them():
    for size in (16_383, 16_384, 2_097_151, 2_097_152):
        message = records._Example()
        message.features.feature["jpg"].bytes_list.value.extend([b"x" * size, b"", b"y" * 200])
        assert encode_example({"jpg": [b"x" * size, b"", b"y" * 200]}) == message.SerializeToString(deterministic=True)


def test_decoding_some_keys_leaves_out_the_rest_and_what_is_absent():
    record = encode_example({"jpg": b"image", "txt": "words", "width": 3, "none": None})
    assert decode_example(record, ("jpg", "txt", "none", "other")) == {"jpg": [b"image"], "txt": [b"words"]}


def test_mixed_numbers_are_floats_and_other_mixtures_are_refused():
    assert decode_example(encode_example({"a": [1, 2.5]})) == {"a": [1.0, 2.5]}
    assert decode_example(encode_example({"a": True, "b": [False]})) == {"a": [1], "b": [0]}
    for value in ([1, "a"], {"a": 1}, [None], [[1]], object()):
        with pytest.raises(TypeError, match="column 'a'"):
            encode_example({"a": value})
    for value in (2**63, [-(2**63) - 1]):
        with pytest.raises(ValueError, match=r"(?i)range|int64"):
            encode_example({"a": value})


def test_bytes_that_are_no_example_are_refused():
    with pytest.raises(ValueError, match=r"not a tf\.train\.Example"):
        decode_example(b"\xff\xff\xff")


@pytest.fixture
def damaged(tmp_path):
    """A file of three records with its offsets, to be cut and flipped."""
    path = tmp_path / "shard.tfrecord"
    return path, write(path, [b"one", b"", b"three" * 4]), path.read_bytes()


def holder(offsets, byte):
    return max(offset for offset in offsets if offset <= byte)


def test_a_file_cut_at_any_byte_names_the_record_that_is_cut(damaged):
    path, offsets, contents = damaged
    for size in range(len(contents)):
        path.write_bytes(contents[:size])
        if size in offsets:
            assert len(list(read_records(path))) == offsets.index(size) == len(index_records(path))
            continue
        for read in (lambda: list(read_records(path)), lambda: index_records(path)):
            with pytest.raises(RecordError, match="ends inside a record") as caught:
                read()
            assert (caught.value.path, caught.value.offset) == (path, holder(offsets, size))
        start = holder(offsets, size)
        with pytest.raises(RecordError, match="ends inside a record"):
            unframe(contents[start:size], start, path)


def test_a_flipped_bit_anywhere_is_noticed_in_its_record(damaged):
    path, offsets, contents = damaged
    for byte in range(len(contents)):
        flipped = bytearray(contents)
        flipped[byte] ^= 0x40
        path.write_bytes(flipped)
        with pytest.raises(RecordError) as caught:
            list(read_records(path))
        offset = caught.value.offset
        assert offset == holder(offsets, byte)
        with pytest.raises(RecordError):
            unframe(bytes(flipped[offset:]), offset, path)


def test_contents_that_are_not_checked_yet_pass_and_lengths_do_not(damaged):
    path, _, contents = damaged
    flipped = contents[:12] + b"O" + contents[13:]
    path.write_bytes(flipped)
    assert next(read_framed(path)) == (0, flipped[: HEADER_BYTES + 3 + FOOTER_BYTES])
    length = struct.pack("<Q", 2**40)
    path.write_bytes(length + contents[8:])
    with pytest.raises(RecordError, match="length"):
        next(read_framed(path))
    path.write_bytes(length + struct.pack("<I", masked_crc32c(length)) + contents[12:])
    with pytest.raises(RecordError, match="ends inside"):  # and asks for no terabyte
        next(read_framed(path))


@pytest.mark.parametrize("chunk", [20, 100, 1000])
@pytest.mark.parametrize("large", [1, 60, 5000])
def test_nothing_depends_on_how_much_is_read_at_once(tmp_path, monkeypatch, chunk, large):
    wanted = [bytes([number]) * length for number, length in enumerate((3, 0, 70, 5, 2000, 1, 84, 900, 4))]
    with RecordWriter(tmp_path / "a") as writer:
        offsets = [writer.write(record) for record in wanted]
    monkeypatch.setattr(record_files, "_CHUNK_BYTES", chunk)
    monkeypatch.setattr(record_files, "_LARGE_BYTES", large)
    assert list(read_range(tmp_path / "a")) == list(zip(offsets, wanted, strict=True))
    assert [offset for offset, _ in read_range(tmp_path / "a", offsets[2], offsets[5] + 1)] == offsets[2:6]


def test_the_error_is_one_line_for_the_user_and_crosses_processes():
    error = RecordError(Path("a/b.tfrecord"), 1234, "the file ends inside a record")
    assert isinstance(error, UserError)
    assert str(error).startswith("a/b.tfrecord: ")
    assert "byte 1234" in str(error)
    assert "\n" not in str(error)
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.path, copy.offset) == (str(error), error.path, error.offset)


def test_large_and_small_records_share_a_file(tmp_path):
    records = [b"x" * 3_000_000, b"", b"y" * 10, io.BytesIO(b"z" * 1_100_000).read()]
    write(tmp_path / "f", records)
    assert list(read_records(tmp_path / "f")) == records


@given(COLUMNS, st.text(max_size=5), st.lists(st.text(), min_size=1))
def test_a_column_more_leaves_all_other_bytes_as_they_are(columns, name, texts):
    record, column = encode_example(columns), encode_column(name, texts)
    if decode_example(record, [name]):
        with pytest.raises(ValueError, match="already"):
            with_column(record, name, column)
    else:
        assert with_column(record, name, column) == encode_example({**columns, name: texts})


def test_columns_in_another_order_and_in_odd_messages():
    parts = [encode_column(name, name) for name in ("z", "a", "m")]
    record = b"\n" + bytes([sum(map(len, parts))]) + b"".join(parts)
    longer = with_column(record, "k", encode_column("k", [1, 2]))
    assert decode_example(longer) == {"z": [b"z"], "a": [b"a"], "m": [b"m"], "k": [1, 2]}
    assert b"".join(parts) in longer.replace(encode_column("k", [1, 2]), b"")
    # Two messages one behind the other are one that has the columns of both.
    both = encode_example({"a": 1}) + encode_example({"b": 2})
    assert decode_example(with_column(both, "c", encode_column("c", 3))) == {"a": [1], "b": [2], "c": [3]}
    with pytest.raises(ValueError, match="already"):
        with_column(both, "b", encode_column("b", 3))
    for broken in (record[:-1], b"\xff\xff no example", b"\n\xff"):
        with pytest.raises(ValueError, match=r"tf\.train\.Example"):
            with_column(broken, "k", encode_column("k", 1))
