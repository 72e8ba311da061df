"""Captions as people keep them: text, bytes, a list of several, or a struct, which only its owner can take apart.

Bytes are text in UTF-8. A list holds several captions of one image: training draws one of them each time, and what
stores one caption a record asks which (`CaptionChoice`). A struct is refused with the names of its fields, for one of
them may be the caption and another its language.

What an image came with is its captions of the source `original`, in the column `txt`. Those of other sources (alt text,
a captioner's) have a column each, `clipkit_captions_SOURCE`, a list of texts; a record without any lacks the key.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import pyarrow as pa

from clipkit.errors import UserError
from clipkit.formats.kinds import OWN

CaptionChoice = Literal["first", "random", "each"]
CAPTION_CHOICES: tuple[CaptionChoice, ...] = get_args(CaptionChoice)
REPEATED = "caption"  # the column in which img2dataset writes `txt` again
ORIGINAL = "original"
OF_SOURCE = OWN + "captions_"


def check_caption_type(kind: pa.DataType, column: str, table: object) -> None:
    """Raise UserError for a column of a table whose type no caption has."""
    item = kind.value_type if _is_list(kind) else kind
    if pa.types.is_struct(item):
        raise _structs(column, table, [item.field(i).name for i in range(item.num_fields)])
    if pa.types.is_nested(item):
        raise UserError(f"column {column!r} of {table} holds {kind}, not captions: name a column of text")


def captions_of(value: Any, place: object) -> list[str]:
    """The captions in a value of any kind; of a list those that aren't blank, or one that is.

    Raises UnicodeDecodeError for bytes that aren't UTF-8, UserError, naming the `place`, for a struct.
    """
    if isinstance(value, str):
        return [value]
    if isinstance(value, list | tuple):
        if any(isinstance(item, list | tuple) for item in value):
            raise UserError(f"{place} has lists of lists for captions: give each image one list")
        found = [text for item in value for text in captions_of(item, place)]
        return [text for text in found if text.strip()] or found[:1]
    if isinstance(value, bytes | bytearray | memoryview):
        return [bytes(value).decode("utf-8")]
    if isinstance(value, dict):
        raise _structs(REPEATED, place, list(value))
    return [] if value is None or value != value else [str(value)]


def choose_captions(captions: Sequence[str], choice: CaptionChoice | None, key: str, place: object) -> Sequence[str]:
    """Those that are stored, each in a record. `random` is a function of the sample's key.

    Raises UserError where there are several and no choice was made.
    """
    if len(captions) <= 1 or choice == "each":
        return captions
    if choice is None:
        raise UserError(
            f"{place} has {len(captions)} captions for {key}: choose --captions first, random, or each (a record each)"
        )
    return [captions[0 if choice == "first" else int(hashlib.blake2b(key.encode()).hexdigest(), 16) % len(captions)]]


def merge_captions(text: str | None, columns: dict[str, Any]) -> Any:
    """The caption of a sample that holds it as `txt` and perhaps again, in its own type, in the column `caption`.

    The column is taken out of `columns` unless it holds something else than `txt`. Where a download has found another
    column of that name in its table, its own is taken out, and the other stays.
    """
    if OWN + REPEATED in columns:
        return merge_captions(text, {REPEATED: columns.pop(OWN + REPEATED)})
    if REPEATED not in columns:
        return text
    value = columns[REPEATED]
    if value == text and text is not None:
        del columns[REPEATED]
        return text
    if value is None or value != value:
        del columns[REPEATED]
        return "" if text in (None, "nan") else text
    if text is None or text in (str(value), str([value])):
        return columns.pop(REPEATED)
    return text


def check_source(source: str) -> str:
    """`source` itself. Raises UserError for what can't be the name of captions that are added."""
    if source == ORIGINAL:
        raise UserError(f"--source {ORIGINAL} is what the records came with: choose another name, such as synthetic")
    if not re.fullmatch(r"[a-zA-Z]\w*", source, re.ASCII):
        raise UserError(f"--source {source!r}: give a letter, then letters, digits and _ only, such as synthetic")
    return source


def source_columns(names: Iterable[str]) -> dict[str, str]:
    """The columns, among `names`, with captions of other sources than `original`, by source, sorted."""
    return {name.removeprefix(OF_SOURCE): name for name in sorted(names) if name.startswith(OF_SOURCE)}


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _structs(column: str, table: object, fields: Sequence[str]) -> UserError:
    return UserError(
        f"column {column!r} of {table} holds structs of {', '.join(map(str, fields)) or 'nothing'}, not captions: put "
        "the text into a column of its own"
    )
