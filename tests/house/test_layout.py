"""The house rules that no single module can keep: what is packaged, and which room may import which."""

import ast
import configparser
import subprocess
import sys

import pytest
from rooms import MAY_IMPORT, ROOT, STAGES, circles, imports, module_name, room_imports, room_of, source_files

HEAVY = {"tensorflow", "tensorflow_datasets", "torch_xla", "img2dataset", "ray", "pyspark"}
HEAVY |= {"transformers", "open_clip", "onnx", "onnxruntime"}
LIGHT_MODULES = (
    *("cli.main", "cli.data", "cli.download", "cli.options", "cli.demo", "cli.doctor"),
    *("config", "errors", "log", "storage.files"),
)
MOST_FILES, MOST_LINES, MOST_FUNCTION_LINES = 12, 500, 100


def test_every_package_on_the_disk_is_in_setup_cfg():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    declared = set(config["options"]["packages"].split())
    on_disk = {module_name(init) for folder in ("clipkit", *STAGES) for init in (ROOT / folder).rglob("__init__.py")}
    assert declared == on_disk


def test_every_room_is_in_the_table():
    assert {room_of(path) for path in source_files()} == set(MAY_IMPORT)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_what_it_may(room):
    found = {other: sorted(names) for other, names in room_imports(room).items() if other not in MAY_IMPORT[room]}
    assert found == {}, f"{room} imports {found}: put the code where both can reach it, or change the table"


def test_the_table_allows_nothing_that_is_not_used():
    unused = {room: sorted(set(MAY_IMPORT[room]) - set(room_imports(room))) for room in MAY_IMPORT}
    assert {room: names for room, names in unused.items() if names} == {}


def test_no_two_files_import_each_other_in_a_circle():
    assert circles() == []


def test_a_forbidden_import_is_found(tmp_path):
    """The test above fails when it should: an import of another command's room, added to a copy of a file."""
    copy = tmp_path / "plan.py"
    copy.write_text("def f():\n    from clipkit.tfrecord_tools.purge.command import purge\n    return purge\n")
    assert {room_of(found) for found in imports(copy)} == {"tfrecord_tools/purge"}
    assert "tfrecord_tools/purge" not in MAY_IMPORT["tfrecord_tools/build"]


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_the_door_of_a_room_names_its_parts(room):
    door = ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text(encoding="utf-8"))) or ""
    parts = {path.stem for path in (ROOT / room).glob("*.py")} - {"__init__", "__main__"}
    assert {part for part in parts if f"`{part}`" not in door} == set()


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_rooms_files_and_functions_can_be_read_in_a_sitting(room):
    files = [path for path in (ROOT / room).glob("*.py") if path.name != "__init__.py"]
    assert len(files) <= MOST_FILES
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= MOST_LINES, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= MOST_FUNCTION_LINES, f"{path}: {node.name} has {length} lines"


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_heavy_packages_are_imported_inside_functions_only(path):
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    assert not {name for name in names if name.split(".")[0] in HEAVY}


def test_xla_is_named_in_device_only():
    named = {path.name for path in source_files() if "torch_xla" in path.read_text(encoding="utf-8")}
    assert named <= {"device.py", "doctor.py"}
    imported = {
        path.name
        for path in source_files()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom) and "torch_xla" in ast.unparse(node)
    }
    assert imported == {"device.py"}


def test_no_module_is_named_after_one_of_the_standard_library():
    assert not [path for path in source_files() if path.stem in sys.stdlib_module_names]


@pytest.mark.parametrize("arguments", [["--help"], ["download", "--help"], ["train", "--help"], ["zeroshot", "--help"]])
def test_help_loads_neither_torch_nor_numpy(arguments):
    code = (
        "import sys\nfrom clipkit.cli.main import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'torch', 'numpy', 'tensorflow', 'timm', 'cv2', 'rich', 'pyarrow', 'transformers'}\n"
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
