"""Is a fetched body the one that the table's hash was made of? A verdict to be stored, not a reason to drop the row.

A digest of the bytes differs as soon as the server re-encodes, resizes or strips a file that still shows the same
picture. Keeping only exact matches loses a seventh of the data: 14% of DataComp-1B (mlfoundations/datacomp issue
67, where an archived copy from years before has the server's digest, not the table's), 15% of LAION
(rom1504/img2dataset pull request 258), of which nearly all look the same as before (img2dataset pull request 198: CLIP
similarity above 0.9). So the classes are kept apart, and none is a failure.
"""

import hashlib
import re
from typing import Literal

from clipkit.errors import UserError
from clipkit.pixels.images import ImageError
from clipkit.pixels.phash import SAME_PICTURE, distance, perceptual_hash_of
from clipkit.tfrecord_tools.sample import HASH_KINDS, HashKind

HashResult = Literal["exact", "re-encoded", "changed", "differs", "unchecked"]

HEX = re.compile(r"[0-9a-f]+")


def check_hash(
    body: bytes, expected: str | None, kind: HashKind = "sha256", expected_phash: int | None = None
) -> HashResult:
    """How a body compares with what the table says of it: a digest, a perceptual hash, either or both.

    - `exact`: the digest is that of the body.
    - `re-encoded`: the digest is not, or there is none, and the perceptual hash says that it is the same picture.
    - `changed`: the perceptual hash says that it is another picture, or the body isn't a picture at all.
    - `differs`: the digest is another, and without a perceptual hash nobody can tell `re-encoded` from `changed`.
    - `unchecked`: the table says neither for this row.

    `expected` is in hex digits, in any case; `expected_phash` is an int as `pixels.phash` makes it (of a hex string
    in a table: `parse_phash`). Raises UserError as `check_digest` does.
    """
    if expected:
        digest = check_digest(expected, kind)
        if hashlib.new(kind, body, usedforsecurity=False).hexdigest() == digest:
            return "exact"
    if expected_phash is None:
        return "differs" if expected else "unchecked"
    try:
        same = distance(perceptual_hash_of(body), expected_phash) <= SAME_PICTURE
    except ImageError:
        same = False
    return "re-encoded" if same else "changed"


def check_digest(value: str, kind: HashKind) -> str:
    """A digest in small letters. Raises UserError for what can't be a digest of this kind.

    A column of another kind would make every row differ, silently: LAION's `hash` is a 64-bit number made of URL and
    text (img2dataset issue 346), and its `md5` was looked for in files that have none (issue 366).
    """
    if kind not in HASH_KINDS:
        raise UserError(f"unknown kind of hash {kind!r}: choose one of {', '.join(HASH_KINDS)}")
    digest, digits = value.strip().lower(), 2 * hashlib.new(kind, usedforsecurity=False).digest_size
    if len(digest) != digits or not HEX.fullmatch(digest):
        raise UserError(f"hash {value!r} isn't {kind}, which has {digits} hex digits: name another column or kind")
    return digest


def parse_phash(value: str | int) -> int:
    """A perceptual hash out of a table, 16 hex digits (COYO's `image_phash`) or a number. Raises UserError."""
    if isinstance(value, str):
        digits = value.strip().lower()
        if len(digits) == 16 and HEX.fullmatch(digits):
            return int(digits, 16)
    elif -(1 << 63) <= value < 1 << 64:
        return value & 0xFFFF_FFFF_FFFF_FFFF  # tables have no unsigned numbers: the highest bit is the sign
    raise UserError(f"{value!r} isn't a perceptual hash of 64 bits, which has 16 hex digits: name another column")
