"""Every way in which the web fails ends as one row with the right reason, and nothing is sent where it must not go."""

import asyncio
import itertools
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from bad_server import BODY, BadServer, Dials, bad_server, only_loopback, refusing_port, silent_port
from dns_server import NXDOMAIN, SERVFAIL, SILENT, dns_server, every

from clipkit.errors import UserError
from clipkit.tfrecord_tools.web import hosts
from clipkit.tfrecord_tools.web.calls import Handle, Rows
from clipkit.tfrecord_tools.web.fetcher import Fetcher
from clipkit.tfrecord_tools.web.permissions import Decision
from clipkit.tfrecord_tools.web.settings import FetchOutcome, FetchSettings, user_agent
from clipkit.tfrecord_tools.web.urls import parse_url

SETTINGS = FetchSettings(allow_private_hosts=True, timeout=5.0, deadline=15.0, user_agent=user_agent("tests"))
PUBLIC = "23.192.228.80"  # stands for a public host; the guard dials a loopback server in its place
OTHER_PUBLIC = "23.192.228.84"


@pytest.fixture(autouse=True)
def dials() -> Iterator[Dials]:
    with only_loopback() as seen:
        yield seen


@pytest.fixture(scope="module")
def server() -> Iterator[BadServer]:
    with bad_server({"/cat.jpg": BODY}) as running:
        yield running


def fetch_all(rows: Rows, settings: FetchSettings, handle: Handle) -> None:
    """`Fetcher.fetch_many` in an event loop of its own."""

    async def run() -> None:
        async with Fetcher(settings) as fetcher:
            await fetcher.fetch_many(rows, handle)

    asyncio.run(run())


def fetch(*urls: str, settings: FetchSettings = SETTINGS, **changes: Any) -> list[FetchOutcome]:
    """Fetch some URLs; their results in the order of the URLs, each exactly once."""
    results: dict[int, FetchOutcome] = {}

    def handle(fetched: FetchOutcome) -> None:
        assert fetched.index not in results
        results[fetched.index] = fetched

    fetch_all(enumerate(urls), replace(settings, **changes), handle)
    assert sorted(results) == list(range(len(urls)))
    for fetched in results.values():
        assert (fetched.body is None) == (fetched.reason is not None)
        assert fetched.url == urls[fetched.index]
    return [results[index] for index in range(len(urls))]


def fetch_one(url: str, **changes: Any) -> FetchOutcome:
    return fetch(url, **changes)[0]


# ---------------------------------------------------------------------------------------------------------------------
# What is answered, well or badly
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["ok", "no-length", "chunked", "gzip", "deflate", "chain/5", "slow?seconds=0.2"])
def test_good_answers(server: BadServer, path: str) -> None:
    fetched = fetch_one(server.url(f"/{path}"))
    assert (fetched.reason, fetched.body, fetched.http_status) == (None, BODY, 200)
    assert (fetched.attempts, fetched.decision) == (1, "")


def test_redirects_are_followed_one_by_one() -> None:
    with bad_server() as server:
        fetch_one(server.url("/chain/2"))
        assert server.paths() == ["/chain/2", "/chain/1", "/chain/0"]


def test_a_body_longer_than_said_is_cut_there_and_spoils_no_later_answer(server: BadServer) -> None:
    long, *others = fetch(server.url("/long-body"), *[server.url("/ok")] * 5, per_host=1)
    # Whether the rest came together with the head is the network's affair.
    assert long.body == BODY[:-1000] or (long.reason, long.message[:19]) == ("other", "answer is not HTTP:")
    assert [other.body for other in others] == [BODY] * 5


