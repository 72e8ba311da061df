"""What a download is going to do: checked before anything is fetched, and remembered for the run after a kill."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from clipkit.errors import UserError
from clipkit.files import read_json, write_json
from clipkit.tfrecord_tools.fetch import Output, Shard
from clipkit.tfrecord_tools.presets import PRESETS, Preset, fitting_presets
from clipkit.tfrecord_tools.url_table import count_rows, fingerprint, read_schema, rows_path

# Columns that img2dataset makes itself, so that an input column of that name can't be kept.
RESERVED = frozenset(
    {"key", "caption", "url", "width", "height", "original_width", "original_height"}
    | {"status", "error_message", "exif", "md5", "sha256", "sha512"}
)
MIN_SHARD_DIGITS = 5


@dataclass(frozen=True)
class Plan:
    """What the images become, and the shards to make."""

    output: Output
    shards: tuple[Shard, ...]

    @property
    def rows(self) -> int:
        """The number of rows of the whole input."""
        return sum(shard.rows for shard in self.shards)

    def name(self, shard: Shard) -> str:
        """The shard's number as its files have it."""
        return f"{shard.number:0{self.output.shard_digits}d}"


def choose_columns(
    preset: str | None, url_column: str | None, caption_column: str | None, keep_columns: Sequence[str] | None
) -> Preset:
    """The column names: those given, else the preset's, else `url` and `caption`. Raises UserError."""
    if preset is not None and preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}: choose one of {', '.join(PRESETS)}, or name the columns")
    base = PRESETS[preset] if preset is not None else Preset("url", "caption")
    keep = base.keep if keep_columns is None else tuple(keep_columns)
    return Preset(url_column or base.url, caption_column or base.caption, keep)


def check_columns(path: Path, schema: pa.Schema, columns: Preset, must_keep_all: bool) -> tuple[str, ...]:
    """The columns to keep from a table. Raises UserError when it lacks some, or when they are of a wrong type."""
    for what, name in (("URL", columns.url), ("caption", columns.caption)):
        if name not in schema.names:
            raise UserError(
                f"{path} has no {what} column {name!r}; it has {', '.join(schema.names)}: {advice(schema.names)}"
            )
        if not is_text(schema.field(name).type):
            raise UserError(
                f"the {what} column {name!r} of {path} holds {schema.field(name).type}, not text: name another"
            )
    keep = []
    for name in columns.keep:
        if name in schema.names:
            keep.append(name)
        elif must_keep_all:
            raise UserError(f"{path} has no column {name!r} to keep; it has {', '.join(schema.names)}")
    for name in keep:
        if name in RESERVED:
            raise UserError(f"can't keep column {name!r} of {path}: the download makes one of that name; rename yours")
        if not is_json(schema.field(name).type):
            raise UserError(f"can't keep column {name!r} of {path}: it holds {schema.field(name).type}; leave it out")
    return tuple(keep)


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


def make_plan(
    urls: Path, tables: Sequence[Path], columns: Preset, must_keep_all: bool, images: dict[str, Any], own: Path
) -> Plan:
    """Check the tables and cut them into shards, as the run before did if there was one.

    `images` holds the fields of Output that don't come from the tables. `own` is clipkit's folder in the output.
    Raises UserError when the table is empty, or when `own` remembers another table or other settings.
    """
    keeps = [check_columns(path, read_schema(path), columns, must_keep_all) for path in tables]
    if len(set(keeps)) > 1:
        raise UserError(
            f"the tables in {urls} differ in their columns ({keeps}): name those to keep, or download one by one"
        )
    settings = {"url_column": columns.url, "caption_column": columns.caption, "keep_columns": list(keeps[0]), **images}
    copies = [own / "input" / f"{number:05d}.parquet" for number in range(len(tables))]
    fingerprints = [fingerprint(path) for path in tables]
    memory = own / "plan.json"
    if memory.exists():
        rows = recall(memory, settings, fingerprints, urls)
    else:
        # Without our memory, shards here are someone else's: img2dataset's, or the output was mistyped.
        strange = next(iter([*own.parent.glob("*.tar"), *own.parent.glob("*_stats.json")]), None)
        if strange is not None:
            raise UserError(f"{strange} isn't from clipkit: choose an empty output (build-tfds reads it as it is)")
        text_columns = (columns.url, columns.caption)
        rows = [count_rows(path, copy, text_columns) for path, copy in zip(tables, copies, strict=True)]
        if sum(rows) == 0:
            raise UserError(f"{urls} holds no rows: nothing to download")
        write_json(memory, {"settings": settings, "rows": rows, "fingerprints": fingerprints, "urls": str(urls)})
    paths = [rows_path(path, copy) for path, copy in zip(tables, copies, strict=True)]
    shards = cut(paths, rows, images["samples_per_shard"])
    digits = max(MIN_SHARD_DIGITS, len(str(len(shards) - 1)))
    return Plan(Output(**{**settings, "keep_columns": keeps[0]}, shard_digits=digits), shards)


def recall(memory: Path, settings: dict[str, Any], fingerprints: list[str], urls: Path) -> list[int]:
    """The row counts of the run before. Raises UserError when it had another table or other settings."""
    before = read_json(memory)
    out = memory.parent.parent
    for name, value in settings.items():
        if before["settings"].get(name) != value:
            raise UserError(
                f"{out} was begun with {name} {before['settings'].get(name)!r}, not {value!r}: "
                "run it with the same settings, or choose another output"
            )
    if before["fingerprints"] != fingerprints:
        raise UserError(
            f"{urls} isn't the table that {out} was begun with ({before['urls']}): "
            "give back that table, or choose another output"
        )
    rows: list[int] = before["rows"]
    return rows


def cut(paths: Sequence[Path], rows: Sequence[int], samples_per_shard: int) -> tuple[Shard, ...]:
    """Consecutive rows, at most `samples_per_shard` a shard; no shard spans two files."""
    shards: list[Shard] = []
    for path, count in zip(paths, rows, strict=True):
        for start in range(0, count, samples_per_shard):
            shards.append(Shard(len(shards), str(path), start, min(samples_per_shard, count - start)))
    return tuple(shards)
