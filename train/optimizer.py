"""The optimizer of a recipe, and the learning rate of each step."""

import math

import torch

from clipkit.device import Device
from clipkit.errors import UserError
from clipkit.train.recipes import Decay, OptimizerConfig, Schedule


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
