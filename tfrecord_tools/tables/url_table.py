"""The tables of URLs: which columns are read, of which types they are when all tables are taken together, their rows.

Text tables are copied once to parquet: a shard's rows must be found without reading all that stands before them.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import pyarrow as pa

from clipkit.errors import UserError
from clipkit.formats.kinds import OWN
from clipkit.formats.tables import open_parquet, read_schema, table_errors, table_suffix
from clipkit.formats.text_file import Quoting
from clipkit.storage.files import is_remote
from clipkit.storage.stores import as_upath, store_errors
from clipkit.tfrecord_tools.sample import HASH_KINDS, HashKind
from clipkit.tfrecord_tools.tables.copies import copy_tables
from clipkit.tfrecord_tools.tables.presets import PRESETS, Preset, fitting_presets

# Up to this size the whole file is hashed, beyond it samples of it: the check is against the wrong file, not an enemy.
WHOLE_HASH_BYTES = 256 << 20
HASH_SAMPLES = 64
HASH_SAMPLE_BYTES = 1 << 20

# Columns that a download makes itself. Where a kept one has such a name, the download's own is called OWN + name.
OWN_NAMES = (
    *("key", "caption", "url", "status", "error_message", "width", "height", "original_width", "original_height"),
    *("exif", "sha256", "hash_check", "jpg"),
)


def own_names(kept: Sequence[str]) -> dict[str, str]:
    """What the download's own columns are called beside the kept ones."""
    taken = {name for name in OWN_NAMES if name in kept}
    if {"txt", "caption"} & {name.lower() for name in kept}:
        taken.add("caption")  # a reader would take that for the caption
    if taken & {"status", "error_message"}:
        taken |= {"status", "error_message"}
    return {name: OWN + name if name in taken else name for name in OWN_NAMES}


@dataclass(frozen=True)
class WantedRows:
    """Rows of the tables: the kept columns, and apart from them, whatever they are called, what a download needs."""

    kept: pa.Table
    urls: pa.Array
    captions: pa.Array
    hashes: pa.Array | None = None


@dataclass(frozen=True)
class TableColumns:
    """What is read of the tables: names, and the kept columns with the types that fit all of them."""

    url: str
    caption: str
    kept: pa.Schema
    hash: str | None = None
    hash_kind: HashKind | None = None
    header: tuple[str, ...] = ()
    quoting: Quoting = "auto"

    @property
    def read(self) -> list[str]:
        """The columns to read, each once."""
        wanted = [*self.kept.names, self.caption, self.url, self.hash]
        return list(dict.fromkeys(name for name in wanted if name is not None))

    def align(self, rows: pa.Table, table: Path) -> WantedRows:
        """The rows with what is kept under its own name and type. What a table hasn't is null.

        Raises UserError, naming the table, for a value that its column's type doesn't hold, and for text that isn't
        UTF-8, which no program looks for when it writes parquet.
        """

        def column(name: str, kind: pa.DataType | None) -> pa.ChunkedArray | pa.Array:
            if name not in rows.column_names:
                return pa.nulls(rows.num_rows, kind)
            try:
                values = rows[name] if kind is None else rows[name].cast(kind)
                values.validate(full=True)
                return values
            except pa.ArrowInvalid as error:
                raise UserError(
                    f"column {name!r} of {table} can't be read as {kind} ({error}): mend it, or leave the column out"
                ) from error

        return WantedRows(
            pa.Table.from_arrays([column(field.name, field.type) for field in self.kept], schema=self.kept),
            column(self.url, pa.string()),
            column(self.caption, pa.string()),
            None if self.hash is None else column(self.hash, None),
        )


