"""`clipkit export`: a checkpoint in another project's format, in a folder that is whole or not there."""

import importlib.util
from pathlib import Path
from typing import Literal

from clipkit import checkpoint
from clipkit.embedding.encoder import clip_encoder
from clipkit.errors import UserError
from clipkit.export import graphs, hub, image_tower, openclip
from clipkit.export.model_card import model_card
from clipkit.export.parity import Parity, measure
from clipkit.model.clip import CLIP
from clipkit.model.heads import Head
from clipkit.storage.files import require_writable, write_beside, write_json

Target = Literal["open_clip", "hf", "timm", "onnx"]
FORMATS = {"open_clip": openclip, "hf": hub, "timm": image_tower, "onnx": graphs}
PACKAGES = {
    "open_clip": ("open_clip",),
    "hf": ("transformers",),
    "timm": ("timm",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
}


def export(source: Path, out: Path, target: Target, *, ema: bool = False) -> Parity:
    """Write the model of a checkpoint, or of a run's newest, to the new folder `out`, and compare it with ours.

    Nothing is written where the format can't express the model (UserError), or where the format's own package gives
    other embeddings (InternalError). `ema` takes the averages of the weights that the run kept.
    """
    missing = [name for name in PACKAGES[target] if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f'--to {target} needs {", ".join(missing)} to check the result: pip install "clipkit[export]"')
    if out.exists():
        raise UserError(f"{out} is there already: remove it, or name another folder")
    require_writable(out.absolute().parent)
    loaded = checkpoint.load(source, ema=ema)
    model = checkpoint.build_model(loaded)
    if problem := refusal(target, model):
        others = " or ".join(name for name in FORMATS if not refusal(name, model))
        raise UserError(f"{problem}: export to {others}")
    encoder = clip_encoder(model, checkpoint.tokenizer_of(loaded.path), loaded.preprocess)
    with write_beside(out) as temporary:
        temporary.mkdir()
        FORMATS[target].write(encoder, model, temporary)
        parity = measure(encoder, FORMATS[target].open_peer(temporary), target)
        write_json(temporary / "parity.json", parity.to_json())
        card = model_card(loaded, target, parity, ema).replace("FOLDER", out.name)
        (temporary / "README.md").write_text(card, encoding="utf-8")
    return parity


def refusal(target: str, model: CLIP) -> str:
    """Why a format can't express a model; "" where it can."""
    if target != "onnx" and any(isinstance(each, Head) for each in (model.image_head, model.text_head)):
        return f"{target} has no place for the heads of this model (model.image.head, model.text.head)"
    try:
        FORMATS[target].check(model)
    except UserError as error:
        return str(error)
    return ""
