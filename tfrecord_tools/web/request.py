"""One request and its answer: sockets to checked addresses, TLS that is verified, and every way to end, named.

Nothing here decides what comes next (a redirect, another try): `fetcher` does.
"""

import asyncio
import errno
import os
import re
import socket
import ssl
import time
import zlib
from collections.abc import Iterator
from functools import cache
from typing import Any

import aiohttp

from clipkit.errors import UserError
from clipkit.tfrecord_tools import reasons
from clipkit.tfrecord_tools.web.addresses import BlockedAddressError, check_address
from clipkit.tfrecord_tools.web.permissions import NOTHING_SAID, Decision, decide, parse_date
from clipkit.tfrecord_tools.web.resolver import Resolver, UnresolvedError
from clipkit.tfrecord_tools.web.settings import FetchOutcome, FetchSettings
from clipkit.tfrecord_tools.web.urls import BadUrlError, WebUrl, parse_redirect

KEEP_ALIVE_SECONDS = 8.0
READ_BYTES = 1 << 17
# What says that this machine is out of sockets or ports, and nothing about a host.
STARVED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL})
REDIRECTS = frozenset({301, 302, 303, 307, 308})
DRAIN_BYTES = 65_536
DRAIN_SECONDS = 1.0
FREE_BYTES = 1 << 20  # a body up to here needs no share of the budget
UNPRINTABLE = re.compile(r"[^ -~]")
GZIP = ("gzip", "x-gzip")
CODINGS = (*GZIP, "deflate")


