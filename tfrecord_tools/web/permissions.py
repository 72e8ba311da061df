"""What a host says about the use of its images: X-Robots-Tag in full, the W3C's TDM reservation, and robots.txt.

Google's specification of X-Robots-Tag ("Robots meta tag, data-nosnippet, and X-Robots-Tag specifications") gives the
syntax; `noai` and `noimageai` are DeviantArt's, `noml` is Bing's and others'. TDM: "TDM Reservation Protocol", W3C
Community Group report, section 5.1. robots.txt: RFC 9309, asked for once a host and kept.
"""

import asyncio
import re
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import protego

from clipkit.tfrecord_tools import reasons
from clipkit.tfrecord_tools.web.settings import FetchOutcome
from clipkit.tfrecord_tools.web.urls import WebUrl, parse_url

# Directives that take a value after a colon. Before any other colon stands the name of an agent.
VALUED = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})
INDEXING = frozenset({"all", "none", "index", "noindex", "follow", "nofollow", "noimageindex", "indexifembedded"})
SHOWING = frozenset({"noarchive", "nocache", "nosnippet", "notranslate", "nositelinkssearchbox", "nopagereadaloud"})
LEARNING = frozenset({"noai", "noimageai", "noml"})
PLAIN = INDEXING | SHOWING | LEARNING
AGENT = re.compile(r"[a-z*][a-z0-9*_./+-]*")
MAX_RECORDED = 300

ROBOTS_MAX_BYTES = 512 << 10  # section 2.5: at least 500 KiB are to be read
ROBOTS_MAX_REDIRECTS = 5
ROBOTS_SECONDS = 15.0
ORIGINS = 4096
KEPT_SECONDS = 24 * 3600.0
FAILURE_SECONDS = 600.0
NO_RULES = frozenset({reasons.HTTP_4XX, reasons.HTTP_3XX, reasons.EMPTY})


@dataclass(frozen=True)
class Tag:
    """One directive of X-Robots-Tag, in lower case but for its value. `agent` is "" when it is for all."""

    agent: str
    directive: str
    value: str = ""

    def __str__(self) -> str:
        text = f"{self.directive}: {self.value}" if self.value else self.directive
        return f"{self.agent}: {text}" if self.agent else text


@dataclass(frozen=True)
class Decision:
    """What was said to us, for the record, and whether it keeps us out."""

    said: str
    refused: bool


NOTHING_SAID = Decision("", refused=False)
ROBOTS_ALLOW = Decision("robots.txt: allow", refused=False)
ROBOTS_DISALLOW = Decision("robots.txt: disallow", refused=True)

Rules = protego.Protego | Decision | FetchOutcome


def parse_tags(header: str) -> list[Tag]:
    """The directives of one X-Robots-Tag header, in their order.

    An agent's name holds for what follows it in the same header, up to the next name. The date of `unavailable_after`
    may hold commas and colons: it goes on until something that is a directive or an agent begins.
    """
    tags: list[Tag] = []
    agent = ""
    for piece in header.split(","):
        piece = piece.strip()
        while True:
            name, colon, value = piece.partition(":")
            name = name.strip().lower()
            if not colon or name in VALUED or not AGENT.fullmatch(name) or name in PLAIN:
                break
            agent = "" if name == "*" else name
            piece = value.strip()
        if not piece:
            continue
        if colon and name in VALUED:
            tags.append(Tag(agent, name, value.strip()))
        elif name in PLAIN:
            tags.append(Tag(agent, name))
        elif tags and tags[-1].directive == "unavailable_after" and tags[-1].agent == agent:
            tags[-1] = Tag(agent, "unavailable_after", f"{tags[-1].value}, {piece}")
        else:
            tags.append(Tag(agent, piece.lower()))
    return tags


