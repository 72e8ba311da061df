"""The parquet file of vectors: a row an image, and in its metadata what the vectors were made by.

| column | type | |
|---|---|---|
| `key` | string | the image's name in its dataset |
| `image` | fixed-size list of float16 or float32 | its unit vector; null where it can't be read |
| `problem` | string | why it can't |
| `captions` | list of string | of captioned data |
| `texts` | list of such fixed-size lists | a unit vector for each caption |
| `label` | string | of labelled data |

The metadata's `clipkit` is JSON: `model`, `ema`, `weights` (a hash), `image_weights` and `text_weights` (those of a
tower, its projection and head, null where these can't be told), `towers` (their configurations, likewise),
`preprocessing`, `tokenizer_name`, `context_length`, `precision`,
`scale` (of similarities before a softmax), `dtype`, `data`, `identity` (a hash of what the data is), `records`,
`captioned`, `kind` (of such a file: vectors); where the model came without its tokenizer's vocabulary also `tokenizer`,
the file that was given, and `vocabulary`, a hash of it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from clipkit.embedding.encoder import Encoder, other_towers, towers_of
from clipkit.errors import UserError
from clipkit.eval.search.pictures import Picture, Pictures
from clipkit.formats.tables import table_errors

StoredType = Literal["float16", "float32"]
META = b"clipkit"
KIND = "vectors"


def vector_schema(dimensions: int, dtype: StoredType, captioned: bool) -> pa.Schema:
    """The columns of a file."""
    vector = pa.list_(pa.float16() if dtype == "float16" else pa.float32(), dimensions)
    said = [("captions", pa.list_(pa.string())), ("texts", pa.list_(vector))] if captioned else [("label", pa.string())]
    return pa.schema([("key", pa.string()), ("image", vector), ("problem", pa.string()), *said])


def vector_table(
    schema: pa.Schema,
    keys: Sequence[str],
    pictures: Sequence[Picture],
    image_NE: NDArray[np.float32],
    text_ME: NDArray[np.float32],
    problems: Mapping[int, str],
) -> pa.Table:
    """Rows of a file. `image_NE` has a row for each picture, of any values where there is a problem; `text_ME` one for
    each caption.
    """
    columns = {
        "key": pa.array(keys, pa.string()),
        "image": vectors_of(image_NE, schema, [place in problems for place in range(len(keys))]),
        "problem": pa.array([problems.get(place) for place in range(len(keys))], pa.string()),
    }
    if "texts" in schema.names:
        counts = [len(picture.captions) for picture in pictures]
        offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())
        columns["captions"] = pa.array([list(picture.captions) for picture in pictures], pa.list_(pa.string()))
        columns["texts"] = pa.ListArray.from_arrays(offsets, vectors_of(text_ME, schema))
    else:
        columns["label"] = pa.array([picture.label for picture in pictures], pa.string())
    return pa.table(columns, schema=schema)


def vectors_of(matrix_NE: NDArray[np.float32], schema: pa.Schema, absent: Sequence[bool] | None = None) -> pa.Array:
    """A matrix as a column of the schema's kind of vectors, null where `absent`."""
    vector = schema.field("image").type
    values = pa.array(matrix_NE.astype(vector.value_type.to_pandas_dtype()).reshape(-1), vector.value_type)
    mask = pa.array(absent, pa.bool_()) if absent is not None else None
    return pa.FixedSizeListArray.from_arrays(values, vector.list_size, mask=mask)


def write_rows(writer: pq.ParquetWriter, table: pa.Table) -> None:
    """Add rows to a file as one group."""
    writer.write_table(table, row_group_size=max(1, len(table)))


def open_writer(path: Path, schema: pa.Schema, about: Mapping[str, Any]) -> pq.ParquetWriter:
    """A writer of numbers, which neither repeat nor compress."""
    schema = schema.with_metadata({META: json.dumps(about, ensure_ascii=False, sort_keys=True)})
    return pq.ParquetWriter(path, schema, compression="none", use_dictionary=False, write_statistics=False)


# ---- Reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VectorFile:
    """A file of vectors, and what it was made by."""

    path: Path
    about: dict[str, Any]
    rows: int

    @property
    def dimensions(self) -> int:
        """Of a vector."""
        return int(pq.read_schema(self.path).field("image").type.list_size)

    def groups(self, columns: Sequence[str] | None = None) -> Iterator[tuple[int, pa.Table]]:
        """Its rows in groups, each with the number of its first row."""
        with table_errors(self.path), pq.ParquetFile(self.path) as file:
            first = 0
            for number in range(file.num_row_groups):
                table = file.read_row_group(number, columns=columns)
                yield first, table
                first += len(table)

    def require_model(self, encoder: Encoder) -> None:
        """Raise UserError unless the vectors were made by this model."""
        if self.about["weights"] != encoder.weights:
            raise UserError(
                f"{self.path} has vectors of other weights ({self.about['model']}, {self.about['weights']}) than "
                f"--ckpt {encoder.name} ({encoder.weights}): give that model, or run clipkit embed with this one"
            )
        other = other_towers(self.about.get("towers"), towers_of(encoder))
        known = self.about.get("tokenizer_name", encoder.tokenizer.name)  # absent in older files
        if not other and known != encoder.tokenizer.name:
            other = f"tokenizer: {known} -> {encoder.tokenizer.name}"
        if other:
            raise UserError(
                f"{self.path} has vectors of the same weights run otherwise ({other}) than {encoder.name} is: give the "
                "model that made them, or run clipkit embed with this one"
            )

    def require_data(self, pictures: Pictures) -> None:
        """Raise UserError unless the vectors are of these images."""
        if self.about["identity"] != pictures.identity:
            raise UserError(
                f"{self.path} has vectors of other data than {pictures.path} gives now: name the split and the label "
                "that they were made of with --split and --label, or run clipkit embed again"
            )


def open_vectors(path: Path, kind: str = KIND) -> VectorFile | None:
    """A file that `embed` wrote, or another command of another `kind`; None for anything else."""
    if not path.is_file() or path.suffix != ".parquet":
        return None
    with table_errors(path), pq.ParquetFile(path) as file:
        about = json.loads((file.schema_arrow.metadata or {}).get(META, b"{}"))
        rows = file.metadata.num_rows
    return VectorFile(path, about, rows) if about.get("kind") == kind else None


def matrix_of(column: pa.ChunkedArray | pa.Array) -> NDArray[np.float32]:
    """A column of vectors without its nulls as float32[N, E]."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    flat = np.asarray(array.drop_null().flatten(), dtype=np.float32)
    return flat.reshape(-1, array.type.list_size)
