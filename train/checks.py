"""What a recipe comes to: checked against a device, data and a tokenizer before hours are spent on it, and what each
stage asks of the loader and of evaluation.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from clipkit.config import differences, from_json, to_json
from clipkit.device import Device
from clipkit.embedding.encoder import other_kind, tower_weights
from clipkit.errors import UserError
from clipkit.formats.captions import ORIGINAL
from clipkit.formatting import counted, size_text
from clipkit.model.clip import CLIP
from clipkit.model.config import tower_dim
from clipkit.model.flops import SampleCost, sample_cost
from clipkit.model.global_loss import RECORD_BYTES
from clipkit.model.image_tower import make_image_tower
from clipkit.model.timm_tower import TimmTower
from clipkit.pixels.images import Preprocess
from clipkit.text.tokenizer import WordTokenizer
from clipkit.train.augmentation import Augmentation
from clipkit.train.fit.setup import check_setup, weights_of
from clipkit.train.loader.loader import check_loader
from clipkit.train.loader.samples import LoaderConfig
from clipkit.train.recipes import GlobalContrastive, OptimizerConfig, Recipe, Stage, check_ranges, model_at
from clipkit.train.sources.open import Data
from clipkit.train.sources.source import Source

# Fields of an OptimizerConfig that these optimizers don't have.
UNUSED = {
    "adamw": ["momentum"],
    "stable_adamw": ["momentum", "mu_dtype"],
    "lion": ["eps", "momentum", "mu_dtype"],
    "muon": ["mu_dtype"],
}


def check_recipe(recipe: Recipe, source: Source, device: Device) -> None:
    """Refuse what would fail only hours later. Raises UserError that names the stage and the field."""
    shards = device.shards
    if (recipe.loss == "sigmoid") != (recipe.model.logit_bias_init is not None):
        raise UserError("loss=sigmoid and a bias go together: set model.logit_bias_init=-10 with it, or neither")
    if recipe.optimizer.name != "adamw" and device.mesh is not None:
        raise UserError(f"optimizer.name={recipe.optimizer.name} isn't for TPUs yet: set optimizer.name=adamw")
    check_ranges(recipe)
    check_captions(recipe)
    check_stages(recipe)
    if recipe.loss == "global_contrastive":
        check_normalisers(recipe, source.num_records, device)
    elif recipe.global_contrastive != GlobalContrastive():
        raise UserError(
            f"loss={recipe.loss} doesn't use global_contrastive: set loss=global_contrastive, or leave it out"
        )
    for name in UNUSED[recipe.optimizer.name]:
        value, default = getattr(recipe.optimizer, name), getattr(OptimizerConfig(), name)
        if value != default:
            raise UserError(
                f"recipe {recipe.name}: optimizer.{name} is {value}, which {recipe.optimizer.name} doesn't use: "
                f"set its default {default}"
            )
    for stage in recipe.stages:
        where = f"recipe {recipe.name}, stage {stage.name}"
        if stage.batch_size < 2 or stage.batch_size % shards:
            raise UserError(
                f"{where}: batch_size {stage.batch_size} can't be divided over {counted(shards, 'device')}: set a "
                f"multiple of {max(2, shards)}"
            )
        if stage.samples % stage.batch_size:
            near = max(1, round(stage.samples / stage.batch_size)) * stage.batch_size
            raise UserError(
                f"{where}: samples {stage.samples} is not a multiple of batch_size {stage.batch_size}: set {near}"
            )
        if not 0 <= stage.warmup_samples <= stage.samples:
            raise UserError(f"{where}: warmup_samples {stage.warmup_samples} is not between 0 and {stage.samples}")
        cooldown, after_warmup = stage.cooldown_samples, stage.samples - stage.warmup_samples
        if cooldown and (stage.schedule == "cosine" or cooldown > after_warmup):
            raise UserError(
                f"{where}: cooldown_samples {cooldown} needs schedule=constant or inverse_sqrt, and at most the "
                f"{after_warmup} samples after the warm-up"
            )
        if (stage.image_keep is None) != (stage.image_reduction is None):
            raise UserError(f"{where}: image_keep and image_reduction go together: set both or neither")
        share = stage.batch_size // shards
        micro_batch = recipe.micro_batch
        if isinstance(micro_batch, int) and share % micro_batch:
            raise UserError(
                f"{where}: micro_batch {micro_batch} doesn't divide a device's share of {share}: set a divisor"
            )
        try:
            check_memory(recipe, stage, device.world)
            check_sizes(recipe, stage)
            check_setup(recipe, stage, device)
            check_loader(source, loader_config(recipe, stage), 0, stage.samples, device.world)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error


def check_tokenizer(recipe: Recipe, tokenizer: WordTokenizer) -> None:
    """Raise UserError where the text tower can't read the tokenizer's ids."""
    text = recipe.model.text
    if text.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"recipe {recipe.name}: model.text.vocab_size is {text.vocab_size}: the tokenizer {text.tokenizer} has "
            f"{tokenizer.vocab_size:,} ids; set {tokenizer.vocab_size} or more"
        )
    if text.pooling == "end" and text.tokenizer != "clip-bpe":
        raise UserError(
            f"recipe {recipe.name}: model.text.pooling=end needs the end token of clip-bpe: set "
            f"model.text.pooling=last for {text.tokenizer}"
        )


def check_captions(recipe: Recipe) -> None:
    """Raise UserError for weights of captions by which none can be drawn."""
    for source, weight in recipe.captions.items():
        if not (weight >= 0 and math.isfinite(weight)):
            raise UserError(f"recipe {recipe.name}: captions.{source} is {weight}: set 0 or a positive number")
    if recipe.captions and not any(recipe.captions.values()):
        raise UserError(f"recipe {recipe.name}: all weights of captions are 0: give a source a positive one")


def check_stages(recipe: Recipe) -> None:
    """Raise UserError where there is nothing to do, or where a stage can't be told from another by its name."""
    if not recipe.stages:
        raise UserError(f"recipe {recipe.name} has no stages: leave stages out, or change them as stages.0.samples=320")
    names = [stage.name for stage in recipe.stages]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"recipe {recipe.name} has two stages of the name {name}: give each its own")


