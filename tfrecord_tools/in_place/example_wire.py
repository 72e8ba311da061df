"""What types the columns of serialised `tf.train.Example` messages have, without taking the messages apart.

To decode a record costs three times as much as to check its checksum, and of a dataset that is to stay as it is no more
is wanted than the types of its columns and a look at both ends of each image. So the wire format of protobuf is walked
by hand (https://protobuf.dev/programming-guides/encoding):

    Example   = 0A length Features              one submessage
    Features  = (0A length Entry)*              a map, its entries in any order
    Entry     = 0A length key  12 length Feature
    Feature   = 0A length BytesList | 12 length FloatList | 1A length Int64List
    BytesList = (0A length bytes)*      FloatList = 0A length float32*      Int64List = 0A length varint*

All that a short entry tells but its values stands in its head, the bytes before them, and heads are the same in record
after record: they are looked up rather than parsed. What isn't laid out like this is decoded in full.
"""

from collections import Counter
from typing import NamedTuple

from clipkit.formats.records import decode_example
from clipkit.formats.tables import IMAGE_SUFFIXES

# In which form a column can be in one record.
EMPTY = "empty"  # the bytes "", which img2dataset writes for a null of any type
TEXT, TEXTS = "text", "texts"
INT, INTS = "int", "ints"
FLOAT, FLOATS = "float", "floats"
NOTHING = "nothing"  # no value, or a key without a type

CAPTION = "txt"

_ENTRY = _KEY = _LIST = 0x0A
_FEATURE = 0x12
_BYTES, _FLOATS, _INTS = 0x0A, 0x12, 0x1A
_MORE = 0x80  # this bit of a varint's byte says that another one follows
_COUNTED_AT_ONCE = 10_000
_FIRST_BYTES = bytes(range(_MORE, 256))
_IMAGES = frozenset(name.encode() for name in IMAGE_SUFFIXES)
_CAPTION = CAPTION.encode()


class Pair(NamedTuple):
    """Image and caption of a record. The image, of column `column`, is `data[start:end]`; both are 0 without one."""

    column: str
    data: bytes
    start: int
    end: int
    caption: bytes | None


class _IrregularError(Exception):
    """The bytes aren't laid out as above."""


class ExampleWire:
    """Counts, over many records, in which form each column is."""

    def __init__(self) -> None:
        self._meaning: dict[bytes, tuple[bytes, str]] = {}
        """Column and form by head. For columns of ints there are marks too, which are longer than any head."""
        self._ints: dict[bytes, tuple[bytes, bytes]] = {}
        """Heads of ints whose values must tell whether they are one or several, with the mark for each."""
        self._captions: dict[bytes, bytes] = {}
        """Heads of captions, with themselves: captions are wanted."""
        self._heads: list[bytes] = []
        self._counted: Counter[bytes] = Counter()
        self._forms: Counter[tuple[bytes, str]] = Counter()

    def forms(self) -> dict[str, dict[str, int]]:
        """For each column the number of records by its form in them."""
        self._count()
        total = Counter(self._forms)
        for head, count in self._counted.items():
            total[self._meaning[head]] += count
        forms: dict[str, dict[str, int]] = {}
        for (name, form), count in sorted(total.items()):
            forms.setdefault(name.decode("utf-8", "replace"), {})[form] = count
        return forms

    def _count(self) -> None:
        self._counted.update(self._heads)
        self._heads.clear()

    def read(self, data: bytes, start: int, end: int) -> Pair:
        """Count the columns of the record at `data[start:end]`. Raises ValueError when it is no Example."""
        meaning, ints, captions, heads = self._meaning, self._ints, self._captions, self._heads
        if len(heads) > _COUNTED_AT_ONCE:
            self._count()
        before = len(heads)
        caption: bytes | None = None
        others: list[_Other] = []
        try:
            position = _inside(data, start, end, _ENTRY) if end > start else end
            while position < end:
                body = position + data[position + 3] + 10
                head = data[position:body]
                if head in meaning:
                    heads.append(head)
                    position += data[position + 1] + 2
                elif head in ints:
                    position += data[position + 1] + 2
                    one, several = ints[head]
                    if data[position - 1] >= _MORE:
                        raise _IrregularError
                    heads.append(one if min(data[body : position - 1]) >= _MORE else several)
                elif head in captions:
                    position += data[position + 1] + 2
                    caption = data[body:position]
                    others.append(_Other(_CAPTION, TEXT if caption else EMPTY, None, body, position))
                else:
                    other = _other(data, position)
                    others.append(other)
                    position = other.end
            if position != end:
                raise _IrregularError
        except (_IrregularError, IndexError):
            del heads[before:]
            return self._decoded(data[start:end])
        return self._special(data, others)

    def _special(self, data: bytes, others: list["_Other"]) -> Pair:
        """Count what wasn't found by its head, learn the heads that can be, and pick out image and caption."""
        column, first, last, caption = "", 0, 0, None
        for name, form, head, values, end in others:
            self._forms[name, form] += 1
            if name in _IMAGES:
                if form == TEXT:
                    column, first, last = name.decode(), values, end
            elif name == _CAPTION:
                caption = data[values:end] if form in (TEXT, EMPTY) else None
                if head is not None and caption is not None:
                    self._captions[head] = head
            elif head is not None and form in (INT, INTS) and end - values > 1:
                one, several = head + b" one", head + b" several"
                self._meaning[one], self._meaning[several] = (name, INT), (name, INTS)
                self._ints[head] = one, several
            elif head is not None:
                self._meaning[head] = name, form
        return Pair(column, data, first, last, caption)

    def _decoded(self, record: bytes) -> Pair:
        column, image, caption = "", b"", None
        for text, values in decode_example(record).items():
            name = text.encode()
            form = _form_of(values)
            self._forms[name, form] += 1
            if name in _IMAGES and form == TEXT:
                column, image = text, values[0]
            elif name == _CAPTION and form in (TEXT, EMPTY):
                caption = values[0]
        return Pair(column, image, 0, len(image), caption)