class Exchange:
    """Sends requests, over two sessions: `once` closes each connection after its answer.

    A crawl meets most hosts once, so those that will not be wanted again go over `once`: else thousands of connections
    would lie idle and use up the open files.
    """

    def __init__(self, settings: FetchSettings, resolver: Resolver, budget: "ByteBudget") -> None:
        self.kept = open_session(settings, resolver, keep=True)
        self.once = open_session(settings, resolver, keep=False)
        self.settings = settings
        self.budget = budget
        self.bytes_in = 0

    async def get(self, at: WebUrl, *, keep: bool, limit: int | None = None, obey: bool = True) -> FetchOutcome:
        """Ask for a URL once; no error of the network is raised. `keep`: the connection will be wanted again.

        `limit` bounds the body in bytes, by default as the settings say. `obey`: what the response says about its use
        holds (for images; a robots.txt is meant for us whatever its own headers say).
        """
        outcome = FetchOutcome()
        response = None
        try:
            response = await (self.kept if keep else self.once).get(at.url, allow_redirects=False)
            outcome.http_status, outcome.answered = response.status, True
            await self.read(at, response, outcome, obey, self.settings.max_bytes if limit is None else limit)
        except CodingError as error:
            outcome.reason, outcome.message = reasons.NOT_AN_IMAGE, str(error)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            outcome.reason, outcome.message, outcome.passing = explain(error, self.settings.timeout)
            outcome.starved = outcome.passing and outcome.reason == reasons.OTHER
        finally:
            # Of a body that was read to its end the connection has gone back already.
            if response is not None:
                response.close()
            if outcome.body is None and outcome.reserved:
                self.budget.give(outcome.reserved)
                outcome.reserved = 0
        return outcome

    async def read(
        self, at: WebUrl, response: aiohttp.ClientResponse, outcome: FetchOutcome, obey: bool, limit: int
    ) -> None:
        """Complete `outcome` from the head of a response, and its body where that is wanted."""
        decision = self.permission(response) if obey else NOTHING_SAID
        outcome.decision = decision.said
        status = response.status
        is_redirect = status in REDIRECTS and "Location" in response.headers
        if decision.refused and (is_redirect or 200 <= status < 300):
            outcome.reason, outcome.message = reasons.DISALLOWED, decision.said
        elif is_redirect:
            try:
                outcome.redirect = parse_redirect(at, response.headers["Location"])
            except BadUrlError as error:
                outcome.reason, outcome.message = reasons.HTTP_3XX, f"redirect refused: {error}"
                return
            await drain(response)
        elif status == 206:
            outcome.reason, outcome.message = reasons.TRUNCATED, "HTTP 206: a part, though the whole was asked for"
        elif 200 <= status < 300:
            await self.read_body(response, outcome, limit)
        else:
            judge_status(response, outcome)
            await drain(response)

    def permission(self, response: aiohttp.ClientResponse) -> Decision:
        """What the response says about its use."""
        headers = response.headers
        tdm = headers.get("tdm-reservation")
        if tdm is None and "X-Robots-Tag" not in headers:
            return NOTHING_SAID
        return decide(
            headers.getall("X-Robots-Tag", ()),
            tdm,
            token=self.settings.agent_token,
            disallowed=self.settings.disallowed_tags,
            tdm_reservation=self.settings.tdm_reservation,
        )

    async def read_body(self, response: aiohttp.ClientResponse, outcome: FetchOutcome, limit: int) -> None:
        """Read, and decompress, a body of at most `limit` bytes into `outcome`."""
        length = response.content_length
        if length is not None and length > limit:
            outcome.reason, outcome.message = reasons.TOO_LARGE, f"Content-Length {length}, allowed are {limit}"
            return
        codings = [coding.strip().lower() for coding in response.headers.get("Content-Encoding", "").split(",")]
        codings = [coding for coding in codings if coding not in ("", "identity")]
        if codings and (len(codings) > 1 or codings[0] not in CODINGS):
            raise CodingError(f"Content-Encoding {', '.join(codings)[:40]}, which was not asked for")
        decompressor = Decompressor(codings[0], limit) if codings else None
        if length is not None and length > FREE_BYTES:
            outcome.reserved = await self.budget.take(length if decompressor is None else limit)
        pieces: list[bytes] = []
        size = received = 0
        content = response.content
        try:
            while block := await content.readany():
                received += len(block)
                new = [block] if decompressor is None else decompressor.feed(block)
                size += sum(map(len, new))
                if size > limit or received > limit:
                    raise TooLargeError
                pieces += new
                if size > FREE_BYTES and not outcome.reserved:
                    outcome.reserved = await self.budget.take(limit)
        except TooLargeError:
            outcome.reason, outcome.message = reasons.TOO_LARGE, f"more than {limit} bytes"
            return
        finally:
            self.bytes_in += received
        if decompressor is not None and received and not decompressor.ended:
            outcome.reason, outcome.message = reasons.TRUNCATED, "compressed body ends early"
        elif not size:
            outcome.reason, outcome.message = reasons.EMPTY, f"HTTP {response.status} without a body"
        else:
            outcome.body = pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def close(self) -> None:
        """Close all connections."""
        await self.kept.close()
        await self.once.close()


async def drain(response: aiohttp.ClientResponse) -> None:
    """Read the rest of a small body that nobody wants: then its connection can be used again."""
    length = response.content_length
    if response.content.at_eof() or (length is not None and length > DRAIN_BYTES):
        return
    received = 0
    try:
        async with asyncio.timeout(DRAIN_SECONDS):
            while received <= DRAIN_BYTES and (block := await response.content.readany()):
                received += len(block)
    except (TimeoutError, aiohttp.ClientError, OSError):
        return


def judge_status(response: aiohttp.ClientResponse, outcome: FetchOutcome) -> None:
    """The reason behind a status other than success."""
    status = response.status
    phrase = UNPRINTABLE.sub(" ", response.reason or "")[:60]
    outcome.message = f"HTTP {status} {phrase}".strip()
    wait = parse_wait(response.headers.get("Retry-After"))
    if status == 429 or (status == 503 and wait is not None):
        outcome.reason, outcome.wait = reasons.RATE_LIMITED, wait
    elif status < 400:
        outcome.reason = reasons.HTTP_3XX
        outcome.message += " without a place to go" if status in REDIRECTS else ""
    elif status < 500:
        outcome.reason = reasons.HTTP_4XX
    else:
        outcome.reason, outcome.passing = reasons.HTTP_5XX, True


