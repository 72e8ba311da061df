"""Whose turn it is: requests queue by host, so that no host gets too many at once and none holds up the others.

All of it runs in one thread, the event loop's, and never waits: it says what may start now, and when to ask again.
Times are the loop's seconds.

How many may be under way in all is `Concurrency`'s: as many as bring more, and fewer when names or connections time
out. Additive increase, multiplicative decrease, as TCP finds its rate (Chiu and Jain, 1989): the bottleneck may be the
line, the resolver, a router's table of connections or this process, and all of them show in the same two signs.
"""

import heapq
import itertools
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from clipkit.tfrecord_tools import reasons

Item = TypeVar("Item")

CIRCUIT_AFTER = 8  # failures in a row, after which a host is given a pause and then one probe at a time
PROBE_PAUSES = (1.0, 4.0)
GIVEN_UP_SECONDS = 300.0
TROUBLED_HOSTS = 20_000  # idle hosts whose troubles are remembered
FIRST_PAUSE = 1.0  # after a 429 that names no time; doubles
FIRST_LIMIT = 64  # requests under way at the beginning
LEAST_LIMIT = 8  # and at the worst
WINDOW_SECONDS = 1.0
WINDOW_REQUESTS = 50
BAD_SHARE = 0.3  # of a list of old links, a tenth or so time out on any day
BAD_NAMES = 0.2
GROWTH = 1.25
FALL = 0.7
WORTHWHILE = 1.02  # more throughput than before the last growth
PATIENCE = 10  # windows before growth is tried again
UNREACHABLE = frozenset({reasons.DNS, reasons.CONNECT, reasons.TLS, reasons.TIMEOUT})


@dataclass(frozen=True)
class Refusal:
    """Why a host gets no more requests for now."""

    reason: str
    message: str


@dataclass(slots=True, eq=False)
class Host(Generic[Item]):
    """One hostname: what waits for it, what is under way, and how it has behaved."""

    name: str
    limit: float
    queue: deque[Item] = field(default_factory=deque)
    active: int = 0
    is_ready: bool = False
    paused_until: float = 0.0
    failures: int = 0
    rate_limits: int = 0
    refused_until: float = 0.0
    refusal: Refusal | None = None

    def is_clean(self, now: float) -> bool:
        """Whether forgetting it would lose nothing."""
        return not (
            self.queue
            or self.active
            or self.failures
            or self.rate_limits
            or max(self.paused_until, self.refused_until) > now
        )


