"""The recipes by name, and those that users write themselves.

A recipe is a function that returns a `Recipe`, so it can be read, called and changed in Python; the command line
changes it by `--set key=value`, a TOML file by its tables. CLIPA's plan is the shape of most: train long on few image
and text tokens, then briefly on all (Li, Wang & Xie, "An Inverse Scaling Law for CLIP Training", NeurIPS 2023, and the
public scripts that go with it). `PUBLISHED` says what others reached.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from clipkit.config import did_you_mean, set_values
from clipkit.errors import UserError
from clipkit.formatting import print_table, short, short_flops
from clipkit.model.config import (
    ImageConfig,
    ModelConfig,
    TextConfig,
    vit_b16,
    vit_b16_siglip,
    vit_b32,
    vit_h14_clipa,
    vit_l14_clipa,
    vit_l16,
)
from clipkit.storage.files import read_toml
from clipkit.train.augmentation import Augmentation
from clipkit.train.recipes import Cadence, Distill, OptimizerConfig, Recipe, Stage

# ---- CLIPA on LAION-400M ---------------------------------------------------------------------------------------------

CROP = Augmentation(crop_area=(0.4, 1.0))
# Brightness, contrast, saturation and hue as in SimCLR at strength 0.4, for the models that see the fewest tokens.
JITTER = replace(CROP, brightness=0.32, contrast=0.32, saturation=0.32, hue=0.08, jitter=0.8, grey=0.2)
SIX_PASSES = 37_263 * 65_536  # over about 407 million pairs


def clipa_b16_i50_t16() -> Recipe:
    """CLIPA's B/16: 50 image and 16 text tokens at 112 px, then 131,072,000 samples at 224 px."""
    return clipa(
        "clipa-b16-i50-t16",
        vit_b16(),
        Stage(
            name="reduced", samples=SIX_PASSES, batch_size=65_536, learning_rate=2.048e-3, warmup_samples=782 * 65_536,
            image_size=112, context_length=16, augmentation=CROP,
        ),
        batch=8_192, learning_rate=2.56e-5, warmup_steps=3_072, context_length=16,
    )  # fmt: skip


def clipa_l16_i17_t16() -> Recipe:
    """CLIPA's L/16: 17 image tokens at 64 px and 16 text tokens by syntax, then 131,072,000 samples at 224 px."""
    return clipa_l16("clipa-l16-i17-t16", image_size=64, context_length=16, full_context=16)


def clipa_l16_i37_t8() -> Recipe:
    """CLIPA's L/16: 37 image tokens at 96 px and 8 text tokens by syntax, then 131,072,000 samples at 224 px."""
    return clipa_l16("clipa-l16-i37-t8", image_size=96, context_length=8, full_context=32)


def clipa_l16(name: str, image_size: int, context_length: int, full_context: int) -> Recipe:
    """One of CLIPA's L/16 recipes: average pooling, shaken colours."""
    model = vit_l16()
    reduced = Stage(
        name="reduced", samples=SIX_PASSES, batch_size=32_768, learning_rate=1.024e-3, warmup_samples=1_563 * 32_768,
        image_size=image_size, context_length=context_length, text_reduction="syntax", augmentation=JITTER,
    )  # fmt: skip
    model = replace(model, image=replace(model.image, pooling="average"))
    return clipa(
        name, model, reduced, batch=7_168, learning_rate=2.24e-5, warmup_steps=3_571, context_length=full_context
    )


def clipa(
    name: str,
    model: ModelConfig,
    reduced: Stage,
    *,
    batch: int,
    learning_rate: float,
    warmup_steps: int,
    context_length: int,
) -> Recipe:
    """A stage of few tokens on fixed positions, then about 131,072,000 samples of all tokens, positions learned."""
    full = Stage(
        name="full", samples=131_072_000 // batch * batch, batch_size=batch, learning_rate=learning_rate,
        warmup_samples=warmup_steps * batch, image_size=224, context_length=context_length, position="learnable",
        augmentation=CROP,
    )  # fmt: skip
    return Recipe(
        name=name,
        model=replace(model, image=replace(model.image, position="sincos")),
        stages=(reduced, full),
        same_caption="negative",
        cadence=Cadence(
            log_samples=20 * reduced.batch_size, checkpoint_minutes=30.0, evaluate_samples=4_000 * reduced.batch_size
        ),
    )


