"""The commands that evaluate models and show what was found."""

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from clipkit.cli.options import (
    AnyPath,
    Folder,
    TaskKinds,
    as_json,
    batch_size,
    cache_gigabytes,
    device,
    ema,
    is_unicode,
    precision,
    print_json,
    tokenizer,
)
from clipkit.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from clipkit.device import Device, Precision
    from clipkit.eval.open import TaskKind
    from clipkit.eval.results import Result
    from clipkit.eval.tables import TableFormat

table_format = click.option(
    "--format",
    "table_format",
    type=click.Choice(["table", "csv", "md", "latex"]),
    default="table",
    help="How to print the tables: aligned, or for spreadsheets, Markdown and LaTeX.",
)


@click.command()
@click.option(
    "--ckpt",
    "models",
    required=True,
    multiple=True,
    metavar="MODEL",
    help="A checkpoint or run; a file or folder of OpenCLIP's or transformers'; open_clip:NAME:FILE, hf:OWNER/NAME. "
    "May be repeated.",
)
@ema
@tokenizer
@click.option(
    "--data",
    type=AnyPath,
    required=True,
    multiple=True,
    help="TFDS folder, parquet, tars, class folders, or a JSON or CSV. May be repeated.",
)
@click.option(
    "--suite",
    metavar="NAME|FILE.toml",
    help="Measure every dataset in --data: imagenet, vtab, datacomp-38, retrieval, or a file of your own.",
)
@click.option("--task", "kind", type=TaskKinds, help="What is measured on the data. [default: classification]")
@click.option(
    "--templates",
    "templates_name",
    help="A known name, a file, or 'a photo of a {}'. [default: those beside the data, else openai-80]",
)
@click.option("--label", help="Column with the label. [default: label]")
@click.option("--classes", type=AnyPath, help="Names of the classes: a name a line, or JSON {label: name or [names]}.")
@click.option("--pooling", help="How several names make one class: mean or sum. [default: mean]")
@click.option("--train-data", type=AnyPath, help="What a probe learns from. [default: the split train of --data]")
@click.option("--shots", help="Training images a class for few-shot. [default: 1,5,10]")
@click.option("--images", type=Folder, help="Folder with the images that a JSON or CSV names. [default: beside it]")
@click.option("--split", help="Split of the data. [default: validation or test, the first that it has, else train]")
@click.option(
    "--allow-empty-classes", is_flag=True, default=None, help="Count class folders without images as classes."
)
@click.option("--name", help="Name of the task in the results. [default: from the data]")
@batch_size
@precision
@device
@click.option(
    "--cache", type=Folder, help="Folder in which embeddings are kept. [default: clipkit in the user's cache folder]"
)
@cache_gigabytes
@click.option("--no-cache", is_flag=True, help="Compute all embeddings now, and keep none.")
@click.option(
    "--out", type=Folder, help="Run that gets the results; of several models, each a folder in it. [default: its own]"
)
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    help="ray: each model on each dataset is a job on your Ray cluster, or on one started here.",
)
@table_format
@as_json
def zeroshot(
    models: tuple[str, ...],
    ema: bool,
    vocabulary: Path | None,
    data: tuple[Path, ...],
    suite: str | None,
    kind: "TaskKind | None",
    batch_size: int,
    precision: "Precision",
    device: str,
    cache: Path | None,
    cache_gb: float,
    no_cache: bool,
    out: Path | None,
    engine: Literal["local", "ray"],
    table_format: "TableFormat",
    as_json: bool,
    **task_options: Any,
) -> None:
    """Measure a model on data that it wasn't trained for, and print the numbers with their intervals.

    --task classification: images by prompts only. retrieval: captions of images and images of captions, among all.
    choice: the right one of two captions or images. linear-probe, few-shot, knn: a classifier that learns from the
    features of training images, without texts. --suite: every dataset that --data has a folder of. A checkpoint
    describes itself, so it needs no model name.
    docs/evaluation.md says which models of other projects can be measured. Embeddings are kept, so the same command
    given again goes on where it was stopped. On several GPUs, start it by torchrun: torchrun --nproc-per-node 8 -m
    clipkit zeroshot …
    """
    from clipkit.device import pick
    from clipkit.embedding.cached import open_cache
    from clipkit.eval.evaluation import zeroshot as stage
    from clipkit.eval.open import open_data
    from clipkit.eval.results import file_name
    from clipkit.eval.suite import evaluate_suite
    from clipkit.eval.tables import results_text

    if len(data) > 1 and task_options["name"]:
        raise UserError(f"--name {task_options['name']} is for one --data: leave it out")
    if no_cache and cache:
        raise UserError("--cache and --no-cache exclude each other: leave out one of them")
    kept = None if no_cache else open_cache(cache, int(cache_gb * 1e9))
    outs = {model: out / file_name(model) if out and len(models) > 1 else out for model in models}
    where = pick(device)
    how: dict[str, Any] = {"batch_size": batch_size, "device": where, "precision": precision, "cache": kept}
    how |= {"ema": ema, "vocabulary": vocabulary}

    def measured() -> "Iterator[list[Result]]":
        if suite is not None:
            refuse_beside_suite({"task": kind, **task_options}, data)
        if engine == "ray":
            yield from evaluate_on_ray(
                suite, kind or "classification", data, task_options, outs, how | {"device": device}
            )
        elif suite is None:
            for path in data:
                task = open_data(kind or "classification", path, **task_options)
                yield from (stage(model, task, out=outs[model], **how) for model in models)
        else:
            for model in models:
                yield from ([number] for number in evaluate_suite(model, suite, data[0], out=outs[model], **how))

    with one_of_ranks(where):
        tabled: list[Result] = []
        for each in measured():
            if table_format == "table" or as_json:
                print_results(each, as_json)
            else:
                tabled += each
        if tabled:
            echo(results_text(tabled, table_format))


