"""One image–text pair on its way from an image shard into a dataset, and the reasons not to take it."""

from typing import Any, Literal, NamedTuple, get_args

from clipkit.formats.captions import CaptionChoice, captions_of, choose_captions
from clipkit.formats.kinds import OWN
from clipkit.tfrecord_tools.reasons import BAD_TEXT, EMPTY_CAPTION, NO_CAPTION

# What img2dataset says about its own work: the same for all samples that reach a shard.
DROPPED_COLUMNS = frozenset({"status", "error_message"})

# The hashes of an image that a URL table may give: digests of its bytes, and the perceptual one (`clipkit.pixels`).
HashKind = Literal["md5", "sha1", "sha256", "sha512", "phash"]
HASH_KINDS: tuple[HashKind, ...] = get_args(HashKind)


class Sample(NamedTuple):
    """A pair as its shard holds it. `problem` is set by a reader that couldn't make sense of a part."""

    key: str
    image: bytes | None
    caption: str | None
    columns: dict[str, Any]
    problem: str | None = None


def drop_account(columns: dict[str, Any]) -> None:
    """Take out what a download says of its own work in a sample's columns, but not a user's columns of such names."""
    status, message = (OWN + "status", OWN + "error_message")
    if status not in columns:
        status, message = ("status", "error_message")
        if columns.get(status) != "success" or columns.get(message, "missing") not in (None, ""):
            return
    del columns[status]
    columns.pop(message, None)


def samples_of(found: Sample, choice: CaptionChoice | None, place: object) -> tuple[Sample, ...]:
    """A sample as a reader found it, its caption of any kind (`clipkit.formats.captions`), or one for each that is
    chosen of several captions.

    Raises UserError, naming the `place`, for several captions without a choice, and for a struct.
    """
    caption: Any = found.caption
    if type(caption) is str or caption is None:
        return (found,)
    found = found._replace(caption=None)
    try:
        captions = captions_of(caption, place)
    except UnicodeDecodeError:
        return (found._replace(problem=BAD_TEXT),)
    chosen = choose_captions(captions, choice, found.key, place)
    return tuple(found._replace(caption=text) for text in chosen) or (found,)


def caption_problem(caption: str | None) -> str | None:
    """The reason not to take a sample for its caption, or None."""
    if caption is None:
        return NO_CAPTION
    return None if caption.strip() else EMPTY_CAPTION