# ---- With teachers ---------------------------------------------------------------------------------------------------


def clipa_b16_dr() -> Recipe:
    """B/16 on some 12 million pairs with stored teachers (MobileCLIP; Vasu et al., 2024), of 50 image tokens, then 197.

    Distillation only, at a scale of 100; batch, rate, clipping and length are those of MobileCLIP's script for
    DataCompDR-12M, which has all tokens throughout. Shaken colours stand for its RandAugment.
    """
    batch = 8_192
    reduced = Stage(
        name="reduced", samples=27_000 * batch, batch_size=batch, learning_rate=1e-3, warmup_samples=1_000 * batch,
        image_size=112, context_length=32, augmentation=replace(JITTER, crop_area=(0.08, 1.0)),
    )  # fmt: skip
    full = replace(
        reduced, name="full", samples=3_000 * batch, learning_rate=1e-4, warmup_samples=300 * batch, image_size=224,
        context_length=77, position="learnable",
    )  # fmt: skip
    model = vit_b16()
    return Recipe(
        name="clipa-b16-dr",
        model=replace(model, image=replace(model.image, position="sincos")),
        stages=(reduced, full),
        distill=Distill(weight=1.0, scale=100.0),
        optimizer=OptimizerConfig(grad_clip=1.0),
        cadence=Cadence(log_samples=20 * batch, checkpoint_minutes=30.0, evaluate_samples=4_000 * batch),
    )


# ---- CLIPA-v2 --------------------------------------------------------------------------------------------------------


def clipa_l14_datacomp() -> Recipe:
    """CLIPA-v2's L/14 on DataComp-1B; its own configuration isn't public, so the numbers are those of H/14."""
    return clipa_v2("clipa-l14-datacomp", vit_l14_clipa())


def clipa_h14_laion2b() -> Recipe:
    """CLIPA-v2's H/14 on LAION-2B."""
    return clipa_v2("clipa-h14-laion2b", vit_h14_clipa())


def clipa_h14_datacomp() -> Recipe:
    """CLIPA-v2's H/14 on DataComp-1B."""
    return clipa_v2("clipa-h14-datacomp", vit_h14_clipa())


def clipa_v2(name: str, model: ModelConfig) -> Recipe:
    """12.8 billion samples at 84 px and 8 text tokens, then half a billion at 224 px and fewer at 336 px, where a part
    of the patches is dropped (Li, Wang & Xie, "CLIPA-v2", 2023).

    After the public JAX configurations: Adam with optax's eps and the first moment in bfloat16, and weight decay on
    the layers' matrices only. Not taken over: they resize training crops by a bilinear filter.
    """
    reduced = Stage(
        name="reduced", samples=10_000 * 1_281_167 // 65_536 * 65_536, batch_size=65_536, learning_rate=2.048e-3,
        warmup_samples=3_200 * 65_536,  # with less, the 65,536 of H/14 collapse, says its configuration
        image_size=84, context_length=8, text_reduction="syntax", augmentation=JITTER,
    )  # fmt: skip
    full = Stage(
        name="full", samples=524_288_000, batch_size=32_768, learning_rate=5.12e-5, warmup_samples=26_214_400,
        image_size=224, context_length=32, image_reduction="random", image_keep=179, augmentation=JITTER,
    )  # fmt: skip
    large = replace(
        full, name="large", samples=131_072_000, batch_size=16_384, learning_rate=6.4e-6, image_size=336, image_keep=345
    )
    return Recipe(
        name=name,
        model=model,
        stages=(reduced, full, large),
        same_caption="negative",
        optimizer=OptimizerConfig(eps=1e-8, mu_dtype="bfloat16", decay="layers"),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        interpolation="bilinear",
        resize_mode="squash",
        cadence=Cadence(log_samples=20 * 65_536, checkpoint_minutes=30.0, evaluate_samples=4_000 * 65_536),
    )


# ---- SigLIP ----------------------------------------------------------------------------------------------------------


