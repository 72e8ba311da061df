"""The CLIP and SigLIP of Hugging Face's `transformers` under our names, and ours under theirs.

Their folders are read without their package: `config.json` has the architecture, `preprocessor_config.json` what is
done to an image, `model.safetensors` the weights. SigLIP 2 at a fixed size is a SigLIP with another tokenizer; its
NaFlex models take images of every shape, which nothing here does.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from clipkit.embedding.encoder import Encoder, clip_encoder
from clipkit.errors import UserError, one_line
from clipkit.interop.files import read_weights
from clipkit.interop.tokenizer_files import read_tokenizer
from clipkit.model.clip import CLIP, allocate, load_state
from clipkit.model.config import Activation, ImageConfig, ModelConfig, TextConfig, exact_ratio
from clipkit.pixels.images import CLIP_MEAN, CLIP_STD, Interpolation, Preprocess, ResizeMode
from clipkit.storage.files import read_json

Kind = Literal["clip", "siglip"]

PREFIX = "hf:"
ACTIVATIONS: dict[str, Activation] = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
# What their classes take for a field that a config.json leaves out.
_TOWER = {"num_hidden_layers": 12, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_SIGLIP_TOWER = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
DEFAULTS: dict[Kind, dict[str, dict[str, Any]]] = {
    "clip": {
        "text": _TOWER
        | {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "vocab_size": 49408}
        | {"max_position_embeddings": 77, "eos_token_id": 49407},
        "vision": _TOWER
        | {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
        | {"image_size": 224, "patch_size": 32, "num_channels": 3},
    },
    "siglip": {
        "text": _SIGLIP_TOWER | {"vocab_size": 32000, "max_position_embeddings": 64, "projection_size": None},
        "vision": _SIGLIP_TOWER | {"image_size": 224, "patch_size": 16, "num_channels": 3, "vision_use_head": True},
    },
}
# Pillow's numbers of its filters, which are what `resample` holds.
FILTERS: dict[int, Interpolation] = {2: "bilinear", 3: "bicubic"}


def load_transformers(folder: Path, name: str) -> Encoder:
    """The model in a folder that `save_pretrained` of transformers' CLIPModel or SiglipModel wrote.

    Raises UserError for another kind of model, for a file that is missing, and for weights of another architecture.
    """
    values = read_json(folder / "config.json")
    kind = kind_of(values, folder)
    config = model_config(values, folder)
    preprocess = read_preprocess(folder, kind, config.image.image_size)
    tokenizer, notes = read_tokenizer(folder, kind, config.text.vocab_size)
    model = allocate(config)
    tensors = from_theirs(read_folder_weights(folder), model, kind)
    check_positions(tensors, model, folder)
    load_state(model, tensors, remedy=f"{folder}/config.json is of another model than its weights: copy both again")
    origin = "clipkit (transformers' weights)"
    return clip_encoder(model.eval(), tokenizer, preprocess, name=name, path=folder, origin=origin, notes=notes)


def is_transformers(folder: Path) -> bool:
    """Whether a folder is one of transformers', of whatever model."""
    path = folder / "config.json"
    values = read_json(path) if path.is_file() else None
    return isinstance(values, dict) and "model_type" in values


def find_on_hub(source: str) -> Path:
    """The folder of `hf:OWNER/NAME` in Hugging Face's cache, downloaded when it isn't there.

    Raises UserError for what is neither in the cache nor to be had.
    """
    from huggingface_hub import snapshot_download

    name = source.removeprefix(PREFIX)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(
            f"{source} isn't an id of a model: write {PREFIX}OWNER/NAME, such as hf:openai/clip-vit-base-patch32"
        )
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"]))
    except (OSError, ValueError, RuntimeError) as error:  # what the network and the hub can answer
        raise UserError(
            f"{source} isn't in the cache of Hugging Face's models, and can't be downloaded "
            f"({one_line(error)[:120]}): give the folder of a copy"
        ) from error


