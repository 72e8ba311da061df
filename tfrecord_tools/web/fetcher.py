"""Images from the web, many at once, in one event loop a process: the network part of `clipkit download`.

`Fetcher` gives each row's URL its turn (`hosts`), asks for it (`request`), decides what its outcome leads to (a
redirect, another try, the end), and hands the end over to threads (`calls`). One request is one step of a row: between
steps a row waits in its host's queue and holds no place, so that a slow host holds up nobody but itself.
"""

import asyncio
import dataclasses
import random
from collections import deque
from functools import partial
from typing import Self

from clipkit.storage.files import allow_many_files
from clipkit.tfrecord_tools import reasons
from clipkit.tfrecord_tools.web.calls import Call, Handle, HandlerThreads, PendingRow, Rows
from clipkit.tfrecord_tools.web.hosts import UNREACHABLE, Concurrency, HostQueues
from clipkit.tfrecord_tools.web.permissions import ROBOTS_MAX_BYTES, RobotsTxt
from clipkit.tfrecord_tools.web.request import ByteBudget, Exchange, one_line
from clipkit.tfrecord_tools.web.resolver import Resolver
from clipkit.tfrecord_tools.web.settings import FetchOutcome, FetchSettings
from clipkit.tfrecord_tools.web.urls import BadUrlError, parse_url

PREFETCH = 1024  # rows read ahead even when there is no need, to know which connections will be wanted again
LARGE_BODY_BYTES = 256 << 20
RATE_TRIES = 3  # a host that says when to come back is asked again, whatever `retries` says
LONGEST_BACKOFF = 8.0
NAMES_SHARE = 0.8  # of the deadline: a name that can't be had is to end as one, and not as a timeout


