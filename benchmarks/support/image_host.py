"""A host of images for the benchmark of downloads: answers made once, a delay before each, HTTP or HTTPS.

Run as a process of its own: `image_host.py FOLDER LATENCY [CERTIFICATE]` serves the files `FOLDER/N.jpg` under
`/N.jpg` (whatever stands behind a `?`), prints its port, and ends with its standard input.
"""

import asyncio
import datetime
import ipaddress
import ssl
import sys
from pathlib import Path

HOST = "127.0.0.1"


class Connection(asyncio.Protocol):
    """One client; requests are answered in their order, each after the delay."""

    def __init__(self, answers: dict[bytes, bytes], latency: float) -> None:
        self.answers, self.latency = answers, latency
        self.received = b""
        self.loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.set_write_buffer_limits(high=1 << 24)

    def data_received(self, data: bytes) -> None:
        self.received += data
        while (end := self.received.find(b"\r\n\r\n")) >= 0:
            request, self.received = self.received[:end], self.received[end + 4 :]
            self.loop.call_later(self.latency, self.answer, request)

    def answer(self, request: bytes) -> None:
        if self.transport.is_closing():
            return
        path = request.split(b" ", 2)[1].partition(b"?")[0]
        self.transport.write(self.answers.get(path, b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"))
        if b"connection: close" in request.lower():
            self.transport.close()


def read_answers(folder: Path) -> dict[bytes, bytes]:
    """The whole response for each path."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n"
    bodies = {path.name.encode(): path.read_bytes() for path in folder.glob("*.jpg")}
    return {b"/" + name: head % len(body) + body for name, body in bodies.items()}


def make_certificate(folder: Path) -> None:
    """`ca.pem`, and `server.pem` for 127.0.0.1 signed by it."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "benchmark")])
    made = []
    for number, key in enumerate(keys):
        subject = issuer if number == 0 else x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, HOST)])
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - day)
            .not_valid_after(now + day)
            .add_extension(x509.BasicConstraints(ca=number == 0, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(keys[0].public_key()), critical=False)
        )
        if number:
            names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(HOST))])
            builder = builder.add_extension(names, critical=False)
        made.append(builder.sign(keys[0], hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    private = keys[1].private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "ca.pem").write_bytes(made[0])
    (folder / "server.pem").write_bytes(private + made[1])


async def serve(answers: dict[bytes, bytes], latency: float, context: ssl.SSLContext | None) -> None:
    """Serve until the standard input ends."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(answers, latency), HOST, 0, ssl=context, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    server.close()


def main() -> None:
    folder, latency, *certificate = sys.argv[1:]
    context = None
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate[0])
    asyncio.run(serve(read_answers(Path(folder)), float(latency), context))


if __name__ == "__main__":
    main()
