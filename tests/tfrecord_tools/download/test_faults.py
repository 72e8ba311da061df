"""A download from servers that misbehave, onto disks that refuse: each row its reason, each refusal one line."""

import errno
import io
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bad_server import bad_server, only_loopback, refusing_port
from click.testing import CliRunner
from dns_server import NXDOMAIN, SILENT, dns_server, every
from download_site import (
    JPEG,
    NETWORK,
    encoded,
    examples,
    fetch,
    file_bytes,
    numbered,
    run_in_this_process,
    write_numbered,
    write_urls,
)
from PIL import Image

from clipkit.cli.main import main
from clipkit.tfrecord_tools.account.ledger import read_ledger
from clipkit.tfrecord_tools.download import work
from clipkit.tfrecord_tools.download.worker import SHARDS_UNDER_WAY
from clipkit.tfrecord_tools.pictures.picture import PictureSettings


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The workers' part in this process, where the guard over the sockets stands."""
    monkeypatch.setattr(work, "run_jobs", run_in_this_process)
    with only_loopback():
        yield


def png_header(side: int) -> bytes:
    """A PNG that says that it has so many pixels a side, and holds almost none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack("!I", len(data)) + kind + data + struct.pack("!I", zlib.crc32(kind + data))

    head = struct.pack("!IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def animated() -> bytes:
    frames = [Image.fromarray(np.full((40, 48, 3), shade, np.uint8)) for shade in (0, 120, 255)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    return encoded("JPEG", exif=exif)


# A path of the bad server, and the reason; each has a name of its own, so that none spoils its host for another.
FAULTS = {
    "/reset": "connect",
    "/reset-body": "truncated",
    "/close": "connect",
    "/stall": "timeout",
    "/stall-body": "timeout",
    "/drip?seconds=0.2": "timeout",
    "/endless": "too-large",
    "/endless/chunked": "too-large",
    "/gzip-bomb?mb=50": "too-large",
    "/huge-length": "too-large",
    "/loop": "http-3xx",
    "/redirect?to=http://169.254.169.254/latest/meta-data": "blocked-address",
    "/redirect?to=file:///etc/passwd": "http-3xx",
    "/status/404": "http-4xx",
    "/status/503": "http-5xx",
    "/status/429?retry-after=600": "rate-limited",
    "/short-body": "truncated",
    "/html": "not-an-image",
    "/ok": "not-an-image",
    "/header?X-Robots-Tag=noai": "disallowed",
    "/header?tdm-reservation=1": "disallowed",
    # The server sends them in Latin-1.
    "/header?X-Robots-Tag=noai,%20caf%C3%A9": "disallowed",
    "/header?tdm-reservation=%C3%A9": "not-an-image",
    "/header?Content-Encoding=%C3%A9": "not-an-image",
    "/bomb.png": "too-many-pixels",
    "/status/429?retry-after=1&times=1": "not-an-image",  # it answers the second time, with no image
}
ODD_IMAGES = {
    "/animated.gif": animated(),
    "/cmyk.jpg": encoded("JPEG", "CMYK"),
    "/palette.png": encoded("PNG", "P", transparency=3),
    "/rotated.jpg": rotated(),
}


@pytest.mark.usefixtures("here")
def test_each_fault_has_its_reason(tmp_path: Path) -> None:
    """One download of all of them, with names that don't resolve and a resolver that answers one time in three."""
    site = {"/bomb.png": png_header(50_000), "/good.jpg": JPEG, **ODD_IMAGES}
    names = {f"f{number}.test": ["127.0.0.1"] for number in range(len(FAULTS))}
    flaky = {"flaky.test": every(3, ["127.0.0.1"]), "gone.test": NXDOMAIN, "silent.test": SILENT}
    with (
        bad_server(site) as server,
        dns_server({**names, **flaky, "images.test": ["127.0.0.1"], "inside.test": ["10.0.0.1"]}) as dns,
        refusing_port() as closed,
        bad_server(site, certificate="self-signed", folder=tmp_path) as tls,
    ):
        rows = [(server.url(path, f"f{number}.test"), reason) for number, (path, reason) in enumerate(FAULTS.items())]
        rows += [(server.url(path, "images.test"), None) for path in (*ODD_IMAGES, "/good.jpg")]
        rows += [
            (server.url("/good.jpg", "flaky.test"), None),
            (server.url("/good.jpg", "gone.test"), "dns"),
            (server.url("/good.jpg", "silent.test"), "dns"),
            (f"http://127.0.0.1:{closed}/a.jpg", "connect"),
            (tls.url("/good.jpg", "localhost"), "tls"),
            ("ftp://images.test/a.jpg", "bad-url"),
            (None, "bad-url"),
        ]
        urls = write_urls(tmp_path / "u.parquet", url=[url for url, _ in rows], caption=[str(url) for url, _ in rows])
        network = replace(NETWORK, timeout=1.0, deadline=8.0, max_bytes=5_000_000, resolvers=(dns.address,))
        summary = fetch(urls, tmp_path, network=network, samples_per_shard=100)
    ledger = read_ledger(summary.out / "clipkit" / "ledger" / "00000.parquet")
    found = {url: outcome.reason for (url, _), outcome in zip(rows, ledger, strict=True)}
    assert found == dict(rows)
    assert summary.downloaded == sum(reason is None for _, reason in rows) == len(examples(summary.out))
    turned = ledger[len(FAULTS) + list(ODD_IMAGES).index("/rotated.jpg")]
    assert (turned.original_width, turned.original_height) == (40, 48)
    assert all("noai" in o.decision or "tdm" in o.decision.lower() for o in ledger if o.reason == "disallowed")