class HostQueues(Generic[Item]):
    """Items queued by hostname. `take` gives them out in turn over the hosts; `done` gives the place back."""

    def __init__(self, per_host: int, longest_pause: float) -> None:
        """At most `per_host` items of a host are out at once; a host that asks for more than `longest_pause` seconds
        is refused instead of waited for.
        """
        self.per_host = per_host
        self.longest_pause = longest_pause
        self.hosts: dict[str, Host[Item]] = {}
        self.troubled: OrderedDict[str, None] = OrderedDict()
        self.ready: deque[Host[Item]] = deque()
        self.timers: list[tuple[float, int, Host[Item] | tuple[str, Item]]] = []
        self.order = itertools.count()
        self.queued = 0

    def add(self, name: str, item: Item, *, first: bool = False) -> None:
        """Queue an item; `first` for one that has begun already (a redirect, a retry)."""
        host = self.host(name)
        if first:
            host.queue.appendleft(item)
        else:
            host.queue.append(item)
        self.queued += 1
        self.mark_ready(host)

    def add_later(self, name: str, item: Item, when: float) -> None:
        """Queue an item, as the first of its host, at a time to come."""
        heapq.heappush(self.timers, (when, next(self.order), (name, item)))
        self.queued += 1

    def take(self, now: float) -> Item | None:
        """The next item that may start, None when there is none."""
        self.release_due(now)
        while self.ready:
            host = self.ready.popleft()
            host.is_ready = False
            if not self.may_start(host, now):
                continue
            item = host.queue.popleft()
            self.queued -= 1
            host.active += 1
            self.mark_ready(host)
            return item
        return None

    def done(self, name: str, now: float) -> None:
        """Give back the place of an item that `take` gave out."""
        host = self.hosts[name]
        host.active -= 1
        self.mark_ready(host)
        if not host.queue and not host.active:
            self.retire(host, now)

    def is_alone(self, name: str) -> bool:
        """Whether nothing else is wanted of a host, so that its connection needn't be kept."""
        host = self.hosts.get(name)
        return host is None or (host.active <= 1 and not host.queue)

    def refusal(self, name: str, now: float) -> Refusal | None:
        """Why items of this host should fail at once, None when they may queue."""
        host = self.hosts.get(name)
        return host.refusal if host is not None and host.refused_until > now else None

    def next_time(self) -> float | None:
        """When `take` is worth asking again though nothing was done or added."""
        return self.timers[0][0] if self.timers else None

    # -----------------------------------------------------------------------------------------------------------------
    # How a host behaves
    # -----------------------------------------------------------------------------------------------------------------

    def succeeded(self, name: str) -> None:
        """It answered, with whatever status."""
        host = self.hosts[name]
        host.failures = 0
        host.refusal = None
        host.rate_limits = 0
        if host.limit < self.per_host:
            host.limit = min(self.per_host, host.limit + 0.5 / host.limit)
            self.mark_ready(host)

    def failed(self, name: str, reason: str, message: str, now: float) -> list[Item]:
        """It could not be reached. Returns the queued items, to fail with it, when that was one time too many."""
        host = self.hosts[name]
        if host.paused_until > now:  # what was under way when the pause began says nothing new
            return []
        host.failures += 1
        if host.failures < CIRCUIT_AFTER:
            return []
        host.limit = 1.0
        probes = host.failures - CIRCUIT_AFTER
        if probes < len(PROBE_PAUSES):
            self.pause(host, now + PROBE_PAUSES[probes])
            return []
        return self.refuse(host, now + GIVEN_UP_SECONDS, Refusal(reason, f"host backed off: {message}"))

    def rate_limited(self, name: str, seconds: float | None, now: float) -> tuple[float, list[Item]]:
        """It asked us to wait, for `seconds` if it named a time.

        Returns for how long it gets no requests, and, when that is too long, the queued items, to fail at once.
        """
        host = self.hosts[name]
        host.failures = 0
        wait = FIRST_PAUSE * 2**host.rate_limits if seconds is None else seconds
        if host.paused_until <= now:  # answers to what was under way when it began to refuse say nothing new
            host.rate_limits += 1
            host.limit = max(1.0, host.limit / 2)
        if wait > self.longest_pause:
            refusal = Refusal(reasons.RATE_LIMITED, f"host asked to wait {wait:.0f} s")
            return wait, self.refuse(host, now + wait, refusal)
        self.pause(host, now + wait)
        return wait, []

    # -----------------------------------------------------------------------------------------------------------------

    def host(self, name: str) -> Host[Item]:
        """The state of a host, made when it is first heard of."""
        found = self.hosts.get(name)
        if found is None:
            found = self.hosts[name] = Host(name, float(self.per_host))
        self.troubled.pop(name, None)
        return found

    def may_start(self, host: Host[Item], now: float) -> bool:
        return bool(host.queue) and host.active < int(host.limit) and host.paused_until <= now

    def mark_ready(self, host: Host[Item]) -> None:
        if not host.is_ready and host.queue and host.active < int(host.limit):
            host.is_ready = True
            self.ready.append(host)

    def pause(self, host: Host[Item], until: float) -> None:
        if until > host.paused_until:
            host.paused_until = until
            heapq.heappush(self.timers, (until, next(self.order), host))

    def refuse(self, host: Host[Item], until: float, refusal: Refusal) -> list[Item]:
        host.refused_until = max(host.refused_until, until)
        host.refusal = refusal
        dropped = list(host.queue)
        host.queue.clear()
        self.queued -= len(dropped)
        return dropped

    def release_due(self, now: float) -> None:
        """Queue the items whose time has come, and let hosts go on whose pause is over."""
        while self.timers and self.timers[0][0] <= now:
            _, _, entry = heapq.heappop(self.timers)
            if isinstance(entry, Host):
                self.mark_ready(entry)
            else:
                self.queued -= 1
                self.add(*entry, first=True)

    def retire(self, host: Host[Item], now: float) -> None:
        """Forget an idle host; one in trouble only when more than TROUBLED_HOSTS are remembered."""
        if host.is_clean(now):
            del self.hosts[host.name]
            return
        self.troubled[host.name] = None
        if len(self.troubled) > TROUBLED_HOSTS:
            oldest, _ = self.troubled.popitem(last=False)
            del self.hosts[oldest]

    def remove(self, items: set[int], now: float) -> None:
        """Drop queued items by their id(): their job has ended early."""
        for host in list(self.hosts.values()):
            kept = deque(item for item in host.queue if id(item) not in items)
            self.queued -= len(host.queue) - len(kept)
            host.queue = kept
            if not kept and not host.active:
                self.retire(host, now)
        timers = [entry for entry in self.timers if isinstance(entry[2], Host) or id(entry[2][1]) not in items]
        self.queued -= len(self.timers) - len(timers)
        heapq.heapify(timers)
        self.timers = timers


class Concurrency:
    """The current `limit` of requests under way. Times are in seconds of one clock."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.limit = min(most, FIRST_LIMIT)
        self.began = 0.0
        self.finished = self.timeouts = self.lookups = self.lost_lookups = 0
        self.was_full = False
        self.rate_before = 0.0
        self.waiting = 0

    def looked_up(self, failed: bool) -> None:
        """A resolver answered, or did not."""
        self.lookups += 1
        self.lost_lookups += failed

    def completed(self, timed_out: bool) -> None:
        """A request ended."""
        self.finished += 1
        self.timeouts += timed_out

    def starved(self) -> None:
        """This machine is out of sockets or ports."""
        self.limit = self.most = max(LEAST_LIMIT, int(self.limit * FALL))

    def adapt(self, now: float, in_flight: int) -> None:
        """Look at the window that ends now, if it is long enough, and change `limit`."""
        self.was_full = self.was_full or in_flight >= self.limit
        if now - self.began < WINDOW_SECONDS or self.finished < WINDOW_REQUESTS:
            return
        rate = self.finished / (now - self.began)
        bad = self.timeouts > BAD_SHARE * self.finished
        bad = bad or (self.lookups >= WINDOW_REQUESTS and self.lost_lookups > BAD_NAMES * self.lookups)
        if bad:
            self.limit = max(min(LEAST_LIMIT, self.most), int(self.limit * FALL))
            self.rate_before = 0.0
        elif self.was_full and self.limit < self.most:
            self.waiting += 1
            if rate > self.rate_before * WORTHWHILE or self.waiting > PATIENCE:
                self.limit = min(self.most, int(self.limit * GROWTH) + 1)
                self.rate_before = rate
                self.waiting = 0
        self.began = now
        self.finished = self.timeouts = self.lookups = self.lost_lookups = 0
        self.was_full = False
