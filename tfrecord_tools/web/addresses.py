"""Which addresses a list of URLs from strangers may make us connect to: public ones only.

A URL or a redirect that names a private address would let anyone read what only this machine can reach (server-side
request forgery), the keys in a cloud's metadata service first of all. The special ranges are those of the IANA
registries (RFC 6890, and what came later).
"""

import ipaddress
from functools import lru_cache

METADATA = "cloud metadata"
SPECIAL_IPV4 = tuple(
    (ipaddress.IPv4Network(network), kind)
    for network, kind in (
        # Metadata services of AWS, Google, Azure, Oracle and others are link-local, these but for the exceptions.
        ("168.63.129.16/32", METADATA),  # Azure
        ("100.100.100.200/32", METADATA),  # Alibaba
        ("192.0.0.192/32", METADATA),  # Oracle
        ("169.254.0.0/16", "link-local"),
        ("0.0.0.0/8", "unspecified"),
        ("10.0.0.0/8", "private"),
        ("100.64.0.0/10", "carrier-grade NAT"),
        ("127.0.0.0/8", "loopback"),
        ("172.16.0.0/12", "private"),
        ("192.0.0.0/24", "reserved"),
        ("192.0.2.0/24", "documentation"),
        ("192.88.99.0/24", "reserved"),
        ("192.168.0.0/16", "private"),
        ("198.18.0.0/15", "benchmarking"),
        ("198.51.100.0/24", "documentation"),
        ("203.0.113.0/24", "documentation"),
        ("224.0.0.0/4", "multicast"),
        ("240.0.0.0/4", "reserved"),
    )
)
SPECIAL_IPV6 = tuple(
    (ipaddress.IPv6Network(network), kind)
    for network, kind in (
        ("fd00:ec2::/32", METADATA),  # AWS
        ("fd20:ce::/32", METADATA),  # Google
        ("::/128", "unspecified"),
        ("::1/128", "loopback"),
        ("fc00::/7", "private"),
        ("fe80::/10", "link-local"),
        ("fec0::/10", "site-local"),
        ("ff00::/8", "multicast"),
        ("2001:db8::/32", "documentation"),
        ("3fff::/20", "documentation"),
        ("2001::/23", "reserved"),
    )
)
# Never lifted: nobody's images lie behind the metadata service, and `--allow-private-hosts` isn't meant for it.
NEVER_ALLOWED = frozenset({METADATA, "link-local"})
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")


class BlockedAddressError(OSError):
    """A connection to an address that is not public was asked for and not made."""


@lru_cache(maxsize=16_384)
def special_kind(address: str) -> str | None:
    """The name of the special range that an IPv4 or IPv6 address lies in, such as "loopback"; None for a public one.

    An IPv6 address that carries an IPv4 address (mapped, compatible, 6to4, NAT64, Teredo, ISATAP) is judged by both.
    What can't be read as an address is "invalid".
    """
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return "invalid"
    if isinstance(parsed, ipaddress.IPv4Address):
        return next((kind for network, kind in SPECIAL_IPV4 if parsed in network), None)
    if parsed.scope_id is not None:
        return "link-local"
    kind = next((kind for network, kind in SPECIAL_IPV6 if parsed in network), None)
    for carried in carried_ipv4(parsed):
        inner = special_kind(str(carried))
        if inner is not None and kind not in NEVER_ALLOWED:
            kind = inner
    if kind is None and not (parsed in GLOBAL_UNICAST or parsed in NAT64 or parsed.ipv4_mapped is not None):
        return "reserved"
    return kind


def carried_ipv4(address: ipaddress.IPv6Address) -> list[ipaddress.IPv4Address]:
    """The IPv4 addresses that a router or the kernel would take out of an IPv6 address."""
    number = int(address)
    low = ipaddress.IPv4Address(number & 0xFFFFFFFF)
    found = []
    if address.ipv4_mapped is not None or address in NAT64 or (number >> 32 == 0 and number > 0xFFFF):
        found.append(low)
    if address.sixtofour is not None:
        found.append(address.sixtofour)
    if address.teredo is not None:
        found.extend(address.teredo)
    if (number >> 32) & 0xFDFFFFFF == 0x00005EFE:
        found.append(low)
    return found


def check_address(address: str, allow_private: bool) -> None:
    """Raise BlockedAddressError when `address` must not be dialled.

    `allow_private` lifts it for one's own servers, but not for link-local and metadata addresses.
    """
    kind = special_kind(address)
    if kind is None or (allow_private and kind not in NEVER_ALLOWED and kind != "invalid"):
        return
    raise BlockedAddressError(f"{address} is a {kind} address")
