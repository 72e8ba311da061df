"""What the quotes of a CSV or TSV file mean, told by looking at the whole of it before a row is read.

Three ways of writing a field that holds a quote are about. `csv`: the field is quoted and the quote doubled (Python,
pandas, DuckDB, Excel). `backslash`: the field is quoted and the quote, like every backslash, has a backslash in front
(Spark). `none`: quotes are characters, and no field holds a separator or a line break (CC3M). A file doesn't say which
one it is. What can be read in only one way is; in TSV a field that begins and ends with a quote is quoted, and a lone
quote is a character. What could be read in two ways is refused, and `--quoting` decides.

Looking costs little, since quotes and backslashes are rare: numpy finds them, and where they stand as `csv` has them
nothing else is done (`Scan`). Other files are taken apart field by field (`Fields`), and Arrow reads what that writes.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from clipkit.errors import UserError
from clipkit.formats.text_file import PIECE_BYTES, TEXT_BLOCK_BYTES, TextFile, quoted_field, unquoted, wrapped

Bytes = npt.NDArray[np.uint8]
Places = npt.NDArray[np.int64]

_QUOTE, _BACKSLASH, _CR, _LF = b'"\\\r\n'
_NONE = np.zeros(0, np.int64)
_URL = re.compile(rb'"?https?://')


@dataclass(frozen=True)
class Reading:
    """How Arrow is to read a file: whether quotes quote, and whether quoted fields hold line breaks.

    `fields` writes the file as `csv` first, where Arrow couldn't read it as it is.
    """

    quoted: bool = True
    newlines: bool = True
    fields: "Fields | None" = None


def study(table: TextFile) -> Reading:
    """Scan the whole file to find out how to parse it. Raises UserError if that is ambiguous or the file malformed."""
    if table.quoting == "backslash":
        return Reading(fields=Fields(table, "backslash"))
    scan = Scan(table)
    is_legal = scan.run()
    if is_legal and table.quoting == "auto":
        scan.refuse_doubts()
    if table.quoting == "none" or (is_legal and not scan.quotes):
        return _without_quotes(table, scan.lone_returns)
    if is_legal:
        return Reading(newlines=scan.newlines, fields=Fields(table, "csv") if scan.lone_returns else None)
    if table.quoting == "auto":
        fields = Fields(table, "backslash", strict=True)
        if _has_escaped_quotes(table) and fields.passes():
            refuse_mixed(table, fields.line_ends)
            if fields.pairs and not fields.plain:
                raise _backslash_doubt(table)
            return Reading(fields=Fields(table, "backslash"))
        if table.delimiter == b"\t":
            fields = Fields(table, "lone")
            fields.check()
            refuse_mixed(table, fields.line_ends)
            return Reading(fields=fields) if fields.whole else _without_quotes(table, fields.returns)
    fields = Fields(table, "csv")
    fields.check()
    if table.quoting == "auto":
        refuse_mixed(table, fields.line_ends)
    return Reading(fields=fields if fields.returns else None)


def _without_quotes(table: TextFile, has_lone_returns: bool) -> Reading:
    """How to read a file in which quotes are characters."""
    return Reading(fields=Fields(table, "none")) if has_lone_returns else Reading(quoted=False, newlines=False)


def _has_escaped_quotes(table: TextFile) -> bool:
    tail = b""
    for block in table.blocks():
        if b'\\"' in tail + block:
            return True
        tail = block[-1:]
    return False


def _backslash_doubt(table: TextFile) -> UserError:
    return UserError(
        f"the backslashes in {table.table} could be characters, or stand before others as Spark and MySQL write them: "
        "say which by --quoting csv or --quoting backslash"
    )


class Scan:
    """Whether the quotes of a file stand as `csv` has them, and what speaks against reading it so.

    Every quote that opens a field must follow a separator or a line's end, every one that closes it must be followed by
    one, and within a field they come in pairs. So the quotes with even numbers open, and those with odd ones close,
    where a pair within a field is a close and an open beside each other.
    """

    def __init__(self, table: TextFile) -> None:
        self.table = table
        self.is_tab = table.delimiter == b"\t"
        ends = np.zeros(256, bool)
        ends[[table.delimiter[0], _CR, _LF]] = True
        self.ends = ends
        self.quotes = self.newlines = self.lone_returns = False
        self.doubled = False
        """Whether a pair of quotes stands where only `csv` has one."""
        self.escaped_quotes = False
        self.pairs_inside = self.plain_inside = False
        self.pairs = self.plain = False
        """Backslashes, in quoted fields and everywhere: `pairs` are two and more, or one that ends a line; `plain` is
        one before a character that needs none."""
        self.all_rows = True
        """Whether all lines, read without quotes, have as many fields as the table has columns."""
        self.offset = 0
        self.doubt: int | None = None
        """Where a field over several lines begins, each of which could be a row; `offset` are the bytes seen."""
        self.line_ends: set[str] = set()

    def run(self) -> bool:
        """Look at the file to its end; whether its quotes are legal. Stops where they aren't."""
        rest = b""
        for block in self.table.blocks():
            data = rest + block
            cut = self._add(data)
            if cut is None:
                return False
            rest = data[cut:]
            if len(rest) > TEXT_BLOCK_BYTES + PIECE_BYTES:
                return False
        if rest:
            end = b"\r\n" if "CRLF" in self.line_ends else self.table.newline
            end = b"" if rest.endswith(self.table.newline) else end
            return self._add(rest + end) == len(rest + end)
        return True

    def _add(self, data: bytes) -> int | None:
        """Look at the whole records of some bytes that begin with one: where they end. None where one isn't legal."""
        newline = self.table.newline
        array = np.frombuffer(data, np.uint8)
        quotes = np.flatnonzero(array == _QUOTE) if self.table.quoting != "none" and b'"' in data else _NONE
        if not (self.ends[array[quotes - 1]].any() or data[:1] == b'"'):  # none opens a field: they are characters
            if self.table.quoting == "auto" and self._is_doubtful(array, quotes):
                return None
            cut = data.rfind(newline) + 1
            self._look(data, cut, _NONE)
            self.line_ends |= _line_ends(data[:cut] if b"\r" in data else data[-1:])
            self.offset += cut
            return cut
        self.quotes = True
        lines = np.flatnonzero(array == newline[0])
        inside = np.searchsorted(quotes, lines) % 2 == 1
        outer = lines[~inside]
        if not len(outer):
            return 0
        cut = int(outer[-1]) + 1
        quotes = quotes[: np.searchsorted(quotes, cut)]
        opening, closing = quotes[0::2], quotes[1::2]
        before = array[opening - 1]
        if len(opening) and opening[0] == 0:
            before = before.copy()
            before[0] = _LF
        after = array[closing + 1]
        if not ((self.ends[before] | (before == _QUOTE)).all() and (self.ends[after] | (after == _QUOTE)).all()):
            return None
        pairs = closing[after == _QUOTE]
        lone = self.ends[array[pairs - 1]] & self.ends[array[np.minimum(pairs + 2, len(array) - 1)]]
        self.doubled = self.doubled or bool((~lone & (array[pairs - 1] != _BACKSLASH)).any())
        self.escaped_quotes = self.escaped_quotes or bool((array[quotes - 1] == _BACKSLASH).any())
        self._look(data, cut, quotes)
        inner = lines[inside & (lines < cut)]
        if len(inner):
            self.newlines = True
        if self.table.quoting == "auto" and not self._weigh_lines(data, array[:cut], lines[lines < cut], outer, inner):
            return None
        returns = array[outer - 1] == _CR
        self.line_ends |= {"CRLF"} if returns.all() else {"CRLF", "LF"} if returns.any() else {"LF"}
        self.offset += cut
        return cut

    def _is_doubtful(self, array: Bytes, quotes: Places) -> bool:
        """Whether a quote that opens nothing looks as if it were meant to be more: see `Fields._inside_field`."""
        before = array[quotes - 1]
        blank = (before == ord(" ")) & (array[quotes - 2] == self.table.delimiter[0])
        return bool((before == _BACKSLASH).any() or (not self.is_tab and blank.any()))

    def _look(self, data: bytes, cut: int, quotes: Places) -> None:
        """Look for carriage returns that end no line, and for backslashes, outside of quotes or in all."""
        if self.table.newline == b"\n" and _has_lone_return(data):
            array = np.frombuffer(data, np.uint8)
            returns = np.flatnonzero(array[: cut - 1] == _CR)
            returns = returns[array[returns + 1] != _LF]
            inside = np.searchsorted(quotes, returns) % 2 == 1
            self.newlines = self.newlines or bool(inside.any())
            self.lone_returns = self.lone_returns or not inside.all()
        if b"\\" in data:
            array = np.frombuffer(data, np.uint8)[:cut]
            places = np.flatnonzero(array == _BACKSLASH)
            new = np.diff(places, prepend=-2) > 1
            starts = places[new]
            lengths = np.diff(np.append(np.flatnonzero(new), len(places)))
            following = array[np.minimum(starts + lengths, cut - 1)] if len(starts) else starts
            inside = np.searchsorted(quotes, starts) % 2 == 1
            plain = (lengths % 2 == 1) & ~self.ends[following] & (following != _QUOTE)
            at_end = (following == _CR) | (following == _LF)
            self.pairs = self.pairs or bool(((lengths > 1) | (at_end & ~inside)).any())
            self.plain = self.plain or bool(plain.any())
            self.pairs_inside = self.pairs_inside or bool(((lengths > 1) & inside).any())
            self.plain_inside = self.plain_inside or bool((plain & inside).any())

    def _weigh_lines(
        self,
        data: bytes,
        array: Bytes,
        lines: Places,
        outer: Places,
        inner: Places,
    ) -> bool:
        """Whether fields over several lines are what they seem: not if they swallow what are rows beyond doubt."""
        columns = len(self.table.names)
        if self.all_rows:
            counts = np.diff(np.searchsorted(np.flatnonzero(array == self.table.delimiter[0]), lines), prepend=0)
            filled = np.diff(lines, prepend=-1) > 1 + (array[lines - 1] == _CR)
            self.all_rows = bool((counts[filled] == columns - 1).all())
        for record in np.unique(np.searchsorted(outer, inner)).tolist():
            begin = int(outer[record - 1]) + 1 if record else 0
            verdict = looks_like_rows(data[begin : int(outer[record])], self.table.delimiter, columns)
            if verdict == "rows":
                return False
            if verdict == "maybe" and self.doubt is None:
                self.doubt = self.offset + begin
        return True

    def refuse_doubts(self) -> None:
        """Raise UserError where a file whose quotes are legal could be read in another way as well."""
        table = self.table
        if self.doubt is not None and self.all_rows:
            with table.open() as file:
                line = file.read(self.doubt).count(b"\n") + 1
            raise UserError(
                f"line {line} of {table.table} could begin a quoted field over several lines, or be a row with a lone "
                "quote: say which by --quoting csv or --quoting none"
            )
        refuse_mixed(table, self.line_ends)
        in_fields = (self.escaped_quotes or self.pairs_inside) and not (self.doubled or self.plain_inside)
        if in_fields and self.escaped_quotes and not self.pairs_inside:
            in_fields = Fields(table, "backslash", strict=True).passes()
        everywhere = self.pairs or any(name.endswith("\\") for name in table.names)
        if in_fields or (everywhere and not (self.plain or self.doubled)):
            raise _backslash_doubt(table)


