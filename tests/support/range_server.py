"""A server of ranges on loopback that misbehaves on purpose: it stalls, resets, answers 500, or answers short."""

import http.server
import re
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

OK, STALL, RESET, ERROR, SHORT, MISSING = "ok", "stall", "reset", "error", "short", "missing"


class RangeServer:
    """Serves `data` under any path; the n-th request is met with `faults[n]`, those beyond with "ok"."""

    def __init__(self, data: bytes, faults: list[str]) -> None:
        self.data, self.faults = data, faults
        self.asked: list[tuple[int, int]] = []
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self.url = ""

    def next_fault(self, start: int, end: int) -> str:
        with self.lock:
            self.asked.append((start, end))
            place = len(self.asked) - 1
            return self.faults[place] if place < len(self.faults) else OK


@contextmanager
def range_server(data: bytes, faults: list[str]) -> Iterator[RangeServer]:
    """The server, running."""
    state = RangeServer(data, faults)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Accept-Ranges", "bytes")
            self.end_headers()

        def do_GET(self) -> None:
            found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            start, end = (int(found[1]), int(found[2]) + 1) if found else (0, len(data))
            fault = state.next_fault(start, end)
            body = data[start:end]
            if fault == STALL:
                state.closing.wait(60)
                self.close_connection = True
                return
            if fault == RESET:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                self.close_connection = True
                return
            if fault in (ERROR, MISSING):
                self.send_response(500 if fault == ERROR else 404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if fault == SHORT:
                body = body[: len(body) // 2]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield state
    finally:
        state.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()
