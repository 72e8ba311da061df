"""AdamW as CLIP uses it, and its learning rate as a function of samples seen.

Counting in samples and not in steps keeps a schedule where it was when the batch size changes.
"""

import math
from dataclasses import dataclass

import torch

from clipkit.device import Device
from clipkit.errors import UserError


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter, 2019). `grad_clip` is the largest norm of all gradients together."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.2
    grad_clip: float = 1.0


def make_optimizer(
    model: torch.nn.Module, config: OptimizerConfig, learning_rate: float, device: Device
) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices alone: not on biases, norms' gains, embeddings or the logit scale."""
    decayed: list[torch.nn.Parameter] = []
    free: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (decayed if is_decayed(name, parameter) else free).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": free, "weight_decay": 0.0}]
    try:
        return torch.optim.AdamW(
            [group for group in groups if group["params"]],
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            **device.optimizer_options(learning_rate),
        )
    except ValueError as error:
        raise UserError(f"the recipe's optimizer can't be: {error}") from error


def is_decayed(name: str, parameter: torch.nn.Parameter) -> bool:
    """Whether weight decay applies: to what multiplies activations, as in CLIP's own training."""
    is_embedding = any(part in name for part in ("token_embedding", "positional_embedding", "pos_embed", "cls_token"))
    return parameter.ndim >= 2 and not is_embedding


def learning_rate_at(seen: int, batch: int, *, peak: float, warmup: int, total: int, final: float = 0.0) -> float:
    """The learning rate of the step that takes a stage of `total` samples from `seen` to `seen + batch`.

    Linear up to `peak`, which the step that completes `warmup` samples has, then half a cosine towards `final`.
    """
    if seen < warmup:
        return peak * min(1.0, (seen + batch) / warmup)
    share = (seen - warmup) / max(1, total - warmup)
    return final + 0.5 * (peak - final) * (1 + math.cos(math.pi * min(1.0, share)))
