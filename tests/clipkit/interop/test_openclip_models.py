"""OpenCLIP's models, each against its own package: all that it has configurations for, and files, folders and names."""

import copy
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import tokenizers
import torch
import vocabularies
from click.testing import CliRunner, Result
from docs_scripts import load_script
from open_clip.transform import image_transform
from PIL import Image
from safetensors.torch import save_file
from tokenizers import models, pre_tokenizers, processors
from vocabularies import write_sentencepiece

from clipkit import embedded
from clipkit.cli.main import main
from clipkit.device import pick
from clipkit.embedding.encoder import Compute, Encoder
from clipkit.embedding.vectors import text_matrix
from clipkit.errors import UserError
from clipkit.interop.load import load
from clipkit.interop.openclip_config import native_config
from clipkit.interop.openclip_models import native_model
from clipkit.model.config import ModelConfig
from clipkit.pixels.images import Preprocess, eval_transform

PAGE = load_script("models")
NATIVE = re.findall(r"^\| (\S+) \| native", PAGE.PAGE.read_text(encoding="utf-8"), re.M)


def shrink(model_cfg: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """OpenCLIP's configuration with one block of two heads and few ids, and what timm's tower is to be made with."""
    vision, text = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    text |= {"layers": 1, "heads": 2, "width": 128, "vocab_size": 64}
    model_cfg["embed_dim"] = 128
    if vision.get("timm_model_name"):
        return model_cfg, {"depth": 1, "embed_dim": 128, "num_heads": 2}
    vision |= {"layers": 1, "width": 2 * vision.get("head_width", 64)}
    return model_cfg, {}


@torch.no_grad()
def random_twin(model_cfg: dict[str, Any], sizes: dict[str, Any]) -> torch.nn.Module:
    """OpenCLIP's own model, no bias of it zero and no norm the identity."""
    model_cfg = copy.deepcopy(model_cfg)
    vision = model_cfg["vision_cfg"]
    name, pool, projection = (vision.get(f"timm_{key}") for key in ("model_name", "pool", "proj"))
    if name:  # a tiny one of timm's, whose trunk is replaced: OpenCLIP can't make one smaller
        vision |= {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "timm_proj": "none"}
    custom = model_cfg.pop("custom_text", False)
    torch.manual_seed(0)
    theirs = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**model_cfg)
    if name:
        classes = 0 if projection == "none" else model_cfg["embed_dim"]
        theirs.visual.trunk = timm.create_model(name, num_classes=classes, global_pool=pool, **sizes)
    for parameter in theirs.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return theirs.eval()


def resized(config: ModelConfig, sizes: dict[str, Any]) -> ModelConfig:
    if not sizes:
        return config
    names = {"depth": "depth", "embed_dim": "width", "num_heads": "heads"}
    return dataclasses.replace(
        config, image=dataclasses.replace(config.image, **{names[name]: size for name, size in sizes.items()})
    )


def words(count: int, context_length: int) -> torch.Tensor:
    """Ids, the largest of each row last, zeros behind it."""
    ids_BT = torch.randint(1, 60, (count, context_length), generator=torch.Generator().manual_seed(2))
    for row, length in zip(ids_BT, range(3, 3 + 5 * count, 5), strict=True):
        row[length - 1], row[length:] = 63, 0
    return ids_BT


@torch.no_grad()
@pytest.mark.parametrize("name", NATIVE)
def test_a_native_model_has_openclips_features(name: str, tmp_path) -> None:
    model_cfg, sizes = shrink(copy.deepcopy(open_clip.get_model_config(name)))
    theirs = random_twin(model_cfg, sizes)
    config = resized(native_config(model_cfg), sizes)
    ours, notes = native_model(tmp_path, config, theirs.state_dict())
    assert notes == ()
    image_BCHW = torch.randn(2, 3, config.image.image_size, config.image.image_size)
    ids_BT = words(3, config.text.context_length)
    for mine, other in (
        (ours.encode_image(image_BCHW), theirs.encode_image(image_BCHW, normalize=True)),
        (ours.encode_text(ids_BT), theirs.encode_text(ids_BT, normalize=True)),
    ):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=0)
        assert (other[0] - other[1]).abs().max() > 1e-3
    assert (ours.logit_bias is not None) == ("init_logit_bias" in model_cfg)
    torch.testing.assert_close(ours.logit_scale, theirs.logit_scale)


