"""Names to addresses within the process: cached, asked for once, and never given out unchecked.

Downloads of URL lists collapse on DNS first: a resolver that is asked too much drops queries or answers SERVFAIL, and
whoever takes that for "does not exist" loses the row for good. Here only an answer that says so (NXDOMAIN, or no
address) is a no. Everything else is asked again, at the next resolver, later.
"""

import asyncio
import ipaddress
import random
import socket
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from aiohttp.abc import AbstractResolver, ResolveResult

from clipkit.errors import UserError
from clipkit.tfrecord_tools.web.addresses import BlockedAddressError, check_address

CACHE_SECONDS = 600.0
CACHE_NAMES = 100_000
CONCURRENT_LOOKUPS = 128
SYSTEM_THREADS = 32
# How often a name is asked for: of a resolver that mostly answers, a name that keeps failing is itself broken. One
# that mostly fails is overloaded, and patience gets through.
TRIES = 4
PATIENT_TRIES = 20
TROUBLED = 0.25
SMOOTHING = 0.02
FIRST_WAIT = 1.0
LONGEST_WAIT = 4.0
LONGEST_PAUSE = 1.0


class UnresolvedError(OSError):
    """A name that gave no address. `passing`: no resolver said that there is none, so a later try may succeed."""

    def __init__(self, message: str, *, passing: bool) -> None:
        super().__init__(message)
        self.passing = passing


class SystemBackend:
    """The system's resolver (with /etc/hosts), in threads of its own."""

    def __init__(self) -> None:
        self.threads = ThreadPoolExecutor(SYSTEM_THREADS, thread_name_prefix="resolver")

    async def ask(self, host: str) -> tuple[list[str], float]:
        """The addresses of a host and for how many seconds they hold. Raises UnresolvedError."""
        loop = asyncio.get_running_loop()
        try:
            found = await loop.run_in_executor(self.threads, system_lookup, host)
        except socket.gaierror as error:
            missing = (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))
            raise UnresolvedError(f"{error.strerror}", passing=error.errno not in missing) from None
        except UnicodeError:
            raise UnresolvedError("no valid name", passing=False) from None
        return found, CACHE_SECONDS

    async def close(self) -> None:
        self.threads.shutdown(wait=False, cancel_futures=True)


def system_lookup(host: str) -> list[str]:
    """All addresses that the system knows for a host. Raises socket.gaierror."""
    answers = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    return list(dict.fromkeys(str(answer[4][0]) for answer in answers))


class ServerBackend:
    """One DNS server (after /etc/hosts), asked over UDP, and TCP where an answer is cut, by c-ares.

    IPv4 first and IPv6 only where there is none: one query a name instead of two.
    """

    def __init__(self, server: str) -> None:
        import aiodns
        import pycares

        self.server = server
        # No `lookups` here: pycares 5.2.1 hands c-ares a text that it has freed by then, and at times nobody is asked.
        self.resolver = aiodns.DNSResolver([server], timeout=LONGEST_WAIT, tries=1, flags=pycares.ARES_FLAG_NOSEARCH)
        self.missing = (pycares.errno.ARES_ENOTFOUND, pycares.errno.ARES_ENODATA, pycares.errno.ARES_EBADNAME)
        self.no_data = pycares.errno.ARES_ENODATA

    async def ask(self, host: str) -> tuple[list[str], float]:
        """As `SystemBackend.ask`."""
        from aiodns.error import DNSError

        for family in (socket.AF_INET, socket.AF_INET6):
            try:
                result = await self.resolver.getaddrinfo(host, family=family)
            except DNSError as error:
                number, text = error.args
                if number == self.no_data and family == socket.AF_INET:
                    continue
                raise UnresolvedError(f"{text}", passing=number not in self.missing) from None
            ttl = min((node.ttl for node in result.nodes), default=0)
            # c-ares's binding gives addresses as bytes.
            found = [node.addr[0] for node in result.nodes]
            addresses = [address.decode() if isinstance(address, bytes) else address for address in found]
            return addresses, min(max(ttl, 60.0), CACHE_SECONDS)
        raise AssertionError("unreachable")

    async def close(self) -> None:
        await self.resolver.close()


def check_resolvers(servers: Sequence[str]) -> None:
    """Raise UserError unless each DNS server is given as "ip", "ip:port" or "[ipv6]:port"."""
    for server in servers:
        host, _, port = server.rpartition(":") if server.count(":") == 1 or "]:" in server else (server, "", "53")
        try:
            ipaddress.ip_address(host.strip("[]"))
            valid = 0 < int(port) < 65_536
        except ValueError:
            valid = False
        if not valid:
            raise UserError(
                f"--resolver {server!r} is not an address: give IP or IP:PORT, such as 9.9.9.9 or 9.9.9.9:53"
            )