@pytest.mark.usefixtures("here")
def test_private_addresses_are_not_dialled(tmp_path: Path) -> None:
    """Neither by name nor by number, without being told that they may be."""
    with dns_server({"inside.test": ["10.0.0.1"], "metadata.test": ["169.254.169.254"]}) as dns:
        urls = write_urls(
            tmp_path / "u.parquet",
            url=["http://inside.test/a", "http://metadata.test/a", "http://127.0.0.1/a", "http://0x7f.1/", "http://[::1]/"],
            caption=["a"] * 5,
        )  # fmt: skip
        network = replace(NETWORK, allow_private_hosts=False, resolvers=(dns.address,))
        summary = fetch(urls, tmp_path / "out", network=network, format="parquet")
    assert summary.failed == {"blocked-address": 5}


@pytest.mark.parametrize("certificate", ["good", "expired", "wrong-host"])
def test_certificates_are_checked(tmp_path: Path, certificate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with bad_server({"/a.jpg": JPEG}, certificate=certificate, folder=tmp_path) as server:
        monkeypatch.setenv("SSL_CERT_FILE", str(server.ca_file))
        urls = write_urls(tmp_path / "u.parquet", url=[server.url("/a.jpg")], caption=["a"])
        # In a process of its own: one that has opened connections keeps the certificates of the first.
        summary = fetch(urls, tmp_path / "out", format="webdataset", processes=1)
    assert summary.failed == ({} if certificate == "good" else {"tls": 1})


@pytest.mark.parametrize("retry", [False, True])
def test_a_run_that_is_given_out_again_asks_for_nothing_twice(
    tmp_path: Path, retry: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a worker seems lost and another gets its shards: what is there is left as it is."""

    def run_twice(function: Any, items: Any, *, describe: Any, **_: Any) -> Iterator[Any]:
        for index, item in enumerate(items):
            yield index, [function(item), function(item)][1]

    monkeypatch.setattr(work, "run_jobs", run_twice)
    with bad_server({} if retry else numbered(6)) as server:
        urls = write_numbered(tmp_path / "urls.parquet", server.url(""), 6)
        options = {"format": "parquet", "samples_per_shard": 2}
        summary = fetch(urls, tmp_path, **options)
        assert len(server.requests) == 6
        if retry:
            server.site = {path: body for path, body in numbered(6).items() if path != "/3.jpg"}
            summary = fetch(urls, tmp_path, retry_failed="http-4xx", **options)
            assert len(server.requests) == 12
    assert (summary.downloaded, summary.failed) == ((5, {"http-4xx": 1}) if retry else (6, {}))


# ---------------------------------------------------------------------------------------------------------------------
# The disk
# ---------------------------------------------------------------------------------------------------------------------


SAYS = {
    errno.ENOSPC: "the disk is full while writing {}: free some space and run the same command again",
    errno.EROFS: "can't write {} (Read-only file system): choose another output or change its permissions",
}


@pytest.mark.parametrize("format", ["tfds", "webdataset", "parquet"])
@pytest.mark.parametrize("call", ["pwrite", "replace", "fsync"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
@pytest.mark.usefixtures("here")
def test_disk_that_refuses_is_one_line_and_the_run_goes_on(tmp_path: Path, format: str, call: str, code: int) -> None:
    """Once the first shard is whole: in the spool, when a file is renamed, or when it is flushed.

    There are more shards than a worker has under way, so that some are yet to be fetched by then.
    """
    rows = 2 * 2 * SHARDS_UNDER_WAY
    with bad_server(numbered(rows)) as server:
        urls = write_numbered(tmp_path / "urls.parquet", server.url(""), rows)
        root = tmp_path / "out" / ("urls/1.0.0" if format == "tfds" else ".")
        options = {"format": format, "samples_per_shard": 2}
        command = ["download", str(urls), str(tmp_path / "out"), "--format", format, "--samples-per-shard", "2"]
        command += ["--image-size", "32", "--allow-private-hosts", "--processes", "1"]
        with pytest.MonkeyPatch.context() as patch:
            refuse(patch, call, OSError(code, os.strerror(code)), tmp_path / "out")
            result = CliRunner().invoke(main, command)
        assert result.exit_code == 2
        (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
        start, end = SAYS[code].split("{}")
        assert line.startswith(f"Error: {start}{tmp_path / 'out'}") and line.endswith(end)
        assert not [path for path in root.rglob(".*") if path.name != ".lock"]
        asked = len(server.requests)
        summary = fetch(urls, tmp_path / "out", pictures=PictureSettings(image_size=32), **options)
        assert (summary.downloaded, summary.failed) == (rows, {})
        assert len(server.requests) - asked < rows  # the first shard was done
        whole = fetch(urls, tmp_path / "whole", **options)
    assert file_bytes(summary.out) == file_bytes(whole.out)


def refuse(patch: pytest.MonkeyPatch, call: str, error: OSError, below: Path) -> None:
    """Let the disk refuse as soon as the first shard is whole."""
    original = getattr(os, call)

    def refusing(*arguments: object, **options: object) -> object:
        if any(path.name.startswith("00000") and path.suffix == ".json" for path in below.rglob("*.json")):
            raise error
        return original(*arguments, **options)

    patch.setattr(os, call, refusing)


def test_output_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only file system, before anything is fetched."""
    urls = write_urls(tmp_path / "u.parquet")
    make = os.mkdir

    def mkdir(path: str, *arguments: int) -> None:
        if str(path).startswith(str(tmp_path / "out")):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        make(path, *arguments)

    monkeypatch.setattr(os, "mkdir", mkdir)
    result = CliRunner().invoke(main, ["download", str(urls), str(tmp_path / "out")])
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1 and "Read-only file system" in result.stderr