def test_the_page_is_up_to_date() -> None:
    assert PAGE.PAGE.read_text(encoding="utf-8") == PAGE.write(PAGE.kinds()), "run `make docs`"
    assert len(NATIVE) > 60


# ---- Files, folders, names -------------------------------------------------------------------------------------------

TOWERS = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 384, "layers": 1},
    "text_cfg": {"context_length": 12, "width": 64, "heads": 1, "layers": 1},
}
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
PIXELS = {"mean": MEAN, "std": STD, "interpolation": "bilinear", "resize_mode": "squash"}
TEXTS = ["a red square", "a green circle on the grass", "two dogs"]


@pytest.fixture(scope="module")
def twin() -> torch.nn.Module:
    return random_twin(TOWERS, {})


@pytest.fixture(scope="module")
def quick_twin(twin: torch.nn.Module) -> torch.nn.Module:
    other = random_twin({**TOWERS, "quick_gelu": True}, {})
    other.load_state_dict(twin.state_dict())
    return other


def save(path: Path, model: torch.nn.Module, **config: object) -> Path:
    path.parent.mkdir(exist_ok=True)
    save_file(model.state_dict(), path)
    if config:
        (path.parent / "open_clip_config.json").write_text(json.dumps(config))
    return path


@torch.no_grad()
def assert_same(encoder: Encoder, theirs: torch.nn.Module, image_size: int = 32, length: int = 12) -> None:
    """The texts' and an image's vectors through the encoder's own tokenizer and preprocessing and OpenCLIP's."""
    compute = Compute(pick("cpu"), "float32")
    ids = open_clip.SimpleTokenizer(context_length=length)(TEXTS)
    mine_BE = text_matrix(encoder, TEXTS, compute)
    torch.testing.assert_close(mine_BE, theirs.encode_text(ids, normalize=True), atol=1e-4, rtol=0)
    how = encoder.preprocess
    picture = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    assert how.size == image_size
    transform = image_transform(
        image_size, is_train=False, mean=how.mean, std=how.std, interpolation=how.interpolation,
        resize_mode=how.resize_mode,
    )  # fmt: skip
    pixels = eval_transform(picture, how.size, interpolation=how.interpolation, resize_mode=how.resize_mode)
    mine_1E = encoder.image_features(torch.from_numpy(pixels.copy())[None], compute)
    theirs_1E = theirs.encode_image(transform(Image.fromarray(picture))[None], normalize=True)
    torch.testing.assert_close(mine_1E, theirs_1E, atol=1e-4, rtol=0)


def test_a_hub_folder_says_all(quick_twin, tmp_path) -> None:
    """Activation, mean, deviation, filter, resize mode and context length are the configuration's."""
    path = save(
        tmp_path / "hub" / "open_clip_model.safetensors",
        quick_twin,
        model_cfg={**TOWERS, "quick_gelu": True},
        preprocess_cfg=PIXELS,
    )
    encoder = load(tmp_path / "hub")
    assert_same(encoder, quick_twin)
    assert encoder.preprocess == Preprocess(32, MEAN, STD, "bilinear", "squash")
    assert encoder.summary == (
        f"model {tmp_path / 'hub'}: clipkit (OpenCLIP's weights), 32 px, squash, bilinear, mean 0.5 0.4 0.3, "
        "std 0.2 0.3 0.4, tokenizer clip-bpe, 12 text tokens, quick_gelu"
    )
    assert (encoder.notes, encoder.path) == ((), path)
    assert load(path).weights == encoder.weights


