"""One request and its answer: every way in which it can end, named.

No step here decides what comes next (a redirect, another try): that is http_fetch's.
"""

import asyncio
import os
import re
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass

import aiohttp

from clipkit.tfrecord_tools import reasons
from clipkit.tfrecord_tools.web.addresses import BlockedAddressError
from clipkit.tfrecord_tools.web.compression import KNOWN, CodingError, Decompressor, TooLargeError
from clipkit.tfrecord_tools.web.permissions import NOTHING_SAID, Decision, decide, parse_date
from clipkit.tfrecord_tools.web.resolver import Resolver, UnresolvedError
from clipkit.tfrecord_tools.web.session import STARVED, ByteBudget, open_session
from clipkit.tfrecord_tools.web.settings import FetchSettings
from clipkit.tfrecord_tools.web.urls import BadUrlError, WebUrl, parse_redirect

REDIRECTS = frozenset({301, 302, 303, 307, 308})
DRAIN_BYTES = 65_536
DRAIN_SECONDS = 1.0
FREE_BYTES = 1 << 20  # a body up to here needs no share of the budget
UNPRINTABLE = re.compile(r"[^ -~]")


@dataclass(slots=True)
class Outcome:
    """How one request ended: `body` set, or `redirect` set, or `reason`, one of reasons.REASONS, set.

    `answered`: the host sent the head of a response. `passing`: another try may end otherwise. `reserved`: bytes of
    the budget that the body holds. `wait`: seconds that the host asks for, when `reason` is rate-limited and it said.
    """

    reason: str | None = None
    message: str = ""
    body: bytes | None = None
    redirect: WebUrl | None = None
    status: int | None = None
    content_type: str | None = None
    said: str = ""
    answered: bool = False
    passing: bool = False
    starved: bool = False
    wait: float | None = None
    reserved: int = 0


class Exchange:
    """Sends requests, over two sessions: `once` closes each connection after its answer."""

    def __init__(self, settings: FetchSettings, resolver: Resolver, budget: ByteBudget) -> None:
        self.kept = open_session(settings, resolver, keep=True)
        self.once = open_session(settings, resolver, keep=False)
        self.settings = settings
        self.budget = budget
        self.bytes_in = 0

    async def get(self, at: WebUrl, *, keep: bool, limit: int | None = None, obey: bool = True) -> Outcome:
        """Ask for a URL once; no error of the network is raised. `keep`: the connection will be wanted again.

        `limit` bounds the body in bytes, by default as the settings say. `obey`: what the response says about its use
        holds (for images; a robots.txt is meant for us whatever its own headers say).
        """
        try:
            response = await (self.kept if keep else self.once).get(at.url, allow_redirects=False)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return failed(error, self.settings)
        outcome = Outcome(status=response.status, content_type=response.headers.get("Content-Type"), answered=True)
        try:
            await self.read(at, response, outcome, obey, self.settings.max_bytes if limit is None else limit)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            failure = failed(error, self.settings)
            outcome.reason, outcome.message, outcome.passing = failure.reason, failure.message, failure.passing
        except CodingError as error:
            outcome.reason, outcome.message = reasons.NOT_AN_IMAGE, str(error)
        finally:
            # Of a body that was read to its end the connection has gone back already.
            response.close()
            if outcome.body is None and outcome.reserved:
                self.budget.give(outcome.reserved)
                outcome.reserved = 0
        return outcome

    async def read(
        self, at: WebUrl, response: aiohttp.ClientResponse, outcome: Outcome, obey: bool, limit: int
    ) -> None:
        """Complete `outcome` from the head of a response, and its body where that is wanted."""
        decision = self.permission(response) if obey else NOTHING_SAID
        outcome.said = decision.said
        status = response.status
        if status in REDIRECTS and "Location" in response.headers:
            if decision.refused:
                outcome.reason, outcome.message = reasons.DISALLOWED, decision.said
                return
            try:
                outcome.redirect = parse_redirect(at, response.headers["Location"])
            except BadUrlError as error:
                outcome.reason, outcome.message = reasons.HTTP_3XX, f"redirect refused: {error}"
                return
            await drain(response)
        elif 200 <= status < 300:
            if decision.refused:
                outcome.reason, outcome.message = reasons.DISALLOWED, decision.said
            elif status == 206:
                outcome.reason, outcome.message = reasons.TRUNCATED, "HTTP 206: a part, though the whole was asked for"
            else:
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

    async def read_body(self, response: aiohttp.ClientResponse, outcome: Outcome, limit: int) -> None:
        """Read, and decompress, a body of at most `limit` bytes into `outcome`."""
        length = response.content_length
        if length is not None and length > limit:
            outcome.reason, outcome.message = reasons.TOO_LARGE, f"Content-Length {length}, allowed are {limit}"
            return
        codings = [coding.strip().lower() for coding in response.headers.get("Content-Encoding", "").split(",")]
        codings = [coding for coding in codings if coding not in ("", "identity")]
        if codings and (len(codings) > 1 or codings[0] not in KNOWN):
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
        if decompressor is not None and received and not decompressor.is_whole():
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


def judge_status(response: aiohttp.ClientResponse, outcome: Outcome) -> None:
    """The reason behind a status that is no success."""
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


def failed(error: Exception, settings: FetchSettings) -> Outcome:
    """The outcome of a request that ended in an error of the network."""
    for cause in causes(error):
        if isinstance(cause, BlockedAddressError):
            return Outcome(reasons.BLOCKED_ADDRESS, str(cause))
        if isinstance(cause, UnresolvedError):
            return Outcome(reasons.DNS, str(cause), passing=cause.passing)
        if isinstance(cause, ssl.SSLError) and not isinstance(cause, aiohttp.ClientError):
            return Outcome(reasons.TLS, tls_message(cause))
        if isinstance(cause, OSError) and cause.errno in STARVED:
            return Outcome(reasons.OTHER, f"this machine: {cause.strerror}", passing=True, starved=True)
    if isinstance(error, TimeoutError):
        return Outcome(reasons.TIMEOUT, f"nothing for {settings.timeout:g} s", passing=True)
    if isinstance(error, aiohttp.ClientPayloadError):
        return Outcome(reasons.TRUNCATED, "body ends early", passing=True)
    if isinstance(error, aiohttp.InvalidURL):
        return Outcome(reasons.BAD_URL, "host or path is refused")
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return Outcome(reasons.CONNECT, "closed without an answer", passing=True)
    if isinstance(error, OSError | aiohttp.ClientConnectionError):
        number = getattr(error, "errno", None)
        return Outcome(reasons.CONNECT, os.strerror(number) if number else one_line(error), passing=True)
    if isinstance(error, aiohttp.ClientResponseError):
        return Outcome(reasons.OTHER, f"answer is no HTTP: {one_line(error.message)}")
    return Outcome(reasons.OTHER, f"{type(error).__name__}: {one_line(error)}")


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


def tls_message(error: ssl.SSLError) -> str:
    """What was wrong, without OpenSSL's source lines."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate: {error.verify_message}"[:200]
    return str(error.reason or error).lower().replace("_", " ")[:200]
