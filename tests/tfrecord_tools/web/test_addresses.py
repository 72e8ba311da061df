"""No spelling of an address gets past the check, and no valid URL is changed on the way."""

import ipaddress
import socket

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from clipkit.tfrecord_tools.web.addresses import (
    BlockedAddressError,
    check_address,
    special_kind,
)
from clipkit.tfrecord_tools.web.urls import BadUrlError, parse_redirect, parse_url

IPV4 = st.integers(0, 2**32 - 1).map(lambda number: str(ipaddress.IPv4Address(number)))
IPV6 = st.integers(0, 2**128 - 1).map(lambda number: str(ipaddress.IPv6Address(number)))
PRIVATE_IPV4 = st.tuples(st.sampled_from([0, 10, 127]), st.integers(0, 2**24 - 1)).map(
    lambda pair: str(ipaddress.IPv4Address((pair[0] << 24) + pair[1]))
)


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("8.8.8.8", None),
        ("172.15.255.255", None),
        ("172.32.0.0", None),
        ("100.63.255.255", None),
        ("100.128.0.0", None),
        ("223.255.255.255", None),
        ("2606:4700::1111", None),
        ("64:ff9b::8.8.8.8", None),
        ("2002:808:808::1", None),
        ("::ffff:8.8.8.8", None),
        ("0.0.0.0", "unspecified"),
        ("10.255.255.255", "private"),
        ("100.64.0.1", "carrier-grade NAT"),
        ("127.255.0.1", "loopback"),
        ("169.254.1.1", "link-local"),
        ("169.254.169.254", "link-local"),
        ("172.16.0.0", "private"),
        ("172.31.255.255", "private"),
        ("192.168.1.1", "private"),
        ("192.0.2.1", "documentation"),
        ("198.19.255.255", "benchmarking"),
        ("224.0.0.251", "multicast"),
        ("239.255.255.255", "multicast"),
        ("240.0.0.1", "reserved"),
        ("255.255.255.255", "reserved"),
        ("100.100.100.200", "cloud metadata"),
        ("168.63.129.16", "cloud metadata"),
        ("192.0.0.192", "cloud metadata"),
        ("fd00:ec2::254", "cloud metadata"),
        ("fd20:ce::254", "cloud metadata"),
        ("::", "unspecified"),
        ("::1", "loopback"),
        ("fd12:3456::1", "private"),
        ("fe80::1", "link-local"),
        ("fe80::1%eth0", "link-local"),
        ("2606:4700::1%eth0", "link-local"),
        ("fec0::1", "site-local"),
        ("ff02::1", "multicast"),
        ("2001:db8::1", "documentation"),
        ("4000::1", "reserved"),
        ("64:ff9b:1::1", "reserved"),
        ("::ffff:127.0.0.1", "loopback"),
        ("::ffff:169.254.169.254", "link-local"),
        ("::127.0.0.1", "loopback"),
        ("::8.8.8.8", "reserved"),
        ("64:ff9b::10.0.0.1", "private"),
        ("2002:7f00:1::", "loopback"),
        ("2002:a9fe:a9fe::", "link-local"),
        ("2001:0:808:808::f5ff:fffe", "private"),  # Teredo: its client is 10.0.0.1, inverted
        ("2606:4700::5efe:192.168.0.1", "private"),  # ISATAP
        ("2606:4700::200:5efe:192.168.0.1", "private"),
        ("localhost", "invalid"),
        ("", "invalid"),
        ("127.1", "invalid"),
    ],
)
def test_kinds(address: str, kind: str | None) -> None:
    assert special_kind(address) == kind


@given(st.one_of(IPV4, IPV6))
def test_what_python_calls_not_global_is_never_public(address: str) -> None:
    if special_kind(address) is None:
        parsed = ipaddress.ip_address(address)
        nat64 = parsed in ipaddress.ip_network("64:ff9b::/96") or parsed in ipaddress.ip_network("2002::/16")
        assert (parsed.is_global or nat64 or getattr(parsed, "ipv4_mapped", None)) and not parsed.is_multicast


@given(PRIVATE_IPV4)
@example("169.254.169.254")
@example("192.168.0.1")
def test_ipv6_clothes_hide_nothing(address: str) -> None:
    number = int(ipaddress.IPv4Address(address))
    for dressed in (
        0xFFFF << 32 | number,
        0x0064FF9B << 96 | number,
        0x2002 << 112 | number << 80 | 7,
        0x2606 << 112 | 0x5EFE << 32 | number,
        0x20010000 << 96 | number << 64,
    ):
        assert special_kind(str(ipaddress.IPv6Address(dressed))) is not None


def test_private_hosts_may_be_allowed_but_metadata_never() -> None:
    for address in ("127.0.0.1", "10.0.0.1", "::1", "fd12::1", "::ffff:192.168.0.1"):
        check_address(address, allow_private=True)
        with pytest.raises(BlockedAddressError):
            check_address(address, allow_private=False)
    for address in ("169.254.169.254", "::ffff:169.254.169.254", "fd00:ec2::254", "100.100.100.200", "x"):
        with pytest.raises(BlockedAddressError, match="address"):
            check_address(address, allow_private=True)


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.data())
def test_every_spelling_of_an_ipv4_address(number: int, parts: int, data: st.DataObject) -> None:
    heads = [number >> shift & 255 for shift in (24, 16, 8)[: parts - 1]]
    values = [*heads, number & (1 << 8 * (5 - parts)) - 1]
    spellings = [data.draw(st.sampled_from([str, hex, lambda value: f"0{value:o}"]))(value) for value in values]
    text = ".".join(spellings) + data.draw(st.sampled_from(["", "."]))
    expected = str(ipaddress.IPv4Address(number))
    assert socket.inet_ntoa(socket.inet_aton(text.rstrip("."))) == expected
    assert parse_url(f"http://{text.upper().replace('0X', '0x')}/").host == expected


