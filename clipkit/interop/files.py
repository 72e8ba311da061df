"""Other projects' weight files: their tensors by name, without executing what may be in them.

Pickles are read through PyTorch's `weights_only`. It refuses TorchScript archives, in which OpenAI's CLIP is published,
so the tensors of those are read here, by an unpickler that knows tensors and calls nothing else.
"""

import collections
import math
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from clipkit.errors import UserError, one_line
from clipkit.storage.files import require_file

# Under which names OpenCLIP, timm and others keep the weights in a file that has more.
NESTED = ("state_dict", "model")
# And under which their averages.
AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
}


def read_weights(path: Path, ema: bool = False) -> dict[str, Tensor]:
    """A file's tensors by name. Its kind is told from its content. `ema` takes the averages of the weights.

    Raises UserError for a file that is missing, damaged, has no averages, or holds objects that aren't tensors.
    """
    require_file(path, "checkpoint")
    try:
        return tensors_of(read_content(path), ema)
    except NoAveragesError as error:
        raise UserError(f"{path} has no averages of its weights ({' or '.join(AVERAGES)}): omit --ema") from error
    except Exception as error:  # damage in a pickle can lead to any
        # PyTorch's own words are long, and advise to execute the file.
        is_unsafe = "weights_only" in str(error)
        reason = "it holds more than tensors" if is_unsafe else f"{type(error).__name__}: {one_line(error)[:200]}"
        raise UserError(
            f"{path} isn't a file of weights ({reason}): "
            "save the state dict of its model with safetensors.torch.save_file"
        ) from error


def read_content(path: Path) -> Any:
    """What a file of weights holds: tensors by name, or a pickle's objects."""
    with path.open("rb") as file:
        if file.read(9)[8:] == b"{":
            return load_file(path)
    if not zipfile.is_zipfile(path):
        return torch.load(path, map_location="cpu", weights_only=True)
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith("constants.pkl"):
                root = name.removesuffix("constants.pkl")
                return dict(scripted_tensors(ScriptUnpickler(archive, root).load()))
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


class NoAveragesError(Exception):
    """A file that holds the weights only as they were trained."""


def tensors_of(content: Any, ema: bool) -> dict[str, Tensor]:
    """The state dict in what a file holds, without the prefixes of data parallelism and compilation."""
    if ema and not any(isinstance(content, Mapping) and isinstance(content.get(name), Mapping) for name in AVERAGES):
        raise NoAveragesError
    for name in AVERAGES if ema else NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError("it holds no state dict")
    return {name.removeprefix("module.").removeprefix("_orig_mod."): tensor for name, tensor in content.items()}


# ---- TorchScript -----------------------------------------------------------------------------------------------------


class Scripted:
    """A module of an archive: its attributes, and no code."""


class ScriptUnpickler(pickle.Unpickler):
    """Reads the `data.pkl` of a TorchScript archive. All that it can make are tensors, lists, and `Scripted`."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(archive.open(f"{root}data.pkl"))
        self.archive = archive
        self.root = root

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return Scripted
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return rebuild
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch.jit._pickle":
            return list_of
        raise pickle.UnpicklingError(f"it names {module}.{name}, which isn't read")

    def persistent_load(self, pid: Any) -> Tensor:
        """A storage: its elements in one row."""
        _, dtype, key, _, _ = pid
        return torch.frombuffer(bytearray(self.archive.read(f"{self.root}data/{key}")), dtype=dtype)


def rebuild(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *unused: Any) -> Tensor:
    """A tensor on a storage. Raises RuntimeError where it would reach beyond the storage's end."""
    return storage.as_strided(size, stride, offset) if math.prod(size) else storage.new_empty(size)


def list_of(items: Any, *unused: Any) -> Any:
    """A typed list of the archive as it is."""
    return items


def scripted_tensors(module: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a module and its parts by their dotted names."""
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, Scripted):
            yield from scripted_tensors(value, f"{prefix}{name}.")
