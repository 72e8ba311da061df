"""The column names of the URL tables that people publish.

Each comment says where the names were read. A column that a table hasn't is left out: publishers drop and add some.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from clipkit.tfrecord_tools.sample import HashKind


@dataclass(frozen=True)
class Preset:
    """Where a published table keeps the URL, the caption, and what is worth keeping beside them (where it is there)."""

    url: str
    caption: str
    keep: tuple[str, ...] = ()
    hash_column: str | None = None
    """A hash of the image as it was when the table was made; see `pictures/hash_check.py`."""
    hash_kind: HashKind | None = None
    header: tuple[str, ...] = ()
    """The columns in their order, where the text file is published without a line that names them."""


PRESETS = {
    # rom1504/img2dataset, dataset_examples/laion400m.md. NSFW is UNLIKELY, UNSURE or NSFW.
    "laion400m": Preset("URL", "TEXT", ("NSFW", "similarity", "LICENSE")),
    # laion/relaion2B-en-research and -research-safe are lists that img2dataset wrote: url, caption, similarity, hash,
    # pwatermark, punsafe, key, status, error_message, width, height, original_width, original_height, exif, md5
    # (named so by scripts that drop them after load_dataset). `md5` is of the body as fetched; `hash` is a 64-bit
    # number that isn't the image's (img2dataset issue 346), kept as the row's name.
    "relaion2b": Preset(
        "url", "caption", ("similarity", "hash", "punsafe", "pwatermark"), hash_column="md5", hash_kind="md5"
    ),
    # LAION-COCO and laion/relaion-coco: img2dataset, dataset_examples/laion-coco.md. TEXT is the alternative text of
    # the page, top_caption the synthetic caption that this set was made for.
    "relaion-coco": Preset("URL", "top_caption", ("TEXT", "similarity", "hash", "punsafe", "pwatermark")),
    # mlfoundations/datacomp, pull request 74 and issue 67: uid, url, text, original_width, original_height,
    # clip_b32_similarity_score, clip_l14_similarity_score, face_bboxes, sha256.
    "datacomp": Preset(
        "url",
        "text",
        ("uid", "clip_b32_similarity_score", "clip_l14_similarity_score"),
        hash_column="sha256",
        hash_kind="sha256",
    ),
    # kakaobrain/coyo-dataset, README ("Meta-Attributes"). Its samples of image_phash have 32 bits set, the highest
    # always among them, as ImageHash's have.
    "coyo": Preset(
        "url",
        "text",
        (
            "clip_similarity_vitb32",
            "clip_similarity_vitl14",
            "nsfw_score_opennsfw2",
            "nsfw_score_gantman",
            "watermark_score",
            "aesthetic_score_laion_v2",
        ),
        hash_column="image_phash",
        hash_kind="phash",
    ),
    # img2dataset, dataset_examples/cc12m.md and cc3m.md: a header has to be put in front of both, in other orders.
    "cc12m": Preset("url", "caption", header=("url", "caption")),
    "cc3m": Preset("url", "caption", header=("caption", "url")),
}


def fitting_presets(columns: Sequence[str]) -> list[str]:
    """The presets whose URL and caption columns are among `columns`, those with most of their other columns first."""
    fitting = [name for name, preset in PRESETS.items() if {preset.url, preset.caption} <= set(columns)]
    return sorted(fitting, key=lambda name: -len(set(PRESETS[name].keep) & set(columns)))
