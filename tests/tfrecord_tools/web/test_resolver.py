"""Names are asked for once, asked again when nobody said no, and their addresses are checked before they are used."""

import asyncio
import socket
import threading
import time
import zlib
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from dns_server import NXDOMAIN, REFUSED, SERVFAIL, SILENT, TRUNCATED, DnsServer, dns_server, every

from clipkit.errors import UserError
from clipkit.tfrecord_tools.web import resolver
from clipkit.tfrecord_tools.web.addresses import BlockedAddressError
from clipkit.tfrecord_tools.web.resolver import Resolver, UnresolvedError, check_resolvers

PUBLIC = "23.192.228.80"


def ask(dns: DnsServer | list[DnsServer] | None, body: Callable[[Resolver], Awaitable[Any]], **settings: Any) -> Any:
    """Run `body` with a resolver that asks the given servers, private addresses allowed by default."""
    servers = [] if dns is None else [dns] if isinstance(dns, DnsServer) else dns

    async def run() -> Any:
        made = Resolver([server.address for server in servers], **{"allow_private": True, "patience": 10.0, **settings})
        try:
            return await body(made)
        finally:
            await made.close()

    return asyncio.run(run())


def test_an_answer_is_cached_and_asked_for_once_by_all_who_want_it() -> None:
    async def body(names: Resolver) -> None:
        answers = await asyncio.gather(*[names.addresses("a.test") for _ in range(50)])
        assert set(answers) == {("127.0.0.1", "127.0.0.2")}
        assert await names.addresses("a.test") == ("127.0.0.1", "127.0.0.2")
        found = await names.resolve("a.test", 8080)
        assert [(one["host"], one["port"], one["family"]) for one in found] == [
            ("127.0.0.1", 8080, socket.AF_INET),
            ("127.0.0.2", 8080, socket.AF_INET),
        ]

    with dns_server({"a.test": ["127.0.0.1", "127.0.0.2"]}) as dns:
        ask(dns, body)
        assert dns.questions == {"a.test": 1} and not dns.questions_AAAA


def test_no_is_cached_and_no_answer_is_not() -> None:
    async def body(names: Resolver) -> None:
        for _ in range(3):
            with pytest.raises(UnresolvedError, match="not found") as caught:
                await names.addresses("gone.test")
            assert not caught.value.passing
        for name in well:  # so that the resolver is known to be well
            await names.addresses(name)
        with pytest.raises(UnresolvedError) as caught:
            await names.addresses("broken.test")
        assert caught.value.passing
        assert await names.addresses("broken.test") == ("127.0.0.1",)

    broken = {"broken.test": lambda number: ["127.0.0.1"] if number >= resolver.TRIES else SERVFAIL}
    well = {f"n{number}.test": ["127.0.0.1"] for number in range(20)}
    with dns_server({"gone.test": NXDOMAIN, **broken, **well}) as dns:
        ask(dns, body)
        assert (dns.questions["gone.test"], dns.questions["broken.test"]) == (1, resolver.TRIES + 1)


@pytest.mark.parametrize("code", [SERVFAIL, REFUSED])
def test_one_answer_in_three_is_enough(code: int) -> None:
    async def body(names: Resolver) -> None:
        answers = await asyncio.gather(*[names.addresses(name) for name in flaky])
        assert answers == [("127.0.0.1",)] * len(flaky)

    flaky = {f"n{number}.test": every(3, ["127.0.0.1"], code) for number in range(100)}
    with dns_server(flaky) as dns:
        ask(dns, body)
        assert set(dns.questions.values()) == {3}


def test_lost_questions_are_asked_again() -> None:
    async def body(names: Resolver) -> None:
        assert await names.addresses("quiet.test") == ("127.0.0.1",)

    with dns_server({"quiet.test": every(2, ["127.0.0.1"], SILENT)}) as dns:
        ask(dns, body)
        assert dns.questions["quiet.test"] == 2


def test_a_resolver_that_mostly_fails_gets_more_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver, "LONGEST_PAUSE", 0.02)

    async def body(names: Resolver) -> None:
        # Of a resolver that is otherwise well, a name gets 4 tries: 41 names of 100 would be found. With 20 it is 93.
        results = await asyncio.gather(*[names.addresses(name) for name in rare], return_exceptions=True)
        assert sum(result == ("127.0.0.1",) for result in results) > 70

    def answer(name: str) -> Callable[[int], list[str] | int]:
        return lambda number: ["127.0.0.1"] if zlib.crc32(f"{name} {number}".encode()) % 8 == 0 else SERVFAIL

    rare = {name: answer(name) for name in (f"n{number}.test" for number in range(100))}
    with dns_server(rare) as dns:
        ask(dns, body)


