"""TFRecord files and `tf.train.Example` messages without TensorFlow.

TensorFlow must never enter a process that trains, and its import costs seconds and half a gigabyte; the two formats are
small enough to be ours. A record is framed as TensorFlow's `record_writer.h` says, all numbers little-endian:

    uint64 length | uint32 masked CRC32C of the length | length bytes | uint32 masked CRC32C of the bytes

The messages are those of `tensorflow/core/example/{example,feature}.proto`. Their descriptors are made here and live in
a pool of their own, so that TensorFlow, which registers the same names in the default pool, can be imported beside us.
"""

import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import google_crc32c
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

from clipkit.errors import UserError

HEADER_BYTES = 12
FOOTER_BYTES = 4

Value = bytes | str | int | float | Sequence[bytes | str | int | float] | None

_LENGTH = struct.Struct("<Q")
_CRC = struct.Struct("<I")
_HEADER = struct.Struct("<QI")
# One system call for many small records, without a copy of large ones (the buffer is passed by when a record fills it).
_BUFFER_BYTES = 1 << 20


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
    after each write.
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
        framed = b"".join((length, _CRC.pack(masked_crc32c(length)), record, _CRC.pack(masked_crc32c(record))))
        self._file.write(framed)
        self.checksum = google_crc32c.extend(self.checksum, framed)
        self.records += 1
        self.bytes += len(framed)
        return offset

    def flush(self) -> None:
        """Hand what was written to the operating system, for a reader that follows the file."""
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_records(path: Path, check: bool = True) -> Iterator[bytes]:
    """The records of a file in order, read once from front to back.

    `check=False` leaves out the CRC of the contents; the length's CRC is always checked, else a damaged length would
    ask for any amount of memory. Raises RecordError at the first record that is cut off or damaged.
    """
    with path.open("rb", buffering=_BUFFER_BYTES) as file:
        size = os.fstat(file.fileno()).st_size
        offset = 0
        while offset < size:
            length = _record_length(file.read(HEADER_BYTES), offset, size, path)
            framed = file.read(length + FOOTER_BYTES)
            if len(framed) < length + FOOTER_BYTES:
                raise RecordError(path, offset, "the file ends inside a record")
            yield _checked(framed[:length], framed[length:], offset, path) if check else framed[:length]
            offset += HEADER_BYTES + length + FOOTER_BYTES


def unframe(framed: bytes, offset: int, path: Path | str) -> bytes:
    """The contents of exactly one framed record that was read from byte `offset` of `path`, CRC checked."""
    length = _record_length(framed[:HEADER_BYTES], offset, offset + len(framed), path)
    return _checked(framed[HEADER_BYTES : HEADER_BYTES + length], framed[-FOOTER_BYTES:], offset, path)


def index_records(path: Path) -> np.ndarray:
    """Byte offsets of all records, uint64[n], from the headers alone: contents are neither read nor checked."""
    offsets = []
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        descriptor, offset = file.fileno(), 0
        while offset < size:
            length = _record_length(os.pread(descriptor, HEADER_BYTES, offset), offset, size, path)
            offsets.append(offset)
            offset += HEADER_BYTES + length + FOOTER_BYTES
    return np.array(offsets, dtype=np.uint64)


def _record_length(header: bytes, offset: int, size: int, path: Path | str) -> int:
    if len(header) < HEADER_BYTES:
        raise RecordError(path, offset, "the file ends inside a record's header")
    length, crc = _HEADER.unpack(header)
    if masked_crc32c(header[:8]) != crc:
        raise RecordError(path, offset, "the checksum of a record's length doesn't match")
    if offset + HEADER_BYTES + length + FOOTER_BYTES > size:
        raise RecordError(path, offset, "the file ends inside a record")
    return int(length)


def _checked(record: bytes, footer: bytes, offset: int, path: Path | str) -> bytes:
    if masked_crc32c(record) != _CRC.unpack(footer)[0]:
        raise RecordError(path, offset, "the checksum of a record's contents doesn't match")
    return record


def _example_class() -> Any:
    """The message class of `tf.train.Example`; Any because its fields exist at run time alone."""
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="clipkit/example.proto", package="tensorflow", syntax="proto3")
    lists = {"BytesList": field.TYPE_BYTES, "FloatList": field.TYPE_FLOAT, "Int64List": field.TYPE_INT64}
    for name, scalar in lists.items():
        values = file.message_type.add(name=name)
        values.field.add(name="value", number=1, type=scalar, label=field.LABEL_REPEATED)
    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, name in enumerate(lists, start=1):
        feature.field.add(
            name=name.replace("List", "_list").lower(),
            number=number,
            type=field.TYPE_MESSAGE,
            label=field.LABEL_OPTIONAL,
            type_name=f".tensorflow.{name}",
            oneof_index=0,
        )
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL)
    _add_message_field(entry, "value", 2, "Feature")
    _add_message_field(features, "feature", 1, "Features.FeatureEntry").label = field.LABEL_REPEATED
    _add_message_field(file.message_type.add(name="Example"), "features", 1, "Features")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tensorflow.Example"))


def _add_message_field(
    owner: descriptor_pb2.DescriptorProto, name: str, number: int, kind: str
) -> descriptor_pb2.FieldDescriptorProto:
    field = descriptor_pb2.FieldDescriptorProto
    return owner.field.add(
        name=name, number=number, type=field.TYPE_MESSAGE, label=field.LABEL_OPTIONAL, type_name=f".tensorflow.{kind}"
    )


_Example = _example_class()


def encode_example(columns: Mapping[str, Value]) -> bytes:
    """A serialised `tf.train.Example`; equal columns give equal bytes, whatever their order.

    bytes and str (as UTF-8) become bytes_list, bool and int int64_list, float float_list (32 bits, as the format has
    it); a list takes the type of its items, and ints among floats are floats. None leaves the key out; an empty list
    leaves a key without a type. Raises TypeError for anything else and ValueError for ints beyond 64 bits.
    """
    example = _Example()
    feature = example.features.feature
    for name, value in columns.items():
        kind = type(value)
        if kind is bytes:
            feature[name].bytes_list.value.append(value)
        elif isinstance(value, str):
            feature[name].bytes_list.value.append(value.encode())
        elif kind is int:
            feature[name].int64_list.value.append(value)
        elif kind is float:
            feature[name].float_list.value.append(value)
        elif value is not None:
            _set_values(feature[name], name, value)
    encoded: bytes = example.SerializeToString(deterministic=True)
    return encoded


def _set_values(feature: Any, name: str, value: Any) -> None:
    """The rarer kinds: lists, and scalars of NumPy and bool."""
    values = value if isinstance(value, (list, tuple, np.ndarray)) else [value]
    kinds = {_list_name(item) for item in values}
    if kinds == {"int64_list", "float_list"}:
        kinds = {"float_list"}
    if not kinds:
        feature.SetInParent()
    elif len(kinds) > 1 or None in kinds:
        raise TypeError(f"column {name!r} holds {sorted({type(item).__name__ for item in values})}, not one plain type")
    elif kinds == {"bytes_list"}:
        feature.bytes_list.value.extend(item.encode() if isinstance(item, str) else item for item in values)
    elif kinds == {"int64_list"}:
        feature.int64_list.value.extend(int(item) for item in values)
    else:
        feature.float_list.value.extend(float(item) for item in values)


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