@pytest.mark.parametrize(
    ("path", "reason", "message"),
    [
        ("empty", "empty", "HTTP 200 without a body"),
        ("no-content", "empty", "HTTP 204 without a body"),
        ("short-body", "truncated", "body ends early"),
        ("reset-body", "truncated", "body ends early"),
        ("chunked-cut", "truncated", "body ends early"),
        ("gzip-cut", "truncated", "compressed body ends early"),
        ("partial", "truncated", "HTTP 206: a part, though the whole was asked for"),
        ("huge-length", "too-large", "Content-Length 1000000000000, allowed are 50000000"),
        ("gzip-lie", "not-an-image", "body is not gzip"),
        ("brotli", "not-an-image", "Content-Encoding br, which was not asked for"),
        ("chunked-bad", "other", "answer is not HTTP: "),
        ("bad-length", "other", "answer is not HTTP: "),
        ("two-lengths", "other", "answer is not HTTP: "),
        ("big-headers", "other", "answer is not HTTP: "),
        ("many-headers", "other", "answer is not HTTP: "),
        ("garbage", "other", "answer is not HTTP: "),
        ("close", "connect", "closed without an answer"),
        ("half-head", "connect", "closed without an answer"),
        ("reset", "connect", "Connection reset by peer"),
        ("missing", "http-4xx", "HTTP 404 Not Found"),
        ("status/410", "http-4xx", "HTTP 410 Gone"),
        ("status/500", "http-5xx", "HTTP 500 Internal Server Error"),
        ("status/503", "http-5xx", "HTTP 503 Service Unavailable"),
        ("status/304", "http-3xx", "HTTP 304 Not Modified"),
        ("no-location", "http-3xx", "HTTP 302 Found without a place to go"),
        ("loop", "http-3xx", "more than 5 redirects"),
        ("chain/6", "http-3xx", "more than 5 redirects"),
        ("redirect?to=file:///etc/passwd", "http-3xx", "redirect refused: scheme file is neither http nor https"),
        ("redirect?to=gopher://x/", "http-3xx", "redirect refused: scheme gopher is neither http nor https"),
        ("redirect?to=http://169.254.169.254/latest/", "blocked-address", "169.254.169.254 is a link-local address"),
        ("redirect?to=http://[fd00:ec2::254]/", "blocked-address", "fd00:ec2::254 is a cloud metadata address"),
    ],
)
def test_bad_answers(server: BadServer, path: str, reason: str, message: str) -> None:
    fetched = fetch_one(server.url(f"/{path}"))
    assert (fetched.reason, message in fetched.message) == (reason, True), fetched
    assert "\n" not in fetched.message


def test_html_is_left_to_the_image_check(server: BadServer) -> None:
    assert fetch_one(server.url("/html")).body == b"<html>parked</html> "


@pytest.mark.parametrize("path", ["endless", "endless/chunked", "gzip-bomb?mb=64"])
def test_bodies_end_at_the_cap(server: BadServer, path: str) -> None:
    fetched = fetch_one(server.url(f"/{path}"), max_bytes=300_000)
    assert (fetched.reason, fetched.message) == ("too-large", "more than 300000 bytes")


def test_the_cap_holds_to_the_byte(server: BadServer) -> None:
    for path in ("ok", "chunked", "no-length", "gzip", "deflate"):
        assert fetch_one(server.url(f"/{path}"), max_bytes=len(BODY)).body == BODY
        assert fetch_one(server.url(f"/{path}"), max_bytes=len(BODY) - 1).reason == "too-large"


@pytest.mark.parametrize("path", ["stall", "stall-body"])
def test_silence_is_a_timeout(server: BadServer, path: str) -> None:
    fetched = fetch_one(server.url(f"/{path}"), timeout=0.3)
    assert (fetched.reason, fetched.message) == ("timeout", "nothing for 0.3 s")
    assert 0.3 <= fetched.seconds < 5


def test_one_byte_a_second_ends_at_the_deadline(server: BadServer) -> None:
    fetched = fetch_one(server.url("/drip?seconds=0.1"), timeout=1.0, deadline=1.5)
    assert (fetched.reason, fetched.message) == ("timeout", "not done after 1.5 s")
    assert 1.4 < fetched.seconds < 5


def test_a_port_that_refuses_and_one_that_says_nothing() -> None:
    with refusing_port() as port:
        refused = fetch_one(f"http://127.0.0.1:{port}/")
    assert (refused.reason, refused.message) == ("connect", "Connection refused")
    with silent_port() as port:
        plain, tls = fetch(f"http://127.0.0.1:{port}/", f"https://127.0.0.1:{port}/", timeout=0.3)
    assert (plain.reason, tls.reason) == ("timeout", "timeout")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "image.jpg",
        "ftp://example.org/a",
        "file:///etc/passwd",
        "http://",
        "http://a b/",
        "http://x:0/",
    ],
)
def test_what_is_no_url(url: str) -> None:
    fetched = fetch_one(url)
    assert (fetched.reason, fetched.attempts) == ("bad-url", 0)


# ---------------------------------------------------------------------------------------------------------------------
# What is sent
# ---------------------------------------------------------------------------------------------------------------------