def test_resolvers_take_turns_and_stand_in_for_each_other() -> None:
    names_ = {f"n{number}.test": ["127.0.0.1"] for number in range(20)}

    async def body(names: Resolver) -> None:
        for name in names_:
            assert await names.addresses(name) == ("127.0.0.1",)

    with dns_server(names_) as one, dns_server(names_) as two:
        ask([one, two], body)
        assert one.questions.total() == two.questions.total() == 10
    with dns_server(dict.fromkeys(names_, REFUSED)) as bad, dns_server(names_) as good:
        ask([bad, good], body)
        assert good.questions.total() == 20


def test_ipv6_is_asked_for_where_there_is_no_ipv4() -> None:
    async def body(names: Resolver) -> None:
        assert await names.addresses("six.test") == ("::1",)
        with pytest.raises(UnresolvedError) as caught:
            await names.addresses("none.test")
        assert not caught.value.passing

    with dns_server({"six.test": ["::1"], "none.test": []}) as dns:
        ask(dns, body)
        assert dns.questions_AAAA == {"six.test": 1, "none.test": 1}


def test_a_cut_answer_is_asked_for_over_tcp() -> None:
    async def body(names: Resolver) -> None:
        assert await names.addresses("long.test") == ("127.0.0.1",)

    with dns_server({"long.test": TRUNCATED}) as dns:
        ask(dns, body)
        assert dns.over_tcp == 1


def test_private_addresses_are_left_out_and_metadata_always() -> None:
    async def body(names: Resolver) -> None:
        assert await names.addresses("public.test") == (PUBLIC,)
        assert await names.addresses("mixed.test") == (PUBLIC,)
        for _ in range(2):
            with pytest.raises(BlockedAddressError, match=r"inside\.test: 10\.0\.0\.1 is a private address"):
                await names.addresses("inside.test")

    async def allowed(names: Resolver) -> None:
        assert await names.addresses("inside.test") == ("10.0.0.1",)
        with pytest.raises(BlockedAddressError, match="link-local"):
            await names.addresses("metadata.test")

    answers = {
        "public.test": [PUBLIC],
        "mixed.test": ["10.0.0.1", PUBLIC, "127.0.0.1"],
        "inside.test": ["10.0.0.1"],
        "metadata.test": ["169.254.169.254"],
    }
    with dns_server(answers) as dns:
        ask(dns, body, allow_private=False)
        ask(dns, allowed)


def test_who_gives_up_waiting_ends_the_question_for_nobody_else() -> None:
    async def body(names: Resolver) -> None:
        first = asyncio.create_task(names.addresses("slow.test"))
        second = asyncio.create_task(names.addresses("slow.test"))
        while not dns.questions:
            await asyncio.sleep(0.01)
        first.cancel()
        assert await second == ("127.0.0.1",)

    with dns_server({"slow.test": every(2, ["127.0.0.1"], SILENT)}) as dns:
        ask(dns, body)


def test_patience_ends() -> None:
    async def body(names: Resolver) -> None:
        started = time.monotonic()
        with pytest.raises(UnresolvedError, match="no resolver answered in time") as caught:
            await names.addresses("quiet.test")
        assert caught.value.passing
        assert time.monotonic() - started < 5

    with dns_server({"quiet.test": SILENT}) as dns:
        ask(dns, body, patience=0.5)


def test_the_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver, "CACHE_NAMES", 5)

    async def body(names: Resolver) -> None:
        for number in range(20):
            await names.addresses(f"n{number}.test")
        assert list(names.cache) == [f"n{number}.test" for number in range(15, 20)]
        assert not names.lookups

    with dns_server({f"n{number}.test": ["127.0.0.1"] for number in range(20)}) as dns:
        ask(dns, body)


def test_the_system_resolver_in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    threads: set[str] = set()

    def lookup(host: str, *arguments: Any, **settings: Any) -> list[Any]:
        calls.append(host)
        threads.add(threading.current_thread().name)
        if host == "gone.test":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        if calls.count(host) < 3:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))] * 2

    async def body(names: Resolver) -> None:
        assert await names.addresses("later.test") == ("127.0.0.1",)
        for _ in range(2):
            with pytest.raises(UnresolvedError, match="not known") as caught:
                await names.addresses("gone.test")
            assert not caught.value.passing

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    ask(None, body)
    assert calls == ["later.test"] * 3 + ["gone.test"]
    assert all(name.startswith("resolver") for name in threads)


@pytest.mark.parametrize("server", ["1.1.1.1", "127.0.0.1:53", "[::1]:53", "2606:4700::1111"])
def test_addresses_of_resolvers(server: str) -> None:
    check_resolvers([server])


@pytest.mark.parametrize("server", ["", "dns.example", "1.1.1.1:0", "1.1.1.1:x", "1.1.1", "1.1.1.1:99999", ":53"])
def test_bad_addresses_of_resolvers(server: str) -> None:
    with pytest.raises(UserError, match="is not an address: give IP or IP:PORT"):
        check_resolvers([server])
