"""The weights that a run begins with, from another project's file.

Whose file it is is told from the names in it. What it doesn't have keeps its initial value, and that is said.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from clipkit.errors import UserError
from clipkit.interop.files import read_weights
from clipkit.interop.openclip import OPENAI, check_sincos, convert
from clipkit.model.clip import build, load_state
from clipkit.model.config import ModelConfig
from clipkit.model.heads import PREFIXES as HEADS

# What timm calls a classifier: the last layers, which a tower doesn't have.
CLASSIFIERS = ("head.", "fc.", "classifier.", "head_dist.")


class Weights(NamedTuple):
    """All of a model's tensors, which of its towers a file gave, and a line that says so."""

    tensors: dict[str, Tensor]
    towers: tuple[str, ...]
    note: str


def weights_from_file(path: Path, config: ModelConfig, seed: int) -> Weights:
    """A model's tensors from a file of clipkit, OpenCLIP, OpenAI (both towers) or timm (the image tower).

    What the file doesn't have is as `build` makes it from the seed; positions are fitted as in `load_state`. Raises
    UserError for a file of another architecture, naming the tensor and its shapes, and for one that isn't recognised.
    """
    theirs = read_weights(path)
    model = build(config, seed)
    own = model.state_dict()
    trunk = {name.removeprefix("image.trunk.") for name in own if name.startswith("image.trunk.")}
    towers: tuple[str, ...] = ("image", "text")
    both = f"image and text towers from {path}"
    if any(name.startswith("image.trunk.") for name in theirs):
        found, note = theirs, f"{both} (clipkit)"
    elif any(name.startswith("visual.") for name in theirs):
        is_openai = bool(OPENAI & set(theirs))
        found = convert(theirs, config)
        if is_openai:
            check_quick_gelu(path, config)
        acts = config.image.act if config.image.act == config.text.act else f"{config.image.act}, {config.text.act}"
        note = f"{both} ({'OpenAI' if is_openai else 'OpenCLIP'}), run with act={acts}"
    elif trunk & set(theirs):
        towers = ("image",)
        found, left_out = timm_tensors(path, theirs, trunk, config)
        found = {**{name: tensor for name, tensor in own.items() if not name.startswith("image.trunk.")}, **found}
        without = f", without its classifier {', '.join(left_out)}" if left_out else ""
        rest = "text tower" if config.image.projection == "none" else "image projection and text tower"
        note = f"image tower from {path} (timm{without}), {rest} from scratch"
    else:
        raise UserError(
            f"{path} has no weights for {config.image.name} (its first is {next(iter(theirs), None)}): "
            "take a file of OpenCLIP, OpenAI or timm, of the architecture in the recipe's model"
        )
    bias = {"logit_bias": own["logit_bias"]} if "logit_bias" in own else {}
    load_state(
        model,
        with_new_heads({**bias, **found}, config, seed),
        remedy=f"set model to the architecture of {path}, or take another file",
    )
    return Weights(model.state_dict(), towers, note)


def with_new_heads(tensors: Mapping[str, Tensor], config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """A model's tensors, with heads from the seed where it has none and `config` asks for some; then the logits' scale
    and bias, which are of the space that the heads make, begin as `config` says too.
    """
    if config.image.head == config.text.head == "none":
        return dict(tensors)
    own = build(config, seed).state_dict()
    fresh = [name for name in own if name.startswith(HEADS) and name not in tensors]
    if not fresh:
        return dict(tensors)
    space = ("logit_scale", "logit_bias")
    kept = {name: tensor for name, tensor in tensors.items() if name not in space}
    return kept | {name: own[name] for name in own if name in (*fresh, *space)}


def check_quick_gelu(path: Path, config: ModelConfig) -> None:
    """UserError where OpenAI's weights would run with an activation that they weren't trained with."""
    wrong = [tower for tower in ("image", "text") if getattr(config, tower).act != "quick_gelu"]
    if wrong:
        remedy = " ".join(f"--set model.{tower}.act=quick_gelu" for tower in wrong)
        raise UserError(f"{path} is OpenAI's, which was trained with quick_gelu: {remedy}")


def timm_tensors(
    path: Path, theirs: Mapping[str, Tensor], trunk: set[str], config: ModelConfig
) -> tuple[dict[str, Tensor], list[str]]:
    """The image tower's tensors under our names, and the classifier's names, which are left out."""
    if config.image.frozen is True and config.image.projection != "none":
        raise UserError(
            f"{path} has no image projection, and a frozen one would stay random: set model.image.projection=none and "
            "model.embed_dim to the tower's width, or model.image.frozen=false"
        )
    left_out = sorted(name for name in theirs if name not in trunk and name.startswith(CLASSIFIERS))
    found = {f"image.trunk.{name}": tensor.float() for name, tensor in theirs.items() if name not in left_out}
    check_sincos(found, config.image.position)
    return found, left_out
