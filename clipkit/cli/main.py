"""The command `clipkit`: each subcommand parses its arguments, imports its stage, and calls one function.

Stages are imported inside the commands, so that `--help` loads neither torch nor anything else that is slow.
"""

import json
import re
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clipkit import __version__
from clipkit.cli import data, download, evaluate, plan, search
from clipkit.cli.options import (
    AnyPath,
    Count,
    Folder,
    OneLineErrors,
    Positive,
    TaskKinds,
    as_json,
    assignments,
    cache_folder,
    cache_gigabytes,
    data_split,
    device,
    loader_workers,
    print_json,
    vocabulary,
)
from clipkit.errors import UserError

if TYPE_CHECKING:
    from clipkit.eval.open import TaskKind

# What `train --eval-…` takes of zeroshot's options for the data.
EVAL_OPTIONS = ("train_data", "images", "label", "templates_name", "classes", "split")
SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True}


@click.group(cls=OneLineErrors, context_settings=SETTINGS)
@click.version_option(__version__, prog_name="clipkit")
def main() -> None:
    """Train and evaluate CLIP models on a budget.

    The stages in order: download, build-tfds, train, zeroshot, report. `clipkit demo` runs all of them on embedded
    pictures in about ten minutes.
    """


for _command in (
    *(download.download, data.build_tfds, data.build_imagenet, data.add_captions),
    *(data.verify, data.inspect, data.purge),
    *(evaluate.zeroshot, evaluate.compare, evaluate.report, evaluate.export),
    *(search.embed, search.score, search.reinforce, search.classify, search.search, plan.plan, plan.sweep),
):
    main.add_command(_command)


@main.command()
@click.option(
    "--data", required=True, multiple=True, metavar="PATH[=WEIGHT]", help="What to train on; may be repeated, to mix."
)
@click.option("--recipe", "recipe_name", metavar="NAME", help="See `clipkit recipes`. Needed but for --cooldown.")
@click.option("--out", type=Folder, help="Folder of the run. Needed but for --overfit.")
@device
@assignments
@vocabulary
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint of the run, if there is one.")
@click.option("--allow-changes", is_flag=True, help="Let stages that haven't begun differ when resuming.")
@click.option(
    "--init", type=AnyPath, help="Start with these weights: a checkpoint, or OpenCLIP's, OpenAI's, timm's file."
)
@click.option("--from-stage", metavar="NAME", help="Start --init at this stage of the recipe.")
@click.option(
    "--cooldown", type=Count, metavar="SAMPLES", help="Go on from --init, to a rate of 0 after so many samples."
)
@click.option(
    "--log-to", type=click.Choice(["wandb", "mlflow"]), multiple=True, help="Log metrics there too; may be repeated."
)
@click.option(
    "--overfit",
    type=click.IntRange(min=2),
    metavar="SAMPLES",
    help="Only check that the recipe can learn so many samples, say 128, by heart.",
)
@click.option("--reinforced", type=Folder, help="The teachers' embeddings (distill). [default: DATA.reinforced]")
@data_split
@loader_workers
@cache_folder
@cache_gigabytes
@click.option("--eval-data", type=AnyPath, help="Zero-shot data to evaluate on while training.")
@click.option("--eval-task", type=TaskKinds, help="As zeroshot's --task. [default: classification]")
@click.option("--eval-train-data", type=AnyPath, help="As zeroshot's --train-data.")
@click.option("--eval-images", type=Folder, help="As zeroshot's --images.")
@click.option("--eval-label", help="Label column of --eval-data.")
@click.option("--eval-templates", "eval_templates_name", help="As zeroshot's --templates.")
@click.option("--eval-classes", type=AnyPath, help="As zeroshot's --classes.")
@click.option("--eval-split", help="As zeroshot's --split.")
@as_json
def train(
    data: tuple[str, ...],
    recipe_name: str | None,
    out: Path | None,
    device: str,
    assignments: tuple[str, ...],
    resume: bool,
    init: Path | None,
    from_stage: str | None,
    cooldown: int | None,
    overfit: int | None,
    eval_data: Path | None,
    eval_task: "TaskKind | None",
    as_json: bool,
    **options: Any,
) -> None:
    """Train a recipe's stages in one run: few tokens first, then all.

    --data is a dataset folder (of build-tfds, or ImageNet), or a folder of webdataset tars, of parquet files with
    images, or of images with a table; local, or in a store such as s3://. The run's folder gets checkpoints,
    metrics.jsonl and TensorBoard files. Under `torchrun` each process takes its part of each batch. Ctrl-C and the
    signals TERM, HUP and USR1 save a checkpoint and end the run; --resume goes on from there. --cooldown branches off
    a checkpoint of a run on a constant (or inverse square root) rate, and leaves that run as it is. --overfit writes
    nothing: it exits with 0 when a few samples are learned by heart, else with 1.
    """
    from clipkit.config import set_values
    from clipkit.eval.open import open_data
    from clipkit.formatting import duration
    from clipkit.train.catalogue import find_recipe
    from clipkit.train.loop import train as stage
    from clipkit.train.start import cooldown_recipe

    of_task = {name: options.pop(f"eval_{name}") for name in EVAL_OPTIONS}
    named = find_recipe(recipe_name) if recipe_name else None
    if overfit and named is not None:
        given = {"out": out, "resume": resume, "init": init, "from-stage": from_stage, "cooldown": cooldown}
        check_health(
            set_values(named, assignments), data, overfit, device, as_json, {**given, "eval-data": eval_data, **options}
        )
        return
    if out is None:
        raise click.MissingParameter(param_hint="'--out'", param_type="option")
    if cooldown is not None:
        recipe = cooldown_recipe(cooldown, init, out, named, assignments, resume=resume, from_stage=from_stage)
    elif named is not None:
        recipe = set_values(named, assignments)
    else:
        raise click.UsageError("Missing option '--recipe'.")
    start: dict[str, Any] = {"resume": resume, "init": init, "from_stage": from_stage, "branch": cooldown is not None}
    task = None
    stray = next((name for name, value in {"task": eval_task, **of_task}.items() if value is not None), None)
    if eval_data is None and stray is not None:
        option = stray.removesuffix("_name").replace("_", "-")
        raise UserError(f"--eval-{option} is for --eval-data, which is missing: give it, or leave this out")
    if eval_data:
        try:
            task = open_data(eval_task or "classification", eval_data, **of_task)
        except UserError as error:
            raise UserError(as_train_says(str(error))) from error
        for note in task.notes:
            click.echo(as_train_says(note), err=True)
    summary = stage(recipe, data, out, device_name=device, task=task, **start, **options)
    if summary.is_first and as_json:
        print_json(summary.to_json())
    elif summary.is_first and summary.finished:
        click.echo(
            f"{summary.samples_seen:,} samples seen in {duration(summary.seconds)}; "
            f"try: clipkit zeroshot --ckpt {summary.run} --data DATA"
        )
    elif summary.is_first:
        click.echo(
            f"stopped at {summary.samples_seen:,} samples: run the same command with --resume to go on", err=True
        )
    if not summary.finished:
        # What a shell reports for a process that a signal ended; another rank may have got it.
        raise SystemExit(128 + (summary.signal or signal.SIGTERM))


