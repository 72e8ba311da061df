"""Read the TFRecord shards of img2dataset's tfrecord writer.

Its Examples are flat: `key`, the image under the name of its encoding (`jpg`, `png`, `webp`), `txt`, and each metadata
column. The writer has no missing values: it writes a null as the bytes "", whatever the column's type. So "" reads as
missing here, in text columns too.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clipkit.formats.records import RecordError, decode_example, read_range
from clipkit.formats.tables import IMAGE_SUFFIXES
from clipkit.tfrecord_tools.reasons import BAD_TEXT, NO_IMAGE
from clipkit.tfrecord_tools.sample import DROPPED_COLUMNS, Sample


def read_tfrecord(path: Path, start: int = 0, stop: int | None = None) -> Iterator[Sample]:
    """The samples of the records that begin in bytes [start, stop) of a TFRecord file, in order.

    Raises RecordError when one is cut off or damaged.
    """
    for offset, record in read_range(path, start, stop):
        try:
            values = decode_example(record)
        except ValueError as error:
            raise RecordError(path, offset, str(error)) from error
        yield _sample(values, fallback=f"{path.stem}-{offset}")


def _sample(values: dict[str, list[Any]], fallback: str) -> Sample:
    image_name = next((name for name in sorted(values) if name in IMAGE_SUFFIXES), None)
    image = _one(values.pop(image_name)) if image_name else None
    key = fallback
    try:
        columns = {name: _text(_one(items)) for name, items in sorted(values.items()) if name not in DROPPED_COLUMNS}
        key = str(columns.setdefault("key", fallback) or fallback)
    except UnicodeDecodeError:
        return Sample(key, None, None, {}, BAD_TEXT)
    has_caption = "txt" in columns or "caption" in columns
    caption = columns.pop("txt", None) or columns.get("caption") or ("" if has_caption else None)
    columns.pop("caption", None)
    problem = None if isinstance(image, bytes) and image else NO_IMAGE
    return Sample(key, image if problem is None else None, None if caption is None else str(caption), columns, problem)


def _one(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else values or None


def _text(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8") or None
    if isinstance(value, list) and isinstance(value[0], bytes):
        return [item.decode("utf-8") for item in value]
    return value
