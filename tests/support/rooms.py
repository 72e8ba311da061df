"""Which room may import which: the one table, read by the layout test and by the picture in docs/architecture.md.

A room is a folder; `clipkit`, `tfrecord_tools`, `train` and `eval` are the files at the top of those. Importing
`clipkit` (config, log, errors, …) is allowed to all and isn't written down for each.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
STAGES = ("tfrecord_tools", "eval", "train")


def _tools(*names: str) -> tuple[str, ...]:
    return tuple(f"tfrecord_tools/{name}" for name in names)


def _core(*names: str) -> tuple[str, ...]:
    return tuple(f"clipkit/{name}" for name in names)


MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "clipkit": _core("cli", "embedding", "formats", "interop", "jobs", "model", "pixels", "storage", "text"),
    "clipkit/cli": (
        *_core("embedding", "export", "jobs", "storage"),
        *("eval", "eval/classification", "eval/comparison", "eval/report", "eval/search", "tfrecord_tools"),
        *("train", "train/bench", "train/plan", "train/sources", "train/sweep", "train/teachers", "train/watch"),
        *_tools("build", "captions", "download", "in_place", "inspection", "labelled", "pictures", "purge"),
        *_tools("verify", "web"),
    ),
    "clipkit/formats": _core("storage"),
    "clipkit/embedding": _core("model", "pixels", "storage"),
    "clipkit/export": _core("embedding", "interop", "model", "pixels", "storage"),
    "clipkit/interop": _core("embedding", "model", "pixels", "storage", "text"),
    "clipkit/jobs": (),
    "clipkit/model": _core("text"),
    "clipkit/page": _core("storage"),
    "clipkit/pixels": (),
    "clipkit/storage": (),
    "clipkit/text": (),
    # What the commands share: from the ground up.
    "tfrecord_tools": _core("formats"),
    "tfrecord_tools/tables": (*_core("formats", "storage"), "tfrecord_tools"),
    "tfrecord_tools/pictures": (*_core("pixels"), "tfrecord_tools"),
    "tfrecord_tools/readers": (*_core("formats", "storage"), "tfrecord_tools", *_tools("tables")),
    "tfrecord_tools/account": (*_core("formats", "storage"), "tfrecord_tools"),
    "tfrecord_tools/writing": (*_core("formats", "pixels", "storage"), "tfrecord_tools", *_tools("pictures")),
    "tfrecord_tools/rewriting": (*_core("formats", "storage"), *_tools("tables", "writing")),
    "tfrecord_tools/web": (*_core("storage"), "tfrecord_tools"),
    # The commands, which never import each other.
    "tfrecord_tools/build": (
        *_core("formats", "jobs", "pixels", "storage", "text"),
        "tfrecord_tools",
        *_tools("pictures", "readers", "tables", "writing"),
    ),
    "tfrecord_tools/download": (
        *_core("formats", "jobs", "storage"),
        "tfrecord_tools",
        *_tools("account", "pictures", "readers", "tables", "web", "writing"),
    ),
    "tfrecord_tools/in_place": (*_core("formats", "jobs", "storage"), "tfrecord_tools", *_tools("pictures", "writing")),
    "tfrecord_tools/inspection": (*_core("formats", "page", "pixels", "storage", "text"), *_tools("pictures")),
    "tfrecord_tools/labelled": (*_core("formats", "jobs", "storage"), "tfrecord_tools", *_tools("pictures", "writing")),
    "tfrecord_tools/captions": (
        *_core("formats", "jobs", "storage"),
        *_tools("account", "rewriting", "tables", "writing"),
    ),
    "tfrecord_tools/purge": (
        *_core("formats", "jobs", "storage"),
        "tfrecord_tools",
        *_tools("account", "pictures", "rewriting", "tables"),
    ),
    "tfrecord_tools/verify": (
        *_core("formats", "jobs", "pixels", "storage"),
        "tfrecord_tools",
        *_tools("pictures", "readers"),
    ),
    # Training, which may use evaluation.
    "train": (
        *_core("embedding", "formats", "interop", "model", "pixels", "storage", "text"),
        "eval",
        "train/fit",
        "train/loader",
        "train/sources",
        "train/teachers",
        "train/watch",
    ),
    "train/fit": (*_core("model"), "train"),
    "train/sources": (*_core("formats", "jobs", "pixels", "storage"), "eval/classification", "train", "train/teachers"),
    "train/loader": (*_core("formats", "pixels", "text"), "train", "train/sources", "train/teachers"),
    "train/teachers": (
        *_core("embedding", "formats", "interop", "jobs", "model", "pixels", "storage"),
        "train",
        "train/loader",
        "train/sources",
    ),
    "train/watch": (*_core("model", "pixels", "storage", "text"), "train", "train/loader", "train/sources"),
    "train/plan": (*_core("formats", "jobs", "model", "page", "storage"), "train", "train/fit"),
    "train/sweep": (
        *_core("jobs", "page", "storage", "text"),
        "eval",
        "train",
        "train/loader",
        "train/plan",
        "train/sources",
    ),
    "train/bench": (*_core("jobs", "pixels", "text"), "train", "train/fit", "train/loader", "train/sources"),
    "eval": (
        *_core("embedding", "formats", "interop", "jobs", "pixels", "storage"),
        *("eval/choice", "eval/classification", "eval/probe", "eval/retrieval"),
    ),
    "eval/choice": (*_core("embedding", "formats", "pixels", "storage"), "eval", "eval/retrieval"),
    "eval/classification": (*_core("embedding", "formats", "pixels", "storage"), "eval"),
    "eval/comparison": ("eval",),
    "eval/probe": (*_core("embedding", "formats", "pixels"), "eval", "eval/classification", "eval/retrieval"),
    "eval/report": (*_core("formats", "model", "page", "storage", "text"), "eval", "eval/comparison"),
    "eval/retrieval": (*_core("embedding", "formats", "pixels", "storage"), "eval", "eval/classification"),
    "eval/search": (
        *_core("embedding", "formats", "interop", "page", "pixels", "storage"),
        *("eval", "eval/classification"),
    ),
}


def source_files() -> list[Path]:
    """Every Python file that is shipped."""
    return sorted(path for folder in ("clipkit", *STAGES) for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    """The dotted name by which a file is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    dotted = ".".join(parts if parts[0] == "clipkit" else ("clipkit", *parts))
    return dotted.removesuffix(".__init__")


