"""img2dataset's classes without what its package drags in and a worker never uses.

`import img2dataset` loads torch, ray, wandb, pandas and more: 9 s of processor time and 550 MB for each worker process.
While a class is imported here, those look as if they weren't installed; afterwards they can be imported as ever.
"""

import contextlib
import importlib.abc
import os
import sys
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

HIDDEN = ("torch", "huggingface_hub", "ray", "pyspark")
# Imported by name at the top of img2dataset's modules, so they have to be there.
HOLLOW = ("wandb", "pandas", "fire")


@dataclass(frozen=True)
class Hider(importlib.abc.MetaPathFinder):
    """Makes modules look as if they weren't installed."""

    names: tuple[str, ...]

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        """Raises ModuleNotFoundError for the hidden ones."""
        if fullname in self.names:
            raise ModuleNotFoundError(f"{fullname} is hidden, as it takes long to import", name=fullname)


@contextlib.contextmanager
def hidden(*names: str) -> Iterator[None]:
    """In the block, modules that aren't imported yet look as if they weren't installed, to other threads too."""
    hider = Hider(names)
    sys.meta_path.insert(0, hider)
    try:
        yield
    finally:
        sys.meta_path.remove(hider)


@contextlib.contextmanager
def light_imports() -> Iterator[None]:
    """In the block, what img2dataset imports is light. For the start of a process: other threads see it too."""
    # albumentations would ask the network for a newer version of itself.
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    hollow = {name: types.ModuleType(name) for name in HOLLOW if name not in sys.modules}
    sys.modules.update(hollow)
    try:
        with hidden(*HIDDEN), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        for name, module in hollow.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]


@cache
def import_resizer() -> Any:
    """The class img2dataset.resizer.Resizer, safe to call from several threads.

    It points the process's standard output and error elsewhere while it works, to silence decoders: two threads that
    do so lose both for good. We hand it nothing that a decoder complains about, so that is taken out.
    """
    with light_imports():
        from img2dataset import resizer
    resizer.SuppressStdoutStderr = contextlib.nullcontext
    return resizer.Resizer
