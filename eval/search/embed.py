"""All images and captions of a dataset into a file of vectors.

The work is done in parts of some thousands of images. Each is written beside and renamed, into a folder beside the
output, so that a run that was killed goes on behind its last whole part. A part begins with a batch of its own: what it
holds doesn't depend on where a run began, and the file is the same to the byte.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from clipkit.config import to_json
from clipkit.device import Precision, pick
from clipkit.embedding.encoder import Compute, Encoder, other_towers, tower_weights, towers_of
from clipkit.embedding.vectors import ImageSet, image_matrix, text_matrix
from clipkit.errors import UserError
from clipkit.eval.search.pictures import Picture, Pictures
from clipkit.eval.search.vectors import (
    KIND,
    StoredType,
    VectorFile,
    open_vectors,
    open_writer,
    vector_schema,
    vector_table,
    write_rows,
)
from clipkit.interop.load import load
from clipkit.log import Progress
from clipkit.pixels.images import ImageError
from clipkit.storage.files import WRITTEN_BESIDE, clear_leftovers, read_json, remove, write_beside, write_json

PART_ROWS = 8_192


@dataclass(frozen=True)
class Form:
    """What a file has of each image: its `schema` by the length of a vector, and a `table` of some rows, made of the
    arguments of `vector_table`. `kind` is what the file's rows are, `verb` what the progress line says, and `about` is
    kept with the file.
    """

    kind: str
    verb: str
    schema: Callable[[int], pa.Schema]
    table: Callable[
        [pa.Schema, Sequence[str], Sequence[Picture], NDArray[np.float32], NDArray[np.float32], Mapping[int, str]],
        pa.Table,
    ]
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EmbedSummary:
    """What `embed` made."""

    path: Path
    records: int
    unreadable: int
    captions: int
    dimensions: int

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "path": str(self.path)}

    def text(self) -> str:
        lost = f", {self.unreadable:,} unreadable" if self.unreadable else ""
        texts = f" and of {self.captions:,} captions" if self.captions else ""
        return f"{self.path}: vectors of {self.records:,} images{lost}{texts}, {self.dimensions} numbers each"


def embed(
    pictures: Pictures,
    out: Path,
    source: str | Path,
    *,
    dtype: StoredType = "float16",
    **options: Any,
) -> EmbedSummary:
    """Write the vectors of all images, and of their captions, into the file `out` (`clipkit.eval.search.vectors`).

    `options` are those of `write_file`.
    """

    def schema(dimensions: int) -> pa.Schema:
        return vector_schema(dimensions, dtype, pictures.captioned)

    form = Form(KIND, "embed", schema, vector_table, {"dtype": dtype})
    return summary_of(write_file(pictures, out, source, form, **options))


def write_file(
    pictures: Pictures,
    out: Path,
    source: str | Path,
    form: Form,
    *,
    precision: Precision = "float32",
    batch_size: int = 256,
    device: str = "auto",
    ema: bool = False,
    vocabulary: Path | None = None,
    part_rows: int = PART_ROWS,
) -> VectorFile:
    """Write what a model makes of all images and their captions into the file `out`.

    `source`, `ema` and `vocabulary` are what `clipkit.interop.load` takes. Given again after a kill it goes on, and
    once more it finds the file made. Raises UserError where the file, or the parts of an unfinished one, are of another
    model or other data, when too many of a part's images can't be read (`may_be_unreadable`), and for a model that
    gives NaN.
    """
    if out.suffix != ".parquet":
        raise UserError(f"{out}: call the output NAME.parquet, which is what it will be")
    if not pictures.total:
        raise UserError(f"{pictures.path} has no images to embed: check --split")
    compute = Compute(pick(device), precision, batch_size)
    encoder = load(source, ema=ema, vocabulary=vocabulary).to(compute.device.torch_device)
    about = description(encoder, pictures, compute) | {"ema": ema, "kind": form.kind, **form.about}
    if vocabulary is not None:
        about |= {"tokenizer": str(vocabulary.absolute()), "vocabulary": hash_of(vocabulary)}
    if Path(source).exists():
        about["model"] = str((encoder.path or Path(source)).absolute())
    parts = out.with_name(f".{out.name}.parts")
    if not out.exists():
        label = f"{form.verb} {pictures.path.name}"
        with Progress(label, pictures.total, "images") as progress, encoder.evaluating():
            compute = replace(compute, progress=progress.update)
            write_parts(encoder, pictures, parts, about, compute, part_rows, form)
        merge(parts, out, about)
    found = open_vectors(out, form.kind)
    if found is None:
        raise UserError(f"{out} exists and isn't a file of {form.kind}: remove it, or choose another name")
    if other := differing(found.about, about):
        raise UserError(f"{out} exists and has {form.kind} of {other}: remove it, or choose another name")
    remove(parts)
    return found


def description(encoder: Encoder, pictures: Pictures, compute: Compute) -> dict[str, Any]:
    """What vectors are made by, as JSON values."""
    return {
        "model": encoder.name,
        "weights": encoder.weights,
        "image_weights": tower_weights(encoder.model.state_dict(), "image"),
        "text_weights": tower_weights(encoder.model.state_dict(), "text"),
        "tokenizer_name": encoder.tokenizer.name,
        "towers": towers_of(encoder),
        "preprocessing": to_json(encoder.preprocess),
        "context_length": encoder.context_length,
        "precision": compute.device.arithmetic(compute.precision or encoder.precision),
        "scale": float(encoder.scale),
        "data": str(pictures.path.absolute()),
        "identity": pictures.identity,
        "records": pictures.total,
        "captioned": pictures.captioned,
    }


def hash_of(vocabulary: Path) -> str:
    """A hash of a tokenizer's file."""
    return hashlib.blake2b(vocabulary.read_bytes(), digest_size=8).hexdigest()


