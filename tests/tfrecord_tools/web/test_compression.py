"""Compressed bodies come out whole in any pieces, and a bomb never holds more than it may."""

import gzip
import tracemalloc
import zlib

import pytest
from bad_server import bomb
from hypothesis import given
from hypothesis import strategies as st

from clipkit.tfrecord_tools.web.request import CodingError, Decompressor, TooLargeError


def raw_deflate(data: bytes) -> bytes:
    stream = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return stream.compress(data) + stream.flush()


WAYS = {
    "gzip": ("gzip", gzip.compress),
    "x-gzip": ("x-gzip", gzip.compress),
    "two members": ("gzip", lambda data: gzip.compress(data[:10]) + gzip.compress(data[10:])),
    "padded": ("gzip", lambda data: gzip.compress(data) + bytes(20)),
    "zlib": ("deflate", zlib.compress),
    "raw": ("deflate", raw_deflate),
}


@given(st.binary(max_size=3000), st.sampled_from(sorted(WAYS)), st.integers(1, 500))
def test_any_pieces(data: bytes, way: str, piece: int) -> None:
    coding, compress = WAYS[way]
    sent = compress(data)
    decompressor = Decompressor(coding, len(data))
    pieces = [sent[at : at + piece] for at in range(0, len(sent), piece)]
    assert b"".join(part for each in pieces for part in decompressor.feed(each)) == data
    assert decompressor.ended
    if data:
        with pytest.raises(TooLargeError):
            Decompressor(coding, len(data) - 1).feed(sent)


def test_what_is_cut_or_no_gzip_at_all() -> None:
    decompressor = Decompressor("gzip", 10_000)
    decompressor.feed(gzip.compress(bytes(range(256)))[:-9])
    assert not decompressor.ended
    for coding in ("gzip", "deflate"):
        with pytest.raises(CodingError, match=f"body is not {coding}"):
            Decompressor(coding, 10_000).feed(b"\xff\xd8\xff\xe0 no such thing")


def test_a_bomb_holds_no_more_than_the_limit() -> None:
    body = bomb(256 << 20)
    tracemalloc.start()
    with pytest.raises(TooLargeError):
        Decompressor("gzip", 1_000_000).feed(body)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8_000_000