def captions_left_out(recipe: Recipe, source: Source) -> list[str]:
    """A line on captions that the data have and the recipe says nothing of; [] where it does."""
    there = source.caption_sources
    others = [name for name in there if name not in (recipe.captions or (ORIGINAL,))]
    if not others:
        return []
    taken = [name for name in there if name not in others]
    weights = " ".join(f"--set captions.{name}={1 / len(there):.2g}" for name in there)
    return [f"the data have captions of {', '.join(there)}, and the recipe takes {', '.join(taken)}: {weights}"]


def check_normalisers(recipe: Recipe, records: int, device: Device) -> None:
    """Raise UserError where the global contrastive loss can't keep its normalisers, or isn't defined."""
    if device.mesh is not None:
        raise UserError("loss=global_contrastive isn't for TPUs yet: set loss=info_nce")
    if recipe.same_caption == "positive":
        raise UserError("loss=global_contrastive has one text to an image: set same_caption=ignore or negative")
    memory = machine_memory()
    needed = 2 * RECORD_BYTES * records  # a checkpoint copies them
    if needed > memory:
        raise UserError(
            f"loss=global_contrastive takes {size_text(needed)} for {records:,} records in each process, and this "
            f"machine has {size_text(memory)}: set loss=info_nce"
        )


def take_texts(data: Data, recipe: Recipe) -> Data:
    """The data with stored vectors in the place of captions too, where the text tower is frozen and they have some."""
    return replace(data, stored_texts=not data.has_images and recipe.model.text.frozen is True)


def check_features(recipe: Recipe, data: Data, tensors: Mapping[str, torch.Tensor] | None) -> None:
    """Raise UserError where a run with these weights can't take the stored vectors of `data` for its images, or, of a
    frozen text tower, for its captions.
    """
    for path, about in ((part.path, part.features) for part in data.parts if part.features):
        if recipe.model.image.frozen is not True:
            raise UserError(f"{path} has the vectors of a frozen image tower: set model.image.frozen=true")
        check_tower(recipe, path, about, tensors or {}, "image")
        if data.stored_texts:
            check_tower(recipe, path, about, tensors or {}, "text")
        for stage in recipe.stages:
            where = f"recipe {recipe.name}, stage {stage.name}"
            check_images(recipe, stage, path, about, where)
            if data.stored_texts:
                check_texts(recipe, stage, path, about, where)


def check_tower(
    recipe: Recipe, path: Path, about: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], tower: str
) -> None:
    """Raise UserError for vectors of another length than the recipe's, and for those of another tower."""
    config = recipe.model.image if tower == "image" else recipe.model.text
    width, dim = about["width"], tower_dim(config, recipe.model.embed_dim)
    if width != dim and config.head == "none":
        raise UserError(
            f"{path} has vectors of {width} numbers, model.embed_dim is {dim}: take the recipe of the model that made "
            f"them, or give the {tower} tower a head"
        )
    if width != dim:
        raise UserError(
            f"{path} has vectors of {width} numbers, model.{tower}.head_input is {dim}: set "
            f"model.{tower}.head_input={width}"
        )
    made = about.get(f"{tower}_weights")
    if made is None:
        raise UserError(
            f"{path} doesn't say which {tower} tower made it, as files of an older clipkit: run clipkit embed again"
        )
    found = tower_weights(tensors, tower, head=False)
    if found != made:
        raise UserError(
            f"{path} was made by another {tower} tower ({about['model']}, {made}) than the one that the run begins "
            f"with ({found}): give that model with --init, or run clipkit embed with this one"
        )


def check_images(recipe: Recipe, stage: Stage, path: Path, about: Mapping[str, Any], where: str) -> None:
    """Raise UserError where a stage shows the image tower something else than the whole image of the file."""
    if stage.augmentation != Augmentation() or stage.image_keep is not None:
        raise UserError(
            f"{where}: {path} has vectors of whole images: set image_keep and image_reduction to none, and "
            "leave out all of the augmentation"
        )
    other = differences(about["preprocessing"], to_json(preprocess_at(recipe, stage)))
    if other:
        raise UserError(f"{where}: {path} was made of images prepared otherwise ({other[0]}): set the same")
    check_kind(recipe, stage, path, about, where, "image")


