"""Images and any labels: which label fits each image, as probabilities."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from clipkit.embedding.encoder import Compute
from clipkit.embedding.script import LoadedModel
from clipkit.errors import UserError
from clipkit.eval.classification.prompts import Classes, class_embeddings, prompts, templates, tokenise_prompts


@dataclass(frozen=True)
class Classified:
    """An image and the probability of each label, the most probable first."""

    image: Path
    probabilities: dict[str, float]


def split_labels(text: str) -> list[str]:
    """The labels of `a, b, c`. Raises UserError for a blank one, one that occurs twice, and fewer than two."""
    labels = [label.strip() for label in text.split(",")]
    if not all(labels):
        raise UserError(f"--labels {text!r} has a blank label: write --labels 'a cat, a dog'")
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise UserError(f"--labels has {min(twice)!r} twice: give each label once")
    if len(labels) < 2:
        raise UserError(f"--labels {text!r} is one label, whose probability is always 1: give two or more, with commas")
    return labels


def classify(
    model: LoadedModel, images: Sequence[Path], labels: Sequence[str], templates_name: str = "openai-80"
) -> list[Classified]:
    """The probability of each label for each image, by the similarities to the labels in the templates.

    They say which of these labels fits best, not whether any does. Raises UserError for what can't be read.
    """
    encoder = model.encoder
    classes = Classes(tuple(labels), tuple((label,) for label in labels))
    sentences = templates(templates_name).sentences
    asked = tokenise_prompts(prompts(classes, sentences), encoder.tokenizer, encoder.context_length)
    image_NE = model.encode_image(images)
    text_CE = class_embeddings(encoder, asked, Compute(model.device)).cpu()
    share_NC = (float(encoder.scale) * torch.from_numpy(image_NE) @ text_CE.T).softmax(dim=1).numpy()
    return [
        Classified(image, {labels[place]: float(share_C[place]) for place in np.argsort(-share_C, kind="stable")})
        for image, share_C in zip(images, share_NC, strict=True)
    ]
