"""Is a fetched body the one that the table's hash was made of?"""

from typing import Literal

HashKind = Literal["md5", "sha1", "sha256", "sha512"]
HashResult = Literal["exact", "re-encoded", "changed", "differs"]


def check_hash(body: bytes, expected: str, kind: HashKind, expected_phash: int | None = None) -> HashResult:
    """`exact`, `re-encoded` or `changed` (told apart by `expected_phash`), else `differs`. Raises UserError."""
    raise NotImplementedError
