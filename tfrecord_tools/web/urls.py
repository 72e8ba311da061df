"""URLs as tables hold them, made ready to be asked for: what is valid stays byte for byte, the rest is quoted.

A CDN's signature covers the exact spelling of a URL, so percent-escapes are neither added to nor normalised away.
The rules are those of browsers (WHATWG URL), since the URLs were collected from pages that browsers show.
"""

import ipaddress
import re
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import unquote

import idna
from yarl import URL

from clipkit.tfrecord_tools.web.addresses import parse_ipv4_number

SCHEMES = ("http", "https")
MAX_CHARACTERS = 8_000  # servers refuse longer request lines
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
# Everything that may stand in a request line as it is. A lone % may: browsers leave it, too.
TO_QUOTE = re.compile(r"[^!#-;=?-\[\]_a-z|~]")
PLAIN_HOST = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_.])?")
SPLIT = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*):(?P<slashes>[/\\]*)(?P<authority>[^/\\?#]*)(?P<rest>[^#]*)")


class BadUrlError(ValueError):
    """A text that is no URL of an image; the message says why, without the text."""


class RefusedSchemeError(BadUrlError):
    """A URL, but neither http nor https."""


@dataclass(frozen=True, slots=True)
class WebUrl:
    """A URL ready to be asked for, and the host that it belongs to: lower case, ASCII, no trailing dot, no port."""

    url: URL
    host: str


def parse_url(text: str) -> WebUrl:
    """Read a URL from a table. Raises BadUrlError (RefusedSchemeError for file:, ftp:, data: and the like)."""
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
        raise RefusedSchemeError(f"scheme {scheme[:20]} is neither http nor https")
    userinfo, _, hostport = parts["authority"].rpartition("@")
    host, port = split_port(hostport)
    host = ascii_host(host)
    authority = f"[{host}]" if ":" in host else host
    if port and int(port) != (443 if scheme == "https" else 80):
        authority += f":{int(port)}"
    if userinfo:
        authority = f"{quote(userinfo)}@{authority}"
    path, mark, query = parts["rest"].partition("?")
    path = path.replace("\\", "/") or "/"
    try:
        url = URL(f"{scheme}://{authority}{quote(path)}{mark}{quote(query)}", encoded=True)
    except ValueError as error:
        raise BadUrlError(f"{error}") from None
    return WebUrl(url, host.rstrip("."))


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


def split_port(hostport: str) -> tuple[str, str]:
    """Host and port, the latter empty when there is none. Raises BadUrlError on a port out of range."""
    if hostport.startswith("["):
        host, bracket, port = hostport.partition("]")
        if not bracket or (port and not port.startswith(":")):
            raise BadUrlError("unclosed [ in the host")
        host, port = host + bracket, port[1:]
    else:
        host, _, port = hostport.partition(":")
    if port and not (port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) < 65_536):
        raise BadUrlError(f"port {port[:20]!r} is no number from 1 to 65535")
    return host, port


@lru_cache(maxsize=16_384)
def ascii_host(host: str) -> str:
    """A host as DNS and TLS want it: lower case, IDNA (UTS 46), numbers as a dotted address. Raises BadUrlError."""
    if host.startswith("["):
        try:
            address = ipaddress.IPv6Address(host[1:-1])
        except ValueError:
            raise BadUrlError("no IPv6 address between the brackets") from None
        if address.scope_id is not None:
            raise BadUrlError("an IPv6 address with a zone")
        return str(address)
    host = host.lower()
    if "%" in host or not host.isascii():
        host = idna_host(host)
    if not PLAIN_HOST.fullmatch(host) or ".." in host:
        raise BadUrlError("no host" if not host else f"host {host[:60]!r} is no name")
    if len(host) > 253 or any(len(label) > 63 for label in host.split(".")):
        raise BadUrlError("host has a label over 63 or is over 253 characters")
    try:
        return parse_ipv4_number(host) or host
    except ValueError as error:
        raise BadUrlError(f"host {error}") from None


def idna_host(host: str) -> str:
    """An internationalised name in ASCII. Raises BadUrlError."""
    try:
        return idna.encode(unquote(host, errors="strict"), uts46=True, transitional=False).decode("ascii")
    except (idna.IDNAError, UnicodeError) as error:
        raise BadUrlError(f"host is no internationalised name: {str(error)[:80]}") from None


def quote(text: str) -> str:
    """Percent-encode, as UTF-8, what can't stand in a request line, and nothing else. Raises BadUrlError."""
    try:
        return TO_QUOTE.sub(quote_one, text) if TO_QUOTE.search(text) else text
    except UnicodeEncodeError:
        raise BadUrlError("holds half a surrogate pair") from None


def quote_one(match: re.Match[str]) -> str:
    """One character's escape. Bytes of a header that weren't UTF-8 come as surrogates, and go back as they came."""
    return "".join(f"%{byte:02X}" for byte in match.group().encode("utf-8", "surrogateescape"))
