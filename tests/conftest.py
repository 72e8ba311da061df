"""Small real inputs that several test modules share."""

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from colour_pairs import pairs, write_tar
from hypothesis import HealthCheck, settings

from clipkit.jobs.worker import cores

if TYPE_CHECKING:
    from browser import Browser

# Tests run side by side, on all cores: more threads in each would only wait for each other. Child processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Where tests are started in the background, a shell has SIGINT ignored, and so would every process that they start;
# nohup does so with SIGHUP.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# A slow machine is no failure.
settings.register_profile("clipkit", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("clipkit")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One process more than there are cores: much of a run is waiting, for what starts, is killed or times out."""
    return cores() + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs a browser; put the longest tests first, so that no core is left alone with them at the end."""
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker("browser")
    longest = (
        "clipkit/test_xla.py",
        "eval/test_clip_benchmark.py",
        "cli/test_demo.py",
        "jobs/test_engines.py",
        "train/test_loop.py",
    )
    items.sort(key=lambda item: not item.path.as_posix().endswith(longest))


def pytest_collection_finish() -> None:
    """What is imported by now isn't looked through for garbage again and again."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Some packages complain of objects that are left at the end."""
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A user's cache folder for the tests alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def unflushed() -> Iterator[None]:
    """No disk is waited for: no test cuts the power, and a kill loses nothing of what the kernel holds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def pairs_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset directory of 96 pairs in three shards, made by clipkit itself."""
    from clipkit.tfrecord_tools.build.command import build_tfds

    folder = tmp_path_factory.mktemp("pairs")
    shards = folder / "shards"
    shards.mkdir()
    samples = pairs(96)
    for number in range(3):
        write_tar(shards / f"{number:05d}.tar", samples[number * 32 : number * 32 + 32])
    return build_tfds(shards, folder / "data", "colours").path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Browser"]:
    """A headless Chromium for the tests of one module."""
    from browser import open_browser

    with open_browser(tmp_path_factory.mktemp("chromium")) as page:
        yield page