def test_openclips_training_file_and_its_averages(twin, tmp_path) -> None:
    """What `epoch_1.pt` holds: the weights among other things, with the prefix of data parallelism, in half precision;
    and averages."""
    state = {f"module.{name}": tensor.half() for name, tensor in twin.state_dict().items()}
    average = {f"module.{name}": tensor * 1.1 for name, tensor in twin.state_dict().items()}
    path = tmp_path / "epoch_1.pt"
    torch.save({"epoch": 1, "name": "run", "state_dict": state, "state_dict_ema": average}, path)
    encoder = load(path)
    scale = torch.tensor(1 / 0.07).log()
    torch.testing.assert_close(encoder.model.logit_scale, scale, atol=2e-3, rtol=0)
    torch.testing.assert_close(load(path, ema=True).model.logit_scale, scale * 1.1)
    (note,) = encoder.notes
    assert "doesn't say its activation and preprocessing: the exact GELU and CLIP's own are assumed" in note
    torch.save({"state_dict": state}, path)
    with pytest.raises(UserError, match=r"has no averages of its weights .*: omit --ema"):
        load(path, ema=True)


def test_openais_archive_runs_with_its_activation(quick_twin, tmp_path) -> None:
    numbers = {"input_resolution": 32, "context_length": 12, "vocab_size": 49408}
    state = {name: tensor.half() for name, tensor in quick_twin.state_dict().items()}
    torch.save(state | {name: torch.tensor(value) for name, value in numbers.items()}, tmp_path / "ViT.pt")
    encoder = load(tmp_path / "ViT.pt")
    assert "(OpenAI's weights)" in encoder.summary and encoder.summary.endswith("quick_gelu")
    assert encoder.notes == ()
    rounded = copy.deepcopy(quick_twin)
    rounded.load_state_dict(state)
    assert_same(encoder, rounded)
    # A configuration that says otherwise is OpenCLIP's trap: its ViT-B-32 with the tag openai.
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": TOWERS}))
    encoder = load(tmp_path / "ViT.pt")
    assert_same(encoder, rounded)
    assert encoder.notes == (f"{tmp_path / 'ViT.pt'} is OpenAI's, which was trained with quick_gelu: it runs with it",)


@pytest.fixture
def named(monkeypatch) -> None:
    """OpenCLIP with a tiny model `tiny-quickgelu` that has a tag of its own."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-quickgelu", {**TOWERS, "quick_gelu": True})
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", TOWERS)
    tag = {"url": "https://127.0.0.1:9/tiny.pt", "quick_gelu": True, **PIXELS}
    for name in ("tiny", "tiny-quickgelu"):
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, {"mine": tag})


def test_a_name_for_a_file(named, quick_twin, tmp_path) -> None:
    path = save(tmp_path / "weights.safetensors", quick_twin)
    encoder = load(f"open_clip:tiny-quickgelu:{path}")
    assert_same(encoder, quick_twin)
    assert encoder.preprocess.mean == MEAN  # all tags of the name have it
    assert encoder.notes == ()


def test_a_file_is_one_model_with_and_without_its_name(named, twin, tmp_path) -> None:
    """Else what was kept for one isn't found for the other."""
    path = save(tmp_path / "weights.safetensors", twin)
    by_shapes, by_name = load(path), load(f"open_clip:tiny:{path}")
    assert (by_shapes.weights, by_shapes.architecture) == (by_name.weights, by_name.architecture)


def test_a_tag_is_fetched_or_told_how(named, quick_twin, tmp_path, monkeypatch) -> None:
    path = save(tmp_path / "weights.safetensors", quick_twin)
    with pytest.raises(UserError) as raised:
        load("open_clip:tiny:mine")
    assert re.fullmatch(
        r"can't fetch the weights of open_clip:tiny:mine \(.*\): "
        r"download them elsewhere from https://127.0.0.1:9/tiny.pt, and give open_clip:tiny:FILE",
        str(raised.value),
    )
    monkeypatch.setattr(open_clip, "download_pretrained", lambda tag: str(path))
    encoder = load("open_clip:tiny:mine")
    assert_same(encoder, quick_twin)  # the tag knows its activation, the name doesn't
    assert encoder.preprocess == Preprocess(32, MEAN, STD, "bilinear", "squash")


