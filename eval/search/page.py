"""The answers as a page: one HTML file with the pictures in it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clipkit.errors import UserError
from clipkit.eval.search.classify import Classified
from clipkit.eval.search.find import Hit
from clipkit.page import render
from clipkit.pixels.images import thumbnail

PICTURE_PIXELS, BARS = 384, 5


@dataclass(frozen=True)
class Tile:
    """One picture, what stands beside it, and bars from 0 to 1 by their names."""

    image: str
    """A data address; "" where the picture isn't at hand."""
    title: str
    said: tuple[str, ...] = ()
    number: str = ""
    bars: tuple[tuple[str, float], ...] = ()


def write_page(path: Path, title: str, lead: str, tiles: Sequence[Tile]) -> None:
    """Write the page. Raises UserError for a name that no browser takes for a page, and without jinja2."""
    if path.suffix not in (".html", ".htm"):
        raise UserError(f"--page {path}: call it NAME.html")
    render.write_page(path, "clipkit.eval.search", "gallery.html.j2", {"title": title, "lead": lead, "tiles": tiles})


def hit_tiles(hits: Sequence[Hit]) -> list[Tile]:
    """A tile for each image that was found."""
    return [Tile(picture(hit.image), hit.key, hit.said, f"{hit.similarity:.3f}") for hit in hits]


def classified_tiles(found: Sequence[Classified]) -> list[Tile]:
    """A tile for each image, with its most probable labels."""
    return [
        Tile(picture(each.image.read_bytes()), str(each.image), bars=tuple(each.probabilities.items())[:BARS])
        for each in found
    ]


def picture(data: bytes) -> str:
    """A small copy as a data address."""
    return render.data_url(thumbnail(data, PICTURE_PIXELS) if data else b"")