def test_the_request_is_ours_and_the_url_as_it_was_spelt() -> None:
    paths = ["/a%20b%2Fc.jpg?sig=a%2bb&x=%zz&y=1+2", "/%E4%bd.jpg", "/a/./b/../c;d=1'(x)!", "/?q=http://x/%3F#no"]
    odd = ["/ü é.jpg", "/<a>.jpg", "/a\\b"]
    with bad_server({"/": BODY}) as server:
        fetch(*[server.url(path) for path in [*paths, *odd]], per_host=1)
        assert server.paths() == [*paths[:3], "/?q=http://x/%3F", "/%C3%BC%20%C3%A9.jpg", "/%3Ca%3E.jpg", "/a/b"]
        headers = server.requests[0].headers
    assert headers["host"] == f"127.0.0.1:{server.port}"
    assert headers["user-agent"].startswith("Mozilla/5.0 (compatible; clipkit/")
    assert headers["user-agent"].endswith("; +tests)")
    assert headers["accept-encoding"] == "identity"
    assert not {"cookie", "referer", "range"} & set(headers)


def test_cookies_are_not_kept(server: BadServer) -> None:
    # Jars take no cookies of hosts without a name.
    results = fetch(*[server.url("/cookie", "localhost")] * 3, per_host=1)
    assert [fetched.http_status for fetched in results] == [200] * 3


def test_redirects_may_be_relative_and_badly_spelt(server: BadServer) -> None:
    for to in ("ok", "/ok", f"//127.0.0.1:{server.port}/ok", server.url("/ok"), "./x/../ok", "/ok?ü ü", "\\ok"):
        fetched = fetch_one(server.url(f"/redirect?to={quote(to)}"))
        assert fetched.body == BODY, to


def test_connections_are_kept() -> None:
    with bad_server() as server:
        fetch(*[server.url("/ok")] * 100, *[server.url("/missing")] * 50, *[server.url("/empty")] * 50, per_host=4)
        assert len(server.requests) == 200
        assert server.connections <= 8
    with bad_server() as server:
        fetch(*[server.url("/late-body/404")] * 10, *[server.url("/late-body/302")] * 10, per_host=1)
        assert len(server.requests) == 30
        assert server.connections <= 3  # the last ones are not kept


def test_requests_of_one_host_are_bounded() -> None:
    with bad_server({"/x": BODY}, latency=0.05) as server:
        fetch(*[server.url("/x")] * 40, per_host=4)
        assert server.most_open_requests == 4
        # Also where a redirect leads.
        with bad_server() as other:
            server.most_open_requests = 0
            fetch(*[other.url(f"/redirect?to={server.url('/x')}", "localhost")] * 40, per_host=4)
            assert server.most_open_requests == 4


def test_a_lonely_connection_is_not_kept_open() -> None:
    with bad_server() as server:
        fetch(server.url("/ok"))
        assert server.requests[0].headers["connection"] == "close"


# ---------------------------------------------------------------------------------------------------------------------
# TLS
# ---------------------------------------------------------------------------------------------------------------------


def test_good_tls_keeps_connections(tmp_path: Path) -> None:
    with bad_server(certificate="good", folder=tmp_path) as server:
        results = fetch(*[server.url("/ok")] * 50, server.url("/gzip"), ca_file=str(server.ca_file), per_host=4)
        assert [fetched.reason for fetched in results] == [None] * 51
        assert server.connections <= 6


@pytest.mark.parametrize(
    ("kind", "message"),
    [("self-signed", "certificate: "), ("wrong-host", "not valid for '127.0.0.1'"), ("expired", "has expired")],
)
def test_bad_certificates(tmp_path: Path, kind: str, message: str) -> None:
    with bad_server(certificate=kind, folder=tmp_path) as server:
        fetched = fetch_one(server.url("/ok"), ca_file=str(server.ca_file))
        assert (fetched.reason, message in fetched.message) == ("tls", True), fetched
        assert not server.requests
        # Nor is the way round by a redirect any better.
        with bad_server() as plain:
            assert fetch_one(plain.url(f"/redirect?to={server.url('/ok')}")).reason == "tls"


def test_no_tls_where_tls_was_promised(server: BadServer) -> None:
    assert fetch_one(server.url("/ok").replace("http:", "https:")).reason == "tls"


def test_a_file_of_certificates_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("nothing")
    with pytest.raises(UserError, match=r"ca\.pem"):
        fetch_one("http://127.0.0.1:1/", ca_file=str(tmp_path / "ca.pem"))
    with pytest.raises(UserError, match="No such file"):
        fetch_one("http://127.0.0.1:1/", ca_file=str(tmp_path / "missing.pem"))


