"""From image shards of any kind to a dataset directory that TFDS opens: `clipkit build-tfds`.

The image shards, one after the other, are cut by size into stretches, one for each output shard, so the number of
shards, and with it every file's name, is known before the first record (`plan`). Passes over the stretches write them
(`passes`); where records change places, what is written are intermediate files (`shuffle`).

Files come in the order of trust: shards, each with its state in `clipkit/build-SPLIT/`; then the index, the list of
skipped samples and the manifest; `dataset_info.json` last. A run that finds a state goes on from it; a whole dataset
made from the same shards by the same options is left as it is. Nothing depends on the number of workers.

Columns: `jpg` and `txt`, then those of the sources under their names. With a new size `width` and `height` are those of
the stored image. `clipkit_tokens` and `clipkit_syntax`, both lists of ints, are as `prepare.precompute` says.
"""

import hashlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from clipkit.errors import UserError
from clipkit.formats.captions import CaptionChoice
from clipkit.formats.dataset import VERSION, check_name, open_dataset, refuse_unfinished_rewrite, shard_name
from clipkit.formats.features import Feature, parse_features
from clipkit.formats.manifest import (
    CLIPKIT_FOLDER,
    SourceEntry,
    SplitManifest,
    add_counts,
    read_manifest,
)
from clipkit.formats.shards import ALL_SPLITS
from clipkit.formats.tables import PairColumns
from clipkit.formats.text_file import Quoting
from clipkit.formatting import size_text
from clipkit.jobs.passes import PassProgress, Runner
from clipkit.jobs.run import Engine
from clipkit.storage.files import as_path, clear_leftovers, load_array, lock, read_json, remove
from clipkit.tfrecord_tools.build.choose import check_balance, check_best
from clipkit.tfrecord_tools.build.concepts import ConceptList, read_concepts
from clipkit.tfrecord_tools.build.dedup import check_dedup
from clipkit.tfrecord_tools.build.passes import choose_pass, gather_pass, hash_pass, write_pass
from clipkit.tfrecord_tools.build.plan import BuildOptions, first_samples, parse_split, plan
from clipkit.tfrecord_tools.build.prepare import (
    Condition,
    Part,
    Preparation,
    Stretch,
    check_precompute,
    kinds_of_samples,
    part_left,
    parts_id,
)
from clipkit.tfrecord_tools.build.shard import BuildState, Task
from clipkit.tfrecord_tools.build.shuffle import stretch_path
from clipkit.tfrecord_tools.readers.shards import InputShard, columns_left_out, find_shards, open_shard, read_shard
from clipkit.tfrecord_tools.reasons import (
    BAD_TEXT,
    EMPTY_CAPTION,
    NO_CAPTION,
    NO_CONCEPT,
    NO_IMAGE,
    NOT_AN_IMAGE,
    NOT_WANTED,
)
from clipkit.tfrecord_tools.writing.finish import (
    CAPTION_COLUMN,
    IMAGE_COLUMN,
    finish_dataset,
    kinds_of,
    pair_features,
    write_skipped,
)
from clipkit.tfrecord_tools.writing.summary import BuildSummary, summarise

SHARD_MEGABYTES = 256
QUALITY = 90
TABLE = "table_sha256"  # of a folder's table, which has no size on the line of sources


