"""A model of any origin, ready to embed images and texts."""

from pathlib import Path

from clipkit import checkpoint
from clipkit.embedding.encoder import Encoder, clip_encoder


def load(source: str | Path, *, ema: bool = False) -> Encoder:
    """The model that `source` names, in evaluation mode on the CPU: a checkpoint of clipkit's, or a run (its newest).

    `ema` takes the averages of the weights that the run kept. Raises UserError for what can't be loaded.
    """
    loaded = checkpoint.load(Path(source), ema=ema)
    return clip_encoder(
        checkpoint.build_model(loaded),
        checkpoint.tokenizer_of(loaded.path),
        loaded.preprocess,
        precision=loaded.config["recipe"].get("precision", "auto"),
        name=str(source),
        path=loaded.path,
        samples_seen=loaded.samples_seen,
    )
