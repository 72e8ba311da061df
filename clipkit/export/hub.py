"""transformers' folder: a CLIPModel or a SiglipModel with its image processor and its tokenizer."""

from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from clipkit.embedding.encoder import Encoder
from clipkit.errors import UserError
from clipkit.export.parity import Peer
from clipkit.interop.tokenizer_files import write_clip_files
from clipkit.interop.transformers import Kind, their_config, their_preprocess, to_theirs
from clipkit.model.clip import CLIP
from clipkit.model.timm_tower import TimmTower
from clipkit.storage.files import read_json, write_json


def write(encoder: Encoder, model: CLIP, folder: Path) -> None:
    """Write the folder of a model that passes `check`."""
    kind = kind_of(model)
    tensors = {name: tensor.contiguous() for name, tensor in to_theirs(model, kind).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", their_config(model, kind))
    write_json(folder / "preprocessor_config.json", their_preprocess(encoder.preprocess, kind))
    if kind == "clip":
        write_clip_files(folder, encoder.context_length)
        return
    (folder / "spiece.model").write_bytes(getattr(encoder.tokenizer, "vocabulary", None) or b"")
    settings = {"tokenizer_class": "SiglipTokenizer", "model_max_length": encoder.context_length, "do_lower_case": True}
    write_json(folder / "tokenizer_config.json", settings)


def check(model: CLIP) -> None:
    """Raise UserError for a model that transformers can't build."""
    to_theirs(model, kind_of(model))


def kind_of(model: CLIP) -> Kind:
    """Which of transformers' two models this is. Raises UserError when it is neither."""
    image, text = model.config.image, model.config.text
    found = {
        "plain vision transformer": not isinstance(model.image, TimmTower),
        "pooling": image.pooling,
        "class token": image.class_token,
        "position of the class token": bool(getattr(model.image, "position_prefix", image.class_token)),
        "norm before the blocks": image.pre_norm,
        "stem": image.stem,
        "image projection": image.projection,
        "text pooling": text.pooling,
        "causal": text.causal,
        "text projection": text.projection,
        "tokenizer": text.tokenizer,
        "logit bias": model.logit_bias is not None,
    }
    clip = (True, "token", True, True, True, "patch", "linear", "end", True, "linear", "clip-bpe", False)
    siglip = (True, "attention", False, False, False, "patch", "none", "last", False, "bias", "sentencepiece", True)
    kind: Kind = "siglip" if image.pooling == "attention" else "clip"
    wanted = dict(zip(found, clip if kind == "clip" else siglip, strict=True))
    wrong = [f"{name} {found[name]} ({wanted[name]} there)" for name in found if found[name] != wanted[name]]
    if wrong:
        raise UserError(f"transformers has no model like this one, the nearest is its {kind}: {', '.join(wrong)}")
    return kind


def open_peer(folder: Path) -> Peer:
    """The model in a folder as transformers runs it."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    is_clip = read_json(folder / "config.json")["model_type"] == "clip"
    offline: dict[str, Any] = {"local_files_only": True}
    model = transformers.AutoModel.from_pretrained(folder, **offline).eval()
    tokenizer = (transformers.CLIPTokenizer if is_clip else transformers.SiglipTokenizer).from_pretrained(
        folder, **offline
    )
    processor = transformers.AutoImageProcessor.from_pretrained(folder, **offline)
    length = model.config.text_config.max_position_embeddings
    return Peer(
        f"transformers {transformers.__version__}",
        lambda pixels: model.get_image_features(pixels).pooler_output,
        lambda ids: model.get_text_features(ids).pooler_output,
        pixels=lambda images: processor(images, return_tensors="pt")["pixel_values"],
        ids=lambda texts: tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )["input_ids"],
    )
