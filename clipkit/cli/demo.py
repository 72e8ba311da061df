"""The whole pipeline on the embedded pairs: the same commands that a user would run, one after the other.

Each command runs in a process of its own and goes on by itself where a killed run stopped. The demo adds a server for
the pictures while they are downloaded, the order, and a summary of time and memory.
"""

import contextlib
import errno
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

from clipkit.config import set_values
from clipkit.embedded import emoji_groups, emoji_parquet
from clipkit.errors import InternalError, UserError
from clipkit.formatting import duration
from clipkit.storage.files import lock, read_json, remove, write_json
from clipkit.train.catalogue import find_recipe

FAULTY_SHARE = 0.03
SEED = 0
# Training captions are bare (`label: keywords`), and so are the prompts.
TEMPLATES = "plain"
# What the demo with a teacher trains on half of the samples; how many times the demo's samples its teacher is trained
# on, and how many views of each picture it sees then.
STUDENT = "emoji-dr"
TEACHER_LENGTH = 3
VIEWS = 40


@dataclass(frozen=True)
class Stage:
    """One command of the demo. `arguments` follow `clipkit`; `output` is there when the command has succeeded."""

    name: str
    arguments: tuple[str, ...]
    output: Path

    @property
    def command(self) -> str:
        """What a user would type."""
        return shlex.join(["clipkit", *self.arguments])


@dataclass(frozen=True)
class Cost:
    """What a stage took: wall clock, and the memory of its largest process."""

    name: str
    command: str
    seconds: float
    peak_memory_bytes: int


def run_demo(
    out: Path,
    *,
    recipe: str = "emoji-demo",
    student: str | None = None,
    limit: int | None = None,
    settings: Sequence[str] = (),
) -> None:
    """Run download, build-tfds, train, zeroshot and report below `out`, print the results, and go on where a killed
    demo stopped.

    `student` is a recipe with a teacher: it is trained once without, and once with a longer run of `recipe` as its
    teacher, and one page shows the four. `limit` takes only the first pairs; `settings` are `key=value` for the
    recipes. Raises UserError when a command fails, or when `out` holds a demo of other pairs.
    """
    planned = stages(out, recipe, settings)
    if student is not None:
        planned += student_stages(out, recipe, student, settings)
    with lock(out):
        run_stages(out, planned, limit)


def run_stages(out: Path, stages: Sequence[Stage], limit: int | None) -> None:
    """Run the stages that aren't done, and print the results of all at the end."""
    print(f"The demo works in {out}; stop it when you like, and run it again to go on.")
    before = {cost.name: cost for cost in read_costs(out / "demo.json")}
    known: dict[str, Cost] = {}
    for stage in stages:
        cost = before.get(stage.name)
        if cost is not None and cost.command == stage.command and stage.output.exists():
            print(f"\n$ {stage.command}\n(done before, in {duration(cost.seconds)})", flush=True)
            known[stage.name] = cost
            continue
        # Later stages are made from what this one makes, so none counts as done any more.
        before = {}
        write_costs(out / "demo.json", known)
        print(f"\n$ {stage.command}", flush=True)
        with serve_pictures(out, limit) if stage.name == "download" else contextlib.nullcontext():
            known[stage.name] = run_stage(stage)
        write_costs(out / "demo.json", known)
        if (out / "run").exists():
            write_costs(out / "run" / "demo.json", known)
    print("\n" + summary_text(out, list(known.values())), flush=True)


def stages(out: Path, recipe: str, settings: Sequence[str]) -> list[Stage]:
    """The commands in order."""
    shards, run, heldout = out / "shards", out / "run", str(emoji_parquet("heldout"))
    download = ("--preset", "laion400m", "--format", "webdataset", "--image-size", "96", "--samples-per-shard", "2200")
    # All pictures come from one server of our own, and some of its answers never come.
    server = ("--allow-private-hosts", "--per-host", "128", "--timeout", "2")
    evaluate = ("--eval-data", heldout, "--eval-templates", TEMPLATES)
    # A group holds unlike things, so each of its training captions is a prompt, and their probabilities are added.
    groups = ("--label", "group", "--classes", str(emoji_groups()), "--pooling", "sum")
    zeroshot = zeroshot_of(run, recipe, settings)
    return [
        Stage(
            "download",
            ("download", str(out / "urls.parquet"), str(shards), *download, *server),
            shards / "clipkit" / "download.json",
        ),
        Stage(
            "build-tfds",
            ("build-tfds", str(shards), str(out / "data"), "--name", "emoji"),
            out / "data" / "emoji" / "1.0.0" / "dataset_info.json",
        ),
        Stage("train", train_of(out, run, recipe, settings, evaluate), run / "config.json"),
        Stage("zeroshot", zeroshot, run / "results.jsonl"),
        Stage("zeroshot of groups", (*zeroshot, *groups), run / "results.jsonl"),
        Stage("report", ("report", str(run)), run / "report.html"),
    ]


