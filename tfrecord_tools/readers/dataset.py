"""Read the shards of a dataset directory, clipkit's own or one of TFDS's with an image and a text.

A missing value stays missing and "" stays "", so what was built from a dataset's records has the same records.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from clipkit.errors import UserError
from clipkit.formats.features import Feature, find_caption, find_image, parse_features
from clipkit.formats.records import RecordError, decode_example, read_range
from clipkit.storage.files import read_json
from clipkit.tfrecord_tools.readers.parquet import USUAL, PairColumns
from clipkit.tfrecord_tools.reasons import NO_IMAGE
from clipkit.tfrecord_tools.sample import Sample


def dataset_features(folder: Path) -> dict[str, Feature]:
    """The columns of a dataset directory. Raises UserError when its features.json isn't TFDS's."""
    try:
        return parse_features(read_json(folder / "features.json"))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder / 'features.json'} isn't TFDS's ({error!r}): name a dataset that TFDS opens"
        ) from error


def read_dataset(
    path: Path, features: Mapping[str, Feature], start: int = 0, stop: int | None = None, columns: PairColumns = USUAL
) -> Iterator[Sample]:
    """The samples of the records that begin in bytes [start, stop) of one shard. Raises UserError, as for tfrecords.

    Columns that are nested in a way that clipkit doesn't know are left out.
    """
    image, caption = _image_and_caption(path, features, columns)
    for offset, record in read_range(path, start, stop):
        try:
            found = decode_example(record)
        except ValueError as error:
            raise RecordError(path, offset, str(error)) from error
        values = {
            name: _value(feature, found[name])
            for name, feature in features.items()
            if name in found and feature.kind != "other"
        }
        data, text = values.pop(image, None), values.pop(caption, None)
        key = values.setdefault("key", f"{path.name}-{offset}")
        yield Sample(
            str(key),
            data if isinstance(data, bytes) and data else None,
            None if text is None else str(text),
            values,
            None if isinstance(data, bytes) and data else NO_IMAGE,
        )


def _image_and_caption(path: Path, features: Mapping[str, Feature], columns: PairColumns) -> tuple[str, str]:
    images = [name for name, feature in features.items() if feature.kind == "image" and not feature.is_list]
    texts = [name for name, feature in features.items() if feature.kind == "text" and not feature.is_list]
    image, caption = columns.image or find_image(features), columns.caption or find_caption(features)
    if image not in images:
        raise UserError(f"{path.parent} has no image column {image or ''}: choose --image-column among {_list(images)}")
    if caption not in texts:
        raise UserError(
            f"{path.parent} has no caption column {caption or ''}: choose --caption-column among {_list(texts)}"
        )
    return image, caption


def _list(names: list[str]) -> str:
    return ", ".join(names) or "none"


def _value(feature: Feature, values: list[Any]) -> Any:
    if feature.kind == "text":
        values = [value.decode("utf-8", "replace") for value in values]
    elif feature.kind == "bool":
        values = [bool(value) for value in values]
    if feature.is_list:
        return values
    return values[0] if values else None
