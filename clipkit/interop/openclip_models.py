"""OpenCLIP's and OpenAI's models by file, folder or name, with what they need beside their weights.

A file's architecture, activation, preprocessing and tokenizer come from the `open_clip_config.json` beside it, from the
name `open_clip:NAME:FILE`, or, for CLIP's plain towers, from the shapes in it. Whatever had to be assumed is said.
"""

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from clipkit.embedded import bert_vocabulary
from clipkit.embedding.encoder import Encoder, clip_encoder
from clipkit.errors import UserError, one_line
from clipkit.interop.files import read_weights
from clipkit.interop.openclip import OPENAI, convert
from clipkit.interop.openclip_adapter import adapted
from clipkit.interop.openclip_config import NotNativeError, native_config, pads_with_zero, preprocess_of, tokenizer_name
from clipkit.interop.tokenizer_files import FolderTokenizer
from clipkit.model.clip import CLIP, allocate, load_state
from clipkit.model.config import ModelConfig, exact_ratio
from clipkit.storage.files import read_json
from clipkit.text.sentence_piece import SentencePiece, canonicalize
from clipkit.text.tokenizer import WordTokenizer, clean, tidy
from clipkit.text.vocabulary import open_tokenizer
from clipkit.text.wordpiece import WordPiece

CONFIG = "open_clip_config.json"
PREFIX = "open_clip:"
# What OpenCLIP calls the weights in a folder, the first that is there, and tokenizers' files beside them.
FOLDER_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
VOCABULARIES = {
    "sentencepiece": ("spiece.model", "tokenizer.model", "sentencepiece.model"),
    "wordpiece": ("vocab.txt",),
}
CLEANING = {"whitespace": tidy, "lower": clean, "canonicalize": canonicalize}
# The width of a head isn't in the weights. In all published vision transformers it goes with the width of the tower.
HEAD_WIDTHS = {**dict.fromkeys((384, 512, 768, 896, 1024), 64), 1280: 80, 1408: 88, 1664: 104, 1792: 112}


@dataclass(frozen=True)
class Description:
    """What OpenCLIP's JSON says of a model, and what had to be assumed."""

    model_cfg: Mapping[str, Any]
    preprocess_cfg: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def from_file(path: Path, *, ema: bool = False, vocabulary: Path | None = None) -> Encoder:
    """A file of weights, with its JSON beside it or without. Raises UserError where what it is isn't certain."""
    tensors = read_weights(path, ema)
    beside = path.parent / CONFIG
    description = read_description(beside) if beside.is_file() else infer(path, tensors)
    return encoder_of(str(path), path, tensors, description, vocabulary)


def from_folder(folder: Path, *, ema: bool = False, vocabulary: Path | None = None) -> Encoder:
    """A folder with `open_clip_config.json` and weights, as OpenCLIP has them on the Hugging Face hub."""
    path = weights_in(folder)
    if path is None:
        raise UserError(f"{folder} has {CONFIG} without weights: put {' or '.join(FOLDER_WEIGHTS)} into it")
    return replace(from_file(path, ema=ema, vocabulary=vocabulary), name=str(folder))


def is_openclip(folder: Path) -> bool:
    """Whether a folder is of OpenCLIP: it has its configuration, and its weights or none of transformers'."""
    return (folder / CONFIG).is_file() and (weights_in(folder) is not None or not (folder / "config.json").is_file())


def weights_in(folder: Path) -> Path | None:
    """OpenCLIP's weights in a folder."""
    return next((folder / name for name in FOLDER_WEIGHTS if (folder / name).is_file()), None)


