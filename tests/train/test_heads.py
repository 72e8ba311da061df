"""Heads on frozen towers, trained from the stored vectors of both: the run on images and captions; what doesn't fit
together is refused.
"""

import dataclasses
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from frozen_runs import CPU, FROZEN, WHOLE, embedded, losses, rewritten, trained_on, weights, write_images
from safetensors.torch import load_file, save_file
from small_encoder import PREPROCESS, small_run

from clipkit import checkpoint
from clipkit.cli.main import main
from clipkit.cli.search import open_pictures
from clipkit.config import set_values
from clipkit.errors import UserError
from clipkit.eval.search.embed import embed
from clipkit.interop.load import load
from clipkit.log import read_metrics
from clipkit.train import loop
from clipkit.train.augmentation import Augmentation
from clipkit.train.catalogue import find_recipe
from clipkit.train.checks import loader_config, stage_cost, take_texts
from clipkit.train.loader.loader import batches
from clipkit.train.loop import train
from clipkit.train.sources.open import open_source

BOTH = set_values(
    FROZEN,
    [
        *("model.text.frozen=true", "model.image.head=glu", "model.text.head=mlp", "model.embed_dim=24"),
        *("model.image.head_input=32", "model.text.head_input=32", "stages.0.context_length=32"),
    ],
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("model"), seed=3)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Images with one caption, several, or none."""
    captions = [[f"picture {number} of {word}" for word in ("one", "", "two")[: number % 4]] for number in range(300)]
    captions = [found or ["a picture"] for found in captions]
    captions[9] = [""]
    return write_images(tmp_path_factory.mktemp("images"), captions)


@pytest.fixture(scope="module")
def features(images, model, tmp_path_factory):
    return embedded(images, model, tmp_path_factory.mktemp("features"), dtype="float32")


@pytest.fixture(scope="module")
def runs(images, features, model, tmp_path_factory):
    """A run through both frozen towers and one on their vectors."""
    return trained_on(tmp_path_factory.mktemp("runs"), BOTH, model, images, features)


def test_it_is_the_run_through_both_towers(runs, images, features, model):
    ours, theirs = weights(runs / "features"), weights(runs / "pairs")
    assert losses(runs / "features") == pytest.approx(losses(runs / "pairs"), abs=1e-5)
    assert {name for name in ours if abs(ours[name] - theirs[name]).max() > 1e-5} == set()
    first = weights(model)
    changed = {name.split(".")[0] for name in ours if name not in first or not torch.equal(ours[name], first[name])}
    assert changed == {"image_head", "text_head", "logit_scale"}
    encoder = load(runs / "features")
    assert encoder.preprocess == PREPROCESS and encoder.model.config == BOTH.model


def test_a_new_space_begins_with_its_own_scale(runs):
    """That of the model that gave the towers is of another space."""
    first = next(line for line in read_metrics(runs / "features") if "logit_scale" in line)
    assert first["logit_scale"] == pytest.approx(BOTH.model.logit_scale_init, rel=0.1)


def test_neither_tower_is_run(runs, features, model, tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("a tower was run")

    monkeypatch.setattr("clipkit.model.clip.CLIP.encode_image", refuse)
    monkeypatch.setattr("clipkit.model.clip.CLIP.encode_text", refuse)
    train(BOTH, features, tmp_path, init=model, **CPU)
    flops = stage_cost(BOTH, BOTH.stages[0], images=False, texts=False).flops
    for line in read_metrics(tmp_path):
        assert line["flops_per_s"] == pytest.approx(line["samples_per_s"] * flops)


def test_each_sample_has_the_vector_of_the_caption_that_was_drawn(images, features, model):
    """Of a record with several captions, whichever it is."""
    stage = BOTH.stages[0]
    encoder = load(model)
    live, stored = open_source(images), take_texts(open_source(features), BOTH)
    loaders = [batches(each.source(), loader_config(BOTH, stage), workers=0) for each in (live, stored)]
    for _ in range(8):
        ours, theirs = (next(loader) for loader in loaders)
        assert ours.records_B.tolist() == theirs.records_B.tolist()
        assert ours.caption_B.tolist() == theirs.caption_B.tolist()
        with torch.no_grad():
            text_BE = encoder.model.eval().encode_text(torch.from_numpy(ours.ids_BT))
        torch.testing.assert_close(torch.from_numpy(theirs.arrays()["text_BE"]), text_BE, rtol=0, atol=1e-5)
        assert "ids_BT" not in theirs.arrays()


def test_micro_batches_change_nothing(runs, features, model, tmp_path):
    train(set_values(BOTH, ["micro_batch=8"]), features, tmp_path, init=model, **CPU)
    assert losses(tmp_path) == pytest.approx(losses(runs / "features"), abs=1e-5)


def test_a_killed_run_goes_on(runs, features, model, tmp_path, monkeypatch):
    real, taken = loop.train_step, []

    def killing(*arguments):
        taken.append(None)
        if len(taken) > 5:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(loop, "train_step", killing)
    with pytest.raises(KeyboardInterrupt):
        train(BOTH, features, tmp_path, init=model, **CPU)
    monkeypatch.setattr(loop, "train_step", real)
    train(BOTH, features, tmp_path, resume=True, **CPU)
    assert losses(tmp_path) == losses(runs / "features")


def test_vectors_of_another_dataset_do_not_go_on(runs, images, model, tmp_path):
    half = pq.read_table(images).slice(0, 150)
    pq.write_table(half, tmp_path / "half.parquet")
    other = embedded(tmp_path / "half.parquet", model, tmp_path, dtype="float32")
    with pytest.raises(UserError, match="was trained on another dataset"):
        train(BOTH, other, runs / "features", resume=True, **CPU)


def test_half_precision_is_near(runs, images, model, tmp_path):
    train(BOTH, embedded(images, model, tmp_path), tmp_path / "run", init=model, **CPU)
    assert losses(tmp_path / "run") == pytest.approx(losses(runs / "features"), abs=5e-3)


def test_without_a_head_a_frozen_text_tower_is_stored_too(features, images, model, tmp_path):
    recipe = set_values(FROZEN, ["model.text.frozen=true", "model.image.head=linear", "stages.0.context_length=32"])
    for data in (images, features):
        train(recipe, data, tmp_path / data.stem, init=model, **CPU)
    assert losses(tmp_path / "features") == pytest.approx(losses(tmp_path / "pairs"), abs=1e-5)


def test_the_model_is_taken_by_all_that_takes_models(runs, images, tmp_path, capsys):
    run = runs / "features"
    out = tmp_path / "again.parquet"
    embed(open_pictures(str(images), None, None), out, str(run), device="cpu")
    assert pq.read_schema(out).field("image").type.list_size == 24
    with pytest.raises(SystemExit) as end:
        main(["export", str(run), str(tmp_path / "out"), "--to", "open_clip"])
    assert end.value.code == 2
    assert "no place for the heads of this model" in capsys.readouterr().err
    # Heads on top of these heads: the vectors are of another tower.
    with pytest.raises(UserError, match="made by another image tower"):
        recipe = set_values(BOTH, ["model.image.head_input=24", "model.text.head_input=24"])
        train(recipe, out, tmp_path / "run", init=small_run(tmp_path / "small", seed=3), **CPU)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["model.image.head_input=16"], r"vectors of 32 numbers, model\.image\.head_input is 16: set .*head_input=32$"),
        (["model.text.head_input=16"], r"vectors of 32 numbers, model\.text\.head_input is 16: "),
        (["stages.0.context_length=16"], r"captions of up to 32 tokens, not 16: set context_length=32"),
        (["stages.0.text_reduction=block"], "set text_reduction=truncate, or train the text tower"),
        (["stages.0.augmentation.flip=0.5"], "leave out all of the augmentation"),
        (["model.image.act=quick_gelu"], r"another kind of image tower \(act: .*quick_gelu.*\): set the same"),
        (["model.text.act=quick_gelu"], r"another kind of text tower \(act"),
    ],
)
def test_a_recipe_that_does_not_fit(features, model, tmp_path, settings, problem):
    with pytest.raises(UserError, match=problem) as refused:
        train(set_values(BOTH, settings), features, tmp_path, init=model, **CPU)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["model.text.heads=4"], r"another kind of text tower \(heads: 2 -> 4\): set the same"),
        (["model.image.heads=4"], r"another kind of image tower \(heads: 2 -> 4\)"),
    ],
)
def test_what_is_not_in_the_weights_must_be_the_same(features, model, tmp_path, settings, problem):
    """Neither the vectors nor the weights would tell, but what embeds images afterwards is another model."""
    weights_only = checkpoint.find(model) / "model.safetensors"
    with pytest.raises(UserError, match=problem):
        train(set_values(BOTH, settings), features, tmp_path, init=weights_only, **CPU)


def test_another_text_tower(features, model, tmp_path):
    """The image tower is the same."""
    one, two = (checkpoint.find(small_run(tmp_path / str(seed), seed=seed)) for seed in (3, 4))
    tensors = load_file(one / "model.safetensors")
    tensors |= {name: each for name, each in load_file(two / "model.safetensors").items() if name.startswith("text")}
    save_file(tensors, tmp_path / "mixed.safetensors")
    with pytest.raises(UserError, match="was made by another text tower"):
        train(BOTH, features, tmp_path / "run", init=tmp_path / "mixed.safetensors", **CPU)


def test_a_file_of_an_older_clipkit_has_no_word_on_its_text_tower(features, model, tmp_path):
    about = json.loads(pq.read_schema(features).metadata[b"clipkit"])
    old = rewritten(features, tmp_path / "old.parquet", text_weights=None, towers=None)
    assert about["text_weights"]
    with pytest.raises(UserError, match=r"doesn't say which text tower made it, .*: run clipkit embed again"):
        train(BOTH, old, tmp_path / "run", init=model, **CPU)
    # For a frozen image tower it is as good as ever.
    recipe = dataclasses.replace(FROZEN, stages=(dataclasses.replace(WHOLE, samples=64),))
    assert train(recipe, old, tmp_path / "text", init=model, **CPU).finished


@pytest.mark.parametrize("number", range(3))
def test_the_recipes_to_copy_from_the_documentation(number, tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "recipes-for-accuracy.md").read_text(encoding="utf-8")
    section = page.partition("## Frozen towers")[2].partition("\n## ")[0]
    (tmp_path / "mine.toml").write_text(section.split("```toml\n")[number + 1].partition("```")[0], encoding="utf-8")
    recipe = find_recipe(str(tmp_path / "mine.toml"))
    (stage,) = recipe.stages
    assert stage.samples % stage.batch_size == 0
    assert (recipe.model.image.frozen, recipe.model.text.frozen) == ((True, False), (False, True), (True, True))[number]
    assert (stage.augmentation == Augmentation()) is (number != 1)
    assert stage_cost(recipe, stage).flops > 0


def test_a_file_whose_captions_have_no_vectors(features, model, tmp_path):
    table = pq.read_table(features)
    pq.write_table(table.drop_columns(["texts"]), tmp_path / "no-texts.parquet")
    with pytest.raises(UserError, match=r"no-texts\.parquet has no column texts: run clipkit embed"):
        train(BOTH, tmp_path / "no-texts.parquet", tmp_path / "run", init=model, **CPU)
