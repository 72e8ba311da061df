"""A process of a run: what it tells the others that isn't a tensor on a device, and the memory that it keeps."""

import ctypes
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed

from clipkit.jobs.worker import answer, result_of

# glibc's names for what mallopt(3) sets.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4

R = TypeVar("R")


class Ranks:
    """This process among those of a run: the only one, or number `rank` of `world`."""

    rank: int
    world: int
    control: Any

    @property
    def is_first(self) -> bool:
        """Whether this process writes checkpoints, metrics and messages."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world > 1:
            torch.distributed.barrier(group=self.control)

    def agree(self, *flags: bool) -> list[bool]:
        """For each flag whether any rank raises it: all ranks must do the same, and clocks and signals differ."""
        return [count > 0 for count in self.total(*flags)]

    def total(self, *counts: int) -> list[int]:
        """The sum of each count over the ranks."""
        summed = torch.tensor(counts, dtype=torch.int64)
        if self.world > 1:
            torch.distributed.all_reduce(summed, group=self.control)
        return [int(count) for count in summed.tolist()]

    def gather(self, value: Any) -> list[Any]:
        """What each rank gave, in their order."""
        gathered: list[Any] = [value] * self.world
        if self.world > 1:
            torch.distributed.all_gather_object(gathered, value, group=self.control)
        return gathered

    def gather_results(self, work: Callable[[], R]) -> list[R]:
        """What `work()` gives on each rank. What it raises on one is raised on all, so that none waits for another."""
        if self.world == 1:
            return [work()]
        answers = self.gather(answer(lambda _: work(), None))
        return [result_of(each, f"rank {rank}") for rank, each in enumerate(answers)]

    def on_first(self, work: Callable[[], R]) -> R:
        """What `work()` gives on the first rank, which alone does it. What it raises there is raised on all."""
        found, *_ = self.gather_results(lambda: work() if self.is_first else None)
        return cast(R, found)

    def close(self) -> None:
        """Leave the group of ranks."""
        if self.world > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def keep_freed_memory() -> None:
    """Have glibc keep what one step frees for the next one, where there is glibc.

    By default it gives blocks of megabytes back to the system at once, and gets them again page by page, zeroed: a
    seventh of a small step on two cores. CUDA's allocator keeps memory in the same way.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
