"""transformers' CLIP and SigLIP in our own model: random weights of theirs, the same features, and what is refused."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from openclip_twin import captions, images
from PIL import Image
from vocabularies import CAPTIONS, write_sentencepiece

import clipkit
from clipkit.embedding.encoder import Encoder
from clipkit.errors import UserError
from clipkit.interop.load import load
from clipkit.interop.tokenizer_files import FolderTokenizer, write_clip_files
from clipkit.interop.transformers import their_preprocess, to_theirs
from clipkit.pixels.images import Preprocess, eval_transform, normalise
from clipkit.text.tokenizer import Tokenizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

VISION = {"hidden_size": 32, "intermediate_size": 76, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**VISION, "max_position_embeddings": 12}
VISION = {**VISION, "image_size": 32, "patch_size": 8}


def write_folder(folder: Path, kind: str, act: str, **text: Any) -> torch.nn.Module:
    """A folder as transformers' own classes write it, and their model."""
    torch.manual_seed(0)
    towers = {"text_config": {**TEXT, "hidden_act": act, **text}, "vision_config": {**VISION, "hidden_act": act}}
    if kind == "clip":
        model = transformers.CLIPModel(transformers.CLIPConfig(**towers, projection_dim=16))
    else:
        ids = {"bos_token_id": None, "eos_token_id": 1}
        model = transformers.SiglipModel(
            transformers.SiglipConfig(**{**towers, "text_config": {**towers["text_config"], **ids}})
        )
    for parameter in model.parameters():  # zeros and ones would hide what isn't copied
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    preprocess = Preprocess(32) if kind == "clip" else Preprocess(32, (0.5,) * 3, (0.5,) * 3, "bicubic", "squash")
    (folder / "preprocessor_config.json").write_text(json.dumps(their_preprocess(preprocess, kind)))
    if kind == "clip":
        write_clip_files(folder, 12)
    return model.eval()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    folder = tmp_path_factory.mktemp("clip")
    return folder, write_folder(folder, "clip", "quick_gelu")


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    folder = tmp_path_factory.mktemp("siglip")
    model = write_folder(folder, "siglip", "gelu_pytorch_tanh", vocab_size=60)
    write_sentencepiece(folder / "spiece.model")
    return folder, model


def pooled(output: Any) -> torch.Tensor:
    return torch.nn.functional.normalize(output.pooler_output, dim=-1)


@torch.no_grad()
def assert_same(encoder: Encoder, theirs: Any, ids: torch.Tensor) -> None:
    image = images(3, 32)
    for one, other in (
        (encoder.model.encode_image(image), pooled(theirs.get_image_features(image))),
        (encoder.model.encode_text(ids), pooled(theirs.get_text_features(ids.long()))),
    ):
        assert (other[0] - other[1]).abs().max() > 1e-2
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder.model.logit_scale, theirs.logit_scale.reshape(()))


def test_clip_is_the_same_with_its_own_activation(clip, tmp_path) -> None:
    folder, theirs = clip
    encoder = load(folder)
    assert encoder.origin == "clipkit (transformers' weights)"
    assert isinstance(encoder.tokenizer, Tokenizer)
    assert (encoder.context_length, encoder.preprocess, encoder.fixed_length) == (12, Preprocess(32), False)
    assert_same(encoder, theirs, captions(3, 12))
    other = write_folder(tmp_path, "clip", "gelu")
    assert_same(load(tmp_path), other, captions(3, 12))


def test_siglip_is_the_same(siglip) -> None:
    folder, theirs = siglip
    encoder = load(folder)
    ids = torch.from_numpy(encoder.tokenizer.rows(encoder.tokenizer.encode(CAPTIONS), 12))
    assert_same(encoder, theirs, ids)
    assert encoder.preprocess == Preprocess(32, (0.5,) * 3, (0.5,) * 3, "bicubic", "squash")
    torch.testing.assert_close(encoder.model.state_dict()["logit_bias"], theirs.logit_bias.reshape(()))


