"""Pairs that a tiny model can learn: squares of four colours, their captions naming the colour."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 200), "yellow": (220, 200, 40)}


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
