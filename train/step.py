"""One optimizer step: forward, contrastive loss, backward, clip, update; and the optimizer with its learning rate.

Nothing here reads a value from the device, so a step can be queued before the one ahead of it has finished.
"""

import contextlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from clipkit.device import Device
from clipkit.errors import UserError
from clipkit.model.loss import info_nce, sigmoid_loss
from clipkit.model.text_tower import length_buckets
from clipkit.pixels.images import normalise
from clipkit.train.recipes import Decay, OptimizerConfig, Recipe, Schedule

Tensors = dict[str, torch.Tensor]
Features = tuple[torch.Tensor, ...]


class Step(NamedTuple):
    """What a step found, for the log to read: all of it stays on the device."""

    loss: torch.Tensor
    """A scalar: the mean over this rank's rows."""
    grad_norm: torch.Tensor
    """A scalar: the norm of all gradients before clipping."""
    grad_norms_P: torch.Tensor
    """The norm of the gradient of each trained parameter, in the model's order."""
    image_BE: torch.Tensor
    text_BE: torch.Tensor
    """This rank's features."""


def train_step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: Tensors, recipe: Recipe, device: Device
) -> Step:
    """Train on one batch (`image_BHWC` uint8, `ids_BT`, `caption_B`, perhaps `keep_BK`) on the device.

    With the lengths of the captions, `length_B`, on the host, the text tower leaves their padding out.
    """

    def features_of(part: Tensors) -> Features:
        image_BCHW = normalise(part["image_BHWC"], recipe.mean, recipe.std)
        buckets = length_buckets(part["length_B"].numpy()) if "length_B" in part else None
        with device.autocast(recipe.precision):
            features: Features = model(image_BCHW, part["ids_BT"], part.get("keep_BK"), buckets)
        return features

    def loss_of(features: Features) -> torch.Tensor:
        return contrastive_loss(features, batch["caption_B"], recipe, device)

    if recipe.micro_batch is None or recipe.micro_batch >= len(batch["ids_BT"]):
        features = features_of(batch)
        loss = loss_of(features)
        loss.backward()
    else:
        loss, features = backward_in_micro_batches(model, features_of, loss_of, batch, recipe.micro_batch)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in trained]
    norms_P = torch.stack(torch._foreach_norm(gradients))
    norm = torch.linalg.vector_norm(norms_P)
    if recipe.optimizer.grad_clip is not None:
        torch.nn.utils.clip_grads_with_norm_(trained, recipe.optimizer.grad_clip, norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    device.end_step()
    return Step(loss.detach(), norm, norms_P, features[0].detach(), features[1].detach())


def contrastive_loss(features: Features, caption_B: torch.Tensor, recipe: Recipe, device: Device) -> torch.Tensor:
    """The recipe's loss of this process's rows against the global batch."""
    image_BE, text_BE, logit_scale, *logit_bias = features
    if recipe.loss == "sigmoid":
        loss = partial(sigmoid_loss, image_BE, text_BE, logit_scale, *logit_bias)
    else:
        loss = partial(info_nce, image_BE, text_BE, logit_scale)
    return loss(caption_B=caption_B, same_caption=recipe.same_caption, gather=device.world > 1)


def backward_in_micro_batches(
    model: torch.nn.Module,
    features_of: Callable[[Tensors], Features],
    loss_of: Callable[[Features], torch.Tensor],
    batch: Tensors,
    micro_batch: int,
) -> tuple[torch.Tensor, Features]:
    """The gradients of the whole batch in the memory of one micro-batch (GradCache; Gao et al., 2021); returns its loss
    and its features.

    First all features without a graph; then the loss on them, which gives each feature its gradient; then each
    micro-batch once more, with those gradients carried into the towers. Every pair of the batch is a negative, which
    summing the losses of micro-batches would not give.
    """
    size = len(batch["ids_BT"])
    parts = [
        {name: value[start : start + micro_batch] for name, value in batch.items()}
        for start in range(0, size, micro_batch)
    ]
    with torch.no_grad():
        computed = [features_of(part) for part in parts]
    image_BE, text_BE = (torch.cat([features[side] for features in computed]) for side in (0, 1))
    leaves = [tensor.detach().requires_grad_() for tensor in (image_BE, text_BE, *computed[0][2:])]
    loss = loss_of(tuple(leaves))
    gradients = torch.autograd.grad(loss, leaves)
    for number, part in enumerate(parts):
        rows = slice(number * micro_batch, number * micro_batch + len(part["ids_BT"]))
        is_last = number == len(parts) - 1
        with contextlib.nullcontext() if is_last else without_averaging(model):
            image_features, text_features, *scalars = features_of(part)
            # The scale and the bias have one gradient for the whole batch: the last part carries it.
            outputs = [image_features, text_features, *scalars]
            grads = [gradients[0][rows], gradients[1][rows]]
            grads += [gradient if is_last else torch.zeros_like(gradient) for gradient in gradients[2:]]
            trained = [pair for pair in zip(outputs, grads, strict=True) if pair[0].requires_grad]  # else frozen
            torch.autograd.backward([output for output, _ in trained], [gradient for _, gradient in trained])
    return loss, (image_BE, text_BE)


def without_averaging(model: torch.nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Let gradients add up on each rank; the ranks average them once, with the last micro-batch."""
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()


def make_optimizer(
    model: torch.nn.Module, config: OptimizerConfig, learning_rate: float, device: Device
) -> torch.optim.AdamW:
    """AdamW with weight decay on what `config.decay` says, and never on biases, norms' gains or the logit scale."""
    decayed: list[torch.nn.Parameter] = []
    free: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (decayed if is_decayed(name, parameter, config.decay) else free).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": free, "weight_decay": 0.0}]
    try:
        return torch.optim.AdamW(
            [group for group in groups if group["params"]],
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            **device.optimizer_options(learning_rate),
        )
    except ValueError as error:
        raise UserError(f"the recipe's optimizer has invalid settings: {error}") from error


def is_decayed(name: str, parameter: torch.nn.Parameter, decay: Decay) -> bool:
    """Whether weight decay applies to a parameter. The class token counts as the vector that it is in OpenCLIP."""
    is_matrix = parameter.ndim >= 2 and not name.endswith(("cls_token", "reg_token"))
    return is_matrix and (decay == "matrices" or not any(part in name for part in ("token_embedding", "pos_embed")))


def learning_rate_at(
    seen: int,
    batch: int,
    *,
    peak: float,
    warmup: int,
    total: int,
    schedule: Schedule = "cosine",
    cooldown: int = 0,
) -> float:
    """The learning rate of the step that takes a stage of `total` samples from `seen` to `seen + batch`.

    Linear up to `peak`, which the step that completes `warmup` samples has; then half a cosine towards 0, or constant,
    or falling with the inverse square root of the samples seen. The last `cooldown` samples lead from there to 0 in a
    straight line (Hägele et al., 2024). Counting in samples and not in steps keeps the schedule where it was when the
    batch size changes.
    """
    if seen < warmup:
        return peak * min(1.0, (seen + batch) / warmup)
    if schedule == "cosine":
        share = (seen - warmup) / max(1, total - warmup)
        return 0.5 * peak * (1 + math.cos(math.pi * min(1.0, share)))
    start = total - cooldown
    reference = max(warmup, batch)
    before_cooldown = max(reference, min(seen, start))
    rate = peak if schedule == "constant" else peak * math.sqrt(reference / before_cooldown)
    return rate * max(0.0, min(1.0, (total - seen) / max(1, cooldown)))
