"""What a download is going to do: checked before anything is fetched, and remembered for the run after a kill.

The rows that `--where` wants are remembered as bits, an eighth of a byte a row, and never copied: a shard is a range of
a table's rows and how many of them are wanted.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from clipkit.errors import UserError
from clipkit.formats.tables import open_parquet, read_schema, table_errors
from clipkit.storage.files import load_array, read_json, save_array, write_json
from clipkit.tfrecord_tools.account.shard_state import DownloadLayout, Format
from clipkit.tfrecord_tools.pictures.picture import PictureSettings
from clipkit.tfrecord_tools.tables.url_table import TableColumns, count_rows, fingerprint, rows_path, usual_quoting
from clipkit.tfrecord_tools.web.settings import FetchSettings


@dataclass(frozen=True)
class Output:
    """What the images become. All of it decides a shard's bytes, so a resumed download must not change it.

    `name` is the dataset's for the format `tfds`, else "".
    """

    format: Format
    name: str
    columns: TableColumns
    pictures: PictureSettings
    drop_changed: bool
    samples_per_shard: int


@dataclass(frozen=True)
class DownloadShard:
    """The wanted ones among the rows `start` to `stop` of one table, and the number of the shard that they become.

    `rows` counts them. `table` is the parquet file to read; `mask` says which are wanted, None: all.
    """

    number: int
    table: Path
    start: int
    stop: int
    rows: int
    mask: Path | None = None


@dataclass(frozen=True)
class DownloadPlan:
    """The shards to make. `rows` counts the wanted rows of all tables, `left_out` the others.

    `sources` are the user's tables by the parquet files that are read in their place, themselves or copies.
    """

    output: Output
    shards: tuple[DownloadShard, ...]
    rows: int
    left_out: int
    sources: dict[Path, Path]


@dataclass(frozen=True)
class JobSettings:
    """What all shards of a download have in common; it goes to every worker.

    `kinds` are those of the kept columns (see `formats.kinds`), `round` the number of the retry, 0 for the first time.
    `counters` is the folder where workers of this machine count what they have done.
    """

    layout: DownloadLayout
    output: Output
    network: FetchSettings
    kinds: dict[str, str]
    round: int = 0
    counters: str | None = None


@dataclass(frozen=True)
class DownloadJob:
    """A shard to fetch; with `retry` only its rows that failed for one of these reasons, the others as they are."""

    shard: DownloadShard
    retry: frozenset[str] | None = None


def make_plan(
    urls: Path,
    tables: Sequence[Path],
    output: Output,
    where: str | None,
    own: Path,
    check: Callable[[Sequence[tuple[Path, pa.Schema]]], TableColumns],
) -> DownloadPlan:
    """Cut the tables into shards, as the run before did if there was one.

    `check` gives the columns for the tables' types, which are known of text tables once they are copied. `own` is
    clipkit's folder in the output, which remembers. Raises UserError when no row is wanted, when the condition can't be
    asked, and when `own` remembers other tables or other settings.
    """
    copies = [own / "input" / f"{number:05d}.parquet" for number in range(len(tables))]
    masks = [own / "input" / f"{number:05d}-mask.npy" for number in range(len(tables))]
    paths = [rows_path(path, copy) for path, copy in zip(tables, copies, strict=True)]
    fingerprints = [fingerprint(path) for path in tables]
    memory = own / "plan.json"
    is_known = memory.exists()
    columns = output.columns
    if not is_known:
        counts = count_rows(tables, copies, (columns.url, columns.caption), columns.header, columns.quoting)
    if any(path.exists() for path in copies):
        sources = [rows if rows.exists() else table for table, rows in zip(tables, paths, strict=True)]
        schemas = [read_schema(source, columns.header) for source in sources]
        output = replace(output, columns=check(list(zip(tables, schemas, strict=True))))
    settings = settings_of(output, where)
    if is_known:
        before = recall(memory, settings, fingerprints, urls)
    else:
        if sum(counts) == 0:
            raise UserError(f"{urls} holds no rows: nothing to download")
        wanted = counts if where is None else [write_mask(*each, where) for each in zip(paths, masks, strict=True)]
        if sum(wanted) == 0:
            raise UserError(f"--where {where!r} leaves none of the {sum(counts):,} rows of {urls}: widen it")
        before = {"settings": settings, "rows": counts, "wanted": wanted, "fingerprints": fingerprints}
        write_json(memory, {**before, "urls": str(urls)})
    known = [mask if where is not None else None for mask in masks]
    shards = tuple(cut(paths, before["rows"], known, output.samples_per_shard))
    wanted_rows = sum(before["wanted"])
    left_out = sum(before["rows"]) - wanted_rows
    return DownloadPlan(output, shards, wanted_rows, left_out, dict(zip(paths, tables, strict=True)))


def settings_of(output: Output, where: str | None) -> dict[str, Any]:
    """All that decides which bytes come out, by name, as JSON has it."""
    columns = {**asdict(output.columns), "kept": [f"{field.name}: {field.type}" for field in output.columns.kept]}
    columns["header"] = list(output.columns.header)
    quoting = columns.pop("quoting")
    return {
        "format": output.format,
        "name": output.name,
        "where": where,
        **{f"{name} column" if name != "header" else name: value for name, value in columns.items()},
        "quoting": None if quoting == usual_quoting(output.columns.header) else quoting,
        **asdict(output.pictures),
        "drop_changed": output.drop_changed,
        "samples_per_shard": output.samples_per_shard,
    }


def recall(memory: Path, settings: dict[str, Any], fingerprints: list[str], urls: Path) -> dict[str, Any]:
    """What the run before remembered. Raises UserError when it had other tables or other settings."""
    before: dict[str, Any] = read_json(memory)
    out, known = memory.parent.parent, before.get("settings", {})
    if known.get("phash column") is not None:  # earlier versions set perceptual hashes apart
        known |= {"hash column": known["phash column"], "hash_kind column": "phash"}
    for name, value in settings.items():
        if known.get(name) != value:
            raise UserError(
                f"{out} was begun with {name} {known.get(name)!r}, not {value!r}: "
                "run it with the same settings, or choose another output"
            )
    if before["fingerprints"] != fingerprints:
        raise UserError(
            f"{urls} isn't the table that {out} was begun with ({before['urls']}): "
            "give back that table, or choose another output"
        )
    return before


# ---------------------------------------------------------------------------------------------------------------------
# Which rows
# ---------------------------------------------------------------------------------------------------------------------


def write_mask(table: Path, path: Path, where: str) -> int:
    """Remember as bits which rows of a parquet file fulfil the condition; return how many do. Raises UserError."""
    from clipkit.tfrecord_tools.tables.where import RowFilter, iter_masks

    bits, rest, wanted = [], np.zeros(0, np.bool_), 0
    with table_errors(table), open_parquet(table) as file:
        for mask in iter_masks(file, RowFilter(where, file.schema_arrow)):
            wanted += int(mask.sum())
            rest = np.concatenate([rest, mask])
            whole = len(rest) // 8 * 8
            bits.append(np.packbits(rest[:whole]))
            rest = rest[whole:]
    bits.append(np.packbits(rest))
    save_array(path, np.concatenate(bits))
    return wanted


def load_mask(path: Path) -> npt.NDArray[np.uint8]:
    """The bits of all rows of a table, eight a byte. Raises UserError when they are gone or damaged."""
    try:
        return load_array(path)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} can't be read ({error}): remove its folder's plan.json to begin again") from error


def wanted_rows(bits: npt.NDArray[np.uint8], start: int, stop: int) -> npt.NDArray[np.int64]:
    """int64[…]: the numbers of the wanted rows from `start` to `stop`."""
    first = start // 8
    mask = np.unpackbits(bits[first : (stop + 7) // 8], count=stop - first * 8).view(np.bool_)[start - first * 8 :]
    return np.flatnonzero(mask) + start


def cut(
    paths: Sequence[Path], counts: Sequence[int], masks: Sequence[Path | None], samples_per_shard: int
) -> Iterator[DownloadShard]:
    """Consecutive rows, at most `samples_per_shard` wanted ones a shard; no shard spans two tables."""
    number = 0
    for path, count, mask in zip(paths, counts, masks, strict=True):
        if mask is not None:
            ranges = cut_wanted(load_mask(mask), count, samples_per_shard)
        else:
            ends = ((start, min(start + samples_per_shard, count)) for start in range(0, count, samples_per_shard))
            ranges = ((start, stop, stop - start) for start, stop in ends)
        for start, stop, rows in ranges:
            yield DownloadShard(number, path, start, stop, rows, mask)
            number += 1


def cut_wanted(
    bits: npt.NDArray[np.uint8], count: int, samples_per_shard: int, step: int = 1 << 20
) -> Iterator[tuple[int, int, int]]:
    """Start, stop and number of wanted rows of each shard of a table, found `step` rows at a time.

    A shard begins with a wanted row.
    """
    pending = np.zeros(0, np.int64)
    for start in range(0, count, step):
        pending = np.concatenate([pending, wanted_rows(bits, start, min(start + step, count))])
        whole = len(pending) // samples_per_shard
        for shard in range(whole):
            part = pending[shard * samples_per_shard : (shard + 1) * samples_per_shard]
            yield int(part[0]), int(part[-1]) + 1, len(part)
        pending = pending[whole * samples_per_shard :]
    if len(pending):
        yield int(pending[0]), int(pending[-1]) + 1, len(pending)