def refuse_mixed(table: TextFile, line_ends: set[str]) -> None:
    """Raise UserError for lines that end in two ways: a carriage return could be a field's last character."""
    if len(line_ends) > 1:
        raise UserError(
            f"some lines of {table.table} end in LF and some in CRLF: make them alike, or take both as a line's end by "
            "--quoting csv or --quoting none"
        )


def _line_ends(text: bytes) -> set[str]:
    crlf = text.count(b"\r\n") if b"\r" in text else 0
    return ({"CRLF"} if crlf else set()) | ({"LF"} if text.count(b"\n") > crlf else set())


def _has_lone_return(text: bytes) -> bool:
    """Whether there is a carriage return that ends no line."""
    return b"\r" in text and text.count(b"\r") != text.count(b"\r\n")


def looks_like_rows(record: bytes, delimiter: bytes, columns: int) -> Literal["rows", "maybe", "no"]:
    """Whether the lines that a quoted field has joined would be rows by themselves: `rows` if each has its URL."""
    lines = [line for line in record.split(b"\n") if line.strip(b"\r")]
    if any(line.count(delimiter) != columns - 1 for line in lines):
        return "no"
    places = [{i for i, field in enumerate(line.split(delimiter)) if _URL.match(field)} for line in lines]
    return "rows" if set.intersection(*places) else "maybe"


