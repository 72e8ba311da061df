"""A server on loopback that misbehaves on purpose, with one path per fault, and a guard that keeps tests on loopback.

    with bad_server({"/cat.jpg": jpeg}) as server:
        fetch(server.url("/cat.jpg"), server.url("/reset"), server.url("/redirect?to=http://169.254.169.254/"))

Over TLS: `bad_server(site, certificate="good")`, whose authority is in `server.ca_file`; "self-signed", "wrong-host"
and "expired" are certificates that must not be accepted.
"""

import asyncio
import contextlib
import datetime
import gzip
import ipaddress
import itertools
import socket
import ssl
import struct
import threading
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

HOST = "127.0.0.1"
BODY = bytes(range(256)) * 40  # what the paths that do answer answer; no image
CHUNK = bytes(65_536)
HOURS = 3600.0
# Broken connections are what it is for; its end cancels tasks that have not begun.
EXPECTED = (OSError, asyncio.CancelledError)


@dataclass(frozen=True)
class Request:
    """What a client sent. Names of headers are in lower case."""

    target: str
    headers: dict[str, str]

    @property
    def path(self) -> str:
        return urlsplit(self.target).path

    def query(self, name: str, default: str = "") -> str:
        return parse_qs(urlsplit(self.target).query, keep_blank_values=True).get(name, [default])[0]


@dataclass
class BadServer:
    """A running server, and what it has seen."""

    site: Mapping[str, bytes]
    port: int = 0
    scheme: str = "http"
    ca_file: Path | None = None
    redirects: Mapping[str, str] = field(default_factory=dict)  # path to URL
    latency: float = 0.0  # seconds before each answer of `site`
    site_headers: tuple[str, ...] = ()  # with each answer of `site`
    requests: list[Request] = field(default_factory=list)
    connections: int = 0
    open_requests: int = 0
    most_open_requests: int = 0
    visits: Counter[str] = field(default_factory=Counter)

    def url(self, target: str, host: str = HOST) -> str:
        """The URL of a path of this server, under any name that leads to it."""
        return f"{self.scheme}://{host}:{self.port}{target}"

    def paths(self) -> list[str]:
        """The targets that were asked for, in their order."""
        return [request.target for request in self.requests]

    async def serve_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One client, until it or a fault ends it."""
        self.connections += 1
        try:
            while (request := await read_request(reader)) is not None:
                self.requests.append(request)
                self.open_requests += 1
                self.most_open_requests = max(self.most_open_requests, self.open_requests)
                try:
                    keep = await self.answer(request, writer)
                finally:
                    self.open_requests -= 1
                if not keep or request.headers.get("connection") == "close":
                    break
        except (ConnectionError, ssl.SSLError, asyncio.IncompleteReadError):
            pass
        except asyncio.CancelledError:
            writer.transport.abort()
        finally:
            writer.close()

    async def answer(self, request: Request, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; whether the connection may go on."""
        self.visits[request.target] += 1
        if request.path in self.site:
            if self.latency:
                await asyncio.sleep(self.latency)
            body = self.site[request.path]
            writer.write(head(200, *self.site_headers, content_length=len(body)) + body)
            await writer.drain()
            return True
        if request.path in self.redirects:
            writer.write(head(302, f"Location: {self.redirects[request.path]}", content_length=0))
            return True
        first = request.path.split("/")[1]
        if first not in FAULTS:
            writer.write(head(404, content_length=4) + b"gone")
            return True
        return await FAULTS[first](self, request, writer)


async def read_request(reader: asyncio.StreamReader) -> Request | None:
    """The next GET request, None when the client is gone."""
    try:
        raw = await reader.readexactly(1)
        if raw == b"\x16":  # a TLS handshake where plain HTTP is spoken
            return Request("/garbage", {})
        raw += await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = raw.decode("latin-1").split("\r\n")
    headers = {
        name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines) if name
    }
    return Request(first.split(" ")[1], headers)


def head(status: int, *headers: str, content_length: int | None = None, content_type: str = "image/jpeg") -> bytes:
    """The head of a response."""
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", f"Content-Type: {content_type}", *headers]
    if content_length is not None:
        lines.append(f"Content-Length: {content_length}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


# ---------------------------------------------------------------------------------------------------------------------
# The faults: each answers one request, and says whether the connection may go on
# ---------------------------------------------------------------------------------------------------------------------

Fault = Callable[[BadServer, Request, asyncio.StreamWriter], Awaitable[bool]]
FAULTS: dict[str, Fault] = {}


def fault(name: str) -> Callable[[Fault], Fault]:
    def add(function: Fault) -> Fault:
        FAULTS[name] = function
        return function

    return add


def fixed(name: str, response: bytes, *, keep: bool = False) -> None:
    """A fault that is some bytes, after which the connection is closed unless `keep`."""

    async def send(server: BadServer, request: Request, writer: asyncio.StreamWriter) -> bool:
        writer.write(response)
        await writer.drain()
        return keep

    FAULTS[name] = send


def chunked(*chunks: bytes, end: bool = True) -> bytes:
    body = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)
    return body + (b"0\r\n\r\n" if end else b"")


