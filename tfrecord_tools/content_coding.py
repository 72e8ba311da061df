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
        self.stream = zlib.decompressobj(zlib.MAX_WBITS | (16 if coding in GZIP else 0))
        self.is_fresh = True

    def feed(self, data: bytes) -> list[bytes]:
        """What comes out for some more bytes. Raises CodingError, and TooLargeError when the limit is passed."""
        pieces = []
        while data:
            try:
                piece = self.stream.decompress(data, self.left + 1)
            except zlib.error as error:
                if not (self.is_fresh and self.coding == "deflate"):
                    raise CodingError(f"body is no {self.coding}: {error}") from None
                self.stream = zlib.decompressobj(-zlib.MAX_WBITS)  # without zlib's header, as old servers send it
                self.is_fresh = False
                continue
            self.is_fresh = False
            self.left -= len(piece)
            if self.left < 0:
                raise TooLargeError
            if piece:
                pieces.append(piece)
            data = self.stream.unconsumed_tail
            if self.stream.eof:
                data = self.stream.unused_data
                if not (self.coding in GZIP and data.startswith(b"\x1f\x8b")):
                    break  # what follows the end is padding
                self.stream = zlib.decompressobj(zlib.MAX_WBITS | 16)
        return pieces

    def is_whole(self) -> bool:
        """Whether the stream came to its end."""
        return self.stream.eof