# ---- Field by field --------------------------------------------------------------------------------------------------


class Fields:
    """Takes a file apart field by field, where it isn't plain `csv`, and writes it so.

    `how` is a way of quoting, or `lone`: `csv` in which a quote that opens nothing is a character. `strict` takes no
    quotes but those that the programs of that way write.
    """

    def __init__(self, table: TextFile, how: Literal["csv", "backslash", "none", "lone"], strict: bool = False) -> None:
        self.table, self.how, self.strict = table, how, strict
        border = re.escape(table.delimiter)
        self.whole_field = quoted_field(table.delimiter, "backslash" if how == "backslash" else "csv")
        inside = rb'[^"\\]++|\\.' if how == "backslash" else rb'[^"]++|""'
        self.unclosed = re.compile(rb'"(?:%s)*+\\?\Z' % inside, re.DOTALL)
        self.end = re.compile(rb"%s|\r?\n|\Z" % border)
        opening = rb'"|' if how == "none" else b""
        self.odd = re.compile(
            rb"(?:(?<=[%s\n])|\A)(?:%s[^%s\n]*?\r(?!\n|\Z))[^%s\n]*?(?=%s|\r?\n|\Z)"
            % (border, opening, border, border, border)
        )
        self.whole = 0
        self.returns = self.pairs = self.plain = False
        self.line_ends: set[str] = set()
        self.plain_backslash = re.compile(rb'(?<!\\)(?:\\\\)*\\(?![\\"\r\n%s]|\Z)' % border)
        self.lines, self.inner = 1, 0

    def passes(self) -> bool:
        """Whether the whole file can be read so."""
        try:
            self.check()
        except UserError:
            return False
        return True

    def check(self) -> None:
        """Read the whole file. Raises UserError where it can't be read so."""
        for piece in self.rewrite(self.table.blocks(PIECE_BYTES)):
            self.returns = self.returns or _has_lone_return(piece)

    def rewrite(self, blocks: Iterator[bytes]) -> Iterator[bytes]:
        """The file as `csv`. Raises UserError where it can't be read so."""
        self.lines, self.inner, self.whole = 1, 0, 0
        data = b""
        for block in blocks:
            data += block
            cut = data.rfind(b"\n") + 1
            piece = self._piece(data[:cut], is_last=False) if cut else None
            if piece is not None:
                yield piece
                data = data[cut:]
        if data:
            yield self._piece(data, is_last=True) or b""

    def _piece(self, data: bytes, is_last: bool) -> bytes | None:
        """Some lines as `csv`; None where a field goes on behind them."""
        parts: list[bytes] = []
        done = at = inner = whole = 0
        while self.how != "none" and (quote := data.find(b'"', at)) >= 0:
            if quote and data[quote - 1 : quote] not in (self.table.delimiter, b"\n", b"\r"):
                self._inside_field(data, quote, inner)
                at = quote + 1
                continue
            found = self.whole_field.match(data, quote)
            may_go_on = not is_last and len(data) - quote < TEXT_BLOCK_BYTES
            if may_go_on and found is None and self.unclosed.match(data, quote):
                return None
            if found is None or self._is_lone(data, found, inner):
                at = self._lone_end(data, quote, inner)
                if at == len(data) and not is_last:
                    return None
                parts += (self._plain(data[done:quote]), wrapped(data[quote:at]))
                done = at
                continue
            inner += found[0].count(b"\n")
            whole += 1
            at = found.end()
            parts += (
                self._plain(data[done:quote]),
                wrapped(unquoted(found[0], "backslash")) if self.how == "backslash" else found[0],
            )
            done = at
        parts.append(self._plain(data[done:]))
        self.lines, self.inner, self.whole = self.lines + data.count(b"\n"), self.inner + inner, self.whole + whole
        return b"".join(parts)

    def _plain(self, text: bytes) -> bytes:
        """Fields without quotes; those that Arrow would take for something else are quoted."""
        self.line_ends |= _line_ends(text)
        if self.how == "backslash" and b"\\" in text:
            self.pairs = self.pairs or b"\\\\" in text
            self.plain = self.plain or self.plain_backslash.search(text) is not None
        if self.table.newline == b"\r" or not (self.how == "none" or _has_lone_return(text)):
            return text
        return self.odd.sub(lambda field: wrapped(field[0]), text)

    def _where(self, data: bytes, place: int, inner: int) -> str:
        line = self.lines + data.count(b"\n", 0, place)
        return f"row {line - self.inner - inner - self.table.has_header} (line {line}) of {self.table.table}"

    def _inside_field(self, data: bytes, quote: int, inner: int) -> None:
        """A quote in the middle of a field is a character, unless it looks as if it were meant to be more."""
        if self.strict:
            raise UserError("a quote in a field that isn't quoted")
        if self.table.quoting != "auto":
            return
        begin = max(data.rfind(end, 0, quote) for end in (self.table.delimiter, b"\n")) + 1
        start = data[begin:quote]
        if start.endswith(b"\\"):
            raise UserError(
                f"{self._where(data, quote, inner)} has a backslash before a quote, in a field that isn't quoted: say "
                "what it is by --quoting csv or none (characters), or backslash"
            )
        if self.how == "csv" and start and not start.strip():
            raise UserError(
                f"{self._where(data, quote, inner)} has a blank before a quote: remove the blanks behind the "
                "separators, or read quotes as characters by --quoting none"
            )

    def _is_lone(self, data: bytes, found: re.Match[bytes], inner: int) -> bool:
        """Whether a quote only seems to open a field, since the next one stands at the end of another field."""
        if self.table.quoting != "auto" or self.strict or not (b"\n" in found[0] or self.table.delimiter in found[0]):
            return False
        begin, end = data.rfind(b"\n", 0, found.start()) + 1, data.find(b"\n", found.end())
        record = data[begin : end if end >= 0 else len(data)]
        verdict = looks_like_rows(record, self.table.delimiter, len(self.table.names))
        if verdict == "no":
            return False
        if self.how == "lone" and (verdict == "rows" or b"\n" not in record):
            return True
        if verdict == "rows":
            raise UserError(
                f"the quote that opens in {self._where(data, found.start(), inner)} isn't closed there, but some rows "
                "below: mend it, or read quotes as characters by --quoting none"
            )
        if self.how == "lone":
            raise UserError(
                f"{self._where(data, found.start(), inner)} could be a quoted field over several lines, or rows with "
                "lone quotes: say which by --quoting csv or --quoting none"
            )
        return False

    def _lone_end(self, data: bytes, quote: int, inner: int) -> int:
        """The end of an unquoted field that begins with a quote. Raises UserError where no such field is allowed."""
        match = self.end.search(data, quote)
        end = match.start() if match else len(data)
        if self.how == "lone":
            if b'\\"' in data[quote:end]:
                raise UserError(
                    f"{self._where(data, quote, inner)} has a backslash before a quote: say what it is by --quoting "
                    "none (a character) or backslash"
                )
            return end
        where = self._where(data, quote, inner)
        if self.unclosed.match(data, quote):
            raise UserError(
                f"the quote that opens in {where} is never closed: mend it, or read quotes as characters by "
                "--quoting none"
            )
        raise UserError(
            f"{where} has text behind a quoted field: double the quotes inside the field, or read quotes as "
            "characters by --quoting none"
        )