def from_name(spec: str, *, ema: bool = False, vocabulary: Path | None = None) -> Encoder:
    """`open_clip:NAME:FILE` or `open_clip:NAME:TAG`, by the names of the open_clip_torch package.

    A tag's weights are fetched, or taken from its cache. Raises UserError for names that it doesn't have, and where
    they can't be fetched.
    """
    try:
        import open_clip
    except ImportError as error:
        raise UserError(f'{spec} needs the package open_clip_torch: pip install "clipkit[openclip]"') from error
    name, _, weights = spec.removeprefix(PREFIX).partition(":")
    model_cfg = open_clip.get_model_config(name) if name in open_clip.list_models() else None
    if model_cfg is None:
        near = difflib.get_close_matches(name, open_clip.list_models(), n=3) or ["ViT-B-32"]
        raise UserError(f"open_clip_torch {open_clip.__version__} has no model {name!r}: try {', '.join(near)}")
    tags = {tag: open_clip.get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)}
    choice = f"a file of weights or one of its tags{' (' + ', '.join(tags) + ')' if tags else ', of which it has none'}"
    if not weights:
        raise UserError(f"{spec} names no weights: give {PREFIX}{name}:WEIGHTS with {choice}")
    path, tag = Path(weights), tags.get(weights.lower().replace("-", "_"))
    if path.is_file():
        description = described_by_tags(name, model_cfg, list(tags.values()))
    elif tag is not None:
        path = fetch_tag(spec, name, tag)
        # Each tag knows its activation, where the name may say another.
        description = Description({**model_cfg, "quick_gelu": bool(tag.get("quick_gelu"))}, tag)
    else:
        raise UserError(f"{spec}: {weights} doesn't exist: give {choice}")
    return encoder_of(spec, path, read_weights(path, ema), description, vocabulary)


def described_by_tags(name: str, model_cfg: Mapping[str, Any], tags: list[Mapping[str, Any]]) -> Description:
    """A named architecture for a file of weights: the package knows the preprocessing of those that it has tags for.

    Where its tags differ in it, CLIP's own is assumed.
    """
    keys = ("mean", "std", "interpolation", "resize_mode")
    ways = [{key: tag.get(key) for key in keys} for tag in tags]
    if ways and all(way == ways[0] for way in ways):
        return Description(model_cfg, ways[0])
    note = f"the preprocessing isn't known from {name}, CLIP's own is assumed: else put an {CONFIG} beside the weights"
    return Description(model_cfg, {}, (note,))


def fetch_tag(spec: str, name: str, tag: dict[str, Any]) -> Path:
    """A tag's file, fetched now or before. Raises UserError where it can't be had."""
    from open_clip import download_pretrained

    try:
        path = download_pretrained(tag)
    except Exception as error:  # of urllib, of huggingface_hub and of those below them
        place = f"huggingface.co/{tag['hf_hub'].strip('/')}" if tag.get("hf_hub") else tag.get("url")
        raise UserError(
            f"can't fetch the weights of {spec} ({one_line(error)[:120]}): "
            f"download them elsewhere from {place}, and give {PREFIX}{name}:FILE"
        ) from error
    if not path:
        raise UserError(f"{spec} has no weights to fetch: give {PREFIX}{name}:FILE")
    return Path(path)


def read_description(path: Path) -> Description:
    """`open_clip_config.json`. Raises UserError for a file of another kind."""
    content = read_json(path)
    model_cfg = content.get("model_cfg", content) if isinstance(content, dict) else {}
    preprocess_cfg = content.get("preprocess_cfg", {}) if isinstance(content, dict) else {}
    parts = (model_cfg, preprocess_cfg, model_cfg.get("vision_cfg"), model_cfg.get("text_cfg"))
    if not all(isinstance(part, dict) for part in parts) or not isinstance(model_cfg.get("embed_dim"), int):
        raise UserError(f"{path} isn't a configuration of OpenCLIP's: it needs model_cfg with vision_cfg and text_cfg")
    return Description(model_cfg, preprocess_cfg)