def choose_columns(
    preset: str | None,
    url_column: str | None,
    caption_column: str | None,
    keep_columns: Sequence[str] | None,
    hash_column: str | None = None,
    hash_kind: str | None = None,
) -> Preset:
    """The column names: those given, else the preset's, else `url` and `caption`. Raises UserError."""
    if preset is not None and preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}: choose one of {', '.join(PRESETS)}, or name the columns")
    if hash_kind is not None and hash_kind not in HASH_KINDS:
        raise UserError(f"unknown hash kind {hash_kind!r}: choose one of {', '.join(HASH_KINDS)}")
    if (hash_column is None) != (hash_kind is None):
        raise UserError("a hash is checked by --hash-column and --hash-kind together: give both")
    chosen = PRESETS[preset] if preset is not None else Preset("url", "caption")
    chosen = replace(chosen, url=url_column or chosen.url, caption=caption_column or chosen.caption)
    if keep_columns is not None:
        chosen = replace(chosen, keep=tuple(keep_columns))
    if hash_column is not None:
        chosen = replace(chosen, hash_column=hash_column, hash_kind=cast(HashKind, hash_kind))
    return chosen


def usual_quoting(header: Sequence[str]) -> Quoting:
    """What quotes mean in text tables, unless the user says it: characters in those published without a header."""
    return "none" if header else "auto"


def check_tables(
    tables: Sequence[tuple[Path, pa.Schema]],
    chosen: Preset,
    must_keep_all: bool,
    must_check: bool,
    quoting: Quoting | None = None,
) -> TableColumns:
    """The columns to read of all tables. Raises UserError when one lacks some, or when they are of a wrong type.

    `must_keep_all` and `must_check`: the user has named the columns to keep, or the hash, so that they must be there.
    """
    kept: dict[str, pa.DataType] = {}
    for path, schema in tables:
        for field in check_columns(path, schema, chosen, must_keep_all):
            kind = common_type(kept.get(field.name), field.type)
            if kind is None:
                raise UserError(
                    f"column {field.name!r} holds {field.type} in {path} and {kept[field.name]} in a table before: "
                    "leave it out, or download the tables one by one"
                )
            kept[field.name] = kind
    has_hash = all(has_hash_column(path, schema, chosen, must_check) for path, schema in tables)
    if chosen.url == "url":
        kept.pop("url", None)  # which is stored anyway, under the same name
    return TableColumns(
        url=chosen.url,
        caption=chosen.caption,
        kept=pa.schema([(name, kept[name]) for name in dict.fromkeys(chosen.keep) if name in kept]),
        hash=chosen.hash_column if has_hash else None,
        hash_kind=chosen.hash_kind if has_hash else None,
        header=chosen.header,
        quoting=quoting or usual_quoting(chosen.header),
    )


def has_hash_column(path: Path, schema: pa.Schema, columns: Preset, must: bool) -> bool:
    """Whether a table has the hash column. Raises UserError where it lacks it and `must` have it, or can't be one."""
    name = columns.hash_column
    if name is None or name not in schema.names:
        if name is not None and must:
            raise UserError(f"{path} has no hash column {name!r}; it has {', '.join(schema.names)}")
        return False
    kind = only_field(path, schema, name).type
    if not is_text(kind) and not (columns.hash_kind == "phash" and pa.types.is_integer(kind)):
        raise UserError(f"the hash column {name!r} of {path} holds {kind}, not hex digits: name another")
    return True


def only_field(path: Path, schema: pa.Schema, name: str) -> pa.Field:
    """The column of a name that the table has. Raises UserError when several have it."""
    if schema.names.count(name) > 1:
        raise UserError(f"{path} has {schema.names.count(name)} columns {name!r}: rename all but one")
    return schema.field(name)


def check_columns(path: Path, schema: pa.Schema, columns: Preset, must_keep_all: bool) -> list[pa.Field]:
    """The columns to keep from a table. Raises UserError when it lacks some, or when they are of a wrong type."""
    for what, name in (("URL", columns.url), ("caption", columns.caption)):
        if name not in schema.names:
            raise UserError(
                f"{path} has no {what} column {name!r}; it has {', '.join(schema.names)}: {advice(schema.names)}"
            )
        kind = only_field(path, schema, name).type
        if not is_text(kind):
            raise UserError(f"the {what} column {name!r} of {path} holds {kind}, not text: name another")
    keep = []
    for name in dict.fromkeys(columns.keep):
        if name not in schema.names:
            if must_keep_all:
                raise UserError(f"{path} has no column {name!r} to keep; it has {', '.join(schema.names)}")
            continue
        if name.startswith(OWN) and name.removeprefix(OWN) in OWN_NAMES:
            raise UserError(f"can't keep column {name!r} of {path}: it is called as clipkit's own; rename yours")
        field = only_field(path, schema, name)
        if not is_json(field.type):
            raise UserError(f"can't keep column {name!r} of {path}: it holds {field.type}; leave it out")
        keep.append(field)
    return keep