def check_health(
    recipe: Any, data: tuple[str, ...], samples: int, device: str, as_json: bool, options: dict[str, Any]
) -> None:
    """`train --overfit`: print whether the samples were learned by heart, and exit with 1 where they weren't."""
    from clipkit.train.watch.overfit import overfit

    reading = {name: options.pop(name) for name in ("split", "cache", "cache_gb", "vocabulary")}
    for name in (name for name, value in options.items() if value and name != "workers"):
        raise UserError(f"--overfit is a check that starts from scratch: leave out --{name.replace('_', '-')}")
    found = overfit(recipe, data, samples, device_name=device, **reading)
    if found.is_first and as_json:
        print_json(found.to_json())
    elif found.is_first:
        click.echo(str(found))
    if not found.learned:
        raise SystemExit(1)


def as_train_says(message: str) -> str:
    """A message about zero-shot data with the options as `train` calls them."""
    message = message.replace(", or give --allow-empty-classes", "")
    return re.sub(r"--(label|templates|classes|split|task|train-data|images)\b", r"--eval-\1", message)


@main.command("bench-data")
@click.argument("data", nargs=-1, required=True, metavar="PATH[=WEIGHT]...")
@click.option("--image-size", type=Count, help="Side of the input in pixels. [default: 112, or the recipe's]")
@click.option("--recipe", "recipe_name", metavar="NAME", help="Take sizes, augmentation and text reduction from it.")
@assignments
@vocabulary
@data_split
@cache_folder
@cache_gigabytes
@loader_workers
@click.option("--seconds", type=click.FloatRange(min=0.1), default=10.0, help="How long to measure.")
@click.option("--need", type=Positive, help="Samples/s to reach. [default: what a GPU takes]")
@as_json
def bench_data(
    data: tuple[str, ...], recipe_name: str | None, assignments: tuple[str, ...], as_json: bool, **options: Any
) -> None:
    """Measure how fast the data gives training samples, what a GPU would need, and say what to change.

    PATH is what `train --data` takes; several are mixed. Without a recipe, images are cropped as CLIPA does and
    captions cut at 16 tokens.
    """
    from clipkit.config import set_values
    from clipkit.train.bench.command import bench_data as stage
    from clipkit.train.bench.findings import print_findings
    from clipkit.train.catalogue import find_recipe

    if assignments and not recipe_name:
        raise UserError("--set changes a recipe: name it with --recipe")
    recipe = set_values(find_recipe(recipe_name), assignments) if recipe_name else None
    found = stage(data, recipe=recipe, **options)
    if as_json:
        print_json(found.to_json())
    else:
        print_findings(found)


@main.command()
@click.argument("name", required=False)
@assignments
@as_json
def recipes(name: str | None, assignments: tuple[str, ...], as_json: bool) -> None:
    """List the recipes with what they cost, or print one (NAME, or a TOML file) as JSON.

    The keys of the JSON are what `train --set` and TOML files take. Tokens count what enters the transformers; FLOPs
    are those of training, 2 for each multiply-add, without what is computed again to save memory.
    """
    from clipkit.config import set_values, to_json
    from clipkit.train.catalogue import find_recipe, print_recipes, recipe_rows

    if name:
        click.echo(json.dumps(to_json(set_values(find_recipe(name), assignments)), indent=2))
    elif as_json:
        print_json(recipe_rows())
    else:
        print_recipes(recipe_rows())


@main.command()
@click.option("--out", type=Folder, default="demo-run", help="Folder for all results of the demo.")
@click.option("--teacher", is_flag=True, help="Then train on half of the samples, with a teacher and without.")
def demo(out: Path, teacher: bool) -> None:
    """Run the whole pipeline on embedded pictures: URLs, shards, dataset, CLIP, zero-shot numbers, report."""
    from clipkit.cli.demo import STUDENT, run_demo

    run_demo(out, student=STUDENT if teacher else None)


@main.command()
@as_json
def doctor(as_json: bool) -> None:
    """Print what is installed, which device will be used and why, and which versions don't work together."""
    from clipkit.cli.doctor import examine, print_findings

    findings = examine()
    if as_json:
        print_json(findings.to_json())
    else:
        print_findings(findings)
    if findings.problems:
        raise SystemExit(1)
