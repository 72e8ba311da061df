"""One optimizer step: forward, contrastive loss, backward, clip, update.

Nothing here reads a value from the device, so a step can be queued before the one ahead of it has finished.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch.distributed.fsdp import FSDPModule

from clipkit.device import Device
from clipkit.model.distill import TeacherSpace, distillation, less_reference
from clipkit.model.global_loss import global_contrastive
from clipkit.model.loss import info_nce, sigmoid_loss
from clipkit.model.text_tower import length_buckets
from clipkit.pixels.images import normalise
from clipkit.train.optimizer import clip, gradient_norms
from clipkit.train.recipes import Recipe

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
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Tensors,
    recipe: Recipe,
    device: Device,
    teachers: Sequence[TeacherSpace] = (),
) -> Step:
    """Train on one batch (`image_BHWC` uint8, `ids_BT`, `caption_B`, perhaps `keep_BK`) on the device; stored vectors
    are `image_BE` and `text_BE` in it.

    With the lengths of the captions, `length_B`, on the host, the text tower leaves their padding out. Where there are
    `teachers`, their embeddings are in the batch as `teacher_B2E`.
    """

    def features_of(part: Tensors) -> Features:
        image = part["image_BE"] if "image_BE" in part else normalise(part["image_BHWC"], recipe.mean, recipe.std)
        buckets = length_buckets(part["length_B"].numpy()) if "length_B" in part else None
        with device.autocast(recipe.precision):
            text = part["text_BE"] if "text_BE" in part else part["ids_BT"]
            features: Features = model(image, text, part.get("keep_BK"), buckets)
        return features

    def loss_of(features: Features) -> torch.Tensor:
        loss = contrastive_loss(features, batch, recipe, device, teachers)
        if not recipe.distill.weight:
            return loss
        with device.loss_products():
            image_BE, text_BE, logit_scale, *_ = features
            taught = distillation(image_BE, text_BE, logit_scale, batch["teacher_B2E"], teachers, gather=device.gathers)
        return torch.lerp(loss, taught, recipe.distill.weight)

    micro_batch = recipe.micro_batch
    if not isinstance(micro_batch, int) or micro_batch * device.shards_of_tensor >= len(batch["caption_B"]):
        features = features_of(batch)
        loss = loss_of(features)
        loss.backward()
    else:
        loss, features = backward_in_micro_batches(model, features_of, loss_of, batch, micro_batch, device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    norms_P = gradient_norms(trained, device)
    norm = torch.linalg.vector_norm(norms_P)
    if recipe.optimizer.grad_clip is not None:
        clip(trained, recipe.optimizer.grad_clip, norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    device.end_step()
    return Step(loss.detach(), norm, norms_P, features[0].detach(), features[1].detach())


def contrastive_loss(
    features: Features, batch: Tensors, recipe: Recipe, device: Device, teachers: Sequence[TeacherSpace] = ()
) -> torch.Tensor:
    """The recipe's loss of this process's rows against the global batch; `log_u_B2` as for `global_contrastive`."""
    image_BE, text_BE, logit_scale, *logit_bias = features
    if recipe.loss == "sigmoid":
        loss = partial(sigmoid_loss, image_BE, text_BE, logit_scale, *logit_bias)
    elif recipe.loss == "global_contrastive":
        if recipe.global_contrastive.reference:
            image_BE, text_BE = less_reference(image_BE, text_BE, batch["teacher_B2E"], teachers)
        loss = partial(global_contrastive, image_BE, text_BE, logit_scale)
        loss = partial(loss, log_u_B2=batch.get("log_u_B2"), gamma_B=batch.get("gamma_B"))
        loss = partial(loss, eps=recipe.global_contrastive.eps, rho=recipe.global_contrastive.rho)
    else:
        loss = partial(info_nce, image_BE, text_BE, logit_scale)
    with device.loss_products():
        return loss(caption_B=batch["caption_B"], same_caption=recipe.same_caption, gather=device.gathers)


def backward_in_micro_batches(
    model: torch.nn.Module,
    features_of: Callable[[Tensors], Features],
    loss_of: Callable[[Features], torch.Tensor],
    batch: Tensors,
    micro_batch: int,
    device: Device,
) -> tuple[torch.Tensor, Features]:
    """The gradients of the whole batch in the memory of one micro-batch (GradCache; Gao et al., 2021); returns its loss
    and its features.

    First all features without a graph; then the loss on them, which gives each feature its gradient; then each
    micro-batch once more, with those gradients carried into the towers. Every pair of the batch is a negative, which
    summing the losses of micro-batches would not give. A lazy device runs each micro-batch by itself: in one graph for
    all of them, the compiler would see that the features are computed twice, and keep everything that both need.
    """
    parts = cut(batch, micro_batch, device)
    computed = []
    with torch.no_grad():
        for part in parts:
            computed.append(features_of(part))
            device.end_step()
    image_BE, text_BE = (join([features[side] for features in computed], device) for side in (0, 1))
    leaves = [tensor.detach().requires_grad_() for tensor in (image_BE, text_BE, *computed[0][2:])]
    loss = loss_of(tuple(leaves))
    gradients = torch.autograd.grad(loss, leaves)
    grad_parts = cut({"image_BE": gradients[0], "text_BE": gradients[1]}, micro_batch, device)
    for number, (part, grad_part) in enumerate(zip(parts, grad_parts, strict=True)):
        is_last = number == len(parts) - 1
        with without_averaging(model, is_last):
            image_features, text_features, *scalars = features_of(part)
            # The scale and the bias have one gradient for the whole batch: the last part carries it.
            outputs = [image_features, text_features, *scalars]
            grads = [grad_part["image_BE"], grad_part["text_BE"]]
            grads += [gradient if is_last else torch.zeros_like(gradient) for gradient in gradients[2:]]
            trained = [pair for pair in zip(outputs, grads, strict=True) if pair[0].requires_grad]  # else frozen
            torch.autograd.backward([output for output, _ in trained], [gradient for _, gradient in trained])
        device.end_step()
    return loss, (image_BE, text_BE)


def cut(batch: Tensors, micro_batch: int, device: Device) -> list[Tensors]:
    """A batch in micro-batches, each of them the next `micro_batch` rows of every device that has rows of it."""
    devices = device.shards_of_tensor
    by_device = {name: value.unflatten(0, (devices, -1)) for name, value in batch.items()}
    share = next(iter(by_device.values())).shape[1]
    parts = [
        {name: device.spread(value[:, start : start + micro_batch].flatten(0, 1)) for name, value in by_device.items()}
        for start in range(0, share, micro_batch)
    ]
    device.end_step()
    return parts


def join(parts: list[torch.Tensor], device: Device) -> torch.Tensor:
    """What was computed from the micro-batches that `cut` made, in the order of the batch."""
    devices = device.shards_of_tensor
    return device.spread(torch.cat([part.unflatten(0, (devices, -1)) for part in parts], dim=1).flatten(0, 1))


@contextlib.contextmanager
def without_averaging(model: torch.nn.Module, is_last: bool) -> Iterator[None]:
    """Let gradients add up on each rank; the ranks average them once, with the last micro-batch."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(is_last)
        yield
    elif isinstance(model, torch.nn.parallel.DistributedDataParallel) and not is_last:
        with model.no_sync():
            yield
    else:
        yield
