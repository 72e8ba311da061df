"""What processes exchange for a loss over all their rows: rows gathered and summed, or passed round a ring.

All of it needs `torch.distributed` initialised, as many rows in every process, and no autograd: the losses compute
their gradients themselves.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor


def first_row(rows: int, gather: bool) -> int:
    """The place of this process's first row among all processes' rows, which are equally many everywhere."""
    return dist.get_rank() * rows if gather else 0


def gather_features(x_BE: Tensor) -> Tensor:
    """All processes' rows in the order of their ranks: [B, ...] -> [W * B, ...], without a gradient."""
    world = dist.get_world_size()
    gathered = x_BE.new_empty((world * len(x_BE), *x_BE.shape[1:]))
    dist.all_gather(list(gathered.chunk(world)), x_BE.detach().contiguous())
    return gathered


def sum_rows(x_NE: Tensor) -> Tensor:
    """The sum over the processes of what each has for this process's rows: [W * B, ...] -> [B, ...]. Changes `x_NE`."""
    if dist.get_backend() == "gloo":  # which can't scatter a sum
        dist.all_reduce(x_NE)
        return x_NE.chunk(dist.get_world_size())[dist.get_rank()].clone()
    x_BE = x_NE.new_empty((len(x_NE) // dist.get_world_size(), *x_NE.shape[1:]))
    dist.reduce_scatter_tensor(x_BE, x_NE)
    return x_BE


def total_logsumexp(x_N: Tensor) -> Tensor:
    """The log of the sum over the processes of exp(`x_N`), place by place."""
    highest_N = x_N.clone()
    dist.all_reduce(highest_N, dist.ReduceOp.MAX)
    sum_N = (x_N - highest_N).exp_()
    dist.all_reduce(sum_N)
    return highest_N.add_(sum_N.log_())


def pass_on(x_BE: Tensor, meet: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Send rows round the ring of all processes; returns the sum of what they gave for this process's rows.

    In each process `meet(owner, x_BE)` is called with every process's rows, its own first, while the next ones are on
    their way. What it returns, float32 of the shape of its rows, follows them round the ring and is added up, so that a
    process never holds more than two processes' rows and sums.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    x_BE = x_BE.contiguous()
    if world == 1:
        return meet(rank, x_BE)
    to, origin = (rank + 1) % world, (rank - 1) % world

    def exchange(sent: Tensor, tag: int) -> tuple[Tensor, list[dist.Work]]:
        received = torch.empty_like(sent)
        send = dist.P2POp(dist.isend, sent, to, tag=tag)
        return received, dist.batch_isend_irecv([send, dist.P2POp(dist.irecv, received, origin, tag=tag)])

    def wait(works: list[dist.Work]) -> None:
        for work in works:
            work.wait()

    coming_BE, summing = torch.zeros_like(x_BE, dtype=torch.float32), list[dist.Work]()
    for step in range(world):
        next_BE, moving = exchange(x_BE, 0) if step < world - 1 else (x_BE, [])
        sum_BE = meet((rank - step) % world, x_BE)
        wait(summing)
        sum_BE += coming_BE
        coming_BE, summing = exchange(sum_BE, 1)
        wait(moving)
        x_BE = next_BE
    wait(summing)
    return coming_BE