def build_tfds(
    shards: Path,
    out: Path,
    name: str,
    *,
    split: str = "train",
    where: str | None = None,
    resize: int | None = None,
    quality: int = QUALITY,
    dedup: str | None = None,
    keep_best: float | None = None,
    by: str | None = None,
    balance: str | None = None,
    limit: int | None = None,
    seed: int | None = None,
    shuffle: int | None = None,
    precompute: Sequence[str] = (),
    image_column: str | None = None,
    caption_column: str | None = None,
    captions: CaptionChoice | None = None,
    quoting: Quoting | None = None,
    shard_megabytes: float = SHARD_MEGABYTES,
    workers: int | None = 1,
    engine: Engine = "local",
    progress: Callable[[PassProgress], None] | None = None,
) -> BuildSummary:
    """Make `out/name/1.0.0` from image shards (see `read_shards`), and go on where a killed run stopped.

    `split` is a name, or shares by the hash of each sample's key, such as `train=0.99,validation=0.01`. Where the names
    of the shards say several splits, those of this one are read; "all" makes one split, train, of all. `where` is an
    SQL condition over the columns (`where`); `resize` the shorter side of the stored images in pixels, with a JPEG
    `quality`; `dedup` "sha256", "caption" or "phash" (`dedup`); `keep_best` the share of the best `by` a column or a
    table of scores, `balance` a list of concepts with the `limit` and the `seed` of its draws (`choose`); `shuffle` a
    seed (`shuffle`); `precompute` any of "tokens" and "syntax" (`precompute`). `image_column` and `caption_column` name
    a table's columns where they aren't found; `captions` ("first", "random" or "each") says which are taken where an
    image has a list of them; `quoting` what quotes mean in a text table (see `formats.text_quotes`).
    `shard_megabytes` is an output shard's size. A further split joins the dataset when its columns have the same kinds.
    Nothing depends on `workers` (None: one a core) and `engine`. `progress` replaces its line. Paths may be remote.

    Raises UserError for shards that are damaged, invalid names and options, an output that holds other data,
    columns that don't go with those of another split, and when not one sample can be used.
    """
    shards, out = as_path(shards), as_path(out)
    check_name(name)
    if shard_megabytes <= 0:
        raise UserError(f"shard size of {shard_megabytes} MB: give at least 1")
    columns = PairColumns(image_column, caption_column, captions, quoting)
    concepts = read_concepts(balance) if balance is not None else None
    chosen_by = check_best(keep_best, by), check_balance(concepts, limit, seed)
    steps = where, resize, quality, check_dedup(dedup), shuffle, check_precompute(precompute)
    options = BuildOptions(parse_split(split), *steps, columns, *chosen_by)
    folder = out / name / VERSION
    wanted_split = split if split == ALL_SPLITS else options.splits[0]
    paths = find_shards(shards, columns, wanted_split, lambda line: print(f"build-tfds: {line}", file=sys.stderr))
    if paths[0].parent.resolve() == folder.resolve():
        raise UserError(f"{folder}: the dataset itself is the source: choose another --name or output")
    work = folder / CLIPKIT_FOLDER / f"build-{'-'.join(options.splits)}"
    runner = Runner(workers, engine, progress)
    with lock(folder / CLIPKIT_FOLDER):
        refuse_unfinished_rewrite(folder)
        splits, known = _splits_there(folder)
        sources = [open_shard(path, columns, work) for path in paths]
        existing = _existing_splits(folder, options, splits, sources)
        clear_leftovers(folder, folder / CLIPKIT_FOLDER, work)
        if existing:
            for part in options.splits:
                open_dataset(folder, part)  # says so when a shard is missing
            remove(work)
            return summarise(folder, name, existing, built=False)
        preparation, left = _prepare(options, sources)
        _tell(sources, concepts, work if options.gathered and not progress else None, left)
        stretches = plan(work / "plan.json", sources, options, shard_megabytes, left)
        jobs = _jobs(folder, work, name, options, sources, stretches)
        decisions = hash_pass(jobs, work, preparation, options.dedup, runner) if options.dedup else ()
        chosen = choose_pass(jobs, preparation, decisions, options, concepts, runner)
        task = Task(preparation, options.shares, options.gathered, decisions, bool(chosen))
        states, kinds = write_pass(jobs, task, kinds_of(known), runner)
        _check_any(states, shards, sources)
        if options.gathered:
            found = gather_pass(jobs, states, task, (folder, name), shuffle, shard_megabytes * 1e6, runner)
        else:
            shard_files = [(job.beside(".npy"), state.shard) for job, state in zip(jobs, states, strict=True)]
            found = {options.splits[0]: shard_files}
        made = {}
        made_of = options.to_json() | ({TABLE: sources[0].sha256} if sources[0].table else {})
        for part, shards_of_part in found.items():
            accounts = _sources(states, part) if options.gathered else ()
            made[part] = SplitManifest(tuple(shard for _, shard in shards_of_part), accounts, made_of, chosen)
            write_skipped(folder, part, [job.skipped(part) for job in jobs])
        records = sum(state.shard.records for state in states)
        features = pair_features(kinds, [state.present for state in states], records, known)
        offsets = {part: (load_array(path) for path, _ in pairs) for part, pairs in found.items()}
        finish_dataset(folder, name, features, {**splits, **made}, offsets)
        remove(work)
    return summarise(folder, name, made, built=True)


def _tell(sources: Sequence[InputShard], concepts: ConceptList | None, work: Path | None, left: float) -> None:
    """Lines on stderr: columns and concepts that are left out, and the disk that intermediate files in `work` take."""
    if left_out := columns_left_out(sources[0]):
        print(f"build-tfds: left out, as no record holds bytes: {', '.join(left_out)}", file=sys.stderr)
    if concepts is not None and concepts.note:
        print(f"build-tfds: {concepts.note}", file=sys.stderr)
    if work is not None:
        size = size_text(sum(source.size for source in sources) * left)
        print(f"build-tfds: uses about {size} of disk besides the output, in {work}", file=sys.stderr)


def _splits_there(folder: Path) -> tuple[dict[str, SplitManifest], dict[str, Feature]]:
    """The splits that `dataset_info.json` names, and their columns. Raises UserError for a dataset of another kind.

    Hugging Face's `save_to_disk` writes a file of this name too, with splits of another form or none.
    """
    path = folder / "dataset_info.json"
    if not path.exists():
        return {}, {}
    info = read_json(path)
    parts = info.get("splits") if isinstance(info, dict) else None
    parts = parts if isinstance(parts, list) else [None]
    named = {str(part.get("name")) if isinstance(part, dict) else "" for part in parts}
    splits = {part: manifest for part, manifest in read_manifest(folder).items() if part in named}
    if named != set(splits):
        raise UserError(f"{folder} holds a dataset that clipkit didn't write: choose another output or --name")
    features = parse_features(read_json(folder / "features.json")) if splits else {}
    if splits and not {IMAGE_COLUMN, CAPTION_COLUMN} <= set(features):
        raise UserError(f"{folder} holds a dataset without captions: choose another output or --name")
    return splits, features


