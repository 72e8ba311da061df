"""The page that tells a run's whole story: one HTML file that needs no network and no other file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipkit.errors import UserError
from clipkit.eval import results
from clipkit.eval.report import run_data
from clipkit.eval.report.evaluations import blocks, is_own, over_training, rows
from clipkit.eval.report.guesses import task_sections
from clipkit.eval.report.run_data import DataFacts, StageCost
from clipkit.formatting import share
from clipkit.page import render
from clipkit.page.charts import Band, Line, histogram, line_chart
from clipkit.storage.files import require_dir

SEED = 0
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


def report(run: Path, out: Path | None = None) -> Path:
    """Write the page of a run, into its folder as `report.html` or to `out`, and return its path. What the run doesn't
    have yet, the page says.

    Raises UserError when `run` isn't a run's folder, and when jinja2 (extra `report`) isn't installed.
    """
    require_run(run)
    return write_page(out or run / "report.html", "report.html.j2", contents(run))


def require_run(run: Path) -> None:
    """Raises UserError when `run` isn't a run's folder."""
    require_dir(run, "run")
    known = ("config.json", "metrics.jsonl", "results.jsonl", "checkpoints")
    if not any((run / name).exists() for name in known):
        raise UserError(f"{run} isn't a run: give the folder that clipkit train wrote (--out)")


def write_page(path: Path, template: str, shown: Mapping[str, Any]) -> Path:
    """Write a page of this room's."""
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the page's file, such as --out {path / 'report.html'}")
    return render.write_page(path, "clipkit.eval.report", template, shown)


def contents(run: Path) -> dict[str, Any]:
    """Everything the template shows."""
    config = run_data.read_config(run)
    metrics = run_data.read_metrics(run)
    found = results.read_results(run)
    stages = run_data.stage_costs(config, metrics)
    seen, (begun, before) = int(metrics[-1]["samples_seen"]) if metrics else 0, run_data.beginning(config)
    data = run_data.training_data(config, run)
    return {
        "run": run.resolve().name,
        "config": config,
        "recipe": (config.get("recipe") or {}).get("name", ""),
        "parameters": run_data.parameters(config),
        "metrics": metrics,
        "seen": seen,
        "trained": seen - begun,
        "planned": sum(stage.samples for stage in stages),
        "seconds": run_data.clock(metrics, seen, before) - before,
        "blocks": [(block, rows(block)) for block in blocks(found)],
        "latest": max((result.samples_seen for result in found if is_own(result)), default=0),
        "hashes": list(dict.fromkeys(name for result in found for name in result.hashes)),
        "stages": stages,
        "costs": costs(config, metrics),
        "pipeline": [stage for stage in run_data.pipeline(run) if stage["name"] != "report"],
        "curves": curves(metrics, stages),
        "over_training": over_training(metrics, bands(stages), found),
        "sections": task_sections(run),
        "data": data,
        "data_charts": [data_charts(part.facts, stages) if part.facts else [] for part in data],
        "data_names": " and ".join(part.name for part in data) or (config.get("dataset") or {}).get("name", ""),
        "records": sum(part.records for part in data) or (config.get("dataset") or {}).get("records", 0),
        "seed": SEED,
    }


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


def costs(config: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Time, tokens and operations of all stages together."""
    stages = run_data.stage_costs(config, metrics)
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
        "wait": run_data.waiting(config, metrics),
    }