# ---------------------------------------------------------------------------------------------------------------------
# Where nothing may be sent
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "2130706433", "0x7f.1", "0177.0.0.1", "127.1", "0", "10.1.2.3", "192.168.0.1", "100.64.0.1",
        "169.254.169.254", "[::1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[64:ff9b::a00:1]", "[2002:7f00:1::]",
        "[fe80::1]", "[fc00::1]", "[::]", "224.0.0.1", "255.255.255.255",
    ],
)  # fmt: skip
def test_private_addresses_in_urls_are_not_dialled(dials: Dials, host: str) -> None:
    fetched = fetch_one(f"http://{host}/", allow_private_hosts=False)
    assert fetched.reason == "blocked-address", fetched
    assert not dials.addresses


def test_names_and_redirects_that_lead_to_private_addresses() -> None:
    answers = {"public.test": [PUBLIC], "inside.test": ["10.0.0.1"], "me.test": ["127.0.0.1"], "six.test": ["::1"]}
    with bad_server({"/x": BODY}) as server, dns_server(answers) as dns:
        settings = replace(SETTINGS, allow_private_hosts=False, resolvers=(dns.address,))
        with only_loopback({PUBLIC: ("127.0.0.1", server.port)}) as dials:
            targets = ["me.test", "inside.test", "six.test", "127.0.0.1", "0x7f.1", "[::ffff:10.0.0.1]"]
            urls = [f"http://public.test/redirect?to=http://{host}:{server.port}/x" for host in targets]
            results = fetch("http://public.test/x", *urls, "http://inside.test/", settings=settings)
        assert results[0].body == BODY
        assert [fetched.reason for fetched in results[1:]] == ["blocked-address"] * 7
        assert set(dials.addresses) == {PUBLIC}


def test_a_name_that_changes_its_answer_between_check_and_dial_gains_nothing() -> None:
    answers = {"rebind.test": lambda number: [PUBLIC] if number == 0 else ["127.0.0.1"]}
    with bad_server({"/x": BODY}) as server, dns_server(answers, ttl=0) as dns:
        settings = replace(SETTINGS, allow_private_hosts=False, resolvers=(dns.address,), per_host=1)
        with only_loopback({PUBLIC: ("127.0.0.1", server.port)}) as dials:
            # Each answer closes its connection, so that each request dials anew.
            results = fetch(*["http://rebind.test/no-length"] * 5, settings=settings)
        assert [fetched.body for fetched in results] == [BODY] * 5
        assert dns.questions["rebind.test"] == 1
        assert dials.addresses == [PUBLIC] * 5


def test_of_several_addresses_the_public_ones_are_dialled() -> None:
    answers = {"mixed.test": ["127.0.0.1", PUBLIC, "10.0.0.1"]}
    with bad_server() as server, dns_server(answers) as dns:
        settings = replace(SETTINGS, allow_private_hosts=False, resolvers=(dns.address,))
        with only_loopback({PUBLIC: ("127.0.0.1", server.port)}) as dials:
            assert fetch_one("http://mixed.test/ok", settings=settings).body == BODY
        assert dials.addresses == [PUBLIC]


# ---------------------------------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------------------------------


def test_names_that_do_not_exist_and_resolvers_that_mostly_fail() -> None:
    names = {f"silent{number}.test": every(3, ["127.0.0.1"]) for number in range(4)}
    names |= {f"failing{number}.test": every(3, ["127.0.0.1"], SERVFAIL) for number in range(40)}
    with bad_server() as server, dns_server({**names, "gone.test": NXDOMAIN}) as dns:
        urls = [server.url("/ok", host) for host in names] + [server.url("/ok", "gone.test")] * 3
        results = fetch(*urls, resolvers=(dns.address,))
        assert [fetched.reason for fetched in results] == [None] * len(names) + ["dns"] * 3
        assert dns.questions["gone.test"] == 1
        assert all(dns.questions[name] == 3 for name in names)


def test_a_resolver_that_never_answers_is_a_failure_of_names() -> None:
    with dns_server({"quiet.test": SILENT}) as dns:
        fetched = fetch_one("http://quiet.test/", resolvers=(dns.address,), deadline=1.0)
        assert (fetched.reason, fetched.message) == ("dns", "no resolver answered in time")


