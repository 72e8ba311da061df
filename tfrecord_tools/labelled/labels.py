"""Labels for a heap of images: ImageNet's validation set comes as 50,000 files in one tar, their classes elsewhere.

Four forms of the labels are in use: lines of classes in the order of the file names, lines of a file name and its
class, Kaggle's CSV, and the ids of the official devkit, which number the classes in an order of their own. Mixing up
two of them gives chance accuracy and no error, so what can't be told for sure is refused.
"""

import importlib.util
import io
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path

from clipkit.errors import UserError
from clipkit.formatting import counted
from clipkit.tfrecord_tools.labelled.listing import Image

KAGGLE_LABELS = "LOC_val_solution.csv"
DEVKIT = "ILSVRC2012_devkit_t12"
_GROUND_TRUTH, _META = "data/ILSVRC2012_validation_ground_truth.txt", "data/meta.mat"
_OFFICIAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.")


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
        rows = _lines(file)
        ids = _devkit_ids(source) if all(row.isdecimal() for row in rows) else None
        named = _named(file, rows, images)
        found = named if named is not None else _by_position(file, [ids[row] for row in rows] if ids else rows, images)
    else:
        file, listed = _official_labels(source)
        found = _by_position(file, listed, images)
    known = set(classes)
    for image, label in zip(images, found, strict=True):
        if known and label not in known:
            hint = "a number" if label.isdecimal() else "none of the classes"
            raise UserError(
                f"{file} gives {image.name} the class {label!r}, which is {hint}: "
                f"name classes such as {classes[0]}, or put {DEVKIT}.tar.gz into {source} when they are its ids"
            )
    return [image._replace(label=label) for image, label in zip(images, found, strict=True)], str(file)


def _lines(file: Path) -> list[str]:
    try:
        rows = [row.strip() for row in file.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise UserError(f"{file} isn't UTF-8 text: give lines of classes, or of file names and classes") from error
    except FileNotFoundError as error:
        raise UserError(f"labels {file} don't exist: check the path") from error
    rows = [row for row in rows if row]
    if rows and rows[0].lower().startswith("imageid,"):
        # Kaggle's second field is `n01751748 111 108 230 190`: the class, then a box.
        return [f"{name},{answer.split()[0]}" for name, _, answer in (row.partition(",") for row in rows[1:])]
    return rows


def _named(file: Path, rows: list[str], images: Sequence[Image]) -> list[str] | None:
    """The classes of the images from rows that name both, or None when the rows hold classes alone."""
    names = {_base(image) for image in images}
    stems = {name.rpartition(".")[0] for name in names}
    pairs = {name: label for name, label in map(_pair, rows) if label}
    if not any(name in names or name in stems for name in pairs):
        return None
    found = []
    for image in images:
        name = _base(image)
        label = pairs.get(name) or pairs.get(name.rpartition(".")[0])
        if not label:
            raise UserError(f"{file} has no class for {image.name}: complete it")
        found.append(label)
    return found


def _pair(row: str) -> tuple[str, str]:
    """A file name and a class, between them a comma, a tab or a space."""
    separator = next((each for each in (",", "\t") if each in row), None)
    name, label = row.split(separator, 1) if separator or " " in row else (row, "")
    return name.strip().rpartition("/")[2], label.strip()


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
    order = sorted(range(len(images)), key=lambda i: images[i].name)
    found = [""] * len(images)
    for place, row in zip(order, rows, strict=True):
        found[place] = row
    return found


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
