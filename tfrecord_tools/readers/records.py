"""Read TFRecord shards: those of a dataset directory, and those of img2dataset's tfrecord writer.

A directory, clipkit's own or one of TFDS's with an image and a text, says in features.json what its columns are: a
missing value stays missing and "" stays "", so what is built from its records has the same records. img2dataset's
Examples are flat: `key`, the image under the name of its encoding (`jpg`, `png`, `webp`), `txt`, and each metadata
column. Its writer has no missing values: it writes a null as the bytes "", whatever the column's type. So "" reads as
missing there, in text columns too.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from clipkit.errors import UserError
from clipkit.formats.captions import CaptionChoice, merge_captions
from clipkit.formats.features import Feature, find_caption, find_image, parse_features
from clipkit.formats.kinds import own_name
from clipkit.formats.records import read_examples
from clipkit.formats.tables import IMAGE_SUFFIXES, USUAL, PairColumns
from clipkit.storage.files import read_json
from clipkit.tfrecord_tools.reasons import BAD_TEXT, NO_IMAGE
from clipkit.tfrecord_tools.sample import Sample, drop_account, samples_of

# ---- A dataset directory ---------------------------------------------------------------------------------------------


def dataset_features(folder: Path) -> dict[str, Feature]:
    """The columns of a dataset directory. Raises UserError when its features.json isn't TFDS's."""
    try:
        return parse_features(read_json(folder / "features.json"))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder / 'features.json'} isn't TFDS's ({error!r}): name a dataset that TFDS opens"
        ) from error


def read_dataset(
    path: Path,
    features: Mapping[str, Feature],
    start: int = 0,
    stop: int | None = None,
    columns: PairColumns = USUAL,
) -> Iterator[Sample]:
    """The samples of the records that begin in bytes [start, stop) of one shard. Raises UserError, as for tfrecords.

    `columns_left_out` are left out.
    """
    image, caption = _image_and_caption(path, features, columns)
    left_out = columns_left_out(features, image)
    for offset, found in read_examples(path, start, stop):
        values = {
            name: feature.value(found[name])
            for name, feature in features.items()
            if name in found and name not in left_out
        }
        data, text = values.pop(image, None), values.pop(caption, None)
        name = own_name(features, "key")
        if values.get(name) is None:  # absent, or without a value
            values[name] = f"{path.name}-{offset}"
        jpg = data if isinstance(data, bytes) and data else None
        sample = Sample(str(values[name]), jpg, text, values, None if jpg else NO_IMAGE)
        yield from samples_of(sample, columns.captions, path)


def columns_left_out(features: Mapping[str, Feature], image: str) -> list[str]:
    """Further images, and columns that are nested in a way that clipkit doesn't know."""
    further = {name for name, feature in features.items() if feature.kind == "image" and name != image}
    return [name for name, feature in features.items() if feature.kind == "other" or name in further]


def _image_and_caption(path: Path, features: Mapping[str, Feature], columns: PairColumns) -> tuple[str, str]:
    images = [name for name, feature in features.items() if feature.kind == "image" and not feature.is_list]
    texts = [name for name, feature in features.items() if feature.kind == "text"]
    image, caption = columns.image or find_image(features), columns.caption or find_caption(features, lists=True)
    if image not in images:
        raise UserError(f"{path.parent} has no image column {image or ''}: choose --image-column among {_list(images)}")
    if caption not in texts:
        raise UserError(
            f"{path.parent} has no caption column {caption or ''}: choose --caption-column among {_list(texts)}"
        )
    return image, caption


def _list(names: list[str]) -> str:
    return ", ".join(names) or "none"


# ---- img2dataset's files ---------------------------------------------------------------------------------------------


def read_tfrecord(
    path: Path, start: int = 0, stop: int | None = None, captions: CaptionChoice | None = None
) -> Iterator[Sample]:
    """The samples of the records that begin in bytes [start, stop) of a TFRecord file, in order.

    Raises RecordError when one is cut off or damaged.
    """
    for offset, values in read_examples(path, start, stop):
        yield from samples_of(_sample(values, fallback=f"{path.stem}-{offset}"), captions, path)


def _sample(values: dict[str, list[Any]], fallback: str) -> Sample:
    images = [values.pop(name) for name in sorted(values) if name in IMAGE_SUFFIXES]  # further ones are left out
    image = _one(images[0]) if images else None
    key = fallback
    try:
        columns = {name: _text(_one(items)) for name, items in sorted(values.items())}
        drop_account(columns)
        key = str(columns.setdefault("key", fallback) or fallback)
    except UnicodeDecodeError:
        return Sample(key, None, None, {}, BAD_TEXT)
    has_caption = "txt" in columns or "caption" in columns
    caption = columns.pop("txt", None)
    if caption is None or isinstance(caption, str):
        caption = merge_captions(caption, columns)
    if caption is None and has_caption:
        caption = ""
    problem = None if isinstance(image, bytes) and image else NO_IMAGE
    return Sample(key, image if problem is None else None, caption, columns, problem)


def _one(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else values or None


def _text(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8") or None
    if isinstance(value, list) and isinstance(value[0], bytes):
        return [item.decode("utf-8") for item in value]
    return value
