"""The commands that make, check and change datasets; `main` adds them to the group."""

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from clipkit.cli.options import (
    QUOTING_HELP,
    AnyPath,
    Count,
    CountOrZero,
    Folder,
    PathOrUrl,
    Quoting,
    SectionedCommand,
    as_json,
    dataset_folder,
    engine,
    option,
    print_summary,
    quoting,
    workers,
)
from clipkit.errors import UserError


@click.command("build-tfds", cls=SectionedCommand)
@click.argument("shards", type=PathOrUrl)
@click.argument("out", type=PathOrUrl, required=False)
@click.option("--name", required=True, help="Name of the dataset; it becomes OUT/NAME/1.0.0.")
@option("Input", "--image-column", metavar="NAME", help="Column with images, or with their file names.")
@option("Input", "--caption-column", metavar="NAME", help="Column with captions.")
@option(
    "Input",
    "--captions",
    type=click.Choice(["first", "random", "each"]),
    help="Which of an image's several captions to take.",
)
@option("Input", "--quoting", type=Quoting, help=f"{QUOTING_HELP} [default: auto]")
@option("Which samples", "--where", metavar="SQL", help='Condition such as "similarity > 0.3".')
@option(
    "Which samples",
    "--dedup",
    type=click.Choice(["sha256", "caption", "phash"]),
    help="Keep the first of samples with the same bytes, caption or picture.",
)
@option(
    "Which samples",
    "--keep-best",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    metavar="SHARE",
    help="Keep this share of the samples, those with the best scores: 0.3.",
)
@option("Which samples", "--by", metavar="COLUMN|TABLE", help="The scores: a column, or a table of `clipkit score`.")
@option(
    "Which samples",
    "--balance",
    metavar="FILE|builtin",
    help="Thin out samples whose concepts are common, as MetaCLIP does: a text file with a concept a line.",
)
@option("Which samples", "--limit", type=Count, help="Samples a concept has before it is thinned out. [default: 20000]")
@option("Which samples", "--seed", type=int, help="Seed of --balance's draws. [default: 0]")
@option(
    "Which samples",
    "--split",
    default="train",
    help="Name of the split, or shares: train=0.99,validation=0.01. Of SHARDS whose names say splits, only this one's "
    "are read; all mixes them.",
)
@option("Form", "--resize", type=Count, metavar="N", help="Store small copies, N pixels on the shorter side.")
@option("Form", "--quality", default=90, help="JPEG quality of the small copies.")
@option("Form", "--precompute", metavar="LIST", help="Columns to add: tokens, or tokens,syntax.")
@option("Form", "--shuffle", type=int, metavar="SEED", help="Shuffle all samples; takes as much disk again.")
@option("Form", "--shard-megabytes", type=Count, default=256, help="Size of a shard.")
@option("Work", "--in-place", is_flag=True, help="SHARDS itself becomes the dataset, without a copy: no OUT.")
@workers
@engine
@as_json
def build_tfds(
    shards: Path, out: Path | None, in_place: bool, as_json: bool, precompute: str | None, **options: Any
) -> None:
    """Turn image-text SHARDS into a TFDS dataset below OUT.

    SHARDS is img2dataset's tars, tfrecords or parquet files, other parquet files with images, a folder of images with
    a table (or the table), or a dataset directory. The same command goes on where it was stopped. TensorFlow isn't
    needed to write it; `tfds.builder_from_directory` reads it.

    With --in-place a folder of img2dataset's tfrecords is checked, and its shards are renamed.
    """
    if in_place:
        _build_in_place(shards, as_json, options)
        return
    if out is None:
        raise UserError("build-tfds needs OUT, the folder for the dataset: give it behind SHARDS, or --in-place")
    from clipkit.tfrecord_tools.build.command import build_tfds as stage

    wanted = [name.strip() for name in precompute.split(",")] if precompute else []
    print_summary(stage(shards, out, precompute=wanted, **options), as_json)


def _build_in_place(folder: Path, as_json: bool, options: dict[str, Any]) -> None:
    from clipkit.tfrecord_tools.in_place.command import build_in_place as stage

    taken = ("name", "split", "workers", "engine")
    context = click.get_current_context()
    given = [name for name in context.params if context.get_parameter_source(name) == ParameterSource.COMMANDLINE]
    refused = [name for name in given if name not in ("shards", "in_place", "as_json", *taken)]
    if refused:
        name = "OUT" if refused[0] == "out" else f"--{refused[0].replace('_', '-')}"
        raise UserError(f"{name} needs a copy: leave it or --in-place out")
    print_summary(stage(folder, **{name: options[name] for name in taken}), as_json)


