"""Images from the web, many at once, in one event loop a process: the network part of `clipkit download`.

`Fetcher` gives each row's URL its turn (hosts), asks for it (exchange), decides what its outcome leads to (a redirect,
another try, the end), and hands the end over to threads (handling). One request is one step of a row: between steps a
row waits in its host's queue and holds no place, so that a slow host holds up nobody but itself.
"""

import asyncio
import random
from collections import Counter, deque
from types import TracebackType
from typing import Self

from clipkit.storage.files import allow_many_files
from clipkit.tfrecord_tools import reasons
from clipkit.tfrecord_tools.web.concurrency import Concurrency
from clipkit.tfrecord_tools.web.hosts import UNREACHABLE, HostQueues
from clipkit.tfrecord_tools.web.job import FetchStats, Handle, Handover, Job, Rows, Ticket, run_handler
from clipkit.tfrecord_tools.web.request import Exchange, Outcome, one_line
from clipkit.tfrecord_tools.web.resolver import Resolver
from clipkit.tfrecord_tools.web.robots import RobotsTxt
from clipkit.tfrecord_tools.web.session import ByteBudget
from clipkit.tfrecord_tools.web.settings import DISALLOWED_TAGS, Fetched, FetchSettings, user_agent
from clipkit.tfrecord_tools.web.threads import Handlers
from clipkit.tfrecord_tools.web.urls import BadUrlError, parse_url

__all__ = ["DISALLOWED_TAGS", "FetchSettings", "FetchStats", "Fetched", "Fetcher", "fetch_all", "user_agent"]

PREFETCH = 1024  # rows read ahead even when there is no need, to know which connections will be wanted again
LARGE_BODY_BYTES = 256 << 20
RATE_TRIES = 3  # a host that says when to come back is asked again, whatever `retries` says
LONGEST_BACKOFF = 8.0
NAMES_SHARE = 0.8  # of the deadline: a name that can't be had is to end as one, and not as a timeout


