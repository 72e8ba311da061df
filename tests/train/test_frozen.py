"""Training from the vectors of a frozen image tower is the run on images; what doesn't fit together is refused."""

import pytest
import torch
from frozen_runs import CPU, FROZEN, WHOLE, embedded, losses, rewritten, trained_on, weights, write_images
from small_encoder import PREPROCESS, SMALL, small_run

from clipkit.config import set_values
from clipkit.errors import UserError
from clipkit.interop.load import load
from clipkit.log import read_metrics
from clipkit.text.tokenizer import Tokenizer
from clipkit.train import loop
from clipkit.train.checks import stage_cost
from clipkit.train.loop import train
from clipkit.train.sources.open import open_source
from clipkit.train.start import find_start
from clipkit.train.watch.overfit import overfit


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("model"), seed=3)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Images of which one can't be read and one has an empty caption."""
    captions = [f"picture {number} of {'many ' * (number % 3)}" for number in range(300)]
    captions[9] = ""
    return write_images(tmp_path_factory.mktemp("images"), captions)


@pytest.fixture(scope="module")
def features(images, model, tmp_path_factory):
    return embedded(images, model, tmp_path_factory.mktemp("features"), dtype="float32")


@pytest.fixture(scope="module")
def runs(images, features, model, tmp_path_factory):
    """A run on the images and one on their vectors."""
    return trained_on(tmp_path_factory.mktemp("runs"), FROZEN, model, images, features)


def test_it_is_the_run_on_images_without_its_tower(runs, images, features, model):
    ours, theirs = weights(runs / "features"), weights(runs / "pairs")
    assert losses(runs / "features") == pytest.approx(losses(runs / "pairs"), abs=1e-5)
    # The gradient of a key's bias is zero but for rounding, of which Adam makes whole steps.
    keys = slice(SMALL.text.width, 2 * SMALL.text.width)
    for each in (ours, theirs):
        for name in ours:
            if name.startswith("text.") and name.endswith("qkv.bias"):
                each[name][keys] = 0
    assert {name for name in ours if abs(ours[name] - theirs[name]).max() > 1e-5} == set()
    first = weights(model)
    changed = {name.split(".")[0] for name in ours if not torch.equal(ours[name], first[name])}
    assert changed == {"text", "text_projection", "logit_scale"}
    # The whole model is in the checkpoint: it embeds images.
    assert load(runs / "features").preprocess == load(runs / "pairs").preprocess == PREPROCESS


def test_the_work_of_the_tower_is_not_counted(runs):
    flops = stage_cost(FROZEN, WHOLE, images=False).flops
    assert 0 < flops < stage_cost(FROZEN, WHOLE).flops
    for line in read_metrics(runs / "features"):
        assert line["flops_per_s"] == pytest.approx(line["samples_per_s"] * flops)


def test_a_killed_run_goes_on(runs, features, model, tmp_path, monkeypatch):
    real, taken = loop.train_step, []

    def killing(*arguments):
        taken.append(None)
        if len(taken) > 5:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(loop, "train_step", killing)
    with pytest.raises(KeyboardInterrupt):
        train(FROZEN, features, tmp_path, init=model, **CPU)
    monkeypatch.setattr(loop, "train_step", real)
    train(FROZEN, features, tmp_path, resume=True, **CPU)
    assert losses(tmp_path) == losses(runs / "features")


def test_half_precision_is_near(runs, images, model, tmp_path):
    train(FROZEN, embedded(images, model, tmp_path), tmp_path / "run", init=model, **CPU)
    assert losses(tmp_path / "run") == pytest.approx(losses(runs / "features"), abs=2e-3)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["model.image.frozen=false"], "set model.image.frozen=true"),
        (["model.image.frozen=1"], "set model.image.frozen=true"),
        (["model.embed_dim=16"], "vectors of 32 numbers, model.embed_dim is 16"),
        (["stages.0.augmentation.flip=0.5"], "leave out all of the augmentation"),
        (["stages.0.image_keep=4", "stages.0.image_reduction=random"], "set image_keep and image_reduction to none"),
        (["stages.0.image_size=48"], r"images prepared otherwise \(size"),
        (["resize_mode=squash"], r"images prepared otherwise \(resize_mode"),
        (["mean=[0.5,0.5,0.5]"], r"another kind of image tower \(mean"),
    ],
)
def test_a_recipe_that_does_not_fit(features, model, tmp_path, settings, problem):
    with pytest.raises(UserError, match=problem):
        train(set_values(FROZEN, settings), features, tmp_path, init=model, **CPU)


def test_another_tower(features, tmp_path):
    with pytest.raises(UserError, match="made by another image tower"):
        train(FROZEN, features, tmp_path / "run", init=small_run(tmp_path / "other", seed=4), **CPU)


def test_data_that_can_not_be_trained_on(features, images, tmp_path):
    old = rewritten(features, tmp_path / "old.parquet", image_weights=None)
    with pytest.raises(UserError, match="doesn't say which image tower made it"):
        open_source(old)
    labelled = rewritten(features, tmp_path / "labelled.parquet", captioned=False)
    with pytest.raises(UserError, match="images without captions"):
        open_source(labelled)
    with pytest.raises(UserError, match="can't be mixed with images"):
        open_source([features, images]).source()
    assert open_source([features, rewritten(features, tmp_path / "two.parquet")]).source().feature_width == 32
    with pytest.raises(UserError, match="give the data that clipkit embed was given"):
        overfit(FROZEN, features, samples=16, device_name="cpu")


@pytest.mark.parametrize(
    ("tower", "setting", "problem"),
    [
        ("image", "model.image.act=quick_gelu", r"act: gelu -> quick_gelu"),
        ("image", "model.image.heads=4", r"heads: 2 -> 4"),
        ("image", "model.image.position=sincos", r"position: learnable -> sincos"),
        ("image", "std=0.5,0.5,0.5", r"std.0: 0.26862954 -> 0.5"),
        ("text", "model.text.pooling=last", r"pooling: end -> last"),
    ],
)
def test_a_frozen_tower_runs_as_it_was_trained(images, model, tmp_path, tower, setting, problem):
    """A checkpoint of clipkit's says how, and the weights would fit all the same."""
    recipe = set_values(FROZEN, [setting, "model.image.frozen=false", f"model.{tower}.frozen=true"])
    with pytest.raises(UserError, match=rf"another kind of {tower} tower \({problem}\).*: set the same"):
        train(recipe, images, tmp_path / "run", init=model, **CPU)
    trained = set_values(recipe, [f"model.{tower}.frozen=false"])
    assert problem in find_start(tmp_path, trained, open_source(images), Tokenizer(), init=model).note
    assert find_start(tmp_path, FROZEN, open_source(images), Tokenizer(), init=model).note == ""
