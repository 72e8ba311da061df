"""What became of one row of a URL table: one object from the request to the ledger."""

from dataclasses import dataclass


@dataclass(slots=True)
class RowOutcome:
    """What became of one row, as the ledger keeps it. An image is there exactly when `reason` is None.

    `decision` is what the host's headers said about use of the image, `hash_check` how it compares with the table's
    hash, each "" when there was nothing to say. `body_bytes` is the size as fetched, `jpg_bytes` as stored; sides are
    in pixels. `offset` is where the record begins in its TFRecord file, in bytes.
    """

    reason: str | None = None
    message: str = ""
    http_status: int | None = None
    decision: str = ""
    attempts: int = 0
    body_bytes: int | None = None
    jpg_bytes: int | None = None
    width: int | None = None
    height: int | None = None
    original_width: int | None = None
    original_height: int | None = None
    exif: str | None = None
    sha256: str | None = None
    hash_check: str = ""
    offset: int | None = None
