"""Image shards for tests: small real images, and tars as img2dataset's webdataset writer makes them."""

import importlib.util
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import webdataset
from PIL import Image


def picture(number: int = 0, image_format: str = "JPEG", size: int = 16) -> bytes:
    """An encoded image with smooth colours of its own for each number."""
    ramp = np.linspace(0, 200, size, dtype=np.uint8)
    across, down = np.tile(ramp, (size, 1)), np.tile(ramp[:, None], (1, size))
    image = np.stack([across, down, np.full((size, size), number % 256)], 2)
    buffer = io.BytesIO()
    Image.fromarray(image.astype(np.uint8)).save(buffer, image_format)
    return buffer.getvalue()


def pair(number: int, **changes: Any) -> dict[str, Any]:
    """Members of a good sample by suffix; `changes` replaces members, None takes one out, `json` adds columns."""
    key = f"{number:09d}"
    columns = {
        "url": f"http://example.org/{number}.jpg",
        "caption": f"picture number {number}",
        "key": key,
        "status": "success",
        "error_message": None,
        "width": 16,
        "height": 16 + number % 3,
        "similarity": number / 8,
    }
    extra = changes.pop("json", {})
    members = {
        "jpg": picture(number),
        "txt": columns["caption"],
        "json": {**columns, **extra} if isinstance(extra, dict) else extra,
    }
    members.update(changes)
    return {"__key__": key, **{suffix: value for suffix, value in members.items() if value is not None}}


def write_tar(path: Path, samples: Sequence[Mapping[str, Any]]) -> Path:
    """A tar through webdataset's own writer. `json` may be bytes, to be written as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as writer:
        for sample in samples:
            columns = sample.get("json")
            as_text = {"json": json.dumps(columns, indent=4)} if isinstance(columns, dict) else {}
            writer.write({**sample, **as_text})
    return path


def write_tars(folder: Path, counts: Sequence[int]) -> list[Path]:
    """Tars `00000.tar` … with so many good samples each, numbered through."""
    tars, first = [], 0
    for shard, count in enumerate(counts):
        tars.append(write_tar(folder / f"{shard:05d}.tar", [pair(first + i) for i in range(count)]))
        first += count
    return tars


def img2dataset_writer() -> ModuleType:
    """img2dataset's writers without the rest of the package, which takes ten seconds to import."""
    package = importlib.util.find_spec("img2dataset")
    assert package is not None
    assert package.submodule_search_locations is not None
    path = Path(package.submodule_search_locations[0]) / "writer.py"
    spec = importlib.util.spec_from_file_location("img2dataset_writer", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tar_of_odd_names(path: Path, tar_format: int) -> Path:
    """A tar with long and foreign names, as far as the format has them, files of all lengths, a folder and a link."""
    names = ["a.jpg", "part/b.JPG", "x" * 90 + "/" + "y" * 60 + ".txt", "c." + "z" * 95]
    if tar_format != tarfile.USTAR_FORMAT:
        names += ["d" * 300 + ".jpg", "é/猫.txt"]
    with tarfile.open(path, "w", format=tar_format) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for number, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size, member.mtime = number * 511, 1.5 if tar_format == tarfile.PAX_FORMAT else 1
            tar.addfile(member, io.BytesIO(bytes([number]) * member.size))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "a.jpg"
        tar.addfile(link)
    return path
