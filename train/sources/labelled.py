"""ImageNet, or another dataset of labelled images, as pairs: the class's name in a sentence is the caption."""

from collections.abc import Mapping, Sequence
from typing import Any

from clipkit.errors import UserError
from clipkit.eval.classes import fill, name_classes
from clipkit.eval.labelled import number_names
from clipkit.formats.dataset import Dataset
from clipkit.pixels.images import ImageError
from clipkit.train.sources.source import Pair, RecordSource

IMAGE_FIELD, LABEL_FIELD = "image", "label"
TEMPLATE = "a photo of a {}"


class LabelledSource(RecordSource):
    """The records of a dataset with `image` and `label`. `captions` are those of the classes, in label order."""

    def __init__(self, dataset: Dataset, captions: Sequence[str]) -> None:
        super().__init__(dataset, IMAGE_FIELD, LABEL_FIELD)
        self.captions = tuple(captions)

    def told(self, image: bytes, columns: Mapping[str, list[Any]]) -> Pair | UserError:
        """The image with its class's caption."""
        label = columns.get(LABEL_FIELD)
        if not label or not isinstance(label[0], int) or not 0 <= label[0] < len(self.captions):
            return ImageError(f"the record has no known class in {LABEL_FIELD!r}")
        return Pair(image, self.captions[label[0]])


def class_captions(dataset: Dataset) -> list[str]:
    """The caption of each class. ImageNet's classes get the names curated for CLIP; others the dataset's own.

    Raises UserError when the dataset doesn't name its classes.
    """
    labels = dataset.label_names(LABEL_FIELD)
    if labels is None:
        labels = list(number_names(dataset.features[LABEL_FIELD].num_classes or 0)[0])
        if len(labels) != 1000:
            raise UserError(
                f"{dataset.path} has no {LABEL_FIELD}.labels.txt, the classes' names: add it, a name a line"
            )
    names = name_classes(labels, dataset.path).rows
    return [fill(TEMPLATE, row[0].replace("_", " ")) for row in names]
