"""Images with their captions from where people have them: a TFDS directory, webdataset tars, parquet, or a file that
names the images.

All give the same: the captions of every image, known at once, and the encoded images in that order. Where a record or
a row holds one caption, those with the same image, to the byte, are one image with several captions.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from clipkit.errors import UserError
from clipkit.eval.classification.labelled import (
    find_parquet,
    has_images,
    named_split,
    refuse_option,
    said_split,
    tfds_splits,
)
from clipkit.eval.retrieval.annotations import (
    CAPTIONS,
    EVALUATED,
    SUFFIXES,
    check_captions,
    find_files,
    of_split,
    pick_split,
    read_annotations,
)
from clipkit.formats.captions import check_caption_type
from clipkit.formats.dataset import open_dataset
from clipkit.formats.features import find_image
from clipkit.formats.folders import printable, split_of
from clipkit.formats.shards import ALL_SPLITS, ShardListing, list_shards
from clipkit.formats.tables import (
    IMAGE_SUFFIXES,
    find_image_column,
    find_name,
    image_bytes,
    is_hidden,
    open_parquet,
    read_columns,
    read_schema,
    table_errors,
)
from clipkit.formats.tar import Member, list_samples, read_members
from clipkit.pixels.images import ImageError, read_encoded
from clipkit.storage.stores import StoredFile

KINDS = "a TFDS directory, webdataset tars, parquet files, or a JSON or CSV that names the images"


@dataclass(frozen=True)
class CaptionedImages:
    """N images and the captions of each, one or more; `read()` yields the encoded images in their order."""

    path: Path
    """Where they are, down to the split."""
    name: str
    """For results and file names."""
    keys: list[str]
    captions: list[list[str]]
    read: Callable[[], Iterator[bytes | ImageError]]
    notes: tuple[str, ...] = ()


def open_captioned(data: Path, *, split: str | None = None, images: Path | None = None) -> CaptionedImages:
    """Open images with captions of any kind; `images` is the folder of those that a file names.

    Without `split` the first of test, validation, train that is there is taken; the result's name says which. Raises
    UserError when `data` is of no such kind or has no such split, for an image without a caption, a caption without an
    image or an empty one, and for an option that its kind can't heed.
    """
    if not data.exists():
        raise UserError(f"data {data} doesn't exist: give {KINDS}")
    if data.name in ("", ".."):
        data = data.resolve()
    if data.is_dir() and (splits := tfds_splits(data)) is not None:
        refuse_option("--images", images, f"{data} holds its images")
        return from_tfds(data, pick_split(splits, split, data))
    shards = _find_shards(data, split)
    if shards is not None and shards.kind == "tfrecords":
        raise UserError(f"{shards.folder} holds TFRecords without a dataset_info.json: give {KINDS}")
    if shards is None or shards.kind == "table":
        file = _annotations_in(data) if shards is None else shards.folder / shards.files[0].name
        return from_annotations(file, split, images)
    refuse_option("--images", images, f"{data} holds its images")
    files = [shards.folder / file.name for file in shards.files]
    if shards.kind == "parquet":
        said = ALL_SPLITS if split == ALL_SPLITS else shards.split
        named = said and split_of(split or said) == said
        found = from_parquet(files, *named_split(data, said), None if named else split)
    else:
        found = from_tars(files, *named_split(data, said_split(data, shards, split)))
    return replace(found, notes=(*shards.notes, *found.notes))


def _find_shards(data: Path, split: str | None) -> ShardListing | None:
    """The tars or parquet files with images, or a table that lies with its images; None for neither."""
    if data.is_file():
        one = StoredFile(data.name, data.stat().st_size)
        if data.suffix.lower() == ".tar":
            return ShardListing(data.parent, "tars", (one,))
        if data.suffix.lower() == ".parquet":
            return ShardListing(data.parent, "parquet" if has_images(data.parent, one) else "table", (one,))
        return None
    wanted = split or (*EVALUATED, "")
    found = find_parquet(data, wanted)
    return found or (list_shards(data, wanted, has_images) if _annotation_files(data) == [] else None)


def _annotation_files(folder: Path) -> list[Path]:
    """The files of a folder that may name images, which beside tars are something else."""
    if any(folder.glob("*.tar")) or any(folder.glob("*/*.tar")):
        return []
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
    return [file for file in files if not is_hidden(file.name) and not file.name.lower().startswith(("readme", "lic"))]


def _annotations_in(data: Path) -> Path:
    """The file that names the images. Raises UserError when there is none or more than one."""
    if data.is_file():
        if data.suffix.lower() not in SUFFIXES:
            raise UserError(f"can't tell what {data} is: give {KINDS}")
        return data
    found = _annotation_files(data)
    if not found:
        raise UserError(f"{data} holds no images with captions: give {KINDS}")
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise UserError(f"{data} holds several files that may name images ({names}): name one of them")
    return found[0]


# ---- The kinds -------------------------------------------------------------------------------------------------------


def from_annotations(file: Path, split: str | None, images: Path | None) -> CaptionedImages:
    """Images in a folder and a file that names them."""
    entries = read_annotations(file)
    chosen, notes = of_split([entry.split for entry in entries], split, file)
    entries = [entry for entry in entries if entry.split == chosen]
    folder, names = find_files([entry.file for entry in entries], file, images)

    def read() -> Iterator[bytes | ImageError]:
        return (read_encoded(folder / name) for name in names)

    name = f"{file.stem}-{chosen}" if chosen else file.stem
    path = file / chosen if chosen else file
    return CaptionedImages(path, name, [printable(each) for each in names], [e.captions for e in entries], read, notes)


def from_tfds(path: Path, split: str) -> CaptionedImages:
    """A TFDS directory, of `clipkit build-tfds` or others: `txt` or `caption` is a text, or a list of several."""
    dataset = open_dataset(path, split=split)
    if not dataset.num_records:
        raise UserError(f"{dataset.path} split {split} has no records: choose another with --split")
    columns = dataset.features
    texts = [name for name, feature in columns.items() if feature.kind == "text"]
    image, caption = find_image(columns), find_name(texts, CAPTIONS)
    if image is None or caption is None:
        lacking = "image" if image is None else "caption"
        raise UserError(f"{dataset.path} has no feature with an {lacking} among {', '.join(columns)}: give another")
    grouping = Grouping(merge=not columns[caption].is_list)
    for number in range(dataset.num_records):
        example, key = dataset.example(number), dataset.key(number)
        grouping.add(number, key, example[caption], f"{dataset.path} record {key}", example[image] or b"")

    def read() -> Iterator[bytes]:
        for number in grouping.firsts:
            yield dataset.example(number).get(image) or b""

    name = f"{dataset.name}-{split}"
    return CaptionedImages(
        dataset.path / split, name, grouping.keys, grouping.captions, read, grouping.notes(dataset.path)
    )


def from_parquet(paths: Sequence[Path], origin: Path, name: str, split: str | None) -> CaptionedImages:
    """A row an image with a list of captions, or a row a caption; a column `split` tells the rows of several."""
    schemas = [read_schema(path) for path in paths]
    caption = find_name(schemas[0].names, CAPTIONS)
    if caption is None:
        raise UserError(f"{paths[0]} has no column with captions ({', '.join(schemas[0].names)}): call it caption")
    check_caption_type(schemas[0].field(caption).type, caption, paths[0])
    splits = [_split_column(path, schema) for path, schema in zip(paths, schemas, strict=True)]
    chosen, notes = of_split([each for of_file in splits for each in of_file], split, origin)
    grouping = Grouping(merge=not pa.types.is_nested(schemas[0].field(caption).type))
    number = 0
    for path, of_file in zip(paths, splits, strict=True):
        rows = _rows(path, [caption], images=grouping.merge)
        for row, ((value, image), own) in enumerate(zip(rows, of_file, strict=True)):
            if own == chosen:
                key = f"{path.name}:{row}" if len(paths) > 1 else str(row)
                grouping.add(number, key, value, f"{path} row {row}", image)
            number += 1
    if not grouping.keys:
        raise UserError(f"{origin} has no rows: nothing to evaluate")

    def read() -> Iterator[bytes]:
        wanted, number = iter(grouping.firsts), 0
        upcoming = next(wanted, None)
        for path in paths:
            for values in _rows(path, [], images=True):
                if number == upcoming:
                    yield values[0]
                    upcoming = next(wanted, None)
                number += 1

    if chosen:
        name, origin = f"{name}-{chosen}", origin / chosen
    return CaptionedImages(origin, name, grouping.keys, grouping.captions, read, (*notes, *grouping.notes(origin)))


def _split_column(path: Path, schema: pa.Schema) -> list[str]:
    if "split" not in schema.names:
        with table_errors(path):
            return [""] * open_parquet(path).metadata.num_rows
    return [str(each or "") for batch in read_columns(path, ["split"]) for each in batch.column(0).to_pylist()]


def _rows(path: Path, columns: list[str], images: bool) -> Iterator[tuple[Any, ...]]:
    """Values of some columns, and behind them the encoded image, or None without `images`."""
    with table_errors(path):
        file = open_parquet(path)
        image = find_image_column(file.schema_arrow)
        if image is None:
            raise UserError(f"{path} has no column of encoded images: name the column `image`")
        for batch in file.iter_batches(256, columns=[*columns, *([image] if images else [])]):
            lists = [batch.column(name).to_pylist() for name in columns]
            encoded = map(image_bytes, batch.column(image).to_pylist()) if images else [None] * len(batch)
            yield from zip(*lists, encoded, strict=True)


def from_tars(paths: Sequence[Path], origin: Path, name: str) -> CaptionedImages:
    """webdataset tars as CLIP_benchmark has them: an image and a `.txt` with a caption a line; or a `.json`, a list of
    captions or an object with them.
    """
    keys: list[str] = []
    captions: list[list[str]] = []
    images: list[tuple[Path, Member]] = []
    for path in paths:
        told: list[tuple[str, Member]] = []
        for key, members in list_samples(path).items():
            image = next((members[kind] for kind in members if kind in IMAGE_SUFFIXES), None)
            text = next((kind for kind in ("txt", "json") if kind in members), None)
            if image is None and text is None:
                continue
            if image is None or text is None:
                lacking = "image" if image is None else "caption (.txt or .json)"
                raise UserError(f"{path}: sample {key} has no {lacking}: mend the tar")
            keys.append(f"{path.name}:{key}" if len(paths) > 1 else key)
            images.append((path, image))
            told.append((text, members[text]))
        contents = read_members((path, member) for _, member in told)
        for (kind, _), content, key in zip(told, contents, keys[len(captions) :], strict=True):
            place = f"{path}: sample {key}"
            found = check_captions(_captions_of_member(kind, content, place), place)
            if not found:
                raise UserError(f"{place} has no caption: leave such samples out")
            captions.append(found)
    if not keys:
        raise UserError(f"{paths[0]} holds no sample of an image and a .txt or .json: give {KINDS}")
    return CaptionedImages(origin, name, keys, captions, lambda: read_members(images))


def _captions_of_member(kind: str, content: bytes, place: str) -> Any:
    try:
        if kind == "txt":
            return content.decode().splitlines()
        value = json.loads(content)
    except ValueError as error:
        raise UserError(f"{place} has a .{kind} that can't be read ({error}): mend the tar") from error
    if isinstance(value, dict):
        name = find_name(list(value), CAPTIONS)
        return None if name is None else value[name]
    return value


class Grouping:
    """Captions by image, where records or rows come one by one; with `merge` equal images are one."""

    def __init__(self, merge: bool) -> None:
        self.merge, self.records = merge, 0
        self.keys: list[str] = []
        self.captions: list[list[str]] = []
        self.firsts: list[int] = []
        """The numbers of the records whose images are read."""
        self._place: dict[bytes | int, int] = {}

    def add(self, number: int, key: str, caption: Any, place: str, image: bytes | None) -> None:
        """Record `number`, whose image is None where it wasn't looked at. Raises UserError when it lacks either."""
        found = check_captions(caption, place)
        if not found:
            raise UserError(f"{place} has an image without a caption: leave it out")
        if image == b"":
            raise UserError(f"{place} has a caption without an image: leave it out")
        same = hashlib.blake2b(image or b"", digest_size=16).digest() if self.merge else number
        known = self._place.setdefault(same, len(self.keys))
        if known == len(self.keys):
            self.keys.append(key)
            self.captions.append([])
            self.firsts.append(number)
        self.captions[known].extend(found)
        self.records += 1

    def notes(self, place: Path) -> tuple[str, ...]:
        """A line where records were put together."""
        if len(self.keys) == self.records:
            return ()
        counts = f"{self.records:,} captions of {len(self.keys):,} images"
        return (f"{place}: {counts}: equal images are one with several captions",)