def test_bad_resolver_address() -> None:
    with pytest.raises(UserError, match=r"--resolver 'dns\.google' is not an address"):
        fetch_one("http://127.0.0.1:1/", resolvers=("dns.google",))


def test_the_system_resolver(server: BadServer) -> None:
    assert fetch_one(server.url("/ok", "localhost")).body == BODY
    assert fetch_one(server.url("/ok", "localhost"), allow_private_hosts=False).reason == "blocked-address"


# ---------------------------------------------------------------------------------------------------------------------
# Permissions
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "reason", "decision"),
    [
        ("X-Robots-Tag=noai", "disallowed", "x-robots-tag: noai"),
        ("X-Robots-Tag=noarchive", None, "x-robots-tag: noarchive"),
        ("X-Robots-Tag=otherbot:+noai", None, ""),
        (
            "X-Robots-Tag=nofollow&X-Robots-Tag=clipkit:+none",
            "disallowed",
            "x-robots-tag: nofollow; x-robots-tag: clipkit: none",
        ),
        (
            "X-Robots-Tag=unavailable_after:+25+Jun+2010+15:00:00+PST",
            "disallowed",
            "x-robots-tag: unavailable_after: 25 Jun 2010 15:00:00 PST",
        ),
        ("TDM-Reservation=1", "disallowed", "tdm-reservation: 1"),
        ("TDM-Reservation=0", None, "tdm-reservation: 0"),
    ],
)
def test_what_a_response_says_about_its_use(server: BadServer, query: str, reason: str | None, decision: str) -> None:
    fetched = fetch_one(server.url(f"/header?{query}"))
    assert (fetched.reason, fetched.decision) == (reason, decision)


def test_permissions_can_be_ignored_but_are_recorded(server: BadServer) -> None:
    fetched = fetch_one(server.url("/header?X-Robots-Tag=noai"), disallowed_tags=())
    assert (fetched.body, fetched.decision) == (BODY, "x-robots-tag: noai")
    fetched = fetch_one(server.url("/header?TDM-Reservation=1"), tdm_reservation=False)
    assert (fetched.body, fetched.decision) == (BODY, "tdm-reservation: 1")


def test_robots_txt() -> None:
    rules = b"User-agent: clipkit\nDisallow: /private/\nAllow: /private/free\n\nUser-agent: *\nDisallow: /\n"
    site = {"/robots.txt": rules, "/a": BODY, "/private/a": BODY, "/private/free": BODY}
    with bad_server(site) as server, bad_server({"/a": BODY}) as without:
        urls = [*map(server.url, ["/a", "/private/a", "/private/free"]), without.url("/a")]
        results = fetch(*urls, robots_txt=True)
        assert [fetched.reason for fetched in results] == [None, "disallowed", None, None]
        allow = "robots.txt: allow"
        assert [fetched.decision for fetched in results] == [allow, "robots.txt: disallow", allow, ""]
        assert server.paths().count("/robots.txt") == without.paths().count("/robots.txt") == 1
        assert "/private/a" not in server.paths()
        # A redirect is asked about, too.
        assert (
            fetch_one(without.url(f"/redirect?to={server.url('/private/a')}"), robots_txt=True).reason == "disallowed"
        )
        assert fetch(server.url("/private/a"))[0].body == BODY


def test_a_robots_txt_is_meant_for_us_whatever_its_own_headers_say() -> None:
    with (
        bad_server({"/a": BODY, "/b": BODY}) as server,
        bad_server({"/rules": b"User-agent: *\nDisallow: /b"}) as other,
    ):
        other.site_headers = ("X-Robots-Tag: noindex, noai", "TDM-Reservation: 1")
        server.redirects = {"/robots.txt": other.url("/rules")}
        results = fetch(server.url("/a"), server.url("/b"), robots_txt=True)
        assert [fetched.reason for fetched in results] == [None, "disallowed"]


def test_who_gives_up_waiting_for_a_robots_txt_ends_it_for_nobody_else() -> None:
    async def run(server: BadServer) -> None:
        async with Fetcher(replace(SETTINGS, robots_txt=True)) as fetcher:
            assert fetcher.robots is not None
            first, second = (asyncio.create_task(fetcher.robots.ask(parse_url(server.url("/a")))) for _ in range(2))
            while not server.requests:
                await asyncio.sleep(0.01)
            first.cancel()
            decision = await second
            assert isinstance(decision, Decision) and decision.said == "robots.txt: allow"
            assert len(server.requests) == 1

    with bad_server({"/robots.txt": b"User-agent: *\nAllow: /"}, latency=0.2) as server:
        asyncio.run(run(server))