class _Other(NamedTuple):
    """An entry that was parsed: its values lie at `first` to `end`; `head` is all before them, if it is short."""

    name: bytes
    form: str
    head: bytes | None
    first: int
    end: int


def _other(data: bytes, position: int) -> _Other:
    """Parse the entry at `position`."""
    body, end = _span(data, position, _ENTRY)
    feature = body + 2 + data[body + 1]
    if data[body] != _KEY or data[body + 1] >= _MORE or feature > end:
        raise _IrregularError
    name = data[body + 2 : feature]
    kind_at = _inside(data, feature, end, _FEATURE)
    if kind_at == end:
        return _Other(name, NOTHING, None, end, end)
    kind = data[kind_at]
    values_at = _inside(data, kind_at, end, kind)
    if kind not in (_BYTES, _FLOATS, _INTS):
        raise _IrregularError
    if values_at == end:
        return _Other(name, NOTHING, None, end, end)
    first, first_end = _span(data, values_at, _LIST)
    form = _look(data, kind, first, first_end, end)
    head = data[position:first] if first == position + len(name) + 10 else None
    return _Other(name, form, head, first, end)


def _look(data: bytes, kind: int, first: int, first_end: int, end: int) -> str:
    """How the values of a list of a kind form, of which the first, or all in one, lie at `first` to `first_end`."""
    if kind == _BYTES:
        several = first_end < end
        while first_end < end:
            _, first_end = _span(data, first_end, _LIST)
        if first_end > end:
            raise _IrregularError
        return TEXTS if several else TEXT if first_end > first else EMPTY
    if first_end != end:
        raise _IrregularError
    if first == end:
        return NOTHING
    if kind == _FLOATS:
        if (end - first) % 4:
            raise _IrregularError
        return FLOAT if end - first == 4 else FLOATS
    if data[end - 1] >= _MORE:
        raise _IrregularError
    return INT if len(data[first:end].translate(None, _FIRST_BYTES)) == 1 else INTS


def _form_of(values: list[bytes | int | float]) -> str:
    if not values:
        return NOTHING
    if isinstance(values[0], bytes):
        return TEXTS if len(values) > 1 else TEXT if values[0] else EMPTY
    if isinstance(values[0], int):
        return INTS if len(values) > 1 else INT
    return FLOATS if len(values) > 1 else FLOAT


def _inside(data: bytes, position: int, end: int, tag: int) -> int:
    """Where the contents of a field begin that must end at `end`."""
    first, last = _span(data, position, tag)
    if last != end:
        raise _IrregularError
    return first


def _span(data: bytes, position: int, tag: int) -> tuple[int, int]:
    """Where the contents behind a tag and a length begin and end."""
    byte = data[position + 1]
    if data[position] != tag:
        raise _IrregularError
    position += 2
    if byte < _MORE:
        return position, position + byte
    length, shift = byte & 0x7F, 7
    while True:
        byte = data[position]
        position += 1
        if byte < _MORE:
            length |= byte << shift
            return position, position + length
        length |= (byte & 0x7F) << shift
        shift += 7
        if shift > 63:
            raise _IrregularError