# ---- Architecture ----------------------------------------------------------------------------------------------------


def kind_of(values: Mapping[str, Any], folder: Path) -> Kind:
    """Whether this is a CLIP or a SigLIP. Raises UserError otherwise."""
    match values.get("model_type"):
        case "clip" | "siglip" as kind if "text_config" in values or "vision_config" in values:
            return cast(Kind, kind)
        case "siglip2":
            raise UserError(
                f"{folder} is a NaFlex model of SigLIP 2, which takes images of every shape: "
                "take SigLIP 2 of a fixed size, such as siglip2-base-patch16-224"
            )
    raise UserError(
        f"{folder} is transformers' {values.get('model_type')!r}, not a model of both images and texts that is known "
        "here: take a CLIPModel or SiglipModel"
    )


def model_config(values: Mapping[str, Any], folder: Path) -> ModelConfig:
    """The architecture that a `config.json` of transformers describes. Raises UserError for what has no counterpart."""
    kind = kind_of(values, folder)
    text, vision = tower_values(values, kind, "text"), tower_values(values, kind, "vision")
    where = f"{folder}/config.json"
    for tower in (text, vision):
        if tower["hidden_act"] not in ACTIVATIONS:
            raise UserError(f"{where} asks for hidden_act {tower['hidden_act']!r}: {', '.join(ACTIVATIONS)} are known")
    if vision["num_channels"] != 3 or not all(isinstance(vision[name], int) for name in ("image_size", "patch_size")):
        raise UserError(f"{where} is of an image tower that doesn't take square RGB images: take another model")
    is_clip = kind == "clip"
    if not is_clip and not vision["vision_use_head"]:
        raise UserError(f"{where} is of a SigLIP without its pooling head (vision_use_head): take a whole SiglipModel")
    if is_clip and text["eos_token_id"] not in (2, text["vocab_size"] - 1):
        # 2 stands for the largest id in files of before 2023.
        raise UserError(
            f"{where} reads texts at the id {text['eos_token_id']}, here it is the largest, {text['vocab_size'] - 1}: "
            "take a model with CLIP's own vocabulary"
        )
    # SigLIP's SO400M doesn't see the last of its 384 px, and neither does timm's of that name.
    is_so400m = (vision["image_size"], vision["patch_size"]) == (384, 14)
    image = ImageConfig(
        **({"name": "vit_so400m_patch14_siglip_384"} if is_so400m else {"patch_size": vision["patch_size"]}),
        image_size=vision["image_size"],
        pooling="token" if is_clip else "attention",
        class_token=is_clip,
        pre_norm=is_clip,
        projection="linear" if is_clip else "none",
        **sizes(vision),
    )
    text_config = TextConfig(
        context_length=text["max_position_embeddings"],
        vocab_size=text["vocab_size"],
        tokenizer="clip-bpe" if is_clip else "sentencepiece",
        causal=is_clip,
        pooling="end" if is_clip else "last",
        projection="linear" if is_clip else "bias",
        **sizes(text),
    )
    embed_dim = values.get("projection_dim", 512) if is_clip else text["projection_size"] or text["hidden_size"]
    return ModelConfig(embed_dim, image, text_config, logit_bias_init=None if is_clip else -10.0)


def tower_values(values: Mapping[str, Any], kind: Kind, tower: str) -> dict[str, Any]:
    """All fields of one tower. Old files have `text_config_dict` too, which their classes prefer, and take whole."""
    old = values.get(f"{tower}_config_dict")
    return DEFAULTS[kind][tower] | (old if isinstance(old, dict) else values.get(f"{tower}_config") or {})


def sizes(tower: Mapping[str, Any]) -> dict[str, Any]:
    """What both towers' configurations call the same."""
    width, hidden = tower["hidden_size"], tower["intermediate_size"]
    return {
        "width": width,
        "depth": tower["num_hidden_layers"],
        "heads": tower["num_attention_heads"],
        "mlp_ratio": exact_ratio(hidden, width),
        "act": ACTIVATIONS[tower["hidden_act"]],
        "norm_eps": tower["layer_norm_eps"],
    }


