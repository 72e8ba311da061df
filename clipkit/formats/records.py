"""TFRecord files and `tf.train.Example` messages without TensorFlow.

TensorFlow must never enter a process that trains, and its import costs seconds and half a gigabyte; the two formats are
small enough to be ours. A record is framed as TensorFlow's `record_writer.h` says, all numbers little-endian:

    uint64 length | uint32 masked CRC32C of the length | length bytes | uint32 masked CRC32C of the bytes

The messages are those of `tensorflow/core/example/{example,feature}.proto`. Their descriptors are made here and live in
a pool of their own, so that TensorFlow, which registers the same names in the default pool, can be imported beside us.
"""

import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import google_crc32c
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory, text_format

from clipkit.errors import UserError

HEADER_BYTES = 12
FOOTER_BYTES = 4

Value = bytes | str | int | float | Sequence[bytes | str | int | float] | None

_LENGTH = struct.Struct("<Q")
_CRC = struct.Struct("<I")
_HEADER = struct.Struct("<QI")
# One system call for many small records, without a copy of large ones (the buffer is passed by when a record fills it).
_BUFFER_BYTES = 1 << 20
# What is read at once: many records, and little enough to stay in the processor's cache. Large ones are read singly,
# for of these a copy costs more than a system call.
_CHUNK_BYTES, _LARGE_BYTES = 1 << 21, 1 << 17

# The fields of the message `Feature`, as its wire format tags them.
_BYTES_LIST, _FLOAT_LIST, _INT64_LIST = b"\n", b"\x12", b"\x1a"
_FIRST = 10  # the tag of a message's first field, where that has a length
_FLOAT = struct.Struct("<f")
_ONE_BYTE = [bytes((number,)) for number in range(0x80)]
_INT_END = 1 << 63


class RecordError(UserError):
    """A record that is cut off or damaged. `path` and `offset` (bytes from the start of the file) say where."""

    def __init__(self, path: Path | str, offset: int, reason: str) -> None:
        super().__init__(
            f"{path}: {reason}, record at byte {offset}: the file is damaged; fetch it again or build this shard anew"
        )
        self.path, self.offset, self.reason = Path(path), offset, reason

    def __reduce__(self) -> tuple[Any, ...]:
        return RecordError, (self.path, self.offset, self.reason)  # so that it crosses from a worker process


def masked_crc32c(data: bytes) -> int:
    """CRC32C rotated right by 15 bits plus a constant (TensorFlow's mask, so that CRCs of CRCs stay strong)."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


class RecordWriter:
    """Writes a TFRecord file from its beginning; use it as a context manager.

    `records`, `bytes` and `checksum` (CRC32C of the whole file, what cloud stores keep for an object too) are right
    after each write; `crc32c` is the checksum as a manifest has it.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=_BUFFER_BYTES)
        self.records = 0
        self.bytes = 0
        self.checksum = 0

    def write(self, record: bytes) -> int:
        """Append one record and return its byte offset in the file."""
        offset = self.bytes
        length = _LENGTH.pack(len(record))
        head, foot = length + _CRC.pack(masked_crc32c(length)), _CRC.pack(masked_crc32c(record))
        for part in (head, record, foot):  # not joined: to copy a record costs more than to write it
            self._file.write(part)
            self.checksum = google_crc32c.extend(self.checksum, part)
        self.records += 1
        self.bytes += HEADER_BYTES + len(record) + FOOTER_BYTES
        return offset

    @property
    def crc32c(self) -> str:
        return f"{self.checksum:08x}"

    def flush(self) -> None:
        """Hand what was written to the operating system, for a reader that follows the file."""
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_records(path: Path) -> Iterator[bytes]:
    """The records of a file in order, read once from front to back.

    Raises RecordError at the first record that is cut off or damaged.
    """
    return (record for _, record in read_range(path))


def read_range(path: Path, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, bytes]]:
    """Offset and contents of each record that begins in bytes [start, stop) of the file, as `read_records` has them.

    Of the records before `start` the headers alone are read.
    """
    return ((offset, check_contents(framed, offset, path)) for offset, framed in read_framed(path, start, stop))