def room_of(path: Path) -> str:
    """The folder that a file stands in."""
    return path.parent.relative_to(ROOT).as_posix()


@cache
def _modules() -> dict[str, Path]:
    return {module_name(path): path for path in source_files()}


def imports(path: Path) -> Iterator[Path]:
    """The files of ours that a file imports, anywhere in it."""
    modules = _modules()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules else node.module for name in names]
        yield from (modules[name] for name in names if name in modules)


def room_imports(room: str) -> dict[str, set[str]]:
    """The other rooms that a room imports, each with the files concerned; the files at the core's top are left out."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / room).glob("*.py"):
        for other in imports(path):
            if room_of(other) not in (room, "clipkit"):
                found.setdefault(room_of(other), set()).add(f"{path.name} -> {other.name}")
    return found


def circles() -> list[tuple[str, ...]]:
    """Files that import each other in a loop (imports for type checkers count)."""
    graph = {path: set(imports(path)) - {path} for path in source_files() if path.name != "__init__.py"}
    found: list[tuple[str, ...]] = []
    while True:
        leaves = {path for path, others in graph.items() if not any(other in graph for other in others)}
        if not leaves:
            break
        graph = {path: others for path, others in graph.items() if path not in leaves}
    while True:
        roots = {path for path in graph if not any(path in others for others in graph.values())}
        if not roots:
            break
        graph = {path: others for path, others in graph.items() if path not in roots}
    if graph:
        found.append(tuple(str(path.relative_to(ROOT)) for path in graph))
    return found
