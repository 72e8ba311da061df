"""ImageNet, or another dataset of labelled images, as pairs: the class's name in a sentence is the caption."""

from collections.abc import Iterator, Sequence

from clipkit.dataset import Dataset
from clipkit.errors import UserError
from clipkit.eval.classes import fill, name_classes
from clipkit.eval.labelled import number_names
from clipkit.images import ImageError
from clipkit.records import RecordError, decode_example
from clipkit.train.sources import Pair, Source

IMAGE_FIELD, LABEL_FIELD = "image", "label"
TEMPLATE = "a photo of a {}"


class LabelledSource(Source):
    """The records of a dataset with `image` and `label`. `captions` are those of the classes, in label order."""

    def __init__(self, dataset: Dataset, captions: Sequence[str]) -> None:
        self.dataset, self.captions = dataset, tuple(captions)

    def __repr__(self) -> str:
        return repr(self.dataset)

    @property
    def num_records(self) -> int:
        return self.dataset.num_records

    def key(self, record: int) -> str:
        return self.dataset.key(record)

    def pairs(self, records: Sequence[int]) -> Iterator[Pair | UserError]:
        for record in records:
            try:
                data = self.dataset.read(record)
            except RecordError as error:
                yield error
                continue
            yield self.pair(data)

    def pair(self, data: bytes) -> Pair | UserError:
        """The pair that is in a record."""
        try:
            columns = decode_example(data, (IMAGE_FIELD, LABEL_FIELD))
        except ValueError as error:
            return ImageError(f"the record is {error}")
        image, label = columns.get(IMAGE_FIELD), columns.get(LABEL_FIELD)
        if not image or not isinstance(image[0], bytes):
            return ImageError(f"the record has no image in {IMAGE_FIELD!r}")
        if not label or not isinstance(label[0], int) or not 0 <= label[0] < len(self.captions):
            return ImageError(f"the record has no known class in {LABEL_FIELD!r}")
        return Pair(image[0], self.captions[label[0]])


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