def check_texts(recipe: Recipe, stage: Stage, path: Path, about: Mapping[str, Any], where: str) -> None:
    """Raise UserError where a stage gives the text tower something else than the caption of the file."""
    if not about["has_texts"]:
        raise UserError(f"{path} has no column texts: run clipkit embed again, or train the text tower")
    if stage.text_reduction != "truncate":
        raise UserError(
            f"{where}: {path} has vectors of captions cut at their end: set text_reduction=truncate, or train the text "
            "tower"
        )
    if stage.context_length != about["context_length"]:
        raise UserError(
            f"{where}: {path} has vectors of captions of up to {about['context_length']} tokens, not "
            f"{stage.context_length}: set context_length={about['context_length']}"
        )
    name = recipe.model.text.tokenizer
    made = about.get("tokenizer_name", name)
    if made != name:
        raise UserError(f"{where}: {path} was made with the tokenizer {made}: set model.text.tokenizer={made}")
    check_kind(recipe, stage, path, about, where, "text")


def check_kind(recipe: Recipe, stage: Stage, path: Path, about: Mapping[str, Any], where: str, tower: str) -> None:
    """Raise UserError for a tower that computes otherwise with the same weights, say with another activation."""
    if not about.get("towers"):
        return  # of an older clipkit
    asked = getattr(model_at(recipe, stage), tower)
    other = other_kind(from_json(type(asked), about["towers"][tower], f"{path}: {tower}"), asked)
    if other:
        raise UserError(f"{where}: {path} was made by another kind of {tower} tower ({other}): set the same")


def takes_precomputed(recipe: Recipe, stage: Stage) -> bool:
    """Whether a stage takes the ids and word classes that a dataset holds: they are clip-bpe's."""
    return stage.text_reduction == "syntax" and recipe.model.text.tokenizer == "clip-bpe"


def check_memory(recipe: Recipe, stage: Stage, world: int) -> None:
    """Raise UserError where the model's weights, or one batch of images, are larger than this machine's memory."""
    weights, memory = weights_of(recipe, stage), machine_memory()
    images, pixels = stage.batch_size // world, stage.image_size**2
    for what, size, remedy in (
        (f"the model's {weights:,} weights take", 4 * weights, "a smaller width or depth under model"),
        (f"a batch of {images:,} images of {stage.image_size} px takes", 3 * images * pixels, "a smaller batch_size"),
    ):
        if size > memory:
            raise UserError(f"{what} {size_text(size)}, and this machine has {size_text(memory)}: set {remedy}")


def machine_memory() -> int:
    """In bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_sizes(recipe: Recipe, stage: Stage) -> None:
    """Raise UserError where a tower that isn't a vision transformer has other weights at this stage's image size."""
    first = recipe.stages[0]
    if stage.image_size == first.image_size:
        return
    with torch.device("meta"):
        towers = [make_image_tower(model_at(recipe, each).image) for each in (first, stage)]
    if isinstance(towers[0], TimmTower) and shapes(towers[0]) != shapes(towers[1]):
        raise UserError(f"{recipe.model.image.name} has other weights at other sizes: give all stages one image_size")


def shapes(module: torch.nn.Module) -> dict[str, torch.Size]:
    """The shapes of a module's tensors by name."""
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def preprocess_at(recipe: Recipe, stage: Stage) -> Preprocess:
    """How images are prepared when the stage's model is evaluated."""
    return Preprocess(stage.image_size, recipe.mean, recipe.std, recipe.interpolation, recipe.resize_mode)


def stage_cost(recipe: Recipe, stage: Stage, images: bool = True, texts: bool = True) -> SampleCost:
    """What one sample of a stage costs; `images` and `texts` as in `sample_cost`."""
    return sample_cost(model_at(recipe, stage), stage.image_keep, images, texts)


def patch_grid(recipe: Recipe, stage: Stage) -> tuple[int, int] | None:
    """Rows and columns of patches in a stage; None where the image tower has none.

    Raises UserError for an invalid model.
    """
    # The tower itself knows best; on the meta device it takes no memory.
    with torch.device("meta"):
        image = CLIP(model_at(recipe, stage)).image
    if not isinstance(image, TimmTower):
        return image.grid
    if stage.image_keep is not None:
        raise UserError(f"image_keep isn't for {image.config.name}: set it and image_reduction to none")
    return None


def loader_config(recipe: Recipe, stage: Stage) -> LoaderConfig:
    """What the loader needs to know of a stage."""
    return LoaderConfig(
        image_size=stage.image_size,
        augmentation=stage.augmentation,
        context_length=stage.context_length,
        text_reduction=stage.text_reduction,
        image_reduction=stage.image_reduction,
        image_keep=stage.image_keep,
        grid=patch_grid(recipe, stage),
        batch_size=stage.batch_size,
        seed=recipe.seed,
        block_size=recipe.block_size,
        max_bad=recipe.max_bad,
        captions=recipe.captions,
    )