def siglip_b16() -> Recipe:
    """SigLIP's B/16: 196 image and 64 text tokens, 40 billion samples, the sigmoid loss (Zhai et al., 2023).

    Batch, warm-up and length as in "SigLIP 2" (Tschannen et al., 2025), which says more of them; the crop is
    OpenCLIP's. Weight decay is 1e-4 of a weight a step at the peak there, here a multiple of the learning rate.
    """
    batch = 32_768
    recipe = clip("siglip-b16", vit_b16_siglip(), batch)
    stage = replace(
        recipe.stages[0], samples=40_000_000_000 // batch * batch, learning_rate=1e-3, warmup_samples=20_000 * batch,
        context_length=64,
    )  # fmt: skip
    return replace(
        recipe,
        stages=(stage,),
        loss="sigmoid",
        optimizer=OptimizerConfig(eps=1e-8, weight_decay=0.1, decay="layers", grad_clip=1.0),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        resize_mode="squash",
    )


# ---- CLIP at full length, as OpenCLIP trained it on LAION-400M -------------------------------------------------------


def clip_b32() -> Recipe:
    """CLIP's B/32 at full length: 50 image and 77 text tokens, 32 passes over LAION-400M."""
    return clip("clip-b32", vit_b32(), batch=32_768)


def clip_b16() -> Recipe:
    """CLIP's B/16 at full length: 197 image and 77 text tokens, 32 passes over LAION-400M."""
    return clip("clip-b16", vit_b16(), batch=33_792)


def clip(name: str, model: ModelConfig, batch: int) -> Recipe:
    """One stage of about 12.8 billion samples at 224 px and 77 tokens."""
    crop = Augmentation(crop_area=(0.9, 1.0))
    stage = Stage(
        name="full", samples=12_800_000_000 // batch * batch, batch_size=batch, learning_rate=5e-4,
        warmup_samples=2_000 * batch, image_size=224, context_length=77, augmentation=crop,
    )  # fmt: skip
    return Recipe(
        name=name,
        model=model,
        stages=(stage,),
        same_caption="negative",
        optimizer=OptimizerConfig(beta2=0.98),
        cadence=Cadence(log_samples=20 * batch, checkpoint_minutes=30.0, evaluate_samples=4_000 * batch),
    )


# ---- Locked-image tuning ---------------------------------------------------------------------------------------------


def lit_b16() -> Recipe:
    """LiT's B/16 (Zhai et al., 2022): a text tower from scratch learns to read timm's `vit_base_patch16_224`, which
    `--init` gives and which stays as it is; its vector is the shared space.

    Learning rate, decay, clipping, share of warm-up, temperature, flips and text tokens are those of big_vision's
    `lit_coco.py`. That tunes a BERT for 5,000 steps; batch and length here, about a billion pairs, are ours.
    """
    batch = 16_384
    image = ImageConfig(pre_norm=False, norm_eps=1e-6, projection="none", frozen=True)
    stage = Stage(
        name="full", samples=60_000 * batch, batch_size=batch, learning_rate=1e-3, warmup_samples=1_800 * batch,
        image_size=224, context_length=16, augmentation=Augmentation(flip=0.5),
    )  # fmt: skip
    return Recipe(
        name="lit-b16",
        model=ModelConfig(768, image, TextConfig(context_length=16, width=768, heads=12), logit_scale_init=10.0),
        stages=(stage,),
        same_caption="negative",
        optimizer=OptimizerConfig(beta2=0.999, eps=1e-8, weight_decay=0.01, decay="layers", grad_clip=1.0),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        cadence=Cadence(log_samples=20 * batch, checkpoint_minutes=30.0, evaluate_samples=4_000 * batch),
    )


# ---- Small ones ------------------------------------------------------------------------------------------------------


