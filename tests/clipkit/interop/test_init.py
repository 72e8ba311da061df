"""Weights to begin with from other projects' files: each kind of file, and what is refused."""

import contextlib
import copy
import dataclasses
import pickle
import warnings
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from click.testing import CliRunner
from openclip_twin import TINY, assert_same_features, images, openclip_twin
from safetensors.torch import load_file, save_file

from clipkit import checkpoint
from clipkit.cli.main import main
from clipkit.errors import UserError
from clipkit.interop.files import read_weights
from clipkit.interop.init import Weights, weights_from_file
from clipkit.model.clip import CLIP, build, load_state
from clipkit.model.config import ImageConfig, ModelConfig
from clipkit.train.catalogue import find_recipe
from clipkit.train.start import weights_digest

QUICK = dataclasses.replace(
    TINY,
    image=dataclasses.replace(TINY.image, act="quick_gelu"),
    text=dataclasses.replace(TINY.text, act="quick_gelu"),
)
TIMM = dataclasses.replace(
    TINY, image=ImageConfig("test_vit", image_size=160, pre_norm=False, norm_eps=1e-6, act="gelu")
)


@pytest.fixture(scope="module")
def theirs() -> torch.nn.Module:
    torch.manual_seed(0)
    return openclip_twin(TINY)


def model_of(weights: Weights, config: ModelConfig) -> CLIP:
    model = build(config, seed=9)
    load_state(model, weights.tensors)
    return model.eval()


def write_openclip(theirs: torch.nn.Module, path: Path) -> Path:
    state = theirs.state_dict()
    if path.suffix == ".safetensors":
        save_file(state, path)
    elif path.suffix == ".bin":
        torch.save(state, path)
    else:
        optimizer = torch.optim.AdamW(theirs.parameters())
        theirs.encode_image(images(2, 32)).sum().backward()
        optimizer.step()
        theirs.zero_grad()
        state = {f"module.{name}": tensor for name, tensor in theirs.state_dict().items()}
        torch.save({"epoch": 3, "name": "run", "state_dict": state, "optimizer": optimizer.state_dict()}, path)
    return path


@pytest.mark.parametrize("name", ["epoch_3.pt", "open_clip_pytorch_model.bin", "open_clip_model.safetensors"])
def test_openclips_files(theirs, tmp_path, name) -> None:
    weights = weights_from_file(write_openclip(theirs, tmp_path / name), TINY, 0)
    assert weights.note == f"image and text towers from {tmp_path / name} (OpenCLIP), run with act=gelu"
    assert weights.towers == ("image", "text")
    assert_same_features(model_of(weights, TINY), theirs)


class Published(torch.nn.Module):
    """OpenAI's model as its archive has it: sizes among the buffers, masks among the attributes, half precision."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        for name, part in model.named_children():
            self.add_module(name, Parts(part) if name in ("visual", "transformer") else part)
        for name, value in model.named_parameters(recurse=False):
            setattr(self, name, value)
        for name, value in {"input_resolution": 32, "context_length": 12, "vocab_size": 49408}.items():
            self.register_buffer(name, torch.tensor(value))
        self.attn_mask = torch.zeros(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Parts(torch.nn.Module):
    """The parts of a module and its own parameters, without its code."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        for name, part in module.named_children():
            self.add_module(name, Parts(part))
        for name, value in module.named_parameters(recurse=False):
            setattr(self, name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def write_openai(theirs: torch.nn.Module, path: Path, archive: bool) -> Path:
    published = Published(theirs).half()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if archive:
            torch.jit.script(published).save(path)
        else:
            torch.save(published.state_dict(), path)
    return path


@pytest.mark.parametrize("archive", [True, False])
def test_openais_files(tmp_path, archive) -> None:
    torch.manual_seed(0)
    twin = openclip_twin(TINY)
    path = write_openai(copy.deepcopy(twin), tmp_path / "ViT.pt", archive)
    with pytest.raises(UserError, match=r"OpenAI's, .* quick_gelu: --set model.image.act=quick_gelu --set model.text."):
        weights_from_file(path, TINY, 0)
    weights = weights_from_file(path, QUICK, 0)
    assert weights.note == f"image and text towers from {path} (OpenAI), run with act=quick_gelu"
    assert_same_features(model_of(weights, TINY), twin.half().float())


# ---- timm ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("vit.safetensors", TIMM),
        ("vit.bin", TIMM),
        ("vit.pth", TIMM),
        ("convnext.pth", dataclasses.replace(TINY, image=ImageConfig("test_convnext", image_size=160))),
        ("resnet.bin", dataclasses.replace(TINY, image=ImageConfig("test_resnet", image_size=160))),
    ],
)
@torch.no_grad()
def test_timms_files(tmp_path, name, config) -> None:
    torch.manual_seed(1)
    path = tmp_path / name
    source = timm.create_model(config.image.name, num_classes=10).eval()
    if path.suffix == ".safetensors":
        save_file(source.state_dict(), path)
    else:
        state = source.state_dict()
        torch.save({"state_dict": state, "epoch": 1} if path.suffix == ".pth" else state, path)
    weights = weights_from_file(path, config, 5)
    assert weights.towers == ("image",)
    for part in ("(timm, without its classifier ", ".weight), image projection and text tower from scratch"):
        assert part in weights.note
    source.reset_classifier(0)
    model = model_of(weights, config)
    image = images(2, 160)
    torch.testing.assert_close(model.image(image), source(image), atol=1e-5, rtol=0)
    scratch = build(config, 5).state_dict()
    rest = [key for key in scratch if not key.startswith("image.trunk.")]
    assert rest
    assert all(torch.equal(weights.tensors[key], scratch[key]) for key in rest)
    assert weights_digest(weights.tensors) == weights_digest(weights_from_file(path, config, 5).tensors)