def differing(found: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    """What the vectors of two descriptions differ in, in words; "" where they are the same."""
    if found.get("weights") != about["weights"]:
        return "another model"
    if any(found.get(name) != about[name] for name in ("identity", "records", "captioned")):
        return "other data"
    if other := other_towers(found.get("towers"), about["towers"]):
        return f"another model ({other})"
    names = ("kind", "image_weights", "preprocessing", "context_length", "precision", "dtype", "vocabulary", "parts")
    return ", ".join(f"another {name}" for name in names if name in about and found.get(name) != about[name])


# ---- Parts -----------------------------------------------------------------------------------------------------------


def write_parts(
    encoder: Encoder,
    pictures: Pictures,
    folder: Path,
    about: Mapping[str, Any],
    compute: Compute,
    part_rows: int,
    form: Form,
) -> None:
    """Write the parts that are missing. They are of about equal size, so that none is a small rest."""
    plan = folder / "about.json"
    count = -(-pictures.total // part_rows)
    wanted = {**about, "parts": count}
    if plan.exists() and (other := differing(read_json(plan), wanted)):
        raise UserError(f"{folder} has {form.kind} of {other}, which a run left: remove it, or choose another name")
    write_json(plan, wanted)
    clear_leftovers(folder)
    bounds = [pictures.total * number // count for number in range(count + 1)]
    first = next((number for number in range(count) if not part_path(folder, number).exists()), count)
    reader = pictures.read(bounds[first]) if first < count else iter(())
    dimensions = text_matrix(encoder, ["a"], compute).shape[1]
    schema = form.schema(dimensions)
    with ThreadPoolExecutor(1) as writer:
        writing: Future[None] | None = None
        for number in range(first, count):
            places = range(bounds[number], bounds[number + 1])
            table = form.table(schema, *make_part(encoder, pictures, reader, places, compute))
            if writing is not None:
                writing.result()
            writing = writer.submit(write_part, part_path(folder, number), table, schema)
        if writing is not None:
            writing.result()


def part_path(folder: Path, number: int) -> Path:
    """Where a part is."""
    return folder / f"{number:06d}.parquet"


def write_part(path: Path, table: pa.Table, schema: pa.Schema) -> None:
    """Write one part, whole or not at all."""
    with write_beside(path) as temporary, open_writer(temporary, schema, {}) as writer:
        write_rows(writer, table)


def make_part(
    encoder: Encoder, pictures: Pictures, reader: Iterator[Picture], places: range, compute: Compute
) -> tuple[list[str], list[Picture], NDArray[np.float32], NDArray[np.float32], dict[int, str]]:
    """Of the images at `places`, which the reader yields next: what a `Form` makes a table of."""
    taken: list[Picture] = []

    def read() -> Iterator[bytes | ImageError]:
        for picture in itertools.islice(reader, len(places)):
            taken.append(picture._replace(image=b""))
            yield picture.image

    def progress(done: int) -> None:
        if compute.progress is not None:
            compute.progress(places.start + done)

    keys = [pictures.key(place) for place in places]
    images = ImageSet(pictures.path, keys, read, keep_pixels=False)
    index_N, image_NE = image_matrix(encoder, images, replace(compute, progress=progress))
    all_NE = np.zeros((len(places), image_NE.shape[1]), np.float32)
    all_NE[index_N] = image_NE.numpy()
    captions = [caption for picture in taken for caption in picture.captions]
    text_ME = np.zeros((0, image_NE.shape[1]), np.float32)
    if captions:
        text_ME = text_matrix(encoder, captions, compute).cpu().numpy()
    return keys, taken, all_NE, text_ME, images.unreadable


def merge(folder: Path, out: Path, about: Mapping[str, Any]) -> None:
    """Write the parts into one file, a group of rows each."""
    for leftover in out.parent.glob(f".{out.name}.*"):
        if WRITTEN_BESIDE.fullmatch(leftover.name):  # of a run that was killed here
            remove(leftover)
    paths = sorted(folder.glob("*.parquet"))
    schema = pq.read_schema(paths[0])
    with write_beside(out) as temporary, open_writer(temporary, schema, about) as writer:
        for path in paths:
            write_rows(writer, pq.read_table(path))


def summary_of(found: VectorFile) -> EmbedSummary:
    """What is in a file, counted."""
    unreadable = captions = 0
    columns = ["problem", "captions"] if found.about["captioned"] else ["problem"]
    for _, table in found.groups(columns):
        unreadable += len(table) - table["problem"].null_count
        captions += sum(map(len, table["captions"].to_pylist())) if "captions" in table.column_names else 0
    return EmbedSummary(found.path, found.rows, unreadable, captions, found.dimensions)
