"""A DNS server on loopback for the tests: names that don't exist, answers now and then, answers that change.

with dns_server({"a.test": ["127.0.0.1"], "gone.test": NXDOMAIN, "flaky.test": every(3, ["127.0.0.1"])}) as dns:
    resolve("a.test", server=dns.address)
"""

import asyncio
import contextlib
import ipaddress
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bad_server import HOST, end_tasks, loop_in_thread

A, AAAA = 1, 28
NXDOMAIN, SERVFAIL, REFUSED = 3, 2, 5
SILENT = -1
TRUNCATED = -2  # over UDP "ask over TCP", and there 127.0.0.1

# Addresses, a code, or what gives either for the number of the question (from 0) about that name.
Answer = Sequence[str] | int | Callable[[int], Sequence[str] | int]


def every(count: int, answer: Sequence[str] | int, otherwise: Sequence[str] | int = SILENT) -> Answer:
    """`answer` to each `count`th question, `otherwise` to the others."""
    return lambda number: answer if (number + 1) % count == 0 else otherwise


@dataclass
class DnsServer:
    """A running server; `questions` counts what was asked for A records, `questions_AAAA` for AAAA."""

    answers: Mapping[str, Answer]
    port: int = 0
    ttl: int = 300
    questions: Counter[str] = field(default_factory=Counter)
    questions_AAAA: Counter[str] = field(default_factory=Counter)
    over_tcp: int = 0

    @property
    def address(self) -> str:
        return f"{HOST}:{self.port}"

    def reply(self, query: bytes, *, tcp: bool = False) -> bytes | None:
        """The answer to a message, None for silence (RFC 1035, section 4)."""
        number, _, _, _, _, _ = struct.unpack("!6H", query[:12])
        labels, at = [], 12
        while query[at]:
            labels.append(query[at + 1 : at + 1 + query[at]].decode().lower())
            at += 1 + query[at]
        kind = struct.unpack("!H", query[at + 1 : at + 3])[0]
        question = query[12 : at + 5]
        name = ".".join(labels)
        counter = self.questions if kind == A else self.questions_AAAA
        answer = self.answers.get(name, NXDOMAIN)
        if callable(answer):
            answer = answer(counter[name])
        counter[name] += 1
        self.over_tcp += tcp
        if answer == SILENT:
            return None
        code, records, flags = 0, [], 0x8180
        if answer == TRUNCATED:
            answer = ["127.0.0.1"] if tcp else []
            flags |= 0 if tcp else 0x0200
        if isinstance(answer, int):
            code = answer
        else:
            packed = [ipaddress.ip_address(address).packed for address in answer]
            records = [data for data in packed if len(data) == (4 if kind == A else 16)]
        reply = struct.pack("!6H", number, flags | code, 1, len(records), 0, 0) + question
        for data in records:
            reply += struct.pack("!HHHIH", 0xC00C, kind, 1, self.ttl, len(data)) + data
        return reply


class Datagrams(asyncio.DatagramProtocol):
    def __init__(self, server: DnsServer) -> None:
        self.server = server

    def connection_made(self, transport: Any) -> None:  # asyncio's own is no asyncio.DatagramTransport in 3.11
        self.transport = transport

    def datagram_received(self, data: bytes, address: tuple[str, int]) -> None:
        reply = self.server.reply(data)
        if reply is not None:
            self.transport.sendto(reply, address)


@contextlib.contextmanager
def dns_server(answers: Mapping[str, Answer], ttl: int = 300) -> Iterator[DnsServer]:
    """Answer over UDP and TCP from a thread while the block runs. Unknown names don't exist."""
    server = DnsServer(answers, ttl=ttl)

    async def serve_tcp(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                size = struct.unpack("!H", await reader.readexactly(2))[0]
                reply = server.reply(await reader.readexactly(size), tcp=True)
                if reply is not None:
                    writer.write(struct.pack("!H", len(reply)) + reply)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def start() -> tuple[asyncio.Server, asyncio.BaseTransport]:
        loop = asyncio.get_running_loop()
        for _ in range(50):  # a port that is free for both
            tcp = await asyncio.start_server(serve_tcp, HOST, 0)
            server.port = tcp.sockets[0].getsockname()[1]
            try:
                udp, _ = await loop.create_datagram_endpoint(lambda: Datagrams(server), (HOST, server.port))
            except OSError:
                tcp.close()
                continue
            return tcp, udp
        raise OSError("no port is free for both UDP and TCP")

    async def stop(tcp: asyncio.Server, udp: asyncio.BaseTransport) -> None:
        tcp.close()
        udp.close()
        await end_tasks()

    with loop_in_thread() as run:
        tcp, udp = run(start())
        try:
            yield server
        finally:
            run(stop(tcp, udp))
