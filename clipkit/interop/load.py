"""A model of any origin, ready to embed images and texts."""

from pathlib import Path

from clipkit import checkpoint
from clipkit.embedding.encoder import Encoder, clip_encoder
from clipkit.errors import UserError
from clipkit.interop import transformers


def load(source: str | Path, *, ema: bool = False) -> Encoder:
    """The model that `source` names, in evaluation mode on the CPU: a checkpoint of clipkit's, or a run (its newest);
    a folder of transformers' CLIP or SigLIP, or `hf:OWNER/NAME`.

    `ema` takes the averages of the weights that the run kept. Raises UserError for what can't be loaded.
    """
    hub = str(source).startswith(transformers.PREFIX)
    if hub or transformers.is_transformers(Path(source)):
        if ema:
            raise UserError(f"{source} has no averages of its weights: omit --ema")
        return transformers.load_transformers(
            transformers.find_on_hub(str(source)) if hub else Path(source), str(source)
        )
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