def read_framed(path: Path, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, bytes]]:
    """Offset and bytes of each record that begins in bytes [start, stop), with its frame, for `check_contents`.

    Raises RecordError for one that is cut off, and for a damaged length, which would ask for any amount of memory.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size, offset, wanted = os.fstat(descriptor).st_size, 0, _CHUNK_BYTES
        end = size if stop is None else min(stop, size)
        while offset < min(start, end):
            offset += _framed_bytes(os.pread(descriptor, HEADER_BYTES, offset), offset, size, path)
        while offset < end:
            chunk, position = os.pread(descriptor, wanted, offset), 0
            while position + HEADER_BYTES <= len(chunk) and offset + position < end:
                total = _framed_bytes(chunk[position : position + HEADER_BYTES], offset + position, size, path)
                if position + total > len(chunk):
                    break
                yield offset + position, chunk[position : position + total]
                position += total
            if not position:  # a record that is larger than what was read
                position = total = _framed_bytes(chunk[:HEADER_BYTES], offset, size, path)
                yield offset, os.pread(descriptor, total, offset)
            wanted = _CHUNK_BYTES if total < _LARGE_BYTES else HEADER_BYTES
            offset += position
    finally:
        os.close(descriptor)


def read_examples(
    path: Path, start: int = 0, stop: int | None = None, keys: Sequence[str] | None = None
) -> Iterator[tuple[int, dict[str, list[Any]]]]:
    """Offset and columns (`decode_example`) of the records of `read_range`. Raises RecordError for a damaged one."""
    for offset, record in read_range(path, start, stop):
        try:
            values = decode_example(record, keys)
        except ValueError as error:
            raise RecordError(path, offset, str(error)) from error
        yield offset, values


def unframe(framed: bytes, offset: int, path: Path | str) -> bytes:
    """The contents of exactly one framed record that was read from byte `offset` of `path`, CRC checked."""
    _framed_bytes(framed[:HEADER_BYTES], offset, offset + len(framed), path)
    return check_contents(framed, offset, path)


def check_contents(framed: bytes, offset: int, path: Path | str) -> bytes:
    """The contents of a framed record whose length was checked. Raises RecordError when they are damaged."""
    record = framed[HEADER_BYTES:-FOOTER_BYTES]
    if masked_crc32c(record) != _CRC.unpack(framed[-FOOTER_BYTES:])[0]:
        raise RecordError(path, offset, "the checksum of a record's contents doesn't match")
    return record


def index_records(path: Path) -> np.ndarray:
    """Byte offsets of all records, uint64[n], from the headers alone: contents are neither read nor checked."""
    offsets = []
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        descriptor, offset = file.fileno(), 0
        while offset < size:
            offsets.append(offset)
            offset += _framed_bytes(os.pread(descriptor, HEADER_BYTES, offset), offset, size, path)
    return np.array(offsets, dtype=np.uint64)


def _framed_bytes(header: bytes, offset: int, size: int, path: Path | str) -> int:
    """The bytes, frame and all, of the record whose header stands at byte `offset` of a file of `size` bytes.

    Raises RecordError.
    """
    if len(header) < HEADER_BYTES:
        raise RecordError(path, offset, "the file ends inside a record's header")
    length, crc = _HEADER.unpack(header)
    if masked_crc32c(header[:8]) != crc:
        raise RecordError(path, offset, "the checksum of a record's length doesn't match")
    total: int = HEADER_BYTES + length + FOOTER_BYTES
    if offset + total > size:
        raise RecordError(path, offset, "the file ends inside a record")
    return total


_EXAMPLE_PROTO = """
name: "clipkit/example.proto" package: "tensorflow" syntax: "proto3"
message_type { name: "BytesList" field { name: "value" number: 1 type: TYPE_BYTES label: LABEL_REPEATED } }
message_type { name: "FloatList" field { name: "value" number: 1 type: TYPE_FLOAT label: LABEL_REPEATED } }
message_type { name: "Int64List" field { name: "value" number: 1 type: TYPE_INT64 label: LABEL_REPEATED } }
message_type {
  name: "Feature"
  field { name: "bytes_list" number: 1 type_name: "BytesList" label: LABEL_OPTIONAL oneof_index: 0 }
  field { name: "float_list" number: 2 type_name: "FloatList" label: LABEL_OPTIONAL oneof_index: 0 }
  field { name: "int64_list" number: 3 type_name: "Int64List" label: LABEL_OPTIONAL oneof_index: 0 }
  oneof_decl { name: "kind" }
}
message_type {
  name: "Features"
  field { name: "feature" number: 1 type_name: "FeatureEntry" label: LABEL_REPEATED }
  nested_type {
    name: "FeatureEntry"
    field { name: "key" number: 1 type: TYPE_STRING label: LABEL_OPTIONAL }
    field { name: "value" number: 2 type_name: "Feature" label: LABEL_OPTIONAL }
    options { map_entry: true }
  }
}
message_type { name: "Example" field { name: "features" number: 1 type_name: "Features" label: LABEL_OPTIONAL } }
"""


def _example_class() -> Any:
    """The message class of `tf.train.Example`; Any because its fields exist at run time alone."""
    pool = descriptor_pool.DescriptorPool()
    pool.Add(text_format.Parse(_EXAMPLE_PROTO, descriptor_pb2.FileDescriptorProto()))
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tensorflow.Example"))


_Example = _example_class()


def encode_example(columns: Mapping[str, Value]) -> bytes:
    """A serialised `tf.train.Example`; equal columns give equal bytes, whatever their order.

    bytes and str (as UTF-8) become bytes_list, bool and int int64_list, float float_list (32 bits, as the format has
    it); a list takes the type of its items, and ints among floats are floats. None leaves the key out; an empty list
    leaves a key without a type. Raises TypeError for anything else and ValueError for ints beyond 64 bits.

    The bytes are those of protobuf's deterministic serialisation. They are put together here because a message costs
    more than all else that is done to a record, and copies the image, nearly all of it, twice.
    """
    parts = [b""]
    for name in _in_order(tuple(columns)):
        value = columns[name]
        if isinstance(value, bytes):
            parts += (_head(name, _BYTES_LIST, len(value)), value)
        elif isinstance(value, str):
            data = value.encode()
            parts += (_head(name, _BYTES_LIST, len(data)), data)
        elif isinstance(value, int):
            data = _integer(value)
            parts += (_head(name, _INT64_LIST, len(data)), data)
        elif isinstance(value, float):
            parts += (_head(name, _FLOAT_LIST, 4), _float(value))
        elif value is not None:
            parts += _list_entry(name, value)
    length = sum(map(len, parts))
    if length:
        parts[0] = b"\n" + _varint(length)
    return b"".join(parts)


def encode_column(name: str, value: Value) -> bytes:
    """The bytes of one column in a serialised Example, for `with_column`."""
    record = encode_example({name: value})
    return record[_varint_at(record, 1)[1] :]


def with_column(record: bytes, name: str, column: bytes) -> bytes:
    """A serialised Example with one column more, as `encode_column` gives it; all bytes of the others stay.

    Columns that are in the order of `encode_example` stay so. Raises ValueError where the record has the column
    already, or isn't an Example.
    """
    try:
        start, place = _place_for(record, name.encode())
    except (_OddError, IndexError):  # of two messages one behind the other, protobuf makes one
        if name in decode_example(record):
            raise ValueError(f"it has a column {name!r} already") from None
        return record + b"\n" + _varint(len(column)) + column
    head = b"\n" + _varint(len(record) - start + len(column))
    return b"".join((head, record[start:place], column, record[place:]))


class _OddError(Exception):
    """A record in a form that no library writes by itself."""


def _place_for(record: bytes, name: bytes) -> tuple[int, int]:
    """Where a record's columns begin, and where the column `name` belongs among them."""
    if not record:
        return 0, 0
    length, start = _varint_at(record, 1)
    position, place, key = start, len(record), name + b"\xff"
    if record[0] != _FIRST or start + length != place:
        raise _OddError
    while position < len(record):
        size, entry = _varint_at(record, position + 1)
        length, first = _varint_at(record, entry + 1)
        found = record[first : first + length]
        if record[position] != _FIRST or record[entry] != _FIRST or entry + size > len(record):
            raise _OddError
        if found == name:
            raise ValueError(f"it has a column {name.decode()!r} already")
        if found + b"\xff" > key:
            place = min(place, position)
        position = entry + size
    return start, place


