"""One image–text pair on its way from an image shard into a dataset, and the reasons not to take it."""

from typing import Any, Literal, NamedTuple, get_args

from clipkit.tfrecord_tools.reasons import EMPTY_CAPTION, NO_CAPTION

# What img2dataset says about its own work: the same for all samples that reach a shard.
DROPPED_COLUMNS = frozenset({"status", "error_message"})

# The digests of an image that a URL table may give.
HashKind = Literal["md5", "sha1", "sha256", "sha512"]
HASH_KINDS: tuple[HashKind, ...] = get_args(HashKind)


class Sample(NamedTuple):
    """A pair as its shard holds it. `problem` is set by a reader that couldn't make sense of a part."""

    key: str
    image: bytes | None
    caption: str | None
    columns: dict[str, Any]
    problem: str | None = None


def caption_problem(caption: str | None) -> str | None:
    """The reason not to take a sample for its caption, or None."""
    if caption is None:
        return NO_CAPTION
    return None if caption.strip() else EMPTY_CAPTION
