"""The list of what is to be removed: its file, its column, and its form of 16 bytes an entry (`tables.digests`)."""

import re
import sys
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from clipkit.errors import UserError
from clipkit.formats.features import Feature
from clipkit.formats.shards import note_beside_tables
from clipkit.formats.tables import KEY_NAME, URL_NAME, find_tables, read_columns, read_schema
from clipkit.formats.text_file import BOM, Quoting, open_bytes, refuse_utf16
from clipkit.storage.files import local_copy, require_file
from clipkit.tfrecord_tools.tables.digests import READ_BYTES, UInt64Array, digests, sha256_of, value_bytes

# Hashes in hexadecimal: which of these a column is, its name says. All can be computed from the stored image.
HASHES = {"sha256": 64, "md5": 32, "sha1": 40, "sha512": 128}
# What says which record is meant; other columns take part only when --by names them.
IDENTITIES = (URL_NAME, KEY_NAME, *HASHES)
LINES = 10_000


@dataclass(frozen=True)
class RemovalList:
    """A list and how it is read: `by` is the dataset's column or a hash, `column` the list's, None for plain lines.

    `numbers` is whether the dataset's column holds whole numbers. `sha256` is that of the bytes of its files, one after
    the other.
    """

    path: Path
    files: tuple[Path, ...]
    by: str
    column: str | None
    numbers: bool
    sha256: str
    quoting: Quoting = "auto"


def hash_named(by: str) -> str | None:
    """The hash that a column of this name holds, or None."""
    return by.lower() if by.lower() in HASHES else None


def open_list(path: Path, by: str | None, features: Mapping[str, Feature], quoting: Quoting = "auto") -> RemovalList:
    """Find out what a list holds: a table (parquet, CSV, TSV, JSON lines), a folder of them, or .txt, a value a line.

    Raises UserError when there is no list, when it can't be told what it holds, and when no record has such values.
    """
    if path.name.lower().endswith((".txt", ".txt.gz")):
        files: tuple[Path, ...] = (require_file(path, "list"),)
        column = None
        by = by or _kind_of_lines(path)
    else:
        files = tuple(find_tables(path, "list"))
        if (note := note_beside_tables(path)) is not None:
            print(f"purge: {note}", file=sys.stderr)
        names = read_schema(files[0], (), quoting).names
        column = _choose_column(path, by, names, features)
        by = by or column
    known = {name.lower(): name for name in features}
    found = by if by in features else known.get(by.lower())
    if found is None and hash_named(by) is None:
        raise UserError(f"the dataset has no column {by!r}: choose one of {', '.join(sorted(features))} by --by")
    if found is not None and (features[found].is_list or features[found].kind not in ("text", "int", "label")):
        raise UserError(f"column {found!r} of the dataset is {features[found].kind}: choose a text column by --by")
    numbers = found is not None and features[found].kind != "text"
    return RemovalList(path, files, found or by.lower(), column, numbers, sha256_of(files), quoting)


def _choose_column(path: Path, by: str | None, names: list[str], features: Mapping[str, Feature]) -> str:
    """The list's column of the name `by`, whatever its case; its only one; or its only one that says which record."""
    if by is not None:
        same = [name for name in names if name.lower() == by.lower()]
        if not same and len(names) == 1 and re.fullmatch(r"https?://.+|\d{4,}|[0-9a-fA-F]{32,}", names[0]):
            raise UserError(
                f"{path} begins with {names[0]!r}, a value, where its column's name is read: write {by!r} above it, or "
                "name the file .txt"
            )
        if same or len(names) == 1:
            return (same or names)[0]
        raise UserError(f"{path} has no column {by!r}: it has {', '.join(names)}; name one by --by")
    known = {name.lower() for name in features} | set(HASHES)
    fitting = [name for name in names if name.lower() in IDENTITIES and name.lower() in known]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise UserError(f"{path} has {' and '.join(fitting)}: say which of them is meant by --by {fitting[0].lower()}")
    raise UserError(f"{path} has the columns {', '.join(names)}, none of them url, key or a hash: name one by --by")


def _kind_of_lines(path: Path) -> str:
    """What the first line looks like: a URL or a hash."""
    first = next((value for values in _lines(path) for value in values if value), b"")
    if not first:
        raise empty_list(path)
    if re.match(rb"https?://", first):
        return "url"
    for name in ("sha256", "md5"):
        if re.fullmatch(rb"[0-9a-fA-F]{%d}" % HASHES[name], first):
            return name
    raise UserError(f"can't tell what the lines of {path} are: say it by --by url, sha256 or key")


def empty_list(path: Path) -> UserError:
    """The one line for a list that names nothing, most likely the wrong file or column."""
    return UserError(f"list {path} is empty: give one with the values of what is to be removed")


def read_values(removals: RemovalList) -> Iterator[list[bytes]]:
    """The list's values, some at a time, as they are compared; b"" for what is missing.

    URLs and keys are compared byte for byte, with no normalisation: not even the case of a host's name or a slash at
    the end is touched, for only the server knows which spellings are the same. Hashes are read in either case, or as
    the bytes themselves, and whole numbers with the ".0" of a table that had them as floats too.
    """
    name = hash_named(removals.by)
    for file in removals.files:
        values = _lines(file) if removals.column is None else _table_values(file, removals.column, removals.quoting)
        for batch in values:
            if name is not None:
                size = HASHES[name] // 2
                yield [each.hex().encode() if len(each) == size else each.strip().lower() for each in batch]
            else:
                yield [each.removesuffix(b".0") for each in batch] if removals.numbers else batch


def _lines(path: Path) -> Iterator[list[bytes]]:
    with local_copy(path) as local, open_bytes(local) as stream:
        data, rest = stream.read(READ_BYTES), b""
        refuse_utf16(data, path)
        data = data.removeprefix(BOM)
        newline = b"\n" if b"\n" in data else b"\r"
        while data:
            *whole, rest = (rest + data).split(newline)
            yield [line.removesuffix(b"\r") for line in whole]
            data = stream.read(READ_BYTES)
        yield [rest.removesuffix(b"\r")] if rest else []


def _table_values(path: Path, column: str, quoting: Quoting) -> Iterator[list[bytes]]:
    for batch in read_columns(path, [column], quoting):
        values = batch.column(0)
        if pa.types.is_nested(values.type):
            raise UserError(f"column {column!r} of {path} holds {values.type}: put each value into a row of its own")
        yield [value_bytes(value) for value in values.to_pylist()]


def wanted_entries(removals: RemovalList) -> tuple[UInt64Array, int]:
    """The list's distinct values as `digests`, sorted, uint64[2, n], and the number of rows that hold none."""
    words = array("Q")
    empty = 0
    for values in read_values(removals):
        filled = [value for value in values if value]
        empty += len(values) - len(filled)
        words.frombytes(digests(filled).T.tobytes())
    pairs = np.frombuffer(words, np.uint64).reshape(-1, 2) if words else np.zeros((0, 2), np.uint64)
    ordered = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    new = np.ones(len(ordered), bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return np.ascontiguousarray(ordered[new].T), empty