def evaluate_on_ray(
    suite: str | None,
    kind: "TaskKind",
    data: tuple[Path, ...],
    options: dict[str, Any],
    outs: dict[str, Path | None],
    how: dict[str, Any],
) -> "Iterator[list[Result]]":
    """The results of all models on all data, as without Ray."""
    from clipkit.eval.fleet import evaluate_fleet, evaluate_suites

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--engine ray has workers of its own: start it without torchrun")
    if suite is None:
        return evaluate_fleet(kind, data, options, outs, how)
    return evaluate_suites(suite, data[0], outs, how)


@contextlib.contextmanager
def one_of_ranks(device: "Device") -> "Iterator[None]":
    """Let the first of the ranks print. They leave their group at the end, but not after an error: others may wait."""
    with contextlib.ExitStack() as stack:
        if not device.is_first:
            nowhere = stack.enter_context(Path(os.devnull).open("w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield
    device.close()


def refuse_beside_suite(options: dict[str, Any], data: tuple[Path, ...]) -> None:
    """Raise UserError for what a suite decides itself."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        option = given[0].removesuffix("_name").replace("_", "-")
        raise UserError(f"--{option} can't be heeded: a suite has its own for each dataset: leave it out")
    if len(data) > 1:
        raise UserError("--suite takes one --data, the folder that holds a folder for each dataset")


def print_results(found: "Sequence[Result]", as_json: bool) -> None:
    """One model's numbers on one task, as a table or as JSON lines."""
    from clipkit.config import to_json
    from clipkit.eval.tables import table

    if as_json:
        for result in found:
            print_json(to_json(result))
    else:
        from rich.console import Console

        Console().print(table(found, "–" if is_unicode() else "-"))


@click.command()
@click.argument("runs", nargs=-1, required=True, type=Folder, metavar="RUN...")
@click.option("--out", type=AnyPath, metavar="PAGE.html", help="Where to write the page.")
def report(runs: tuple[Path, ...], out: Path | None) -> None:
    """Write RUN/report.html: one page with the curves, the numbers, the pictures and the costs.

    Several runs are put side by side on one page, side-by-side.html: their curves over each other, a table of their
    results, and their costs.
    """
    from clipkit.eval.report.side_by_side import report_all as stage

    click.echo(stage(runs, out))


@click.command()
@click.argument("runs", nargs=-1, required=True, type=AnyPath, metavar="RUN...")
@table_format
@as_json
def compare(runs: tuple[Path, ...], table_format: "TableFormat", as_json: bool) -> None:
    """Compare models: which of their numbers can be compared, and which differences are more than chance.

    RUN is a run, a checkpoint in a run, or a results.jsonl; each model is compared with the first. Where the runs hold
    the guesses for each image, the comparison is paired (McNemar's test, a bootstrap). Models known by their names,
    open_clip:NAME:TAG, are held against OpenCLIP's published numbers, and accuracies on ImageNet's relatives against
    the line of the published models.
    """
    from clipkit.eval.comparison.compare import compare as stage
    from clipkit.eval.comparison.text import comparison_json, comparison_text

    found = stage(runs)
    if as_json:
        print_json(comparison_json(found))
    else:
        echo(comparison_text(found, table_format))


def echo(text: str) -> None:
    """Print a text, with hyphens for the dashes that stdout lacks. (click.echo writes UTF-8 where it can't.)"""
    print(text if is_unicode() else text.replace("–", "-").replace("−", "-"))


@click.command()
@click.argument("ckpt", type=Folder)
@click.argument("out", type=Folder)
@click.option(
    "--to",
    "target",
    type=click.Choice(["open_clip", "hf", "timm", "onnx"]),
    required=True,
    help="Format: OpenCLIP, transformers, timm (the image tower), or ONNX graphs.",
)
@ema
@as_json
def export(ckpt: Path, out: Path, target: Literal["open_clip", "hf", "timm", "onnx"], ema: bool, as_json: bool) -> None:
    """Write the model of CKPT, a checkpoint or a run (its newest), to the folder OUT in another project's format.

    The result is run in that project's own package and compared with ours; nothing is uploaded.
    """
    from clipkit.export.command import export as stage

    parity = stage(ckpt, out, target, ema=ema)
    if as_json:
        print_json(parity.to_json())
    else:
        click.echo(f"{parity.text_report()}\nwritten to {out}")
