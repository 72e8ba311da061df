"""One shard of a download, run in a worker process: rows in, a tar of images and captions out.

Fetching, resizing and encoding are img2dataset's. Ours is what surrounds them: a shard is made in a folder of its own
and moved into place whole, its members are in the order of the rows whatever the network did, an image that was cut off
is refused, and the only URLs opened are http and https.
"""

import importlib.abc
import multiprocessing
import os
import ssl
import sys
import tarfile
import time
import types
import urllib.request
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clipkit.errors import InternalError
from clipkit.files import disk_errors, remove, write_beside, write_json
from clipkit.tfrecord_tools.failures import EMPTY, TRUNCATED, read_failures
from clipkit.tfrecord_tools.truncation import is_truncated
from clipkit.tfrecord_tools.url_table import read_rows

COPY_BYTES = 4 << 20


@dataclass(frozen=True)
class Output:
    """What the images become. All of it decides a shard's bytes, so a resumed download must not change it."""

    url_column: str
    caption_column: str
    keep_columns: tuple[str, ...]
    image_size: int
    resize_mode: str
    resize_only_if_bigger: bool
    quality: int
    min_image_size: int
    samples_per_shard: int
    shard_digits: int


@dataclass(frozen=True)
class Shard:
    """Some consecutive rows of one table file, and the number of the shard that they become."""

    number: int
    rows_path: str
    start: int
    rows: int


@dataclass(frozen=True)
class ShardFiles:
    """Where a finished shard lies. The statistics are written last: whoever finds them finds the others."""

    tar: Path
    parquet: Path
    stats: Path


def shard_files(out: Path, name: str) -> ShardFiles:
    """The three files of a shard, named as img2dataset names them."""
    return ShardFiles(out / f"{name}.tar", out / f"{name}.parquet", out / f"{name}_stats.json")


def fetch_shard(
    shard: Shard, *, out: Path, work: Path, output: Output, threads: int, timeout: float, retries: int
) -> None:
    """Download one shard into `out`, by way of a folder in `work`. Raises UserError when the disk refuses."""
    started = time.time()
    name = f"{shard.number:0{output.shard_digits}d}"
    folder = work / f"{name}.{os.getpid()}"
    remove(folder)
    try:
        with disk_errors(out):
            folder.mkdir(parents=True)
            rows_file = folder / "rows.feather"
            rows = rows_for_img2dataset(shard, output)
            with pa.ipc.new_file(rows_file, rows.schema) as writer:
                writer.write_table(rows)
            download = downloader(folder, rows.column_names, output, threads, timeout, retries)
            download.download_shard((shard.number, str(rows_file)))
            publish(shard_files(folder, name), shard_files(out, name), shard, rows, started)
    finally:
        remove(folder)


def rows_for_img2dataset(shard: Shard, output: Output) -> pa.Table:
    """The rows of a shard with the columns named as img2dataset wants them; URL and caption as text."""
    columns = [*output.keep_columns, output.caption_column, output.url_column]
    rows = read_rows(Path(shard.rows_path), shard.start, shard.rows, list(dict.fromkeys(columns)))
    renamed = {name: rows[name] for name in output.keep_columns}
    renamed["caption"] = rows[output.caption_column].cast(pa.string())
    renamed["url"] = rows[output.url_column].cast(pa.string())
    return pa.table(renamed)


def publish(made: ShardFiles, final: ShardFiles, shard: Shard, rows: pa.Table, started: float) -> None:
    """Move a shard into its place, ordered by key, and write its statistics last."""
    final.stats.unlink(missing_ok=True)
    with write_beside(final.tar) as temporary:
        images = sort_tar(made.tar, temporary)
    with write_beside(final.parquet) as temporary:
        table = pq.read_table(made.parquet)
        pq.write_table(table.sort_by("key"), temporary)
    failed = Counter(read_failures(final.parquet)["reason"].to_pylist())
    if table.num_rows != shard.rows or images + failed.total() != shard.rows:
        raise InternalError(
            f"shard {final.tar} holds {images} images and {failed.total()} failures of {shard.rows} rows: "
            "run the same command again, and report it if it stays"
        )
    empty = pc.sum(pc.equal(pc.utf8_trim_whitespace(pc.fill_null(rows["caption"], "")), "")).as_py()
    write_json(
        final.stats,
        {
            "count": shard.rows,
            "successes": images,
            "failed": dict(sorted(failed.items())),
            "empty_captions": empty or 0,
            "start_time": started,
            "end_time": time.time(),
            "tar_bytes": final.tar.stat().st_size,
            "parquet_bytes": final.parquet.stat().st_size,
        },
    )