class Resolver(AbstractResolver):
    """aiohttp's source of addresses: `resolve` returns checked ones, which are then dialled without another lookup.

    Must be made inside a running event loop. Raises UserError for a bad address of a server.
    """

    def __init__(
        self,
        servers: Sequence[str] = (),
        *,
        allow_private: bool = False,
        patience: float = 30.0,
        report: Callable[[bool], None] = lambda failed: None,
    ) -> None:
        check_resolvers(servers)
        self.backends: list[SystemBackend | ServerBackend]
        self.backends = [ServerBackend(server) for server in servers] if servers else [SystemBackend()]
        self.allow_private = allow_private
        self.patience = patience
        self.report = report
        self.loop = asyncio.get_running_loop()
        self.cache: OrderedDict[str, tuple[float, tuple[str, ...] | OSError]] = OrderedDict()
        self.lookups: dict[str, asyncio.Task[tuple[str, ...]]] = {}
        self.slots = asyncio.Semaphore(CONCURRENT_LOOKUPS)
        self.next_backend = 0
        self.asked = 0
        self.trouble = 0.0  # share of recent questions that got no answer, smoothed

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """The addresses of a host that may be dialled. Raises UnresolvedError or BlockedAddressError, both OSError."""
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=socket.IPPROTO_TCP,
                flags=socket.AI_NUMERICHOST,
            )
            for address in await self.addresses(host)
        ]

    async def addresses(self, host: str) -> tuple[str, ...]:
        """As `resolve`, as plain texts."""
        known = self.cache.get(host)
        if known is not None and known[0] > self.loop.time():
            if isinstance(known[1], OSError):
                raise same_error(known[1])
            return known[1]
        lookup = self.lookups.get(host)
        if lookup is None:
            lookup = self.lookups[host] = self.loop.create_task(self.look_up(host))
            lookup.add_done_callback(lambda done: self.forget(host, done))
        # Whoever gives up waiting must not end the question for the others.
        return await asyncio.shield(lookup)

    def forget(self, host: str, done: "asyncio.Task[tuple[str, ...]]") -> None:
        """Drop a finished question, and take its error, which may be nobody's by now."""
        self.lookups.pop(host, None)
        if not done.cancelled():
            done.exception()

    async def look_up(self, host: str) -> tuple[str, ...]:
        """Ask for a host's addresses, check them, and remember the answer."""
        try:
            found, seconds = await self.ask(host)
        except UnresolvedError as error:
            if not error.passing:
                self.remember(host, error, CACHE_SECONDS)
            raise
        allowed, blocked = [], None
        for address in found:
            try:
                check_address(address, self.allow_private)
                allowed.append(address)
            except BlockedAddressError as error:
                blocked = error
        if blocked is not None and not allowed:
            failure = BlockedAddressError(f"{host}: {blocked}")
            self.remember(host, failure, seconds)
            raise failure
        self.remember(host, tuple(allowed), seconds)
        return tuple(allowed)

    async def ask(self, host: str) -> tuple[list[str], float]:
        """Ask one resolver after the other until one says yes or no, or patience ends. Raises UnresolvedError."""
        give_up = self.loop.time() + self.patience
        failure = UnresolvedError("no resolver answered in time", passing=True)
        for tried in range(PATIENT_TRIES):
            if tried >= TRIES and self.trouble < TROUBLED:
                break
            backend = self.backends[self.next_backend % len(self.backends)]
            self.next_backend += 1
            wait = LONGEST_WAIT * 4 if isinstance(backend, SystemBackend) else min(FIRST_WAIT * 2**tried, LONGEST_WAIT)
            try:
                async with self.slots, asyncio.timeout_at(min(give_up, self.loop.time() + wait)):
                    answer = await backend.ask(host)
            except TimeoutError:
                self.note(failed=True)
            except UnresolvedError as error:
                self.note(failed=error.passing)
                if not error.passing:
                    raise
                failure = UnresolvedError(f"resolver: {error}", passing=True)
            else:
                self.note(failed=False)
                return answer
            pause = random.uniform(0.5, 1.0) * min(0.05 * 2**tried, LONGEST_PAUSE)
            if self.loop.time() + pause >= give_up:
                break
            await asyncio.sleep(pause)
        raise failure

    def note(self, *, failed: bool) -> None:
        """Keep count of how the resolvers do."""
        self.asked += 1
        self.trouble += (failed - self.trouble) * max(1 / self.asked, SMOOTHING)
        self.report(failed)

    def remember(self, host: str, answer: "tuple[str, ...] | OSError", seconds: float) -> None:
        """Cache an answer; the oldest leave when there are too many."""
        self.cache[host] = (self.loop.time() + seconds, answer)
        self.cache.move_to_end(host)
        if len(self.cache) > CACHE_NAMES:
            self.cache.popitem(last=False)

    async def close(self) -> None:
        """End all questions and the threads behind them."""
        pending: list[Any] = list(self.lookups.values())
        for lookup in pending:
            lookup.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        for backend in self.backends:
            await backend.close()


def same_error(error: OSError) -> OSError:
    """A fresh copy of a remembered error: one that is raised again and again would gather tracebacks."""
    if isinstance(error, UnresolvedError):
        return UnresolvedError(str(error), passing=error.passing)
    return BlockedAddressError(str(error))
