"""The types of columns in shards that img2dataset's tfrecord writer left, and what must change for TFDS to read them.

img2dataset writes a null as the bytes "", whatever the column's type, and TensorFlow refuses a record whose int is
bytes. So a shard with a null among numbers can't stay as it is: there the key is left out, which is how a missing value
is written. In a column of text the "" stays, and reads as an empty text.
"""

from collections.abc import Iterable, Mapping
from typing import Any, cast

from clipkit.errors import UserError
from clipkit.formats.features import Feature, Kind
from clipkit.formats.kinds import EMPTY_LIST, LIST, widest
from clipkit.formats.records import Value
from clipkit.formats.tables import IMAGE_SUFFIXES
from clipkit.tfrecord_tools.in_place.example_wire import CAPTION, EMPTY, FLOAT, FLOATS, INT, INTS, NOTHING, TEXT, TEXTS
from clipkit.tfrecord_tools.sample import DROPPED_COLUMNS

IMAGE = "jpg"
_TYPES = {TEXT: "text", TEXTS: "text", INT: "int", INTS: "int", FLOAT: "float", FLOATS: "float"}
_LISTS = frozenset({TEXTS, INTS, FLOATS})

Looks = Mapping[str, Mapping[str, int]]


def check_columns(looks: Looks, where: str) -> None:
    """Raises UserError for shards whose images or captions are where neither TFDS nor clipkit's training reads them."""
    images = sorted(IMAGE_SUFFIXES & set(looks))
    if images != [IMAGE]:
        found = f"has images in {' and '.join(map(repr, images))}" if images else "has no images at all"
        raise UserError(
            f"{where} {found} and not in {IMAGE!r}: that takes a copy, so run clipkit build-tfds without --in-place"
        )
    if CAPTION not in looks:
        raise UserError(
            f"{where} has no captions in {CAPTION!r}: name them by a copy, with clipkit build-tfds without --in-place"
        )


def unify_looks(all_looks: Iterable[Looks]) -> dict[str, str]:
    """One kind (see `schema`) for each column, image and caption too, that holds the values of all shards."""
    seen: dict[str, set[str]] = {}
    for looks in all_looks:
        for column, counts in looks.items():
            seen.setdefault(column, set()).update(counts)
    return {column: _kind(looks) for column, looks in sorted(seen.items())}


def _kind(looks: set[str]) -> str:
    types = {_TYPES[look] for look in looks if look in _TYPES}
    if not types:
        return "text" if EMPTY in looks else EMPTY_LIST
    return (LIST if looks & _LISTS else "") + widest(types)


def misfits(looks: Looks, kinds: Mapping[str, str]) -> dict[str, str]:
    """What keeps a shard from staying as it is, by column: nulls among numbers, or numbers of another type."""
    found = {}
    for column, counts in looks.items():
        kind = kinds[column]
        wrong = {look: count for look, count in counts.items() if not _fits(look, kind)}
        nulls = sum(count for look, count in wrong.items() if look in (EMPTY, NOTHING))
        others = sum(wrong.values()) - nulls
        told = [f"{nulls:,} null" if nulls else "", f"{others:,} not {kind}" if others else ""]
        if wrong:
            found[column] = ", ".join(filter(None, told))
    return found


def _fits(look: str, kind: str) -> bool:
    if look == NOTHING:
        return kind.startswith(LIST)
    return kind.removeprefix(LIST) == ("text" if look == EMPTY else _TYPES[look])


def features_of(kinds: Mapping[str, str], all_looks: Iterable[Looks], records: int) -> dict[str, Feature]:
    """The columns as `features.json` declares them; what img2dataset says about its own work stays undeclared."""
    present: dict[str, int] = {}
    for looks in all_looks:
        for column, counts in looks.items():
            values = sum(count for look, count in counts.items() if look != EMPTY and look != NOTHING)
            if kinds[column] == "text":
                values += counts.get(EMPTY, 0)
            present[column] = present.get(column, 0) + values
    features = {}
    for column, kind in kinds.items():
        if column in DROPPED_COLUMNS or column == "caption":
            continue
        if column == IMAGE:
            features[column] = Feature("image")
        elif kind == EMPTY_LIST:
            features[column] = Feature("text", is_list=True)
        elif kind.startswith(LIST):
            features[column] = Feature(cast(Kind, kind.removeprefix(LIST)), is_list=True)
        else:
            features[column] = Feature(cast(Kind, kind), optional=present[column] < records)
    return features


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
