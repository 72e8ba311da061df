"""The types of metadata columns, found while the records are written and unified over all shards.

Kinds widen along bool < int < float < text, and lists of these along the same row; a column that holds both lists and
single values, or anything deeper, is text that holds JSON. A null, a NaN (what pandas makes of a null) and an absent
column are missing values and belong to every kind.
"""

import json
from collections.abc import Container, Iterable, Mapping
from typing import Any

import pyarrow as pa

from clipkit.formats.records import Value

# Stands before the name of one of clipkit's own columns (`url`, `key`, `caption`, …) where a user's table has a column
# of that name. No column of a table may be called so.
OWN = "clipkit_"

KINDS = ("bool", "int", "float", "text")
LIST = "list of "
EMPTY_LIST = LIST + "nothing"

_KIND_OF_TYPE = {bool: "bool", int: "int", float: "float", str: "text"}
_INT_END = 1 << 63


def kind_of(value: Any) -> str | None:
    """The narrowest kind that holds a value of JSON, or None for a missing one."""
    if value is None or value != value:
        return None
    if isinstance(value, list):
        kinds = {_KIND_OF_TYPE.get(type(item)) and kind_of(item) for item in value}
        return "text" if None in kinds else LIST + widest(kinds) if kinds else EMPTY_LIST
    kind = _KIND_OF_TYPE.get(type(value), "text")
    return "text" if kind == "int" and not -_INT_END <= value < _INT_END else kind


def widest(kinds: Iterable[str | None]) -> str:
    """The narrowest kind that holds all of `kinds` (at least one of them not None)."""
    found = {kind for kind in kinds if kind is not None}
    lists = {kind.removeprefix(LIST) for kind in found if kind.startswith(LIST)}
    singles = {kind for kind in found if not kind.startswith(LIST)}
    if lists and singles:
        return "text"
    filled = lists - {"nothing"}
    if lists and not filled:
        return EMPTY_LIST
    return (LIST if lists else "") + max(filled or singles, key=KINDS.index)


def as_text(kind: str) -> str:
    """The kind that holds the same values as texts."""
    return LIST + "text" if kind.startswith(LIST) else "text"


def unify(schemas: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """One kind for each column of any of the schemas, columns sorted by name."""
    columns: dict[str, set[str]] = {}
    for schema in schemas:
        for name, kind in schema.items():
            columns.setdefault(name, set()).add(kind)
    return {name: widest(kinds) for name, kinds in sorted(columns.items())}


def arrow_type(kind: str) -> pa.DataType:
    """Arrow's type for a kind."""
    types = {"bool": pa.bool_(), "int": pa.int64(), "float": pa.float64(), "text": pa.string()}
    if kind == EMPTY_LIST:
        return pa.list_(types["text"])
    return pa.list_(types[kind.removeprefix(LIST)]) if kind.startswith(LIST) else types[kind]


def own_name(names: Container[str], name: str) -> str:
    """What clipkit's own column is called among these."""
    return OWN + name if OWN + name in names else name


class KindWidenedError(Exception):
    """A value didn't fit the kind that earlier records of the shard were written with. `kinds` is what fits all."""

    def __init__(self, kinds: dict[str, str]) -> None:
        super().__init__("a column's kind widened")
        self.kinds = kinds


def fit(columns: Mapping[str, Any], kinds: dict[str, str], present: dict[str, int]) -> dict[str, Value]:
    """The values of one record in the types of `kinds`; missing ones are left out.

    A column that is new is added to `kinds`. `present` counts the values per column. Raises KindWidenedError when a
    value doesn't fit its column.
    """
    fitted: dict[str, Value] = {}
    for name, value in columns.items():
        if value is None or value != value:
            continue
        kind = kinds.get(name)
        own = _KIND_OF_TYPE.get(type(value))
        if own != kind or own is None or (own == "int" and not -_INT_END <= value < _INT_END):
            own = kind_of(value)
            if kind is None:
                assert own is not None
                kind = kinds[name] = own
            wide = widest((own, kind))
            if wide != kind:
                raise KindWidenedError({**kinds, name: wide})
            value = _convert(value, kind)
        fitted[name] = value
        present[name] = present.get(name, 0) + 1
    return fitted


def _convert(value: Any, kind: str) -> Any:
    if kind == "text":
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # pandas makes floats of whole numbers beside gaps
        plain = isinstance(value, dict | list | bool | int | float)
        text = json.dumps(value, ensure_ascii=False, default=str) if plain else str(value)
        return text.encode("utf-8", "replace")
    if kind == "float":
        return float(value)
    if kind.startswith(LIST):
        return [_convert(item, kind.removeprefix(LIST)) for item in value]
    return int(value)
