"""Runs in clip_benchmark's own environment: what it finds for a list of jobs. It imports nothing of clipkit.

    python clip_benchmark_side.py JOBS.json FOUND.json

A job of kind `classification` or `retrieval` names a `model` (its JSON configuration and weights in OpenCLIP's names,
beside each other), a `dataset` as clip_benchmark calls it, and its `root`; one of kind `metrics` holds predictions.
"""

import json
import sys
from pathlib import Path
from typing import Any

import open_clip
import torch
from clip_benchmark.datasets.builder import build_dataset
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from clip_benchmark.models.open_clip import load_open_clip
from sklearn.metrics import balanced_accuracy_score, f1_score


def metrics(job: dict[str, Any]) -> dict[str, Any]:
    """DataComp's metrics by scikit-learn, as WILDS defines them, on predictions."""
    scores, label, group = torch.tensor(job["scores"]), torch.tensor(job["label"]), torch.tensor(job["group"])
    top1, top5 = zeroshot_classification.accuracy(scores, label, (1, 5))
    guess = scores.argmax(1)
    by_group = [
        zeroshot_classification.accuracy(scores[group == each], label[group == each], (1, 5)) for each in group.unique()
    ]
    precision = zeroshot_classification.average_precision_per_class(scores, torch.tensor(job["truth"]))
    return {
        "top1": top1,
        "top5": top5,
        "mean_per_class_recall": balanced_accuracy_score(label, guess),
        "macro_f1": f1_score(label, guess, average="macro", labels=label.unique()),
        "worst_group_top1": min(one for one, _ in by_group),
        "worst_group_top5": min(five for _, five in by_group),
        "mean_average_precision": precision.mean().item(),
    }


def run(job: dict[str, Any]) -> dict[str, Any]:
    if job["kind"] == "metrics":
        return metrics(job)
    path = Path(job["model"])
    open_clip.add_model_config(path)
    model, transform, tokenizer = load_open_clip(path.stem, str(path.with_suffix(".safetensors")))
    model.eval()
    how = {"transform": transform, "split": "test", "download": False, "task": f"zeroshot_{job['kind']}"}
    dataset = build_dataset(job["dataset"], root=job["root"], **how)
    if job["dataset"].startswith("wds/"):
        loader = torch.utils.data.DataLoader(dataset.batched(64), batch_size=None)
    else:
        loader = torch.utils.data.DataLoader(dataset, batch_size=64)
    if job["kind"] == "retrieval":
        return zeroshot_retrieval.evaluate(model, loader, tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10])
    logits: list[torch.Tensor] = []
    original = zeroshot_classification.run_classification

    def keep(*args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        found = original(*args, **options)
        logits.append(found[0])
        return found

    zeroshot_classification.run_classification = keep
    found = zeroshot_classification.evaluate(
        model, loader, tokenizer, dataset.classes, dataset.templates, "cpu", amp=False
    )
    zeroshot_classification.run_classification = original
    return found | {"classes": dataset.classes, "logits": logits[0].tolist()}


if __name__ == "__main__":
    jobs, found = map(Path, sys.argv[1:])
    found.write_text(json.dumps([run(job) for job in json.loads(jobs.read_text())]))
