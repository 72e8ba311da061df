"""A CSV or TSV file before its rows are read: its first line, what separates its fields, how one field is quoted."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import pyarrow as pa

from clipkit.errors import UserError

Quoting = Literal["auto", "csv", "backslash", "none"]
# Separators that files have instead of the one that their suffix says: Excel's outside of America, for one.
DELIMITERS = (b",", b";", b"\t", b"|")

TEXT_BLOCK_BYTES = 16 << 20  # also the most that a field may hold
PIECE_BYTES = 1 << 20


BOM = b"\xef\xbb\xbf"  # the mark that Windows puts before UTF-8


def refuse_utf16(first: bytes, path: Path) -> None:
    """Raise UserError for a file that begins with the mark of UTF-16."""
    if first[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path} is UTF-16, as Excel writes Unicode text: save it as UTF-8")


def open_bytes(path: Path) -> pa.NativeFile:
    """The bytes of a local text file, unpacked."""
    return pa.input_stream(str(path), compression="gzip" if path.name.lower().endswith(".gz") else None)


class TextFile:
    """A local CSV or TSV file; `table` is what its user calls it."""

    def __init__(
        self, path: Path, table: Path, delimiter: str, quoting: Quoting = "auto", header: Sequence[str] = ()
    ) -> None:
        """Reads the names of the columns: `header` where the file has no line with just these.

        Raises UserError, and ArrowInvalid when the file is empty.
        """
        self.path, self.table, self.quoting = path, table, quoting
        with open_bytes(path) as file:
            first: bytes = file.read(TEXT_BLOCK_BYTES)
        refuse_utf16(first, table)
        text = first.removeprefix(BOM).lstrip(b"\r\n")
        self.start = len(first) - len(text)
        """Where the first line begins: behind a byte order mark and empty lines."""
        if not text:
            raise pa.ArrowInvalid("Empty CSV file")
        self.newline = b"\n" if b"\n" in text or b"\r" not in text else b"\r"
        usual = delimiter.encode()
        self.delimiter = usual if header else _find_delimiter(text, usual)
        names, end = _read_header(text, self.delimiter, quoting)
        self.has_header = not header or names == list(header)
        self.names = names if self.has_header else list(header)
        self.is_empty = not text[end if self.has_header else 0 :].strip(b"\r\n") and len(first) < TEXT_BLOCK_BYTES

    def open(self) -> pa.NativeFile:
        """The bytes from the first line on."""
        file = open_bytes(self.path)
        file.read(self.start)
        return file

    def blocks(self, size: int = TEXT_BLOCK_BYTES) -> Iterator[bytes]:
        """The same, some at a time."""
        with self.open() as file:
            while block := file.read(size):
                yield block


# ---- The first line --------------------------------------------------------------------------------------------------


def _find_delimiter(text: bytes, usual: bytes) -> bytes:
    """The usual separator, unless the first line lacks it and has another."""
    bare = re.sub(rb'"(?:[^"]|"")*"', b"", text[:PIECE_BYTES]).splitlines()[:1]
    if not bare or usual in bare[0]:
        return usual
    return next((other for other in DELIMITERS if other in bare[0]), usual)


def _read_header(text: bytes, delimiter: bytes, quoting: Quoting) -> tuple[list[str], int]:
    """The fields of the first line, and where it ends. They are read leniently: rows say whether quotes are in use."""
    patterns = [
        quoted_field(delimiter, escape) for escape in ("csv", "backslash") if quoting in ("auto", escape)
    ]  # fmt: skip
    names, place = [], 0
    end_of_field = re.compile(rb"[%s\r\n]|\Z" % re.escape(delimiter))
    while True:
        found = next((match for pattern in patterns if (match := pattern.match(text, place))), None)
        if found is not None:
            escape = "csv" if found.re is patterns[0] and quoting != "backslash" else "backslash"
            raw, end = unquoted(found[0], escape), found.end()
        else:
            match = end_of_field.search(text, place)
            end = match.start() if match else len(text)
            raw = text[place:end]
        names.append(raw.decode("utf-8", "replace"))
        if text[end : end + 1] != delimiter:
            return names, end
        place = end + 1


def quoted_field(delimiter: bytes, escape: str) -> re.Pattern[bytes]:
    """A whole quoted field."""
    inside = rb'[^"]++|""' if escape == "csv" else rb'[^"\\]++|\\.'
    return re.compile(rb'"(?:%s)*+"(?=[%s\r\n]|\Z)' % (inside, re.escape(delimiter)), re.DOTALL)


def unquoted(field: bytes, escape: str) -> bytes:
    """What a quoted field holds."""
    inside = field[1:-1]
    return inside.replace(b'""', b'"') if escape == "csv" else re.sub(rb'\\(["\\])', rb"\1", inside)


def wrapped(value: bytes) -> bytes:
    """A value as a quoted field."""
    return b'"' + value.replace(b'"', b'""') + b'"'
