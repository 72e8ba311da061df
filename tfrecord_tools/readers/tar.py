"""Read the tars that img2dataset's webdataset writer leaves: KEY.jpg, KEY.txt and KEY.json, one after the other.

The headers are parsed here because the standard library's `tarfile` and `webdataset` spend 300 to 400 µs on a sample
of 34 KB, four times what the whole of a build may take; this reader spends about 40. What it takes for an archive, and
what for a damaged one, is `clipkit.formats.tar`'s.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clipkit.errors import UserError
from clipkit.formats.tables import IMAGE_SUFFIXES
from clipkit.formats.tar import BLOCK as _BLOCK
from clipkit.formats.tar import TarError, header_name, header_size, read_pax, split_name
from clipkit.tfrecord_tools.reasons import BAD_METADATA, BAD_TEXT, NO_IMAGE
from clipkit.tfrecord_tools.sample import DROPPED_COLUMNS, Sample

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
        parts = split_name(name)
        if parts is None:
            continue
        stem, suffix = parts
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
            try:
                stored = header_size(header, offset, path)
            except TarError as error:
                raise _damaged(path, offset, error.reason) from None
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
                    yield first, name or header_name(header), data
                if kind != b"g":
                    name = size = None
            elif kind == b"L":
                name = data.rstrip(b"\0").decode("utf-8", "replace")
            elif b" path=" in data or b" size=" in data:
                try:
                    name, size = read_pax(data, name, size)
                except ValueError:
                    raise _damaged(path, offset, "a pax header isn't well formed") from None
            offset += _BLOCK + stored + -stored % _BLOCK
            if not extends:
                first = offset


def _damaged(path: Path, offset: int, reason: str) -> UserError:
    return UserError(
        f"{path}: damaged tar at byte {offset}, {reason}: remove this shard and run clipkit download again, "
        "then the same build-tfds command"
    )
