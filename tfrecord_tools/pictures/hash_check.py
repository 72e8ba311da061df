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

from clipkit.pixels.images import ImageError
from clipkit.pixels.phash import SAME_PICTURE, distance, perceptual_hash_of
from clipkit.tfrecord_tools.sample import HashKind

HashResult = Literal["exact", "re-encoded", "changed", "differs", "unchecked"]
# The image isn't the one that the table means, as far as anybody can tell.
CHANGED: tuple[HashResult, ...] = ("changed", "differs")

HEX = re.compile(r"[0-9a-f]+")


def check_hash(body: bytes, expected: str | int | None, kind: HashKind) -> HashResult:
    """How a body compares with the hash that the table gives, hex digits in any case, or a number for `phash`.

    - `exact`: the digest is that of the body.
    - `differs`: the digest is another, and nobody can tell whether the picture is.
    - `re-encoded`: the perceptual hash says that it is the same picture.
    - `changed`: the perceptual hash says that it is another picture, or the body isn't a picture at all.
    - `unchecked`: the table has none for this row, or what can't be a hash of this kind.

    A column of another kind would otherwise make every row differ, silently: LAION's `hash` is a 64-bit number made of
    URL and text (img2dataset issue 346), and its `md5` was looked for in files that have none (issue 366).
    """
    if kind == "phash":
        number = parse_phash(expected)
        if number is None:
            return "unchecked"
        try:
            same = distance(perceptual_hash_of(body), number) <= SAME_PICTURE
        except ImageError:
            same = False
        return "re-encoded" if same else "changed"
    digits = expected.strip().lower() if isinstance(expected, str) else ""
    found = hashlib.new(kind, usedforsecurity=False)
    if len(digits) != 2 * found.digest_size or not HEX.fullmatch(digits):
        return "unchecked"
    found.update(body)
    return "exact" if found.hexdigest() == digits else "differs"


def parse_phash(value: str | int | None) -> int | None:
    """A perceptual hash out of a table, 16 hex digits (COYO's `image_phash`) or a number; None for anything else."""
    if isinstance(value, str):
        digits = value.strip().lower()
        return int(digits, 16) if len(digits) == 16 and HEX.fullmatch(digits) else None
    return None if value is None else value & 0xFFFF_FFFF_FFFF_FFFF  # of signed ones the highest bit is the sign
