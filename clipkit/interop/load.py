"""A model of any origin, ready to embed images and texts."""

from pathlib import Path

from clipkit import checkpoint
from clipkit.embedding.encoder import Encoder, clip_encoder
from clipkit.errors import UserError
from clipkit.interop import openclip_models, transformers


def load(source: str | Path, *, ema: bool = False, vocabulary: Path | None = None) -> Encoder:
    """The model that `source` names, in evaluation mode on the CPU. What it is is told from what is there:

    - a checkpoint of clipkit's, or a run (its newest);
    - a file of weights of OpenCLIP's or OpenAI's, or a folder with `open_clip_config.json`;
    - `open_clip:NAME:FILE` or `open_clip:NAME:TAG`;
    - a folder of transformers' CLIP or SigLIP, or `hf:OWNER/NAME`.

    `ema` takes the averages of the weights, `vocabulary` is the tokenizer's file where the model comes without. Raises
    UserError for what can't be loaded.
    """
    path, name = Path(source), str(source)
    if name.startswith(openclip_models.PREFIX):
        return openclip_models.from_name(name, ema=ema, vocabulary=vocabulary)
    if path.is_file():
        return openclip_models.from_file(path, ema=ema, vocabulary=vocabulary)
    # Folders on the hub often have both; then OpenCLIP's own files say more.
    if openclip_models.is_openclip(path):
        return openclip_models.from_folder(path, ema=ema, vocabulary=vocabulary)
    if vocabulary is not None:
        raise UserError(f"{source} has the tokenizer that it was trained with: leave out --tokenizer {vocabulary}")
    if name.startswith(transformers.PREFIX) or transformers.is_transformers(path):
        if ema:
            raise UserError(f"{source} has no averages of its weights: omit --ema")
        folder = transformers.find_on_hub(name) if name.startswith(transformers.PREFIX) else path
        return transformers.load_transformers(folder, name)
    return from_checkpoint(path, ema)


def from_checkpoint(path: Path, ema: bool) -> Encoder:
    """A checkpoint of clipkit's own, or the newest of a run."""
    loaded = checkpoint.load(path, ema=ema)
    return clip_encoder(
        checkpoint.build_model(loaded),
        checkpoint.tokenizer_of(loaded.path),
        loaded.preprocess,
        precision=loaded.config["recipe"].get("precision", "auto"),
        name=str(path),
        path=loaded.path,
        samples_seen=loaded.samples_seen,
    )