@pytest.mark.parametrize(
    ("path", "reason"), [("/status/503", "http-5xx"), ("/stall", "timeout"), ("/endless", "too-large")]
)
def test_a_robots_txt_that_cannot_be_had_allows_nothing(path: str, reason: str) -> None:
    with bad_server() as server, bad_server() as other:
        # The robots.txt of `server` redirects there.
        server.site = {"/a": BODY}
        server.redirects = {"/robots.txt": other.url(path)}
        fetched = fetch_one(server.url("/a"), robots_txt=True, timeout=0.5)
        assert (fetched.reason, fetched.message.startswith("robots.txt: ")) == (reason, True), fetched
        assert "/a" not in server.paths()


# ---------------------------------------------------------------------------------------------------------------------
# Patience
# ---------------------------------------------------------------------------------------------------------------------


def test_retries_are_as_many_as_asked_for() -> None:
    with bad_server() as server:
        never, once = server.url("/status/500?times=1&n=1"), server.url("/status/500?times=1&n=2")
        assert fetch_one(never).reason == "http-5xx"
        fetched = fetch_one(once, retries=1)
        assert (fetched.body, fetched.attempts) == (BODY, 2)
        fetched = fetch_one(server.url("/status/500?times=9"), retries=2)
        assert (fetched.reason, fetched.attempts) == ("http-5xx", 3)
        fetched = fetch_one(server.url("/missing"), retries=3)
        assert (fetched.reason, fetched.attempts) == ("http-4xx", 1)


@pytest.mark.parametrize("code", [429, 503])
def test_retry_after_is_waited_for(code: int) -> None:
    with bad_server() as server:
        started = time.monotonic()
        fetched = fetch_one(server.url(f"/status/{code}?retry-after=1&times=1"))
        assert (fetched.body, fetched.attempts) == (BODY, 2)
        assert time.monotonic() - started >= 1
        assert fetched.seconds >= 1


def test_retry_after_as_a_date_and_beyond_the_deadline() -> None:
    with bad_server() as server:
        later = quote("Fri, 31 Dec 2100 23:59:59 GMT")
        started = time.monotonic()
        first, *others = fetch(server.url(f"/status/429?retry-after={later}"), *[server.url("/ok")] * 20, per_host=1)
        assert first.reason == "rate-limited" and first.message == "HTTP 429 Too Many Requests"
        # The whole host is left alone, and nothing waits for it.
        assert {fetched.reason for fetched in others} == {"rate-limited"}
        assert others[0].message.startswith("host asked to wait ") and others[0].attempts == 0
        assert len(server.requests) == 1
        assert time.monotonic() - started < 5


def test_a_paused_host_holds_up_nobody_else() -> None:
    with bad_server() as slow, bad_server() as quick, dns_server({"slow.test": ["127.0.0.1"]}) as dns:
        order: list[int] = []
        urls = [slow.url("/status/429?retry-after=2&times=1", "slow.test")]
        urls += [slow.url("/ok", "slow.test")] * 3 + [quick.url("/ok")] * 50
        settings = replace(SETTINGS, resolvers=(dns.address,), per_host=1)
        fetch_all(enumerate(urls), settings, lambda fetched: order.append(fetched.index))
        assert sorted(order[-4:]) == [0, 1, 2, 3]


def test_a_rate_limit_without_a_time() -> None:
    with bad_server() as server:
        fetched = fetch_one(server.url("/status/429?times=1"))
        assert (fetched.body, fetched.attempts) == (BODY, 2)
        fetched = fetch_one(server.url("/status/429"), deadline=4.0)
        assert (fetched.reason, fetched.http_status) == ("rate-limited", 429)


def test_a_dead_host_is_given_up_and_each_of_its_rows_recorded(monkeypatch: pytest.MonkeyPatch, dials: Dials) -> None:
    monkeypatch.setattr(hosts, "PROBE_PAUSES", (0.1, 0.2))
    with refusing_port() as port:
        results = fetch(*[f"http://127.0.0.1:{port}/{number}" for number in range(200)])
    assert Counter(fetched.reason for fetched in results) == {"connect": 200}
    backed_off = [fetched for fetched in results if fetched.message == "host backed off: Connection refused"]
    assert len(backed_off) >= 180
    assert len(dials.addresses) <= 20