@click.command("build-imagenet")
@click.argument("source", type=Folder)
@click.argument("out", type=PathOrUrl)
@click.option("--name", default="imagenet2012", help="Name of the set; it becomes OUT/NAME/VERSION.")
@click.option("--split", help="Which split SOURCE is, or the only one to take. [default: all it has]")
@click.option("--labels", type=AnyPath, help="Classes of a flat folder: lines in file order, 'file class', or CSV.")
@click.option("--classes", type=AnyPath, help="Another set's classes in label order. [default: its folders, sorted]")
@click.option("--subset", is_flag=True, help="Accept an ImageNet with classes or images missing.")
@click.option("--max-bad", type=CountOrZero, default=0, help="Broken images to leave out.")
@click.option("--allow-empty-classes", is_flag=True, help="Keep the numbers of classes without images.")
@workers
@engine
@as_json
def build_imagenet(source: Path, out: Path, as_json: bool, **options: Any) -> None:
    """Turn ImageNet, or any folder of labelled images, into the TFDS dataset OUT/imagenet2012/5.1.0.

    SOURCE holds the official tars (with the devkit for the validation labels), or a folder for each split with a folder
    for each class, or a flat validation folder with --labels. Another set is named by --name and becomes
    OUT/NAME/1.0.0.
    """
    from clipkit.tfrecord_tools.labelled.imagenet import build_imagenet as stage

    print_summary(stage(source, out, **options), as_json)


class CountOrAll(click.ParamType[int | None]):
    """A number, or the word `all`, which becomes None."""

    name = "number|all"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        """An int of at least 0, or None."""
        return None if value in ("all", None) else CountOrZero.convert(value, param, ctx)


@click.command()
@dataset_folder
@click.option("--decode", type=CountOrAll(), default="1000", help="Images to decode in full.")
@workers
@engine
@as_json
def verify(path: Path, as_json: bool, **options: Any) -> None:
    """Check that the dataset in DIR is whole: every checksum, count and offset, and that images can be decoded.

    DIR is a dataset of clipkit or of TFDS, or a folder of img2dataset's tars. Nothing is written. The exit code is 2
    when something is wrong; each line says what to do.
    """
    from clipkit.tfrecord_tools.verify.command import verify as stage

    summary = stage(path, **options)
    print_summary(summary, as_json)
    if summary.problems:
        raise SystemExit(2)


@click.command()
@dataset_folder
@click.option(
    "--list", "removals", type=PathOrUrl, required=True, help="Parquet, CSV, TSV, or a text file with a value a line."
)
@click.option("--by", metavar="COLUMN", help="url, key, sha256, md5, or a text column. [default: from the list]")
@quoting
@click.option("--dry-run", is_flag=True, help="Count what would be removed, and change nothing.")
@workers
@engine
@as_json
def purge(path: Path, removals: Path, as_json: bool, **options: Any) -> None:
    """Remove the records on a list (opt-outs, for one) from the dataset in DIR, for good and with a log.

    URLs and keys must match exactly. Only the shards concerned are written again; the same command goes on
    where it was stopped, and until then nothing opens the dataset.
    """
    from clipkit.tfrecord_tools.purge.command import purge as stage

    print_summary(stage(path, removals, **options), as_json)


@click.command("add-captions")
@dataset_folder
@click.argument("table", type=PathOrUrl)
@click.option("--by", type=click.Choice(["key", "url"]), help="What says which record. [default: the one TABLE has]")
@click.option("--source", default="synthetic", help="Name of these captions, for the recipe's weights.")
@click.option("--column", default="caption", help="Column of TABLE with the captions: text, or lists of several.")
@workers
@engine
@as_json
def add_captions(path: Path, table: Path, as_json: bool, **options: Any) -> None:
    """Add captions of another source (a captioner's, alt text) from TABLE to the records of the dataset in DIR.

    Keys and URLs must match exactly; of each image one row. The other bytes of the records stay. The same command goes
    on where it was stopped, and until then nothing opens the dataset. Training draws by --set captions.SOURCE=WEIGHT.
    """
    from clipkit.tfrecord_tools.captions.command import add_captions as stage

    print_summary(stage(path, table, **options), as_json)


@click.command()
@dataset_folder
@click.option("--split", help="Which split. [default: the only one, or train]")
@click.option("--sample", type=Count, default=10_000, help="Records to look at, drawn from all.")
@click.option("--out", type=PathOrUrl, help="Folder for the page and the numbers. [default: DIR/clipkit]")
@as_json
def inspect(path: Path, as_json: bool, **options: Any) -> None:
    """Write a page that shows what is in the dataset in DIR: pairs, lengths, what reductions keep, sizes, duplicates.

    The page is inspection.html, one file that loads nothing; the same numbers are beside it in inspection.json.
    With a --split other than the usual one, its name is in theirs: inspection-validation.html.
    """
    from clipkit.tfrecord_tools.inspection.command import inspect_dataset as stage

    print_summary(stage(path, **options), as_json)
