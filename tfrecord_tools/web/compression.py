"""Bodies that come compressed although we ask for none: undone piece by piece, and stopped at the cap.

A gzip bomb turns 50 KB into 50 MB, and one in a gzip into far more, so no more is ever decompressed than is allowed.
"""

import zlib

GZIP = ("gzip", "x-gzip")
KNOWN = (*GZIP, "deflate")


class CodingError(Exception):
    """A body that is not what its Content-Encoding says."""


class TooLargeError(Exception):
    """A body that is larger than allowed."""


class Decompressor:
    """Undoes gzip or deflate (RFC 9110, section 8.4.1), in either wrapping that servers send, up to `limit` bytes."""

    def __init__(self, coding: str, limit: int) -> None:
        self.coding = coding
        self.left = limit
        self.stream = self.new_stream()
        self.begun = self.ended = False
        self.held = b""  # too little to tell what begins

    def new_stream(self) -> "zlib._Decompress":
        """A stream for gzip, or for deflate in zlib's wrapping."""
        return zlib.decompressobj(zlib.MAX_WBITS | (16 if self.coding in GZIP else 0))

    def feed(self, data: bytes) -> list[bytes]:
        """What comes out for some more bytes. Raises CodingError, and TooLargeError when the limit is passed."""
        pieces = []
        data, self.held = self.held + data, b""
        while data:
            if not self.begun or self.ended:
                if len(data) < 2:
                    self.held = data
                    break
                if self.ended and not (self.coding in GZIP and data.startswith(b"\x1f\x8b")):
                    break  # what follows the end is padding
                if self.ended:
                    self.stream, self.ended = self.new_stream(), False
                elif self.coding == "deflate" and not is_zlib(data):
                    self.stream = zlib.decompressobj(-zlib.MAX_WBITS)  # without the wrapping, as old servers send it
                self.begun = True
            try:
                piece = self.stream.decompress(data, self.left + 1)
            except zlib.error as error:
                raise CodingError(f"body is no {self.coding}: {error}") from None
            self.left -= len(piece)
            if self.left < 0:
                raise TooLargeError
            if piece:
                pieces.append(piece)
            self.ended = self.stream.eof
            data = self.stream.unused_data if self.ended else self.stream.unconsumed_tail
        return pieces

    def is_whole(self) -> bool:
        """Whether the stream came to its end."""
        return self.ended


def is_zlib(data: bytes) -> bool:
    """Whether two bytes are zlib's header (RFC 1950, section 2.2)."""
    return data[0] & 0x0F == 8 and (data[0] << 8 | data[1]) % 31 == 0
