"""A model's tokenizer, from the option through the loader and the evaluations to the checkpoint and back."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from vocabularies import write_sentencepiece, write_wordpiece

from clipkit import checkpoint
from clipkit.cli.main import main
from clipkit.config import set_values
from clipkit.embedded import emoji_parquet
from clipkit.errors import UserError
from clipkit.eval.classification.task import open_task
from clipkit.eval.evaluation import zeroshot
from clipkit.log import read_metrics
from clipkit.text.vocabulary import open_tokenizer
from clipkit.train import loop
from clipkit.train.catalogue import debug
from clipkit.train.checks import check_tokenizer, loader_config, takes_precomputed
from clipkit.train.loader.loader import batches
from clipkit.train.loop import train
from clipkit.train.recipes import Recipe
from clipkit.train.sources.open import open_source
from clipkit.train.watch import overfit

CPU: dict[str, Any] = {"device_name": "cpu", "workers": 1}
WORDPIECE = ["model.text.tokenizer=wordpiece", "model.text.pooling=last", "model.text.causal=false"]
SENTENCEPIECE = ["model.text.tokenizer=sentencepiece", *WORDPIECE[1:]]


def recipe_of(settings: list[str]) -> Recipe:
    """The debug recipe with that tokenizer: nouns first, then all tokens."""
    return set_values(debug(), ["stages.0.text_reduction=syntax", "model.text.vocab_size=400", *settings])


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    return write_wordpiece(tmp_path / "vocab.txt", "number", "photo", "of")


@pytest.mark.parametrize(("settings", "write"), [(WORDPIECE, write_wordpiece), (SENTENCEPIECE, write_sentencepiece)])
def test_a_checkpoint_carries_the_vocabulary(pairs_dataset, tmp_path, settings, write):
    """Trained and evaluated with it; then neither `zeroshot` nor a resumed run needs the file given."""
    path = write(tmp_path / "file")
    task = open_task(emoji_parquet("heldout"), templates_name="plain")
    run = tmp_path / "run"
    assert train(recipe_of(settings), pairs_dataset, run, vocabulary=path, task=task, **CPU).finished
    (during,) = (line for line in read_metrics(run) if "emoji-heldout/top1" in line and line["samples_seen"] == 320)
    content = path.read_bytes()
    path.unlink()
    found = checkpoint.load(run)
    assert (found.path / "vocabulary").read_bytes() == content
    assert checkpoint.tokenizer_of(found.path).vocabulary == content
    results = zeroshot(run, open_task(emoji_parquet("heldout"), templates_name="plain"), device="cpu")
    assert next(each.value for each in results if each.metric == "top1") == during["emoji-heldout/top1"]
    again = train(recipe_of(settings), pairs_dataset, run, vocabulary=found.path / "vocabulary", resume=True, **CPU)
    assert again.finished


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("settings", "write"), [(WORDPIECE, write_wordpiece), (SENTENCEPIECE, write_sentencepiece)])
def test_batches_hold_the_tokenizers_rows(pairs_dataset, tmp_path, settings, write, workers):
    recipe = set_values(recipe_of(settings), ["stages.1.augmentation.flip=0"])
    tokenizer = open_tokenizer(recipe.model.text.tokenizer, write(tmp_path / "file"))
    source = open_source(pairs_dataset).source()
    config = loader_config(recipe, recipe.stages[1])
    batch = next(batches(source, config, tokenizer=tokenizer, workers=workers, processes=workers > 0, keys=True))
    captions = [next(source.pairs([record])).caption for record in batch.records_B.tolist()]
    np.testing.assert_array_equal(batch.ids_BT, tokenizer(captions, config.context_length))
    reduced = next(batches(source, loader_config(recipe, recipe.stages[0]), tokenizer=tokenizer, workers=0))
    assert reduced.ids_BT.shape[1] == 8
    assert (reduced.ids_BT[:, 0] == (tokenizer.start or reduced.ids_BT[:, 0])).all()


def test_precomputed_ids_are_clip_bpes_only():
    recipe = recipe_of(WORDPIECE)
    assert not takes_precomputed(recipe, recipe.stages[0])
    plain = set_values(debug(), ["stages.0.text_reduction=syntax"])
    assert [takes_precomputed(plain, stage) for stage in plain.stages] == [True, False]


def test_another_vocabulary_is_refused(pairs_dataset, tmp_path, vocabulary):
    run = tmp_path / "run"
    recipe = set_values(recipe_of(WORDPIECE), ["stages.0.text_reduction=truncate"])
    train(recipe, pairs_dataset, run, vocabulary=vocabulary, **CPU)
    other = write_wordpiece(tmp_path / "other.txt", "number", "of", "photo")
    for options in ({"resume": True}, {"init": run}):
        folder = run if "resume" in options else tmp_path / "next"
        with pytest.raises(UserError, match=r"trained with another vocabulary: add --tokenizer .*/vocabulary"):
            train(recipe, pairs_dataset, folder, vocabulary=other, **options, **CPU)
    plain = set_values(debug(), [f"{each}" for each in WORDPIECE[1:]])
    with pytest.raises(UserError, match="trained with the tokenizer wordpiece, the recipe has clip-bpe"):
        train(plain, pairs_dataset, tmp_path / "next", init=run, **CPU)
    path = checkpoint.latest(run)
    shutil.copy(other, path / "vocabulary")
    with pytest.raises(UserError, match="isn't the vocabulary that the model was trained with"):
        checkpoint.tokenizer_of(path)
    (path / "vocabulary").unlink()
    with pytest.raises(UserError, match=r"vocabulary doesn't exist"):
        checkpoint.tokenizer_of(path)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            ["model.text.vocab_size=1000"],
            "vocab_size is 1000: the tokenizer clip-bpe has 49,408 ids; set 49408",
        ),
        ([*WORDPIECE, "model.text.vocab_size=30521"], "has 30,522 ids; set 30522 or more"),
        ([WORDPIECE[0]], "pooling=end needs the end token of clip-bpe: set model.text.pooling=last for wordpiece"),
    ],
)
def test_ids_that_the_tower_cannot_read_are_refused(settings, says):
    recipe = set_values(debug(), settings)
    with pytest.raises(UserError, match=says):
        check_tokenizer(recipe, open_tokenizer(recipe.model.text.tokenizer))


def test_the_option_arrives(pairs_dataset, tmp_path, vocabulary, monkeypatch):
    command = ["--recipe", "debug", "--set", WORDPIECE[0], "--set", WORDPIECE[1], "--tokenizer", str(vocabulary)]
    given: list[Any] = []
    monkeypatch.setattr(loop, "train", lambda *_, **options: given.append(options["vocabulary"]) or 1 / 0)
    CliRunner().invoke(main, ["train", "--data", str(pairs_dataset), "--out", str(tmp_path / "run"), *command])
    assert given == [vocabulary]
    monkeypatch.setattr(overfit, "open_tokenizer", lambda name, path: given.append(path) or 1 / 0)
    CliRunner().invoke(main, ["train", "--data", str(pairs_dataset), "--overfit", "16", *command])
    assert given == [vocabulary, vocabulary]
    measured = CliRunner().invoke(main, ["bench-data", str(pairs_dataset), *command, "--seconds", "0.1", "--json"])
    assert json.loads(measured.stdout)["samples"] > 0


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["--recipe", "debug", "--tokenizer", "FILE"], "clip-bpe takes no vocabulary: leave out --tokenizer"),
        (["--recipe", "siglip-b16"], "sentencepiece has no vocabulary of its own: give its file with --tokenizer"),
        (["--recipe", "clipa-l14-datacomp", "--tokenizer", "none"], "can't read the vocabulary none"),
        (["--recipe", "debug", "--set", "model.text.tokenizer=bert"], "choose from clip-bpe"),
    ],
)
def test_a_wrong_file_gets_one_line_before_the_first_step(pairs_dataset, tmp_path, vocabulary, command, says):
    command = [str(vocabulary) if each == "FILE" else each for each in command]
    done = CliRunner().invoke(main, ["train", "--data", str(pairs_dataset), "--out", str(tmp_path / "run"), *command])
    assert done.exit_code == 2 and done.stderr.count("\n") == 1
    assert says in done.stderr


def test_a_checkpoint_from_before_the_choice_has_clips(tmp_path, pairs_dataset):
    train(set_values(debug(), ["stages.0.samples=16", "stages.0.warmup_samples=0"]), pairs_dataset, tmp_path, **CPU)
    path = checkpoint.latest(tmp_path)
    config = json.loads((path / "config.json").read_text())
    del config["model"]["text"]["tokenizer"], config["recipe"]["model"]["text"]["tokenizer"], config["vocabulary"]
    del config["recipe"]["interpolation"], config["recipe"]["resize_mode"]
    (path / "config.json").write_text(json.dumps(config))
    old = checkpoint.load(tmp_path)
    assert checkpoint.tokenizer_of(old.path).name == "clip-bpe"
    assert old.model_config == replace(old.model_config, text=replace(old.model_config.text, tokenizer="clip-bpe"))