def common_type(one: pa.DataType | None, other: pa.DataType) -> pa.DataType | None:
    """A type that holds the values of both, text where nothing else does; None for lists that don't go together."""
    if pa.types.is_dictionary(other):
        other = other.value_type
    if one is None or one == other:
        return other
    try:
        schemas = [pa.schema([("column", kind)]) for kind in (one, other)]
        return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except pa.ArrowTypeError:
        return None if any(pa.types.is_nested(kind) for kind in (one, other)) else pa.string()


def advice(names: Sequence[str]) -> str:
    """What to do about missing columns."""
    presets = fitting_presets(names)
    if presets:
        return f"--preset {presets[0]} fits them"
    return "name the columns with --url-column and --caption-column"


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type can be read as text."""
    if pa.types.is_dictionary(kind):
        return is_text(kind.value_type)
    return any(
        test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    )


def is_json(kind: pa.DataType) -> bool:
    """Whether values of this type can stand in a sample's JSON."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_dictionary(kind):
        return is_json(kind.value_type)
    return is_text(kind) or any(test(kind) for test in (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean))


def column_kind(kind: pa.DataType) -> str | None:
    """What `clipkit.formats.kinds` calls values of an Arrow type; None where only nulls can be."""
    if pa.types.is_null(kind):
        return None
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        inner = column_kind(kind.value_type)
        return None if inner is None else f"list of {inner}"
    if pa.types.is_boolean(kind):
        return "bool"
    if pa.types.is_integer(kind):
        return "int"
    return "float" if pa.types.is_floating(kind) else "text"


# ---- Rows ------------------------------------------------------------------------------------------------------------


def count_rows(
    tables: Sequence[Path],
    copies: Sequence[Path],
    text_columns: Sequence[str],
    header: Sequence[str] = (),
    quoting: Quoting = "auto",
) -> list[int]:
    """Count the rows of all tables; those of text tables by copying them to parquet at `copies`.

    `text_columns` (URL and caption) are read as text even where they look like numbers. The types of the others hold
    for all tables. Raises UserError when a table can't be read to its end.
    """
    others: list[dict[str, str]] = []
    counts: dict[Path, int] = {}
    for path in tables:
        if table_suffix(path) == ".parquet":
            with table_errors(path), open_parquet(path) as file:
                counts[path] = int(file.metadata.num_rows)
            kinds = {field.name: column_kind(field.type) for field in read_schema(path)}
            others.append({name: kind for name, kind in kinds.items() if kind is not None})
    texts = [(path, copy) for path, copy in zip(tables, copies, strict=True) if path not in counts]
    rows = copy_tables(texts, lambda name: name in text_columns, header, quoting, others)
    counts.update(zip((path for path, _ in texts), rows, strict=True))
    return [counts[path] for path in tables]


def rows_path(path: Path, copy: Path) -> Path:
    """The parquet file to read a table's rows from: itself, or the copy of a text table."""
    return path if table_suffix(path) == ".parquet" else copy


def fingerprint(path: Path) -> str:
    """A hash that tells a changed file from the one seen before: of the whole file, or of samples when it is large.

    Of a remote file it is what the store says of its contents (an ETag or a CRC), so that nothing is fetched.
    """
    if is_remote(path):
        target = as_upath(path)
        with store_errors(path):
            return f"{path.stat().st_size}-{target.fs.checksum(target.path)}"
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= WHOLE_HASH_BYTES:
            while block := file.read(HASH_SAMPLE_BYTES):
                digest.update(block)
        else:
            for i in range(HASH_SAMPLES):
                file.seek((size - HASH_SAMPLE_BYTES) * i // (HASH_SAMPLES - 1))
                digest.update(file.read(HASH_SAMPLE_BYTES))
    return digest.hexdigest()
