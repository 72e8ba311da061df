"""timm's folder: the image tower, its projection as the classifier; `timm.create_model("local-dir:…")` loads it."""

from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from clipkit.embedding.encoder import Encoder
from clipkit.errors import UserError
from clipkit.export.parity import Peer, check_shapes
from clipkit.model.clip import CLIP
from clipkit.model.config import exact_ratio
from clipkit.model.image_tower import ConvStem
from clipkit.model.timm_tower import TimmTower
from clipkit.storage.files import write_json

# Of timm's plain vision transformers, one for each epsilon of its norms.
PLAIN = {1e-6: "vit_base_patch16_224", 1e-5: "vit_base_patch16_clip_224"}


def write(encoder: Encoder, model: CLIP, folder: Path) -> None:
    """Write the folder of a model that passes `check`."""
    name, arguments = architecture(model)
    tower, tensors = tower_tensors(model)
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "model.safetensors")
    how, size, classes = encoder.preprocess, model.config.image.image_size, tower.num_classes
    pretrained = {
        "input_size": [3, size, size],
        "fixed_input_size": "img_size" in arguments,
        "interpolation": how.interpolation,
        "crop_pct": 1.0,
        "crop_mode": "center" if how.resize_mode == "shortest" else "squash",
        "mean": list(how.mean),
        "std": list(how.std),
        "num_classes": classes,
        **{key: tower.pretrained_cfg[key] for key in ("first_conv", "classifier") if key in tower.pretrained_cfg},
    }
    about = {"architecture": name, "num_classes": classes, "num_features": tower.num_features}
    write_json(folder / "config.json", {**about, "model_args": arguments, "pretrained_cfg": pretrained})


@torch.no_grad()
def tower_tensors(model: CLIP) -> tuple[Any, dict[str, Tensor]]:
    """timm's tower, its weights not yet ours, and all tensors for it. Raises UserError where the two differ."""
    name, arguments = architecture(model)
    projection = model.image_projection
    classes = model.config.embed_dim if isinstance(projection, nn.Linear) else 0
    tower: Any = timm.create_model(name, num_classes=classes, **arguments)
    tensors = dict(model.image.trunk.state_dict())
    if isinstance(projection, nn.Linear):
        head = next(key for key, module in tower.named_modules() if module is tower.get_classifier())
        tensors[f"{head}.weight"] = projection.weight
        tensors[f"{head}.bias"] = torch.zeros(classes) if projection.bias is None else projection.bias
    proj = "patch_embed.proj.bias"
    if proj in tower.state_dict():
        tensors.setdefault(proj, torch.zeros(len(tensors["patch_embed.proj.weight"])))
    check_shapes(tensors, tower.state_dict(), f"timm's {name}")
    return tower, tensors


def check(model: CLIP) -> None:
    """Raise UserError for a tower that timm can't build from a name and plain numbers."""
    tower_tensors(model)


def architecture(model: CLIP) -> tuple[str, dict[str, Any]]:
    """timm's name and arguments for the image tower. Raises UserError where there are none."""
    config, trunk = model.config.image, model.image.trunk
    if isinstance(model.image, TimmTower):
        known = timm.get_pretrained_cfg(config.name)
        return config.name, {"img_size": config.image_size} if known and known.fixed_input_size else {}
    if isinstance(trunk.patch_embed, ConvStem) or config.norm_eps not in PLAIN:
        has = "a convolutional stem" if config.stem == "conv" else f"norms with an epsilon of {config.norm_eps}"
        raise UserError(f"this image tower has {has}, which timm can't be given in a file")
    first = trunk.blocks[0]
    return PLAIN[config.norm_eps], {
        "img_size": config.image_size,
        "patch_size": trunk.patch_embed.patch_size[0],
        "embed_dim": trunk.embed_dim,
        "depth": len(trunk.blocks),
        "num_heads": first.attn.num_heads,
        "mlp_ratio": exact_ratio(first.mlp.fc1.out_features, trunk.embed_dim),
        "global_pool": {"token": "token", "average": "avg", "attention": "map"}[config.pooling],
        "class_token": config.class_token,
        "pre_norm": config.pre_norm,
        "act_layer": config.act,
    }


def open_peer(folder: Path) -> Peer:
    """The tower in a folder as timm runs it."""
    tower: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(tower))
    return Peer(
        f"timm {timm.__version__}",
        tower,
        pixels=lambda images: torch.stack([transform(image) for image in images]),
        exact_pixels=True,
    )
