"""The classifier and its accuracy equal OpenCLIP's; the three kinds of data agree; bad input gets its one line."""

import csv
import dataclasses
import io
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from open_clip.transform import image_transform
from PIL import Image

from clipkit import checkpoint, embedded
from clipkit.cli.main import main
from clipkit.device import pick
from clipkit.embedding.encoder import Compute, clip_encoder
from clipkit.errors import UserError
from clipkit.eval import results
from clipkit.eval.classification.labelled import open_labelled
from clipkit.eval.classification.labels import name_classes
from clipkit.eval.classification.prompts import (
    Classes,
    Prompts,
    class_embeddings,
    prompts,
    templates,
    tokenise_prompts,
)
from clipkit.eval.classification.task import Classification, classify, open_task
from clipkit.eval.evaluation import evaluate, zeroshot
from clipkit.eval.metrics import measure
from clipkit.formats.records import RecordWriter, encode_example
from clipkit.model.clip import CLIP, build
from clipkit.model.config import ImageConfig, ModelConfig, TextConfig
from clipkit.pixels.images import Preprocess
from clipkit.text.tokenizer import Tokenizer

SMALL = ModelConfig(
    embed_dim=32,
    image=ImageConfig("vit_tiny_patch16_224", image_size=32, patch_size=8, width=32, depth=2, heads=2),
    text=TextConfig(context_length=32, width=32, depth=2, heads=2),
)
PREPROCESS = Preprocess(size=32)
PAIRS = 120
CPU = Compute(pick("cpu"))


@pytest.fixture(scope="module")
def model() -> CLIP:
    return build(SMALL, seed=1).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer()


