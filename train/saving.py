"""Checkpoints that are written while the run goes on.

Only an update changes what is large in a checkpoint. So a thread copies it into host memory beside the next forward and
backward pass, that step's update waits for the copy, and the thread then writes the files. The memory is kept from one
checkpoint to the next, since touching new pages takes several times as long as copying. What a reader finds is as ever:
a folder that is whole, or the one before it, whenever the run is killed.

The first rank writes all of it, but for the optimizer's state of sharded weights, of which each writes its part.
"""

import secrets
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from clipkit import checkpoint
from clipkit.device import CONTROL_TIMEOUT, Device
from clipkit.errors import UserError
from clipkit.formatting import size_text
from clipkit.log import warn_on_stderr
from clipkit.storage.files import make_folder, remove
from clipkit.train.optimizer import local_of

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
        self.beside: Device | None = None
        """The ranks as their threads talk to each other, where each writes its part."""
        self.mesh: DeviceMesh | None = None
        """Their hosts."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.thread.shutdown()
        if kind is None:
            self.wait()

    def share(self, folder: Path) -> None:
        """Have each rank write its part of the optimizer's state into checkpoints in `folder`. All call this together.

        Raises UserError, on all, where they don't share its disk.
        """
        require_common_disk(folder, self.device)
        if self.beside is None:
            group: Any = torch.distributed.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
            self.beside, self.mesh = replace(self.device, control=group), DeviceMesh.from_group(group, "cpu")

    def follow(self, optimizer: torch.optim.Optimizer, parts: Callable[[], Parts]) -> None:
        """Have the updates of a stage wait for copies; after the first one, which makes its state, get memory ready."""

        def get_ready(*_: Any) -> None:
            handle.remove()
            self.memory = self.places(parts())
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
        is written. All ranks call this together, as they gather the weights that are sharded over them.

        Waits for the checkpoint before. Raises UserError where the disk has too little space for this one.
        """
        self.wait()
        if self.device.is_first:
            require_space(folder, bytes_of(parts))
        self.memory, later = self.places(parts), []
        for part, tensors in parts.items():
            for name, tensor in tensors.items():
                place = self.memory.get(part, {}).get(name)
                if isinstance(place, DTensor):
                    found, stays = local_of(tensor), True
                else:
                    found = checkpoint.whole(tensor)
                    if self.device.is_lazy:
                        found = self.device.whole(found)
                    stays = found is tensor
                if place is not None and stays and found.numel() > SMALL:
                    later.append((local_of(place), found))
                elif place is not None:
                    local_of(place).copy_(found)
        if self.memory:
            self.copied = self.thread.submit(copy, later)
            self.done = self.thread.submit(self.write, self.copied, folder, then, fields)

    def places(self, parts: Parts) -> Parts:
        """Where the copies go of what this rank writes."""
        return {
            part: {name: self.place(part, name, tensor) for name, tensor in tensors.items()}
            for part, tensors in parts.items()
            if self.device.is_first or is_sharded(part, tensors)
        }

    def place(self, part: str, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Where a tensor's copy goes: the memory of the checkpoint before, if it is of the same kind."""
        kept, is_part = self.memory.get(part, {}).get(name), is_sharded(part, {name: tensor})
        kind = (tensor.shape, tensor.dtype, is_part)
        if kept is not None and (kept.shape, kept.dtype, isinstance(kept, DTensor)) == kind:
            return kept
        if not is_part:
            return self.device.host_memory(tensor)
        assert isinstance(tensor, DTensor)
        mine, how = self.device.host_memory(local_of(tensor)), tensor.placements
        return DTensor.from_local(mine, self.mesh, how, run_check=False, shape=tensor.shape, stride=tensor.stride())

    def write(self, copied: Future[None], folder: Path, then: Callable[[], None], fields: Mapping[str, Any]) -> None:
        """Write what was copied, and say so in time where the next checkpoint will find too little space."""
        copied.result()
        written: dict[str, Any] = {**self.memory, **fields}
        if is_sharded("optimizer", self.memory.get("optimizer", {})):
            assert self.beside is not None
            shards = partial(checkpoint.write_shards, tensors=written.pop("optimizer"), ranks=self.beside)
            is_there = self.beside.on_first(folder.exists)
            if not self.device.is_first:
                if not is_there:
                    shards(None)
                return
            written["shards"] = shards
        checkpoint.save(folder, **written)
        then()
        try:
            require_space(folder, bytes_of(self.memory))
        except UserError as error:
            warn_on_stderr(str(error))


def is_sharded(part: str, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether each rank writes its part of these tensors of a checkpoint: the weights and averages are gathered."""
    return part == "optimizer" and any(isinstance(each, DTensor) for each in tensors.values())


def touch(memory: Parts) -> None:
    """Have the system give all pages of the memory."""
    for tensors in memory.values():
        for tensor in tensors.values():
            local_of(tensor).zero_()


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


def require_common_disk(folder: Path, device: Device) -> None:
    """Raises UserError, on all ranks, where they don't see the first one's files in `folder`."""

    def leave_mark() -> Path:
        mark = make_folder(folder) / f".mark.{secrets.randbits(60)}"
        mark.touch()
        return mark

    mark = device.on_first(leave_mark)
    (is_missing,) = device.agree(not mark.exists())
    if device.is_first:
        remove(mark)
    if is_missing:
        raise UserError(
            f"each rank writes its part of what is sharded, and some don't see rank 0's {folder}: give all ranks an "
            "--out on a disk that they share, or set shard_weights=false"
        )