def student_stages(out: Path, recipe: str, student: str, settings: Sequence[str]) -> list[Stage]:
    """What follows with a teacher: its training, the student's without and with it, and the page of the four runs."""
    run, teacher, alone, taught = (out / name for name in ("run", "teacher", "half", "half-taught"))
    stored, page = out / "reinforced", out / "side-by-side.html"
    data = out / "data" / "emoji" / "1.0.0"
    lengths = [TEACHER_LENGTH * stage.samples for stage in set_values(find_recipe(recipe), settings).stages]
    longer = (*settings, *(f"stages.{number}.samples={samples}" for number, samples in enumerate(lengths)))
    untaught = (*settings, "distill.weight=0")
    asked = ("--teacher", str(teacher), *averages_of(recipe, settings), "--recipe", student, "--views", str(VIEWS))
    return [
        Stage("train teacher", train_of(out, teacher, recipe, longer), teacher / "config.json"),
        Stage("zeroshot of teacher", zeroshot_of(teacher, recipe, longer), teacher / "results.jsonl"),
        Stage("train half", train_of(out, alone, student, untaught), alone / "config.json"),
        Stage("zeroshot of half", zeroshot_of(alone, student, untaught), alone / "results.jsonl"),
        Stage("reinforce", ("reinforce", str(data), *asked, "--out", str(stored)), stored / "reinforced.json"),
        Stage(
            "train half-taught",
            train_of(out, taught, student, settings, ("--reinforced", str(stored))),
            taught / "config.json",
        ),
        Stage("zeroshot of half-taught", zeroshot_of(taught, student, settings), taught / "results.jsonl"),
        Stage("report of all", ("report", str(run), str(taught), str(alone), str(teacher), "--out", str(page)), page),
    ]