@pytest.mark.parametrize("which", ["clip", "siglip"])
def test_there_and_back_again(which, request) -> None:
    folder, theirs = request.getfixturevalue(which)
    back, state = to_theirs(load(folder).model, which), theirs.state_dict()
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_texts_and_images_end_up_as_in_transformers(clip, siglip) -> None:
    texts = ["a photo of a cat", "Two RED dogs, running!"]
    for (folder, _), name in ((clip, "CLIP"), (siglip, "Siglip")):
        encoder = load(folder)
        tokenizer = getattr(transformers, f"{name}Tokenizer").from_pretrained(folder)
        theirs = tokenizer(texts, padding="max_length", truncation=True, max_length=12, return_tensors="np")[
            "input_ids"
        ]
        ours = encoder.tokenizer.rows(encoder.tokenizer.encode(texts), 12)
        end = tokenizer.eos_token_id
        for one, other in zip(ours, theirs, strict=True):  # CLIP pads with its end, we with 0: neither is read
            length = list(other).index(end) + 1
            assert list(one[:length]) == list(other[:length])
        pixels = np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)
        processor = getattr(transformers, f"{name}ImageProcessorPil").from_pretrained(folder)
        whole = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
        how = encoder.preprocess
        own = eval_transform(pixels, how.size, how.interpolation, how.resize_mode)
        own = normalise(torch.from_numpy(own.copy())[None], how.mean, how.std)
        torch.testing.assert_close(own, whole, atol=1e-5, rtol=0)


def test_a_tokenizer_json_runs_as_it_is(siglip, tmp_path) -> None:
    """As SigLIP 2 has it: byte pairs, an end, padding, and lower case, which the file doesn't ask for."""
    folder = Path(shutil.copytree(siglip[0], tmp_path / "two"))
    (folder / "spiece.model").unlink()
    vocabulary = {piece: number for number, piece in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", *"abcdgort", "▁"])}
    fast = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>"))
    fast.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    fast.post_processor = tokenizers.processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="right"
    )
    theirs.save_pretrained(folder)
    encoder = load(folder)
    assert isinstance(encoder.tokenizer, FolderTokenizer)
    assert "texts are put in lower case" in encoder.notes[0]
    texts = ["A Cat", "a dog too good to be cut or not"]
    padded = theirs([text.lower() for text in texts], padding="max_length", truncation=True, max_length=12)["input_ids"]
    assert encoder.tokenizer.rows(encoder.tokenizer.encode(texts), 12).tolist() == padded
    assert encoder.tokenizer.specials == 1


@pytest.mark.parametrize("side", [None, "right"])
def test_gemmas_tokenizer_pads_on_the_side_of_its_class(siglip, tmp_path, side) -> None:
    folder = Path(shutil.copytree(siglip[0], tmp_path / "two"))
    (folder / "spiece.model").unlink()
    vocabulary = {piece: number for number, piece in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", *"acdgost", "▁"])}
    theirs = transformers.GemmaTokenizer(vocab=vocabulary, merges=[], **({"padding_side": side} if side else {}))
    theirs.save_pretrained(folder)
    tokenizer, texts = load(folder).tokenizer, ["a cat", "a dog too good to be cut"]
    padded = theirs(texts, padding="max_length", truncation=True, max_length=12)["input_ids"]
    assert tokenizer.rows(tokenizer.encode(texts), 12).tolist() == padded


def test_of_two_files_that_which_transformers_reads_counts(clip, tmp_path) -> None:
    """It leaves those that it, or an older version of it, wrote before."""
    folder = Path(shutil.copytree(clip[0], tmp_path / "again"))
    processor = transformers.CLIPProcessor.from_pretrained(folder)
    processor.image_processor.resample, processor.image_processor.image_mean = 2, [0.5] * 3
    processor.save_pretrained(folder)
    assert (folder / "preprocessor_config.json").is_file()
    assert load(folder).preprocess == Preprocess(32, (0.5,) * 3, interpolation="bilinear")

    theirs = clip[1].from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    theirs.save_pretrained(folder, max_shard_size="1MB")
    assert_same(load(folder), theirs.eval(), captions(3, 12))
    shards = {path: path.read_bytes() for path in folder.glob("model-*.safetensors")}
    theirs.text_projection.weight.data.add_(1)
    theirs.save_pretrained(folder)
    assert (folder / "model.safetensors.index.json").is_file()
    for path, content in shards.items():
        path.write_bytes(content)
    assert_same(load(folder), theirs, captions(3, 12))


def test_a_rest_beside_the_patches_is_not_seen(tmp_path) -> None:
    """As of SigLIP's SO400M, whose 384 px aren't a multiple of its patches of 14."""
    text, vision = {**TEXT, "vocab_size": 60}, {**VISION, "image_size": 384, "patch_size": 14}
    theirs = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision)).eval()
    theirs.save_pretrained(tmp_path)
    write_sentencepiece(tmp_path / "spiece.model")
    preprocess = Preprocess(384, (0.5,) * 3, (0.5,) * 3, "bicubic", "squash")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(their_preprocess(preprocess, "siglip")))
    with torch.no_grad():
        ours, other = load(tmp_path).model.encode_image(images(2, 384)), theirs.get_image_features(images(2, 384))
    torch.testing.assert_close(ours, pooled(other), atol=1e-5, rtol=0)


