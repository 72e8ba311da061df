"""Files that name images and say what is on them, as the benchmarks of retrieval have them, and the images they name.

- Karpathy's splits of COCO and Flickr30k, `dataset_coco.json`: images with `sentences` and a `split`.
- COCO's own JSON: `images` and `annotations`.
- A list of rows with a file and a caption or several (`coco_karpathy_test.json` of LAVIS); `image_paths` beside
  `annotations` (XTD10, Crossmodal-3600 and others in many languages, as CLIP_benchmark makes them).
- Flickr's text: `1.jpg#0<tab>a caption`, `1.jpg| 0| a caption`, or `1.jpg,a caption` in which commas need no quotes.
- Tables (CSV, TSV, JSON lines, parquet) with a column of file names and one of captions, a row a caption or an image.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from clipkit.errors import UserError
from clipkit.formats.captions import captions_of
from clipkit.formats.folders import choose_split
from clipkit.formats.tables import (
    CAPTION_NAMES,
    FILE_NAMES,
    IMAGE_SUFFIXES,
    find_name,
    is_hidden,
    is_table,
    read_columns,
    read_schema,
)
from clipkit.storage.files import read_json, read_text

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".txt", ".token")
CAPTIONS = (*CAPTION_NAMES, "captions", "sentences", "annotations")
# Of several splits the first of these is evaluated on: the numbers of papers are of test.
EVALUATED = ("test", "validation", "train")
LOOKED_AT = 20  # images, by which their folder is found
_LINE = re.compile(
    rf'"?(?P<file>[^|,\t"]+\.(?:{"|".join(sorted(IMAGE_SUFFIXES))}))"?(?:#\w+)*'
    r"(?:\s*\|\s*\d+\s*\|?|,|\t)\s*(?P<caption>.*)",
    re.IGNORECASE,
)
# A line of columns' names has a name such as `image_name` or `comment`.
_HEADING = re.compile(r"(?:.*[|,\t])?\s*\w*(?:image|file|path|caption|comment|text)\w*\s*(?:[|,\t].*)?", re.IGNORECASE)


class Annotation(NamedTuple):
    """An image's file, captions and split, "" for none."""

    file: str
    captions: list[str]
    split: str = ""


def read_annotations(path: Path) -> list[Annotation]:
    """An entry for each image in the order of the file. Raises UserError for what is of no known layout, and for a
    caption that is empty.
    """
    found: dict[str, Annotation] = {}
    for each in _entries(path):
        if not each.captions:
            raise UserError(f"{path}: the image {each.file} has no caption: leave it out of the file")
        known = found.setdefault(each.file, Annotation(each.file, [], each.split))
        if known.split != each.split:
            raise UserError(f"{path}: the image {each.file} is in two splits, {known.split!r} and {each.split!r}")
        known.captions.extend(each.captions)
    if not found:
        raise UserError(f"{path} names no image: nothing to evaluate")
    return list(found.values())


def check_captions(value: Any, place: object) -> list[str]:
    """The captions in a text or a list of texts; [] where it is missing. Raises UserError when one is blank."""
    values = value if isinstance(value, list | tuple) else [value]
    try:
        captions = [text for each in values for text in captions_of(each, place)]
    except UnicodeDecodeError as error:
        raise UserError(f"{place} has a caption that isn't UTF-8 text: convert it") from error
    if any(not text.strip() for text in captions):
        raise UserError(f"{place} has an empty caption: an image is looked for by each, so write it or leave it out")
    return captions


def pick_split(names: Iterable[str], split: str | None, place: object) -> str:
    """The split asked for in the data's own spelling; unasked test, validation or train, the first that is there.

    Raises UserError for one that isn't there.
    """
    there = list(dict.fromkeys(names))
    wanted = (split,) if split else EVALUATED
    found = next((name for each in wanted if (name := choose_split(there, each)) is not None), None)
    if found is None:
        asked = f"no split {split!r}" if split else "no split test, validation or train"
        raise UserError(f"{place} has {asked}: it has {', '.join(there)} (option --split)")
    return found


def of_split(splits: Sequence[str], split: str | None, place: object) -> tuple[str, tuple[str, ...]]:
    """The split to take where each row names its own, "" where none does, and a line on those left aside."""
    counts = Counter(splits)
    if set(counts) <= {""}:
        if split:
            raise UserError(f"--split can't be heeded: {place} names no splits: leave it out")
        return "", ()
    chosen = pick_split(counts, split, place)
    others = ", ".join(f"{name or 'none'} {count:,}" for name, count in counts.items() if name != chosen)
    return chosen, (f"{place}: reading the split {chosen}; left aside: {others}",) if others else ()


