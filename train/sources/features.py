"""Training from what a frozen image tower made of the images once, in a file of `clipkit embed`.

A row is an image's unit vector and its captions, so that nothing is decoded and the tower isn't run. It is read as any
parquet file (`parquets`); which model made it is for `checks.check_features` to hold to the recipe's.
"""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clipkit.errors import UserError
from clipkit.formats.tables import table_errors
from clipkit.storage.cache import BlockCache
from clipkit.storage.files import is_remote
from clipkit.storage.stores import StoredFile
from clipkit.train.sources.index import FolderIndex, open_index
from clipkit.train.sources.parquets import ParquetSource, index_groups
from clipkit.train.sources.source import Source

# As `clipkit.eval.search.vectors` writes it; that imports torch, and workers import this.
META, KIND = b"clipkit", "vectors"
COLUMNS = ("image", "captions")


class FeatureSource(ParquetSource):
    """The rows of a file of vectors of `width` numbers. Made by `open_features`."""

    def __init__(self, path: Path, file: StoredFile, index: FolderIndex, cache: BlockCache, width: int) -> None:
        super().__init__(path.parent, [file], index, cache)
        self.width = width

    @property
    def feature_width(self) -> int | None:
        return self.width

    def block(self, record: int, block_size: int) -> range:
        """Its neighbours, as in a dataset: a row without a vector says nothing of its group."""
        return Source.block(self, record, block_size)

    def columns(self, schema: pa.Schema, path: Path) -> tuple[str, ...]:
        return COLUMNS


def describe_features(path: Path) -> dict[str, Any] | None:
    """What the vectors of a file were made by, with their `width`; None for any other file.

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
    return about | {"width": int(schema.field("image").type.list_size)}


def open_features(path: Path, file: StoredFile, width: int, cache: BlockCache) -> FeatureSource:
    """Open a file that `describe_features` knows."""
    index = open_index(path.parent, [file], f"features-{path.name}", index_groups)
    return FeatureSource(path, file, index, cache, width)
