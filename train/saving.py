"""Checkpoints that are written while the run goes on.

Only an update changes what is large in a checkpoint. So a thread copies it into host memory beside the next forward and
backward pass, that step's update waits for the copy, and the thread then writes the files. The memory is kept from one
checkpoint to the next, since touching new pages takes several times as long as copying. What a reader finds is as ever:
a folder that is whole, or the one before it, whenever the run is killed.
"""

import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from clipkit import checkpoint
from clipkit.device import Device
from clipkit.errors import UserError
from clipkit.formatting import size_text
from clipkit.log import warn_on_stderr

Parts = dict[str, dict[str, torch.Tensor]]
# Elements up to which a tensor is copied at once: a forward pass changes the logit scale and what norms have seen.
SMALL = 65_536


class CheckpointWriter:
    """Writes the checkpoints of a run one after the other. On leaving its block it has written all of them."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.memory: Parts = {}
        self.copied: Future[None] | None = None
        self.done: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.thread.shutdown()
        if kind is None:
            self.wait()

    def follow(self, optimizer: torch.optim.Optimizer, parts: Callable[[], Parts]) -> None:
        """Have the updates of a stage wait for copies; after the first one, which makes its state, get memory ready."""

        def get_ready(*_: Any) -> None:
            handle.remove()
            if self.device.is_first:
                self.memory = {
                    part: {name: self.place(part, name, tensor) for name, tensor in tensors.items()}
                    for part, tensors in parts().items()
                }
                self.done = self.thread.submit(touch, self.memory)

        handle = optimizer.register_step_post_hook(get_ready)
        optimizer.register_step_pre_hook(self.before_update)

    def before_update(self, *_: Any) -> None:
        """Wait for a copy under way. Raises what went wrong with the latest checkpoint, as soon as that is known."""
        if self.copied is not None:
            self.copied.result()
        if self.done is not None and self.done.done():
            self.done.result()

    def wait(self) -> None:
        """Wait until the latest checkpoint is on the disk. Raises what went wrong with it."""
        if self.done is not None:
            self.done.result()

    @torch.no_grad()
    def save(self, folder: Path, parts: Parts, then: Callable[[], None], **fields: Any) -> None:
        """Begin the checkpoint `folder` of now; `fields` are `checkpoint.save`'s others, and `then` is called when it
        is written. All ranks call this together, as they gather what is sharded over them; the first one writes.

        Waits for the checkpoint before. Raises UserError where the disk has too little space for this one.
        """
        self.wait()
        if self.device.is_first:
            require_space(folder, bytes_of(parts))
        later = []
        memory: Parts = {name: {} for name in parts}
        for part, tensors in parts.items():
            for name, tensor in tensors.items():
                whole = checkpoint.whole(tensor)
                if self.device.is_lazy:
                    whole = self.device.whole(whole)
                if not self.device.is_first:
                    continue
                memory[part][name] = self.place(part, name, tensor)
                if whole is not tensor or whole.numel() <= SMALL:
                    memory[part][name].copy_(whole)
                else:
                    later.append((memory[part][name], whole))
        if self.device.is_first:
            self.memory = memory
            self.copied = self.thread.submit(copy, later)
            self.done = self.thread.submit(self.write, self.copied, folder, then, fields)

    def place(self, part: str, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Where a tensor's copy goes: the memory of the checkpoint before, if it is of the same kind."""
        kept = self.memory.get(part, {}).get(name)
        if kept is not None and (kept.shape, kept.dtype) == (tensor.shape, tensor.dtype):
            return kept
        return self.device.host_memory(tensor)

    def write(self, copied: Future[None], folder: Path, then: Callable[[], None], fields: Mapping[str, Any]) -> None:
        """Write what was copied, and say so in time where the next checkpoint will find too little space."""
        copied.result()
        written: dict[str, Any] = {**self.memory, **fields}
        checkpoint.save(folder, **written)
        then()
        try:
            require_space(folder, bytes_of(self.memory))
        except UserError as error:
            warn_on_stderr(str(error))


def touch(memory: Parts) -> None:
    """Have the system give all pages of the memory."""
    for tensors in memory.values():
        for tensor in tensors.values():
            tensor.zero_()


@torch.no_grad()
def copy(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copy the second of each pair into the first."""
    for place, tensor in pairs:
        place.copy_(tensor)


def bytes_of(parts: Parts) -> int:
    """What the tensors take on the disk, whole."""
    return sum(each.numel() * each.element_size() for tensors in parts.values() for each in tensors.values())


def require_space(folder: Path, needed: int) -> None:
    """Raises UserError where the disk has less space than the checkpoint `folder` needs, in bytes."""
    there = next(path for path in folder.parents if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise UserError(
            f"too little space in {folder.parent}: the next checkpoint needs {size_text(needed)}, and "
            f"{size_text(free)} are free: free some space, and go on with --resume"
        )
