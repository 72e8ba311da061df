"""The house rules that no single module can keep: what is packaged, and who imports whom."""

import ast
import configparser
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAGES = ("tfrecord_tools", "eval", "train")
MAY_IMPORT = {"core": set(), "tfrecord_tools": set(), "eval": set(), "train": {"eval"}}
HEAVY = {"tensorflow", "tensorflow_datasets", "torch_xla", "img2dataset", "ray", "pyspark"}
LIGHT_MODULES = ("cli", "cli_data", "cli_download", "cli_options", "config", "demo", "doctor", "errors", "files", "log")


def source_files() -> list[Path]:
    """Every Python file that is shipped."""
    return sorted(path for folder in ("clipkit", *STAGES) for path in (ROOT / folder).rglob("*.py"))


def imports(path: Path, *, top_level_only: bool) -> set[str]:
    """The dotted names that a file imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = list(tree.body) if top_level_only else list(ast.walk(tree))
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def stage_of(path: Path) -> str:
    folder = path.relative_to(ROOT).parts[0]
    return "core" if folder == "clipkit" else folder


def test_every_package_on_the_disk_is_in_setup_cfg():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    declared = set(config["options"]["packages"].split())
    on_disk = {"clipkit", *(f"clipkit.{stage}" for stage in STAGES)}
    for folder in ("clipkit", *STAGES):
        base = "clipkit" if folder == "clipkit" else f"clipkit.{folder}"
        for init in (ROOT / folder).rglob("__init__.py"):
            below = init.parent.relative_to(ROOT / folder).parts
            on_disk.add(".".join([base, *below]))
    assert declared == on_disk


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_stages_import_the_core_and_nothing_else_crosses(path):
    stage = stage_of(path)
    found = {
        other
        for other in STAGES
        for name in imports(path, top_level_only=False)
        if f"{name}.".startswith(f"clipkit.{other}.")
    }
    allowed = MAY_IMPORT[stage] | {stage}
    if path.name.startswith("cli") and stage == "core":
        assert not {
            name for name in imports(path, top_level_only=True) if any(name.startswith(f"clipkit.{s}") for s in STAGES)
        }
        return
    assert found <= allowed


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_heavy_packages_are_imported_inside_functions_alone(path):
    assert not {name for name in imports(path, top_level_only=True) if name.split(".")[0] in HEAVY}


def test_xla_is_named_in_device_alone():
    named = {
        path.name
        for path in source_files()
        if any(n.startswith("torch_xla") for n in imports(path, top_level_only=False))
    }
    assert named == {"device.py"}


def test_no_module_is_named_after_one_of_the_standard_library():
    assert not [path for path in source_files() if path.stem in sys.stdlib_module_names]


@pytest.mark.parametrize("arguments", [["--help"], ["download", "--help"], ["train", "--help"], ["zeroshot", "--help"]])
def test_help_loads_neither_torch_nor_numpy(arguments):
    code = (
        "import sys\nfrom clipkit.cli.main import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'torch', 'numpy', 'tensorflow', 'timm', 'cv2', 'rich', 'pyarrow'}\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_light_modules_load_neither_torch_nor_numpy():
    code = (
        "import sys, importlib\n"
        f"for name in {LIGHT_MODULES!r}: importlib.import_module('clipkit.' + name)\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'numpy', 'tensorflow'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
