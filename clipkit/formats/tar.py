"""The headers of uncompressed tars, and where the members of each sample of a webdataset stand.

It knows plain, GNU (long names) and POSIX (pax) archives, checks each header's checksum, and takes the end of the file
for the end of the archive only where the archive says so: a tar that a killed download left must not pass for a small
one. Tars joined by `cat` are read to the end of the last.
"""

import os
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from clipkit.errors import UserError
from clipkit.formats.tables import IMAGE_SUFFIXES, is_hidden

BLOCK = 512

# Where a sample begins, and from there its members: offset and size, 0 and 0 for one that isn't there.
INDEX_DTYPE = np.dtype(
    [
        ("start", "<u8"),
        ("image", "<u4"),
        ("image_bytes", "<u4"),
        ("txt", "<u4"),
        ("txt_bytes", "<u4"),
        ("json", "<u4"),
        ("json_bytes", "<u4"),
    ]
)

Read = Callable[[int, int], bytes]
Content = TypeVar("Content")


class TarError(UserError):
    """A tar that is cut off or damaged."""

    def __init__(self, path: Path | str, offset: int, reason: str) -> None:
        super().__init__(f"{path}: damaged tar at byte {offset}, {reason}: fetch it again or remove it")
        self.path, self.offset, self.reason = path, offset, reason

    def __reduce__(self) -> tuple[type["TarError"], tuple[Path | str, int, str]]:
        return TarError, (self.path, self.offset, self.reason)  # so that it crosses from a worker process


class Member(NamedTuple):
    """A regular file of a tar. `first` is the byte of its first header, `start` that of its contents."""

    first: int
    name: str
    start: int
    size: int


def read_headers(read: Read, path: Path | str) -> Iterator[Member]:
    """The regular files of a tar, in order; contents are not read.

    `read(offset, length)` gives bytes of it, fewer at its end. Raises TarError naming `path` where it is damaged, and
    where something else than another tar stands behind an end mark.
    """
    offset = first = 0
    name: str | None = None
    size: int | None = None
    while True:
        header = read(offset, BLOCK)
        if len(header) == BLOCK and header[0] == 0 and not any(header):
            offset = first = _behind_zeros(read, offset + BLOCK)
            header = read(offset, BLOCK)
            if not any(header):
                return
            try:
                header_size(header, offset, path)
            except TarError:
                raise TarError(path, offset, "what follows its end mark is not another tar") from None
        stored = header_size(header, offset, path)
        kind = header[156:157]
        extends = kind in b"xL"
        if extends:
            data = read(offset + BLOCK, stored)
            if len(data) < stored:
                raise TarError(path, offset, "it ends inside a member")
            if kind == b"L":
                name = data.rstrip(b"\0").decode("utf-8", "replace")
            else:
                try:
                    name, size = read_pax(data, name, size)
                except ValueError:
                    raise TarError(path, offset, "a pax header isn't well formed") from None
        else:
            stored = stored if size is None else size
            if kind in b"0\x007":
                yield Member(first, name or header_name(header), offset + BLOCK, stored)
            if kind != b"g":
                name = size = None
        offset += BLOCK + stored + -stored % BLOCK
        if not extends:
            first = offset


def _behind_zeros(read: Read, offset: int) -> int:
    """The first block at or behind `offset` that isn't all zeros, or the end."""
    while (block := read(offset, BLOCK)) and not any(block):
        offset += len(block)
    return offset


# ---- Samples ---------------------------------------------------------------------------------------------------------


