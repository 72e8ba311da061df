"""Parity with clip_benchmark 1.6.2, really run: the same models, data and templates give equal counts in float32.

`make test` builds its environment (it needs NumPy 2.2) and names its Python in CLIPKIT_CLIP_BENCHMARK_PYTHON. All
comparisons are jobs of one process.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import torch
from labelled_sources import tar_of
from natural_images import encoded, natural
from openclip_twin import load_openclip
from PIL import Image
from safetensors.torch import save_file

from clipkit import embedded
from clipkit.device import pick
from clipkit.embedding.encoder import Compute, Encoder, clip_encoder
from clipkit.eval.classification.imagenet import class_ids
from clipkit.eval.classification.task import classify, open_task
from clipkit.eval.metrics import (
    calibration_error,
    measure,
    measure_macro_f1,
    measure_several,
    measure_worst_group,
)
from clipkit.eval.retrieval.task import open_retrieval
from clipkit.model.config import ImageConfig, ModelConfig, TextConfig
from clipkit.pixels.images import Preprocess, decode, eval_transform
from clipkit.text.tokenizer import Tokenizer

SIDE = Path(__file__).parents[1] / "support" / "clip_benchmark_side.py"
SIZE = 48
WORDS = 24  # of 77 in CLIP: a third of the work on 32,000 prompts
OURS = ModelConfig(
    embed_dim=64,
    image=ImageConfig("vit_tiny_patch16_224", image_size=SIZE, patch_size=8, width=64, depth=2, heads=2),
    text=TextConfig(context_length=WORDS, width=64, depth=2, heads=2),
)
THEIRS = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": SIZE, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32},
    "text_cfg": {"context_length": WORDS, "vocab_size": 49408, "width": 64, "layers": 2, "heads": 2},
}
TEMPLATES = ["a picture of {c}.", "{c}", "an icon of {c}, small"]


# Generated: 300 images of 12 classes, of which one doesn't occur, in three groups.
RANDOM = np.random.default_rng(0)
PREDICTIONS = {
    "kind": "metrics",
    "scores": RANDOM.normal(size=(300, 12)).round(6).tolist(),
    "label": (RANDOM.integers(0, 11, 300) % RANDOM.integers(2, 12, 300)).tolist(),
    "group": RANDOM.integers(0, 3, 300).tolist(),
    "truth": (RANDOM.random((300, 12)) < 0.2).astype(int).tolist(),
}


def pixels_of(row: dict[str, Any]) -> Image.Image:
    return Image.fromarray(decode(row["image"]))


def heldout() -> list[dict[str, Any]]:
    """400 of the demo's held-out pictures."""
    rows: list[dict[str, Any]] = pq.read_table(embedded.emoji_parquet("heldout")).slice(0, 400).to_pylist()
    return rows


@torch.no_grad()
def trained() -> open_clip.CLIP:
    """A model whose image projection is fitted to those very pictures, so that it is right far above chance."""
    torch.manual_seed(0)
    model, tokenizer, rows = open_clip.CLIP(**THEIRS).eval(), Tokenizer(), heldout()
    groups = sorted({row["group"] for row in rows})

    def embed(names: list[str]) -> torch.Tensor:
        ids_BT = tokenizer.rows(tokenizer.encode([f"a picture of {name}" for name in names]), WORDS)
        text_BE = model.encode_text(torch.from_numpy(ids_BT).long(), normalize=True)
        return text_BE - text_BE.mean(0)

    pixels_NHWC = np.stack([eval_transform(np.asarray(pixels_of(row)), SIZE) for row in rows])
    model.visual.proj.copy_(torch.eye(64))
    feature_NE = model.encode_image(torch.from_numpy(pixels_NHWC).permute(0, 3, 1, 2).float() / 64 - 2)
    of_group_NE = embed([f"{group}." for group in groups])[[groups.index(row["group"]) for row in rows]]
    wanted_NE = 2 * of_group_NE + embed([row["label"] for row in rows])
    model.visual.proj.copy_(torch.linalg.lstsq(feature_NE, wanted_NE).solution)
    return model


