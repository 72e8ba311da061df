"""The optimizer of a recipe, the average of the weights that follows it, norms and clipping of gradients, and the
learning rate of each step.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.optim import Lion
from torch.distributed.tensor import DTensor

from clipkit.device import Device
from clipkit.errors import UserError
from clipkit.model.clip import CLIP
from clipkit.train.recipes import Decay, OptimizerConfig, Schedule

MOMENTS = ("exp_avg", "exp_avg_sq")  # as torch.optim.AdamW calls them


def make_optimizer(
    model: torch.nn.Module, config: OptimizerConfig, learning_rate: float, device: Device
) -> torch.optim.Optimizer:
    """The recipe's optimizer, with weight decay on what `config.decay` says, and never on biases, norms' gains or the
    logit scale.

    Muon is for the matrices in the towers' blocks, and AdamW for all else (embeddings, projections, vectors), as its
    author prescribes (Jordan et al., 2024). Its updates are as large as AdamW's, so both have one learning rate (Liu et
    al., 2025, "Muon is Scalable for LLM Training"). Lion is Chen et al., 2023. Raises UserError for invalid settings.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    by_muon = [config.name == "muon" and parameter.ndim == 2 and "blocks." in name for name, parameter in trained]

    def groups(muon: bool) -> list[dict[str, Any]]:
        # What is sharded and what is whole can't be updated in one call.
        kinds = [(decays, is_part) for decays in (True, False) for is_part in (True, False)]
        found: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {kind: [] for kind in kinds}
        for (name, parameter), is_muon in zip(trained, by_muon, strict=True):
            if is_muon == muon:
                decays = is_decayed(name, parameter, config.decay)
                found[decays, isinstance(parameter, DTensor)].append(parameter)
        decay = {True: config.weight_decay, False: 0.0}
        return [{"params": params, "weight_decay": decay[kind[0]]} for kind, params in found.items() if params]

    betas = (config.beta1, config.beta2)
    try:
        if config.name == "lion":
            return Lion(groups(False), lr=learning_rate, betas=betas)
        if config.name == "stable_adamw":
            return StableAdamW(groups(False), lr=learning_rate, betas=betas, eps=config.eps)
        options = {"betas": betas, "eps": config.eps, **device.optimizer_options(learning_rate)}
        if config.mu_dtype == "bfloat16":
            return RoundedAdamW(groups(False), **options)
        adamw = torch.optim.AdamW(groups(False), **options)
        if config.name == "adamw":
            return adamw
        return Together(
            torch.optim.Muon(groups(True), lr=learning_rate, momentum=config.momentum, adjust_lr_fn="match_rms_adamw"),
            adamw,
        )
    except ValueError as error:
        raise UserError(f"the recipe's optimizer has invalid settings: {error}") from error


class Together(torch.optim.Optimizer):
    """Several optimizers of different parameters as one, which shares their groups and their state."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts
        for part in parts:
            part.state = self.state

    def step(self, closure: Any = None) -> Any:
        """One step of each."""
        for part in self.parts:
            part.step()


class StableAdamW(torch.optim.Optimizer):
    """AdamW whose learning rate is divided, for each tensor, by the RMS of g / sqrt(v) where that is above 1
    (Wortsman et al., 2023, "Stable and low-precision training for large-scale vision-language models", algorithm 2).

    So a gradient that the second moment lags behind can't make a step that is too large, and no gradient is clipped.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of all parameters that have a gradient."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in parameters:
                if not self.state[parameter]:
                    moments = {name: torch.zeros_like(parameter) for name in MOMENTS}
                    self.state[parameter] = {"step": torch.zeros(()), **moments}  # counted on the CPU
                self.state[parameter]["step"] += 1
            if not parameters:
                continue
            gradients = [parameter.grad for parameter in parameters]
            first, second = ([self.state[each][name] for each in parameters] for name in MOMENTS)
            step = self.state[parameters[0]]["step"].item()
            # The paper's debiased betas: the moments are means of the gradients so far from the first step on.
            beta1, beta2 = (beta * (1 - beta ** (step - 1)) / (1 - beta**step) for beta in group["betas"])
            torch._foreach_lerp_(first, gradients, 1 - beta1)
            torch._foreach_mul_(second, beta2)
            torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)

            roots = torch._foreach_sqrt(second)
            ratios = torch._foreach_div(gradients, torch._foreach_clamp_min(roots, group["eps"]))
            sizes = roots[0].new_tensor([each.numel() for each in parameters]).sqrt()
            rms = torch.stack(torch._foreach_norm(ratios)) / sizes
            rates = (-group["lr"] / rms.clamp(min=1)).unbind()

            torch._foreach_add_(roots, group["eps"])
            updates = torch._foreach_div(first, roots)
            torch._foreach_add_(updates, parameters, alpha=group["weight_decay"])
            torch._foreach_mul_(updates, rates)
            torch._foreach_add_(parameters, updates)


