"""What the loader reads from: numbered pairs of an encoded image and a caption, wherever they are kept.

A source gives pairs for a chunk of records at once, so that neighbours may cost one read, and gives them one by one, so
that a chunk of large images is never held together. What goes wrong with one record is given in its place; only what
makes the whole source unusable is raised. Numbers are all that the loader knows of records: their order comes from
`records_at`, so that a mixture of sources can have its own.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from clipkit.counter_rng import UInt64Array
from clipkit.errors import UserError
from clipkit.eval.classification.labels import fill, name_classes, number_names
from clipkit.formats.captions import ORIGINAL
from clipkit.formats.dataset import Dataset
from clipkit.formats.manifest import SYNTAX, TOKENS
from clipkit.formats.records import RecordError, decode_example
from clipkit.pixels.images import ImageError
from clipkit.train.order import Int64Array, record_indices

IMAGE_FIELD, TEXT_FIELD = "jpg", "txt"
LABELLED_IMAGE, LABEL_FIELD = "image", "label"
LABEL_TEMPLATE = "a photo of a {}"


class Pair(NamedTuple):
    """One record as the loader needs it."""

    image: bytes | memoryview
    """The encoded image; a view keeps what it points into."""
    caption: str | Sequence[str]
    """As it was found: the loader cleans it, and draws one of several each time."""
    ids: list[int] | None = None
    """The caption's token ids where they were computed before: whole, without start and end."""
    priorities: list[int] | None = None
    """The class of each id's word (`clipkit.text.syntax`), where it was computed before."""
    added: Mapping[str, Sequence[str]] | None = None
    """Captions of other sources than `original`, by source, in the order of the sources' names."""
    vectors: memoryview | None = None
    """A stored vector for each caption, where they stand in its place (`Source.text_width`)."""

    @property
    def captions(self) -> tuple[str, ...]:
        """All captions, those of `caption` first: their numbers are the ones of stored embeddings."""
        first = (self.caption,) if isinstance(self.caption, str) else tuple(self.caption)
        return first + tuple(text for texts in (self.added or {}).values() for text in texts)


class Source(ABC):
    """Numbered pairs. It must pickle, for worker processes, and its methods are called from several threads."""

    @property
    @abstractmethod
    def num_records(self) -> int:
        """How many records there are; they are numbered from 0."""

    @property
    def feature_width(self) -> int | None:
        """The numbers of a vector, where `Pair.image` is one (`features`) and no encoded image."""
        return None

    @property
    def text_width(self) -> int | None:
        """The numbers of a vector, where each caption has one (`Pair.vectors`) that stands in its place."""
        return None

    @property
    def caption_sources(self) -> tuple[str, ...]:
        """The sources of the captions that its records may have."""
        return (ORIGINAL,)

    @abstractmethod
    def pairs(self, records: Sequence[int]) -> Iterator[Pair | UserError]:
        """For each of the records, in the order asked, its pair or the reason why it can't be used.

        The reason is one line (RecordError, ImageError, …), and the loader takes another record of the block instead.
        Raises UserError when the source itself is gone, say a whole shard: that ends the run.
        """

    @abstractmethod
    def key(self, record: int) -> str:
        """A name for the record that a person can find again, and that stays."""

    def records_at(self, positions_B: UInt64Array, seed: int, block_size: int) -> Int64Array:
        """The record at each position of the run (samples seen before it): a pure function of its arguments."""
        return record_indices(positions_B, self.num_records, seed, block_size)

    def block(self, record: int, block_size: int) -> range:
        """The records among which another one is sought where this one can't be used; it is among them."""
        first = record // block_size * block_size
        return range(first, min(first + block_size, self.num_records))