def test_waiting_for_a_turn_costs_a_url_none_of_its_deadline() -> None:
    with bad_server() as server:
        results = fetch(*[server.url("/slow?seconds=0.3")] * 8, per_host=1, deadline=1.0)
        assert [fetched.reason for fetched in results] == [None] * 8


# ---------------------------------------------------------------------------------------------------------------------
# Many rows
# ---------------------------------------------------------------------------------------------------------------------


def test_rows_are_drawn_as_needed_and_a_host_in_order_stalls_no_other() -> None:
    drawn = 0

    def rows(server: BadServer) -> Iterator[tuple[int, str]]:
        nonlocal drawn
        for index in range(5000):
            drawn += 1
            host = "one.test" if index < 3000 else f"h{index % 50}.test"
            yield index, server.url("/slow?seconds=0.2" if index < 3000 else "/ok", host)

    hosts_ = {"one.test": ["127.0.0.1"], **{f"h{number}.test": ["127.0.0.1"] for number in range(50)}}
    seen: list[int] = []

    class EnoughError(Exception):
        pass

    def handle(fetched: FetchOutcome) -> None:
        assert fetched.reason is None, fetched
        seen.append(fetched.index)
        assert drawn - len(seen) <= 3100 + 300
        if sum(index >= 3000 for index in seen) == 100:
            raise EnoughError

    with bad_server() as server, dns_server(hosts_) as dns:
        settings = replace(SETTINGS, resolvers=(dns.address,), look_ahead=3100, per_host=2)
        with pytest.raises(EnoughError):
            fetch_all(rows(server), settings, handle)
    assert len(seen) < 1000


