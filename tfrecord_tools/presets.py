"""The column names of the URL tables that people publish."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """Where a published table keeps the URL, the caption, and what is worth keeping beside them (where it is there)."""

    url: str
    caption: str
    keep: tuple[str, ...] = ()


PRESETS = {
    "laion400m": Preset("URL", "TEXT", ("NSFW", "similarity", "LICENSE")),
    "relaion2b": Preset("url", "caption", ("similarity", "hash", "punsafe", "pwatermark")),
    "datacomp": Preset("url", "text", ("uid", "clip_b32_similarity_score", "clip_l14_similarity_score")),
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
    ),
    # Published without a header: its line has to be put in front of the file (`url<TAB>caption`) first.
    "cc12m": Preset("url", "caption"),
    "cc3m": Preset("url", "caption"),
}


def fitting_presets(columns: Sequence[str]) -> list[str]:
    """The presets whose URL and caption columns are among `columns`, those with most of their other columns first."""
    fitting = [name for name, preset in PRESETS.items() if {preset.url, preset.caption} <= set(columns)]
    return sorted(fitting, key=lambda name: -len(set(PRESETS[name].keep) & set(columns)))
