"""Features for the tests of the losses, and what one of several processes makes of its part of them.

A module of its own, because each rank imports it, and none of what the tests compare with.
"""

import itertools

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from clipkit.model import loss as loss_module
from clipkit.model.global_loss import global_contrastive
from clipkit.model.loss import info_nce, sigmoid_loss

CAPTION_B = torch.tensor([11, 22, 11, 33, 44, 33, 11, 55])


def features(count: int = 8, width: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unit vectors of images and texts, a logit scale and a bias, all of them leaves that want gradients."""
    generator = torch.Generator().manual_seed(7)
    image_BE, text_BE = F.normalize(torch.randn(2, count, width, generator=generator), dim=-1).unbind()
    leaves = image_BE.clone(), text_BE.clone(), torch.tensor(9.0), torch.tensor(-3.0)
    return tuple(leaf.requires_grad_() for leaf in leaves)


def features_of_ranks() -> tuple[list[Tensor], Tensor]:
    """The whole batch that the ranks share."""
    return [leaf.detach() for leaf in features(16, 6)], torch.cat([CAPTION_B, CAPTION_B + 11])


def averages_of_ranks() -> dict[str, Tensor]:
    """What FastCLIP's loss knows of the records of the whole batch; of every third one nothing."""
    generator, new_B = torch.Generator().manual_seed(3), torch.arange(16) % 3 == 0
    log_u_B2 = torch.randn(16, 2, generator=generator).masked_fill(new_B[:, None], loss_module.ABSENT)
    return {"log_u_B2": log_u_B2, "gamma_B": torch.where(new_B, 1.0, 0.3)}


def losses_of_rank(folder: str) -> None:
    """One of several processes: its part of the batch goes in, its losses and their gradients come out."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    (image_BE, text_BE, *scalars), caption_B = features_of_ranks()
    mine = slice(rank * len(image_BE) // world, (rank + 1) * len(image_BE) // world)
    loss_module.TILE = 24  # several tiles, and rows of several processes in one
    results = {}
    for loss, same_caption in itertools.product((info_nce, sigmoid_loss), ("negative", "ignore", "positive")):
        leaves = [image_BE[mine], text_BE[mine], *scalars[: 1 if loss is info_nce else 2]]
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        value = loss(*leaves, caption_B=caption_B[mine], same_caption=same_caption, gather=True)
        results[f"{loss.__name__} {same_caption}"] = [value.detach(), *torch.autograd.grad(value, leaves)]
    averages = {name: value[mine].clone() for name, value in averages_of_ranks().items()}
    leaves = [leaf.clone().requires_grad_() for leaf in (image_BE[mine], text_BE[mine], scalars[0])]
    given = {"caption_B": caption_B[mine], "same_caption": "ignore", "gather": True}
    value = global_contrastive(*leaves, **averages, eps=1e-3, rho=2.0, **given)
    results["global"] = [value.detach(), *torch.autograd.grad(value, leaves), averages["log_u_B2"]]
    torch.save(results, f"{folder}/results-{rank}.pt")
    dist.destroy_process_group()
