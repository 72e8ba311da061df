"""Labels as numbers: what stands in people's label columns, read as whole numbers or as texts, and nothing else."""

import contextlib
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from clipkit import embedded
from clipkit.errors import UserError

# More than any set of images has; a column with larger numbers, or with more texts, holds ids.
MOST_CLASSES = 1_000_000
# A whole number as texts have it: pandas writes 3 as 3.0 where a neighbour is missing.
_WHOLE = re.compile(r"\s*([+-]?\d{1,40})(?:\.0*)?\s*")


class Labels(NamedTuple):
    """Labels as places in `names`; `named` is False for bare numbers, of which no prompt can be made."""

    labels_N: NDArray[np.int64]
    names: tuple[str, ...]
    named: bool
    are_numbers: bool = False
    """Whether numbers stand in the data, and no list of names."""


def is_missing(value: Any) -> bool:
    """Whether a label is absent: null, NaN, or blank."""
    value = _opened(value)
    return value is None or value != value or (isinstance(value, str | bytes) and not value.strip())


def enumerate_labels(values: Sequence[Any], where: str) -> Labels:
    """Number the labels, none of which is missing. Raises UserError that begins with `where`.

    Whole numbers are numbers whatever their type (`3.0`, a decimal, the text "3"), bytes are UTF-8 text, and a list of
    one element is that; all else is refused. Texts are sorted. Numbers keep their value, as they point into somebody's
    list of classes; so folders named 0 to 999 aren't put in the order 0, 1, 10, 100, which is how ImageNetV2 is
    scored wrongly.
    """
    plain = [_plain(_opened(value), where) for value in values]
    numbers = _numbers(set(plain), where)
    if numbers is not None:
        return number_labels(np.array([numbers[label] for label in plain], dtype=np.int64))
    names = sorted(set(map(str, plain)))
    _refuse_ids(len(names) - 1, where)
    place = {name: number for number, name in enumerate(names)}
    return Labels(np.array([place[str(label)] for label in plain], dtype=np.int64), tuple(names), True)


def _opened(value: Any) -> Any:
    return value[0] if isinstance(value, list | tuple) and len(value) == 1 else value


def _plain(value: Any, where: str) -> int | str:
    """A label as a whole number or a text. Raises UserError for what is neither."""
    if isinstance(value, int | str):
        return int(value) if isinstance(value, bool) else value
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{where}: label {value[:20]!r} isn't UTF-8 text: convert the labels") from None
    if isinstance(value, float | Decimal):
        with contextlib.suppress(OverflowError):  # infinity
            if int(value) == value:
                return int(value)
    kind = f"of type {type(value).__name__}"
    if isinstance(value, dict | list):
        kind = f"a struct of {', '.join(value)}" if isinstance(value, dict) else f"a list of {len(value)}"
    raise UserError(
        f"{where}: label {_shortened(repr(value))} is {kind}, neither a whole number nor a text: "
        "choose the column of classes with --label"
    )


def _shortened(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:39]}…"


def _numbers(labels: set[int | str], where: str) -> dict[int | str, int] | None:
    """The number of each label where all are whole numbers, else None. Raises UserError for what isn't a class."""
    texts = {label: match[1] for label in labels if (match := _WHOLE.fullmatch(str(label)))}
    if len(texts) < len(labels):
        return None
    numbers = {label: int(text) for label, text in texts.items()}
    spelled: dict[int, str] = {}
    for text in sorted(texts.values()):
        other = spelled.setdefault(int(text), text)
        if other != text:
            raise UserError(f"{where}: labels {other!r} and {text!r} are one number: spell them alike")
    if min(numbers.values()) < 0:
        raise UserError(f"{where}: label {min(numbers.values())} is negative: images without a label can't be scored")
    _refuse_ids(max(numbers.values()), where)
    return numbers


def _refuse_ids(last: int, where: str) -> None:
    if last >= MOST_CLASSES:
        raise UserError(
            f"{where}: {last + 1:,} classes are more than the {MOST_CLASSES:,} that a task may have, so these are ids: "
            "choose the column of classes with --label"
        )


def number_labels(labels_N: NDArray[np.int64]) -> Labels:
    """Labels that are bare numbers."""
    return Labels(labels_N, *number_names(int(labels_N.max()) + 1), are_numbers=True)


def number_names(count: int) -> tuple[tuple[str, ...], bool]:
    """The names of classes that are known by number only: a thousand of them are ImageNet-1K's in its order."""
    if count == 1000:
        return tuple(entry["wnid"] for entry in embedded.imagenet_classes()), True
    return tuple(str(number) for number in range(count)), False


def listed_labels(labels: Labels, names: Sequence[str], where: str) -> Labels:
    """Labels whose names the data list, in label order. Raises UserError for a number beyond them."""
    if labels.labels_N.max() >= len(names):
        raise UserError(f"{where}: label {labels.labels_N.max()}, but {len(names)} class names: mend the metadata")
    return Labels(labels.labels_N, tuple(names), True)