def parse_wait(header: str | None) -> float | None:
    """The seconds that a Retry-After header asks for (RFC 9110, section 10.2.3); None for none or nonsense."""
    if header is None:
        return None
    header = header.strip()
    if header.isascii() and header.isdigit() and len(header) < 10:
        return float(header)
    date = parse_date(header)
    return None if date is None else max(0.0, date.timestamp() - time.time())


# ---------------------------------------------------------------------------------------------------------------------
# Errors of the network
# ---------------------------------------------------------------------------------------------------------------------


def explain(error: Exception, timeout: float) -> tuple[str, str, bool]:
    """The reason and the message for an error of the network, and whether another try may end otherwise."""
    for cause in causes(error):
        if isinstance(cause, BlockedAddressError):
            return reasons.BLOCKED_ADDRESS, str(cause), False
        if isinstance(cause, UnresolvedError):
            return reasons.DNS, str(cause), cause.passing
        if isinstance(cause, ssl.SSLCertVerificationError) and not isinstance(cause, aiohttp.ClientError):
            return reasons.TLS, f"certificate: {cause.verify_message}"[:200], False
        if isinstance(cause, ssl.SSLError) and not isinstance(cause, aiohttp.ClientError):
            return reasons.TLS, str(cause.reason or cause).lower().replace("_", " ")[:200], False
        if isinstance(cause, OSError) and cause.errno in STARVED:
            return reasons.OTHER, f"this machine: {cause.strerror}", True
    if isinstance(error, TimeoutError):
        return reasons.TIMEOUT, f"nothing for {timeout:g} s", True
    if isinstance(error, aiohttp.ClientPayloadError):
        return reasons.TRUNCATED, "body ends early", True
    if isinstance(error, aiohttp.InvalidURL):
        return reasons.BAD_URL, "host or path is refused", False
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return reasons.CONNECT, "closed without an answer", True
    if isinstance(error, OSError | aiohttp.ClientConnectionError):
        number = getattr(error, "errno", None)
        return reasons.CONNECT, os.strerror(number) if number else one_line(error), True
    if isinstance(error, aiohttp.ClientResponseError):
        return reasons.OTHER, f"answer is not HTTP: {one_line(error.message)}", False
    return reasons.OTHER, f"{type(error).__name__}: {one_line(error)}", False


def one_line(text: object) -> str:
    """The first line of a message, not too long."""
    return str(text).strip().partition("\n")[0].rstrip(":")[:200]


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what stands behind it."""
    for _ in range(8):
        if error is None:
            return
        yield error
        inner = getattr(error, "os_error", None)
        error = inner if inner is not None and inner is not error else error.__cause__


# ---------------------------------------------------------------------------------------------------------------------
# Connections
# ---------------------------------------------------------------------------------------------------------------------


@cache
def tls_context(ca_file: str | None) -> ssl.SSLContext:
    """The process's TLS context: making one costs as much as fetching a hundred images.

    Trusts the system's certificates (or SSL_CERT_FILE's), certifi's where it is installed, and `ca_file`'s.
    """
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    try:
        import certifi

        context.load_verify_locations(certifi.where())
    except ModuleNotFoundError:
        pass
    if ca_file is not None:
        try:
            context.load_verify_locations(ca_file)
        except OSError as error:  # ssl.SSLError is one, too
            raise UserError(f"can't read certificates from {ca_file}: {error.strerror or error}") from None
    return context


def open_session(settings: FetchSettings, resolver: Resolver, *, keep: bool) -> aiohttp.ClientSession:
    """A session without cookies, referers, redirects, proxies or any other address than `resolver`'s checked ones."""
    connector = aiohttp.TCPConnector(
        resolver=resolver,
        use_dns_cache=False,  # the resolver has one
        ssl=tls_context(settings.ca_file),
        limit=0,  # our own queues bound what is under way
        keepalive_timeout=KEEP_ALIVE_SECONDS if keep else None,
        force_close=not keep,
        socket_factory=guarded_sockets(settings.allow_private_hosts),
    )
    return aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={
            "User-Agent": settings.user_agent,
            "Accept": "image/*,*/*;q=0.8",
            "Accept-Encoding": "identity",
        },
        timeout=aiohttp.ClientTimeout(
            total=None, sock_connect=settings.timeout, sock_read=settings.timeout, ceil_threshold=3600
        ),
        auto_decompress=False,
        trust_env=False,
        requote_redirect_url=False,
        read_bufsize=READ_BYTES,
    )