def bomb(size: int) -> bytes:
    """A gzip of `size` zeros, about a thousandth as long."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, 31)
    return b"".join(deflate.compress(CHUNK) for _ in range(size // len(CHUNK))) + deflate.flush()


GZIPPED = gzip.compress(BODY)
RAW_DEFLATE = zlib.compressobj(9, zlib.DEFLATED, -15)
DEFLATED = RAW_DEFLATE.compress(BODY) + RAW_DEFLATE.flush()

fixed("ok", head(200, content_length=len(BODY)) + BODY, keep=True)
fixed("empty", head(200, content_length=0), keep=True)
fixed("no-content", head(204), keep=True)
fixed("short-body", head(200, content_length=len(BODY) + 1000) + BODY)
fixed("long-body", head(200, content_length=len(BODY) - 1000) + BODY, keep=True)
fixed("no-length", head(200) + BODY)
fixed("bad-length", head(200, "Content-Length: many") + BODY)
fixed("two-lengths", head(200, "Content-Length: 5", content_length=len(BODY)) + BODY)
fixed("huge-length", head(200, content_length=10**12) + BODY)
fixed("chunked", head(200, "Transfer-Encoding: chunked") + chunked(BODY[:100], BODY[100:]), keep=True)
fixed("chunked-cut", head(200, "Transfer-Encoding: chunked") + chunked(BODY, end=False))
fixed("chunked-bad", head(200, "Transfer-Encoding: chunked") + b"what\r\n" + BODY)
fixed("close", b"")
fixed("garbage", b"SSH-2.0-OpenSSH_9.2\r\n\r\n")
fixed("half-head", b"HTTP/1.1 200 OK\r\nContent-Ty")
fixed("big-headers", head(200, "X-Padding: " + "x" * 100_000, content_length=2) + b"ok")
fixed("many-headers", head(200, *(f"X-{number}: 1" for number in range(5000)), content_length=2) + b"ok")
fixed("html", head(200, content_length=20, content_type="image/jpeg") + b"<html>parked</html> ", keep=True)
fixed("gzip", head(200, "Content-Encoding: gzip", content_length=len(GZIPPED)) + GZIPPED, keep=True)
fixed("gzip-cut", head(200, "Content-Encoding: gzip", content_length=len(GZIPPED) - 9) + GZIPPED[:-9], keep=True)
fixed("gzip-lie", head(200, "Content-Encoding: gzip", content_length=len(BODY)) + BODY, keep=True)
fixed("deflate", head(200, "Content-Encoding: deflate", content_length=len(DEFLATED)) + DEFLATED, keep=True)
fixed("brotli", head(200, "Content-Encoding: br", content_length=len(BODY)) + BODY, keep=True)
fixed("partial", head(206, f"Content-Range: bytes 0-99/{len(BODY)}", content_length=100) + BODY[:100], keep=True)
fixed("no-location", head(302, content_length=0), keep=True)


@fault("gzip-bomb")
async def gzip_bomb(server: BadServer, request: Request, writer: asyncio.StreamWriter) -> bool:
    """/gzip-bomb?mb=N: N MiB of zeros."""
    body = bomb(int(request.query("mb", "100")) << 20)
    writer.write(head(200, "Content-Encoding: gzip", content_length=len(body)) + body)
    await writer.drain()
    return True


@fault("reset")
async def reset(server: BadServer, request: Request, writer: asyncio.StreamWriter) -> bool:
    """A TCP reset instead of an answer."""
    hard_close(writer)
    return False


@fault("reset-body")
async def reset_body(server: BadServer, request: Request, writer: asyncio.StreamWriter) -> bool:
    """A TCP reset in the middle of the body."""
    writer.write(head(200, content_length=len(BODY)) + BODY[:2000])
    await writer.drain()
    hard_close(writer)
    return False


def hard_close(writer: asyncio.StreamWriter) -> None:
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@fault("stall")
async def stall(server: BadServer, request: Request, writer: asyncio.StreamWriter) -> bool:
    """Never an answer."""
    await asyncio.sleep(HOURS)
    return False


@fault("stall-body")
async def stall_body(server: BadServer, request: Request, writer: asyncio.StreamWriter) -> bool:
    """A head and some bytes, and then nothing."""
    writer.write(head(200, content_length=len(BODY)) + BODY[:2000])
    await asyncio.sleep(HOURS)
    return False


@fault("drip")
async def drip(server: BadServer, request: Request, writer: asyncio.StreamWriter) -> bool:
    """/drip?seconds=S: one byte each S seconds, one by default, for as long as anyone listens."""
    writer.write(head(200, content_length=len(BODY)))
    for number in itertools.count():
        writer.write(BODY[number % len(BODY) :][:1])
        await writer.drain()
        await asyncio.sleep(float(request.query("seconds", "1")))
    return False


@fault("endless")
async def endless(server: BadServer, request: Request, writer: asyncio.StreamWriter) -> bool:
    """A body without a length or an end; /endless/chunked in chunks."""
    in_chunks = request.path.endswith("/chunked")
    writer.write(head(200, "Transfer-Encoding: chunked") if in_chunks else head(200))
    while True:
        writer.write(chunked(CHUNK, end=False) if in_chunks else CHUNK)
        await writer.drain()


@fault("slow")
async def slow(server: BadServer, request: Request, writer: asyncio.StreamWriter) -> bool:
    """/slow?seconds=S: a good answer, late."""
    await asyncio.sleep(float(request.query("seconds", "1")))
    writer.write(head(200, content_length=len(BODY)) + BODY)
    return True


@fault("redirect")
async def redirect(server: BadServer, request: Request, writer: asyncio.StreamWriter) -> bool:
    """/redirect?to=URL[&status=302]: `to` as it is, escapes undone once."""
    status = int(request.query("status", "302"))
    writer.write(head(status, f"Location: {request.query('to')}", content_length=4) + b"over")
    return True


@fault("loop")
async def loop(server: BadServer, request: Request, writer: asyncio.StreamWriter) -> bool:
    """A redirect to itself."""
    writer.write(head(301, f"Location: {request.target}", content_length=0))
    return True


@fault("chain")
async def chain(server: BadServer, request: Request, writer: asyncio.StreamWriter) -> bool:
    """/chain/N: N redirects, and then an answer."""
    left = int(request.path.split("/")[2])
    if left:
        writer.write(head(307, f"Location: ../chain/{left - 1}", content_length=0))
    else:
        writer.write(head(200, content_length=len(BODY)) + BODY)
    return True


@fault("status")
async def status(server: BadServer, request: Request, writer: asyncio.StreamWriter) -> bool:
    """/status/CODE[?retry-after=TEXT][&times=N]: an error, N times (for ever by default), and then a good answer."""
    if server.visits[request.target] > int(request.query("times", "1000000000")):
        writer.write(head(200, content_length=len(BODY)) + BODY)
        return True
    waits = request.query("retry-after")
    headers = [f"Retry-After: {waits}"] if waits else []
    code = int(request.path.split("/")[2])
    writer.write(head(code) if code in (204, 304) else head(code, *headers, content_length=4) + b"oops")
    return True


@fault("late-body")
async def late_body(server: BadServer, request: Request, writer: asyncio.StreamWriter) -> bool:
    """/late-body/CODE: the body some time after the head; 302 leads to /ok."""
    code = int(request.path.split("/")[2])
    writer.write(head(code, "Location: /ok", content_length=4))
    await writer.drain()
    await asyncio.sleep(0.05)
    writer.write(b"late")
    return True


@fault("flaky")
async def flaky(server: BadServer, request: Request, writer: asyncio.StreamWriter) -> bool:
    """/flaky/N/NAME: closed without an answer N times, and then a good answer. (A client may itself ask twice.)"""
    if server.visits[request.target] <= int(request.path.split("/")[2]):
        return False
    writer.write(head(200, content_length=len(BODY)) + BODY)
    return True


@fault("header")
async def header(server: BadServer, request: Request, writer: asyncio.StreamWriter) -> bool:
    """/header?NAME=VALUE&NAME=VALUE: a good answer with these headers."""
    query = parse_qs(urlsplit(request.target).query)
    lines = [f"{name}: {value}" for name, values in query.items() for value in values]
    writer.write(head(200, *lines, content_length=len(BODY)) + BODY)
    return True


@fault("cookie")
async def cookie(server: BadServer, request: Request, writer: asyncio.StreamWriter) -> bool:
    """Sets a cookie, and answers 400 to whoever brings one."""
    code = 400 if "cookie" in request.headers else 200
    writer.write(head(code, "Set-Cookie: a=b; Path=/", content_length=len(BODY)) + BODY)
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Running it
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def bad_server(
    site: Mapping[str, bytes] | None = None,
    *,
    certificate: str | None = None,
    folder: Path | None = None,
    port: int = 0,
    latency: float = 0.0,
) -> Iterator[BadServer]:
    """Serve `site` and the faults from a thread while the block runs. With a `certificate` over TLS: its files are
    made in `folder`.
    """
    server = BadServer(site or {}, latency=latency)
    context = None
    if certificate is not None:
        assert folder is not None
        server.scheme = "https"
        context, server.ca_file = make_certificate(folder, certificate)
    with loop_in_thread() as run:

        async def start() -> asyncio.Server:
            return await asyncio.start_server(server.serve_connection, HOST, port, ssl=context, backlog=1024)

        listener = run(start())
        server.port = listener.sockets[0].getsockname()[1]
        try:
            yield server
        finally:

            async def stop() -> None:
                listener.close()
                await end_tasks()

            run(stop())


async def end_tasks() -> None:
    """Cancel all other tasks of the loop, also those that only begin meanwhile, and let transports close sockets."""
    for _ in range(5):
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)


@contextlib.contextmanager
def loop_in_thread() -> Iterator[Callable[[Any], Any]]:
    """An event loop in a thread; yields what runs a coroutine in it and returns its result."""
    loop = asyncio.new_event_loop()
    errors: list[dict[str, Any]] = []
    # Anything else is a bug of the server.
    loop.set_exception_handler(
        lambda loop, context: None if isinstance(context.get("exception"), EXPECTED) else errors.append(context)
    )
    thread = threading.Thread(target=loop.run_forever, name="bad server", daemon=True)
    thread.start()
    try:
        yield lambda coroutine: asyncio.run_coroutine_threadsafe(coroutine, loop).result(30)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
    assert not errors, errors


@contextlib.contextmanager
def silent_port() -> Iterator[int]:
    """A port where connections are taken and nothing is ever said, no TLS handshake either."""
    with socket.create_server((HOST, 0), backlog=100) as listener:
        yield listener.getsockname()[1]


@contextlib.contextmanager
def refusing_port() -> Iterator[int]:
    """A port that refuses connections, and that nobody else will get meanwhile."""
    with socket.socket() as holder:
        holder.bind((HOST, 0))
        yield holder.getsockname()[1]


def make_certificate(folder: Path, kind: str) -> tuple[ssl.SSLContext, Path]:
    """A server's TLS context for 127.0.0.1, localhost and *.test, and the file with the authority that signed it.

    `kind`: "good", "self-signed" (by another authority than the file's), "wrong-host" or "expired".
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)

    def sign(name: str, key: Any, issuer: str, issuer_key: Any, end: datetime.datetime, names: list[Any]) -> Any:
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 10 * day)
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=not names, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(issuer_key, hashes.SHA256())

    authority_key, server_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    signing_key = ec.generate_private_key(ec.SECP256R1()) if kind == "self-signed" else authority_key
    names = [x509.IPAddress(ipaddress.ip_address(HOST)), x509.DNSName("localhost"), x509.DNSName("*.test")]
    if kind == "wrong-host":
        names = [x509.DNSName("elsewhere.example")]
    authority = sign("tests", authority_key, "tests", authority_key, now + 10 * day, [])
    leaf = sign("server", server_key, "tests", signing_key, now - day if kind == "expired" else now + day, names)
    pem = serialization.Encoding.PEM
    ca_file, chain_file = folder / f"{kind}-ca.pem", folder / f"{kind}-server.pem"
    ca_file.write_bytes(authority.public_bytes(pem))
    private = server_key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    chain_file.write_bytes(private + leaf.public_bytes(pem))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain_file)
    return context, ca_file


