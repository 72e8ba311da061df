"""Read the tars that img2dataset's webdataset writer leaves: KEY.jpg, KEY.txt and KEY.json, one after the other.

The headers are parsed here because the standard library's `tarfile` and `webdataset` spend 300 to 400 µs on a sample
of 34 KB, four times what the whole of a build may take; this reader spends about 40. It knows plain, GNU (long names)
and POSIX (pax) archives, checks each header's checksum, and takes the end of the file for the end of the archive only
where the archive says so: a tar that a killed download left must not pass for a small one.
"""

import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clipkit.errors import UserError
from clipkit.tfrecord_tools.sample import BAD_METADATA, BAD_TEXT, DROPPED_COLUMNS, NO_IMAGE, Sample

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"})

_BLOCK = 512
_CHUNK_BYTES = 1 << 18  # read at once; larger ones leave the processor's cache before they are looked at


def read_tar(path: Path, start: int = 0, stop: int | None = None) -> Iterator[Sample]:
    """The samples of a tar whose first header lies in bytes [start, stop), in order; stop None is the archive's end.

    Members of one key must follow each other, as webdataset has it. Those that are neither image, txt nor json are left
    out. Raises UserError naming the file and the byte when the archive is cut off or damaged; what lies beyond the
    range is not looked at, and of what lies before it the headers alone.
    """
    key: str | None = None
    first = 0
    members: dict[str, bytes] = {}
    for offset, name, data in read_members(path, start):
        folder, _, base = name.rpartition("/")
        stem, dot, suffix = base.partition(".")
        if not stem or not dot:
            continue
        if folder:
            stem = f"{folder}/{stem}"
        suffix = suffix.lower()
        if stem != key or suffix in members:
            if key is not None and first >= start:
                yield _sample(key, members)
            if stop is not None and offset >= stop:
                return
            key, first, members = stem, offset, {}
        members[suffix] = data
    if key is not None and first >= start:
        yield _sample(key, members)


def _sample(key: str, members: dict[str, bytes]) -> Sample:
    image = next((data for suffix, data in members.items() if suffix in IMAGE_SUFFIXES), None)
    try:
        columns = json.loads(members["json"]) if "json" in members else {}
        if not isinstance(columns, dict):
            return Sample(key, image, None, {}, BAD_METADATA)
    except ValueError:
        return Sample(key, image, None, {}, BAD_METADATA)
    try:
        caption = _caption(members.get("txt"), columns)
    except UnicodeDecodeError:
        return Sample(key, image, None, {}, BAD_TEXT)
    for name in DROPPED_COLUMNS:
        columns.pop(name, None)
    if "key" not in columns:
        columns["key"] = key.rpartition("/")[2]
    return Sample(key, image, caption, columns, NO_IMAGE if image is None else None)


def _caption(text: bytes | None, columns: dict[str, Any]) -> str | None:
    """The txt member, or the metadata's caption. A null caption there means "", though img2dataset may write "nan"."""
    absent = "caption" not in columns
    caption = columns.pop("caption", None)
    if not absent and (caption is None or caption != caption):
        return ""
    if text is not None:
        return text.decode("utf-8")
    return None if absent else str(caption)


def read_members(path: Path, start: int = 0) -> Iterator[tuple[int, str, bytes]]:
    """Each regular file of an uncompressed tar: the offset of its first header, its name, its contents.

    Of what begins before byte `start` the headers alone are read, and the contents given as empty.
    """
    # One long loop with the chunk in local variables: calls would cost more than what they did.
    with path.open("rb", buffering=0) as file:
        descriptor = file.fileno()
        chunk, base = b"", 0
        offset = first = 0
        name: str | None = None
        size: int | None = None
        while True:
            skipping = first < start
            at = offset - base
            if at + _BLOCK > len(chunk):
                chunk, base, at = os.pread(descriptor, _BLOCK if skipping else _CHUNK_BYTES, offset), offset, 0
            header = chunk[at : at + _BLOCK]
            if len(header) == _BLOCK and header[0] == 0 and not any(header):
                return
            stored = _checked_size(header, offset, path)
            kind = header[156:157]
            extends = kind in b"xL"
            if size is not None and not extends:
                stored = size
            data = b""
            if extends or (kind in b"0\x007" and not skipping):
                at += _BLOCK
                if at + stored > len(chunk):
                    base, at = offset + _BLOCK, 0
                    chunk = os.pread(descriptor, stored if skipping else max(stored, _CHUNK_BYTES), base)
                data = chunk[at : at + stored]
                if len(data) < stored:
                    raise _damaged(path, offset, "it ends inside a member")
            if not extends:
                if kind in b"0\x007":
                    yield first, name or _name(header), data
                if kind != b"g":
                    name = size = None
            elif kind == b"L":
                name = data.rstrip(b"\0").decode("utf-8", "replace")
            elif b" path=" in data or b" size=" in data:
                try:
                    name, size = _pax(data, name, size)
                except ValueError:
                    raise _damaged(path, offset, "a pax header isn't well formed") from None
            offset += _BLOCK + stored + -stored % _BLOCK
            if not extends:
                first = offset


def _checked_size(header: bytes, offset: int, path: Path) -> int:
    """The size in a header whose checksum is right."""
    if len(header) < _BLOCK:
        raise _damaged(path, offset, "it ends without an end mark" if not header else "it ends inside a header")
    field = header[148:156]
    try:
        if field[6:] != b"\0 ":
            raise ValueError
        wanted, size = int(field[:6], 8), int(header[124:135], 8)  # as nearly all writers have it
    except ValueError:
        wanted, size = _number(field, offset, path), _number(header[124:136], offset, path)
    # A header's checksum is the sum of its bytes, its own eight counted as spaces. Adler-32 holds 1 + that sum, modulo
    # 65521, in its low half, thirty times faster than sum().
    if (wanted - 8 * 32 + sum(field) + 1) % 65521 != zlib.adler32(header) & 0xFFFF:
        raise _damaged(path, offset, "a header's checksum doesn't match")
    return size


def _number(field: bytes, offset: int, path: Path) -> int:
    if field[0] & 0x80:  # GNU's base 256, for sizes over 8 GiB
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.strip(b"\0 ") or b"0", 8)
    except ValueError:
        raise _damaged(path, offset, "a header holds no number where one belongs") from None


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name.decode("utf-8", "replace")


def _pax(data: bytes, name: str | None, size: int | None) -> tuple[str | None, int | None]:
    """The path and size that a pax header sets; its records are "LENGTH KEY=VALUE\\n". ValueError when they aren't."""
    while b" path=" in data or b" size=" in data:
        length, _, rest = data.partition(b" ")
        end = int(length) - len(length) - 1
        if end < 1 or rest[end - 1 : end] != b"\n":
            raise ValueError(f"a record of {end} bytes")
        keyword, _, value = rest[:end].rstrip(b"\n").partition(b"=")
        if keyword == b"path":
            name = value.decode("utf-8", "replace")
        elif keyword == b"size":
            size = int(value)
            if size < 0:
                raise ValueError(f"a size of {size}")
        data = rest[end:]
    return name, size


def _damaged(path: Path, offset: int, reason: str) -> UserError:
    return UserError(
        f"{path}: damaged tar at byte {offset}, {reason}: remove this shard and run clipkit download again, "
        "then the same build-tfds command"
    )
