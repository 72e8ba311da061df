"""URLs as tables hold them, made ready to be asked for: what is valid stays byte for byte, the rest is quoted.

A CDN's signature covers the exact spelling of a URL, so percent-escapes are neither added to nor normalised away.
The rules are those of browsers (WHATWG URL), since the URLs were collected from pages that browsers show.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

from yarl import URL

SCHEMES = ("http", "https")
MAX_CHARACTERS = 8_000  # servers refuse longer request lines
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
# Everything that may stand in a request line as it is. A lone % may: browsers leave it, too.
TO_QUOTE = re.compile(r"[^!#-;=?-\[\]_a-z|~]")
PLAIN_HOST = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_.])?")
SPLIT = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*):(?P<slashes>[/\\]*)(?P<authority>[^/\\?#]*)(?P<rest>[^#]*)")


class BadUrlError(ValueError):
    """A text that is not the URL of an image; the message says why, without the text."""


@dataclass(frozen=True, slots=True)
class WebUrl:
    """A URL ready to be asked for, and the host that it belongs to: lower case, ASCII, no trailing dot, no port."""

    url: URL
    host: str


def parse_url(text: str) -> WebUrl:
    """Read a URL from a table. Raises BadUrlError, for file:, ftp:, data: and the like too."""
    text = text.strip(" \t\r\n\f\v\0")
    if len(text) > MAX_CHARACTERS:
        raise BadUrlError(f"longer than {MAX_CHARACTERS} characters")
    if CONTROL.search(text):
        raise BadUrlError("holds control characters")
    parts = SPLIT.match(text)
    if parts is None:
        raise BadUrlError("no http:// or https:// in front")
    scheme = parts["scheme"].lower()
    if scheme not in SCHEMES:
        raise BadUrlError(f"scheme {scheme[:20]} is neither http nor https")
    userinfo, _, hostport = parts["authority"].rpartition("@")
    authority, host = ascii_authority(scheme, hostport)
    if userinfo:
        authority = f"{quote(userinfo)}@{authority}"
    path, mark, query = parts["rest"].partition("?")
    path = path.replace("\\", "/") or "/"
    try:
        url = URL(f"{scheme}://{authority}{quote(path)}{mark}{quote(query)}", encoded=True)
    except ValueError as error:
        raise BadUrlError(f"{error}") from None
    return WebUrl(url, host)


def parse_redirect(base: WebUrl, location: str) -> WebUrl:
    """Where a Location header leads, relative to `base` (RFC 3986, section 5). Raises BadUrlError."""
    location = location.strip(" \t")
    if SPLIT.match(location):
        return parse_url(location)
    if location.startswith(("//", "\\\\")):
        return parse_url(f"{base.url.scheme}:{location}")
    if not location:
        raise BadUrlError("empty redirect")
    if CONTROL.search(location):
        raise BadUrlError("holds control characters")
    joined = base.url.join(URL(quote(location.replace("\\", "/")), encoded=True))
    return parse_url(str(joined))


@lru_cache(maxsize=16_384)
def ascii_authority(scheme: str, hostport: str) -> tuple[str, str]:
    """Host and port as DNS and TLS want them, and the host alone, without a trailing dot. Raises BadUrlError.

    Lower case, IDNA (UTS 46), and the default port left out. An IPv4 address may have any spelling that the system's
    resolver takes, and comes out dotted: `2130706433`, `0x7f.1`, `017700000001` and `127.1` are all 127.0.0.1.
    """
    import ada_url

    try:
        parsed = ada_url.URL(f"{scheme}://{hostport}/")
        authority, host, port = parsed.host, parsed.hostname, parsed.port
    except ValueError:
        raise BadUrlError(f"host or port {hostport[:60]!a} is invalid" if hostport else "no host") from None
    if port == "0":
        raise BadUrlError("port 0, and ports are from 1 to 65535")
    if host.startswith("["):
        return authority, host[1:-1]
    # Stricter than browsers, which leave it to DNS to find that there is no such name.
    if not PLAIN_HOST.fullmatch(host) or ".." in host:
        raise BadUrlError(f"host {host[:60]!r} is not a name" if host else "no host")
    if len(host) > 253 or any(len(label) > 63 for label in host.split(".")):
        raise BadUrlError("host has a label over 63 or is over 253 characters")
    return authority, host.rstrip(".")


def quote(text: str) -> str:
    """Percent-encode, as UTF-8, what can't stand in a request line, and nothing else. Raises BadUrlError."""
    try:
        return TO_QUOTE.sub(quote_one, text) if TO_QUOTE.search(text) else text
    except UnicodeEncodeError:
        raise BadUrlError("holds half a surrogate pair") from None


def quote_one(match: re.Match[str]) -> str:
    """One character's escape. Bytes of a header that weren't UTF-8 come as surrogates, and go back as they came."""
    return "".join(f"%{byte:02X}" for byte in match.group().encode("utf-8", "surrogateescape"))
