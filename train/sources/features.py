"""Training from what a frozen image tower made of the images once, in a file of `clipkit embed`.

A row is an image's unit vector and its captions, so that nothing is decoded and the tower isn't run; where the text
tower is frozen too, the captions' vectors are read with them, and it isn't run either. It is read as any parquet file
(`parquets`); which model made it is for `checks.check_features` to hold to the recipe's.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipkit.errors import UserError
from clipkit.formats.tables import table_errors
from clipkit.storage.cache import BlockCache
from clipkit.storage.files import is_remote
from clipkit.storage.stores import StoredFile
from clipkit.train.sources.index import FolderIndex, open_index
from clipkit.train.sources.parquets import ParquetSource, index_groups, join_rows, vector_bytes
from clipkit.train.sources.source import Pair, Source

# As `clipkit.eval.search.vectors` writes it; that imports torch, and workers import this.
META, KIND = b"clipkit", "vectors"
COLUMNS, TEXTS = ("image", "captions"), "texts"


class FeatureSource(ParquetSource):
    """The rows of a file of vectors of `width` numbers, with those of captions where `texts` are wanted. Made by
    `open_features`.
    """

    def __init__(
        self, path: Path, file: StoredFile, index: FolderIndex, cache: BlockCache, width: int, texts: bool
    ) -> None:
        super().__init__(path.parent, [file], index, cache)
        self.width, self.texts = width, texts
        if texts:
            self.packed = "parquet of vectors"

    @property
    def feature_width(self) -> int | None:
        return self.width

    def block(self, record: int, block_size: int) -> range:
        """Its neighbours, as in a dataset: a row without a vector says nothing of its group."""
        return Source.block(self, record, block_size)

    @property
    def text_width(self) -> int | None:
        return self.width if self.texts else None

    def columns(self, schema: pa.Schema, path: Path) -> tuple[str, ...]:
        return (*COLUMNS, TEXTS) if self.texts else COLUMNS

    def pack(self, batch: pa.RecordBatch, columns: Sequence[str]) -> bytes:
        """Behind an image's vector lie those of its captions, each of as many bytes."""
        if not self.texts:
            return super().pack(batch, columns)
        images, captions, texts = (batch.column(name) for name in columns)
        said = (np.asarray(each.values.flatten()).tobytes() if each.is_valid else b"" for each in texts)
        images = (image.as_py() for image in vector_bytes(images))
        return join_rows(
            (image + more if image else b"" for image, more in zip(images, said, strict=True)), captions.to_pylist()
        )

    def pair(self, image: memoryview, caption: str | list[str]) -> Pair:
        if not self.texts:
            return super().pair(image, caption)
        count = len(caption) if isinstance(caption, list) else int(caption != "")
        own = len(image) // (1 + count)
        return Pair(image[:own], caption, vectors=image[own:])


def describe_features(path: Path) -> dict[str, Any] | None:
    """What the vectors of a file were made by, with their `width` and `has_texts`, whether captions have some too; None
    for any other file.

    Raises UserError for vectors without captions, and of models whose image tower can't be told.
    """
    if is_remote(path) or not path.is_file() or path.suffix != ".parquet":
        return None
    with table_errors(path):
        schema = pq.read_schema(path)
    about: dict[str, Any] = json.loads((schema.metadata or {}).get(META, b"{}"))
    if about.get("kind") != KIND:
        return None
    if not about["captioned"]:
        raise UserError(f"{path} has vectors of images without captions: run clipkit embed on pairs")
    if about.get("image_weights") is None:
        raise UserError(
            f"{path} doesn't say which image tower made it ({about['model']}): run clipkit embed with a checkpoint of "
            "clipkit's, OpenCLIP's or OpenAI's"
        )
    return about | {"width": int(schema.field("image").type.list_size), "has_texts": TEXTS in schema.names}


def open_features(path: Path, file: StoredFile, width: int, cache: BlockCache, texts: bool = False) -> FeatureSource:
    """Open a file that `describe_features` knows; with the vectors of captions where `texts` are wanted."""
    index = open_index(path.parent, [file], f"features-{path.name}", index_groups)
    return FeatureSource(path, file, index, cache, width, texts)