def infer(path: Path, tensors: Mapping[str, Tensor]) -> Description:
    """What the shapes of CLIP's plain towers decide. Raises UserError where they don't.

    The activation and the preprocessing are in no shape: they are known of OpenAI's own files, and assumed for others.
    """
    if any(name.startswith("image.trunk.") for name in tensors):
        raise UserError(f"{path} is of a checkpoint of clipkit's: give its folder")
    remedy = f"name its architecture, {PREFIX}NAME:{path}, or put its {CONFIG} beside it"
    state = {name.removeprefix("text."): tensor for name, tensor in tensors.items()}
    needed = ("visual.conv1.weight", "visual.positional_embedding", "visual.ln_pre.weight", "visual.proj")
    text = ("token_embedding.weight", "positional_embedding", "text_projection")
    for name in (*needed, *text):
        if name not in state:
            raise UserError(f"{path} isn't of CLIP's plain towers (it has no {name}): {remedy}")
    width, _, patch_size, _ = state["visual.conv1.weight"].shape
    side = math.isqrt(len(state["visual.positional_embedding"]))
    vocab_size, text_width = state["token_embedding.weight"].shape
    if side * side + 1 != len(state["visual.positional_embedding"]) or "cls_emb" in state or vocab_size != 49408:
        raise UserError(f"{path} isn't of CLIP's plain towers: {remedy}")
    if width not in HEAD_WIDTHS or text_width % 64:
        raise UserError(
            f"{path} doesn't say how many heads its towers of width {width} and {text_width} have: {remedy}"
        )
    vision_cfg = {
        "image_size": side * patch_size,
        "patch_size": patch_size,
        "width": width,
        "layers": blocks(state, "visual.transformer"),
        "head_width": HEAD_WIDTHS[width],
        "mlp_ratio": exact_ratio(len(state["visual.transformer.resblocks.0.mlp.c_fc.weight"]), width),
        "ls_init_value": 1.0 if "visual.transformer.resblocks.0.ls_1.gamma" in state else None,
    }
    text_cfg = {
        "context_length": len(state["positional_embedding"]),
        "width": text_width,
        "heads": text_width // 64,
        "layers": blocks(state, "transformer"),
    }
    model_cfg = {"embed_dim": state["text_projection"].shape[1], "vision_cfg": vision_cfg, "text_cfg": text_cfg}
    if set(tensors) & OPENAI:
        return Description({**model_cfg, "quick_gelu": True}, {})
    note = (
        f"{path} doesn't say its activation and preprocessing: the exact GELU and CLIP's own are assumed; if it is of "
        f"a -quickgelu model or was trained otherwise, {remedy}"
    )
    return Description(model_cfg, {}, (note,))


def blocks(state: Mapping[str, Tensor], tower: str) -> int:
    """How many blocks a tower has."""
    return len({match[1] for name in state if (match := re.match(rf"{tower}\.resblocks\.(\d+)\.", name))})


def encoder_of(
    name: str, path: Path, tensors: dict[str, Tensor], description: Description, vocabulary: Path | None
) -> Encoder:
    """Weights and their description as an encoder: clipkit's own model where it can be, else OpenCLIP's.

    Raises UserError for a tensor that is missing, left over or of another shape.
    """
    model_cfg, notes = description.model_cfg, description.notes
    weights = "OpenAI's weights" if set(tensors) & OPENAI else "OpenCLIP's weights"
    if set(tensors) & OPENAI and not model_cfg.get("quick_gelu"):
        model_cfg = {**model_cfg, "quick_gelu": True}
        notes = (*notes, f"{path} is OpenAI's, which was trained with quick_gelu: it runs with it")
    preprocess = preprocess_of(model_cfg, description.preprocess_cfg)
    tokenizer = tokenizer_of(name, model_cfg["text_cfg"], path.parent, vocabulary)
    room = model_cfg["text_cfg"].get("vocab_size", 49408)
    if tokenizer.vocab_size > room:
        raise UserError(
            f"{name} has room for {room:,} ids, its tokenizer has {tokenizer.vocab_size:,}: "
            "give the vocabulary that it was trained with by --tokenizer"
        )
    try:
        config = native_config(model_cfg)
    except NotNativeError as reason:
        return Encoder(
            adapted(name, model_cfg, tensors, str(reason)),
            tokenizer,
            preprocess,
            context_length=model_cfg["text_cfg"].get("context_length", 77),
            name=name,
            path=path,
            origin=f"open_clip ({weights})",
            activation="quick_gelu" if model_cfg.get("quick_gelu") else "",
            notes=notes,
        )
    model, resized = native_model(path, config, tensors)
    origin = f"clipkit ({weights})"
    return clip_encoder(model, tokenizer, preprocess, name=name, path=path, origin=origin, notes=(*notes, *resized))