@pytest.mark.parametrize("look_ahead", [10, 500])
def test_the_look_ahead_is_bounded(look_ahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipkit.tfrecord_tools.web.fetcher.PREFETCH", 5)
    drawn = handled = most = 0

    def rows() -> Iterator[tuple[int, str]]:
        nonlocal drawn, most
        for index in range(2000):
            drawn += 1
            most = max(most, drawn - handled)
            yield index, server.url("/ok")

    def handle(fetched: FetchOutcome) -> None:
        nonlocal handled
        handled += 1

    with bad_server() as server:
        fetch_all(rows(), replace(SETTINGS, look_ahead=look_ahead, per_host=2, handler_threads=1), handle)
    assert handled == 2000
    assert most <= look_ahead + 2 + 128 + 5


def test_slow_handlers_hold_fetching_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipkit.tfrecord_tools.web.calls.MAX_WAITING", 4)
    gate = threading.Event()
    handled: list[int] = []

    def handle(fetched: FetchOutcome) -> None:
        gate.wait(30)
        handled.append(fetched.index)

    async def run(server: BadServer) -> None:
        async with Fetcher(replace(SETTINGS, per_host=4)) as fetcher:
            call = asyncio.create_task(fetcher.fetch_many(((index, server.url("/ok")) for index in range(100)), handle))
            while fetcher.handlers.waiting < 4 or fetcher.in_flight:
                await asyncio.sleep(0.01)
            before = len(server.requests)
            await asyncio.sleep(0.2)
            assert len(server.requests) == before <= 4 + 4
            gate.set()
            await call
            assert len(server.requests) == 100
            assert fetcher.exchange.bytes_in == 100 * len(BODY)

    with bad_server() as server:
        asyncio.run(run(server))
    assert sorted(handled) == list(range(100))


def test_an_error_of_the_handler_ends_everything_soon(server: BadServer) -> None:
    calls = itertools.count()

    def handle(fetched: FetchOutcome) -> None:
        if next(calls) == 20:
            raise OSError(28, "No space left on device")

    urls = ((index, server.url("/drip" if index % 100 == 7 else "/ok")) for index in itertools.count())
    started = time.monotonic()
    with pytest.raises(OSError, match="No space left"):
        fetch_all(urls, replace(SETTINGS, per_host=64), handle)
    assert time.monotonic() - started < 10


def test_an_error_of_the_rows_is_raised(server: BadServer) -> None:
    def rows() -> Iterator[tuple[int, str]]:
        yield 0, server.url("/ok")
        raise UserError("the table ends in the middle")

    with pytest.raises(UserError, match="ends in the middle"):
        fetch_all(rows(), SETTINGS, lambda fetched: None)


def test_one_fetcher_serves_several_calls_at_once(server: BadServer) -> None:
    async def run() -> tuple[list[int], list[int]]:
        first: list[int] = []
        second: list[int] = []
        async with Fetcher(SETTINGS) as fetcher:
            slow = [server.url("/slow?seconds=1")] + [server.url("/ok")] * 20
            one = asyncio.create_task(fetcher.fetch_many(enumerate(slow), lambda fetched: first.append(fetched.index)))
            await asyncio.sleep(0)
            await fetcher.fetch_many(enumerate([server.url("/ok")] * 30), lambda fetched: second.append(fetched.index))
            assert not one.done()  # the second did not wait for the slow row of the first
            await one
            await fetcher.fetch_many([], lambda fetched: None)
        return first, second

    first, second = asyncio.run(run())
    assert (sorted(first), sorted(second)) == (list(range(21)), list(range(30)))


def test_a_cancelled_call_leaves_the_fetcher_usable(server: BadServer) -> None:
    async def run() -> None:
        async with Fetcher(SETTINGS) as fetcher:
            late: list[int] = []
            call = asyncio.create_task(
                fetcher.fetch_many(enumerate([server.url("/stall")] * 30), lambda fetched: late.append(fetched.index))
            )
            while fetcher.in_flight < 8:
                await asyncio.sleep(0.01)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert (fetcher.in_flight, fetcher.hosts.queued, late) == (0, 0, [])
            done: list[int] = []
            await fetcher.fetch_many(enumerate([server.url("/ok")] * 10), lambda fetched: done.append(fetched.index))
            assert sorted(done) == list(range(10))

    asyncio.run(run())


def test_large_bodies_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipkit.tfrecord_tools.web.fetcher.LARGE_BODY_BYTES", 5_000_000)
    body = bytes(3_000_000)
    with bad_server({"/large": body}, latency=0.05) as server:
        results = fetch(*[server.url("/large")] * 12, max_bytes=4_000_000)
        assert all(fetched.body == body for fetched in results)


def test_no_host_is_remembered_for_nothing(server: BadServer) -> None:
    async def run() -> None:
        async with Fetcher(SETTINGS) as fetcher:
            urls = [server.url(path) for path in ("/ok", "/missing", "/chain/2", "/status/500", "/empty")]
            await fetcher.fetch_many(enumerate(urls * 10), lambda fetched: None)
            assert not fetcher.hosts.hosts and not fetcher.hosts.queued and not fetcher.in_flight
            assert fetcher.budget.left == fetcher.budget.size

    asyncio.run(run())


def test_a_host_that_answers_now_and_then_is_not_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "CIRCUIT_AFTER", 3)
    with bad_server() as server:
        urls = [server.url(path) for path in ("/reset", "/reset", "/ok")] * 10
        results = fetch(*urls, per_host=1)
        assert Counter(fetched.reason for fetched in results) == {"connect": 20, None: 10}
        assert not [fetched for fetched in results if "backed off" in fetched.message]


def test_redirects_to_a_host_that_was_given_up_end_there(monkeypatch: pytest.MonkeyPatch, dials: Dials) -> None:
    monkeypatch.setattr(hosts, "PROBE_PAUSES", ())
    monkeypatch.setattr(hosts, "CIRCUIT_AFTER", 1)

    async def run(server: BadServer, dead: str) -> None:
        results: list[FetchOutcome] = []
        async with Fetcher(SETTINGS) as fetcher:
            await fetcher.fetch_many([(0, dead)], results.append)
            dialled = len(dials.addresses)
            await fetcher.fetch_many([(1, server.url(f"/redirect?to={dead}")), (2, dead)], results.append)
            assert len(dials.addresses) == dialled + 1
        assert sorted((fetched.index, fetched.message) for fetched in results) == [
            (0, "Connection refused"),
            (1, "host backed off: Connection refused"),
            (2, "host backed off: Connection refused"),
        ]

    with bad_server() as server, refusing_port() as port:
        asyncio.run(run(server, f"http://127.0.0.2:{port}/"))


def test_after_an_error_of_the_handler_it_is_hardly_called_again(server: BadServer) -> None:
    calls = 0

    def handle(fetched: FetchOutcome) -> None:
        nonlocal calls
        calls += 1
        time.sleep(0.05)
        if calls == 1:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        fetch_all(enumerate([""] * 100), replace(SETTINGS, handler_threads=1), handle)
    assert calls < 20
