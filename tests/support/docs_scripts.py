"""The scripts of docs/, which are no package, as modules."""

import importlib.util
from types import ModuleType

from rooms import ROOT


def load_script(name: str) -> ModuleType:
    """docs/NAME.py, run as an import."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