@pytest.mark.parametrize(
    "host", ["1.2.3.4.5", "256.1.1.1", "1.2.3.256", "4294967296", "1.16777216", "a.1", "09.1", "0x1g.1"]
)
def test_numbers_that_are_no_address(host: str) -> None:
    with pytest.raises(BadUrlError):
        parse_url(f"http://{host}/")


@pytest.mark.parametrize("host", ["example.org", "1.2.3.4.example", "0x", "x1", "a_b.example", "1-2.de"])
def test_names_are_no_numbers(host: str) -> None:
    assert parse_url(f"http://{host}/").host == (host if host != "0x" else "0.0.0.0")


# ---------------------------------------------------------------------------------------------------------------------
# URLs
# ---------------------------------------------------------------------------------------------------------------------


@given(st.text(st.sampled_from("ABCxyz019-._~%!$&'()*+,;=:@/|[]"), max_size=60), st.booleans())
def test_valid_characters_stay_as_they_are(text: str, in_query: bool) -> None:
    target = f"/?{text}x" if in_query else f"/{text}"
    assert parse_url(f"https://Example.ORG{target}").url.raw_path_qs == target


@given(st.text(max_size=60))
def test_any_text_becomes_a_url_in_ascii_or_one_error(text: str) -> None:
    for candidate in (text, f"http://{text}", f"http://example.org/{text}"):
        try:
            parsed = parse_url(candidate)
        except BadUrlError as error:
            assert "\n" not in str(error)
            continue
        assert str(parsed.url).isascii() and " " not in str(parsed.url)
        assert parsed.url.scheme in ("http", "https") and parsed.host == parsed.url.raw_host.rstrip(".")
        assert parse_url(str(parsed.url)) == parsed


@pytest.mark.parametrize(
    ("text", "url"),
    [
        (" https://example.org/a.jpg\n", "https://example.org/a.jpg"),
        ("HTTP://Example.ORG", "http://example.org/"),
        ("http://example.org:80/a", "http://example.org/a"),
        ("https://example.org:0443/a#part", "https://example.org/a"),
        ("http://example.org:8080?q", "http://example.org:8080/?q"),
        ("http:/example.org/a", "http://example.org/a"),
        ("http:\\\\example.org\\a?b\\c", "http://example.org/a?b%5Cc"),
        ("http://example.org/ü 100%.jpg?x=ü", "http://example.org/%C3%BC%20100%.jpg?x=%C3%BC"),
        ("http://bücher.example/", "http://xn--bcher-kva.example/"),
        ("http://ｅｘａｍｐｌｅ.org/", "http://example.org/"),
        ("http://ex%61mple.org/", "http://example.org/"),
        ("http://user:p w@example.org/", "http://user:p%20w@example.org/"),
        ("http://1.1.1.1\\@example.org/", "http://1.1.1.1/@example.org/"),
        ("http://[2606:4700:0::1]:81/", "http://[2606:4700::1]:81/"),
        ("http://[::FFFF:127.0.0.1]/", "http://[::ffff:7f00:1]/"),
        ("http://①②⑦.0.0.1/", "http://127.0.0.1/"),
    ],
)
def test_what_browsers_would_ask_for(text: str, url: str) -> None:
    assert str(parse_url(text).url).replace("::ffff:127.0.0.1", "::ffff:7f00:1") == url


@pytest.mark.parametrize(
    "text",
    [
        "", "example.org/a.jpg", "//example.org/", "http://", "http://?", "http://ex ample.org/", "http://a..b/",
        "http://-a.org/", "http://example.org:99999/", "http://example.org:x/", "http://[::1", "http://[fe80::1%25x]/",
        "http://a\0b/", "http://a/\r\nHost: b", f"http://{'a' * 64}.org/", f"http://a/{'b' * 9000}", "http://xn--\u200b/",
    ],
)  # fmt: skip
def test_texts_that_are_no_url(text: str) -> None:
    with pytest.raises(BadUrlError):
        parse_url(text)


@pytest.mark.parametrize("text", ["file:///etc/passwd", "ftp://a/b", "data:image/png;base64,AA==", "javascript:1"])
def test_other_schemes(text: str) -> None:
    with pytest.raises(BadUrlError, match="is neither http nor https"):
        parse_url(text)
    with pytest.raises(BadUrlError, match="is neither http nor https"):
        parse_redirect(parse_url("http://example.org/"), text)


@pytest.mark.parametrize(
    ("location", "url"),
    [
        ("b", "https://example.org/x/b"),
        ("../b?c", "https://example.org/b?c"),
        ("/b%2Fc", "https://example.org/b%2Fc"),
        ("?q=1", "https://example.org/x/a?q=1"),
        ("//other.org/b", "https://other.org/b"),
        ("HTTP://other.org", "http://other.org/"),
        ("/ü", "https://example.org/%C3%BC"),
        ("/\udcfc", "https://example.org/%FC"),  # a byte that was no UTF-8, as aiohttp hands it over
        ("/a:b", "https://example.org/a:b"),
    ],
)
def test_redirects(location: str, url: str) -> None:
    assert str(parse_redirect(parse_url("https://example.org/x/a?old"), location).url) == url
