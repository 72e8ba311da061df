"""The questions of suites that ask a model to choose: SugarCrepe, Winoground, ARO, MMVP, and files that look like them.

A question is one image with the right caption and wrong ones, or two images with two captions. Rows are told by their
columns; every row of a file must be of one kind.

- `caption` and `negative_caption` (SugarCrepe), `true_caption` and `false_caption` (ARO), or `caption_options`, the
  first of which is right (ARO's orders of COCO and Flickr30k); the image is a file, in ARO cut to its box `bbox_x` …
- `image_0`, `image_1`, `caption_0`, `caption_1` (Winoground): files, or encoded images in parquet.
- `cue`, `candidates` and those of them that are its `associations` (WinoGAViL): images of the candidates' names, or
  encoded in `candidate_images`.
- `Question ID`, `Type` and `Statement` (MMVP-VLM): images `Type/ID.jpg`, each two rows a pair, "a photo of " in front.
"""

import ast
import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from clipkit.errors import UserError
from clipkit.eval.retrieval.annotations import check_captions
from clipkit.formats.folders import printable
from clipkit.formats.tables import FILE_NAMES, IMAGE_SUFFIXES, find_name, is_hidden, open_parquet, table_errors
from clipkit.pixels.images import ImageError, decode, read_encoded
from clipkit.storage.files import read_json, read_text

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
# What might say which of some captions is right, and further wrong ones: neither is read.
_ANSWERS = frozenset(
    ("label", "answer", "answer_index", "correct", "correct_index", "correct_option", "right", "target", "gt")
)
_MORE_WRONG = re.compile(r"(negative|false)_captions?_?\d+")
CATEGORIES = ("category", "type", "collapsed_tag", "relation_name", "attributes", "tag")
KINDS = (
    "a JSON, JSON lines, CSV or parquet file of questions, or a folder of them (SugarCrepe, Winoground, ARO, MMVP, "
    "WinoGAViL)"
)

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Picture:
    """An image of a question: its key, and its file or its bytes, perhaps cut to a box (left, top, right, bottom)."""

    key: str
    source: Path | bytes
    box: Box | None = None


@dataclass(frozen=True)
class Question:
    """One image and two captions or more, of which the first is right; or as many images, in the captions' order; or
    one caption and images, of which some are `associated` with it, by their places.
    """

    key: str
    category: str
    pictures: tuple[Picture, ...]
    captions: tuple[str, ...]
    associated: tuple[int, ...] = ()


def read_questions(data: Path, images: Path | None) -> list[Question]:
    """The questions of a file or of all files in a folder, in order; those of several files have the files' names as
    categories where they name none. Raises UserError for what is no question, and for an image that is missing.
    """
    files = _question_files(data)
    found: list[Question] = []
    for file in files:
        folder = images or file.parent
        if not folder.is_dir():
            raise UserError(f"--images {folder} isn't a folder: give the folder with the images of {file}")
        places = (folder, *sorted(each for each in folder.iterdir() if each.is_dir() and not is_hidden(each.name)))
        rows = list(_rows(file))
        if not rows:
            raise UserError(f"{file} has no questions")
        prefix = f"{file.stem}:" if len(files) > 1 else ""
        category = file.stem if len(files) > 1 else ""
        if {"Question ID", "Statement"} <= rows[0][1].keys():
            found += _pairs(rows, file, places, prefix)
        else:
            found += [_question(row, f"{file} row {key}", places, prefix + key, category) for key, row in rows]
    if len({0 if question.associated else len(question.pictures) for question in found}) > 1:
        raise UserError(f"{data} mixes questions of several kinds: evaluate them one by one")
    return found


def read_picture(picture: Picture) -> bytes | ImageError:
    """The encoded image; one that is cut to a box is encoded again, without loss."""
    encoded = picture.source if isinstance(picture.source, bytes) else read_encoded(picture.source)
    if picture.box is None or isinstance(encoded, ImageError):
        return encoded
    try:
        cut = Image.fromarray(decode(encoded)).crop(picture.box)
        if not cut.width or not cut.height:
            return ImageError(f"the box {picture.box} is empty")
        buffer = io.BytesIO()
        cut.save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()
    except ImageError as error:
        return error