def guarded_sockets(allow_private: bool) -> Any:
    """A factory of sockets that refuses, at the last moment, an address that must not be dialled.

    Addresses from names were checked when they were resolved; those written into URLs only pass here.
    """

    def make(address_info: Any) -> socket.socket:
        family, kind, protocol, _, address = address_info
        check_address(address[0], allow_private)
        return socket.socket(family, kind, protocol)

    return make


class ByteBudget:
    """Bounds what large bodies may hold in memory together; whoever wants more waits in line."""

    def __init__(self, size: int) -> None:
        self.size = self.left = size
        self.line = asyncio.Lock()  # which serves those who wait in their order
        self.returned = asyncio.Event()

    async def take(self, wanted: int) -> int:
        """Wait for `wanted` bytes, no more than there are in all, and return how many were taken."""
        wanted = min(wanted, self.size)
        async with self.line:
            while self.left < wanted:
                self.returned.clear()
                await self.returned.wait()
            self.left -= wanted
        return wanted

    def give(self, taken: int) -> None:
        """Return what `take` gave."""
        self.left += taken
        self.returned.set()


# ---------------------------------------------------------------------------------------------------------------------
# Bodies that come compressed although we ask for none
# ---------------------------------------------------------------------------------------------------------------------


class CodingError(Exception):
    """A body that is not what its Content-Encoding says."""


class TooLargeError(Exception):
    """A body that is larger than allowed."""


class Decompressor:
    """Undoes gzip or deflate (RFC 9110, section 8.4.1), in either wrapping that servers send, up to `limit` bytes.

    A gzip bomb turns 50 KB into 50 MB, and one in a gzip into far more, so never more than the limit is decompressed.
    aiohttp's own decompression takes a gzip that is cut off for whole, and one with padding for damaged.
    `ended`: the stream came to its end.
    """

    def __init__(self, coding: str, limit: int) -> None:
        self.coding = coding
        self.left = limit
        self.stream = self.new_stream()
        self.begun = self.ended = False
        self.held = b""  # too little to tell what begins

    def new_stream(self) -> "zlib._Decompress":
        """A stream for gzip, or for deflate in zlib's wrapping."""
        return zlib.decompressobj(zlib.MAX_WBITS | (16 if self.coding in GZIP else 0))

    def feed(self, data: bytes) -> list[bytes]:
        """What comes out for some more bytes. Raises CodingError, and TooLargeError when the limit is passed."""
        pieces = []
        data, self.held = self.held + data, b""
        while data:
            if not self.begun or self.ended:
                if len(data) < 2:
                    self.held = data
                    break
                if self.ended and not (self.coding in GZIP and data.startswith(b"\x1f\x8b")):
                    break  # what follows the end is padding
                if self.ended:
                    self.stream, self.ended = self.new_stream(), False
                elif self.coding == "deflate" and not is_zlib(data):
                    self.stream = zlib.decompressobj(-zlib.MAX_WBITS)  # without the wrapping, as old servers send it
                self.begun = True
            try:
                piece = self.stream.decompress(data, self.left + 1)
            except zlib.error as error:
                raise CodingError(f"body is not {self.coding}: {error}") from None
            self.left -= len(piece)
            if self.left < 0:
                raise TooLargeError
            if piece:
                pieces.append(piece)
            self.ended = self.stream.eof
            data = self.stream.unused_data if self.ended else self.stream.unconsumed_tail
        return pieces


def is_zlib(data: bytes) -> bool:
    """Whether two bytes are zlib's header (RFC 1950, section 2.2)."""
    return data[0] & 0x0F == 8 and (data[0] << 8 | data[1]) % 31 == 0