ADAPTED = {
    "resnet": {**TOWERS, "quick_gelu": True, "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8}},
    "coca": {
        **TOWERS,
        "custom_text": True,
        "vision_cfg": {**TOWERS["vision_cfg"], "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        "text_cfg": {**TOWERS["text_cfg"], "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {"context_length": 12, "width": 64, "heads": 1, "layers": 1},
    },
    "timm": {
        **TOWERS,
        "custom_text": True,
        "vision_cfg": {"image_size": 64, "timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "mlp"},
    },
}


@pytest.mark.parametrize("kind", ADAPTED)
def test_other_models_run_in_openclips_code(kind: str, tmp_path) -> None:
    settings = copy.deepcopy(ADAPTED[kind])
    custom, coca = settings.pop("custom_text", False), "multimodal_cfg" in settings
    torch.manual_seed(0)
    theirs = (open_clip.CoCa if coca else open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**settings).eval()
    folder = tmp_path / kind
    folder.mkdir()
    torch.save(theirs.state_dict(), folder / "open_clip_pytorch_model.bin")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": ADAPTED[kind]}))
    before = torch.get_rng_state()
    encoder = load(folder)
    assert torch.equal(torch.get_rng_state(), before)
    assert encoder.origin == "open_clip (OpenCLIP's weights)"
    assert_same(encoder, theirs, ADAPTED[kind]["vision_cfg"]["image_size"])
    assert encoder.scale == pytest.approx(1 / 0.07)
    state = theirs.state_dict()
    del state["logit_scale"]
    torch.save(state, folder / "open_clip_pytorch_model.bin")
    with pytest.raises(UserError, match=r"the weights don't fit .* Missing key\(s\) in state_dict: \"logit_scale\""):
        load(folder)


def test_any_other_tokenizer_beside_the_weights(tmp_path) -> None:
    """As of OpenCLIP's `-worldwide` models, which are read at the first of their end tokens."""
    transformers = pytest.importorskip("transformers")
    words = ["<s>", "<pad>", "</s>", "<unk>", *sorted({word for text in TEXTS for word in text.split()})]
    fast = tokenizers.Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, "<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=fast, **special).save_pretrained(tmp_path)
    text = {**TOWERS["text_cfg"], "hf_tokenizer_name": "facebook/xlm-v-base", "pool_type": "eos", "eos_id": 2}
    config = {**TOWERS, "text_cfg": {**text, "vocab_size": 40}}
    theirs = open_clip.CLIP(**config).eval()
    save(tmp_path / "open_clip_model.safetensors", theirs, model_cfg=config)
    encoder = load(tmp_path)
    ids = open_clip.tokenizer.HFTokenizer(str(tmp_path), context_length=12)(TEXTS)
    assert encoder.tokenizer.rows(encoder.tokenizer.encode(TEXTS), 12).tolist() == ids.tolist()
    with torch.no_grad():
        features = theirs.encode_text(ids, normalize=True)
    torch.testing.assert_close(text_matrix(encoder, TEXTS, Compute(pick("cpu"), "float32")), features)


# ---- What is refused -------------------------------------------------------------------------------------------------


def refusal(source: object, **options: object) -> str:
    with pytest.raises(UserError) as raised:
        load(source, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"visual.extra.weight": torch.ones(2)}, "visual.extra.weight has no place in clipkit's model"),
        ({"logit_bias": torch.zeros(())}, "the model has no logit_bias: {path} is of another architecture"),
        ({"ln_final.weight": None}, "the checkpoint has no text.norm.weight: {path} is of another architecture"),
        (
            {"ln_final.weight": torch.ones(65)},
            "text.norm.weight has shape [65] in the checkpoint and [64] in",
        ),
        ({"positional_embedding": torch.ones(20, 64)}, "{path} has 20 text positions, its configuration a context"),
    ],
)
def test_tensors_missing_or_left_over(twin, tmp_path, change, says) -> None:
    path = save(tmp_path / "open_clip_model.safetensors", twin, model_cfg=TOWERS)
    state = {**twin.state_dict(), **change}
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, path)
    assert says.format(path=path) in refusal(tmp_path)