def _question_files(data: Path) -> list[Path]:
    if not data.exists():
        raise UserError(f"data {data} doesn't exist: give {KINDS}")
    if data.is_file():
        if data.suffix.lower() not in SUFFIXES:
            raise UserError(f"can't tell what {data} is: give {KINDS}")
        return [data]
    found = sorted(each for each in data.iterdir() if each.suffix.lower() in SUFFIXES and not is_hidden(each.name))
    if not found:
        raise UserError(f"{data} holds no questions: give {KINDS}")
    return found


def _rows(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows of a file with their keys. Raises UserError for one that is no object."""
    rows: Iterator[tuple[Any, Any]]
    match file.suffix.lower():
        case ".json":
            content = read_json(file)
            rows = iter(content.items() if isinstance(content, dict) else enumerate(content))
        case ".jsonl":
            lines = (line for line in read_text(file, "questions").split("\n") if line.strip())
            try:
                rows = iter([(number, json.loads(line)) for number, line in enumerate(lines)])
            except ValueError as error:
                raise UserError(f"{file} has a line that isn't JSON ({error}): mend it") from error
        case ".csv":
            rows = iter(enumerate(csv.DictReader(io.StringIO(read_text(file, "questions")))))
        case _:
            with table_errors(file):
                rows = iter(enumerate(open_parquet(file).read().to_pylist()))
    for key, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{file} row {key} isn't an object with an image and captions: give {KINDS}")
        yield str(row.get("id", key)), row


def _question(row: Mapping[str, Any], place: str, places: Sequence[Path], key: str, category: str) -> Question:
    named = next((row[name] for usual in CATEGORIES for name in row if name.lower() == usual and row[name]), category)
    category = "_".join(map(str, named)) if isinstance(named, list) else str(named)
    if "cue" in row:
        return _association(row, place, places, key)
    if "image_0" in row:
        texts = [row.get("caption_0"), row.get("caption_1")]
        pictures = tuple(_picture(row.get(f"image_{number}"), place, places, None) for number in (0, 1))
    else:
        wrong = next((name for name in ("negative_caption", "false_caption") if name in row), None)
        right = next((name for name in ("caption", "true_caption") if name in row), None)
        name = find_name(list(row), FILE_NAMES)
        texts = row.get("caption_options") or [right and row[right], wrong and row[wrong]]
        if name is None or not isinstance(texts, list):
            columns = ", ".join(map(str, row))
            raise UserError(f"{place} isn't a question ({columns}): it needs an image, caption and negative_caption")
        _refuse_unread(row, place)
        pictures = (_picture(row[name], place, places, _box(row)),)
    captions = tuple(text for each in texts for text in check_captions(each, place))
    if len(captions) != len(texts) or len(captions) < 2:
        raise UserError(f"{place} has {len(captions)} captions to choose from: it needs the right one and a wrong one")
    return Question(key, category, pictures, captions)


def _refuse_unread(row: Mapping[str, Any], place: str) -> None:
    """Raise UserError for columns that would change which captions there are, or which is right."""
    if more := next((name for name in row if _MORE_WRONG.fullmatch(name.lower())), None):
        raise UserError(
            f"{place} has a column {more!r}: put all its captions into caption_options, the right one first"
        )
    answer = next((name for name in row if name.lower() in _ANSWERS), None)
    if row.get("caption_options") and answer is not None and row[answer] not in (0, "0", row["caption_options"][0]):
        raise UserError(
            f"{place} has {answer} {row[answer]!r} beside caption_options, of which the first is the right one: put it "
            f"there, and leave out {answer}"
        )


def _association(row: Mapping[str, Any], place: str, places: Sequence[Path], key: str) -> Question:
    """WinoGAViL. Its CSV has lists as text."""
    candidates, associations = (_names(row.get(name), f"{place} {name}") for name in ("candidates", "associations"))
    images = row.get("candidate_images") or candidates
    right = tuple(number for number, name in enumerate(candidates) if name in associations)
    if len(images) != len(candidates) or not 0 < len(right) == len(associations) < len(candidates):
        raise UserError(f"{place}: each association must be one of its candidates, and each candidate needs an image")
    pictures = tuple(
        _picture(image, f"{place} {name}", places, None) for image, name in zip(images, candidates, strict=True)
    )
    (cue,) = check_captions(str(row["cue"]), place)
    article = "An" if cue[0].lower() in "aeiou" else "A"  # as DataComp asks for it
    return Question(key, f"{len(candidates)} candidates", pictures, (f"{article} {cue.lower()}",), right)


def _names(value: Any, place: str) -> list[str]:
    """A list of names, or its text as JSON or Python write it."""
    try:
        names = ast.literal_eval(value) if isinstance(value, str) else value
    except (SyntaxError, ValueError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{place} isn't a list of names: write ['a', 'b'], as WinoGAViL's table does")
    return names


def _pairs(
    rows: Sequence[tuple[str, Mapping[str, Any]]], file: Path, places: Sequence[Path], prefix: str
) -> Iterator[Question]:
    """MMVP-VLM: rows 1 and 2, 3 and 4 … are pairs, whose statements are each true of its own image.

    Each statement stands behind "a photo of ", as in the suite's own script (Tong et al., "Eyes Wide Shut?", 2024).
    """
    if len(rows) % 2:
        raise UserError(f"{file} has {len(rows)} rows: each two are a pair, so one is missing")
    for (_, first), (_, second) in zip(rows[::2], rows[1::2], strict=True):
        numbers = [str(row["Question ID"]) for row in (first, second)]
        place, category = f"{file} questions {' and '.join(numbers)}", str(first.get("Type") or "")
        if category != str(second.get("Type") or ""):
            raise UserError(f"{place} are of two types: they aren't a pair")
        statements = [text for row in (first, second) for text in check_captions(row["Statement"], place)]
        captions = [f"a photo of {statement}" for statement in statements]
        pictures = []
        for number in numbers:
            names = [f"{category}/{number}", number]
            tried = [f"{name}.{suffix}" for name in names for suffix in ("jpg", *sorted(IMAGE_SUFFIXES - {"jpg"}))]
            pictures.append(_find(tried, place, places))
        yield Question(f"{prefix}{numbers[0]}", category, tuple(pictures), tuple(captions))


def _picture(value: Any, place: str, places: Sequence[Path], box: Box | None) -> Picture:
    """An image by its file's name, or as parquet holds it."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return Picture(place.rpartition("/")[2], value, box)
    if not value:
        raise UserError(f"{place} has captions without an image: leave it out")
    name = str(value)
    names = [name] if "." in name.rpartition("/")[2] else [f"{name}.{each}" for each in ("png", "jpg", "jpeg", "webp")]
    bare = [each.rpartition("/")[2] for each in names]
    found = _find([*names, *bare], place, places)
    return Picture(found.key if box is None else f"{found.key}{list(box)}", found.source, box)


def _find(names: Sequence[str], place: str, places: Sequence[Path]) -> Picture:
    for name in dict.fromkeys(names):
        fitting = [folder for folder in places if (folder / name).is_file()]
        if len(fitting) > 1:
            raise UserError(f"{place}: {name} is in {fitting[0]} and {fitting[1]}: say which by --images")
        if fitting:
            return Picture(printable(name), fitting[0] / name)
    raise UserError(
        f"{place}: its image {names[0]} isn't in {places[0]} or a folder in it: put it there, or name its folder "
        "by --images"
    )


def _box(row: Mapping[str, Any]) -> Box | None:
    """ARO's box of the region that the captions are about."""
    if "bbox_x" not in row:
        return None
    left, top, width, height = (int(row[f"bbox_{name}"]) for name in ("x", "y", "w", "h"))
    return left, top, left + width, top + height