def their_config(model: CLIP, kind: Kind) -> dict[str, Any]:
    """The `config.json` of a model as transformers' CLIPModel or SiglipModel."""
    config, trunk = model.config, cast(Any, model.image).trunk
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    vision = {
        "hidden_size": trunk.embed_dim,
        "intermediate_size": trunk.blocks[0].mlp.fc1.out_features,
        "num_hidden_layers": len(trunk.blocks),
        "num_attention_heads": trunk.blocks[0].attn.num_heads,
        "hidden_act": names[config.image.act],
        "layer_norm_eps": config.image.norm_eps,
        "image_size": config.image.image_size,
        "patch_size": trunk.patch_embed.patch_size[0],
    }
    text = {
        "hidden_size": config.text.width,
        "intermediate_size": int(config.text.width * config.text.mlp_ratio),
        "num_hidden_layers": config.text.depth,
        "num_attention_heads": config.text.heads,
        "hidden_act": names[config.text.act],
        "layer_norm_eps": config.text.norm_eps,
        "max_position_embeddings": config.text.context_length,
        "vocab_size": config.text.vocab_size,
    }
    if kind == "clip":
        ends = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
        return {
            "architectures": ["CLIPModel"],
            "model_type": "clip",
            "projection_dim": config.embed_dim,
            "text_config": text | ends | {"model_type": "clip_text_model", "projection_dim": config.embed_dim},
            "vision_config": vision | {"model_type": "clip_vision_model", "projection_dim": config.embed_dim},
        }
    return {
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "text_config": text
        | {"model_type": "siglip_text_model", "projection_size": config.embed_dim}
        | {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 1},
        "vision_config": vision | {"model_type": "siglip_vision_model"},
    }


# ---- Weights ---------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """The same numbers in both: our tensors one behind another are theirs one behind another."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]


# Of these the shapes differ by ones.
RESHAPED = {"image.trunk.cls_token", "image.trunk.pos_embed", "logit_scale", "logit_bias"}


def pairs(model: CLIP, kind: Kind) -> list[Pair]:
    """The names of all tensors that a model of this kind has."""
    names = [("logit_scale", "logit_scale")]
    image, text = "image.trunk", "text_model"
    ends = ("weight", "bias")
    names += [
        (f"{image}.patch_embed.proj.weight", "vision_model.embeddings.patch_embedding.weight"),
        (f"{image}.pos_embed", "vision_model.embeddings.position_embedding.weight"),
        ("text.token_embedding.weight", f"{text}.embeddings.token_embedding.weight"),
        ("text.pos_embed", f"{text}.embeddings.position_embedding.weight"),
        *((f"{image}.norm.{end}", f"vision_model.post_layernorm.{end}") for end in ends),
        *((f"text.norm.{end}", f"{text}.final_layer_norm.{end}") for end in ends),
    ]
    found: list[Pair] = []
    if kind == "clip":
        names += [
            (f"{image}.cls_token", "vision_model.embeddings.class_embedding"),
            *((f"{image}.norm_pre.{end}", f"vision_model.pre_layrnorm.{end}") for end in ends),
            ("image_projection.weight", "visual_projection.weight"),
            ("text_projection.weight", "text_projection.weight"),
        ]
    else:
        names += [
            ("logit_bias", "logit_bias"),
            (f"{image}.patch_embed.proj.bias", "vision_model.embeddings.patch_embedding.bias"),
            (f"{image}.attn_pool.latent", "vision_model.head.probe"),
            *((f"text_projection.{end}", f"{text}.head.{end}") for end in ends),
        ]
        for ours, theirs in (("proj", "attention.out_proj"), ("norm", "layernorm"), ("mlp.fc1",) * 2, ("mlp.fc2",) * 2):
            names += [(f"{image}.attn_pool.{ours}.{end}", f"vision_model.head.{theirs}.{end}") for end in ends]
        for end in ends:
            ours_both = f"{image}.attn_pool.q.{end}", f"{image}.attn_pool.kv.{end}"
            found.append(Pair(ours_both, (f"vision_model.head.attention.in_proj_{end}",)))
    for ours, theirs, depth in (
        (image, "vision_model", len(cast(Any, model.image).trunk.blocks)),
        ("text", text, model.config.text.depth),
    ):
        for block in range(depth):
            one, other = f"{ours}.blocks.{block}", f"{theirs}.encoder.layers.{block}"
            for end in ends:
                qkv = tuple(f"{other}.self_attn.{part}_proj.{end}" for part in "qkv")
                found.append(Pair((f"{one}.attn.qkv.{end}",), qkv))
                names += [
                    (f"{one}.norm1.{end}", f"{other}.layer_norm1.{end}"),
                    (f"{one}.attn.proj.{end}", f"{other}.self_attn.out_proj.{end}"),
                    (f"{one}.norm2.{end}", f"{other}.layer_norm2.{end}"),
                    (f"{one}.mlp.fc1.{end}", f"{other}.mlp.fc1.{end}"),
                    (f"{one}.mlp.fc2.{end}", f"{other}.mlp.fc2.{end}"),
                ]
    return [Pair((ours,), (theirs,)) for ours, theirs in names] + found


