"""The one way to the network: sockets to checked addresses, TLS that is verified, connections kept alive."""

import asyncio
import errno
import socket
import ssl
from functools import cache
from typing import Any

import aiohttp

from clipkit.errors import UserError
from clipkit.tfrecord_tools.web.addresses import check_address
from clipkit.tfrecord_tools.web.resolver import Resolver
from clipkit.tfrecord_tools.web.settings import FetchSettings

KEEP_ALIVE_SECONDS = 8.0
READ_BYTES = 1 << 17
# What says that this machine is out of sockets or ports, and nothing about a host.
STARVED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL})


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
    """A session without cookies, referers, redirects, proxies or any other address than `resolver`'s checked ones.

    `keep`: connections are kept for later requests. A crawl meets most hosts once, so those that will not be wanted
    again go over a session that closes them: else thousands would lie idle and use up the open files.
    """
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

    Addresses from names were checked when they were resolved; those written into URLs come by here alone.
    """

    def make(address_info: Any) -> socket.socket:
        family, kind, protocol, _, address = address_info
        check_address(address[0], allow_private)
        return socket.socket(family, kind, protocol)

    return make


class ByteBudget:
    """Bounds what large bodies may hold in memory together; whoever wants more waits in line."""

    def __init__(self, size: int) -> None:
        self.left = size
        self.size = size
        self.line: list[tuple[int, asyncio.Future[None]]] = []

    async def take(self, wanted: int) -> int:
        """Wait for `wanted` bytes, no more than there are in all, and return how many were taken."""
        wanted = min(wanted, self.size)
        if self.line or wanted > self.left:
            turn = asyncio.get_running_loop().create_future()
            entry = (wanted, turn)
            self.line.append(entry)
            try:
                await turn
            except asyncio.CancelledError:
                if entry in self.line:
                    self.line.remove(entry)
                    self.serve()
                else:
                    self.give(wanted)
                raise
        else:
            self.left -= wanted
        return wanted

    def give(self, taken: int) -> None:
        """Return what `take` gave."""
        self.left += taken
        self.serve()

    def serve(self) -> None:
        """Let the first in line have theirs."""
        while self.line and self.line[0][0] <= self.left:
            wanted, turn = self.line.pop(0)
            if turn.done():  # cancelled: its owner finds itself out of the line and gives back
                pass
            else:
                turn.set_result(None)
            self.left -= wanted
