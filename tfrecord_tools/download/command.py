"""From a table of URLs to a dataset, or to shards of images and captions, with every row accounted for.

The wanted rows are cut into shards in order (`plan`). Workers fetch them in batches (`worker`), and a shard is done
when its state lies beside it and its files have the sizes that this names (`shard_state`); so a run that was killed
goes on when the same command runs again. What clipkit writes for itself lies in a folder `clipkit`: the plan, a ledger
of each shard's rows (`ledger`), all failures in one table, and the summary.
"""

import dataclasses
import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from clipkit.errors import UserError
from clipkit.formats.dataset import VERSION, check_name, refuse_unfinished_rewrite
from clipkit.formats.shards import note_beside_tables, select_split
from clipkit.formats.tables import find_tables, read_schema, table_suffix
from clipkit.formats.text_file import Quoting
from clipkit.jobs.run import Engine
from clipkit.jobs.worker import cores
from clipkit.storage.files import as_path, disk_errors, lock, remove, require_writable
from clipkit.tfrecord_tools.account.captions import refuse_added_captions
from clipkit.tfrecord_tools.account.shard_state import FORMATS, DownloadLayout, Format
from clipkit.tfrecord_tools.download.finish import DownloadSummary
from clipkit.tfrecord_tools.download.plan import JobSettings, Output, make_plan
from clipkit.tfrecord_tools.download.probe import ProbeResult, probe
from clipkit.tfrecord_tools.download.work import Download, parse_reasons
from clipkit.tfrecord_tools.pictures.picture import PictureSettings
from clipkit.tfrecord_tools.tables.url_table import check_tables, choose_columns, column_kind, usual_quoting
from clipkit.tfrecord_tools.web.settings import FetchSettings
from clipkit.tfrecord_tools.writing.pair_writer import stored_name

NEEDED = ("img2dataset", "ada_url", "aiohttp", "aiodns", "protego")
SAMPLES_PER_SHARD = 10_000
PROBE_FLOOR = 0.5
PICTURES = PictureSettings()
NETWORK = FetchSettings()
STRANGE = ("*.tar", "*_stats.json", "*.tfrecord*", "dataset_info.json", "[0-9][0-9][0-9][0-9][0-9].parquet")


def download(
    urls: Path | str,
    out: Path | str,
    *,
    format: Format = "tfds",
    name: str | None = None,
    preset: str | None = None,
    url_column: str | None = None,
    caption_column: str | None = None,
    keep_columns: Sequence[str] | None = None,
    quoting: Quoting | None = None,
    split: str = "train",
    where: str | None = None,
    hash_column: str | None = None,
    hash_kind: str | None = None,
    drop_changed: bool = False,
    pictures: PictureSettings = PICTURES,
    network: FetchSettings = NETWORK,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    processes: int | None = None,
    engine: Engine = "local",
    retry_failed: str | None = None,
    probe_rows: int | None = None,
    probe_floor: float = PROBE_FLOOR,
    tell_probe: Callable[[ProbeResult], None] | None = None,
) -> DownloadSummary:
    """Fetch the images of a URL table (parquet, CSV, TSV, or a folder of them) into `out`. Both may be remote.

    `format`: `tfds` makes the dataset `out/NAME/1.0.0`, as build-tfds would from tars (`name`: the preset's or the
    table's, unless given); `webdataset` makes `00000.tar`, with a table of all rows beside; `parquet` a table with the
    image in the column `jpg`. The last two are named and laid out as img2dataset has them.
    Of a folder whose tables' names say several splits those of `split` are read, "all" for all of them.
    `quoting` says what quotes mean in text tables (see `formats.text_quotes`), None: to be told from the table.
    `where` is an SQL condition over a row. A hash column (`hash_kind`: md5, sha1, sha256, sha512 or phash) is compared
    with what comes, and the verdict stored as `hash_check`; `drop_changed` leaves out what isn't the same picture.
    `network.connections` are those of each process; `network.per_host` holds for all of this machine together, though
    every process may have one. In a cluster each machine is taken to run as many processes as this one has cores.
    `processes` of None takes every core, or all of a Ray or Spark cluster.
    `retry_failed` names reasons, separated by commas: rows that failed for them, and no others, are fetched again.
    `probe_rows` of them are fetched first, and thrown away, to say how it will go; `tell_probe` gets what was found.
    Running it again finishes what was begun, and does nothing when all is there.

    Raises UserError, before anything is fetched, for a missing, unreadable or empty table, missing columns, an output
    that can't be written or belongs to another download, invalid settings, and when a package isn't installed;
    and after a probe when a smaller share than `probe_floor` succeeds.
    """
    urls, out = as_path(urls), as_path(out)
    again = None if retry_failed is None else parse_reasons(retry_failed, network.allow_private_hosts)
    check_settings(format, samples_per_shard, processes, network, probe_rows)
    pictures.check()
    chosen = choose_columns(preset, url_column, caption_column, keep_columns, hash_column, hash_kind)
    tables = find_tables(urls, "URL table")
    notes = list(filter(None, [note_beside_tables(urls)]))
    if len(tables) > 1:
        names, others = select_split(urls, [table.name for table in tables], split)
        wanted = set(names)
        tables = [table for table in tables if table.name in wanted]
        notes += others
    for note in notes:
        print(f"download: {note}", file=sys.stderr)
    for package in NEEDED:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{package} isn't installed, and downloading needs it: pip install 'clipkit[download]'")
    check = partial(
        check_tables,
        chosen=chosen,
        must_keep_all=keep_columns is not None,
        must_check=hash_column is not None,
        quoting=quoting,
    )
    known = quoting or usual_quoting(chosen.header)
    columns = check([(table, read_schema(table, chosen.header, known)) for table in tables])
    dataset = dataset_name(name, preset, urls) if format == "tfds" else ""
    root = out / dataset / VERSION if format == "tfds" else out
    if root == urls:
        raise UserError(f"{urls} is both the folder of the tables and the output: choose another output")
    output = Output(format, dataset, columns, pictures, drop_changed, samples_per_shard)
    processes = processes or (cores() if engine == "local" else None)
    network = divide_requests(network, processes or cores())
    require_writable(root)
    with lock(root / "clipkit"), disk_errors(root):
        check_output(root, output)
        refuse_unfinished_rewrite(root)
        refuse_added_captions(root)
        plan = make_plan(urls, tables, output, where, root / "clipkit", check)
        output = plan.output
        kept = output.columns.kept
        kinds = {stored_name(field.name): kind for field in kept if (kind := column_kind(field.type)) is not None}
        layout = DownloadLayout(root, format, dataset, len(plan.shards))
        course = Download(plan, JobSettings(layout, output, network, kinds), processes, engine, str(urls), where)
        found = None
        if probe_rows is not None and not course.has_begun():
            found = probe(plan, probe_rows, network, processes or cores())
            if tell_probe is not None:
                tell_probe(found)
            refusal = found.refusal(probe_floor)
            if refusal is not None:
                remove(root / "clipkit" / "plan.json")  # other settings may follow
                raise UserError(refusal)
        return dataclasses.replace(course.run(again), probe=found)