def emoji_demo() -> Recipe:
    """A first CLIP from 8,548 drawings in minutes on two CPU cores: 9 image tokens, then 16.

    Towers of 0.4 million weights beside the token embedding; a convolutional stem, without which so few drawings
    teach a transformer little. Colours and shapes are shaken hard, because the drawings to be recognised are in
    a style that training never saw. The averages of the weights, over about 100 steps, are the model to take.
    """
    image = ImageConfig(
        "vit_tiny_patch16_224", image_size=48, patch_size=16, width=128, depth=1, heads=2, pooling="average",
        class_token=False, pre_norm=False, stem="conv",
    )  # fmt: skip
    drawings = Augmentation(
        crop_area=(0.6, 1.3), crop_ratio=(1 / 1.2, 1.2), rotation=12.0, translation=0.08,
        brightness=0.3, contrast=0.3, saturation=0.4, grey=0.1, fixed="white",
    )  # fmt: skip
    batch = 256
    reduced = Stage(
        name="reduced", samples=1_200 * batch, batch_size=batch, learning_rate=2e-3, warmup_samples=60 * batch,
        image_size=48, context_length=8, augmentation=drawings,
    )  # fmt: skip
    full = replace(
        reduced, name="full", samples=240 * batch, learning_rate=1e-3, warmup_samples=20 * batch, image_size=64,
        context_length=16,
    )  # fmt: skip
    return Recipe(
        name="emoji-demo",
        model=ModelConfig(embed_dim=128, image=image, text=TextConfig(context_length=16, width=64, depth=1, heads=1)),
        stages=(reduced, full),
        ema_decay=0.99,
        optimizer=OptimizerConfig(beta2=0.98, eps=1e-8, weight_decay=0.1, decay="layers", grad_clip=1.0),
        mean=(0.70, 0.68, 0.63),
        std=(0.35, 0.34, 0.37),
        block_size=16,
        cadence=Cadence(log_samples=10 * batch, checkpoint_samples=100 * batch, evaluate_samples=360 * batch),
    )