def find_files(names: Sequence[str], file: Path, folder: Path | None) -> tuple[Path, list[str]]:
    """The folder in which the images that `file` names are, and their names from there.

    Without a `folder` that of the file and the folders in it are looked at. Where the folders that the names begin with
    aren't there, images are found by the rest. Raises UserError when one is missing, and when two folders fit.
    """
    bare = [name.rpartition("/")[2] for name in names]
    ways = [list(names), bare] if len(set(bare)) == len(set(names)) else [list(names)]
    if folder is not None and not folder.is_dir():
        raise UserError(f"--images {folder} isn't a folder: give the folder with the images of {file}")
    inner = sorted(each for each in file.parent.iterdir() if each.is_dir() and not is_hidden(each.name))
    places = [folder] if folder is not None else [file.parent, *inner]
    for way in ways:
        looked_in = places[:1] if Path(way[0]).is_absolute() else places
        fitting = [place for place in looked_in if any((place / name).is_file() for name in way[:LOOKED_AT])]
        if len(fitting) > 1:
            there = " and ".join(map(str, fitting[:2]))
            raise UserError(f"the images of {file} are in {there}: say which folder to take with --images")
        if fitting:
            missing = [name for name in way if not (fitting[0] / name).is_file()]
            if missing:
                raise UserError(
                    f"{file} names {len(missing):,} of {len(set(way)):,} images that aren't in {fitting[0]}, such as "
                    f"{missing[0]}: put them there, or take them out of the file"
                )
            return fitting[0], way
    where = folder if folder is not None else f"{file.parent} or a folder in it"
    raise UserError(f"{file} names images, such as {names[0]}, that aren't in {where}: name their folder by --images")


# ---- Layouts ---------------------------------------------------------------------------------------------------------


def _entries(path: Path) -> Iterator[Annotation]:
    suffix = path.suffix.lower()
    if suffix == ".json":
        return _from_json(read_json(path), path)
    if is_table(path) and not (suffix == ".csv" and "|" in read_text(path, "table").partition("\n")[0]):
        return _from_table(path)
    return _from_lines(path)


def _from_json(content: Any, path: Path) -> Iterator[Annotation]:
    try:
        if isinstance(content, list):
            yield from (_from_row(row, f"{path} entry {number}") for number, row in enumerate(content))
        elif "image_paths" in content:
            for file, value in zip(content["image_paths"], content["annotations"], strict=True):
                yield Annotation(file, check_captions(value, f"{path}: the image {file}"))
        elif "annotations" in content:
            texts: dict[Any, list[Any]] = {image["id"]: [] for image in content["images"]}
            for each in content["annotations"]:
                if each["image_id"] not in texts:
                    raise UserError(f"{path} has a caption of an image {each['image_id']} that it doesn't name")
                texts[each["image_id"]].append(each["caption"])
            for image in content["images"]:
                file = image["file_name"]
                yield Annotation(file, check_captions(texts[image["id"]], f"{path}: the image {file}"))
        else:
            for image in content["images"]:
                file = "/".join(filter(None, (image.get("filepath"), image["filename"])))
                raw = [sentence["raw"] for sentence in image["sentences"]]
                yield Annotation(file, check_captions(raw, f"{path}: the image {file}"), image.get("split") or "")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{path} is of no layout that clipkit knows ({error!r}): give Karpathy's or COCO's JSON, or a list of "
            '{"image": …, "caption": …}'
        ) from error


def _from_row(row: Any, place: str) -> Annotation:
    file, caption = find_name(list(row), FILE_NAMES), find_name(list(row), CAPTIONS)
    if file is None or caption is None:
        raise UserError(f"{place} has no image and caption ({', '.join(map(str, row))}): call them so")
    return Annotation(str(row[file]), check_captions(row[caption], place), str(row.get("split") or ""))


def _from_table(path: Path) -> Iterator[Annotation]:
    names = read_schema(path).names
    file, caption = find_name(names, FILE_NAMES), find_name(names, CAPTIONS)
    if file is None or caption is None:
        lacking = "names of image files" if file is None else "captions"
        raise UserError(f"{path} has no column with {lacking} ({', '.join(names)}): call it image or caption")
    columns = [file, caption, *(["split"] if "split" in names else [])]
    number = 0
    for batch in read_columns(path, columns):
        for row in batch.to_pylist():
            number += 1
            yield _from_row(row, f"{path} row {number}")


def _from_lines(path: Path) -> Iterator[Annotation]:
    for number, line in enumerate(read_text(path, "captions").split("\n"), 1):
        found = _LINE.fullmatch(line.strip("\r"))
        if found is None and line.strip() and not (number == 1 and _HEADING.fullmatch(line.strip())):
            raise UserError(f"{path} line {number} isn't an image's name and a caption: {line[:60]!r}")
        if found is not None:
            caption = found["caption"].strip()
            if len(caption) > 1 and caption[0] == caption[-1] == '"':
                caption = caption[1:-1].replace('""', '"')
            yield Annotation(found["file"].strip(), check_captions(caption, f"{path} line {number}"))
