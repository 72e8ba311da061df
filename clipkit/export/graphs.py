"""ONNX: a graph for each tower, whose batch may be of any size, and `clipkit.json` with all else that it takes."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipkit.embedding.encoder import Encoder
from clipkit.export.parity import Peer
from clipkit.model.clip import CLIP, into_space
from clipkit.storage.files import write_json


class Tower(nn.Module):
    """A tower, its projection and its head: what a graph is made of."""

    def __init__(self, tower: nn.Module, projection: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.tower, self.projection, self.head = tower, projection, head

    def forward(self, x: Tensor) -> Tensor:
        embedding_BE: Tensor = F.normalize(into_space(self.projection(self.tower(x)), self.head), dim=-1)
        return embedding_BE


def write(encoder: Encoder, model: CLIP, folder: Path) -> None:
    """Write `image.onnx`, from normalised float32 pixels [B, 3, S, S], and `text.onnx`, from int64 ids [B, T], to unit
    vectors; weights of more than 2 GB lie beside them."""
    size, length = encoder.preprocess.size, encoder.context_length
    image = Tower(model.image, model.image_projection, model.image_head)
    text = Tower(model.text, model.text_projection, model.text_head)
    for name, tower, given, example in (
        ("image", image, "pixels", torch.zeros(2, 3, size, size)),
        ("text", text, "ids", torch.ones(2, length, dtype=torch.int64)),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own imports
            torch.onnx.export(
                tower.eval(),
                (example,),
                folder / f"{name}.onnx",
                input_names=[given],
                output_names=["features"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                external_data=sum(each.numel() * 4 for each in tower.parameters()) > 1.9e9,
                dynamo=True,
                verbose=False,
            )
    vocabulary = getattr(encoder.tokenizer, "vocabulary", None)
    if vocabulary is not None:
        (folder / "vocabulary").write_bytes(vocabulary)
    settings: dict[str, Any] = {
        "preprocess": vars(encoder.preprocess),
        "tokenizer": model.config.text.tokenizer,
        "context_length": length,
        "logit_scale": model.logit_scale.exp().item(),
        "logit_bias": None if model.logit_bias is None else model.logit_bias.item(),
    }
    write_json(folder / "clipkit.json", settings)


def check(model: CLIP) -> None:
    """Graphs can be made of every model."""


def open_peer(folder: Path) -> Peer:
    """The graphs in a folder as onnxruntime runs them."""
    import onnxruntime

    image, text = (
        onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
        for name in ("image", "text")
    )
    return Peer(
        f"onnxruntime {onnxruntime.__version__}",
        lambda pixels: torch.from_numpy(image.run(None, {"pixels": pixels.contiguous().numpy()})[0]),
        lambda ids: torch.from_numpy(text.run(None, {"ids": ids.numpy()})[0]),
    )