def from_theirs(tensors: Mapping[str, Tensor], model: CLIP, kind: Kind) -> dict[str, Tensor]:
    """Their tensors under our names, float32, for `load_state`, which refuses what is left over under their own."""
    left = {name: tensor for name, tensor in tensors.items() if not name.endswith(".position_ids")}
    own = model.state_dict()
    found: dict[str, Tensor] = {}
    for pair in pairs(model, kind):
        if all(name in left for name in pair.theirs):
            values = [left.pop(name).detach().float() for name in pair.theirs]
            found |= divide(values, pair.ours)
    for name in RESHAPED & found.keys():
        if found[name].numel() == own[name].numel():
            found[name] = found[name].reshape(own[name].shape)
    return found | left


def to_theirs(model: CLIP, kind: Kind) -> dict[str, Tensor]:
    """A model's tensors under their names. Raises UserError for one that has no place there."""
    left = dict(model.state_dict())
    found: dict[str, Tensor] = {}
    for pair in pairs(model, kind):
        values = [left.pop(name) for name in pair.ours if name in left]
        if len(values) == len(pair.ours):
            found |= divide(values, pair.theirs)
    if left:
        raise UserError(f"transformers' {kind} has no place for {min(left)}: export to onnx")
    for name in ("class_embedding", "position_embedding.weight"):
        key = f"vision_model.embeddings.{name}"
        if key in found:
            found[key] = found[key].reshape((-1,) if name == "class_embedding" else found[key].shape[1:])
    if kind == "siglip":
        found |= {name: found[name].reshape(1) for name in ("logit_scale", "logit_bias")}
    return found


def divide(values: list[Tensor], names: tuple[str, ...]) -> dict[str, Tensor]:
    """Tensors one behind another, divided among so many names: thirds, of which the second of two names gets two."""
    if len(values) == len(names) == 1:
        return {names[0]: values[0]}
    whole = torch.cat(values)
    third = len(whole) // 3
    parts = whole.split({1: [len(whole)], 2: [third, 2 * third], 3: [third] * 3}[len(names)])
    return {name: part.clone() for name, part in zip(names, parts, strict=True)}


