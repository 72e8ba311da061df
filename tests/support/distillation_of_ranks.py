"""Features of a student and two teachers for the tests of distillation, and what one of several processes makes of its
part. A module of its own, because each rank imports it."""

import torch
import torch.distributed as dist
from loss_of_ranks import features
from torch import Tensor

from clipkit.model import loss as loss_module
from clipkit.model.distill import TeacherSpace, distillation

TEACHERS = [TeacherSpace(5, 20.0), TeacherSpace(3, 7.0)]
ROWS = 16


def teacher_features(rows: int = ROWS) -> Tensor:
    """Embeddings of any length, [B, 2, 8]."""
    return torch.randn(rows, 2, 8, generator=torch.Generator().manual_seed(3))


def distillation_of_rank(folder: str) -> None:
    """One of several processes: its part of the batch goes in, its loss and the gradients come out."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    image_BE, text_BE, scale, _ = (leaf.detach() for leaf in features(ROWS))
    loss_module.TILE = 24  # several tiles, and rows of several processes in one
    leaves = [leaf.clone().requires_grad_() for leaf in (image_BE[mine], text_BE[mine], scale)]
    value = distillation(*leaves, teacher_features()[mine], TEACHERS, gather=True)
    torch.save([value.detach(), *torch.autograd.grad(value, leaves)], f"{folder}/results-{rank}.pt")
    dist.destroy_process_group()