def test_positions_of_another_grid_are_interpolated(tmp_path) -> None:
    source = timm.create_model("test_vit", num_classes=0)
    save_file(source.state_dict(), tmp_path / "vit.safetensors")
    config = dataclasses.replace(TIMM, image=dataclasses.replace(TIMM.image, image_size=64))
    assert weights_from_file(tmp_path / "vit.safetensors", config, 0).tensors["image.trunk.pos_embed"].shape[1] == 17


# ---- What is refused -------------------------------------------------------------------------------------------------


def test_a_pickle_with_more_than_tensors_is_not_executed(tmp_path) -> None:
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Path(tmp_path / "x").touch, protocol=2))
    torch.save({"state_dict": {"a": Path("b")}}, tmp_path / "more.pt")
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("m/constants.pkl", b"")
        archive.writestr("m/data.pkl", b"cos\nsystem\n(Vtouch " + str(tmp_path / "x").encode() + b"\ntR.")
    (tmp_path / "empty.pt").write_bytes(b"")
    for name in ("evil.pt", "more.pt", "script.pt", "empty.pt"):
        with pytest.raises(UserError, match=rf"{name} isn't a file of weights .*: save the state dict") as raised:
            weights_from_file(tmp_path / name, TINY, 0)
        assert "\n" not in str(raised.value)
        assert "can still be loaded" not in str(raised.value)  # PyTorch advises to execute the file
    assert not (tmp_path / "x").exists()


def refusal(path: Path, config: ModelConfig) -> str:
    with pytest.raises(UserError) as raised:
        weights_from_file(path, config, 0)
    return str(raised.value)


@pytest.mark.parametrize(
    ("shape", "position"),
    [
        ((5,), "learnable"),
        ((101, 64), "learnable"),
        ((1, 12, 64), "learnable"),
        ((101, 64), "sincos"),
        (None, "sincos"),
    ],
)
def test_positions_that_are_not_of_a_square_grid_are_named(tmp_path, shape, position) -> None:
    state = timm.create_model("test_vit", num_classes=0).state_dict()
    del state["pos_embed"]
    save_file(state if shape is None else {**state, "pos_embed": torch.zeros(shape)}, tmp_path / "vit.safetensors")
    said = refusal(
        tmp_path / "vit.safetensors",
        dataclasses.replace(TIMM, image=dataclasses.replace(TIMM.image, position=position)),
    )
    if position == "learnable":
        assert f"image.trunk.pos_embed has shape {list(shape)} in the checkpoint and [1, 101, 64] in the model" in said
    else:
        assert said == "these weights have no sincos image positions: set model.image.position=learnable"


