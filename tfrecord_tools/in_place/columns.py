"""The types of columns in shards that img2dataset's tfrecord writer left, and what must change for TFDS to read them.

img2dataset writes a null as the bytes "", whatever the column's type, and TensorFlow refuses a record whose int is
bytes. So a shard with a null among numbers can't stay as it is: there the key is left out, which is how a missing value
is written. In a column of text the "" stays, and reads as an empty text.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from clipkit.errors import UserError
from clipkit.formats.features import Feature
from clipkit.formats.kinds import EMPTY_LIST, LIST, widest
from clipkit.formats.records import Value
from clipkit.formats.tables import IMAGE_SUFFIXES
from clipkit.tfrecord_tools.in_place.example_wire import CAPTION, EMPTY, FLOAT, FLOATS, INT, INTS, NOTHING, TEXT, TEXTS
from clipkit.tfrecord_tools.sample import DROPPED_COLUMNS
from clipkit.tfrecord_tools.writing.finish import feature_of

IMAGE = "jpg"
_TYPES = {TEXT: "text", TEXTS: "text", INT: "int", INTS: "int", FLOAT: "float", FLOATS: "float"}
_LISTS = frozenset({TEXTS, INTS, FLOATS})

ColumnForms = Mapping[str, Mapping[str, int]]


def check_columns(forms: ColumnForms, where: str) -> None:
    """Raises UserError for shards whose images or captions are where neither TFDS nor clipkit's training reads them."""
    images = sorted(IMAGE_SUFFIXES & set(forms))
    if images != [IMAGE]:
        found = f"has images in {' and '.join(map(repr, images))}" if images else "has no images at all"
        raise UserError(
            f"{where} {found} and not in {IMAGE!r}: that takes a copy, so run clipkit build-tfds without --in-place"
        )
    if CAPTION not in forms:
        raise UserError(
            f"{where} has no captions in {CAPTION!r}: name them by a copy, with clipkit build-tfds without --in-place"
        )


def unify_forms(all_forms: Iterable[ColumnForms]) -> dict[str, str]:
    """One kind (see `schema`) for each column, image and caption too, that holds the values of all shards."""
    seen: dict[str, set[str]] = {}
    for forms in all_forms:
        for column, counts in forms.items():
            seen.setdefault(column, set()).update(counts)
    return {column: _kind(forms) for column, forms in sorted(seen.items())}


def _kind(forms: set[str]) -> str:
    types = {_TYPES[form] for form in forms if form in _TYPES}
    if not types:
        return "text" if EMPTY in forms else EMPTY_LIST
    return (LIST if forms & _LISTS else "") + widest(types)


def misfits(forms: ColumnForms, kinds: Mapping[str, str]) -> dict[str, str]:
    """What keeps a shard from staying as it is, by column: nulls among numbers, or numbers of another type."""
    found = {}
    for column, counts in forms.items():
        kind = kinds[column]
        wrong = {form: count for form, count in counts.items() if not _fits(form, kind)}
        nulls = sum(count for form, count in wrong.items() if form in (EMPTY, NOTHING))
        others = sum(wrong.values()) - nulls
        parts = [f"{nulls:,} null" if nulls else "", f"{others:,} not {kind}" if others else ""]
        if wrong:
            found[column] = ", ".join(filter(None, parts))
    return found


def _fits(form: str, kind: str) -> bool:
    if form == NOTHING:
        return kind.startswith(LIST)
    return kind.removeprefix(LIST) == ("text" if form == EMPTY else _TYPES[form])


def features_of(kinds: Mapping[str, str], all_forms: Iterable[ColumnForms], records: int) -> dict[str, Feature]:
    """The columns as `features.json` declares them; what img2dataset says about its own work stays undeclared."""
    missing = (EMPTY, NOTHING)
    present: Counter[str] = Counter()
    for forms in all_forms:
        for column, counts in forms.items():
            values = sum(count for form, count in counts.items() if form not in missing)
            present[column] += values + (counts.get(EMPTY, 0) if kinds[column] == "text" else 0)
    return {
        column: Feature("image") if column == IMAGE else feature_of(kind, present[column] < records)
        for column, kind in kinds.items()
        if column not in DROPPED_COLUMNS and column != "caption"
    }


def convert(values: Mapping[str, list[Any]], kinds: Mapping[str, str]) -> dict[str, Value]:
    """A decoded record with each column in its kind, missing values left out."""
    converted: dict[str, Value] = {}
    for column, items in values.items():
        kind = kinds[column]
        base = kind.removeprefix(LIST)
        if base != "text" and base != "nothing":
            items = [item for item in items if item != b""]
            if not items:
                continue
        if items or kind.startswith(LIST):
            cast_items = [_convert(item, base) for item in items]
            converted[column] = cast_items if kind.startswith(LIST) else cast_items[0]
    return converted


def _convert(item: Any, kind: str) -> bytes | int | float:
    if kind == "text":
        return item if isinstance(item, bytes) else str(item).encode()
    return float(item) if kind == "float" else item