def is_for(tag: Tag, token: str) -> bool:
    """Whether a directive is meant for the agent called `token`. Ours may stand with a version: `clipkit/2`."""
    return tag.agent in ("", token.lower()) or tag.agent.partition("/")[0] == token.lower()


def keeps_out(tag: Tag, disallowed: Iterable[str], now: datetime) -> bool:
    """Whether a directive, one of `disallowed`, is in force at `now` (with a time zone)."""
    if tag.directive not in disallowed:
        return False
    if tag.directive != "unavailable_after":
        return True
    date = parse_date(tag.value)
    return date is not None and date <= now


def parse_date(text: str) -> datetime | None:
    """A date as RFC 822, RFC 850 or ISO 8601 write it; None for anything else. Without a zone it is UTC."""
    for read in (parsedate_to_datetime, datetime.fromisoformat):
        try:
            date = read(text.strip())
        except (ValueError, IndexError, TypeError, OverflowError):
            continue
        return date if date.tzinfo is not None else date.replace(tzinfo=UTC)
    return None


def decide(
    tag_headers: Iterable[str],
    tdm_header: str | None,
    *,
    token: str,
    disallowed: Iterable[str],
    tdm_reservation: bool,
) -> Decision:
    """Judge a response by its X-Robots-Tag headers and its `tdm-reservation` header, for the agent called `token`."""
    said = []
    refused = False
    now = datetime.now(UTC)
    for header in tag_headers:
        for tag in parse_tags(header):
            if is_for(tag, token):
                said.append(f"x-robots-tag: {tag}")
                refused = refused or keeps_out(tag, disallowed, now)
    if tdm_header is not None:
        said.append(f"tdm-reservation: {tdm_header.strip()}")
        refused = refused or (tdm_reservation and tdm_header.strip() == "1")
    return Decision("; ".join(said)[:MAX_RECORDED], refused) if said else NOTHING_SAID


class RobotsTxt:
    """What the hosts' robots.txt allow. Must be made inside a running event loop."""

    def __init__(self, get: Callable[[WebUrl], Awaitable[FetchOutcome]], token: str) -> None:
        """`get` asks for a URL once, for at most ROBOTS_MAX_BYTES."""
        self.get = get
        self.token = token
        self.loop = asyncio.get_running_loop()
        self.known: OrderedDict[str, tuple[float, Rules]] = OrderedDict()
        self.questions: dict[str, asyncio.Task[Rules]] = {}

    async def ask(self, at: WebUrl) -> Decision | FetchOutcome:
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
        return ROBOTS_ALLOW if rules.can_fetch(str(at.url), self.token) else ROBOTS_DISALLOW

    async def fetch(self, origin: str) -> Rules:
        """Get an origin's rules, or what holds where there are none (section 2.3.1) or behind too many redirects."""
        try:
            async with asyncio.timeout(ROBOTS_SECONDS):
                outcome = await self.get(parse_url(f"{origin}/robots.txt"))
                for _ in range(ROBOTS_MAX_REDIRECTS):
                    if outcome.redirect is not None:
                        outcome = await self.get(outcome.redirect)
        except TimeoutError:
            outcome = FetchOutcome(reasons.TIMEOUT, f"not there after {ROBOTS_SECONDS:g} s")
        rules: Rules = NOTHING_SAID
        seconds = KEPT_SECONDS
        if outcome.body is not None:
            rules = protego.Protego.parse(outcome.body.decode("utf-8", "replace"))
        elif outcome.redirect is None and outcome.reason not in NO_RULES:
            rules = FetchOutcome(outcome.reason, f"robots.txt: {outcome.message}", passing=outcome.passing)
            seconds = FAILURE_SECONDS
        self.known[origin] = (self.loop.time() + seconds, rules)
        self.known.move_to_end(origin)
        if len(self.known) > ORIGINS:
            self.known.popitem(last=False)
        return rules

    async def close(self) -> None:
        """End what is being asked."""
        pending = list(self.questions.values())
        for question in pending:
            question.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
