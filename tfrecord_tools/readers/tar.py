"""Read the tars that img2dataset's webdataset writer leaves: KEY.jpg, KEY.txt and KEY.json, one after the other.

The standard library's `tarfile` and `webdataset` spend 300 to 400 µs on a sample of 34 KB, four times what the whole of
a build may take; this reader spends about 20. What it takes for an archive, and what for a damaged one, is
`clipkit.formats.tar`'s.
"""

import json
import os
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path

from clipkit.errors import UserError
from clipkit.formats.captions import CaptionChoice, merge_captions
from clipkit.formats.kinds import own_name
from clipkit.formats.tables import IMAGE_SUFFIXES, with_writable_names
from clipkit.formats.tar import BLOCK, SampleNames, TarError, group_samples, read_headers
from clipkit.tfrecord_tools.reasons import BAD_METADATA, BAD_TEXT, NO_IMAGE
from clipkit.tfrecord_tools.sample import Sample, drop_account, samples_of

_CHUNK_BYTES = 1 << 18  # read at once; larger ones leave the processor's cache before they are looked at
_NOTHING = 1 << 62  # a start beyond every end: only headers are read


def read_tar(
    path: Path, start: int = 0, stop: int | None = None, captions: CaptionChoice | None = None
) -> Iterator[Sample]:
    """The samples of a tar whose first header lies in bytes [start, stop), in order; stop None is the archive's end.

    Members of one key must follow each other, as webdataset has it. Those that are neither image, txt nor json are left
    out. `captions` says which of several are taken. Raises UserError naming the file and the byte when the archive is
    cut off or damaged; what lies beyond the range is not looked at, and of what lies before it only the headers.
    """
    names = SampleNames(path, lambda: (name for _, name, _ in read_members(path, _NOTHING)))
    for key, first, members in group_samples(read_members(path, start), names, stop):
        if first >= start:
            yield from _samples(key, members, captions, path)


def _samples(key: str, members: dict[str, bytes], captions: CaptionChoice | None, path: Path) -> tuple[Sample, ...]:
    image = next((data for suffix, data in members.items() if suffix in IMAGE_SUFFIXES), None)
    try:
        columns = json.loads(members["json"]) if "json" in members else {}
        if not isinstance(columns, dict):
            return (Sample(key, image, None, {}, BAD_METADATA),)
        columns = with_writable_names(columns, members.get("json", b""))
    except (ValueError, RecursionError):
        return (Sample(key, image, None, {}, BAD_METADATA),)
    try:
        text = members["txt"].removeprefix(BOM_UTF8).decode("utf-8") if "txt" in members else None
    except UnicodeDecodeError:
        return (Sample(key, image, None, {}, BAD_TEXT),)
    caption = merge_captions(text, columns)
    drop_account(columns)
    if own_name(columns, "key") not in columns:
        columns["key"] = key.rpartition("/")[2]
    return samples_of(Sample(key, image, caption, columns, NO_IMAGE if image is None else None), captions, path)


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