def native_model(path: Path, config: ModelConfig, tensors: Mapping[str, Tensor]) -> tuple[CLIP, tuple[str, ...]]:
    """clipkit's own model with these weights, in evaluation mode, and what is to be said of it.

    Image positions of another grid are resized as OpenCLIP does. Raises UserError for all else that doesn't fit.
    """
    model, found = allocate(config), convert(tensors, config)
    notes: tuple[str, ...] = ()
    own, position = model.state_dict(), "image.trunk.pos_embed"
    if "text.pos_embed" in found and len(found["text.pos_embed"]) != config.text.context_length:
        raise UserError(
            f"{path} has {len(found['text.pos_embed'])} text positions, its configuration a context length of "
            f"{config.text.context_length}: correct the configuration"
        )
    if position in found and found[position].shape[1:] != own[position].shape[1:]:
        notes = (
            f"{path} has {found[position].shape[1]} image positions, resized to {own[position].shape[1]} "
            f"for {config.image.image_size} px",
        )
    load_state(model, found, remedy=f"{path} is of another architecture than its configuration says")
    return model.eval(), notes


def tokenizer_of(
    name: str, text_cfg: Mapping[str, Any], folder: Path, vocabulary: Path | None
) -> WordTokenizer | FolderTokenizer:
    """The tokenizer with OpenCLIP's ids, its file the one that is given, or else the one beside the weights.

    Raises UserError where it needs a file and has none, and for a tokenizer that clipkit doesn't have.
    """
    try:
        kind = tokenizer_name(text_cfg)
    except NotNativeError as reason:
        if text_cfg.get("hf_model_name") or not (folder / "tokenizer.json").is_file():
            beside = (
                "" if text_cfg.get("hf_model_name") else ": put its tokenizer.json and tokenizer_config.json beside it"
            )
            raise UserError(f"{name} can't be used: clipkit doesn't have {reason}{beside}") from reason
        return CleanedTokenizer(folder, text_cfg.get("tokenizer_kwargs") or {})
    if vocabulary is None:
        vocabulary = next((folder / each for each in VOCABULARIES.get(kind, ()) if (folder / each).is_file()), None)
    if kind == "sentencepiece" and vocabulary is not None:
        return SentencePiece(vocabulary, **({"pad": 0} if pads_with_zero(text_cfg) else {}))
    if kind == "wordpiece":
        return WordPiece(vocabulary or bert_vocabulary(), end=0)
    return open_tokenizer(kind, vocabulary)


class CleanedTokenizer(FolderTokenizer):
    """Any other tokenizer, by its `tokenizer.json`, of texts that are cleaned as OpenCLIP does first."""

    def __init__(self, folder: Path, options: Mapping[str, Any]) -> None:
        if set(options) - {"clean"} or options.get("clean", "whitespace") not in CLEANING:
            raise UserError(f"{folder / CONFIG} has tokenizer_kwargs {dict(options)}, which clipkit doesn't have")
        super().__init__(folder, lower=False)
        self.clean = CLEANING[options.get("clean", "whitespace")]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without specials, not cut."""
        return super().encode([self.clean(text) for text in texts])
