"""What governs fetching, and what comes back: the values that pass between the download and its network part."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import clipkit
from clipkit.tfrecord_tools.outcome import RowOutcome

if TYPE_CHECKING:
    from clipkit.tfrecord_tools.web.urls import WebUrl

# Directives of X-Robots-Tag that keep an image out. "unavailable_after" counts when its date has passed.
DISALLOWED_TAGS = ("noai", "noimageai", "noml", "noindex", "noimageindex", "none", "unavailable_after")


def user_agent(contact: str | None = None) -> str:
    """The User-Agent header: a name that hosts can address and, given a contact, a way to reach who runs it."""
    added = f"; +{contact}" if contact else ""
    return f"Mozilla/5.0 (compatible; clipkit/{clipkit.__version__}{added})"


@dataclass(frozen=True)
class FetchSettings:
    """How a process fetches. Times are in seconds, sizes in bytes."""

    connections: int = 256  # upper bound of requests under way; the actual number adapts below it
    per_host: int = 8  # requests under way to one hostname, whatever redirect led there
    timeout: float = 10.0  # without a byte: connecting with TLS, headers, each read
    deadline: float = 30.0  # for one URL: names, redirects, retries, waits that hosts ask for, the body; not queueing
    max_bytes: int = 50_000_000  # of a body, before and after decompression
    max_redirects: int = 5
    retries: int = 0  # further tries after a temporary failure: dns, connect, timeout, truncated, http-5xx
    resolvers: tuple[str, ...] = ()  # "ip", "ip:port" or "[ipv6]:port"; none: the system's resolver
    allow_private_hosts: bool = False
    user_agent: str = user_agent()
    agent_token: str = "clipkit"  # the name by which X-Robots-Tag and robots.txt may address us
    disallowed_tags: tuple[str, ...] = DISALLOWED_TAGS  # () ignores X-Robots-Tag, but records it
    tdm_reservation: bool = True  # obey the header `tdm-reservation: 1` (W3C TDMRep)
    ca_file: str | None = None  # certificates (PEM) to trust beside the system's
    robots_txt: bool = False  # ask each host for robots.txt (RFC 9309) first, and obey it
    handler_threads: int = 2
    look_ahead: int = 16_384  # rows read ahead of what is being fetched, while hosts are busy


@dataclass(slots=True)
class FetchOutcome(RowOutcome):
    """How one request of a row ended, and in the end the row: `body`, `redirect` or `reason` is set.

    `index` and `url` are the row's; `seconds` is its own time, without waiting for its turn. `answered`: the host sent
    the head of a response. `passing`: another try may end otherwise. `starved`: this machine is out of sockets.
    `wait`: seconds that the host asks for, when `reason` is rate-limited and it said. `reserved`: bytes of the budget
    for large bodies that the body holds.
    """

    index: int = -1
    url: str = ""
    seconds: float = 0.0
    body: bytes | None = None
    redirect: "WebUrl | None" = None
    answered: bool = False
    passing: bool = False
    starved: bool = False
    wait: float | None = None
    reserved: int = 0
