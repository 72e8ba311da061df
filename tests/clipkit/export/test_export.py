"""Models in other projects' formats, run through their own packages: the same numbers, and what is refused."""

import dataclasses
import importlib
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from openclip_twin import TINY, TINY_CLIPA_V2, TINY_SIGLIP, load_openclip
from safetensors.torch import load_file
from torch.nn import functional as F
from vocabularies import write_sentencepiece

from clipkit import checkpoint
from clipkit.cli.main import main
from clipkit.embedding.encoder import Encoder
from clipkit.errors import InternalError
from clipkit.export import command, openclip
from clipkit.export.command import FORMATS, export
from clipkit.export.model_card import device_words
from clipkit.export.parity import BOUND, Peer, our_ids, our_pixels, real_samples
from clipkit.interop.load import load
from clipkit.model.clip import CLIP, build
from clipkit.model.config import ImageConfig, ModelConfig
from clipkit.pixels.images import Preprocess
from clipkit.storage.files import read_json_lines, write_json_lines
from clipkit.text.vocabulary import open_tokenizer, vocabulary_hash

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for package in ("open_clip", "transformers"):  # what they import warns
        importlib.import_module(package)

replace = dataclasses.replace
CONVNEXT = replace(TINY, image=ImageConfig("test_convnext", image_size=64))
STEM = replace(TINY, image=replace(TINY.image, stem="conv"))
QUICK = replace(TINY, image=replace(TINY.image, act="quick_gelu"), text=replace(TINY.text, act="quick_gelu"))
SCALED = replace(TINY, image=replace(TINY.image, layer_scale=0.1))
REGISTERS = replace(TINY, image=replace(TINY.image, name="vit_base_patch16_reg4_gap_256"))
FLEXI = replace(TINY, image=replace(TINY.image, name="flexivit_base"))
SQUASH = Preprocess(32, (0.5,) * 3, (0.5,) * 3, "bicubic", "squash")


def save(run: Path, model: CLIP, preprocess: Preprocess, vocabulary: Path | None = None) -> Path:
    tokenizer = open_tokenizer(model.config.text.tokenizer, vocabulary)
    recipe = {"name": "tiny", "ema_decay": 0.9, "stages": [{"name": "full", "samples": 100, "learning_rate": 0.001}]}
    state = {"samples_seen": 100, "stage": "full", "seconds": 36.0, "dataset": {"name": "emoji", "records": 100}}
    tensors = model.state_dict()
    return checkpoint.save(
        run / "checkpoints" / "000000000100",
        tensors=tensors,
        ema={name: tensor * 0.5 if name == "text.pos_embed" else tensor for name, tensor in tensors.items()},
        config=checkpoint.describe(model.config, preprocess, recipe, vocabulary_hash(tokenizer)),
        state=state,
        vocabulary=tokenizer.vocabulary,
    )


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A run with a random model, no weight of which is zero or one."""

    def run_of(config: ModelConfig, preprocess: Preprocess | None = None, vocabulary: Path | None = None) -> Path:
        model = build(config, seed=1)
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.03)
        run = tmp_path_factory.mktemp("run")
        save(run, model, preprocess or Preprocess(config.image.image_size), vocabulary)
        return run

    return run_of


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a model whose image projection was solved to find the names of 100 emoji."""
    model, run = build(TINY, seed=0).eval(), tmp_path_factory.mktemp("trained")
    encoder = load(save(run / "start", model, Preprocess(32)))
    images, texts = real_samples(100)
    with torch.no_grad():
        text_BE = model.encode_text(our_ids(encoder, texts))
        solved = torch.linalg.lstsq(model.image(our_pixels(encoder, images)), text_BE - text_BE.mean(dim=0)).solution
        model.image_projection.weight.copy_(solved.T)
    save(run, model, Preprocess(32))
    line = {"task": "emoji", "metric": "top1", "value": 0.5, "low": 0.4, "high": 0.6, "n": 100}
    line |= {"checkpoint": "checkpoints/000000000100", "hashes": {"classes": "4345f06a3add9d3f"}}
    (run / "results.jsonl").write_text(json.dumps(line) + "\n")
    device = {"kind": "cuda", "hardware": "NVIDIA H100", "devices": 8, "arithmetic": "bfloat16"}
    (run / "config.json").write_text(json.dumps({"device": device}))
    return run


