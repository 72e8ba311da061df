"""An HTTP server on loopback for the demo and the tests: images, and URLs that fail in the ways of the web.

One thread runs an event loop, so that a thousand silent connections cost no further thread.
"""

import asyncio
import contextlib
import io
import random
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from aiohttp import web
from PIL import Image

from clipkit.storage.files import write_beside

HOST = "127.0.0.1"
SHUTDOWN_SECONDS = 0.05  # for answers on their way; silent connections are cut off then
FAULTS = ("not-found", "truncated", "html", "empty", "silent")
HTML_PAGE = b"<!doctype html><title>Parked</title><p>This domain is for sale."


@dataclass(frozen=True)
class Answer:
    """What one path answers. `body` of None: the connection is held and nothing is ever sent."""

    body: bytes | None
    content_type: str = "image/webp"
    status: HTTPStatus = HTTPStatus.OK


def image_path(vendor: str, codepoint: str) -> str:
    """The path under which an embedded drawing is served."""
    return f"/{vendor}/{codepoint}.webp"


def faulty_rows(rows: int, share: float, seed: int) -> dict[int, str]:
    """Which rows are faulty and how: `round(rows * share)` of them, the five faults in equal parts, fixed by `seed`."""
    chosen = sorted(random.Random(seed).sample(range(rows), round(rows * share)))
    return {row: FAULTS[i % len(FAULTS)] for i, row in enumerate(chosen)}


def emoji_site(pairs: pa.Table, faults: Mapping[int, str]) -> dict[str, Answer]:
    """The answers for a table with the columns of the embedded pairs; `faults` maps row numbers to FAULTS.

    Images are sent as the WebP bytes they are: the downloader encodes them again anyway.
    """
    site = {}
    columns = (pairs[name].to_pylist() for name in ("vendor", "codepoint", "image"))
    for row, (vendor, codepoint, image) in enumerate(zip(*columns, strict=True)):
        site[image_path(vendor, codepoint)] = faulty_answer(faults[row], image) if row in faults else Answer(image)
    return site


def faulty_answer(fault: str, image: bytes) -> Answer:
    """How a server fails to deliver `image`, by one of FAULTS."""
    match fault:
        case "not-found":
            return Answer(b"gone\n", "text/plain", HTTPStatus.NOT_FOUND)
        case "truncated":
            jpeg = io.BytesIO()
            Image.open(io.BytesIO(image)).convert("RGB").save(jpeg, "JPEG", quality=95)
            return Answer(jpeg.getvalue()[: len(jpeg.getvalue()) * 3 // 5], "image/jpeg")
        case "html":
            return Answer(HTML_PAGE, "text/html")
        case "empty":
            return Answer(b"")
        case "silent":
            return Answer(None)
    raise ValueError(f"unknown fault: {fault}")


def write_url_table(path: Path, base_url: str, pairs: pa.Table) -> None:
    """Write a URL table in LAION-400M's columns for a table with the columns of the embedded pairs.

    NSFW and similarity are null: nobody has judged these pairs, and no number is made up for them.
    """
    urls = [
        base_url + image_path(v, c)
        for v, c in zip(pairs["vendor"].to_pylist(), pairs["codepoint"].to_pylist(), strict=True)
    ]
    count = len(pairs)
    columns = {
        "SAMPLE_ID": pa.array(range(count), pa.int64()),
        "URL": pa.array(urls, pa.string()),
        "TEXT": pairs["caption"].cast(pa.string()),
        "LICENSE": pairs["license"].cast(pa.string()),
        "NSFW": pa.nulls(count, pa.string()),
        "similarity": pa.nulls(count, pa.float64()),
        "WIDTH": pairs["width"].cast(pa.int32()),
        "HEIGHT": pairs["height"].cast(pa.int32()),
    }
    with write_beside(path) as temporary:
        pq.write_table(pa.table(columns), temporary)


@contextlib.contextmanager
def serve(site: Mapping[str, Answer], port: int = 0) -> Iterator[str]:
    """Serve `site` on loopback from a thread while the block runs; yields the base URL without a slash at its end.

    `port` of 0 takes any free one. Raises OSError (EADDRINUSE) when another program listens on `port`.
    """

    async def respond(request: web.BaseRequest) -> web.StreamResponse:
        if request.method not in ("GET", "HEAD"):
            return web.Response(status=HTTPStatus.METHOD_NOT_ALLOWED)
        answer = site.get(request.rel_url.raw_path)
        if answer is None:
            return web.Response(status=HTTPStatus.NOT_FOUND)
        if answer.body is None:
            await asyncio.Event().wait()
        return web.Response(body=answer.body, content_type=answer.content_type, status=answer.status)

    async def start() -> web.ServerRunner:
        runner = web.ServerRunner(web.Server(respond), shutdown_timeout=SHUTDOWN_SECONDS)
        await runner.setup()
        await web.TCPSite(runner, HOST, port, backlog=1024).start()
        return runner

    async def stop(runner: web.ServerRunner) -> None:
        await runner.cleanup()
        waiting = asyncio.all_tasks() - {asyncio.current_task()}  # for clients whom nothing is answered
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    loop = asyncio.new_event_loop()
    try:
        runner = loop.run_until_complete(start())
        thread = threading.Thread(target=loop.run_forever, name="image server", daemon=True)
        thread.start()
        try:
            yield f"http://{HOST}:{runner.addresses[0][1]}"
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.run_until_complete(stop(runner))
    finally:
        loop.close()