def divide_requests(network: FetchSettings, processes: int) -> FetchSettings:
    """The settings of each process, which has its part of the requests to one host, and one at least."""
    if processes > network.per_host:
        print(
            f"download: {processes} processes may send one host {processes} requests at a time, more than --per-host "
            f"{network.per_host}: --processes {network.per_host} keeps to it",
            file=sys.stderr,
        )
    return dataclasses.replace(network, per_host=max(1, network.per_host // processes))


def check_settings(
    format: str, samples_per_shard: int, processes: int | None, network: FetchSettings, probe_rows: int | None
) -> None:
    """Raise UserError for invalid settings."""
    if format not in FORMATS:
        raise UserError(f"unknown format {format!r}: choose one of {', '.join(FORMATS)}")
    counts: list[tuple[str, Any]] = [
        ("samples per shard", samples_per_shard), ("processes", processes), ("rows of a probe", probe_rows),
        ("connections", network.connections), ("connections per host", network.per_host),
        ("largest body", network.max_bytes),
    ]  # fmt: skip
    for name, value in counts:
        if value is not None and value < 1:
            raise UserError(f"the number of {name} must be at least 1, not {value}")
    if network.timeout <= 0 or network.deadline <= 0 or network.retries < 0:
        raise UserError(
            f"timeout and deadline must be above 0 s and retries at least 0, not {network.timeout:g}, "
            f"{network.deadline:g} and {network.retries}"
        )


def dataset_name(name: str | None, preset: str | None, urls: Path) -> str:
    """The name given, or one made of the preset's or the table's. Raises UserError for one that TFDS doesn't allow."""
    if name is None:
        stem = urls.name.removesuffix(table_suffix(urls, "URL table")) if not urls.is_dir() else urls.resolve().name
        name = re.sub(r"\W+", "_", preset or stem, flags=re.ASCII).strip("_").lower()
        name = name if name[:1].isalpha() else f"urls_{name}".rstrip("_")
    return check_name(name, "--name")


def check_output(root: Path, output: Output) -> None:
    """Raise UserError when a download can't begin here: there is something else, or nothing to see a change by."""
    if (root / "clipkit" / "plan.json").exists():
        return
    if output.drop_changed and output.columns.hash is None:
        raise UserError(
            "--drop-changed needs a hash of each image, which not all tables have: name its column by --hash-column "
            "and --hash-kind"
        )
    # Without our memory, shards here are someone else's: img2dataset's, or the output was mistyped.
    strange = next((path for pattern in STRANGE for path in root.glob(pattern)), None)
    if strange is not None:
        raise UserError(f"{strange} isn't from clipkit download: choose an empty output (build-tfds reads such shards)")