class RoundedAdamW(torch.optim.Optimizer):
    """AdamW that keeps its first moment in bfloat16, as CLIPA-v2 was trained (`mu_dtype` of optax).

    A step computes in float32, with the new moment as it is; what is kept of it for the next step is rounded to the
    nearest. PyTorch's own kernels want both moments to be of the weights' type. Steps are counted on the device, where
    a lazy one's graph would have a number as a constant.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float | torch.Tensor,
        betas: tuple[float, float],
        eps: float,
        **_: Any,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "capturable": True})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of all parameters that have a gradient."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter] = {
                        "step": torch.zeros((), device=parameter.device),
                        "exp_avg": torch.zeros_like(parameter, dtype=torch.bfloat16),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }
            if not parameters:
                continue
            steps = [self.state[each]["step"] for each in parameters]
            torch._foreach_add_(steps, 1)
            step, rate, (beta1, beta2) = steps[0], group["lr"], group["betas"]
            weights, gradients = [local_of(each) for each in parameters], [local_of(each.grad) for each in parameters]
            first, second = ([local_of(self.state[each][name]) for each in parameters] for name in MOMENTS)

            updates = [torch.empty_like(each) for each in gradients]
            torch._foreach_copy_(updates, first)
            torch._foreach_lerp_(updates, gradients, 1 - beta1)
            torch._foreach_copy_(first, updates)
            torch._foreach_mul_(second, beta2)
            torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)

            roots = torch._foreach_sqrt(second)
            torch._foreach_div_(roots, (1 - beta2**step) ** 0.5)
            torch._foreach_add_(roots, group["eps"])
            torch._foreach_div_(updates, roots)
            torch._foreach_mul_(updates, -rate / (1 - beta1**step))
            torch._foreach_mul_(weights, 1 - rate * group["weight_decay"])
            torch._foreach_add_(weights, updates)


def is_decayed(name: str, parameter: torch.nn.Parameter, decay: Decay) -> bool:
    """Whether weight decay applies to a parameter. The class token counts as the vector that it is in OpenCLIP."""
    is_matrix = parameter.ndim >= 2 and not name.endswith(("cls_token", "reg_token"))
    return is_matrix and (decay == "matrices" or not any(part in name for part in ("token_embedding", "pos_embed")))


def copy_for_average(model: CLIP) -> CLIP:
    """A copy of a model that isn't sharded yet, for `keep_average`; what is frozen is shared with it."""
    # torch's AveragedModel reads its count from the device at each step, and copies what is frozen.
    frozen = {id(each): each for each in model.parameters() if not each.requires_grad}
    return copy.deepcopy(model, frozen).requires_grad_(False).eval()


def keep_average(average: CLIP, model: CLIP, optimizer: torch.optim.Optimizer, decay: float) -> None:
    """Have the average's weights become, after each step, `decay` times themselves plus `1 - decay` times the model's.
    Both are sharded, or neither is.
    """
    pairs = [pair for pair in zip(average.parameters(), model.parameters(), strict=True) if pair[1].requires_grad]

    @torch.no_grad()
    def follow(*_: Any) -> None:
        averages, trained = zip(*((local_of(ours), local_of(theirs)) for ours, theirs in pairs), strict=True)
        torch._foreach_lerp_(averages, trained, 1 - decay)
        for ours, theirs in zip(average.buffers(), model.buffers(), strict=True):
            ours.copy_(theirs)  # what batch norms have seen

    optimizer.register_step_post_hook(follow)


# ---- Norms, of tensors of which each rank may have a part ------------------------------------------------------------


def gradient_norms(parameters: list[torch.nn.Parameter], device: Device) -> torch.Tensor:
    """float32[P], the norm of the gradient of each parameter, the mean over the ranks; 0 where it has none.

    Where the weights are sharded, so are their gradients, and averaged already; those of scalars are averaged here.
    """
    gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
    if any(isinstance(each, DTensor) for each in gradients):
        for gradient in gradients:
            if not isinstance(gradient, DTensor):
                device.mean(gradient)
    return tensor_norms(gradients, device)


def tensor_norms(tensors: Sequence[torch.Tensor], device: Device) -> torch.Tensor:
    """float32[P], the norm of each tensor, over all ranks' parts of it."""
    is_part = [isinstance(each, DTensor) for each in tensors]
    norms_P = torch.stack(torch._foreach_norm([local_of(each) for each in tensors]))
    if not any(is_part):
        return norms_P
    # A whole tensor is on every rank, and counts once.
    shares_P = torch.tensor([device.world if part else 1.0 for part in is_part], device=norms_P.device)
    return device.mean(norms_P.square() * shares_P).sqrt()


def clip(parameters: list[torch.nn.Parameter], largest: float, norm: torch.Tensor) -> None:
    """Scale all gradients so that their norm together, which is `norm` (a scalar), is at most `largest`."""
    gradients = [local_of(each.grad) for each in parameters if each.grad is not None]
    torch._foreach_mul_(gradients, (largest / (norm + 1e-6)).clamp(max=1.0))


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor, in the same memory; all of one that isn't sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# ---- The learning rate -----------------------------------------------------------------------------------------------


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