class Fetcher:
    """Fetches rows. An async context manager: it owns connections, names, hosts' states and threads.

    A worker process keeps one for many shards; two calls of `fetch_many` at a time let the second use what the slow
    last rows of the first leave idle. Raises UserError on entry for invalid settings.
    """

    def __init__(self, settings: FetchSettings) -> None:
        self.settings = settings
        self.calls: deque[Call] = deque()
        self.in_flight = 0
        self.alarm: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        settings = self.settings
        self.loop = asyncio.get_running_loop()
        allow_many_files()
        self.concurrency = Concurrency(settings.connections)
        self.resolver = Resolver(
            settings.resolvers,
            allow_private=settings.allow_private_hosts,
            patience=settings.deadline * NAMES_SHARE,
            report=self.concurrency.looked_up,
        )
        self.budget = ByteBudget(max(LARGE_BODY_BYTES, settings.max_bytes))
        self.exchange = Exchange(settings, self.resolver, self.budget)
        ask = partial(self.exchange.get, keep=True, limit=ROBOTS_MAX_BYTES, obey=False)
        self.robots = RobotsTxt(ask, settings.agent_token) if settings.robots_txt else None
        self.hosts: HostQueues[PendingRow] = HostQueues(settings.per_host, settings.deadline)
        self.handlers = HandlerThreads(settings.handler_threads, self.handled)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.alarm is not None:
            self.alarm.cancel()
        if self.robots is not None:
            await self.robots.close()
        await self.exchange.close()
        await self.resolver.close()
        await self.handlers.close()

    async def fetch_many(self, rows: Rows, handle: Handle) -> None:
        """Call `handle` once for each row (index, URL), in any order, from several threads at once.

        `rows` is drawn from as there is room. An error of `rows` or `handle` ends the call and is raised; no call of
        `handle` is under way after that.
        """
        call = Call(iter(rows), handle, self.loop.create_future())
        self.calls.append(call)
        self.pump()
        try:
            await call.done
        finally:
            await self.end(call)

    async def end(self, call: Call) -> None:
        """Leave nothing of a call behind, however it ended."""
        if call in self.calls:
            self.calls.remove(call)
        if not call.pending and not call.handling:
            return
        call.failed = True
        self.hosts.remove({id(row) for row in call.pending}, self.loop.time())
        tasks = [row.task for row in call.pending if row.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        while call.handling:
            call.idle.clear()
            await call.idle.wait()
        self.pump()

    # -----------------------------------------------------------------------------------------------------------------
    # Starting requests
    # -----------------------------------------------------------------------------------------------------------------

    def pump(self) -> None:
        """Start what may start. Called whenever something has changed."""
        now = self.loop.time()
        self.concurrency.adapt(now, self.in_flight)
        while self.handlers.has_room():
            while self.hosts.queued < PREFETCH and self.handlers.has_room() and self.draw(now):
                pass
            if self.in_flight >= self.concurrency.limit:
                return
            row = self.hosts.take(now)
            if row is not None:
                self.in_flight += 1
                row.task = self.loop.create_task(self.step(row))
            elif self.hosts.queued >= self.settings.look_ahead or not self.draw(now):
                self.set_alarm()
                return

    def draw(self, now: float) -> bool:
        """Read one more row and queue it; False when there is none."""
        while self.calls:
            call = self.calls[0]
            try:
                drawn = next(call.rows, None)
            except Exception as error:
                call.fail(error)
                drawn = None
            if drawn is not None:
                self.queue(call, *drawn, now)
                return True
            call.exhausted = True
            self.calls.popleft()
            call.check_end()
        return False

    def queue(self, call: Call, index: int, url: str, now: float) -> None:
        """Queue a new row, or end it where its URL or its host allows no more."""
        try:
            at = parse_url(url)
        except BadUrlError as error:
            self.hand_over(call, FetchOutcome(reasons.BAD_URL, str(error), index=index, url=url))
            return
        row = PendingRow(call, index, url, at)
        call.pending.add(row)
        self.enter(row, now, first=False)

    def enter(self, row: PendingRow, now: float, *, first: bool) -> None:
        """Queue a row at its host, unless that gets no more requests."""
        refusal = self.hosts.refusal(row.at.host, now)
        if refusal is None:
            self.hosts.add(row.at.host, row, first=first)
        else:
            self.finish(row, FetchOutcome(refusal.reason, refusal.message), attempts=row.tries - 1)

    def set_alarm(self) -> None:
        """Come back when a pause is over or a retry is due."""
        when = self.hosts.next_time()
        if when is None or (self.alarm is not None and not self.alarm.cancelled() and self.alarm.when() <= when):
            return
        if self.alarm is not None:
            self.alarm.cancel()
        self.alarm = self.loop.call_at(when, self.ring)

    def ring(self) -> None:
        self.alarm = None
        self.pump()

    # -----------------------------------------------------------------------------------------------------------------
    # One step of one row
    # -----------------------------------------------------------------------------------------------------------------

    async def step(self, row: PendingRow) -> None:
        """One request of a row, and what follows from it."""
        began = self.loop.time()
        host = row.at.host
        outcome = None
        try:
            async with asyncio.timeout(max(0.0, self.settings.deadline - row.spent)):
                outcome = await self.ask(row)
        except TimeoutError:
            message = f"not done after {self.settings.deadline:g} s"
            outcome = FetchOutcome(reasons.TIMEOUT, message, answered=row.redirects > 0)
        except Exception as error:  # a bug, but one that must not end a download of millions of rows
            outcome = FetchOutcome(reasons.OTHER, f"{type(error).__name__}: {one_line(error)}")
        finally:
            now = self.loop.time()
            row.task = None
            row.spent += now - began
            self.in_flight -= 1
            if outcome is None:  # cancelled
                self.hosts.done(host, now)
                row.call.pending.discard(row)
        self.judge_host(host, outcome, now)
        self.follow(row, outcome, now)
        self.hosts.done(host, now)
        self.pump()

    async def ask(self, row: PendingRow) -> FetchOutcome:
        """The outcome of the next request of a row: robots.txt first, where that is asked for."""
        at = row.at
        if self.robots is not None:
            answer = await self.robots.ask(at)
            if isinstance(answer, FetchOutcome):
                return dataclasses.replace(answer)  # other rows get the same
            row.note(answer.said)
            if answer.refused:
                return FetchOutcome(reasons.DISALLOWED, answer.said, answered=True)
        outcome = await self.exchange.get(at, keep=not self.hosts.is_alone(at.host))
        row.note(outcome.decision)
        return outcome

    def judge_host(self, host: str, outcome: FetchOutcome, now: float) -> None:
        """Learn from an outcome how the host does, and how we do."""
        self.concurrency.completed(outcome.reason == reasons.TIMEOUT)
        dropped: list[PendingRow] = []
        if outcome.starved:
            self.concurrency.starved()
        elif outcome.reason == reasons.RATE_LIMITED:
            outcome.wait, dropped = self.hosts.rate_limited(host, outcome.wait, now)
        elif outcome.answered:
            self.hosts.succeeded(host)
        elif outcome.reason in UNREACHABLE and (outcome.passing or outcome.reason != reasons.DNS):
            dropped = self.hosts.failed(host, str(outcome.reason), outcome.message, now)
        refusal = self.hosts.refusal(host, now)
        for row in dropped:
            assert refusal is not None
            self.finish(row, FetchOutcome(refusal.reason, refusal.message), attempts=row.tries - 1)

    def follow(self, row: PendingRow, outcome: FetchOutcome, now: float) -> None:
        """Send a row on to its redirect, to another try, or to its end."""
        if outcome.redirect is not None:
            row.redirects += 1
            if row.redirects > self.settings.max_redirects:
                message = f"more than {self.settings.max_redirects} redirects"
                self.finish(row, FetchOutcome(reasons.HTTP_3XX, message, http_status=outcome.http_status))
                return
            row.at = outcome.redirect
            self.enter(row, now, first=True)
            return
        wait = self.wait_before_retry(row, outcome)
        if wait is None or row.spent + wait >= self.settings.deadline:
            self.finish(row, outcome)
            return
        row.spent += wait
        row.tries += 1
        self.hosts.add_later(row.at.host, row, now + wait)

    def wait_before_retry(self, row: PendingRow, outcome: FetchOutcome) -> float | None:
        """Seconds until another try of the same URL, None when there is to be none."""
        if outcome.reason == reasons.RATE_LIMITED:
            row.rate_tries += 1
            return outcome.wait if row.rate_tries <= max(RATE_TRIES, self.settings.retries) else None
        if outcome.starved or (outcome.passing and row.tries <= self.settings.retries):
            return random.uniform(0.5, 1.0) * min(2.0 ** (row.tries - 1), LONGEST_BACKOFF)
        return None

    # -----------------------------------------------------------------------------------------------------------------
    # The end of a row
    # -----------------------------------------------------------------------------------------------------------------

    def finish(self, row: PendingRow, outcome: FetchOutcome, attempts: int | None = None) -> None:
        """Make the outcome of a row's last request that of the row."""
        row.call.pending.discard(row)
        outcome.index, outcome.url, outcome.decision, outcome.seconds = row.index, row.url, row.decision, row.spent
        outcome.attempts = row.tries if attempts is None else attempts
        self.hand_over(row.call, outcome)

    def hand_over(self, call: Call, outcome: FetchOutcome) -> None:
        """Give an outcome to the threads."""
        call.handling += 1
        self.handlers.put(call, outcome)

    def handled(self, call: Call, outcome: FetchOutcome, error: BaseException | None) -> None:
        """A thread is done with a row."""
        call.handling -= 1
        if outcome.reserved:
            self.budget.give(outcome.reserved)
        if error is not None:
            call.fail(error)
        call.check_end()
        self.pump()