def _existing_splits(
    folder: Path, options: BuildOptions, splits: dict[str, SplitManifest], sources: list[InputShard]
) -> dict[str, SplitManifest]:
    """Those of the wanted splits that an earlier build finished; raises UserError when it made them of other things."""
    existing = {split: splits[split] for split in options.splits if split in splits}
    wanted = list(dict.fromkeys((source.path.name, source.size) for source in sources))
    for split, manifest in existing.items():
        reason = ""
        made_with = dict(manifest.options)
        if manifest.source_files != wanted or made_with.pop(TABLE, "") not in ("", sources[0].sha256):
            reason = "made from other shards"
        elif made_with != options.to_json():
            reason = "made with other options"
        elif len(existing) < len(options.splits):
            reason = "and not the others"
        if reason:
            raise UserError(
                f"{folder} already holds a split {split!r} {reason}: remove it, or choose another output or --name"
            )
    return existing


def _prepare(options: BuildOptions, sources: list[InputShard]) -> tuple[Preparation, float]:
    """What is to be done to each sample, and about what part of the bytes will be left, by a look at some of them.

    Raises UserError when `--where` or `--by` names a column that the first samples don't have.
    """
    best = options.keep_best
    if options.where is None and options.resize is None and best is None:
        return Preparation(precompute=options.precompute), 1.0
    samples = first_samples(sources)
    kinds = kinds_of_samples(samples)
    if best is not None and not best.table and best.by not in kinds:
        raise UserError(f"--by {best.by}: the samples have no such column; they have {', '.join(sorted(kinds))}")
    if options.where is not None:
        Condition(options.where, kinds)
    preparation = Preparation(options.where, kinds, options.resize, options.quality, options.precompute)
    return preparation, part_left(samples, preparation) * (best.share if best else 1.0)


def _jobs(
    folder: Path,
    work: Path,
    name: str,
    options: BuildOptions,
    sources: list[InputShard],
    stretches: Sequence[tuple[Part, ...]],
) -> list[Stretch]:
    count = len(stretches)
    size = sum(source.size for source in sources)
    all_parts = hashlib.sha256("\n".join(map(parts_id, stretches)).encode()).hexdigest()
    return [
        Stretch(
            number,
            stretch_path(work, number)
            if options.gathered
            else folder / shard_name(name, options.splits[0], number, count),
            work,
            parts,
            size * (number + 1) // count - size * number // count,
            all_parts,
        )
        for number, parts in enumerate(stretches)
    ]


def _check_any(states: Sequence[BuildState], shards: Path, sources: Sequence[InputShard]) -> None:
    """Raise UserError, with the cause and the remedy of the most frequent reason, when there is no record at all."""
    if any(state.shard.records for state in states):
        return
    counts = add_counts(
        source.skipped for state in states for accounts in state.accounts.values() for source in accounts
    )
    reasons = ", ".join(f"{count} × {reason}" for reason, count in counts.items()) or "there are none"
    most = max(counts, key=lambda reason: counts[reason], default="")
    if most == NO_IMAGE and sources[0].table is not None:
        row = next(iter(read_shard(sources[0]))).columns
        name = row[sources[0].columns.require_file(list(row), shards)]
        missing = sources[0].path.parent / str(name)[:200]
        remedy = f"for one, {missing} doesn't exist: mend the paths, which start at the table"
    else:
        remedy = _REMEDIES.get(most, "check the download")
    raise UserError(f"no sample of {shards} can be used ({reasons}): {remedy}")


# What to do when all samples of a build are left out for one reason.
_REMEDIES = {
    NO_IMAGE: "a sample is KEY.jpg beside KEY.txt in a tar, or a row with the image's bytes (--image-column)",
    NO_CAPTION: "a caption is KEY.txt or 'caption' in KEY.json in a tar, or a column (--caption-column)",
    BAD_TEXT: "convert the texts to UTF-8, for example with iconv",
    EMPTY_CAPTION: "in a table, name another column with --caption-column",
    NOT_AN_IMAGE: "in a table, name another column with --image-column",
    NOT_WANTED: "no row fulfils --where: ask for less",
    NO_CONCEPT: "no caption has a concept of --balance: check the list, which is compared letter for letter",
    "": "tars hold KEY.jpg and KEY.txt for each sample, tables a row",
}


def _sources(states: Sequence[BuildState], split: str) -> tuple[SourceEntry, ...]:
    """The account of each source in a split, whatever the cuts."""
    found: dict[tuple[str, int], list[SourceEntry]] = {}
    for state in states:
        for source in state.accounts[split]:
            found.setdefault((source.file, source.bytes), []).append(source)
    return tuple(
        SourceEntry(
            file,
            size,
            sum(p.samples for p in parts),
            sum(p.records for p in parts),
            add_counts(p.skipped for p in parts),
        )
        for (file, size), parts in found.items()
    )
