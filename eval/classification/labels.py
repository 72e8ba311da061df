"""Labels: what stands in people's label columns as numbers, and what the classes are called.

Half of all wrong zero-shot numbers come from here: numbers read as texts, or names in another order than the labels. So
a label is a whole number or a text and nothing else, and names are resolved once, checked, and hashed into each result.
"""

import contextlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from clipkit import embedded
from clipkit.config import nearest
from clipkit.errors import UserError, one_line
from clipkit.storage.files import read_text

# More than any set of images has; a column with larger numbers, or with more texts, holds ids.
MOST_CLASSES = 1_000_000
# A whole number as texts have it: pandas writes 3 as 3.0 where a neighbour is missing.
_WHOLE = re.compile(r"\s*([+-]?\d{1,40})(?:\.0*)?\s*")
# A WordNet id, and what some sets have behind it.
_WNID = re.compile(r"(n\d{8})(?:[-_. ]+(\S.*))?")


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
        labels_N = np.array([numbers[label] for label in plain], dtype=np.int64)
        return Labels(labels_N, *number_names(int(labels_N.max()) + 1), are_numbers=True)
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
    shown = repr(value)
    shown = shown if len(shown) <= 40 else f"{shown[:39]}…"
    raise UserError(
        f"{where}: label {shown} is {kind}, neither a whole number nor a text: "
        "choose the column of classes with --label"
    )


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


# ---- Names -----------------------------------------------------------------------------------------------------------


class Names(NamedTuple):
    """What the classes of a data set are called."""

    labels: tuple[str, ...]
    """The classes, in their order."""
    names: tuple[tuple[str, ...], ...]
    """Of each class one name or more."""
    notes: tuple[str, ...] = ()
    """What may be wrong with the names."""


def class_name(text: str) -> str:
    """A class's name as sentences have it: `dog_face`, as folders are called, is a dog face."""
    return " ".join(text.replace("_", " ").split()) or text


def fill(sentence: str, name: str) -> str:
    """The template with the class name in it; other braces stay as they are."""
    return sentence.replace("{}", name)


def name_classes(
    labels: Sequence[str],
    where: Path,
    file: Path | None = None,
    *,
    numbers: bool = False,
    occurring: Sequence[str] | None = None,
) -> Names:
    """Names for the labels of a data set, whose order is that of the label numbers.

    Without a file a wnid (`n01440764`) gets its ImageNet name as curated for CLIP, what stands behind another one
    (`n02085620-Chihuahua`) is its name, and any other label is its own. With a file, a JSON object from label to a name
    or a list of names: its keys, in its order, are the classes, and may be more than occur in the data; or a list of
    names, in JSON or a line each: of the labels themselves, or else in label order. `numbers` says that the labels are
    bare numbers, of which there may be more names than occur; an object needs to name those `occurring` only.
    Raises UserError for a label without a name, and for a file that may mean two things.
    """
    if file is not None:
        keys, listed = _named_by_file(labels, where, file, numbers)
        known = set(keys)
        for label in labels if occurring is None else occurring:
            if label not in known:
                raise UserError(f"{file} has no class {label!r}, which occurs in {where}: {nearest(label, keys)}")
        return Names(keys, listed, _twice_note(listed, file))
    imagenet = {entry["wnid"]: entry["name"] for entry in embedded.imagenet_classes()}
    names: list[str] = []
    unknown: list[str] = []
    wnids = False
    for label in labels:
        wnid, words = match.groups() if (match := _WNID.fullmatch(label)) else ("", None)
        wnids = wnids or bool(wnid)
        names.append(imagenet.get(wnid) or class_name(words or label))
        if wnid not in imagenet and not words:
            unknown.append(label)
    found = Names(tuple(labels), tuple((name,) for name in names))
    if not wnids:
        return found._replace(notes=_twice_note(found.names, where))
    if not unknown:
        return found
    such = ", ".join(unknown[:5]) + (", …" if len(unknown) > 5 else "")
    text = f"{len(unknown):,} of {len(labels):,} classes aren't among ImageNet's, and are prompted as they are called"
    return found._replace(notes=(f"{where}: {text} ({such}): name them with --classes",))


def _twice_note(names: tuple[tuple[str, ...], ...], where: Path) -> tuple[str, ...]:
    """A remark on a name that several classes have."""
    counts = Counter(name for of_class in names for name in {name.lower() for name in of_class})
    twice = [name for name, count in counts.items() if count > 1]
    if not twice:
        return ()
    more = f" and {len(twice) - 1:,} more names are" if len(twice) > 1 else " is"
    return (f"{where}: {twice[0]!r}{more} of several classes, which no prompt can tell apart",)


def _named_by_file(
    labels: Sequence[str], where: Path, file: Path, numbers: bool
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    listed = _read_names(file)
    if not isinstance(listed, dict | list) or not listed:
        raise UserError(
            f'{file} isn\'t a list of names or an object: write {{"label": "name"}} or {{"label": ["name", …]}}'
        )
    items = list(listed.items()) if isinstance(listed, dict) else list(enumerate(listed))
    names = tuple(_names(file, label, value) for label, value in items)
    if isinstance(listed, dict):
        return tuple(listed), names
    return _labels_of_list(labels, [each[0] for each in names], where, file, numbers), names


def _names(file: Path, label: str | int, value: Any) -> tuple[str, ...]:
    names = value if isinstance(value, list) else [value]
    if not names or not all(isinstance(name, str) and name.strip() for name in names):
        which = f"class {label!r}" if isinstance(label, str) else f"place {label + 1:,}"
        raise UserError(f"{file}: {which} has no name: give it a text or a list of texts")
    if wnid := next((name for name in names if _WNID.fullmatch(name.strip())), None):
        raise UserError(f"{file} names a class {wnid!r}, a WordNet id, which no prompt can use: write its name only")
    return tuple(map(class_name, names))


def _labels_of_list(labels: Sequence[str], names: list[str], where: Path, file: Path, numbers: bool) -> tuple[str, ...]:
    """The labels that a list of names is for. It is in label order, unless it lists the labels themselves."""
    if numbers and len(names) >= len(labels):
        return tuple(map(str, range(len(names))))
    called = {class_name(label): label for label in labels}
    listed = called.keys() & names
    if not numbers and len(listed) == len(labels):
        if len(set(names)) < len(names):
            twice = next(name for name, count in Counter(names).items() if count > 1)
            raise UserError(f"{file} gives the class {twice!r} twice: remove one")
        return tuple(called.get(name, name) for name in names)
    if listed and not numbers:
        lacking = next((label for name, label in called.items() if name not in listed), labels[-1])
        raise UserError(
            f"{file} lists some labels of {where}, such as {min(listed)!r}, but not {lacking!r}: list all of them, or "
            'write an object {"label": "name"}'
        )
    if len(names) != len(labels):
        raise UserError(f"{file} names {len(names):,} classes, {where} has {len(labels):,}: give one for each label")
    return tuple(labels)


def _read_names(file: Path) -> Any:
    """What a file of class names holds: JSON, or a list of lines. Raises UserError for a key that it has twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for label, value in pairs:
            if label in found:
                raise UserError(f"{file} has the class {label!r} twice, as {found[label]!r} and {value!r}: remove one")
            found[label] = value
        return found

    text = read_text(file, "classes file")
    if file.suffix.lower() != ".json" and not text.lstrip().startswith(("[", "{")):
        return text.split("\n")
    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{file} isn't valid JSON ({one_line(error)}): mend it, or write a name a line into a .txt"
        ) from error
