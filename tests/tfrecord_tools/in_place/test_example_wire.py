import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipkit.formats.records import decode_example, encode_example
from clipkit.tfrecord_tools.in_place.example_wire import ExampleWire

NAMES = st.sampled_from(["a", "n", "txt", "jpg", "column", "x" * 127, "y" * 130, "é"])
VALUES = st.one_of(
    st.binary(max_size=200),
    st.binary(min_size=126, max_size=132),
    st.binary(min_size=16_380, max_size=16_390),
    st.integers(-(2**63), 2**63 - 1),
    st.sampled_from([0, 1, 127, 128, 16_383, 16_384, -1, 2**63 - 1]),
    st.floats(width=32, allow_nan=False),
    st.lists(st.binary(max_size=3), max_size=4),
    st.lists(st.integers(-5, 300), max_size=70),
    st.lists(st.floats(width=32, allow_nan=False), max_size=40),
)


def look_of(values: list) -> str:
    """What `ExampleWire` should say, from the decoded message."""
    if not values:
        return "nothing"
    name = {bytes: "text", int: "int", float: "float"}[type(values[0])]
    return "empty" if values == [b""] else name if len(values) == 1 else f"{name}s"


def expected(records: list[bytes]) -> dict[str, dict[str, int]]:
    looks: dict[str, dict[str, int]] = {}
    for record in records:
        for name, values in decode_example(record).items():
            counts = looks.setdefault(name, {})
            counts[look_of(values)] = counts.get(look_of(values), 0) + 1
    return looks


@given(st.lists(st.dictionaries(NAMES, VALUES), max_size=6), st.binary(max_size=40))
def test_it_counts_what_decoding_counts(rows, around):
    # Twice, so that heads are met again, and in the middle of other bytes, as in a file.
    records = [encode_example(row) for row in rows] * 2
    wire = ExampleWire()
    for record in records:
        pair = wire.read(around + record + around, len(around), len(around) + len(record))
        values = decode_example(record)
        image, caption = values.get("jpg"), values.get("txt")
        assert pair.data[pair.start : pair.end] == (image[0] if image and look_of(image) == "text" else b"")
        assert pair.column == ("jpg" if pair.end > pair.start else "")
        assert pair.caption == (caption[0] if caption and look_of(caption) in ("text", "empty") else None)
    assert wire.forms() == expected(records)


@given(st.dictionaries(NAMES, VALUES, min_size=1), st.data())
def test_damaged_bytes_are_a_value_error_at_worst(row, data):
    record = bytearray(encode_example(row))
    wire = ExampleWire()
    wire.read(bytes(record), 0, len(record))
    for _ in range(data.draw(st.integers(1, 3))):
        record[data.draw(st.integers(0, min(len(record), 200) - 1))] = data.draw(st.integers(0, 255))
    record = record[: data.draw(st.integers(0, len(record)))]
    try:
        wire.read(bytes(record), 0, len(record))
    except ValueError:
        with pytest.raises(ValueError, match=r"not a tf\.train\.Example"):
            decode_example(bytes(record))
    wire.forms()


def test_another_writers_layout_is_decoded():
    """The value before the key, an int list that isn't packed, a list in two blocks: valid, though nobody writes it."""
    value_first = b"\x12\x05\x0a\x03\x0a\x01z" + b"\x0a\x01a"
    unpacked = b"\x0a\x01n\x12\x06\x1a\x04\x08\x05\x08\x06"
    blocks = b"\x0a\x01m\x12\x08\x1a\x06\x0a\x01\x05\x0a\x01\x06"
    entries = b"".join(b"\x0a" + bytes([len(entry)]) + entry for entry in (value_first, unpacked, blocks))
    record = b"\x0a" + bytes([len(entries)]) + entries
    assert decode_example(record) == {"a": [b"z"], "n": [5, 6], "m": [5, 6]}
    wire = ExampleWire()
    wire.read(record, 0, len(record))
    assert wire.forms() == {"a": {"text": 1}, "m": {"ints": 1}, "n": {"ints": 1}}


def test_an_example_without_columns():
    for record in (b"", b"\x0a\x00"):
        wire = ExampleWire()
        assert wire.read(record, 0, len(record)).caption is None
        assert wire.forms() == {}


def framed(entries: bytes) -> bytes:
    """An Example of these entries of its map."""
    assert len(entries) < 128
    return b"\x0a" + bytes([len(entries)]) + entries


def entries_of(**columns: object) -> bytes:
    return encode_example(columns)[2:]


def learned(**columns: object) -> ExampleWire:
    """One that has met a record of these columns, so that their heads are known."""
    wire = ExampleWire()
    record = encode_example(columns)
    wire.read(record, 0, len(record))
    return wire


def test_a_record_that_is_irregular_at_its_end_is_counted_once():
    wire = learned(a=b"text", n=300)
    unpacked = b"\x0a\x0b\x0a\x01m\x12\x06\x1a\x04\x08\x05\x08\x06"
    record = framed(entries_of(a=b"word", n=301) + unpacked)
    wire.read(record, 0, len(record))
    assert wire.forms() == {"a": {"text": 2}, "m": {"ints": 1}, "n": {"int": 2}}


def test_an_int_that_is_cut_off_is_no_example():
    wire = learned(n=300)
    record = framed(entries_of(n=300)[:-1] + b"\x82")
    with pytest.raises(ValueError, match="Example"):
        wire.read(record, 0, len(record))


@pytest.mark.parametrize("known", [{"a": b"some text"}, {"n": 300}, {"b": b"other"}])
def test_an_entry_that_leads_past_the_end_is_no_example(known):
    wire = learned(**known)
    for columns in ({"a": b"some text"}, {"n": 300}):
        record = framed(entries_of(**columns)[:-1])
        with pytest.raises(ValueError, match="Example"):
            wire.read(record + b"\x02 and more", 0, len(record))
    assert sum(count for counts in wire.forms().values() for count in counts.values()) == 1