@pytest.fixture(scope="module")
def emoji(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real pictures in classes of unequal size: their groups, cut in two by the first letter."""
    rows = pq.read_table(embedded.emoji_parquet("heldout")).slice(0, PAIRS).to_pylist()
    columns = {
        "image": [row["image"] for row in rows],
        "label": [f"{row['group']} {'early' if row['label'] < 'c' else 'late'}" for row in rows],
        "number": [place % 7 for place in range(PAIRS)],
    }
    path = tmp_path_factory.mktemp("data") / "emoji.parquet"
    pq.write_table(pa.table(columns), path)
    return path


@pytest.fixture
def run(tmp_path: Path, model: CLIP) -> Path:
    @dataclasses.dataclass(frozen=True)
    class NoRecipe:
        name: str = "none"
        precision: str = "bfloat16"  # of the training: nothing is evaluated in it unasked

    config = checkpoint.describe(SMALL, PREPROCESS, NoRecipe())
    state = {"samples_seen": 64, "stage": "full", "seconds": 1.0, "bad_samples": 0}
    checkpoint.save(checkpoint.folder_of(tmp_path / "run", 64), tensors=model.state_dict(), config=config, state=state)
    return tmp_path / "run"


def write_parquet(path: Path, **columns: list[Any]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def png(colour: tuple[int, int, int] = (200, 30, 30)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 20), colour).save(buffer, "PNG")
    return buffer.getvalue()


def classifier_of(model: CLIP, prompts: Prompts) -> torch.Tensor:
    return class_embeddings(clip_encoder(model, Tokenizer(), PREPROCESS), prompts, CPU)


# ---- Parity with OpenCLIP ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["openai-80", "openai-7", "plain"])
def test_classifier_equals_open_clips(model: CLIP, tokenizer: Tokenizer, name: str) -> None:
    names = ["tench", "great white shark", "hot dog, in a bun", "Crème brûlée", "hot dog", "cat’s eye"]
    sentences = templates(name).sentences
    classes = Classes(tuple(names), tuple((each,) for each in names))
    mine_CE = classifier_of(model, tokenise_prompts(prompts(classes, sentences), tokenizer, 32))
    theirs_EC = open_clip.build_zero_shot_classifier(
        model, open_clip.SimpleTokenizer(context_length=32), names, list(sentences), num_classes_per_batch=4
    )
    assert mine_CE.shape == (6, 32)
    torch.testing.assert_close(mine_CE, theirs_EC.T, rtol=0, atol=1e-6)


def test_accuracy_equals_open_clips(model: CLIP, tokenizer: Tokenizer, emoji: Path) -> None:
    task = open_task(emoji, templates_name="openai-7")
    guesses = classify(clip_encoder(model, tokenizer, PREPROCESS), task, Compute(pick("cpu"), batch_size=32))
    measures = measure(guesses.top_NK, task.labels_N[guesses.index_N], len(task.classes))
    found = {measured.metric: measured for measured in measures}

    rows = pq.read_table(emoji).to_pylist()
    names = sorted({row["label"] for row in rows})
    transform = image_transform(32, is_train=False)
    image_BCHW = torch.stack([transform(Image.open(io.BytesIO(row["image"])).convert("RGB")) for row in rows])
    sentences = list(templates("openai-7").sentences)
    with torch.no_grad():
        classifier = open_clip.build_zero_shot_classifier(
            model, open_clip.SimpleTokenizer(context_length=32), names, sentences
        )
        logits = 100.0 * model.encode_image(image_BCHW) @ classifier
    target = torch.tensor([names.index(row["label"]) for row in rows])
    # As open_clip_train's `accuracy`, which itself fails under numpy 2.4.
    correct_NK = logits.topk(5, 1, True, True)[1].eq(target[:, None])
    top1, top5 = correct_NK[:, 0].sum().item(), correct_NK.sum().item()
    assert (found["top1"].value * PAIRS, found["top5"].value * PAIRS) == pytest.approx((top1, top5))
    assert 0 < top5 < PAIRS
    np.testing.assert_array_equal(guesses.top_NK, logits.topk(5)[1].numpy())
    probability_NK = (logits / 100.0 * model.clamped_logit_scale()).softmax(-1).topk(5)[0]
    np.testing.assert_allclose(guesses.probability_NK, probability_NK.detach().numpy(), atol=1e-5)


def test_trimmed_sorted_batches_change_nothing(model: CLIP, tokenizer: Tokenizer) -> None:
    texts = [["a", "an aardvark of the south " * 3], ["b b b b b", "a"], ["x " * 60]]
    found_CE = classifier_of(model, tokenise_prompts(texts, tokenizer, 32))
    with torch.no_grad():
        for number, each in enumerate(texts):
            whole_BE = model.encode_text(torch.from_numpy(tokenizer(each, 32)))
            expected_E = torch.nn.functional.normalize(whole_BE.mean(dim=0), dim=0)
            torch.testing.assert_close(found_CE[number], expected_E, rtol=0, atol=1e-6)


def test_prompts_are_shared_counted_and_sorted(tokenizer: Tokenizer) -> None:
    made = tokenise_prompts([["a b", "c"], ["c", "c", "d e f g h i"], ["a b"]], tokenizer, 6)
    assert made.texts.length_P.tolist() == [3, 4, 6]
    assert made.texts.cut == 1
    text_of = {0: "c", 1: "a b", 2: "long"}
    pairs = sorted((int(c), text_of[int(p)]) for p, c in zip(made.prompt_Q, made.class_Q, strict=True))
    assert pairs == [(0, "a b"), (0, "c"), (1, "c"), (1, "c"), (1, "long"), (2, "a b")]


def test_many_classes_in_many_templates_are_many_batches(
    model: CLIP, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = prompts(Classes(("a", "b"), (("ant", "small ant"), ("bee",))), templates("openai-80").sentences)
    made = tokenise_prompts(texts, tokenizer, 32)
    at_once_CE = classifier_of(model, made)
    monkeypatch.setattr("clipkit.embedding.vectors.TOKENS_PER_BATCH", 64)
    torch.testing.assert_close(classifier_of(model, made), at_once_CE, rtol=0, atol=1e-6)


# ---- The three kinds of data ---------------------------------------------------------------------------------------


def as_folder(emoji: Path, folder: Path) -> Path:
    for place, row in enumerate(pq.read_table(emoji).to_pylist()):
        path = folder / row["label"].replace("/", "-") / f"{place:04d}.webp"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(row["image"])
    return folder


def as_tfds(emoji: Path, folder: Path, *, class_label: bool) -> Path:
    """A dataset as TFDS writes it, with a ClassLabel or with labels as text, and no folder of clipkit's."""
    rows = pq.read_table(emoji).to_pylist()
    names = sorted({row["label"] for row in rows})
    folder = folder / "shapes" / "1.0.0"
    folder.mkdir(parents=True)
    with RecordWriter(folder / "shapes-validation.tfrecord-00000-of-00001") as writer:
        for row in rows:
            label = names.index(row["label"]) if class_label else row["label"]
            writer.write(encode_example({"image": row["image"], "label": label}))
    package = "tensorflow_datasets.core.features."
    image = {"pythonClassName": f"{package}image_feature.Image", "image": {"shape": {"dimensions": ["-1", "-1", "3"]}}}
    label_feature: dict[str, Any] = {"pythonClassName": f"{package}text_feature.Text", "text": {}}
    if class_label:
        label_feature = {
            "pythonClassName": f"{package}class_label_feature.ClassLabel",
            "classLabel": {"numClasses": str(len(names))},
        }
        (folder / "label.labels.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    features = {
        "pythonClassName": f"{package}features_dict.FeaturesDict",
        "featuresDict": {"features": {"image": image, "label": label_feature}},
    }
    split = {"name": "validation", "shardLengths": [str(len(rows))], "numBytes": "1"}
    split["filepathTemplate"] = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    info = {"name": "shapes", "version": "1.0.0", "fileFormat": "tfrecord", "splits": [split]}
    (folder / "features.json").write_text(json.dumps(features), encoding="utf-8")
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    return folder


@pytest.mark.parametrize("kind", ["folder", "tfds with classes", "tfds with texts"])
def test_all_kinds_of_data_give_one_number(
    model: CLIP, tokenizer: Tokenizer, emoji: Path, tmp_path: Path, kind: str
) -> None:
    if kind == "folder":
        data = as_folder(emoji, tmp_path / "shapes")
    else:
        data = as_tfds(emoji, tmp_path, class_label=kind == "tfds with classes")
    encoder = clip_encoder(model, tokenizer, PREPROCESS)
    found = [dict(evaluate(encoder, open_task(each, templates_name="plain", name="t"), CPU)) for each in (emoji, data)]
    assert found[0] == found[1]
    assert set(found[0]) == {"t/top1", "t/top5", "t/mean_per_class_recall", "t/calibration_error"}


def test_names_of_tasks_say_which_split_and_label(emoji: Path, tmp_path: Path) -> None:
    as_tfds(emoji, tmp_path / "tfds", class_label=True)
    as_folder(emoji, tmp_path / "net" / "val")
    (tmp_path / "net" / "train").mkdir()
    assert open_labelled(emoji).name == "emoji"
    assert open_labelled(emoji, label="number").name == "emoji-number"
    assert open_labelled(tmp_path / "tfds").name == "shapes-validation"
    assert open_labelled(tmp_path / "net").name == "net-val"


def test_classes_may_be_called_as_splits_are(tmp_path: Path) -> None:
    for name in ("exam", "test", "train"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(png())
    images = open_labelled(tmp_path)
    assert (images.name, images.label_names) == (tmp_path.name, ("exam", "test", "train"))


def test_wnids_get_imagenets_names(tmp_path: Path) -> None:
    for wnid in ("n01443537", "n01440764"):
        (tmp_path / wnid).mkdir()
        (tmp_path / wnid / "a.png").write_bytes(png())
    task = open_task(tmp_path, templates_name="plain")
    assert task.classes.titles == ("tench", "goldfish")


def test_folders_with_numbers_are_in_the_order_of_the_numbers(tmp_path: Path) -> None:
    for number in range(1000):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "a.png").write_bytes(b"")
    images = open_labelled(tmp_path)
    assert {key: int(label) for key, label in zip(images.keys, images.labels_N, strict=True)}["10/a.png"] == 10
    assert name_classes(images.label_names, tmp_path).names[10] == ("brambling",)
    assert open_task(tmp_path).notes == (
        f"{tmp_path}: labels 0 to 999 are taken for ImageNet-1K's classes in its order",
    )


def test_hugging_faces_image_cells(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", image=[{"bytes": png(), "path": None}] * 2, label=["x", "y"])
    assert list(open_labelled(path).read()) == [png(), png()]


def test_numbers_need_names(emoji: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"labels are numbers.*--classes"):
        open_task(emoji, label="number")
    names = tmp_path / "names.json"
    names.write_text(json.dumps(["one", "two", "three", "four", "five", "six", "seven"]), encoding="utf-8")
    task = open_task(emoji, label="number", classes=names)
    assert task.classes.titles[task.labels_N[3]] == "four"
    names.write_text(json.dumps(["one"]), encoding="utf-8")
    with pytest.raises(UserError, match=r"names 1 classes.*has 7"):
        open_task(emoji, label="number", classes=names)


def test_names_for_the_numbers_that_occur_are_enough(tmp_path: Path) -> None:
    data = write_parquet(tmp_path / "d.parquet", image=[png(), png()], label=[7, 2])
    (tmp_path / "names.json").write_text('{"2": "cat", "5": "cow", "7": "dog"}', encoding="utf-8")
    task = open_task(data, classes=tmp_path / "names.json")
    assert (task.classes.titles, task.labels_N.tolist()) == (("cat", "cow", "dog"), [2, 0])
    (tmp_path / "names.json").write_text('{"2": "cat", "5": "cow"}', encoding="utf-8")
    with pytest.raises(UserError, match="has no class '7', which occurs in"):
        open_task(data, classes=tmp_path / "names.json")


def test_a_class_of_many_names_is_their_mean(model: CLIP, tokenizer: Tokenizer, emoji: Path, tmp_path: Path) -> None:
    labels = sorted({str(label) for label in pq.read_table(emoji)["label"].to_pylist()})
    file = tmp_path / "classes.json"
    file.write_text(json.dumps({"distractor": "a"} | {each: ["ant", "bee"] for each in labels}), encoding="utf-8")
    task = open_task(emoji, templates_name="a {}", classes=file)
    # The file's order is the classes' order, and it may hold classes that don't occur.
    assert task.classes.labels == ("distractor", *labels)
    assert task.labels_N.min() == 1
    made_CE = classifier_of(model, task.prompts(tokenizer, 32))
    with torch.no_grad():
        mean_E = model.encode_text(torch.from_numpy(tokenizer(["a ant", "a bee"], 32))).mean(dim=0)
    torch.testing.assert_close(made_CE[1], torch.nn.functional.normalize(mean_E, dim=0), rtol=0, atol=1e-6)


# ---- While training ------------------------------------------------------------------------------------------------


def test_evaluation_in_training_keeps_what_is_costly(model: CLIP, tokenizer: Tokenizer, emoji: Path) -> None:
    task = open_task(emoji, templates_name="plain")
    reads = 0
    read = task.pictures.read

    def counted() -> Iterator[bytes]:
        nonlocal reads
        reads += 1
        return read()

    task.pictures.read = counted
    encoder, compute = clip_encoder(model, tokenizer, PREPROCESS), Compute(pick("cpu"), batch_size=50)
    model.train()
    first = dict(evaluate(encoder, task, compute))
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert dict(evaluate(encoder, task, compute)) == first
    assert reads == 1
    assert task.prompts(tokenizer, 32) is task.prompts(tokenizer, 32)
    # A stage with other sizes prepares them anew.
    larger = dataclasses.replace(SMALL, image=dataclasses.replace(SMALL.image, image_size=48))
    dict(evaluate(clip_encoder(build(larger), tokenizer, Preprocess(size=48)), task, CPU))
    assert reads == 2
    model.eval()


# ---- The command ---------------------------------------------------------------------------------------------------


def test_numbers_and_guesses_are_written_into_the_run(
    run: Path, emoji: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = zeroshot(run, open_task(emoji, templates_name="openai-7"), device="cpu")
    again = zeroshot(run / "checkpoints" / "000000000064", open_task(emoji, templates_name="openai-7"), device="cpu")
    assert again == results.read_results(run)
    assert [dataclasses.replace(each, model=again[0].model) for each in found] == again
    assert [each.metric for each in found] == ["top1", "top5", "mean_per_class_recall", "calibration_error"]
    assert {each.checkpoint for each in found} == {"checkpoints/000000000064"}
    assert {each.precision for each in found} == {"float32"}
    assert found[0].samples_seen == 64
    assert found[0].chance == pytest.approx(1 / found[0].classes)
    rows, about = results.read_predictions(run / "predictions-emoji.parquet")
    assert (about["task"], about["classes"]) == ("emoji", found[0].classes)
    assert len(rows) == PAIRS
    assert np.mean([row["correct"] for row in rows]) == pytest.approx(found[0].value)
    assert all(row["correct"] == (row["guesses"][0] == row["label"]) for row in rows)
    assert Image.open(io.BytesIO(rows[0]["image"])).format == "WEBP"
    counted = (run / "per-class-emoji.csv").read_text().splitlines()
    assert len(counted) == 1 + len({row["label"] for row in rows})
    assert "were cut" not in capsys.readouterr().err


def test_classes_of_one_name_are_counted_apart(run: Path, tmp_path: Path) -> None:
    """ImageNet has two missiles: one taken for the other is wrong in the guesses and in the table of classes, too."""
    for number, wnid in enumerate(("n03773504", "n04008634")):
        (tmp_path / "set" / wnid).mkdir(parents=True)
        for image in range(3):
            (tmp_path / "set" / wnid / f"{image}.png").write_bytes(png((40 * image, 90 * number, 0)))
    top1 = zeroshot(run, open_task(tmp_path / "set", templates_name="plain", name="t"), device="cpu")[0]
    rows, _ = results.read_predictions(run / "predictions-t.parquet")
    assert sum(row["guesses"][0] == row["label"] for row in rows) == round(top1.value * 6)
    with (run / "per-class-t.csv").open(newline="") as file:
        counted = list(csv.DictReader(file))
    assert {row["class"]: row["images"] for row in counted} == {"missile (class 0)": "3", "missile (class 1)": "3"}
    assert sum(int(row["right"]) for row in counted) == round(top1.value * 6)


def test_other_templates_are_another_result(run: Path, emoji: Path) -> None:
    first, second = (
        zeroshot(run, open_task(emoji, templates_name=name), device="cpu")[0] for name in ("plain", "a photo of a {}.")
    )
    assert len(results.read_results(run)) == 8
    assert {name for name in first.hashes if first.hashes[name] != second.hashes[name]} == {"templates"}


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_names_and_outputs_of_any_encoding(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    """Folders, files and classes that aren't UTF-8, on a terminal that can't show them: the number isn't lost."""
    data = Path(os.fsdecode(bytes(tmp_path) + "/中 caf".encode() + b"\xe9"))
    for name in (b"na\xefve/1.png", "größe/日\u0301.png".encode()):
        path = data / os.fsdecode(name)
        path.parent.mkdir(parents=True)
        path.write_bytes(png())
    command = ["zeroshot", "--ckpt", run, "--data", data, "--templates", "plain", "--device", "cpu"]
    for options in ([], ["--json"], ["--format", "md"]):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
        main([*map(str, command), *options], standalone_mode=False)
        sys.stdout.flush()
        shown = sys.stdout.buffer.getvalue().decode(encoding)
        if "--json" not in options:
            assert ("–" in shown) == (encoding == "utf-8")
            assert ("| top-1 |" if options else "top-1") in shown
        else:
            assert json.loads(shown.splitlines()[0])["task"] == r"中 caf\xe9"
    assert len(results.read_results(run)) == 3
    rows, _ = results.read_predictions(results.predictions_path(run, r"中 caf\xe9"))
    assert [row["key"] for row in rows] == ["größe/日\u0301.png", r"na\xefve/1.png"]
    assert [row["label"] for row in rows] == ["größe", r"na\xefve"]


@pytest.mark.parametrize("kind", ["folders", "parquet", "one name asked for"])
def test_two_sets_of_one_name_keep_their_numbers_and_guesses(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """ImageNet-C's layout: the same keys and labels, other images."""
    asked = "test" if kind == "one name asked for" else None
    for place, corruption in enumerate(("noise", "blur")):
        images = [png((40 * place + 9 * number, 0, 0)) for number in range(4)]
        data = tmp_path / corruption / "3"
        for number, image in enumerate(images):
            (data / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
            (data / "ab"[number % 2] / f"{number}.png").write_bytes(image)
        if kind == "parquet":
            data = write_parquet(tmp_path / corruption / "3.parquet", image=images, label=["a", "b"] * 2)
        zeroshot(run, open_task(data, templates_name="plain", name=asked), device="cpu")
    name = asked or "3"
    noise, blur = (each for each in results.read_results(run) if each.metric == "top1")
    assert (noise.task, blur.task) == (name, f"blur-{name}")
    assert {key for key in noise.hashes if noise.hashes[key] != blur.hashes[key]} == {"split"}
    assert f"has a task {name!r} of other images, so this one is 'blur-{name}'" in capsys.readouterr().err
    for each in (noise, blur):
        rows, about = results.read_predictions(results.predictions_path(run, each.task))
        assert about["data"] == each.data
        assert len(rows) == 4


def test_two_splits_of_one_name_are_both_kept(run: Path, tmp_path: Path) -> None:
    for place, split in enumerate(("train", "val")):
        for label in "ab":
            (tmp_path / "set" / split / label).mkdir(parents=True)
            (tmp_path / "set" / split / label / "1.png").write_bytes(png((place, 0, 0)))
        zeroshot(run, open_task(tmp_path / "set", templates_name="plain", split=split, name="t"), device="cpu")
    assert {each.task for each in results.read_results(run)} == {"t", "val-t"}
    assert len(list(run.glob("predictions-*"))) == 2


def test_the_hash_of_a_split_covers_each_byte(run: Path, tmp_path: Path) -> None:
    hashes = set()
    for place in range(3):
        image = bytearray(png())
        if place:
            image += bytes([0, place])  # behind the end mark: the same pixels
        data = write_parquet(tmp_path / "d.parquet", image=[bytes(image), png()], label=["a", "b"])
        hashes.add(zeroshot(run, open_task(data, templates_name="plain"), device="cpu")[0].hashes["split"])
    assert len(hashes) == 3


def test_outside_of_a_run_nothing_is_written(
    run: Path, emoji: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = (run / "checkpoints" / "000000000064").rename(tmp_path / "alone")
    assert zeroshot(alone, open_task(emoji, templates_name="plain"), device="cpu")
    assert "give --out to keep them" in capsys.readouterr().err
    assert not (tmp_path / "results.jsonl").exists()
    zeroshot(alone, open_task(emoji, templates_name="plain"), device="cpu", out=tmp_path / "kept")
    assert results.read_results(tmp_path / "kept")[0].checkpoint == str(alone)


def test_an_unwritable_run_is_found_out_before_the_work(
    run: Path, emoji: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clipkit.eval.classification.task.classify", None)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"can't write .*file: a file stands where a folder is needed"):
        zeroshot(run, open_task(emoji, templates_name="plain"), device="cpu", out=tmp_path / "file")


def test_numbers_are_kept_where_the_guesses_find_no_room(
    run: Path, emoji: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise UserError("the disk is full")

    monkeypatch.setattr(results, "write_predictions", full)
    with pytest.raises(UserError, match="the disk is full"):
        zeroshot(run, open_task(emoji, templates_name="plain"), device="cpu")
    assert len(results.read_results(run)) == 4


def test_an_image_that_is_none_is_told_and_left_out(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [png((place, 0, 0)) for place in range(200)]
    images[17] = b"<html>not here</html>"
    data = write_parquet(tmp_path / "d.parquet", image=images, label=["a", "b"] * 100)
    found = zeroshot(run, open_task(data, templates_name="plain"), device="cpu")
    assert (found[0].n, found[0].unreadable) == (199, 1)
    assert "1 image can't be read" in capsys.readouterr().err
    rows, _ = results.read_predictions(run / "predictions-d.parquet")
    assert [row["key"] for row in rows if row["problem"]] == ["17"]
    images[18:28] = [b""] * 10
    broken = write_parquet(tmp_path / "e.parquet", image=images, label=["a", "b"] * 100)
    with pytest.raises(UserError, match=r"e.parquet: 11 of 200 images can't be read, the last one 27"):
        zeroshot(run, open_task(broken, templates_name="plain"), device="cpu")
    assert {each.task for each in results.read_results(run)} == {"d"}


def test_prompts_that_are_cut_are_told(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_parquet(tmp_path / "d.parquet", image=[png(), png()], label=["very " * 40 + "long", "b"])
    zeroshot(run, open_task(data, templates_name="plain"), device="cpu")
    assert "1 prompts are longer than the 32 text tokens" in capsys.readouterr().err


def test_a_broken_model_is_told(model: CLIP, tokenizer: Tokenizer, emoji: Path) -> None:
    broken = build(SMALL)
    torch.nn.init.constant_(broken.image_projection.weight, float("nan"))
    with pytest.raises(UserError, match="the model gives NaN"):
        classify(
            clip_encoder(broken, tokenizer, PREPROCESS), open_task(emoji, templates_name="plain"), Compute(pick("cpu"))
        )


# ---- Bad input -----------------------------------------------------------------------------------------------------


def test_a_missing_checkpoint(tmp_path: Path, emoji: Path) -> None:
    with pytest.raises(UserError, match=r"checkpoint .*nothing doesn't exist"):
        zeroshot(tmp_path / "nothing", open_task(emoji))


def test_a_checkpoint_of_another_architecture(run: Path, emoji: Path) -> None:
    config = run / "checkpoints" / "000000000064" / "config.json"
    content = json.loads(config.read_text(encoding="utf-8"))
    content["model"]["text"]["width"] = 64
    config.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match="architecture"):
        zeroshot(run, open_task(emoji, templates_name="plain"), device="cpu")
    assert results.read_results(run) == []


@pytest.mark.parametrize(
    ("made", "options", "says"),
    [
        ({}, {"label": "lable"}, "has no column 'lable': did you mean label"),
        ({}, {"templates_name": "openai-8"}, "unknown templates 'openai-8': did you mean openai-80"),
        ({}, {"templates_name": "none.json"}, "templates file none.json doesn't exist"),
        ({"image": ["text", "text"]}, {}, "no column of encoded images"),
        ({"label": ["a", None]}, {}, "row 1 has no 'label'"),
        ({"image": pa.array([], pa.binary()), "label": pa.array([], pa.string())}, {}, "has no rows"),
        ({"label": [0, -1]}, {}, "negative"),
    ],
)
def test_bad_data_gets_one_line(tmp_path: Path, made: dict[str, Any], options: dict[str, Any], says: str) -> None:
    path = write_parquet(tmp_path / "d.parquet", **({"image": [png(), png()], "label": ["a", "b"]} | made))
    with pytest.raises(UserError, match=says) as caught:
        open_task(path, **options)
    assert "\n" not in str(caught.value)


def test_data_that_is_none_of_the_three(tmp_path: Path, emoji: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("hello", encoding="utf-8")
    for path, says in (
        (text, "can't be read as parquet"),
        (tmp_path / "x", "doesn't exist"),
        (tmp_path, "no class folders"),
    ):
        with pytest.raises(UserError, match=says):
            open_task(path)
    with pytest.raises(UserError, match="has no split 'train'"):
        open_task(as_tfds(emoji, tmp_path / "tfds", class_label=True), split="train")
    with pytest.raises(UserError, match="has no feature 'lable': did you mean label"):
        open_task(tmp_path / "tfds", label="lable")


@pytest.mark.parametrize("column", ["image", "label"])
def test_a_damaged_page_gets_one_line(tmp_path: Path, column: str) -> None:
    path = write_parquet(tmp_path / "d.parquet", image=[png()] * 20, label=["a", "b"] * 10)
    place = pq.read_metadata(path).row_group(0).column(["image", "label"].index(column)).dictionary_page_offset
    content = bytearray(path.read_bytes())
    content[place : place + 20] = bytes(20)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"d\.parquet can't be read as parquet") as caught:
        list(open_labelled(path).read())
    assert "\n" not in str(caught.value)


# What Hugging Face's save_to_disk writes, which has a dataset_info.json too.
@pytest.mark.parametrize("info", [{"splits": {"test": {"name": "test"}}}, {"splits": None}, {"features": {}}, []])
@pytest.mark.parametrize("folder", ["", "test"])
def test_a_hugging_face_folder_is_no_tfds_dataset(tmp_path: Path, info: object, folder: str) -> None:
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    (tmp_path / folder / "data-00000-of-00001.arrow").write_bytes(b"")
    with pytest.raises(UserError, match="holds no class folders with images") as caught:
        open_task(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"objekts": "x"}, "has no class 'activities early', which occurs in"),
        ({"a": []}, "class 'a' has no name"),
        ("text", "isn't a list of names or an object"),
    ],
)
def test_bad_classes_files(tmp_path: Path, emoji: Path, content: object, says: str) -> None:
    file = tmp_path / "classes.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=says):
        open_task(emoji, classes=file)


def test_templates_from_files(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('["a {}.", "{} {{x}}"]', encoding="utf-8")
    (tmp_path / "b.txt").write_text("one {}\n\n two {} \n", encoding="utf-8")
    assert templates(str(tmp_path / "a.json")).sentences == ("a {}.", "{} {{x}}")
    assert templates(str(tmp_path / "b.txt")).sentences == ("one {}", "two {}")
    assert prompts(Classes(("a",), (("cat {0}",),)), ["a {}.", "{} {{x}}"]) == [["a cat {0}.", "cat {0} {{x}}"]]
    for content, says in (("no braces", "has no {}"), ("", "holds no template")):
        (tmp_path / "b.txt").write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=says):
            templates(str(tmp_path / "b.txt"))


def test_tasks_are_what_they_say() -> None:
    task = open_task(embedded.emoji_parquet("heldout"), templates_name="plain")
    assert isinstance(task, Classification)
    assert (task.name, len(task.images), len(task.classes)) == ("emoji-heldout", 1096, 1096)


# ---- Several models on several data --------------------------------------------------------------------------------


def test_every_model_is_measured_on_all_data(
    run: Path, emoji: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other.parquet"
    pq.write_table(pq.read_table(emoji).slice(0, 30), other)
    second = tmp_path / "second"
    shutil.copytree(run, second)
    command = ["zeroshot", "--ckpt", str(run), "--ckpt", str(second), "--data", str(emoji), "--data", str(other)]
    command += ["--templates", "plain", "--device", "cpu", "--json"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(line["task"], line["n"]) for line in lines if line["metric"] == "top1"] == [
        *[("emoji", PAIRS)] * 2,
        *[("other", 30)] * 2,
    ]
    assert len(results.read_results(run)) == len(results.read_results(second)) == len(lines) // 2
    # Given again, nothing is decoded or embedded; and several models' results in one folder don't mix.
    monkeypatch.setattr("clipkit.embedding.vectors.decode_pixels", None)
    again = CliRunner().invoke(main, [*command, "--out", str(tmp_path / "out")])
    values = [[each["value"] for each in map(json.loads, text.splitlines())] for text in (done.stdout, again.stdout)]
    assert values[0] == values[1]
    assert len(list((tmp_path / "out").glob("*/results.jsonl"))) == 2


def test_where_embeddings_are_kept(run: Path, emoji: Path, tmp_path: Path) -> None:
    command = ["zeroshot", "--ckpt", str(run), "--data", str(emoji), "--templates", "plain", "--device", "cpu"]
    for options, says in (
        (["--no-cache", "--cache", str(tmp_path)], "--cache and --no-cache exclude each other"),
        (["--data", str(emoji), "--name", "t"], "--name t is for one --data"),
    ):
        assert f"Error: {says}" in CliRunner().invoke(main, [*command, *options]).stderr
    kept = tmp_path / "kept"
    assert CliRunner().invoke(main, [*command, "--cache", str(kept), "--cache-gb", "0.5"]).exit_code == 0
    assert len([path for path in kept.glob("??/*") if path.is_file()]) == 2  # a batch of images, and one of prompts
    home = Path(os.environ["XDG_CACHE_HOME"]) / "clipkit" / "embeddings"
    before = set(home.glob("??/*"))
    assert CliRunner().invoke(main, [*command, "--no-cache", "--precision", "bfloat16"]).exit_code == 0
    assert set(home.glob("??/*")) == before
    assert CliRunner().invoke(main, [*command, "--precision", "bfloat16"]).exit_code == 0
    assert set(home.glob("??/*")) > before
