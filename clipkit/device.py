"""The only file that tells a CPU, CUDA and XLA apart.

Everything else asks a `Device` for what it needs: where tensors go, how a step ends, what the optimizer may do. On XLA
the trainer runs SPMD: one process a host, one mesh over the chips of all hosts, the batch sharded over the mesh's
`data` axis, weights replicated, and the plain single-device loss. On CUDA and the CPU there is one process a rank
(`torchrun`), each with its slice of the global batch and gathered features.
"""

import contextlib
import importlib.util
import logging
import os
import resource
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from clipkit.choices import Precision
from clipkit.errors import UserError
from clipkit.hardware import Chip, find_chip
from clipkit.jobs.ranks import Ranks, keep_freed_memory
from clipkit.jobs.worker import cores

GOOGLE_PCI_VENDOR = "0x1ae0"
# The others wait so long at most while the first rank saves.
CONTROL_TIMEOUT = timedelta(hours=12)


@dataclass(frozen=True)
class Device(Ranks):
    """Where a run computes. `rank` and `world` are 0 and 1 unless `torchrun` started several processes, or there is one
    on each host of a TPU pod.
    """

    kind: Literal["cpu", "cuda", "tpu", "xla"]
    """A TPU is `xla` by torch_xla, and by torch_tpu, which is used as CUDA is, `tpu`."""
    torch_device: torch.device
    why: str
    rank: int = 0
    world: int = 1
    mesh: Any = None
    control: Any = None
    """A group of the ranks over the CPU, for what isn't a tensor: waiting in it costs the chips nothing. None is the
    default group.
    """

    @property
    def shards(self) -> int:
        """Into how many equal parts a global batch is cut."""
        return int(self.mesh.size()) if self.mesh is not None else self.world

    @property
    def gathers(self) -> bool:
        """Whether a tensor holds only this rank's rows of a batch, so that a loss must fetch the others'."""
        return self.world > 1 and self.mesh is None

    @property
    def shares_batches(self) -> bool:
        """Whether the chips of several processes work on one batch together: all must do the same at the same time."""
        return self.world > 1 and self.mesh is not None

    @property
    def shards_of_tensor(self) -> int:
        """Over how many devices the rows of one tensor are divided."""
        return int(self.mesh.size()) if self.mesh is not None else 1

    @property
    def is_lazy(self) -> bool:
        """Whether tensors are graphs that are still to be run, which no other thread may read."""
        return self.kind == "xla"

    @property
    def static_shapes(self) -> bool:
        """Whether each new shape of a tensor means compiling the step again."""
        return self.kind in ("tpu", "xla")

    def batch(self, arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """Copy this rank's rows of a batch to the device; the first axis of every array is the batch.

        CUDA copies from pinned memory without waiting. XLA makes one tensor of the rows of all hosts, in the order of
        the mesh, and each chip has its part.
        """
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        if self.kind == "cuda":
            pinned = {name: tensor.pin_memory() for name, tensor in tensors.items()}
            # On a stream of its own: the copy runs beside the step that was queued before it.
            step, copy = torch.cuda.current_stream(self.torch_device), copy_stream(self.torch_device)
            with torch.cuda.stream(copy):
                copied = {name: tensor.to(self.torch_device, non_blocking=True) for name, tensor in pinned.items()}
            step.wait_stream(copy)
            for tensor in copied.values():
                tensor.record_stream(step)
            return copied
        if self.kind == "xla":
            return {name: self.send(tensor) for name, tensor in tensors.items()}
        return tensors

    def common_batch(self, arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """Copy a batch to the device that every rank has: of those that share batches, each sends its part."""
        if self.shares_batches:
            arrays = {name: np.split(array, self.world)[self.rank] for name, array in arrays.items()}
        return self.batch(arrays)

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        """The rows of all hosts as one tensor over the mesh, of which this host has those in `tensor`."""
        import torch_xla.core.xla_model as xm
        import torch_xla.distributed.spmd as xs

        rows = xs.ShardingSpec(self.mesh, ("data",) + (None,) * (tensor.dim() - 1), minibatch=True)
        sent: torch.Tensor = xm.send_cpu_data_to_device([tensor], self.torch_device, input_sharding=rows)[0]
        return sent

    def spread(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, its rows divided over the mesh where there is one."""
        if self.kind == "xla":
            import torch_xla.distributed.spmd as xs

            xs.mark_sharding(tensor, self.mesh, ("data",) + (None,) * (tensor.dim() - 1))
        return tensor

    def host_memory(self, like: torch.Tensor) -> torch.Tensor:
        """Memory of the host for copies of `like`: pinned for CUDA, which writes into it several times as fast."""
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=self.kind == "cuda")

    def to_host(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begin to copy a tensor to the host; calling what is returned waits for it and gives the copy."""
        if self.kind != "cuda":
            return tensor.cpu
        copied, event = self.host_memory(tensor).copy_(tensor, non_blocking=True), torch.cuda.Event()
        event.record()

        def wait() -> torch.Tensor:
            event.synchronize()
            return copied

        return wait

    def recompute(self) -> Callable[..., torch.Tensor]:
        """How activations are computed again in the backward pass. None of our blocks draws random numbers.

        XLA would see that the second computation equals the first and keep its result; torch_xla's own function puts a
        barrier between them.
        """
        if self.kind == "xla":
            from torch_xla.utils.checkpoint import checkpoint as xla_checkpoint

            return partial(xla_checkpoint, preserve_rng_state=False)
        return partial(checkpoint, use_reentrant=False, preserve_rng_state=False)

    def autocast(self, precision: Precision) -> contextlib.AbstractContextManager[Any]:
        """bfloat16 arithmetic where asked for, or where `auto` finds hardware for it; float32 otherwise."""
        if self.arithmetic(precision) == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.torch_device.type, dtype=torch.bfloat16)

    def arithmetic(self, precision: Precision) -> Literal["float32", "bfloat16"]:
        """What `precision` means here."""
        if precision != "auto":
            return precision
        if self.kind == "cuda":
            return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
        if self.kind == "xla":
            return "bfloat16" if self.hardware() == "TPU" else "float32"
        return "bfloat16" if self.kind == "tpu" else "float32"

    @contextlib.contextmanager
    def loss_products(self) -> Iterator[None]:
        """Products of float32 as the losses take them: on CUDA of factors rounded to TF32's 10 bits, summed in float32.

        A TPU's default of bfloat16 isn't enough for logits of 100: three passes make it about 14 bits.
        """
        change: Callable[[Any], object]
        if self.kind == "cuda":
            matmul = torch.backends.cuda.matmul
            before, wanted, change = matmul.fp32_precision, "tf32", partial(setattr, matmul, "fp32_precision")
        elif self.kind == "xla":
            from torch_xla.backends import get_mat_mul_precision, set_mat_mul_precision

            before, wanted, change = get_mat_mul_precision(), "high", set_mat_mul_precision
        elif self.kind == "tpu":
            before, wanted, change = torch.get_float32_matmul_precision(), "high", torch.set_float32_matmul_precision
        else:
            yield
            return
        change(wanted)
        try:
            yield
        finally:
            change(before)

    def arithmetic_choices(self, precision: Precision) -> Sequence[Literal["float32", "bfloat16"]]:
        """What `precision` may mean here, where `auto` can't be known without trying: on a processor that multiplies
        in bfloat16, which pays for some shapes only.
        """
        if self.kind == "cpu" and precision == "auto" and has_fast_bfloat16():
            return ("float32", "bfloat16")
        return (self.arithmetic(precision),)

    def alone(self) -> "Device":
        """This device without the other ranks."""
        return replace(self, rank=0, world=1, control=None)

    @property
    def survives_want_of_memory(self) -> bool:
        """Whether a step that finds no memory left is an error that the process outlives."""
        return self.kind == "cuda"

    def has_memory_for(self, work: Callable[[], object]) -> bool:
        """Whether `work()` finds the memory that it needs, with a twelfth of the device's to spare."""
        cuda = self.kind == "cuda"
        if cuda:
            torch.cuda.set_per_process_memory_fraction(1 - 1 / 12, self.torch_device)
        try:
            work()
        except torch.OutOfMemoryError:
            return False
        finally:
            if cuda:
                torch.cuda.set_per_process_memory_fraction(1.0, self.torch_device)
                torch.cuda.empty_cache()
        return True

    def hardware(self) -> str:
        """The kind of chip behind the device, as its runtime calls it."""
        if self.kind == "cuda":
            return torch.cuda.get_device_name(self.torch_device)
        if self.kind == "xla":
            import torch_xla.runtime

            return str(torch_xla.runtime.device_type())
        if self.kind == "tpu":
            return str(torch.get_device_module(self.torch_device).get_device_name())
        return f"CPU, {torch.get_num_threads()} threads"

    def peak_flops(self) -> float | None:
        """The published dense bfloat16 peak of all devices together, in operations a second; None where unknown."""
        chip = self.chip()
        return chip.tflops * 1e12 * self.shards if chip else None

    def chip(self) -> Chip | None:
        """What is published of the chip, where it is known."""
        return find_chip(os.environ.get("TPU_ACCELERATOR_TYPE", "") if self.static_shapes else self.hardware())

    def memory(self) -> float | None:
        """The bytes of one chip's memory, where that is known; None on a CPU."""
        if self.kind == "cuda":
            return torch.cuda.get_device_properties(self.torch_device).total_memory
        chip = self.chip()
        return chip.memory_gb * 1e9 if chip else None

    def optimizer_options(self, learning_rate: float) -> dict[str, Any]:
        """AdamW's options that suit the device.

        On XLA the learning rate and the step counter are tensors on the device: as Python numbers they would be
        constants of the graph, and each step would compile a new one.
        """
        if self.kind == "xla":
            return {"lr": torch.tensor(learning_rate, device=self.torch_device), "capturable": True, "foreach": False}
        return {"lr": learning_rate, "fused": self.kind != "tpu"}

    def set_learning_rate(self, optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
        """Set the learning rate of all groups without a new graph."""
        for group in optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"] = torch.tensor(learning_rate, device=self.torch_device)
            else:
                group["lr"] = learning_rate

    def is_sharding(self, asked: bool | Literal["auto"], weights: int) -> bool:
        """Whether each rank holds only a part of so many weights, of their gradients and of the optimizer's state.
        `auto`: where all of it (16 bytes a weight) would take more than an eighth of a chip's memory.
        """
        is_large = asked == "auto" and 8 * 16 * weights > (self.memory() or float("inf"))
        return self.shards > 1 and (asked is True or is_large)

    def shard(self, model: torch.nn.Module, blocks: Sequence[torch.nn.Module], precision: Precision) -> None:
        """Leave each rank its part of the model's weights (FSDP2), gathered block by block in the arithmetic of
        `precision`. Scalars stay whole: `gradient_norms` of `train` averages their gradients.

        On XLA matrices are divided over the mesh, and the compiler sees where to gather them, as what passes from block
        to block is divided by rows.
        """
        if self.kind == "xla":
            for parameter in model.parameters():
                self.divide(parameter)
            for block in blocks:
                block.register_forward_hook(lambda _, inputs, output: self.spread(output))
            return
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = torch.distributed.init_device_mesh(self.torch_device.type, (self.world,))
        lower = torch.bfloat16 if self.arithmetic(precision) == "bfloat16" else None
        for block in blocks:
            # As autocast does it: what passes from block to block stays in float32.
            policy = MixedPrecisionPolicy(lower, torch.float32, cast_forward_inputs=False)
            fully_shard(block, mesh=mesh, mp_policy=policy)
        scalars = {parameter for parameter in model.parameters() if parameter.ndim == 0}
        fully_shard(model, mesh=mesh, ignored_params=scalars)

    def divide(self, tensor: torch.Tensor) -> None:
        """Divide a matrix over the mesh, along the longest of its axes that have equal parts for all devices."""
        import torch_xla.distributed.spmd as xs

        longest = max((size for size in tensor.shape if size % self.shards == 0), default=0)
        if tensor.dim() > 1 and longest:
            axis = tensor.shape.index(longest)
            xs.mark_sharding(tensor, self.mesh, tuple("data" if each == axis else None for each in range(tensor.dim())))

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor that may be divided over a mesh, whole and on the host. All ranks that share batches call this."""
        if self.kind == "xla":
            import torch_xla
            import torch_xla.distributed.spmd as xs

            if "devices=" in torch_xla._XLAC._get_xla_sharding_spec(tensor):  # `cpu` would compile each time
                tensor = tensor.mul(1)  # a new one, without a mark
                xs.mark_sharding(tensor, self.mesh, (None,) * tensor.dim())
                self.end_step()
        return tensor.cpu()

    def divide_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide an optimizer's state that was read from a checkpoint as the weights are that it belongs to."""
        if self.kind == "xla":
            import torch_xla

            for parameter, state in optimizer.state.items():
                if "devices=" in torch_xla._XLAC._get_xla_sharding_spec(parameter):
                    for tensor in state.values():
                        self.divide(tensor)

    def compiles(self, asked: bool | Literal["auto"]) -> bool:
        """Whether the towers are compiled: `auto` where a kernel's launch and its memory traffic are what costs, and
        Triton is there to compile for.
        """
        return self.kind == "cuda" and importlib.util.find_spec("triton") is not None if asked == "auto" else asked

    def wrap(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model as the step calls it: gradients averaged over the ranks where there are several."""
        if not self.gathers or isinstance(model, FSDPModule):
            return model
        ids = [self.torch_device.index] if self.kind == "cuda" else None
        return torch.nn.parallel.DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)

    def end_step(self) -> None:
        """Tell a lazy device that a step, or a part of one, is complete, so that it compiles and runs it; others run
        already."""
        if self.kind == "xla":
            import torch_xla

            torch_xla.sync()

    def compilations(self) -> int:
        """How many graphs a lazy device has compiled so far; 0 on others."""
        if self.kind != "xla":
            return 0
        import torch_xla.debug.metrics

        # The counter UncachedCompile leaves out what brings a sharded tensor to the host in the middle of a step.
        count, *_ = torch_xla.debug.metrics.metric_data("CompileTime") or (0,)
        return int(count)

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The mean over the ranks of a tensor on the device; on XLA all have the same one."""
        if self.gathers:
            torch.distributed.all_reduce(value)
            value /= self.world
        return value

    def loader_workers(self) -> int:
        """Loader workers for this process: half of its share of the cores where they compute too, else all but one."""
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return max(1, (cores() // 2 if self.kind == "cpu" else cores() - here) // here)

    def peak_memory(self) -> int:
        """The most memory held so far, in bytes: of the GPU on CUDA, elsewhere of this process."""
        if self.kind == "cuda":
            return torch.cuda.max_memory_allocated(self.torch_device)
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return kilobytes if sys.platform == "darwin" else kilobytes * 1024


def pick(name: str = "auto") -> Device:
    """The device that `name` means on this machine: `auto` takes a GPU, then a TPU, then the CPU.

    Joins the group of ranks when `torchrun` set one up. Raises UserError for a device that isn't here.
    """
    if name not in ("auto", "cpu", "gpu", "tpu"):
        raise UserError(f"unknown device {name!r}: choose from auto, cpu, gpu, tpu")
    if name == "tpu":
        return pick_tpu("asked for")
    no_gpu = "this torch was built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
    if name == "gpu" and not torch.cuda.is_available():
        raise UserError(f"no GPU: {no_gpu}; use --device cpu, or run `clipkit doctor`")
    if name == "gpu" or (name == "auto" and torch.cuda.is_available()):
        return join_ranks("cuda", "asked for" if name == "gpu" else "a GPU is here")
    if name == "auto" and has_tpu():
        return pick_tpu("a TPU is here")
    why = "asked for" if name == "cpu" else f"no GPU ({no_gpu}) and no TPU"
    return join_ranks("cpu", why)


def gpus() -> int:
    """How many GPUs this process sees."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def has_fast_bfloat16() -> bool:
    """Whether this processor multiplies in bfloat16: AVX512-BF16 or AMX."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which batches are copied to a GPU."""
    return torch.cuda.Stream(device)


def has_tpu() -> bool:
    """Whether PJRT_DEVICE names a TPU, or one of their packages is installed and one of Google's chips is on the bus.

    Google's virtual machines have other chips of its on the bus as well. Nothing is imported to see.
    """
    if os.environ.get("PJRT_DEVICE", "").upper() == "TPU":
        return True
    if not any(importlib.util.find_spec(name) for name in ("torch_xla", "torch_tpu")):
        return False
    vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
    return any(vendor.read_text().strip() == GOOGLE_PCI_VENDOR for vendor in vendors)


def pick_tpu(why: str) -> Device:
    """A TPU by torch_tpu where that is installed, a process for each chip as on GPUs; else by torch_xla."""
    if importlib.util.find_spec("torch_tpu") is None:
        return pick_xla(why)
    found = torch.accelerator.current_accelerator(check_available=True)  # torch loads torch_tpu by itself
    if found is None or found.type != "tpu":
        raise UserError("torch_tpu finds no TPU here: use --device cpu, or run `clipkit doctor`")
    return join_ranks("tpu", why)


def pick_xla(why: str) -> Device:
    """All XLA devices as a one-axis mesh, those of each host next to each other: one process drives a host's.

    On a pod the processes find each other as torch_xla does, and talk over the CPU about what isn't a tensor.
    """
    try:
        import torch_xla
        import torch_xla.distributed.spmd as xs
        import torch_xla.runtime as xr
    except ImportError as error:
        raise UserError(
            f"no TPU support here ({error}): make an environment of its own with pip install 'clipkit[tpu]'"
        ) from error
    os.environ.setdefault("PJRT_DEVICE", "TPU")
    # It would warn twice a step of `loss_products`.
    logging.getLogger("torch_xla.backends").setLevel(logging.ERROR)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("one process drives all chips of a TPU host: start it without torchrun")
    try:
        xr.use_spmd()
        count, rank, world = xr.global_runtime_device_count(), xr.process_index(), xr.process_count()
        device = Device("xla", torch_xla.device(), f"{why}: {count} × {os.environ['PJRT_DEVICE']}", rank, world)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"XLA found no device ({reason}): on a TPU VM set PJRT_DEVICE=TPU, to try, CPU") from error
    if world > 1 and not torch.distributed.is_initialized():
        import torch_xla.distributed.xla_backend  # makes xla:// known

        torch.distributed.init_process_group("gloo", init_method="xla://", timeout=CONTROL_TIMEOUT)
    # The numbers of a host's chips needn't follow each other.
    numbers = device.gather([int(name.rpartition(":")[2]) for name in torch_xla._XLAC._xla_get_runtime_devices()])
    return replace(device, mesh=xs.Mesh(np.concatenate(numbers), (count,), ("data",)))


def join_ranks(kind: Literal["cpu", "cuda", "tpu"], why: str) -> Device:
    """This process's place among those that `torchrun` started, or the only place there is."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if kind == "cpu":
        device = torch.device("cpu")
        keep_freed_memory()
    else:
        device = torch.device(kind, local)
        torch.get_device_module(device).set_device(device)
    control = None
    if world > 1:
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group({"cpu": "gloo", "cuda": "nccl", "tpu": "tpu_dist"}[kind])
        control = torch.distributed.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
    return Device(kind, device, why, rank, world, control=control)