def train_of(
    out: Path, run: Path, recipe: str, settings: Sequence[str], options: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """The training of a recipe, which goes on where it was stopped."""
    assignments = [word for setting in settings for word in ("--set", setting)]
    given = ("--data", str(out / "data"), "--recipe", recipe, *assignments, *options)
    return ("train", *given, "--out", str(run), "--resume")


def zeroshot_of(run: Path, recipe: str, settings: Sequence[str]) -> tuple[str, ...]:
    """The measurement of a run on the held-out style."""
    heldout = str(emoji_parquet("heldout"))
    averages = averages_of(recipe, settings)
    return ("zeroshot", "--ckpt", str(run), "--data", heldout, "--templates", TEMPLATES, *averages)


def averages_of(recipe: str, settings: Sequence[str]) -> tuple[str, ...]:
    """The option that takes the averages of the weights, where the recipe makes them."""
    return ("--ema",) if set_values(find_recipe(recipe), settings).ema_decay else ()


# ---------------------------------------------------------------------------------------------------------------------
# The server
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def serve_pictures(out: Path, limit: int | None) -> Iterator[None]:
    """Serve the training pairs on loopback, with 3% broken, and write their URL table into `out` when it isn't there.

    The port is part of the table's URLs, and a download goes on only with the same table. So a second run takes the
    port of the first; where another program has it by now, the download starts again.
    """
    import pyarrow.parquet as pq

    from clipkit.cli import demo_server

    pairs = pq.read_table(emoji_parquet("train")).slice(0, limit)
    table = out / "urls.parquet"
    site = demo_server.emoji_site(pairs, demo_server.faulty_rows(len(pairs), FAULTY_SHARE, SEED))
    with contextlib.ExitStack() as stack:
        if table.exists():
            urls = pq.read_table(table, columns=["URL"])["URL"].to_pylist()
            if len(urls) != len(pairs):
                raise UserError(f"{out} holds a demo of {len(urls):,} pairs, not {len(pairs):,}: choose another --out")
            port = urlsplit(urls[0]).port or 0
            try:
                stack.enter_context(demo_server.serve(site, port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                print(f"(port {port} of the last run is taken: the download starts again)", flush=True)
                remove(out / "shards")
                remove(table)
        if not table.exists():
            base_url = stack.enter_context(demo_server.serve(site))
            demo_server.write_url_table(table, base_url, pairs)
        yield


# ---------------------------------------------------------------------------------------------------------------------
# A command in a process of its own
# ---------------------------------------------------------------------------------------------------------------------

# A demo killed by SIGKILL can't stop its child, which would go on beside the next demo's. Linux ends the child for us:
# PR_SET_PDEATHSIG (1) outlives exec, and is set here rather than between fork and exec, where threads make it unsafe.
END_WITH_PARENT = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):
        sys.exit(1)
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


def run_stage(stage: Stage) -> Cost:
    """Run a stage's command to its end. Raises UserError or InternalError, as its exit code says, when it fails."""
    started = time.monotonic()
    code, peak_memory_bytes = run_child(["-m", "clipkit", *stage.arguments])
    if code != 0:
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        message = f"the demo's {stage.name} {how}: fix what it says above, and run the demo again to go on from there"
        raise InternalError(message) if code == 1 else UserError(message)
    return Cost(stage.name, stage.command, round(time.monotonic() - started, 1), peak_memory_bytes)


def run_child(arguments: Sequence[str]) -> tuple[int, int]:
    """Run Python with `arguments`; return its exit code and the peak memory in bytes of its largest process.

    The child ends with this process. The server of the pictures is on loopback, so no proxy may be asked.
    """
    sys.stdout.flush()
    # `python -m` would look for modules in the current folder first, which `clipkit` doesn't: a user's own timm/ say.
    environment = {**os.environ, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "PYTHONSAFEPATH": "1"}
    child = subprocess.Popen([sys.executable, "-c", END_WITH_PARENT, str(os.getpid()), *arguments], env=environment)
    try:
        _, status, usage = os.wait4(child.pid, 0)
    except KeyboardInterrupt:
        # The terminal has interrupted the child too; training saves a checkpoint before it goes.
        _, status, _ = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        raise
    child.returncode = os.waitstatus_to_exitcode(status)
    return child.returncode, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---------------------------------------------------------------------------------------------------------------------
# The account
# ---------------------------------------------------------------------------------------------------------------------


def write_costs(path: Path, costs: dict[str, Cost]) -> None:
    """Save what the stages took, for the next demo and for the report."""
    write_json(path, {"stages": [asdict(cost) for cost in costs.values()]})


def read_costs(path: Path) -> list[Cost]:
    """What an earlier demo's stages took; [] when there was none."""
    return [Cost(**stage) for stage in read_json(path)["stages"]] if path.exists() else []


def summary_text(out: Path, costs: Sequence[Cost]) -> str:
    """The text at the end: numbers, costs, where the reports are, and how to go on."""
    run, page = out / "run", out / "side-by-side.html"
    lines = ["Zero-shot, on drawings in a style that training never saw:", *result_lines(run)]
    students = any(page.name in cost.command for cost in costs)
    if students:
        lines += ["With half of the samples and a teacher:", *result_lines(out / "half-taught")]
        lines += ["With half of the samples, without a teacher:", *result_lines(out / "half")]
        lines += [f"The teacher, with {TEACHER_LENGTH} times the samples:", *result_lines(out / "teacher")]
    lines.append("What it took:")
    lines += [f"  {c.name:46}{duration(c.seconds):>6}   {c.peak_memory_bytes / 1e9:.1f} GB" for c in costs]
    total = sum(cost.seconds for cost in costs)
    lines += [
        f"  {'all':46}{duration(total):>6}   {max(cost.peak_memory_bytes for cost in costs) / 1e9:.1f} GB at the most",
        f"The report: {run / 'report.html'}",
        *([f"The four runs side by side: {page}"] if students else []),
        "Now your own data, for example LAION-400M's parquet files in the folder laion:",
        "  clipkit download laion data --preset laion400m --probe 500",
        "  clipkit train --data data --recipe clipa-b16-i50-t16 --out runs/b16",
        "  clipkit zeroshot --ckpt runs/b16 --data IMAGENET",
    ]
    return "\n".join(lines)


def result_lines(run: Path) -> list[str]:
    """A line for each number of a run."""
    from clipkit.eval.results import chance_shown, read_results

    lines = []
    newest = {(result.task, result.metric): result for result in read_results(run)}
    for (task, metric), result in newest.items():
        interval = f"{result.low:.1%} to {result.high:.1%}"
        chance = f"; chance {guessing}" if (guessing := chance_shown(result)) else ""
        lines.append(f"  {f'{task} {metric}':46}{result.value:6.1%}   (95%: {interval}{chance})")
    return lines