class SampleNames:
    """How a tar's names are told apart into the key of a sample and a suffix, and whether its members stand together.

    webdataset ends the key at the first dot, so that `7.seg.png` belongs to `7`. Others write `St. Anna 1.0.jpg` and
    end it at the last. Where a name has several dots, that rule holds for the tar by which more samples are complete.
    """

    def __init__(self, path: Path | str, names: Callable[[], Iterable[str]]) -> None:
        """`names` gives all names of the tar; they are only gone through where one name isn't enough."""
        self.path, self.names = path, names
        self.split: Callable[[str], tuple[str, str] | None] = split_name
        self.decided = False
        self.apart: set[str] | None = None

    def __call__(self, name: str) -> tuple[str, str] | None:
        """The key and the suffix in lower case; None for a file of another kind."""
        return self.rule_for(name)(name)

    def rule_for(self, name: str) -> Callable[[str], tuple[str, str] | None]:
        """What splits a name with another number of dots than one: into key and suffix, None for another kind."""
        if not self.decided and name.rpartition("/")[2].strip(".").count(".") > 1:
            self.decided = True
            names = list(self.names())
            if _complete(names, _split_at_last_dot) > _complete(names, split_name):
                self.split = _split_at_last_dot
        return self.split

    def end(self, key: str, suffixes: Collection[str]) -> None:
        """A sample ends, with these members. Raises UserError when its image stands elsewhere in the tar."""
        if not IMAGE_SUFFIXES.isdisjoint(suffixes):
            return
        if self.apart is None:
            self.apart = _apart(filter(None, map(self.split, self.names())))
        if key in self.apart:
            raise UserError(
                f"{self.path}: the members of sample {key} don't stand beside each other: sort the tar by name "
                "(unpack it, then tar --sort=name -cf)"
            )


def group_samples(
    members: Iterable[tuple[int, str, Content]], names: SampleNames, stop: int | None = None
) -> Iterator[tuple[str, int, dict[str, Content]]]:
    """Key, first byte and members by suffix of each sample that begins before byte `stop`; None is the tar's end.

    `members` are the first byte, the name and the contents (or their place) of each. Those of one key must follow each
    other, as webdataset has it, or UserError is raised; those of another kind than `names` knows are left out.
    """
    split = names.split
    key: str | None = None
    first = 0
    found: dict[str, Content] = {}
    for offset, name, content in members:
        if name.count(".") != 1:
            split = names.rule_for(name)
        parts = split(name)
        if parts is None:
            continue
        stem, suffix = parts
        if stem != key or suffix in found:
            if key is not None:
                names.end(key, found)
                yield key, first, found
            if stop is not None and offset >= stop:
                return
            key, first, found = stem, offset, {}
        found[suffix] = content
    if key is not None:
        names.end(key, found)
        yield key, first, found


def _whole_members(read: Read, path: Path | str, size: int) -> Iterator[Member]:
    """The regular files of a tar of `size` bytes. Raises TarError for one that goes on behind the end."""
    for member in read_headers(read, path):
        if member.start + member.size > size:
            raise TarError(path, member.first, "it ends inside a member")
        yield member


def list_samples(path: Path) -> dict[str, dict[str, Member]]:
    """The members of each sample of a local tar by suffix, in the order of their first. Raises TarError.

    Raises UserError for a tar that holds one twice.
    """
    samples: dict[str, dict[str, Member]] = {}
    with path.open("rb") as file:

        def read(offset: int, length: int) -> bytes:
            return os.pread(file.fileno(), length, offset)

        split = SampleNames(path, lambda: (member.name for member in read_headers(read, path)))
        for member in _whole_members(read, path, path.stat().st_size):
            if parts := split(member.name):
                members = samples.setdefault(parts[0], {})
                if parts[1] in members:
                    raise UserError(f"{path} holds the sample {parts[0]} twice: give each sample a name of its own")
                members[parts[1]] = member
    return samples


def read_members(members: Iterable[tuple[Path, Member]]) -> Iterator[bytes]:
    """The contents of members of local tars; those of one tar should stand together."""
    for path, group in groupby(members, key=itemgetter(0)):
        with path.open("rb") as file:
            for _, member in group:
                file.seek(member.start)
                yield file.read(member.size)