@torch.no_grad()
def correct(encoder: Encoder, peer: Peer | None) -> int:
    """Of 100 emoji, how many are taken for their own name out of 100; all that the format has is its own package's."""
    images, texts = real_samples(100)
    pixels = our_pixels(encoder, images) if peer is None or peer.pixels is None else peer.pixels(images)
    ids = our_ids(encoder, texts).long() if peer is None or peer.ids is None else peer.ids(texts)
    image_BE = encoder.model.encode_image(pixels) if peer is None else peer.image(pixels)
    text_BE = encoder.model.encode_text(ids) if peer is None or peer.text is None else peer.text(ids)
    guess = (image_BE @ F.normalize(text_BE, dim=-1).T).argmax(dim=1)
    return int((guess == torch.arange(100)).sum())


@pytest.mark.parametrize("target", FORMATS)
def test_accuracy_is_the_same_in_the_formats_own_package(trained, tmp_path, target) -> None:
    out = tmp_path / "out"
    done = CliRunner().invoke(main, ["export", str(trained), str(out), "--to", target])
    assert done.exit_code == 0, done.output
    assert "24 images and 24 texts:\n  images, same pixels: " in done.stdout
    encoder = load(trained)
    ours = correct(encoder, None)
    assert ours >= 8
    assert correct(encoder, FORMATS[target].open_peer(out)) == ours
    parity = json.loads((out / "parity.json").read_text())
    assert parity["target"] == target
    assert parity["image"] < BOUND
    card = (out / "README.md").read_text()
    for part in (
        "| recipe | tiny |",
        "| samples seen | 100 |",
        "name emoji, records 100",
        "| trained on | 8 × NVIDIA H100, in bfloat16 |",
        "| emoji top1 | 50.0% (40.0%",
    ):
        assert part in card
    for part in (
        "classes 4345f06a3add9d3f",
        "FLOPs of a sample",
        "## Licence",
        "stage full | samples 100, learning_rate 0.001",
    ):
        assert part in card


def test_a_card_has_the_results_of_its_own_checkpoint_in_their_units(trained, tmp_path) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    (line,) = read_json_lines(run / "results.jsonl")
    rank = {"metric": "text_retrieval_median_rank", "value": 3.0, "low": 2.0, "high": 5.0}
    other = {"task": "theirs", "checkpoint": "/other/run/checkpoints/000000000100"}
    write_json_lines(run / "results.jsonl", [line, line | rank, line | other])
    export(run, tmp_path / "out", "timm")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| emoji text_retrieval_median_rank | 3 (2 to 5, n 100) |" in card
    assert "theirs" not in card


def test_the_device_of_a_card_in_words() -> None:
    one = {"kind": "cpu", "hardware": "CPU, 2 threads", "devices": 1, "arithmetic": "float32"}
    assert device_words(one) == "CPU, 2 threads, in float32"
    assert device_words({"kind": "cpu"}) == "cpu", "of an older run"


# ---- And back again --------------------------------------------------------------------------------------------------


def assert_same_weights(one: CLIP, other: CLIP) -> None:
    own, back = one.state_dict(), other.state_dict()
    assert own.keys() == back.keys()
    assert all(torch.equal(own[name], back[name]) for name in own)


@pytest.mark.parametrize("which", ["quick", "siglip"])
def test_transformers_folder_comes_back_as_it_was(make, tmp_path, which) -> None:
    if which == "quick":
        run = make(QUICK)
    else:
        vocabulary = write_sentencepiece(tmp_path / "spiece.model")
        run = make(replace(TINY_SIGLIP, text=replace(TINY_SIGLIP.text, vocab_size=60)), SQUASH, vocabulary)
    export(run, tmp_path / "out", "hf")
    ours, back = load(run), load(tmp_path / "out")
    assert_same_weights(ours.model, back.model)
    assert back.preprocess == ours.preprocess
    assert back.tokenizer.encode(["A photo of 2 dogs!"]) == ours.tokenizer.encode(["A photo of 2 dogs!"])