def test_image_positions_of_another_grid_are_told(twin, tmp_path) -> None:
    config = {**TOWERS, "vision_cfg": {**TOWERS["vision_cfg"], "image_size": 64}}
    path = save(tmp_path / "open_clip_model.safetensors", twin, model_cfg=config)
    assert load(tmp_path).notes == (f"{path} has 5 image positions, resized to 17 for 64 px",)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"visual.conv1.weight": torch.ones(400, 3, 16, 16)}, "doesn't say how many heads its towers"),
        ({"visual.ln_pre.weight": None}, "isn't of CLIP's plain towers (it has no visual.ln_pre.weight)"),
        ({"token_embedding.weight": torch.ones(32000, 64)}, "isn't of CLIP's plain towers"),
    ],
)
def test_shapes_that_do_not_decide(twin, tmp_path, change, says) -> None:
    state = {**twin.state_dict(), **change}
    path = tmp_path / "w.safetensors"
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, path)
    said = refusal(path)
    assert says in said
    assert said.endswith(f": name its architecture, open_clip:NAME:{path}, or put its open_clip_config.json beside it")


@pytest.mark.parametrize(
    ("preprocess", "says"),
    [
        ({"resize_mode": "longest"}, "resize_mode=longest: clipkit has shortest and squash only"),
        ({"interpolation": "random"}, "interpolation=random: clipkit has bicubic and bilinear only"),
        ({"mean": [0.5]}, "three numbers each are needed"),
    ],
)
def test_preprocessing_that_clipkit_does_not_have(twin, tmp_path, preprocess, says) -> None:
    save(tmp_path / "open_clip_model.safetensors", twin, model_cfg=TOWERS, preprocess_cfg=preprocess)
    assert says in refusal(tmp_path)


def test_images_that_are_not_square(twin, tmp_path) -> None:
    config = {**TOWERS, "vision_cfg": {**TOWERS["vision_cfg"], "image_size": [32, 64]}}
    save(tmp_path / "open_clip_model.safetensors", twin, model_cfg=config)
    assert refusal(tmp_path) == "the model takes images of [32, 64] px: clipkit evaluates square ones only"


def test_a_tokenizer_without_its_vocabulary(twin, tmp_path) -> None:
    siglip = {"hf_tokenizer_name": "timm/ViT-B-16-SigLIP", "tokenizer_kwargs": {"clean": "canonicalize"}}
    path = save(
        tmp_path / "open_clip_model.safetensors",
        twin,
        model_cfg={**TOWERS, "text_cfg": {**TOWERS["text_cfg"], **siglip}},
    )
    assert "has no vocabulary of its own: give its file with --tokenizer" in refusal(path)
    few = {**TOWERS["text_cfg"], **siglip, "vocab_size": 10}
    save(path, random_twin({**TOWERS, "text_cfg": few}, {}), model_cfg={**TOWERS, "text_cfg": few})
    said = refusal(path, vocabulary=write_sentencepiece(tmp_path / "other.model"))
    assert f"{path} has room for 10 ids, its tokenizer has " in said
    other = {"hf_tokenizer_name": "facebook/xlm-v-base"}
    save(path, twin, model_cfg={**TOWERS, "text_cfg": {**TOWERS["text_cfg"], **other}})
    said = f"{path} can't be used: clipkit doesn't have the tokenizer facebook/xlm-v-base: "
    assert refusal(path) == f"{said}put its tokenizer.json and tokenizer_config.json beside it"


def test_names_that_say_too_little(named, tmp_path) -> None:
    assert "has no model 'ViT-B-3': try ViT-B-32" in refusal("open_clip:ViT-B-3:openai")
    assert "names no weights: give open_clip:tiny:WEIGHTS with a file of weights or one of its tags (mine)" in refusal(
        "open_clip:tiny"
    )
    assert "open_clip:tiny:other: other doesn't exist: give a file" in refusal("open_clip:tiny:other")
    assert refusal(tmp_path / "none") == f"checkpoint {tmp_path / 'none'} doesn't exist: check the path"
    (tmp_path / "open_clip_config.json").write_text("{}")
    assert "has open_clip_config.json without weights" in refusal(tmp_path)
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"")
    assert "isn't a file of weights" in refusal(tmp_path)


# ---- Through the command ---------------------------------------------------------------------------------------------