def emoji_dr() -> Recipe:
    """The demo's towers on half of its samples in batches half as large, with stored embeddings of a model that
    `emoji-demo` trained (some 40 views). A low scale shows the student how alike all pairs are to the teacher.
    """
    demo = emoji_demo()
    stages = [replace(each, samples=each.samples // 2, batch_size=each.batch_size // 2) for each in demo.stages]
    return replace(demo, name="emoji-dr", stages=tuple(stages), distill=Distill(weight=1.0, scale=10.0))


def debug() -> Recipe:
    """Twenty steps on towers of a few thousand weights: seconds on any device, every part of the trainer in use."""
    image = ImageConfig(
        "vit_tiny_patch16_224", image_size=32, patch_size=8, width=32, depth=2, heads=2, pooling="average",
        class_token=False, position="sincos",
    )  # fmt: skip
    text = TextConfig(context_length=16, width=32, depth=1, heads=2)
    crop = Augmentation(crop_area=(0.4, 1.0), flip=0.5)
    common = Stage(
        name="reduced", samples=12 * 16, batch_size=16, learning_rate=1e-3, warmup_samples=4 * 16, image_size=32,
        context_length=8, text_reduction="random", image_reduction="random", image_keep=8, augmentation=crop,
    )  # fmt: skip
    full = replace(
        common, name="full", samples=8 * 16, learning_rate=1e-4, image_size=48, context_length=16,
        text_reduction="truncate", image_reduction=None, image_keep=None, position="learnable",
    )  # fmt: skip
    return Recipe(
        name="debug",
        model=ModelConfig(embed_dim=32, image=image, text=text),
        stages=(common, full),
        optimizer=OptimizerConfig(eps=1e-8, decay="layers", grad_clip=1.0),
        block_size=4,
        precision="float32",
        cadence=Cadence(log_samples=16, checkpoint_samples=4 * 16),
    )


# ---- By name, or from a file -----------------------------------------------------------------------------------------

PUBLISHED = {
    "clipa-b16-i50-t16": "63.2% ImageNet zero-shot in about 2 days on eight A100-80GB",
    "clipa-l16-i17-t16": "67.8% ImageNet zero-shot in about 3 days on eight A100-80GB",
    "clipa-l16-i37-t8": "69.3% ImageNet zero-shot in about 4 days on eight A100-80GB",
    "clipa-l14-datacomp": "80.3% ImageNet zero-shot in 4,520 A100-hours",
    "clipa-h14-laion2b": "79.1% ImageNet zero-shot in 8,640 A100-hours",
    "clipa-h14-datacomp": "81.8% ImageNet zero-shot in 8,640 A100-hours",
    "siglip-b16": "76.0% ImageNet zero-shot (by OpenCLIP, of the weights trained on WebLI, which isn't public)",
    "clip-b32": "62.9% ImageNet zero-shot (OpenCLIP) in 4,600 A100-hours",
    "clip-b16": "67.1% ImageNet zero-shot (OpenCLIP) in 10,700 A100-hours",
}


# What the published runs were trained on, as `published-runs.csv` calls it.
DATASETS = {
    "clipa-b16-i50-t16": "LAION-400M",
    "clipa-l16-i17-t16": "LAION-400M",
    "clipa-l16-i37-t8": "LAION-400M",
    "clipa-l14-datacomp": "DataComp-1B",
    "clipa-h14-laion2b": "LAION-2B-en",
    "clipa-h14-datacomp": "DataComp-1B",
    "siglip-b16": "WebLI (English)",
    "clip-b32": "LAION-400M",
    "clip-b16": "LAION-400M",
    "lit-b16": "LiT image-text set",
    "clipa-b16-dr": "DataCompDR-12M",
}


def recipes() -> dict[str, Callable[[], Recipe]]:
    """All recipes by the name that `--recipe` takes."""
    makers = (
        emoji_demo, emoji_dr, debug, clipa_b16_i50_t16, clipa_l16_i17_t16, clipa_l16_i37_t8, clipa_b16_dr,
        clipa_l14_datacomp, clipa_h14_laion2b, clipa_h14_datacomp, siglip_b16, clip_b32, clip_b16, lit_b16,
    )  # fmt: skip
    return {make.__name__.replace("_", "-"): make for make in makers}


def recipe_rows() -> list[dict[str, Any]]:
    """What each stage of each recipe takes, as JSON values."""
    from clipkit.train.checks import stage_cost  # imports torch

    rows = []
    for name, make in recipes().items():
        recipe = make()
        for stage in recipe.stages:
            cost = stage_cost(recipe, stage)
            rows.append(
                {
                    "recipe": name,
                    "stage": stage.name,
                    "image_size": stage.image_size,
                    "image_tokens": cost.image_tokens,
                    "text_tokens": cost.text_tokens,
                    "batch_size": stage.batch_size,
                    "samples": stage.samples,
                    "flops_per_sample": cost.flops,
                    "flops": cost.flops * stage.samples,
                    "published": PUBLISHED.get(name),
                }
            )
    return rows


def print_recipes(rows: Sequence[Mapping[str, Any]]) -> None:
    """The rows for people: one line a stage, and below the table what others reached."""
    cells: list[tuple[str, ...]] = []
    for number, row in enumerate(rows):
        is_first = number == 0 or rows[number - 1]["recipe"] != row["recipe"]
        cells.append(
            (row["recipe"] if is_first else "", row["stage"], str(row["image_size"]),
             f"{row['image_tokens']}+{row['text_tokens']}", f"{row['batch_size']:,}", short(row["samples"]),
             f"{row['flops_per_sample'] / 1e9:.3g}", short_flops(row["flops"]))
        )  # fmt: skip
    print_table(("recipe", "stage", "px", "tokens", "batch", "samples", "GFLOPs each", "FLOPs"), cells, words=2)
    print("\npublished:")
    for name, result in PUBLISHED.items():
        print(f"{name}: {result}")


def find_recipe(name: str) -> Recipe:
    """The recipe of that name, or that of a TOML file. Raises UserError, with the nearest names, when there is none."""
    if name.endswith(".toml"):
        return read_recipe(Path(name))
    known = recipes()
    if name not in known:
        raise UserError(f"unknown recipe {name!r}: {did_you_mean(name, known)}")
    return known[name]()


def read_recipe(path: Path) -> Recipe:
    """A recipe from a TOML file: `base` names the recipe that it changes, the rest are the keys that `--set` takes.

    Stages are tables by number: `[stages.0]`. Raises UserError, naming the file, for what isn't TOML, an unknown base
    or key (with the nearest ones), and a value of another type.
    """
    values = read_toml(path, "recipe")
    base = values.pop("base", None)
    if not isinstance(base, str):
        raise UserError(f'recipe {path} names no base: begin it with base = "clipa-b16-i50-t16" or another recipe')
    if base.endswith(".toml"):
        raise UserError(f"recipe {path}: the base {base!r} is a file: name one of {', '.join(recipes())}")
    values.setdefault("name", path.stem)
    try:
        return set_values(find_recipe(base), assignments(values))
    except UserError as error:
        raise UserError(f"recipe {path}: {str(error).replace('--set ', '')}") from error


def assignments(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The values of a TOML file as `--set` takes them: `optimizer.eps=1e-08`."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from assignments(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}={_as_text(value)}"


def _as_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(_as_text, value)) if isinstance(value, list) else str(value)