class AroundSource(Source):
    """Another source with something added: what isn't said otherwise is as there."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __repr__(self) -> str:
        return repr(self.source)

    @property
    def num_records(self) -> int:
        return self.source.num_records

    @property
    def feature_width(self) -> int | None:
        return self.source.feature_width

    @property
    def text_width(self) -> int | None:
        return self.source.text_width

    @property
    def caption_sources(self) -> tuple[str, ...]:
        return self.source.caption_sources

    def pairs(self, records: Sequence[int]) -> Iterator[Pair | UserError]:
        return self.source.pairs(records)

    def key(self, record: int) -> str:
        return self.source.key(record)

    def records_at(self, positions_B: UInt64Array, seed: int, block_size: int) -> Int64Array:
        return self.source.records_at(positions_B, seed, block_size)

    def block(self, record: int, block_size: int) -> range:
        return self.source.block(record, block_size)


class Examples(Protocol):
    """Numbered tf.train.Example records: `clipkit.formats.dataset.Dataset`, or what does as it does."""

    @property
    def num_records(self) -> int: ...

    def read(self, i: int) -> bytes: ...

    def key(self, i: int) -> str: ...


class RecordSource(Source):
    """The records of a dataset directory, or others of its kind.

    `precomputed` are the columns of token ids and word classes by their names in `clipkit.formats.manifest`; `added`
    those of further captions by their source.
    """

    def __init__(
        self,
        examples: Examples,
        image_field: str = IMAGE_FIELD,
        text_field: str = TEXT_FIELD,
        precomputed: Mapping[str, str] | None = None,
        added: Mapping[str, str] | None = None,
    ) -> None:
        self.examples = examples
        self.image_field, self.text_field = image_field, text_field
        precomputed = precomputed or {}
        self.tokens, self.syntax = precomputed.get(TOKENS, ""), precomputed.get(SYNTAX, "")
        self.added = dict(added or {})
        # Of a record's dozen columns only these are unpacked.
        self.columns = (image_field, text_field, *filter(None, (self.tokens, self.syntax)), *self.added.values())

    def __repr__(self) -> str:
        return repr(self.examples)

    @property
    def num_records(self) -> int:
        return self.examples.num_records

    @property
    def caption_sources(self) -> tuple[str, ...]:
        return (ORIGINAL, *self.added)

    def key(self, record: int) -> str:
        return self.examples.key(record)

    def pairs(self, records: Sequence[int]) -> Iterator[Pair | UserError]:
        for record in records:
            try:
                data = self.examples.read(record)
            except RecordError as error:
                yield error
                continue
            yield self.pair(data)

    def pair(self, data: bytes) -> Pair | UserError:
        """The pair that is in a record."""
        try:
            columns: dict[str, list[Any]] = decode_example(data, self.columns)
        except ValueError as error:
            return ImageError(f"the record is {error}")
        image = columns.get(self.image_field)
        if not image or not isinstance(image[0], bytes):
            return ImageError(f"the record has no image in {self.image_field!r}")
        return self.caption_image(image[0], columns)

    def caption_image(self, image: bytes, columns: Mapping[str, list[Any]]) -> Pair | UserError:
        """The image with the caption that its record gives it."""
        found = texts(columns.get(self.text_field))
        caption = found if len(found) > 1 else "".join(found)
        ids, priorities = columns.get(self.tokens), columns.get(self.syntax)
        added = {source: texts(columns[name]) for source, name in self.added.items() if name in columns}
        return Pair(image, caption, ids, priorities if ids else None, added or None)


def texts(values: Sequence[Any] | None) -> list[str]:
    """The texts in a record's values of a column."""
    return [item.decode("utf-8", errors="replace") for item in values or () if isinstance(item, bytes)]


# ---- Labelled images: the class's name in a sentence is the caption --------------------------------------------------


class LabelledSource(RecordSource):
    """The records of a dataset with `image` and `label`. `captions` are those of the classes, in label order."""

    def __init__(self, dataset: Dataset, captions: Sequence[str]) -> None:
        super().__init__(dataset, LABELLED_IMAGE, LABEL_FIELD)
        self.captions = tuple(captions)

    def caption_image(self, image: bytes, columns: Mapping[str, list[Any]]) -> Pair | UserError:
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
    classes = name_classes(labels, dataset.path)
    for note in classes.notes:
        print(note, file=sys.stderr)
    return [fill(LABEL_TEMPLATE, names[0]) for names in classes.names]