def test_a_damaged_archive_is_refused(tmp_path) -> None:
    """Whatever its bytes make the unpickler do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch.jit is deprecated, OpenAI's file isn't
        torch.jit.save(torch.jit.trace(torch.nn.Linear(3, 3), torch.zeros(1, 3)), tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in files if name.endswith("data.pkl"))
    for place in range(len(files[pickled])):
        damaged = bytearray(files[pickled])
        damaged[place] = ord("R")  # call something
        with zipfile.ZipFile(tmp_path / "damaged.pt", "w") as archive:
            for name, content in files.items():
                archive.writestr(name, bytes(damaged) if name == pickled else content)
        with contextlib.suppress(UserError):
            read_weights(tmp_path / "damaged.pt")


def test_another_architecture_is_named(theirs, tmp_path) -> None:
    path = write_openclip(theirs, tmp_path / "a.safetensors")
    wider = dataclasses.replace(TINY, text=dataclasses.replace(TINY.text, width=64))
    said = refusal(path, wider)
    assert "text.pos_embed has shape [12, 32] in the checkpoint and [12, 64] in the model" in said
    assert said.endswith(f"set model to the architecture of {path}, or take another file")
    save_file(timm.create_model("test_convnext").state_dict(), path)
    assert "has no weights for vit_tiny_patch16_224 (its first is " in refusal(path, TINY)
    save_file(timm.create_model("test_vit").state_dict(), path)
    assert "the checkpoint has no image.trunk.norm_pre.weight" in refusal(
        path, dataclasses.replace(TIMM, image=dataclasses.replace(TIMM.image, pre_norm=True))
    )
    fixed = dataclasses.replace(TIMM, image=dataclasses.replace(TIMM.image, position="sincos"))
    assert "set model.image.position=learnable" in refusal(path, fixed)
    locked = dataclasses.replace(TIMM, image=dataclasses.replace(TIMM.image, frozen=True))
    assert "a frozen one would stay random: set model.image.projection=none" in refusal(path, locked)


def test_lit_is_locked_on_timms_tower() -> None:
    model = find_recipe("lit-b16").model
    assert (model.image.frozen, model.image.projection, model.embed_dim) == (True, "none", 768)
    tower = build(dataclasses.replace(model, text=TINY.text)).image
    assert set(tower.trunk.state_dict()) == set(timm.create_model(model.image.name, num_classes=0).state_dict())


# ---- Through the command ---------------------------------------------------------------------------------------------


def convnext_run(data: Path, out: Path, *more: object) -> tuple[int, list[str]]:
    settings = [
        *("name=test_convnext", "patch_size=none", "width=none", "depth=none", "heads=none", "pooling=token"),
        *("class_token=true", "position=learnable"),
    ]
    options = [f"--set=model.image.{each}" for each in settings]
    options += ["--set=stages.0.image_keep=none", "--set=stages.0.image_reduction=none"]
    command = ["train", "--data", data, "--recipe", "debug", "--device", "cpu", "--workers", 0, "--out", out]
    result = CliRunner().invoke(main, [str(each) for each in (*command, *options, *more)])
    return result.exit_code, result.stderr.splitlines()


def test_a_convnext_trains_from_timms_file_and_resumes(pairs_dataset, tmp_path) -> None:
    init = tmp_path / "convnext.safetensors"
    save_file(timm.create_model("test_convnext").state_dict(), init)
    code, lines = convnext_run(pairs_dataset, tmp_path / "run", "--init", init)
    assert code == 0, lines
    assert [line for line in lines if line.startswith("image tower from")] == [
        f"image tower from {init} (timm, without its classifier head.fc.bias, head.fc.weight), "
        "image projection and text tower from scratch"
    ]
    unbroken = checkpoint.load(tmp_path / "run").tensors
    for path in checkpoint.checkpoints(tmp_path / "run")[-1:]:
        (path / "model.safetensors").unlink()
    code, lines = convnext_run(pairs_dataset, tmp_path / "run", "--init", init, "--resume")
    assert code == 0, lines
    again = load_file(checkpoint.find(tmp_path / "run") / "model.safetensors")
    assert all(torch.equal(again[name], unbroken[name]) for name in unbroken)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--init", "nothing.pt"], "Error: checkpoint nothing.pt doesn't exist: check the path"),
        (
            ["--set=model.image.frozen=true"],
            "Error: a frozen tower with random weights: give the image tower's weights",
        ),
        (
            ["--set=model.image.frozen=1"],
            "Error: recipe debug, stage reduced: model.image.frozen=1 isn't for test_conv",
        ),
    ],
)
def test_what_the_command_refuses(pairs_dataset, tmp_path, more, says) -> None:
    code, lines = convnext_run(pairs_dataset, tmp_path / "run", *more)
    assert code == 2
    assert len([line for line in lines if line.startswith(says)]) == 1, lines