def zeroshot(data: Path, *arguments: object) -> Result:
    task = ["--data", data, "--label", "group", "--templates", "a {}", "--device", "cpu", "--batch-size", 16]
    return CliRunner().invoke(main, [str(each) for each in ("zeroshot", *task, *arguments)])


def save_without_vocabulary(folder: Path, twin) -> Path:
    siglip = {
        "hf_tokenizer_name": "timm/ViT-B-16-SigLIP2",
        "tokenizer_kwargs": {"clean": "canonicalize"},
        "pool_type": "last",
        "no_causal_mask": True,
    }
    config = {**TOWERS, "text_cfg": {**TOWERS["text_cfg"], **siglip}}
    save(folder / "open_clip_model.safetensors", twin, model_cfg=config)
    return folder


def test_zeroshot_says_what_it_measures_and_warns_of_chance(tmp_path, twin) -> None:
    save_without_vocabulary(tmp_path / "hub", twin)
    data = tmp_path / "emoji.parquet"
    pq.write_table(pq.read_table(embedded.emoji_parquet("heldout")).slice(0, 64), data)
    result = zeroshot(data, "--ckpt", tmp_path / "hub")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "give its file with --tokenizer" in result.stderr
    vocabulary = write_sentencepiece(tmp_path / "spiece.model")
    result = zeroshot(data, "--ckpt", tmp_path / "hub", "--tokenizer", vocabulary, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.stderr
    assert "32 px, shortest, bicubic, mean 0.4815 0.4578 0.4082, std 0.2686 0.2613 0.2758, " in result.stderr
    assert "tokenizer sentencepiece, 12 text tokens, gelu\n" in result.stderr
    assert "Warning: emoji-group: top-1 is " in result.stderr
    assert load(tmp_path / "hub", vocabulary=vocabulary).tokenizer.pad == 0
    ema = zeroshot(data, "--ckpt", tmp_path / "hub", "--tokenizer", vocabulary, "--ema")
    assert ema.exit_code == 2
    assert "has no averages of its weights" in ema.stderr


def test_all_commands_take_the_tokenizer_of_a_model_without(tmp_path, twin, monkeypatch) -> None:
    hub, vocabulary = save_without_vocabulary(tmp_path / "hub", twin), write_sentencepiece(tmp_path / "spiece.model")
    rows = pq.read_table(embedded.emoji_parquet("heldout")).slice(0, 3)
    image = tmp_path / "a.png"
    image.write_bytes(rows["image"][0].as_py())
    data, vectors, scores = tmp_path / "emoji.parquet", tmp_path / "vectors.parquet", tmp_path / "scores.parquet"
    pq.write_table(pa.table({"image": rows["image"], "caption": ["a cat", "a dog", "a sun"]}), data)

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(main, [*map(str, arguments), "--device", "cpu"])

    for command in (
        ("classify", image, "--labels", "a cat,a dog"),
        ("embed", data, vectors),
        ("score", data, "--out", scores),
        ("search", data, "a cat"),
    ):
        without = run(*command, "--ckpt", hub)
        assert (without.exit_code, "give its file with --tokenizer" in without.stderr) == (2, True), command
        done = run(*command, "--ckpt", hub, "--tokenizer", vocabulary)
        assert done.exit_code == 0, done.output
    file = run("search", vectors, "a cat")
    assert (file.exit_code, file.stdout) == (0, done.stdout), "the file of vectors knows it"
    monkeypatch.setattr(vocabularies, "CAPTIONS", [*vocabularies.CAPTIONS, "another sentence of other words"])
    other = run("embed", data, vectors, "--ckpt", hub, "--tokenizer", write_sentencepiece(tmp_path / "other.model"))
    assert (other.exit_code, "has vectors of another vocabulary: remove it" in other.stderr) == (2, True)


def test_a_checkpoint_of_clipkits_has_its_tokenizer(tmp_path) -> None:
    assert refusal(tmp_path, vocabulary=Path("v")).endswith("was trained with: leave out --tokenizer v")
    save_file({"image.trunk.pos_embed": torch.ones(1)}, tmp_path / "model.safetensors")
    assert refusal(tmp_path / "model.safetensors").endswith("is of a checkpoint of clipkit's: give its folder")