def read_folder_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, in one file or in several; one file comes first, as it may have been written over those.

    Raises UserError where there are none.
    """
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not whole.is_file() and index.is_file():
        names = sorted(set(read_json(index)["weight_map"].values()))
        return {name: tensor for file in names for name, tensor in read_weights(folder / file).items()}
    paths = [path for path in (whole, folder / "pytorch_model.bin") if path.is_file()]
    if not paths:
        raise UserError(f"{folder} has a config.json and no model.safetensors: copy the whole folder")
    return read_weights(paths[0])


def check_positions(tensors: Mapping[str, Tensor], model: CLIP, folder: Path) -> None:
    """UserError for positions of another number than the configuration says, which `load_state` would interpolate."""
    own = model.state_dict()
    for name in ("image.trunk.pos_embed", "text.pos_embed"):
        if name in tensors and tensors[name].shape != own[name].shape:
            raise UserError(
                f"{folder}: {name} has shape {list(tensors[name].shape)}, and config.json asks for "
                f"{list(own[name].shape)}: copy both files again"
            )


# ---- Preprocessing ---------------------------------------------------------------------------------------------------


def read_preprocess(folder: Path, kind: Kind, image_size: int) -> Preprocess:
    """What a folder's image processor does. Raises UserError for what `eval_transform` doesn't do."""
    # Newer versions write all processors into one file, and leave an older one's beside it.
    path = folder / "processor_config.json"
    values = read_json(path).get("image_processor") if path.is_file() else None
    if values is None:
        path = folder / "preprocessor_config.json"
        if not path.is_file():
            raise UserError(f"{folder} has no preprocessor_config.json, so nobody knows its mean and size: copy it too")
        values = read_json(path)
    is_clip = kind == "clip"
    wrong = [step for step in ("do_resize", "do_rescale", "do_normalize") if not values.get(step, True)]
    if wrong or values.get("rescale_factor", 1 / 255) not in (1 / 255, 0.00392156862745098):
        raise UserError(f"{path} leaves out {', '.join(wrong) or 'the scale of 1/255'}, which every model here does")
    resample = values.get("resample", 3)
    if resample not in FILTERS:
        raise UserError(f"{path} resizes with Pillow's filter {resample}: 2 (bilinear) and 3 (bicubic) are known")
    size = values.get("size", {"shortest_edge": 224} if is_clip else {"height": 224, "width": 224})
    size = {"shortest_edge": size} if isinstance(size, int) else size
    mode: ResizeMode = "shortest" if "shortest_edge" in size else "squash"
    sides = set(size.values()) if mode == "shortest" else {size.get("height"), size.get("width")}
    if values.get("do_center_crop", is_clip):
        crop = values.get("crop_size", 224)
        sides |= {crop} if isinstance(crop, int) else {crop.get("height"), crop.get("width")}
    elif mode == "shortest":
        raise UserError(f"{path} resizes the shorter side and crops nothing, so images keep their shape: take another")
    if sides != {image_size}:
        found = ", ".join(str(side) for side in sorted(sides, key=str))
        raise UserError(f"{path} resizes and crops to {found}; here both must be the model's {image_size}")
    half = (0.5, 0.5, 0.5)
    mean, std = (
        values.get("image_mean", CLIP_MEAN if is_clip else half),
        values.get("image_std", CLIP_STD if is_clip else half),
    )
    return Preprocess(image_size, tuple(mean), tuple(std), FILTERS[resample], mode)


def their_preprocess(preprocess: Preprocess, kind: Kind) -> dict[str, Any]:
    """The `preprocessor_config.json` of transformers' image processor that does the same."""
    size = preprocess.size
    square = {"height": size, "width": size}
    is_shortest = preprocess.resize_mode == "shortest"
    numbers = {name: number for number, name in FILTERS.items()}
    cropping = {"do_center_crop": True, "crop_size": square} if is_shortest else {"do_center_crop": False}
    return {
        "image_processor_type": "CLIPImageProcessor" if kind == "clip" else "SiglipImageProcessor",
        "processor_class": "CLIPProcessor" if kind == "clip" else "SiglipProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size} if is_shortest else square,
        "resample": numbers[preprocess.interpolation],
        **cropping,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }
