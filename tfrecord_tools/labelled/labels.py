"""Labels for a heap of images: ImageNet's validation set comes as 50,000 files in one tar, their classes elsewhere.

Four forms of the labels are in use: lines of classes in the order of the file names, lines of a file name and its
class, Kaggle's CSV, and the ids of the official devkit, which number the classes in an order of their own. Mixing up
two of them gives chance accuracy and no error, so what can't be told for sure is refused.
"""

import csv
import importlib.util
import io
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path

from clipkit.errors import UserError
from clipkit.formats.folders import printable
from clipkit.formats.tables import CLASS_NAMES, FILE_NAMES, IMAGE_SUFFIXES, find_name, is_image
from clipkit.formatting import counted
from clipkit.tfrecord_tools.labelled.listing import Image

KAGGLE_LABELS = "LOC_val_solution.csv"
KAGGLE_COLUMN = "predictionstring"
DELIMITERS = (",", ";", "\t", " ")
_NO_DELIMITER = "\x1f"
DEVKIT = "ILSVRC2012_devkit_t12"
_GROUND_TRUTH, _META = "data/ILSVRC2012_validation_ground_truth.txt", "data/meta.mat"
_OFFICIAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.")
_HAS_DIGIT = re.compile(r"\d").search
_FRACTION = re.compile(r"\d+\.0")
_NUMBER = re.compile(r"(\d+)")


def label_images(
    images: Sequence[Image], classes: Sequence[str], source: Path, labels: Path | None
) -> tuple[list[Image], str]:
    """The images with their class, and where it was found.

    `classes` are those that may occur, in label order; empty when any name may. Without a file `labels`, those of
    ImageNet are looked for in `source`, and at last in the package tensorflow-datasets where it is installed.
    Raises UserError when there are none, or when they don't go with the images.
    """
    file = labels or next((path for path in (source / KAGGLE_LABELS,) if path.is_file()), None)
    if file is not None:
        text = _text(file)
        if not text.strip():
            raise UserError(f"{file} is empty: give lines of classes, or of file names and classes")
        named = _named(file, text, images)
        named = named and _whole(named)
        rows = _whole([row[0] for row in _rows(text, _NO_DELIMITER)])
        if named is None and not rows:
            raise UserError(f"{file} has quotes that aren't closed, or text behind a closed one: mend it")
        ids = _devkit_ids(source) if named is None and all(row.isdecimal() for row in rows) else None
        unknown = next((row for row in rows if ids and row not in ids), None)
        if unknown is not None:
            raise UserError(f"{file} has the id {unknown}, which {DEVKIT} doesn't know: its ids are 1 to 1000")
        found = named if named is not None else _by_position(file, [ids[row] for row in rows] if ids else rows, images)
    else:
        file, listed = _official_labels(source)
        found = _by_position(file, listed, images)
    known = set(classes)
    for image, label in zip(images, found, strict=True):
        if known and label not in known:
            hint = "a number" if label.isdecimal() else "none of the classes"
            raise UserError(
                f"{file} gives {printable(image.name)} the class {label!r}, which is {hint}: "
                f"name classes such as {classes[0]}, or put {DEVKIT}.tar.gz into {source} when they are its ids"
            )
    return [image._replace(label=label) for image, label in zip(images, found, strict=True)], str(file)


def _whole(labels: list[str]) -> list[str]:
    """Numbers as they were before pandas made fractions of them, as it does of a column with gaps."""
    return [label[:-2] for label in labels] if all(map(_FRACTION.fullmatch, labels)) else labels


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} isn't UTF-8 text: give lines of classes, or of file names and classes") from error
    except FileNotFoundError as error:
        raise UserError(f"labels {file} don't exist: check the path") from error


def _rows(text: str, delimiter: str) -> list[list[str]]:
    """The fields of each line that has any; quoted ones may hold the delimiter and line breaks."""
    if delimiter == " ":
        return [line.split(None, 1) for line in text.split("\n") if line.strip()]
    try:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
        return [fields for row in rows if any(fields := [field.strip() for field in row])]
    except csv.Error:
        return []


def _named(file: Path, text: str, images: Sequence[Image]) -> list[str] | None:
    """The classes of the images from rows that name both, or None when the rows hold classes only.

    The column with the file names is the one that names images, before or behind the classes. Raises UserError when the
    rows have several columns and none does, or not all images have a row, or not all rows an image.
    """
    names = _Names(images)
    tables = {delimiter: _rows(text, delimiter) for delimiter in DELIMITERS}
    # Of a class `;` behind a tab, the semicolon leaves nothing: such a table names the images as well, and no class.
    scores = {
        (delimiter, column): (
            *names.score([row[column] for row in rows if len(row) > column]),
            sum(any(field for at, field in enumerate(row) if at != column) for row in rows),
        )
        for delimiter, rows in tables.items()
        for column in range(max(map(len, rows), default=0))
        if max(map(len, rows)) > 1
    }
    best = max(scores, key=lambda key: scores[key], default=None)
    if best is None or scores[best][:2] == (0, 0):
        _refuse_unmatched(file, tables, images)
        return None
    rows, column = tables[best[0]], best[1]
    header = _header(rows, column, names)
    place = _class_column(file, rows, column, header)
    found: dict[int, str] = {}
    for row in rows[header is not None :]:
        name, label = (row[at] if at < len(row) else "" for at in (column, place))
        image = names.find(name)
        if image is None:
            if names.official and _OFFICIAL_NAME.match(f"{name.rpartition('.')[0] or name}."):
                continue  # ImageNet's own table of the whole set, for a part of it
            raise UserError(f"{file} names {name!r}, which isn't an image there; one is called {names.example}")
        if header is not None and header[place] == KAGGLE_COLUMN:
            label = label.partition(" ")[0]  # `n01751748 111 108 230 190`: the class, then a box
        if not label:
            raise UserError(f"{file} has no class for {name}: complete it")
        if found.setdefault(image, label) != label:
            raise UserError(f"{file} gives {name} two classes, {found[image]!r} and {label!r}: remove one")
    lacking = next((image.name for place, image in enumerate(images) if place not in found), None)
    if lacking is not None:
        raise UserError(f"{file} has no class for {printable(lacking)}: complete it")
    return [found[place] for place in range(len(images))]


class _Names:
    """Finds an image by what a table calls it: its path, its file name, or that without (or with another) suffix."""

    def __init__(self, images: Sequence[Image]) -> None:
        self.example = printable(images[0].name)
        self.official = all(_OFFICIAL_NAME.match(_base(image)) for image in images)
        self.places: list[dict[str, int | None]] = [{}, {}, {}]
        for place, image in enumerate(images):
            for known, name in zip(self.places, self._spellings(image.name), strict=True):
                known[name] = None if name in known else place  # what two have names neither

    @staticmethod
    def _spellings(name: str) -> tuple[str, str, str]:
        base = name.rpartition("/")[2]
        stem, dot, suffix = base.rpartition(".")
        return name, base.lower(), (stem if dot and suffix.lower() in IMAGE_SUFFIXES else base).lower()

    def find(self, name: str) -> int | None:
        """The place of the image, or None when there is none, or several of that name."""
        return self._match(name)[0]

    def score(self, column: Sequence[str]) -> tuple[int, int]:
        """How well a column names the images: exact names count most, then how many are different."""
        matches = [self._match(name) for name in column]
        return sum(weight for _, weight in matches), len({place for place, weight in matches if weight})

    def _match(self, name: str) -> tuple[int | None, int]:
        spelled = self._spellings(name.replace("\\", "/"))
        for weight, (known, spelling) in enumerate(zip(self.places, spelled, strict=True)):
            if (place := known.get(spelling)) is not None:
                return place, len(self.places) - weight
        return None, 0


def _header(rows: list[list[str]], column: int, names: _Names) -> list[str] | None:
    """The names of the columns, when the first row has them: it names no image, and its class is no other row's."""
    first = [field.lower() for field in rows[0]] + [""] * (max(map(len, rows)) - len(rows[0]))
    if column >= len(rows[0]) or names.find(rows[0][column]) is not None or is_image(first[column]):
        return None
    values = {field for row in rows[1:] for field in row}
    known = find_name(first, (*FILE_NAMES, *CLASS_NAMES, KAGGLE_COLUMN)) is not None
    return first if known or not values & set(rows[0]) else None


def _class_column(file: Path, rows: list[list[str]], column: int, header: list[str] | None) -> int:
    """Which column holds the classes: the only other one, or the one that the header calls so."""
    width = max(map(len, rows))
    others = [at for at in range(width) if at != column]
    if len(others) == 1:
        return others[0]
    usual = find_name([name for at, name in enumerate(header or ()) if at != column], (*CLASS_NAMES, KAGGLE_COLUMN))
    if usual is None or header is None:
        values = ", ".join(repr(rows[-1][at]) for at in others if at < len(rows[-1]))
        raise UserError(
            f"{file} has {width} columns, and beside the file name any may be the class ({values}): keep two columns, "
            "or name them in a first line such as file_name,label"
        )
    splits = next((at for at, name in enumerate(header) if name == "split"), None)
    values_there = sorted({row[splits] for row in rows[1:] if splits is not None and splits < len(row)})
    if len(values_there) > 1:
        raise UserError(f"{file} has images of several splits ({', '.join(values_there[:3])}): give one split's table")
    return header.index(usual)


