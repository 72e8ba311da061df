"""A real HTTP server on loopback for the demo and the tests: good images, and URLs broken in the ways of the web.

One thread runs an event loop, so that a thousand silent connections cost no thread, and answers are made once at the
start, so that serving takes little of the machine that downloads.
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
from PIL import Image

from clipkit.storage.files import write_beside

HOST = "127.0.0.1"
MAX_REQUEST_BYTES = 32_768
BROKEN_WAYS = ("not-found", "truncated", "html", "empty", "silent")
HTML_PAGE = b"<!doctype html><title>Parked</title><p>This domain is for sale."

# The columns of LAION-400M's URL tables.
URL_TABLE = pa.schema(
    [
        ("SAMPLE_ID", pa.int64()),
        ("URL", pa.string()),
        ("TEXT", pa.string()),
        ("LICENSE", pa.string()),
        ("NSFW", pa.string()),
        ("similarity", pa.float64()),
        ("WIDTH", pa.int32()),
        ("HEIGHT", pa.int32()),
    ]
)


@dataclass(frozen=True)
class Answer:
    """What one path answers. `body` of None: the connection is held and nothing is ever sent."""

    body: bytes | None
    content_type: str = "image/webp"
    status: HTTPStatus = HTTPStatus.OK


def image_path(vendor: str, codepoint: str) -> str:
    """The path under which an embedded drawing is served."""
    return f"/{vendor}/{codepoint}.webp"


def broken_rows(rows: int, share: float, seed: int) -> dict[int, str]:
    """Which rows are broken and how: `round(rows * share)` of them, the five ways in equal parts, fixed by `seed`."""
    chosen = sorted(random.Random(seed).sample(range(rows), round(rows * share)))
    return {row: BROKEN_WAYS[i % len(BROKEN_WAYS)] for i, row in enumerate(chosen)}


def emoji_site(pairs: pa.Table, broken: Mapping[int, str]) -> dict[str, Answer]:
    """The answers for a table with the columns of the embedded pairs; `broken` maps row numbers to BROKEN_WAYS.

    Images are sent as the WebP bytes they are: the downloader encodes them anew anyway.
    """
    site = {}
    columns = (pairs[name].to_pylist() for name in ("vendor", "codepoint", "image"))
    for row, (vendor, codepoint, image) in enumerate(zip(*columns, strict=True)):
        site[image_path(vendor, codepoint)] = broken_answer(broken[row], image) if row in broken else Answer(image)
    return site


def broken_answer(way: str, image: bytes) -> Answer:
    """One of BROKEN_WAYS to fail to deliver `image`."""
    match way:
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
    raise ValueError(f"unknown way to break a URL: {way}")


def write_url_table(path: Path, base_url: str, pairs: pa.Table) -> None:
    """Write a URL table in LAION-400M's columns for a table with the columns of the embedded pairs.

    NSFW and similarity are null: nobody has judged these pairs, and no number is made up for them.
    """
    paths = [image_path(v, c) for v, c in zip(pairs["vendor"].to_pylist(), pairs["codepoint"].to_pylist(), strict=True)]
    count = len(pairs)
    columns = [
        pa.array(range(count), pa.int64()),
        pa.array([base_url + p for p in paths], pa.string()),
        pairs["caption"].cast(pa.string()),
        pairs["license"].cast(pa.string()),
        pa.nulls(count, pa.string()),
        pa.nulls(count, pa.float64()),
        pairs["width"].cast(pa.int32()),
        pairs["height"].cast(pa.int32()),
    ]
    with write_beside(path) as temporary:
        pq.write_table(pa.Table.from_arrays(columns, schema=URL_TABLE), temporary)


@contextlib.contextmanager
def serve(site: Mapping[str, Answer], port: int = 0) -> Iterator[str]:
    """Serve `site` on loopback from a thread while the block runs; yields the base URL without a slash at its end.

    `port` of 0 takes any free one. Raises OSError (EADDRINUSE) when another program listens on `port`.
    """
    responses = {path: _response(answer) for path, answer in site.items()}
    loop = asyncio.new_event_loop()
    connections: set[asyncio.Transport] = set()
    try:
        server = loop.run_until_complete(
            loop.create_server(lambda: _Connection(responses, connections), HOST, port, backlog=1024)
        )
        thread = threading.Thread(target=loop.run_forever, name="image server", daemon=True)
        thread.start()
        try:
            yield f"http://{HOST}:{server.sockets[0].getsockname()[1]}"
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.run_until_complete(_shut(server, connections))
    finally:
        loop.close()


async def _shut(server: asyncio.Server, connections: set[asyncio.Transport]) -> None:
    server.close()
    # Connections accepted in the last moment have a task that makes their transport.
    await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()}, return_exceptions=True)
    for transport in list(connections):
        transport.abort()
    # The transports close their sockets in the loop's next round.
    await asyncio.sleep(0)


@dataclass(frozen=True)
class _Response:
    head: bytes
    body: bytes


def _response(answer: Answer) -> _Response | None:
    if answer.body is None:
        return None
    head = (
        f"HTTP/1.1 {answer.status.value} {answer.status.phrase}\r\n"
        f"Content-Type: {answer.content_type}\r\nContent-Length: {len(answer.body)}\r\n"
    )
    return _Response(head.encode(), answer.body)


def _error(status: HTTPStatus) -> _Response:
    response = _response(Answer(f"{status.phrase}\n".encode(), "text/plain", status))
    assert response is not None
    return response


class _Connection(asyncio.Protocol):
    """One client: requests without a body, answered in order, the connection kept until the client asks otherwise."""

    def __init__(self, responses: Mapping[str, _Response | None], connections: set[asyncio.Transport]) -> None:
        self.responses, self.connections = responses, connections
        self.received = b""
        self.silent = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.connections.add(transport)

    def connection_lost(self, error: Exception | None) -> None:
        self.connections.discard(self.transport)

    def data_received(self, data: bytes) -> None:
        if self.silent:
            return
        self.received += data
        while b"\r\n\r\n" in self.received and not self.transport.is_closing():
            request, _, self.received = self.received.partition(b"\r\n\r\n")
            self.answer(request)
        if len(self.received) > MAX_REQUEST_BYTES:
            self.send(_error(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE), keep=False)

    def answer(self, request: bytes) -> None:
        first, *lines = request.decode("latin-1").split("\r\n")
        headers = {
            name.strip().lower(): value.strip().lower() for name, _, value in (li.partition(":") for li in lines)
        }
        match first.split(" "):
            case [method, target, ("HTTP/1.1" | "HTTP/1.0") as version]:
                pass
            case _:
                self.send(_error(HTTPStatus.BAD_REQUEST), keep=False)
                return
        if method not in ("GET", "HEAD") or headers.get("content-length", "0") != "0" or "transfer-encoding" in headers:
            self.send(_error(HTTPStatus.METHOD_NOT_ALLOWED), keep=False)
            return
        path = target.partition("?")[0]
        response = self.responses[path] if path in self.responses else _error(HTTPStatus.NOT_FOUND)
        if response is None:
            self.silent = True
            return
        connection = headers.get("connection", "")
        keep = connection == "keep-alive" if version == "HTTP/1.0" else connection != "close"
        self.send(response, keep, with_body=method == "GET")

    def send(self, response: _Response, keep: bool, with_body: bool = True) -> None:
        ending = b"Connection: keep-alive\r\n\r\n" if keep else b"Connection: close\r\n\r\n"
        self.transport.write(response.head + ending + (response.body if with_body else b""))
        if not keep:
            self.transport.close()