def sort_tar(source: Path, target: Path) -> int:
    """Copy a tar with its members ordered by name (a sample's parts stay together); return the number of samples.

    Answers come in any order. Ordered, the same images make the same file, and training sees them in the same order.
    """
    with tarfile.open(source) as tar:
        members = sorted(tar.getmembers(), key=lambda member: member.name.partition("."))
    with source.open("rb") as old, target.open("wb") as new:
        for member in members:
            end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            copy_bytes(old, new, member.offset, end - member.offset)
        new.write(bytes(-new.tell() % tarfile.RECORDSIZE or tarfile.RECORDSIZE))
    return len({member.name.partition(".")[0] for member in members})


def copy_bytes(old: BinaryIO, new: BinaryIO, start: int, count: int) -> None:
    """Copy `count` bytes from `start` of one file to the end of another."""
    old.seek(start)
    while count > 0:
        block = old.read(min(count, COPY_BYTES))
        if not block:
            raise InternalError(f"a tar ended {count} bytes early: run the same command again")
        new.write(block)
        count -= len(block)


# ---------------------------------------------------------------------------------------------------------------------
# img2dataset's parts
# ---------------------------------------------------------------------------------------------------------------------


def downloader(folder: Path, columns: list[str], output: Output, threads: int, timeout: float, retries: int) -> Any:
    """img2dataset's Downloader, which writes one shard into `folder`."""
    parts = import_img2dataset()
    install_opener()
    resizer = parts.resizer(
        image_size=output.image_size,
        resize_mode=output.resize_mode,
        resize_only_if_bigger=output.resize_only_if_bigger,
        encode_quality=output.quality,
        min_image_size=output.min_image_size,
    )
    return parts.downloader(
        sample_writer_class=parts.writer,
        resizer=resizer,
        thread_count=threads,
        save_caption=True,
        extract_exif=True,
        output_folder=str(folder),
        column_list=columns,
        timeout=timeout,
        number_sample_per_shard=output.samples_per_shard,
        oom_shard_count=output.shard_digits,
        compute_hash="sha256",
        verify_hash_type=None,
        encode_format="jpg",
        retries=retries,
        user_agent_token=None,
        disallowed_header_directives=["noai", "noimageai", "noindex", "noimageindex"],
    )


@dataclass(frozen=True)
class Parts:
    """The classes taken from img2dataset, two of them with our checks."""

    downloader: Any
    resizer: Any
    writer: Any


class Hidden(importlib.abc.MetaPathFinder):
    """Makes modules look as if they weren't installed."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        if fullname in ("torch", "huggingface_hub", "wandb", "pandas", "fire"):
            raise ModuleNotFoundError(f"{fullname} is hidden from a download worker", name=fullname)


@cache
def import_img2dataset() -> Parts:
    """Import img2dataset's parts without what they drag in and never use here.

    torch, wandb, pandas and others would cost each worker 9 s of processor time and 550 MB: they are hidden, in this
    process alone. albumentations would ask the network for a newer version of itself.
    """
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    # img2dataset's thread pools make semaphores that a killed worker leaves behind, but for this context's.
    multiprocessing.set_start_method("fork", force=True)
    sys.meta_path.insert(0, Hidden())
    hollow = {name: types.ModuleType(name) for name in ("wandb", "pandas", "fire")}
    sys.modules.update(hollow)
    from img2dataset.downloader import Downloader
    from img2dataset.resizer import Resizer
    from img2dataset.writer import WebDatasetSampleWriter

    for name in hollow:
        del sys.modules[name]

    class CheckingResizer(Resizer):
        """Says why before the decoder says that it can't."""

        def __call__(self, img_stream: BinaryIO, blurring_bbox_list: Any = None) -> Any:
            data = img_stream.read()
            img_stream.seek(0)
            if not data:
                return None, None, None, None, None, EMPTY
            if is_truncated(data):
                return None, None, None, None, None, TRUNCATED
            return super().__call__(img_stream, blurring_bbox_list)

    class StrictWriter(WebDatasetSampleWriter):
        """Keeps the first error, such as a full disk, for the end: img2dataset prints a trace for each and goes on."""

        error: Exception | None = None

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.tarwriter.mtime = 0  # the time of download is no part of the data

        def write(self, *arguments: Any) -> None:
            if self.error is None:
                try:
                    super().write(*arguments)
                except Exception as error:
                    self.error = error

        def close(self) -> None:
            super().close()
            if self.error is not None:
                raise self.error

    return Parts(Downloader, CheckingResizer, StrictWriter)


@cache
def install_opener() -> None:
    """Let urllib, which img2dataset calls, open http and https alone: a URL list may come from anywhere.

    The one TLS context is made once a process instead of once an image.
    """
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(context=ssl.create_default_context()),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    urllib.request.install_opener(opener)
