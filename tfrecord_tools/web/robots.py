"""robots.txt (RFC 9309), asked for once a host and kept."""

import asyncio
from collections import OrderedDict

import protego

from clipkit.tfrecord_tools import reasons
from clipkit.tfrecord_tools.web.permissions import NOTHING_SAID, Decision
from clipkit.tfrecord_tools.web.request import Exchange, Outcome
from clipkit.tfrecord_tools.web.urls import WebUrl, parse_url

MAX_BYTES = 512 << 10  # section 2.5: at least 500 KiB are to be read
MAX_REDIRECTS = 5
SECONDS = 15.0
ORIGINS = 4096
KEPT_SECONDS = 24 * 3600.0
FAILURE_SECONDS = 600.0

NO_RULES = frozenset({reasons.HTTP_4XX, reasons.HTTP_3XX, reasons.EMPTY})

Rules = protego.Protego | Decision | Outcome

ALLOWED = Decision("robots.txt: allow", refused=False)
REFUSED = Decision("robots.txt: disallow", refused=True)


class RobotsTxt:
    """What the hosts' robots.txt allow. Must be made inside a running event loop."""

    def __init__(self, exchange: Exchange, token: str) -> None:
        self.exchange = exchange
        self.token = token
        self.loop = asyncio.get_running_loop()
        self.known: OrderedDict[str, tuple[float, Rules]] = OrderedDict()
        self.questions: dict[str, asyncio.Task[Rules]] = {}

    async def ask(self, at: WebUrl) -> Decision | Outcome:
        """Whether a URL may be fetched, or why its host can't say so (section 2.3.1.4: then it may not)."""
        origin = f"{at.url.scheme}://{at.url.host_port_subcomponent}"
        known = self.known.get(origin)
        if known is not None and known[0] > self.loop.time():
            rules = known[1]
        else:
            question = self.questions.get(origin)
            if question is None:
                question = self.questions[origin] = self.loop.create_task(self.fetch(origin))
                question.add_done_callback(lambda done: self.questions.pop(origin, None))
            rules = await asyncio.shield(question)
        if not isinstance(rules, protego.Protego):
            return rules
        return ALLOWED if rules.can_fetch(str(at.url), self.token) else REFUSED

    async def fetch(self, origin: str) -> Rules:
        """Get an origin's rules, or what holds where there are none (section 2.3.1)."""
        try:
            async with asyncio.timeout(SECONDS):
                outcome = await self.get(parse_url(f"{origin}/robots.txt"))
        except TimeoutError:
            outcome = Outcome(reasons.TIMEOUT, f"not there after {SECONDS:g} s")
        if outcome.reserved:
            self.exchange.budget.give(outcome.reserved)
        rules: Rules = NOTHING_SAID
        seconds = KEPT_SECONDS
        if outcome.body is not None:
            rules = protego.Protego.parse(outcome.body.decode("utf-8", "replace"))
        elif outcome.redirect is None and outcome.reason not in NO_RULES:
            rules = Outcome(outcome.reason, f"robots.txt: {outcome.message}", passing=outcome.passing)
            seconds = FAILURE_SECONDS
        self.known[origin] = (self.loop.time() + seconds, rules)
        self.known.move_to_end(origin)
        if len(self.known) > ORIGINS:
            self.known.popitem(last=False)
        return rules

    async def get(self, at: WebUrl) -> Outcome:
        """Follow redirects to a robots.txt; too many count as there being none."""
        for _ in range(MAX_REDIRECTS + 1):
            outcome = await self.exchange.get(at, keep=True, limit=MAX_BYTES, obey=False)
            if outcome.redirect is None:
                break
            at = outcome.redirect
        return outcome

    async def close(self) -> None:
        """End what is being asked."""
        pending = list(self.questions.values())
        for question in pending:
            question.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
