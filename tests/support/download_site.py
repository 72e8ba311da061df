"""A small site with good and bad images, the table that lists it, and downloads of it, for the tests of `download`."""

import contextlib
import io
import tarfile
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from clipkit.cli.demo_server import Answer, serve
from clipkit.formats.dataset import open_dataset
from clipkit.jobs.local import run_here
from clipkit.tfrecord_tools.download import work
from clipkit.tfrecord_tools.download.command import download
from clipkit.tfrecord_tools.download.finish import DownloadSummary
from clipkit.tfrecord_tools.pictures.picture import PictureSettings
from clipkit.tfrecord_tools.web.settings import FetchSettings

NETWORK = FetchSettings(allow_private_hosts=True, timeout=60, deadline=60, per_host=64)
PICTURES = PictureSettings(image_size=32)


def encoded(kind: str, mode: str = "RGB", seed: int = 0, **options: object) -> bytes:
    """40 × 48 pixels of noise as a file."""
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 48, len(mode)), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(), mode).save(buffer, kind, **options)
    return buffer.getvalue()


JPEG = encoded("JPEG", quality=95)
# Path, caption, answer, and the reason to fail, if any.
ROWS: list[tuple[str, str | None, Answer, str | None]] = [
    ("/plain.jpg", "a plain one", Answer(JPEG), None),
    ("/progressive.jpg", "naïve “quotes”, 二つ", Answer(encoded("JPEG", progressive=True)), None),
    ("/alpha.png", None, Answer(encoded("PNG", "RGBA")), None),
    ("/some.webp", "  ", Answer(encoded("WEBP")), None),
    ("/grey.jpg", "grey", Answer(encoded("JPEG", "L")), None),
    ("/cut.jpg", "cut", Answer(JPEG[: len(JPEG) // 2]), "truncated"),
    ("/cut.png", "cut", Answer(encoded("PNG")[:-20]), "truncated"),
    ("/page.jpg", "a page", Answer(b"<html>no image</html>", "image/jpeg"), "not-an-image"),
    ("/empty.jpg", "empty", Answer(b""), "empty"),
    ("/gone.jpg", "gone", Answer(b"", status=HTTPStatus.GONE), "http-4xx"),
    ("/down.jpg", "down", Answer(b"", status=HTTPStatus.SERVICE_UNAVAILABLE), "http-5xx"),
]
OTHER_URLS = [
    ("file:///etc/passwd", "a file", "bad-url"),
    ("not a url", "nonsense", "bad-url"),
    (None, "null", "bad-url"),
    ("http://127.0.0.1:1/refused.jpg", "refused", "connect"),
]
COUNT = len(ROWS) + len(OTHER_URLS)
REASONS = [row[3] for row in ROWS] + [row[2] for row in OTHER_URLS]
CAPTIONS = [row[1] for row in ROWS] + [row[1] for row in OTHER_URLS]


def answers() -> dict[str, Answer]:
    return {path: answer for path, _, answer, _ in ROWS}


@contextlib.contextmanager
def site(port: int = 0) -> Iterator[str]:
    """Serve the rows; yields the base URL."""
    with serve(answers(), port) as base_url:
        yield base_url


def table(base_url: str) -> pa.Table:
    """The table of the site in LAION-400M's columns, with similarities from 0 in steps of 0.01."""
    urls = [base_url + path for path, *_ in ROWS] + [url for url, *_ in OTHER_URLS]
    similarity = [i / 100 for i in range(COUNT)]
    licences = [None, *["CC0"] * (COUNT - 1)]
    return pa.table(
        {"URL": urls, "TEXT": CAPTIONS, "similarity": similarity, "LICENSE": licences, "HEIGHT": [1] * COUNT}
    )


def port_of(urls: Path, column: str = "URL") -> int:
    return int(pq.read_table(urls)[column][0].as_py().split(":")[2].split("/")[0])


def run_in_this_process(function: Any, items: Any, *, describe: Any, **_: Any) -> Any:
    """Stands in for `run_jobs`: the workers' part here too."""
    return run_here(function, items, describe)


def fetch(urls: Path | str, out: Path | str, **options: Any) -> DownloadSummary:
    """A download with small settings that reach loopback. Its worker is this process, which has everything imported,
    unless `processes` says how many of their own there are."""
    settings = {"network": NETWORK, "pictures": PICTURES, "samples_per_shard": 6, **options}
    if "processes" in options:
        return download(urls, out, **settings)
    with patch.object(work, "run_jobs", run_in_this_process):
        return download(urls, out, processes=1, **settings)


def write_urls(path: Path, **columns: Any) -> Path:
    """A table of these columns, or of one row."""
    pq.write_table(pa.table(columns or {"url": ["http://127.0.0.1:1/a.jpg"], "caption": ["a"]}), path)
    return path


def numbered(count: int, size: int = 40) -> dict[str, bytes]:
    """`count` different JPEGs by path."""
    return {f"/{number}.jpg": encoded("JPEG", seed=number) for number in range(count)}


def write_numbered(path: Path, base_url: str, count: int) -> Path:
    """The table of `numbered` images."""
    urls = [f"{base_url}/{number}.jpg" for number in range(count)]
    return write_urls(path, url=urls, caption=[f"caption {number}" for number in range(count)], number=range(count))


def members(out: Path) -> dict[str, dict[str, bytes]]:
    """The samples of all tars in a folder, by key and suffix."""
    samples: dict[str, dict[str, bytes]] = {}
    for shard in sorted(out.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                data = tar.extractfile(member)
                assert data is not None
                samples.setdefault(key, {})[suffix] = data.read()
    return samples


def examples(root: Path) -> list[dict[str, Any]]:
    """All records of a dataset, in order."""
    dataset = open_dataset(root)
    return [dataset.example(i) for i in range(len(dataset))]


def file_bytes(root: Path) -> dict[str, bytes]:
    """All files below a folder by name, but those that tell times."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != ".lock" and not path.name.endswith(("_stats.json", "download.json"))
        and path.parent.name != "shards"
    }  # fmt: skip
