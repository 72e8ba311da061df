"""What is shipped: the wheel holds all that a checkout has, and works where no checkout is."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from the sdist, built from a copy of what git knows (so that leftovers can't help)."""
    folder = tmp_path_factory.mktemp("wheel")
    known = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.decode()
    for name in filter(None, known.split("\0")):
        if (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--outdir",
        str(folder / "dist"),
        str(folder / "source"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next((folder / "dist").glob("*.whl"))


def test_the_wheel_holds_every_module_and_data_file(wheel):
    shipped = set(zipfile.ZipFile(wheel).namelist())
    wanted = set()
    for folder in ("clipkit", "tfrecord_tools", "train", "eval"):
        inside = "" if folder == "clipkit" else "clipkit/"
        for pattern in ("*.py", "*.j2", "*.pyi"):
            wanted |= {inside + path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob(pattern)}
    wanted |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "clipkit" / "data").rglob("*") if path.is_file()}
    wanted |= {"clipkit/py.typed", "clipkit/pixels/jpeg_crop.abi3.so"}
    assert {"clipkit/page/page.html.j2", "clipkit/pixels/jpeg_crop.pyi", "clipkit/cli/main.py"} <= wanted
    assert wanted - shipped == set()
    strangers = {name.split("/")[0] for name in shipped} - {"clipkit"}
    assert all(name.endswith(".dist-info") for name in strangers)


def test_the_wheel_works_outside_the_checkout(wheel, tmp_path):
    """Unpacked beside the installed dependencies, in a folder with a `train.py` of the user's own."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "train.py").write_text("raise RuntimeError('the user\\'s own file was imported')")
    code = (
        "import clipkit.train.loop, clipkit.eval.report.page, clipkit.tfrecord_tools.build.command\n"
        "import clipkit.embedded as e\n"
        "assert e.emoji_parquet('train').is_file() and e.bert_vocabulary().is_file()\n"
        "import clipkit.train.loader.crop\n"
        "assert clipkit.train.loader.crop.COMPILED\n"
        "print(clipkit.train.loop.__file__)\n"
        "import runpy, sys\n"
        "sys.argv = ['clipkit', 'recipes']\n"
        "runpy.run_module('clipkit', run_name='__main__')"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == str(tmp_path / "site" / "clipkit" / "train" / "loop.py")
    assert "emoji-demo" in done.stdout
