"""How many requests to have under way: as many as bring more, and fewer when names or connections time out.

Additive increase, multiplicative decrease, as TCP finds its rate (Chiu and Jain, 1989): the bottleneck may be the
line, the resolver, a router's table of connections or this process, and all of them show in the same two signs.
"""

FIRST = 64
LEAST = 8
WINDOW_SECONDS = 1.0
WINDOW_REQUESTS = 50
BAD_SHARE = 0.3  # of a list of old links, a tenth or so time out on any day
BAD_NAMES = 0.2
GROWTH = 1.25
FALL = 0.7
WORTHWHILE = 1.02  # more throughput than before the last growth
PATIENCE = 10  # windows before growth is tried again


class Concurrency:
    """The current `limit` of requests under way. Times are in seconds of one clock."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.limit = min(most, FIRST)
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
        self.limit = self.most = max(LEAST, int(self.limit * FALL))

    def adapt(self, now: float, in_flight: int) -> None:
        """Look at the window that ends now, if it is long enough, and change `limit`."""
        self.was_full = self.was_full or in_flight >= self.limit
        if now - self.began < WINDOW_SECONDS or self.finished < WINDOW_REQUESTS:
            return
        rate = self.finished / (now - self.began)
        bad = self.timeouts > BAD_SHARE * self.finished
        bad = bad or (self.lookups >= WINDOW_REQUESTS and self.lost_lookups > BAD_NAMES * self.lookups)
        if bad:
            self.limit = max(min(LEAST, self.most), int(self.limit * FALL))
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
