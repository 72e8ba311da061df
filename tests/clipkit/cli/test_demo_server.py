"""The server keeps connections, fails exactly where it is told to, and ends cleanly."""

import contextlib
import gc
import http.client
import io
import re
import socket
import threading
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clipkit.cli import demo_server
from clipkit.cli.demo_server import Answer, serve
from clipkit.embedded import emoji_parquet

SITE = {"/a/1.webp": Answer(b"first"), "/a/2.webp": Answer(b"second"), "/a/3.webp": Answer(None)}

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


def connect(base_url: str) -> socket.socket:
    return socket.create_connection((urlsplit(base_url).hostname, urlsplit(base_url).port), timeout=30)


def exchange(base_url: str, request: bytes) -> bytes:
    with connect(base_url) as client, client.makefile("rb") as answers:
        client.sendall(request)
        return answers.read()


def test_connection_is_kept_and_head_has_no_body() -> None:
    with serve(SITE) as base_url:
        client = http.client.HTTPConnection(base_url.removeprefix("http://"))
        for method, path, body in [
            ("GET", "/a/1.webp", b"first"),
            ("HEAD", "/a/2.webp", b""),
            ("GET", "/a/2.webp?x=1", b"second"),
        ]:
            client.request(method, path)
            answer = client.getresponse()
            assert (answer.status, answer.getheader("Content-Type"), answer.read()) == (200, "image/webp", body)
            assert not answer.will_close
        client.close()


def test_requests_in_one_packet_and_in_single_bytes() -> None:
    request = b"GET /a/1.webp HTTP/1.1\r\nHost: x\r\n\r\nGET /a/2.webp HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    with serve(SITE) as base_url:
        whole = exchange(base_url, request)
        assert whole.count(b"HTTP/1.1 200 OK") == 2 and b"first" in whole and whole.endswith(b"second")
        with connect(base_url) as client, client.makefile("rb") as answers:
            for i in range(len(request)):
                client.sendall(request[i : i + 1])
            assert re.sub(b"Date: .*", b"", answers.read()) == re.sub(b"Date: .*", b"", whole)


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET /nothing HTTP/1.0\r\nHost: x\r\n\r\n", 404),
        (b"POST /a/1.webp HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 3\r\n\r\nabc", 405),
        (b"hello\r\n\r\n", 400),
        (b"GET /a/1.webp HTTP/1.0\r\nHost: x\r\n\r\n", 200),
        (b"x" * 40_000, 400),
    ],
)
def test_odd_requests(request_bytes: bytes, status: int) -> None:
    with serve(SITE) as base_url:
        assert exchange(base_url, request_bytes).split(b" ")[1] == str(status).encode()


def test_silent_connections_take_no_thread_and_block_nobody() -> None:
    with contextlib.ExitStack() as sockets:
        with serve(SITE) as base_url:
            threads = threading.active_count()
            silent = [sockets.enter_context(connect(base_url)) for _ in range(100)]
            for client in silent:
                client.sendall(b"GET /a/3.webp HTTP/1.1\r\nHost: x\r\n\r\n")
            assert urllib.request.urlopen(base_url + "/a/1.webp").read() == b"first"
            assert threading.active_count() == threads
        # The end of the server is the first thing that they hear.
        assert [client.recv(1) for client in silent] == [b""] * 100


def test_the_same_port_again() -> None:
    with serve(SITE) as base_url:
        port = urlsplit(base_url).port
        assert port is not None
        urllib.request.urlopen(base_url + "/a/1.webp").close()
        with pytest.raises(OSError, match="address already in use"), serve(SITE, port):
            pass
    with serve(SITE, port) as again:
        assert again == base_url
    assert all(thread.name != "image server" for thread in threading.enumerate())


def test_faulty_rows_are_a_function_of_the_seed() -> None:
    broken = demo_server.faulty_rows(8548, 0.03, seed=0)
    assert broken == demo_server.faulty_rows(8548, 0.03, seed=0) != demo_server.faulty_rows(8548, 0.03, seed=1)
    assert len(broken) == 256 and max(Counter(broken.values()).values()) - min(Counter(broken.values()).values()) <= 1
    assert set(broken.values()) == set(demo_server.FAULTS)


def test_emoji_site_and_url_table(tmp_path: Path) -> None:
    pairs = pq.read_table(emoji_parquet("train")).slice(0, 7)
    site = demo_server.emoji_site(pairs, dict(enumerate(demo_server.FAULTS)))
    with serve(site) as base_url:
        demo_server.write_url_table(tmp_path / "urls.parquet", base_url, pairs)
        table = pq.read_table(tmp_path / "urls.parquet")
        assert table.schema.equals(URL_TABLE)
        assert table["TEXT"].to_pylist() == pairs["caption"].to_pylist()
        assert table["NSFW"].null_count == table["similarity"].null_count == 7
        urls = table["URL"].to_pylist()
        with pytest.raises(urllib.error.HTTPError, match="404") as caught:
            urllib.request.urlopen(urls[0])
        caught.value.close()
        truncated, html, empty = (urllib.request.urlopen(url).read() for url in urls[1:4])
        with pytest.raises(OSError, match="truncated"):
            Image.open(io.BytesIO(truncated)).load()
        assert Image.open(io.BytesIO(truncated)).format == "JPEG"
        assert html.startswith(b"<!doctype html>") and empty == b""
        assert site[urlsplit(urls[4]).path].body is None
        for url, image in zip(urls[5:], pairs["image"].to_pylist()[5:], strict=True):
            assert urllib.request.urlopen(url).read() == image


def test_clients_that_get_no_answer_leave_no_complaint_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    with serve({"/never.jpg": Answer(None)}) as url:
        address = urlsplit(url)
        waiting = socket.create_connection((str(address.hostname), address.port or 0))
        waiting.sendall(b"GET /never.jpg HTTP/1.1\r\nHost: x\r\n\r\n")
        with contextlib.suppress(TimeoutError):
            waiting.settimeout(0.3)
            waiting.recv(1)
        waiting.close()  # its request waits on
        with contextlib.suppress(urllib.error.HTTPError):
            urllib.request.urlopen(f"{url}/none.jpg")  # by then the server knows that the first client has gone
    gc.collect()
    assert "Task was destroyed" not in caplog.text