class Fetcher:
    """Fetches rows. An async context manager: it owns connections, names, hosts' states and threads.

    A worker process keeps one for many shards; two calls of `fetch_many` at a time let the second use what the slow
    last rows of the first leave idle. Raises UserError on entry for settings that can't be.
    """

    def __init__(self, settings: FetchSettings) -> None:
        self.settings = settings
        self.jobs: deque[Job] = deque()
        self.in_flight = 0
        self.reasons: Counter[str | None] = Counter()
        self.requests = 0
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
        self.robots = RobotsTxt(self.exchange, settings.agent_token) if settings.robots_txt else None
        self.hosts: HostQueues[Ticket] = HostQueues(settings.per_host, settings.deadline)
        self.handlers: Handlers[Handover] = Handlers(settings.handler_threads, run_handler, self.handled)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.alarm is not None:
            self.alarm.cancel()
        if self.robots is not None:
            await self.robots.close()
        await self.exchange.close()
        await self.resolver.close()
        await self.handlers.close()

    @property
    def stats(self) -> FetchStats:
        """A picture of this moment."""
        return FetchStats(
            bytes_in=self.exchange.bytes_in,
            requests=self.requests,
            in_flight=self.in_flight,
            concurrency=self.concurrency.limit,
            queued=self.hosts.queued,
            handling=self.handlers.waiting,
            reasons=Counter(self.reasons),
        )

    async def fetch_many(self, rows: Rows, handle: Handle) -> None:
        """Call `handle` once for each row (index, URL), in any order, from several threads at once.

        `rows` is drawn from as there is room. An error of `rows` or `handle` ends the call and is raised; no call of
        `handle` is under way after that.
        """
        job = Job(iter(rows), handle, self.loop.create_future())
        self.jobs.append(job)
        self.pump()
        try:
            await job.done
        finally:
            await self.end(job)

    async def end(self, job: Job) -> None:
        """Leave nothing of a job behind, however it ended."""
        if job in self.jobs:
            self.jobs.remove(job)
        if not job.tickets and not job.handing:
            return
        job.failed = True
        self.hosts.remove({id(ticket) for ticket in job.tickets}, self.loop.time())
        tasks = [ticket.task for ticket in job.tickets if ticket.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        while job.handing:
            job.idle.clear()
            await job.idle.wait()
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
            ticket = self.hosts.take(now)
            if ticket is not None:
                self.in_flight += 1
                ticket.task = self.loop.create_task(self.step(ticket))
            elif self.hosts.queued >= self.settings.look_ahead or not self.draw(now):
                self.set_alarm()
                return

    def draw(self, now: float) -> bool:
        """Read one more row and queue it; False when there is none."""
        while self.jobs:
            job = self.jobs[0]
            try:
                row = next(job.rows, None)
            except Exception as error:
                job.fail(error)
                row = None
            if row is not None:
                self.queue(job, *row, now)
                return True
            job.exhausted = True
            self.jobs.popleft()
            job.check_end()
        return False

    def queue(self, job: Job, index: int, url: str, now: float) -> None:
        """Give a row its ticket, or its end where its URL or its host allows no more."""
        try:
            at = parse_url(url)
        except BadUrlError as error:
            self.hand_over(job, Fetched(index, url, url, None, reasons.BAD_URL, str(error), None, None, "", 0, 0.0), 0)
            return
        ticket = Ticket(job, index, url, at)
        job.tickets.add(ticket)
        self.enter(ticket, now, first=False)

    def enter(self, ticket: Ticket, now: float, *, first: bool) -> None:
        """Queue a ticket at its host, unless that gets no more requests."""
        refusal = self.hosts.refusal(ticket.at.host, now)
        if refusal is None:
            self.hosts.add(ticket.at.host, ticket, first=first)
        else:
            self.finish(ticket, Outcome(refusal.reason, refusal.message), attempts=ticket.tries - 1)

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

    async def step(self, ticket: Ticket) -> None:
        """One request of a row, and what follows from it."""
        began = self.loop.time()
        host = ticket.at.host
        outcome = None
        try:
            async with asyncio.timeout(max(0.0, self.settings.deadline - ticket.spent)):
                outcome = await self.ask(ticket)
        except TimeoutError:
            message = f"not done after {self.settings.deadline:g} s"
            outcome = Outcome(reasons.TIMEOUT, message, answered=ticket.redirects > 0)
        except Exception as error:  # a bug, but one that shall not end a download of millions of rows
            outcome = Outcome(reasons.OTHER, f"{type(error).__name__}: {one_line(error)}")
        finally:
            now = self.loop.time()
            ticket.task = None
            ticket.spent += now - began
            self.in_flight -= 1
            if outcome is None:  # cancelled
                self.hosts.done(host, now)
                ticket.job.tickets.discard(ticket)
        self.judge_host(host, outcome, now)
        self.follow(ticket, outcome, now)
        self.hosts.done(host, now)
        self.pump()

    async def ask(self, ticket: Ticket) -> Outcome:
        """The outcome of the next request of a row: robots.txt first, where that is asked for."""
        at = ticket.at
        if self.robots is not None:
            answer = await self.robots.ask(at)
            if isinstance(answer, Outcome):
                return answer
            ticket.note(answer.said)
            if answer.refused:
                return Outcome(reasons.DISALLOWED, answer.said, answered=True)
        self.requests += 1
        outcome = await self.exchange.get(at, keep=not self.hosts.is_alone(at.host))
        ticket.note(outcome.said)
        return outcome

    def judge_host(self, host: str, outcome: Outcome, now: float) -> None:
        """Learn from an outcome how the host does, and how we do."""
        self.concurrency.completed(outcome.reason == reasons.TIMEOUT)
        dropped: list[Ticket] = []
        if outcome.starved:
            self.concurrency.starved()
        elif outcome.reason == reasons.RATE_LIMITED:
            outcome.wait, dropped = self.hosts.rate_limited(host, outcome.wait, now)
        elif outcome.answered:
            self.hosts.succeeded(host)
        elif outcome.reason in UNREACHABLE and (outcome.passing or outcome.reason != reasons.DNS):
            dropped = self.hosts.failed(host, str(outcome.reason), outcome.message, now)
        refusal = self.hosts.refusal(host, now)
        for ticket in dropped:
            assert refusal is not None
            self.finish(ticket, Outcome(refusal.reason, refusal.message), attempts=ticket.tries - 1)

    def follow(self, ticket: Ticket, outcome: Outcome, now: float) -> None:
        """Send a row on to its redirect, to another try, or to its end."""
        if outcome.redirect is not None:
            ticket.redirects += 1
            if ticket.redirects > self.settings.max_redirects:
                message = f"more than {self.settings.max_redirects} redirects"
                self.finish(ticket, Outcome(reasons.HTTP_3XX, message, status=outcome.status))
                return
            ticket.at = outcome.redirect
            self.enter(ticket, now, first=True)
            return
        wait = self.wait_before_retry(ticket, outcome)
        if wait is None or ticket.spent + wait >= self.settings.deadline:
            self.finish(ticket, outcome)
            return
        ticket.spent += wait
        ticket.tries += 1
        self.hosts.add_later(ticket.at.host, ticket, now + wait)

    def wait_before_retry(self, ticket: Ticket, outcome: Outcome) -> float | None:
        """Seconds until another try of the same URL, None when there is to be none."""
        if outcome.reason == reasons.RATE_LIMITED:
            ticket.rate_tries += 1
            return outcome.wait if ticket.rate_tries <= max(RATE_TRIES, self.settings.retries) else None
        if outcome.starved or (outcome.passing and ticket.tries <= self.settings.retries):
            return random.uniform(0.5, 1.0) * min(2.0 ** (ticket.tries - 1), LONGEST_BACKOFF)
        return None

    # -----------------------------------------------------------------------------------------------------------------
    # The end of a row
    # -----------------------------------------------------------------------------------------------------------------

    def finish(self, ticket: Ticket, outcome: Outcome, attempts: int | None = None) -> None:
        """Make a row's result of its last outcome."""
        ticket.job.tickets.discard(ticket)
        fetched = Fetched(
            index=ticket.index,
            url=ticket.url,
            final_url=str(ticket.at.url),
            body=outcome.body,
            reason=outcome.reason,
            message=outcome.message,
            status=outcome.status,
            content_type=outcome.content_type,
            decision=ticket.said,
            attempts=ticket.tries if attempts is None else attempts,
            seconds=ticket.spent,
        )
        self.hand_over(ticket.job, fetched, outcome.reserved)

    def hand_over(self, job: Job, fetched: Fetched, reserved: int) -> None:
        """Give a result to the threads."""
        self.reasons[fetched.reason] += 1
        job.handing += 1
        size = 0 if fetched.body is None else len(fetched.body)
        self.handlers.put(Handover(job, fetched, reserved), size)

    def handled(self, handover: Handover, error: BaseException | None) -> None:
        """A thread is done with a row."""
        job = handover.job
        job.handing -= 1
        if handover.reserved:
            self.budget.give(handover.reserved)
        if error is not None:
            job.fail(error)
        job.check_end()
        self.pump()


def fetch_all(rows: Rows, settings: FetchSettings, handle: Handle) -> None:
    """`Fetcher.fetch_many` in an event loop of its own."""

    async def run() -> None:
        async with Fetcher(settings) as fetcher:
            await fetcher.fetch_many(rows, handle)

    asyncio.run(run())
