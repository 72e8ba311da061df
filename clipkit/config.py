"""Configurations are frozen dataclasses; this module changes them by `--set key=value` and moves them to and from JSON.

A value is parsed by the annotated type of its field, so a wrong one is refused before any work starts.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from decimal import Decimal
from typing import Any, Literal, TypeVar, Union

from clipkit.errors import UserError

Config = TypeVar("Config")

SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9}


def set_values(config: Config, assignments: Iterable[str]) -> Config:
    """A copy of `config` with each `path.to.field=value` applied, in order.

    Numbers in a path are indices of a tuple (`stages.0.samples=12.8M`); integers take `1_000`, `1e6` and the suffixes
    K, M and B. Raises UserError for an unknown key, with the nearest known ones, and for a value of the wrong type.
    """
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise UserError(f"--set {assignment}: write it as key=value, for example --set seed=1")
        config = _set(config, key.strip().split("."), text.strip(), key.strip())
    return config


def _set(config: Any, path: list[str], text: str, key: str) -> Any:
    head, rest = path[0], path[1:]
    if isinstance(config, tuple):
        if not head.isdigit() or int(head) >= len(config):
            indices = f"choose from 0 to {len(config) - 1}" if config else "it is empty"
            raise UserError(f"--set {key}: {head!r} isn't an index of the list ({indices})")
        index = int(head)
        changed = _set(config[index], rest, text, key) if rest else parse(text, type(config[index]), key)
        return (*config[:index], changed, *config[index + 1 :])
    if config is None:
        raise UserError(f"--set {key}: what comes before {head!r} isn't set in this recipe")
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise UserError(f"--set {key}: {head!r} goes too deep; what comes before it is a plain value")
    hints = typing.get_type_hints(type(config))
    if head not in hints:
        raise UserError(f"--set {key}: unknown key {head!r}; {did_you_mean(head, hints)}")
    value = getattr(config, head)
    if rest and typing.get_origin(hints[head]) is Mapping:
        if len(rest) > 1:
            raise UserError(f"--set {key}: {rest[0]!r} goes too deep; it is a plain value")
        value = {**value, rest[0]: parse(text, typing.get_args(hints[head])[1], key)}
    else:
        value = _set(value, rest, text, key) if rest else parse(text, hints[head], key)
    return dataclasses.replace(config, **{head: value})


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of an error line: the nearest known words, or all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(names)}"


def nearest(word: str, known: Collection[str]) -> str:
    """The end of an error line: near misses, or a few examples where there are too many to list."""
    if len(known) <= 12 or difflib.get_close_matches(word, known, n=1, cutoff=0.5):
        return did_you_mean(word, known)
    return f"it has {len(known):,}, among them {', '.join(repr(name) for name in sorted(known)[:3])}"


def parse(text: str, kind: Any, key: str) -> Any:
    """`text` as a value of the annotated type `kind`. Raises UserError that names `key` when it isn't one."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        if text.lower() in ("none", "null", "") and type(None) in arguments:
            return None
        for choice in arguments:
            if choice is not type(None):
                try:
                    return parse(text, choice, key)
                except UserError as error:
                    refusal = error
        raise refusal
    if origin is Literal:
        if text not in arguments:
            raise UserError(f"--set {key}={text}: {did_you_mean(text, map(str, arguments))}")
        return text
    if origin is tuple:
        parts = [part.strip() for part in text.strip("()[]").split(",") if part.strip()]
        variadic = len(arguments) == 2 and arguments[1] is Ellipsis
        inner = [arguments[0]] * len(parts) if variadic else list(arguments)
        if len(inner) != len(parts):
            raise UserError(f"--set {key}={text}: takes {len(inner)} values separated by commas")
        return tuple(parse(part, part_kind, key) for part, part_kind in zip(parts, inner, strict=True))
    if kind is bool:
        if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
            raise UserError(f"--set {key}={text}: takes true or false")
        return text.lower() in ("true", "1", "yes")
    if kind is int:
        return _parse_int(text, key)
    if kind is float:
        try:
            return float(text)
        except ValueError:
            raise UserError(f"--set {key}={text}: takes a number") from None
    if kind is str:
        return text
    raise UserError(f"--set {key}={text}: can't be set as a whole; set one of its fields, as {key}.FIELD=value")


def _parse_int(text: str, key: str) -> int:
    number, scale = text, 1
    if text and text[-1].upper() in SUFFIXES:
        number, scale = text[:-1], SUFFIXES[text[-1].upper()]
    try:
        if scale == 1 and _is_plain(number):
            return int(number)
        value = Decimal(number) * scale  # a float of 1.001 has no whole number of millionths
        if not math.isfinite(float(value)) or value != value.to_integral_value():
            raise ValueError
        return int(value)
    except (ValueError, ArithmeticError):
        raise UserError(f"--set {key}={text}: takes a whole number, such as 4096, 1e6 or 12.8M") from None


def _is_plain(number: str) -> bool:
    return number.replace("_", "").lstrip("+-").isdigit()


def to_json(config: Any) -> Any:
    """A dataclass, and all inside it, as values that `json` writes."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {field.name: to_json(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, tuple | list):
        return [to_json(item) for item in config]
    if isinstance(config, Mapping):
        return {key: to_json(value) for key, value in config.items()}
    return config


def from_json(kind: type[Config], value: Mapping[str, Any], where: str = "config") -> Config:
    """The inverse of `to_json`.

    Fields that `value` lacks take their defaults. Raises UserError for a field that `kind` doesn't know: a file from a
    newer clipkit must not be read as if it said less.
    """
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(value) - set(hints))
    if unknown:
        raise UserError(f"{where}: unknown field {unknown[0]!r}; was it written by a newer clipkit? Update this one")
    fields = {name: _restore(hints[name], item, f"{where}.{name}") for name, item in value.items()}
    try:
        return kind(**fields)
    except TypeError as error:
        raise UserError(f"{where}: incomplete ({error}); the file may be damaged") from error


def _restore(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        choices = [choice for choice in arguments if choice is not type(None)]
        return _restore(choices[0], value, where) if len(choices) == 1 else value
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        return from_json(typing.cast(type, kind), value, where)
    if origin is tuple:
        variadic = len(arguments) == 2 and arguments[1] is Ellipsis
        inner = [arguments[0]] * len(value) if variadic else list(arguments)
        return tuple(_restore(item_kind, item, where) for item, item_kind in zip(value, inner, strict=True))
    if kind is float and isinstance(value, int):
        return float(value)
    return value


def differences(ours: Any, theirs: Any, path: str = "") -> list[str]:
    """The paths at which two JSON values differ, as `path: ours -> theirs`."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        lines = []
        for key in sorted(set(ours) | set(theirs)):
            lines += differences(ours.get(key), theirs.get(key), f"{path}.{key}" if path else key)
        return lines
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        lines = []
        for place, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            lines += differences(one, other, f"{path}.{place}")
        return lines
    return [] if ours == theirs else [f"{path}: {_in_words(ours)} -> {_in_words(theirs)}"]


def _in_words(value: Any) -> str:
    """A value for a line; of a table that the other side hasn't, its name and its number of samples say enough."""
    if isinstance(value, dict) and "name" in value:
        return f"{value['name']}, {value['samples']:,} samples" if "samples" in value else str(value["name"])
    return str(value)