def shard(rows: list[dict[str, Any]], groups: list[str], first: int) -> bytes:
    """Pictures of odd sizes, most of them JPEGs with halved colours, some JPEGs in full, PNGs and WebPs."""
    kinds = [("jpg", "JPEG", {"quality": 85}), ("jpg", "JPEG", {"quality": 90, "subsampling": 0})]
    kinds = [*kinds[:1] * 5, kinds[1], ("png", "PNG", {}), ("webp", "WEBP", {"quality": 80})]
    files = {}
    for number, row in enumerate(rows, first):
        suffix, kind, options = kinds[number % len(kinds)]
        picture = pixels_of(row).resize((61 + number % 90, 53 + number % 71))
        files[f"s{number:05d}.{suffix}"] = encoded(picture, kind, **options)
        files[f"s{number:05d}.cls"] = str(groups.index(row["group"])).encode()
    return tar_of(files)


@pytest.fixture(scope="module")
def webdataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 of the held-out pictures in ten classes."""
    root = tmp_path_factory.mktemp("webdataset")
    rows = heldout()
    groups = sorted({row["group"] for row in rows})
    (root / "test").mkdir()
    for number in range(2):
        (root / "test" / f"{number}.tar").write_bytes(shard(rows[number * 200 :][:200], groups, number * 200))
    (root / "test" / "nshards.txt").write_text("2")
    (root / "classnames.txt").write_text("\n".join(groups))
    (root / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES))
    return root


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pictures with one to five captions each."""
    root = tmp_path_factory.mktemp("captioned")
    files = {}
    for number, row in enumerate(heldout()):
        label = row["label"]
        captions = [f"a picture of {label}", label, f"{row['group']} {number}", f"an icon, {label}", f"small {label}"]
        picture = pixels_of(row).resize((61 + number % 90, 53 + number % 71))
        files[f"s{number:05d}.jpg"] = encoded(picture, quality=85)
        files[f"s{number:05d}.txt"] = "\n".join(captions[: 1 + number % 5]).encode()
    (root / "test").mkdir()
    (root / "test" / "0.tar").write_bytes(tar_of(files))
    (root / "test" / "nshards.txt").write_text("1")
    (root / "dataset_type.txt").write_text("retrieval")
    return root


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ImageNet-A in small: a noisy JPEG for each of its 200 classes."""
    root = tmp_path_factory.mktemp("folders") / "imagenet-a"
    for number, wnid in enumerate(class_ids("imagenet-a")):
        (root / wnid).mkdir(parents=True)
        picture = natural(60 + number % 37, 55 + number * 7 % 60, seed=number)
        (root / wnid / "0.jpg").write_bytes(encoded(picture, quality=85))
    return root


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Encoder]]:
    """A random and a trained model: for clip_benchmark its configuration and weights, and for us."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(1)
    found = {}
    for name, model in (("random", open_clip.CLIP(**THEIRS)), ("trained", trained())):
        state = model.state_dict()
        (folder / f"{name}.json").write_text(json.dumps(THEIRS))
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / f"{name}.safetensors")
        ours = load_openclip(OURS, state)
        encoder = clip_encoder(ours, Tokenizer(), Preprocess(size=SIZE), precision="float32", name=name)
        found[name] = folder / f"{name}.json", encoder
    return found