def test_a_script_loads_a_folder(clip) -> None:
    model = clipkit.load(clip[0], device="cpu")
    assert model.encode_text(["a cat", "a dog"]).shape == (2, 16)


# ---- What is refused -------------------------------------------------------------------------------------------------


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def without(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def towers(**values: Any) -> Any:
    return lambda folder: change(
        folder / "config.json",
        vision_config=json.loads((folder / "config.json").read_text())["vision_config"] | values,
    )


def processor(**values: Any) -> Any:
    return lambda folder: change(folder / "preprocessor_config.json", **values)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (without("preprocessor_config.json"), "has no preprocessor_config.json, so nobody knows its mean and size"),
        (without("vocab.json"), "has no tokenizer: copy its tokenizer.json, or vocab.json and merges.txt too"),
        (lambda folder: change(folder / "vocab.json", more=1), "aren't CLIP's own: copy its tokenizer.json too"),
        (without("model.safetensors"), "has a config.json and no model.safetensors: copy the whole folder"),
        (lambda folder: change(folder / "config.json", model_type="siglip2"), "is a NaFlex model of SigLIP 2"),
        (lambda folder: change(folder / "config.json", model_type="bert"), "is transformers' 'bert', not a model"),
        (towers(hidden_act="relu"), "asks for hidden_act 'relu': quick_gelu, gelu,"),
        (towers(num_channels=1), "doesn't take square RGB images"),
        (towers(num_hidden_layers=3), "has no image.trunk.blocks.2.norm1.weight"),
        (towers(num_hidden_layers=1), "the model has no vision_model.encoder.layers.1."),
        (towers(patch_size=4), "image.trunk.pos_embed has shape [17, 32], and config.json asks for [1, 65, 32]"),
        (processor(do_normalize=False), "leaves out do_normalize, which every model here does"),
        (processor(resample=1), "resizes with Pillow's filter 1"),
        (processor(size={"shortest_edge": 36}), "resizes and crops to 32, 36; here both must be the model's 32"),
        (processor(do_center_crop=False), "crops nothing"),
        (processor(do_rescale=None), "leaves out do_rescale, which every model here does"),
        (processor(size={"shortest_edge": 32, "longest_edge": 64}), "resizes and crops to 32, 64; here both must be"),
    ],
)  # fmt: skip
def test_what_is_refused(clip, tmp_path, damage, says) -> None:
    folder = Path(shutil.copytree(clip[0], tmp_path / "copy"))
    damage(folder)
    with pytest.raises(UserError) as raised:
        load(folder)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


def test_ids_of_the_hub(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        UserError, match=r"hf:openai/clip isn't in the cache of Hugging Face's models, .*: give the folder"
    ):
        load("hf:openai/clip")
    with pytest.raises(UserError, match="hf:clip isn't an id of a model: write hf:OWNER/NAME"):
        load("hf:clip")


def test_a_folder_of_transformers_has_no_averages(clip) -> None:
    with pytest.raises(UserError, match="has no averages of its weights: omit --ema"):
        load(clip[0], ema=True)
