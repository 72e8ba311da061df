"""A hash column tells exact from re-encoded from changed bodies, and says when it can't tell."""

import hashlib

import numpy as np
import pytest
from natural_images import encoded, natural
from PIL import Image

from clipkit.errors import UserError
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
    digest = hashlib.sha256(BODY).hexdigest()
    assert check_hash(BODY, digest, "sha256", PHASH) == "exact"
    assert check_hash(RE_ENCODED, digest, "sha256", PHASH) == "re-encoded"
    assert check_hash(OTHER, digest, "sha256", PHASH) == "changed"
    assert check_hash(b"<html>gone</html>", digest, "sha256", PHASH) == "changed"
    assert check_hash(BODY, digest, "sha256", PHASH ^ 0xFFFF_FFFF) == "exact"


def test_without_a_digest() -> None:
    assert check_hash(BODY, None, expected_phash=PHASH) == "re-encoded"
    assert check_hash(OTHER, "", expected_phash=PHASH) == "changed"
    assert check_hash(BODY, None) == "unchecked"
    assert check_hash(BODY, "") == "unchecked"


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        ("4594863112736816064", "sha256", "isn't sha256, which has 64 hex digits: name another column or kind"),
        ("d41d8cd98f00b204e9800998ecf8427e", "sha256", "isn't sha256"),
        ("z" * 32, "md5", "isn't md5, which has 32 hex digits"),
        ("00", "crc32", "unknown kind of hash 'crc32': choose one of md5, sha1, sha256, sha512"),
    ],
)
def test_a_wrong_column_is_said_and_not_a_difference(value: str, kind: HashKind, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_hash(BODY, value, kind)


def test_perceptual_hashes_in_tables() -> None:
    assert parse_phash("C9b6a7d8469c1959") == 0xC9B6A7D8469C1959
    assert parse_phash(0xC9B6A7D8469C1959 - (1 << 64)) == 0xC9B6A7D8469C1959
    assert parse_phash(5) == 5
    for wrong in ("c9b6", "x" * 16, 1 << 64, ""):
        with pytest.raises(UserError, match="isn't a perceptual hash"):
            parse_phash(wrong)