@pytest.fixture(scope="module")
def peers(
    webdataset: Path,
    captioned: Path,
    folders: Path,
    encoders: dict[str, tuple[Path, Encoder]],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[tuple[str, str], dict[str, Any]]:
    """What clip_benchmark finds, by model and data."""
    python = os.environ.get("CLIPKIT_CLIP_BENCHMARK_PYTHON", "")
    assert Path(python).is_file(), "CLIPKIT_CLIP_BENCHMARK_PYTHON must name clip_benchmark's Python: run `make test`"
    folder = tmp_path_factory.mktemp("peers")
    jobs = {
        (name, kind): {"kind": "classification", "model": str(path), "dataset": dataset, "root": str(root)}
        for name, (path, _) in encoders.items()
        for kind, dataset, root in (("webdataset", "wds/emoji", webdataset), ("folders", "imagenet-a", folders))
    }
    jobs |= {
        (name, "retrieval"): {
            "kind": "retrieval",
            "model": str(path),
            "dataset": "wds/captions",
            "root": str(captioned),
        }
        for name, (path, _) in encoders.items()
    }
    jobs["", "metrics"] = PREDICTIONS
    (folder / "jobs.json").write_text(json.dumps(list(jobs.values())))
    done = subprocess.run([python, SIDE, folder / "jobs.json", folder / "found.json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(jobs, json.loads((folder / "found.json").read_text()), strict=True))


# What is compared, by data and model: docs/evaluation.md lists exactly these.
MODELS = ("random", "trained")
COUNTED = {
    "webdataset": (400, "top-1, top-5, mean per-class recall, the five best guesses in their order"),
    "folders": (200, "top-1, top-5, mean per-class recall, the five best guesses in their order"),
}
QUERIES = {"text": 400, "image": 1200}


def test_the_docs_list_what_is_compared() -> None:
    rows = [
        f"| {kind} | {name} | {n} images | {numbers} | 0 |" for kind, (n, numbers) in COUNTED.items() for name in MODELS
    ]
    queries = f"{QUERIES['text']} images, {QUERIES['image']:,} captions"
    rows += [f"| captions | {name} | {queries} | recall@1, @5, @10 both ways | 0 |" for name in MODELS]
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert "\n".join(rows) in page


@pytest.mark.parametrize("kind", COUNTED)
@pytest.mark.parametrize("name", MODELS)
def test_counts_equal_clip_benchmarks(name, kind, webdataset, folders, encoders, peers) -> None:
    theirs = peers[name, kind]
    task = open_task({"webdataset": webdataset, "folders": folders}[kind])
    encoder = encoders[name][1]
    guesses = classify(encoder, task, Compute(pick("cpu")))
    labels_N = task.labels_N[guesses.index_N]
    mine = {each.metric: each for each in measure(guesses.top_NK, labels_N, len(task.classes))}
    n = mine["top1"].n
    assert n == len(theirs["logits"]) == COUNTED[kind][0]
    assert [names[0] for names in task.classes.names] == theirs["classes"]
    for ours, key in (("top1", "acc1"), ("top5", "acc5")):
        assert round(mine[ours].value * n) == round(theirs[key] * n)
    assert mine["mean_per_class_recall"].value == pytest.approx(theirs["mean_per_class_recall"])
    assert (guesses.top_NK == np.argsort(-np.array(theirs["logits"]), axis=1, kind="stable")[:, :5]).all()
    if (name, kind) == ("trained", "webdataset"):
        assert theirs["acc1"] > 0.25  # of ten classes


@pytest.mark.parametrize("name", MODELS)
def test_recall_equals_clip_benchmarks(name, captioned, encoders, peers) -> None:
    theirs = peers[name, "retrieval"]
    found = {
        each.metric: each
        for each in open_retrieval(captioned).measure(encoders[name][1], Compute(pick("cpu"))).measures
    }
    assert set(theirs) == {f"{way}_retrieval_recall@{k}" for way in ("text", "image") for k in (1, 5, 10)}
    for metric, value in theirs.items():
        n = QUERIES[metric.partition("_")[0]]
        assert found[metric].n == n
        assert round(found[metric].value * n) == round(value * n), metric
    assert name == "random" or theirs["text_retrieval_recall@10"] > 0.05


def test_datacomps_metrics_on_generated_predictions(peers) -> None:
    theirs = peers["", "metrics"]
    score_NC = np.array(PREDICTIONS["scores"], dtype=np.float32)
    label_N, group_N = np.array(PREDICTIONS["label"]), np.array(PREDICTIONS["group"])
    top_NK = np.argsort(-score_NC, axis=1)[:, :5]
    found = [
        *measure(top_NK, label_N, 12),
        measure_macro_f1(top_NK[:, 0], label_N, 12),
        measure_worst_group(top_NK, label_N, group_N, 1, 1 / 12),
        measure_worst_group(top_NK, label_N, group_N, 5, 5 / 12),
        *measure_several(score_NC, np.array(PREDICTIONS["truth"], dtype=bool)),
    ]
    assert {each.metric: each.value for each in found} == pytest.approx(theirs, abs=1e-6)
    assert all(each.low <= each.value <= each.high and each.low < each.high for each in found)


def test_the_calibration_error_by_hand() -> None:
    confidence_N = np.array([0.05, 0.0666, 0.95, 0.99, 0.5, 1.0])
    correct_N = np.array([True, False, True, False, True, True])
    assert calibration_error(confidence_N, correct_N) == pytest.approx(
        (abs(1 - 0.05 - 0.0666) + abs(2 - 0.95 - 0.99 - 1.0) + 0.5) / 6
    )