def _refuse_unmatched(file: Path, tables: dict[str, list[list[str]]], images: Sequence[Image]) -> None:
    """Raise UserError when rows have several fields, or look like file names: they aren't classes in file order."""
    for delimiter, rows in tables.items():
        widths = {len(row) for row in rows}
        several = len(widths) == 1 and max(widths) > 1
        if delimiter == " ":  # two words may be a class: `img_001 cat` isn't
            firsts = [row[0] for row in rows]
            several = several and len(set(firsts)) == len(firsts) and all(map(_HAS_DIGIT, firsts))
        name = next((field for row in rows for field in row if is_image(field)), rows[0][0] if several else None)
        if name is not None:
            raise UserError(
                f"{file} names {name!r}, which isn't an image there; one is called {printable(images[0].name)}: "
                "mend the names, or give lines of classes in the order of the file names (in quotes when they have "
                "commas)"
            )


def _by_position(file: Path, rows: Sequence[str], images: Sequence[Image]) -> list[str]:
    """The classes in the order of the file names; official names hold their place, so some may be absent."""
    places = [_OFFICIAL_NAME.match(_base(image)) for image in images]
    numbers = [int(place[1]) for place in places if place is not None]
    if len(numbers) == len(images) and all(1 <= number <= len(rows) for number in numbers):
        return [rows[number - 1] for number in numbers]
    if len(rows) != len(images):
        raise UserError(
            f"{file} has {counted(len(rows), 'label')} for {counted(len(images), 'image')}: give one for each"
        )
    names, numbered = [image.name for image in images], [_in_parts(image.name) for image in images]
    found, other = (dict(zip(sorted(keys), rows, strict=True)) for keys in (names, numbered))
    for name, parts in zip(names, numbered, strict=True):
        if found[name] != other[parts]:
            raise UserError(
                f"{file} has only classes, and that of {printable(name)} depends on whether 10 comes before 2 in the "
                "order of the file names: write each line as a file name and its class"
            )
    return [found[name] for name in names]


def _in_parts(name: str) -> tuple[str | int, ...]:
    """A name as texts and numbers in turn, by which `2.jpg` comes before `10.jpg`."""
    return tuple(int(part) if part.isdecimal() else part for part in _NUMBER.split(name))


def _base(image: Image) -> str:
    return image.name.rpartition("/")[2]


def _official_labels(source: Path) -> tuple[Path, list[str]]:
    """The 50,000 wnids of the validation set in the order of the file names."""
    ids = _devkit_ids(source)
    if ids is not None:
        truth = _devkit_file(source, _GROUND_TRUTH)
        assert truth is not None
        return source / DEVKIT, [ids[row] for row in truth.decode().split()]
    # Found without an import: TensorFlow would come with it.
    package = importlib.util.find_spec("tensorflow_datasets")
    for folder in (package.submodule_search_locations or []) if package is not None else []:
        path = Path(folder) / "datasets" / "imagenet2012" / "validation_labels.txt"
        if path.is_file():
            return path, path.read_text(encoding="utf-8").split()
    raise UserError(
        f"the images of {source} lie in one heap and there are no labels: put {DEVKIT}.tar.gz beside them, "
        "give --labels FILE, or install tensorflow-datasets, which holds those of ImageNet's validation set"
    )


def _devkit_ids(source: Path) -> dict[str, str] | None:
    """The wnid of each id (as text) of the devkit, or None when it isn't there. The classes have 1 to 1000."""
    data = _devkit_file(source, _META)
    if data is None:
        return None
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise UserError(
            f"the devkit's {_META} can't be read without scipy: pip install 'clipkit[imagenet]', or give --labels"
        ) from error
    try:
        synsets = loadmat(io.BytesIO(data), squeeze_me=True)["synsets"]
        return {str(int(each[0])): str(each[1]) for each in synsets}
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise UserError(f"the {_META} of {source / DEVKIT} isn't the devkit's ({error!r}): fetch it again") from error


def _devkit_file(source: Path, name: str) -> bytes | None:
    path = source / DEVKIT / name
    if path.is_file():
        return path.read_bytes()
    archive = source / f"{DEVKIT}.tar.gz"
    if not archive.is_file():
        return None
    try:
        with tarfile.open(archive, "r:gz") as tar:
            file = tar.extractfile(f"{DEVKIT}/{name}")
            assert file is not None
            return file.read()
    except (tarfile.TarError, KeyError, OSError, EOFError) as error:
        raise UserError(f"{archive} can't be read ({error}): fetch it again, or give --labels") from error
