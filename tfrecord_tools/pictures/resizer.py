"""img2dataset's classes without what its package drags in and a worker never uses.

`import img2dataset` loads torch, wandb, pandas and more: 9 s of processor time and 550 MB for each worker process.
While a class is imported here, those look as if they weren't installed; afterwards they can be imported as ever.
"""

import contextlib
import importlib.abc
import os
import sys
import types
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

HIDDEN = ("torch", "huggingface_hub")
# Imported by name at the top of img2dataset's modules, so they have to be there.
HOLLOW = ("wandb", "pandas", "fire")


class Hider(importlib.abc.MetaPathFinder):
    """Makes modules look as if they weren't installed."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        """Raises ModuleNotFoundError for the hidden ones."""
        if fullname in HIDDEN:
            raise ModuleNotFoundError(f"{fullname} is hidden from img2dataset", name=fullname)


@contextlib.contextmanager
def light_imports() -> Iterator[None]:
    """In the block, what img2dataset imports is light. For the start of a process: other threads see it too."""
    # albumentations would ask the network for a newer version of itself.
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    hider = Hider()
    hollow = {name: types.ModuleType(name) for name in HOLLOW if name not in sys.modules}
    sys.meta_path.insert(0, hider)
    sys.modules.update(hollow)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        sys.meta_path.remove(hider)
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
