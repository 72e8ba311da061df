"""What a response says about its use: X-Robots-Tag in full, and the W3C's TDM reservation.

Google's specification of X-Robots-Tag ("Robots meta tag, data-nosnippet, and X-Robots-Tag specifications") gives the
syntax; `noai` and `noimageai` are DeviantArt's, `noml` is Bing's and others'. TDM: "TDM Reservation Protocol", W3C
Community Group report, section 5.1.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

# Directives that take a value after a colon. Before any other colon stands the name of an agent.
VALUED = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})
INDEXING = frozenset({"all", "none", "index", "noindex", "follow", "nofollow", "noimageindex", "indexifembedded"})
SHOWING = frozenset({"noarchive", "nocache", "nosnippet", "notranslate", "nositelinkssearchbox", "nopagereadaloud"})
LEARNING = frozenset({"noai", "noimageai", "noml"})
PLAIN = INDEXING | SHOWING | LEARNING
AGENT = re.compile(r"[a-z*][a-z0-9*_./+-]*")
MAX_RECORDED = 300


@dataclass(frozen=True)
class Tag:
    """One directive of X-Robots-Tag, in lower case but for its value. `agent` is "" when it speaks to all."""

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


def speaks_to(tag: Tag, token: str) -> bool:
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
    """A date as RFC 822, RFC 850 or ISO 8601 write it; None for what is no date. Without a zone it is UTC."""
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
            if speaks_to(tag, token):
                said.append(f"x-robots-tag: {tag}")
                refused = refused or keeps_out(tag, disallowed, now)
    if tdm_header is not None:
        said.append(f"tdm-reservation: {tdm_header.strip()}")
        refused = refused or (tdm_reservation and tdm_header.strip() == "1")
    return Decision("; ".join(said)[:MAX_RECORDED], refused) if said else NOTHING_SAID
