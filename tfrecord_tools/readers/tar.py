"""Read the tars that img2dataset's webdataset writer leaves: KEY.jpg, KEY.txt and KEY.json, one after the other.

The standard library's `tarfile` and `webdataset` spend 300 to 400 µs on a sample of 34 KB, four times what the whole of
a build may take; this reader spends about 20. What it takes for an archive, and what for a damaged one, is
`clipkit.formats.tar`'s.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clipkit.errors import UserError
from clipkit.formats.tables import IMAGE_SUFFIXES
from clipkit.formats.tar import BLOCK, TarError, read_headers, split_name
from clipkit.tfrecord_tools.reasons import BAD_METADATA, BAD_TEXT, NO_IMAGE
from clipkit.tfrecord_tools.sample import DROPPED_COLUMNS, Sample

_CHUNK_BYTES = 1 << 18  # read at once; larger ones leave the processor's cache before they are looked at


def read_tar(path: Path, start: int = 0, stop: int | None = None) -> Iterator[Sample]:
    """The samples of a tar whose first header lies in bytes [start, stop), in order; stop None is the archive's end.

    Members of one key must follow each other, as webdataset has it. Those that are neither image, txt nor json are left
    out. Raises UserError naming the file and the byte when the archive is cut off or damaged; what lies beyond the
    range is not looked at, and of what lies before it only the headers.
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

    Of what begins before byte `start` only the headers are read, and the contents given as empty.
    """
    with path.open("rb", buffering=0) as file:
        descriptor = file.fileno()
        chunk, base = b"", 0

        def read(offset: int, length: int) -> bytes:
            nonlocal chunk, base
            at = offset - base
            if at < 0 or at + length > len(chunk):
                chunk = os.pread(descriptor, max(length, BLOCK if offset < start else _CHUNK_BYTES), offset)
                base, at = offset, 0
            return chunk[at : at + length]

        try:
            for first, name, begin, size in read_headers(read, path):
                data = read(begin, size) if first >= start else b""
                if first >= start and len(data) < size:
                    raise TarError(path, first, "it ends inside a member")
                yield first, name, data
        except TarError as error:
            raise UserError(
                f"{path}: damaged tar at byte {error.offset}, {error.reason}: remove this shard and run clipkit "
                "download again, then the same build-tfds command"
            ) from None