def _varint_at(data: bytes, position: int) -> tuple[int, int]:
    """The number that `_varint` wrote at a position, and where it ends."""
    number = shift = 0
    while True:
        byte = data[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, position
        shift += 7


@lru_cache(maxsize=1 << 10)
def _in_order(names: tuple[str, ...]) -> list[str]:
    """The names as protobuf's upb sorts a map's keys: by their bytes, but a name after those that begin with it."""
    return sorted(names, key=lambda name: name.encode() + b"\xff")


@lru_cache(maxsize=1 << 14)
def _head(name: str, tag: bytes, size: int, more: int = 0) -> bytes:
    """What stands before `size` bytes of a list's values: an entry of the map `Features.feature`, its key, the list.

    Numbers are packed, so their `size` is that of all values. Of text it is that of the first; `more` counts the rest.
    """
    key = name.encode()
    values = b"\n" + _varint(size)
    size += more
    feature = tag + _varint(len(values) + size) + values
    entry = b"\n" + _varint(len(key)) + key + b"\x12" + _varint(len(feature) + size) + feature
    return b"\n" + _varint(len(entry) + size) + entry


def _list_entry(name: str, value: Any) -> tuple[bytes, ...]:
    """The entry of the rarer kinds: lists, and scalars of NumPy."""
    values = value if isinstance(value, (list, tuple, np.ndarray)) else [value]
    kinds = {_list_name(item) for item in values}
    if kinds == {"int64_list", "float_list"}:
        kinds = {"float_list"}
    if not kinds:
        entry = b"\n" + _varint(len(name.encode())) + name.encode() + b"\x12\0"
        return (b"\n" + _varint(len(entry)), entry)
    if len(kinds) > 1 or None in kinds:
        raise TypeError(f"column {name!r} holds {sorted({type(item).__name__ for item in values})}, not one plain type")
    if kinds == {"bytes_list"}:
        items = [item.encode() if isinstance(item, str) else item for item in values]
        first, rest = items[0], b"".join(b"\n" + _varint(len(item)) + item for item in items[1:])
        return (_head(name, _BYTES_LIST, len(first), len(rest)), first, rest)
    if kinds == {"int64_list"}:
        data = b"".join(_integer(int(item)) for item in values)
        return (_head(name, _INT64_LIST, len(data)), data)
    data = b"".join(_float(float(item)) for item in values)
    return (_head(name, _FLOAT_LIST, len(data)), data)


def _varint(number: int) -> bytes:
    """An unsigned number in groups of seven bits, the lowest first."""
    if number < 0x80:
        return _ONE_BYTE[number]
    groups = bytearray()
    while number >= 0x80:
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    groups.append(number)
    return bytes(groups)


def _integer(number: int) -> bytes:
    if not -_INT_END <= number < _INT_END:
        raise ValueError(f"{number} is beyond the range of int64")
    return _varint(number & 0xFFFFFFFFFFFFFFFF)


def _float(number: float) -> bytes:
    try:
        return _FLOAT.pack(number)
    except OverflowError:
        return _FLOAT.pack(math.copysign(math.inf, number))


def _list_name(item: Any) -> str | None:
    if isinstance(item, (bytes, str)):
        return "bytes_list"
    if isinstance(item, (bool, int, np.bool_, np.integer)):
        return "int64_list"
    return "float_list" if isinstance(item, (float, np.floating)) else None


def decode_example(record: bytes, keys: Iterable[str] | None = None) -> dict[str, list[Any]]:
    """Each key's values as a list of bytes, int or float; [] for a key without a type.

    With `keys`, those alone, and a key that is absent is left out: a loader that wants the image and the caption need
    not unpack fifteen columns. Raises ValueError when the bytes are no Example.
    """
    example = _Example()
    try:
        example.ParseFromString(record)
    except message.DecodeError as error:
        raise ValueError(f"not a tf.train.Example ({error})") from error
    feature = example.features.feature
    names = feature if keys is None else [key for key in keys if key in feature]
    return {name: _values(feature[name]) for name in names}


def _values(feature: Any) -> list[Any]:
    kind = feature.WhichOneof("kind")
    return [] if kind is None else list(getattr(feature, kind).value)
