"""The page that tells a run's whole story: one HTML file that needs no network and no other file."""

import base64
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipkit.errors import UserError
from clipkit.eval import results
from clipkit.eval.report import run_data
from clipkit.eval.report.run_data import DataFacts, StageCost
from clipkit.eval.results import METRICS, RANKS, Result, counted_on, metric_title, shown, verdict
from clipkit.formatting import share
from clipkit.page.charts import Band, Line, histogram, interval_strip, line_chart
from clipkit.page.render import render
from clipkit.storage.files import require_dir, write_beside

SEED = 0
TILES = 12
MORE_RIGHT = 6
CURVES = (
    # metric, axis name with unit, is a share, begins at zero
    ("loss", "loss (nats)", False, False),
    ("accuracy_image_to_text", "accuracy in the batch, image to text (%)", True, True),
    ("lr", "learning rate", False, True),
    ("logit_scale", "logit scale (1 / temperature)", False, True),
    ("grad_norm", "gradient norm before clipping", False, True),
    ("samples_per_s", "speed (samples/s)", False, True),
    ("mfu", "MFU (% of the bfloat16 peak)", True, True),
    ("data_wait", "time spent waiting for data (%)", True, True),
)


def report(run: Path) -> Path:
    """Write `report.html` into a run's folder and return its path. What the run doesn't have yet, the page says.

    Raises UserError when `run` isn't a run's folder, and when jinja2 (extra `report`) isn't installed.
    """
    require_dir(run, "run")
    known = ("config.json", "metrics.jsonl", "results.jsonl", "checkpoints")
    if not any((run / name).exists() for name in known):
        raise UserError(f"{run} isn't a run: give the folder that clipkit train wrote (--out)")
    page = render("clipkit.eval.report", "report.html.j2", contents(run))
    path = run / "report.html"
    with write_beside(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def contents(run: Path) -> dict[str, Any]:
    """Everything the template shows."""
    config = run_data.read_config(run)
    metrics = run_data.read_metrics(run)
    found = results.read_results(run)
    stages = run_data.stage_costs(config, metrics)
    seen = int(metrics[-1]["samples_seen"]) if metrics else 0
    data = run_data.training_data(config, run)
    latest = newest(found)
    return {
        "run": run.resolve().name,
        "config": config,
        "recipe": (config.get("recipe") or {}).get("name", ""),
        "parameters": run_data.parameters(config),
        "metrics": metrics,
        "seen": seen,
        "planned": sum(stage.samples for stage in stages),
        "seconds": run_data.clock(metrics, seen),
        "tasks": [result for result in latest if result.metric == "top1"],
        "results": latest,
        "older": [result for result in found if result not in latest],
        "rows": rows(latest),
        "stages": stages,
        "costs": costs(stages, metrics),
        "pipeline": [stage for stage in run_data.pipeline(run) if stage["name"] != "report"],
        "curves": curves(metrics, stages),
        "over_training": over_training(metrics, stages, found),
        "walls": walls(run),
        "data": data,
        "data_charts": [data_charts(part.facts, stages) if part.facts else [] for part in data],
        "data_names": " and ".join(part.name for part in data) or (config.get("dataset") or {}).get("name", ""),
        "records": sum(part.records for part in data) or (config.get("dataset") or {}).get("records", 0),
        "seed": SEED,
    }


def newest(found: Sequence[Result]) -> list[Result]:
    """Each task's results at its latest checkpoint; tasks with the most classes first."""
    last: dict[str, int] = {}
    for result in found:
        last[result.task] = max(result.samples_seen, last.get(result.task, 0))
    latest = [result for result in found if result.samples_seen == last[result.task]]
    return sorted(latest, key=lambda result: (-result.classes, result.task))


def rows(latest: Sequence[Result]) -> list[dict[str, Any]]:
    """The results table: each number with its words and its picture on a scale that the task's numbers share."""
    listed: list[dict[str, Any]] = []
    for result in latest:
        same = [other for other in latest if other.task == result.task]
        top = max([other.high for other in same if other.metric not in RANKS] + [result.chance]) * 1.05
        bounds = result.value, result.low, result.high, result.chance
        strip = "" if result.metric in RANKS else interval_strip(*bounds, min(1.0, top))
        about = {"metric": metric_title(result.metric), "note": verdict(result), "counted": counted_on(same)}
        words = zip(("value", "low", "high", "chance"), bounds, strict=True)
        numbers = {name: shown(result.metric, value) for name, value in words}
        listed.append({"task": result.task, "order": len(listed), "result": result, "strip": strip, **about, **numbers})
    return listed


def bands(stages: Sequence[StageCost]) -> list[Band]:
    """The stages as far as they have come."""
    return [Band(stage.name, stage.start, stage.start + stage.done) for stage in stages if stage.done]


def curves(metrics: Sequence[Mapping[str, Any]], stages: Sequence[StageCost]) -> list[str]:
    """The training curves that the run has logged."""
    drawn = []
    for name, title, is_share, from_zero in CURVES:
        xs, ys = run_data.series(metrics, name)
        if xs:
            lines = [Line(name, xs, ys)]
            drawn.append(line_chart(title, lines, bands=bands(stages), is_share=is_share, from_zero=from_zero))
    return drawn


def over_training(
    metrics: Sequence[Mapping[str, Any]], stages: Sequence[StageCost], found: Sequence[Result]
) -> list[str]:
    """Zero-shot accuracy over samples seen, a chart a task: from the evaluations during training and the results."""
    points: dict[str, dict[str, dict[float, float]]] = {}
    for task, names in run_data.evaluations(metrics).items():
        for name in names:
            points.setdefault(task, {}).setdefault(name.rpartition("/")[2], {}).update(
                zip(*run_data.series(metrics, name), strict=True)
            )
    for result in found:
        points.setdefault(result.task, {}).setdefault(result.metric, {})[float(result.samples_seen)] = result.value
    chance = {result.task: result.chance for result in found if result.metric == "top1"}
    drawn = []
    for task, by_metric in points.items():
        lines = []
        for metric, colour in (("top1", "a"), ("top5", "b")):
            if metric in by_metric:
                xs, ys = zip(*sorted(by_metric[metric].items()), strict=True)
                lines.append(Line(METRICS[metric], list(xs), list(ys), colour))
        # One point isn't a curve: the table has it.
        if not lines or len(lines[0].xs) < 2:
            continue
        if task in chance:
            ends = [lines[0].xs[0], lines[0].xs[-1]]
            lines.append(Line("chance of top-1", ends, [chance[task]] * 2, "dashed"))
        drawn.append(line_chart(f"{task} (%)", lines, bands=bands(stages), is_share=True, from_zero=True))
    return drawn


def walls(run: Path) -> list[dict[str, Any]]:
    """A wall of pictures for each file of predictions: some taken at random, then some more that were right."""
    listed = []
    for path in sorted(run.glob("predictions-*.parquet")):
        rows, about = results.read_predictions(path)
        if about.get("kind", "classification") != "classification":
            continue
        readable = [row for row in rows if row["guesses"]]
        pictured = [row for row in readable if row["image"]]
        rng = random.Random(SEED)
        blind = rng.sample(pictured, min(TILES, len(pictured)))
        right = [row for row in pictured if row["correct"] and row not in blind]
        more = rng.sample(right, min(MORE_RIGHT, len(right)))
        listed.append(
            {
                "task": about.get("task", path.stem.removeprefix("predictions-")),
                "about": about,
                "blind": [tile(row) for row in blind],
                "right": [tile(row) for row in more],
                "blind_right": sum(row["correct"] for row in blind),
                "n": len(readable),
                "classes": about.get("classes") or len({row["label"] for row in rows}),
                "confused": confused(readable),
                "problems": [row for row in rows if row["problem"]][:5],
                "unreadable": sum(bool(row["problem"]) for row in rows),
            }
        )
    return sorted(listed, key=lambda wall: -wall["classes"])


def tile(row: Mapping[str, Any]) -> dict[str, Any]:
    """One picture with its guesses for the wall."""
    picture = base64.b64encode(row["image"]).decode()
    guesses = list(zip(row["guesses"], row["probabilities"], strict=True))
    return {**row, "image": f"data:image/webp;base64,{picture}", "guesses": guesses}


def confused(readable: Sequence[Mapping[str, Any]], most: int = 10) -> list[tuple[str, str, int, int]]:
    """Which class is taken for which most often: (label, guess, times, images with this label).

    Where each class has an image or two, no pair can repeat; then there is nothing to list.
    """
    images = Counter(row["label"] for row in readable)
    pairs = Counter((row["label"], row["guesses"][0]) for row in readable if row["guesses"][0] != row["label"])
    repeated = sorted((-times, *pair) for pair, times in pairs.items() if times > 1)
    return [(label, guess, -times, images[label]) for times, label, guess in repeated[:most]]


def data_charts(facts: DataFacts, stages: Sequence[StageCost]) -> list[str]:
    """Histograms of caption lengths, with what each stage cuts, and of image sizes."""
    charts = []
    if facts.lengths:
        cuts = sorted({stage.context_length for stage in stages})
        top = max(min(max(facts.lengths), 77), *cuts, 8) + 1
        lengths = [min(length, top - 1) for length in facts.lengths]
        step = 1 if top <= 50 else 2
        edges = list(range(2, top + step, step))
        counts, _ = np.histogram(lengths, bins=edges)
        marks = []
        for context in cuts:
            longer = sum(length > context for length in facts.lengths) / len(facts.lengths)
            marks.append((float(context + 1), f"{share(longer)} longer than {context}"))
        title = "captions by length (% of captions)"
        charts.append(
            histogram(title, counts.tolist(), edges, x_name="text tokens, start and end included", marks=marks)
        )
    if facts.sides and len(set(facts.sides)) > 1:
        sizes, borders = np.histogram(facts.sides, bins=min(24, len(set(facts.sides))))
        title = "images by size (% of images)"
        charts.append(histogram(title, sizes.tolist(), borders.tolist(), x_name="shorter side, pixels"))
    return charts


def costs(stages: Sequence[StageCost], metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Time, tokens and operations of all stages together."""
    memory = [line["peak_memory"] for line in metrics if isinstance(line.get("peak_memory"), int | float)]
    seconds = sum(stage.seconds for stage in stages)
    flops = sum(stage.total_flops for stage in stages)
    return {
        "stages": stages,
        "seconds": seconds,
        "samples": sum(stage.done for stage in stages),
        "image_tokens": sum(stage.image_tokens * stage.done for stage in stages),
        "text_tokens": sum(stage.text_tokens * stage.done for stage in stages),
        "flops": flops,
        "rate": flops / seconds if seconds else 0.0,
        "peak_memory": max(memory, default=0),
        "bad_samples": max((int(line.get("bad_samples", 0)) for line in metrics), default=0),
        "wait": run_data.waiting(metrics),
    }
