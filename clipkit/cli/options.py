"""What the commands share: types of arguments, options, one-line errors, JSON on stdout, and help in sections."""

import io
import json
import math
import sys
from pathlib import Path
from typing import Any, NoReturn

import click

from clipkit.errors import InternalError, UserError
from clipkit.storage.files import disk_message
from clipkit.storage.stores import comes_from_store, store_message

Folder = click.Path(path_type=Path, file_okay=False)
AnyPath = click.Path(path_type=Path)
Count = click.IntRange(min=1)
CountOrZero = click.IntRange(min=0)
Positive = click.FloatRange(min=0, min_open=True)


class _PathOrUrl(click.ParamType[Path]):
    """A local path, or a URL of an object store (`s3://`, `gs://`, `memory://`) that behaves as one."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """A Path as `files.as_path` makes it."""
        from clipkit.storage.files import as_path

        return as_path(value)


PathOrUrl = _PathOrUrl()


class FiniteRange(click.FloatRange):
    """A range of numbers in which `nan` and `inf` aren't."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As click's, but refuses what isn't finite."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} isn't finite.", param, ctx)
        return number


class OneLineErrors(click.Group):
    """A group whose commands end with one line and the right exit code instead of a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the subcommand; UserError exits with 2, InternalError with 1."""
        if isinstance(sys.stdout, io.TextIOWrapper):  # what stdout's encoding lacks must not end the work of hours
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            return super().invoke(ctx)
        except UserError as error:
            fail(str(error), 2)
        except InternalError as error:
            fail(str(error), 1)
        except Exception as error:
            if comes_from_store(error):
                message = store_message(error, "the store")
            else:
                message = disk_message(error, error.filename or "the output") if isinstance(error, OSError) else None
            if message is None:
                raise
            fail(message, 2)


class SectionedOption(click.Option):
    """An option under a heading of its command's help."""

    def __init__(self, *names: Any, section: str = "Options", **attributes: Any) -> None:
        super().__init__(*names, **attributes)
        self.section = section


class SectionedCommand(click.Command):
    """A command with too many options for one list: its help shows them under headings, in order of appearance."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one list of options a section; those without one come last."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                sections.setdefault(getattr(parameter, "section", "Options"), []).append(record)
        plain = sections.pop("Options", [])
        for title, records in [*sections.items(), ("Options", plain)]:
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


def option(section: str, *names: str, **attributes: Any) -> Any:
    """An option under a heading of the help."""
    return click.option(*names, cls=SectionedOption, section=section, **attributes)


def fail(message: str, code: int) -> NoReturn:
    """End the command with one line on stderr."""
    click.echo(f"Error: {' '.join(message.split())}", err=True)
    raise SystemExit(code)


def print_json(value: Any) -> None:
    """One line of JSON on stdout, for scripts; in ASCII where stdout isn't UTF-8."""
    click.echo(json.dumps(value, ensure_ascii=not is_unicode()))


def is_unicode() -> bool:
    """Whether stdout takes all characters."""
    return (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")


def print_summary(summary: Any, as_json: bool) -> None:
    """Print a stage's summary: one line of JSON, or its text."""
    if as_json:
        print_json(summary.to_json())
    else:
        click.echo(summary.text())


TaskKinds = click.Choice(["classification", "retrieval", "choice", "linear-probe", "few-shot", "knn"])
Quoting = click.Choice(["auto", "csv", "backslash", "none"])
QUOTING_HELP = "Quotes in CSV and TSV: doubled in quoted fields, behind a backslash, or characters."
quoting = click.option("--quoting", type=Quoting, default="auto", help=QUOTING_HELP)
dataset_folder = click.argument("path", metavar="DIR", type=PathOrUrl)
workers = click.option("--workers", type=Count, help="Processes to use. [default: one a core]")
loader_workers = click.option("--workers", type=CountOrZero, help="Loader workers. [default: by the number of cores]")
engine = click.option(
    "--engine",
    type=click.Choice(["local", "ray", "spark"]),
    default="local",
    help="Where to work on the shards: this machine, or a Ray or Spark cluster that you have.",
)
assignments = click.option(
    "--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Change a value of the recipe; may be repeated."
)
device = click.option("--device", default="auto", metavar="auto|cpu|gpu|tpu", help="Where to compute.")
cache_folder = click.option("--cache", type=Folder, help="Folder in which to keep data that comes over the network.")
data_split = click.option("--split", default="train", help="Split of each --data that has several; all: all of them.")
cache_gigabytes = click.option("--cache-gb", type=Positive, default=10.0, help="Its largest size.")
vocabulary = click.option(
    "--tokenizer", "vocabulary", type=AnyPath, help="Vocabulary file of the model's tokenizer, where it isn't clip-bpe."
)
tokenizer = click.option(
    "--tokenizer", "vocabulary", type=AnyPath, help="The tokenizer's vocabulary, where the model comes without."
)
batch_size = click.option("--batch-size", type=Count, default=256, help="Images at once.")
as_json = click.option("--json", "as_json", is_flag=True, help="Print the summary as one line of JSON.")
precision = click.option(
    "--precision",
    type=click.Choice(["float32", "bfloat16", "auto"]),
    default="float32",
    help="Arithmetic of the towers: float32 is the reference; bfloat16 is faster on GPUs and changes single answers; "
    "auto: bfloat16 where the device has it.",
)
ema = click.option("--ema", is_flag=True, help="Take the averages of the weights that the run kept.")
