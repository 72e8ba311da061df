"""Small real inputs that several test modules share."""

import io
import json
import os
import signal
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from PIL import Image

if TYPE_CHECKING:
    from browser import Browser

# Tests run side by side, one a core: more threads in each would only wait for each other. Child processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Where tests are started in the background, a shell has SIGINT ignored, and so would every process that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A slow machine is no failure.
settings.register_profile("clipkit", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("clipkit")

COLOURS = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 200), "yellow": (220, 200, 40)}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs a browser; put the longest tests first, so that no core is left alone with them at the end."""
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker("browser")
    longest = ("test_xla", "test_demo", "test_jobs_engines", "test_loop")
    items.sort(key=lambda item: item.path.stem not in longest)


def picture(number: int, colour: tuple[int, int, int], size: int = 40) -> bytes:
    """A JPEG of one colour with a shape of noise in it, different for each number."""
    pixels_HWC = np.full((size, size + number % 8, 3), colour, dtype=np.uint8)
    noise = np.random.default_rng(number).integers(0, 255, (size // 2, size // 2, 3))
    pixels_HWC[size // 4 : size // 4 + size // 2, 4 : 4 + size // 2] = noise
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_tar(path: Path, samples: list[tuple[str, dict[str, bytes]]]) -> None:
    """An image-text shard as img2dataset's webdataset writer leaves it: KEY.jpg, KEY.txt, KEY.json."""
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def pairs(count: int) -> list[tuple[str, dict[str, bytes]]]:
    """`count` samples of four colours, their captions alike in part."""
    samples = []
    for number in range(count):
        name, colour = list(COLOURS.items())[number % len(COLOURS)]
        caption = f"a {name} square, number {number // 8} of many others"
        columns = {"key": f"{number:09d}", "url": f"http://localhost/{number}.jpg", "similarity": number / count}
        members = {"jpg": picture(number, colour), "txt": caption.encode(), "json": json.dumps(columns).encode()}
        samples.append((f"{number:09d}", members))
    return samples


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