def _apart(parts: Iterable[tuple[str, str]]) -> set[str]:
    """The keys whose members stand in several places, each with other suffixes."""
    found: dict[str, set[str]] = {}
    apart = set()
    for key, group in groupby(parts, key=itemgetter(0)):
        suffixes = {suffix for _, suffix in group}
        if key in found and not found[key] & suffixes:
            apart.add(key)
        found.setdefault(key, set()).update(suffixes)
    return apart


def split_name(name: str) -> tuple[str, str] | None:
    """The key and suffix of a member by webdataset's rule, at the first dot."""
    folder, _, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    if not stem or not dot:
        return None
    return f"{folder}/{stem}" if folder else stem, suffix.lower()


def _split_at_last_dot(name: str) -> tuple[str, str] | None:
    stem, dot, suffix = name.rpartition(".")
    return (stem, suffix.lower()) if dot and not is_hidden(name.rpartition("/")[2]) and "/" not in suffix else None


def _complete(names: Iterable[str], split: Callable[[str], tuple[str, str] | None]) -> int:
    """How many samples have an image and a text or a label by a rule."""
    suffixes: dict[str, set[str]] = {}
    for key, suffix in filter(None, map(split, names)):
        suffixes.setdefault(key, set()).add(suffix)
    return sum(bool(found & IMAGE_SUFFIXES and found & {"txt", "json", "cls"}) for found in suffixes.values())


def index_tar(read: Read, path: Path | str, size: int) -> np.ndarray:
    """One row of INDEX_DTYPE for each sample of a tar of `size` bytes. Raises TarError where it is damaged.

    The members of a sample are those of `group_samples`; of these image, txt and json are kept. A sample's bytes end
    where the next one begins, at the latest.
    """
    rows: list[tuple[int, ...]] = []
    names = SampleNames(path, lambda: (member.name for member in read_headers(read, path)))
    members = ((each.first, each.name, (each.start, each.size)) for each in _whole_members(read, path, size))
    for _, first, found in group_samples(members, names):
        absent = (first, 0)
        image = next((place for suffix, place in found.items() if suffix in IMAGE_SUFFIXES), absent)
        places = (image, found.get("txt", absent), found.get("json", absent))
        row = [number for start, length in places for number in (start - first, length)]
        if max(row) >= 1 << 32:
            raise TarError(path, first, "a sample takes more than 4 GiB")
        rows.append((first, *row))
    return np.array(rows, INDEX_DTYPE)


def header_size(header: bytes, offset: int, path: Path | str) -> int:
    """The size in a header, once its checksum is found right. Raises TarError otherwise."""
    if len(header) < BLOCK:
        raise TarError(path, offset, "it ends without an end mark" if not header else "it ends inside a header")
    field = header[148:156]
    try:
        if field[6:] != b"\0 ":
            raise ValueError
        wanted, size = int(field[:6], 8), int(header[124:135], 8)  # as nearly all writers have it
    except ValueError:
        wanted = header_number(field, offset, path)
        size = header_number(header[124:136], offset, path)
    # A header's checksum is the sum of its bytes, its own eight counted as spaces. Adler-32 holds 1 + that sum, modulo
    # 65521, in its low half, thirty times faster than sum().
    if (wanted - 8 * 32 + sum(field) + 1) % 65521 != zlib.adler32(header) & 0xFFFF:
        raise TarError(path, offset, "a header's checksum doesn't match")
    return size


def header_number(field: bytes, offset: int, path: Path | str) -> int:
    """A number in a header: octal, or GNU's base 256. Raises TarError when it is none."""
    if field[0] & 0x80:  # GNU's base 256, for sizes over 8 GiB
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.strip(b"\0 ") or b"0", 8)
    except ValueError:
        raise TarError(path, offset, "a header holds no number where one belongs") from None


def header_name(header: bytes) -> str:
    """The name in a header, as plain and POSIX archives have it."""
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name.decode("utf-8", "replace")


def read_pax(data: bytes, name: str | None, size: int | None) -> tuple[str | None, int | None]:
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
