"""A tiny model with random weights, as an encoder and as a run on the disk."""

from dataclasses import dataclass
from pathlib import Path

from clipkit import checkpoint
from clipkit.embedding.encoder import Encoder, clip_encoder
from clipkit.model.clip import build
from clipkit.model.config import ImageConfig, ModelConfig, TextConfig
from clipkit.pixels.images import Preprocess
from clipkit.text.tokenizer import Tokenizer

SMALL = ModelConfig(
    embed_dim=32,
    image=ImageConfig("vit_tiny_patch16_224", image_size=32, patch_size=8, width=32, depth=2, heads=2),
    text=TextConfig(context_length=32, width=32, depth=2, heads=2),
)
PREPROCESS = Preprocess(size=32)


@dataclass(frozen=True)
class NoRecipe:
    """What a checkpoint must name."""

    name: str = "none"
    ema_decay: float | None = None


def small_encoder(seed: int = 1) -> Encoder:
    """The model, ready to embed."""
    return clip_encoder(build(SMALL, seed=seed).eval(), Tokenizer(), PREPROCESS)


def small_run(folder: Path, seed: int = 1, averages: int | None = None) -> Path:
    """A run with a checkpoint of it; `averages` is the seed of the weights that stand for the averages."""
    state = {"samples_seen": 64, "stage": "full", "seconds": 1.0, "bad_samples": 0}
    checkpoint.save(
        checkpoint.folder_of(folder, 64),
        tensors=build(SMALL, seed=seed).state_dict(),
        ema=None if averages is None else build(SMALL, seed=averages).state_dict(),
        config=checkpoint.describe(SMALL, PREPROCESS, NoRecipe(ema_decay=None if averages is None else 0.9)),
        state=state,
    )
    return folder
