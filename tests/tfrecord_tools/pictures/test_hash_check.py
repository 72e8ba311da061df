"""A hash column tells exact from re-encoded from changed bodies, and says when it can't tell."""

import hashlib

import numpy as np
import pytest
from natural_images import encoded, natural
from PIL import Image

from clipkit.pixels.phash import perceptual_hash
from clipkit.tfrecord_tools.pictures.hash_check import check_hash, parse_phash
from clipkit.tfrecord_tools.sample import HashKind

PIXELS = natural(256, 320, 1)
BODY = encoded(PIXELS, quality=95)
PHASH = perceptual_hash(PIXELS)
RE_ENCODED = encoded(np.asarray(Image.fromarray(PIXELS).resize((200, 160))), "WEBP", quality=70)
OTHER = encoded(natural(256, 320, 2), quality=95)


@pytest.mark.parametrize("kind", ["md5", "sha1", "sha256", "sha512"])
def test_digests(kind: HashKind) -> None:
    digest = hashlib.new(kind, BODY).hexdigest()
    assert check_hash(BODY, digest, kind) == "exact"
    assert check_hash(BODY, f" {digest.upper()}\n", kind) == "exact"
    assert check_hash(BODY + b"\0", digest, kind) == "differs"


def test_a_perceptual_hash_tells_re_encoded_from_changed() -> None:
    for expected in (PHASH, f"{PHASH:016X}"):
        assert check_hash(BODY, expected, "phash") == "re-encoded"
        assert check_hash(RE_ENCODED, expected, "phash") == "re-encoded"
        assert check_hash(OTHER, expected, "phash") == "changed"
        assert check_hash(b"<html>gone</html>", expected, "phash") == "changed"


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("4594863112736816064", "sha256"),
        ("d41d8cd98f00b204e9800998ecf8427e", "sha256"),
        ("z" * 32, "md5"),
        ("", "md5"),
        (None, "sha256"),
        (None, "phash"),
        ("", "phash"),
    ],
)
def test_what_is_no_hash_of_its_kind_is_not_a_difference(value: str | None, kind: HashKind) -> None:
    assert check_hash(BODY, value, kind) == "unchecked"


def test_perceptual_hashes_in_tables() -> None:
    assert parse_phash("C9b6a7d8469c1959") == 0xC9B6A7D8469C1959
    assert parse_phash(0xC9B6A7D8469C1959 - (1 << 64)) == 0xC9B6A7D8469C1959
    assert parse_phash(5) == 5
    for wrong in ("c9b6", "x" * 16, ""):
        assert parse_phash(wrong) is None