@pytest.mark.parametrize("config", [QUICK, TINY_CLIPA_V2, SCALED], ids=["quick", "clipa", "scaled"])
def test_openclips_folder_comes_back_as_it_was(make, tmp_path, config) -> None:
    run = make(config)
    parity = export(run, tmp_path / "out", "open_clip")
    assert parity.text_own_tokenizer is not None
    assert parity.text_own_tokenizer < 1e-5
    assert parity.image_own_preprocessing < 1e-5
    ours, back = load(run), load(tmp_path / "out")
    assert_same_weights(ours.model, back.model)
    assert back.preprocess == ours.preprocess


def test_timms_models_go_through_openclip_too(make, tmp_path) -> None:
    run = make(CONVNEXT)
    assert export(run, tmp_path / "out", "open_clip").image < 1e-5
    back = load_openclip(CONVNEXT, load_file(tmp_path / "out" / "open_clip_model.safetensors"))
    assert_same_weights(load(run).model, back)


def test_timm_gets_the_towers_that_it_can_build(make, tmp_path) -> None:
    for number, config in enumerate((TINY_CLIPA_V2, CONVNEXT)):
        assert export(make(config), tmp_path / str(number), "timm").image < 1e-5


def test_the_averages(trained, tmp_path) -> None:
    done = CliRunner().invoke(main, ["export", str(trained), str(tmp_path / "out"), "--to", "hf", "--ema", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["target"] == "hf"
    ours, back = load(trained).model.state_dict(), load(tmp_path / "out").model.state_dict()
    assert torch.equal(back["text.pos_embed"], ours["text.pos_embed"] * 0.5)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "averaged over training" in card
    assert "None: those of the run are of the last weights." in card
    again = CliRunner().invoke(main, ["export", str(tmp_path / "out"), str(tmp_path / "timm"), "--to", "timm"])
    assert again.exit_code == 2
    assert "out is a model of transformers': zeroshot, embed and" in again.stderr


# ---- What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "target", "says"),
    [
        (STEM, "open_clip", "can't have a convolutional stem, as this model's has: export to onnx"),
        (REGISTERS, "open_clip", "this model's image tower differ in pos_embed: export to onnx"),
        (FLEXI, "timm", "this model's image tower differ in pos_embed: export to onnx"),
        (SCALED, "timm", "this model's image tower differ in blocks.0.ls1.gamma: export to open_clip or onnx"),
        (STEM, "hf", "nearest is its clip: stem conv (patch there): export to onnx"),
        (STEM, "timm", "a convolutional stem, which timm can't be given in a file: export to onnx"),
        (TINY_CLIPA_V2, "hf", "tokenizer wordpiece (clip-bpe there): export to open_clip or timm or onnx"),
        (CONVNEXT, "hf", "plain vision transformer False (True there): export to open_clip or timm or onnx"),
        (replace(TINY, text=QUICK.text), "open_clip", "quick_gelu in both towers or in none, this model in one"),
        (replace(TINY, logit_bias_init=-10.0), "hf", "logit bias True (False there): export to open_clip or"),
    ],
)  # fmt: skip
def test_what_a_format_does_not_have(make, tmp_path, config, target, says) -> None:
    done = CliRunner().invoke(main, ["export", str(make(config)), str(tmp_path / "out"), "--to", target])
    assert done.exit_code == 2
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_a_missing_package_and_a_folder_that_is_there(trained, tmp_path, monkeypatch) -> None:
    done = CliRunner().invoke(main, ["export", str(trained), str(tmp_path), "--to", "hf"])
    assert (done.exit_code, done.stderr) == (
        2,
        f"Error: {tmp_path} is there already: remove it, or name another folder\n",
    )
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    done = CliRunner().invoke(main, ["export", str(trained), str(tmp_path / "out"), "--to", "onnx"])
    assert done.exit_code == 2
    assert 'needs onnx, onnxscript, onnxruntime to check the result: pip install "clipkit[export]"' in done.stderr


def test_a_wrong_export_is_noticed_and_removed(trained, tmp_path, monkeypatch) -> None:
    rows = openclip.their_config
    monkeypatch.setattr(openclip, "their_config", lambda model: rows(model) | {"quick_gelu": True})
    with pytest.raises(
        InternalError, match=r"exported to open_clip differs from ours by up to .* so nothing was written"
    ):
        export(trained, tmp_path / "out", "open_clip")
    assert not any(tmp_path.iterdir())