# ---------------------------------------------------------------------------------------------------------------------
# The guard
# ---------------------------------------------------------------------------------------------------------------------


class OffLoopbackError(Exception):
    """A test tried to reach a machine. Whoever swallows it, `only_loopback` fails at its end."""


@dataclass
class Dials:
    """Where connections were asked for. `elsewhere`: addresses off loopback, which were not dialled."""

    addresses: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)


@contextlib.contextmanager
def only_loopback(stand_ins: Mapping[str, tuple[str, int]] | None = None) -> Iterator[Dials]:
    """Fail at the end of the block, and raise at once, when a socket of this process would dial off loopback.

    `stand_ins` maps made-up public addresses to the loopback server that plays their part: those are dialled there.
    """
    dials = Dials()

    def guarded(original: Callable[..., Any]) -> Callable[..., Any]:
        def connect(self: socket.socket, address: Any) -> Any:
            if self.family == socket.AF_UNIX:
                return original(self, address)
            host = address[0]
            dials.addresses.append(host)
            if host in (stand_ins or {}):
                return original(self, (stand_ins or {})[host])
            if not ipaddress.ip_address(host).is_loopback:
                dials.elsewhere.append(host)
                raise OffLoopbackError(f"dialled {host}")
            return original(self, address)

        return connect

    with pytest.MonkeyPatch.context() as patch:
        # Where they are the lowest: asyncio's sock_connect, http.client and all others end up in these two.
        patch.setattr(socket.socket, "connect", guarded(socket.socket.connect))
        patch.setattr(socket.socket, "connect_ex", guarded(socket.socket.connect_ex))
        yield dials
    assert not dials.elsewhere, f"dialled off loopback: {dials.elsewhere}"
