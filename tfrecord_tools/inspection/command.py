"""The page on which a person sees what is in a dataset: one HTML file that needs no network and no other file."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipkit.formats.dataset import Dataset, open_dataset, read_layout
from clipkit.formats.features import find_caption, find_image
from clipkit.formats.manifest import CLIPKIT_FOLDER
from clipkit.formats.records import RecordError
from clipkit.formatting import counted, share, size_text
from clipkit.page.charts import histogram
from clipkit.page.render import data_url, write_page
from clipkit.pixels.images import thumbnail
from clipkit.storage.files import as_path, require_writable, write_json
from clipkit.tfrecord_tools.inspection.captions import CONTEXTS, CaptionFacts, Example, Reduction
from clipkit.tfrecord_tools.inspection.figures import SAMPLE, Inspection, inspect, usual_split
from clipkit.tfrecord_tools.inspection.histogram import Histogram
from clipkit.tfrecord_tools.inspection.pictures import Group, PictureFacts

TILES = 24
TILE_PIXELS = 112
WORDS = 40


@dataclass(frozen=True)
class InspectSummary:
    """The numbers, and where they and the page were written."""

    inspection: Inspection
    page: Path
    numbers: Path

    def to_json(self) -> dict[str, Any]:
        """The numbers, and where the page is."""
        return {**self.inspection.to_json(), "page": str(self.page)}

    def text(self) -> str:
        """A few lines for a person."""
        seen = self.inspection
        lines = [
            f"{counted(seen.records, 'record')}, {size_text(seen.bytes)} in {counted(seen.shards, 'shard')}; "
            f"looked at {seen.sampled:,}"
        ]
        if seen.captions and seen.captions.tokens:
            tokens = seen.captions.tokens
            lines.append(f"captions: mean {tokens.mean:.1f} tokens, {seen.captions.repeated:,} repeated")
        for each in seen.sources:
            mean = f", mean {each.tokens.mean:.1f} tokens" if each.tokens else ""
            records = share(each.records / max(1, seen.sampled - seen.damaged))
            lines.append(f"captions of {each.source}: in {records} of the records{mean}")
        if seen.pictures and seen.pictures.shorter_side:
            side = seen.pictures.shorter_side
            lines.append(f"pictures: median shorter side {side.median:.0f} px, {seen.pictures.repeated:,} repeated")
        if seen.damaged or (seen.pictures and seen.pictures.unreadable):
            bad = seen.damaged + (seen.pictures.unreadable if seen.pictures else 0)
            lines.append(f"{bad:,} can't be read: clipkit verify says which")
        lines.append(f"the page: {self.page}")
        return "\n".join(lines)


def inspect_dataset(
    path: Path, *, split: str | None = None, sample: int = SAMPLE, out: Path | None = None
) -> InspectSummary:
    """Look at a dataset and write `inspection.html` and `inspection.json` into `out`, by default its `clipkit` folder.

    Those of another split than the usual one have its name in theirs: `inspection-validation.html`.
    Raises UserError for what isn't a dataset, for an output that can't be written, and when jinja2 (extra `report`)
    isn't installed.
    """
    layout = read_layout(as_path(path))
    folder = require_writable(as_path(out) if out else layout.folder / CLIPKIT_FOLDER)
    stem = "inspection" if split in (None, usual_split(layout)) else f"inspection-{split}"
    page, numbers = folder / f"{stem}.html", folder / f"{stem}.json"
    inspection = inspect(path, split=split, sample=sample)
    shown = contents(inspection) | {"numbers": numbers.name}
    write_page(page, "clipkit.tfrecord_tools.inspection", "inspection.html.j2", shown)
    write_json(numbers, inspection.to_json())
    return InspectSummary(inspection, page, numbers)


def contents(inspection: Inspection) -> dict[str, Any]:
    """Everything the template shows."""
    dataset = open_dataset(inspection.path, inspection.split)
    chosen = random.Random(inspection.seed).sample(inspection.places, min(TILES, len(inspection.places)))
    pictures, captions = inspection.pictures, inspection.captions
    return {
        "seen": inspection,
        "tiles": [tile for place in chosen if (tile := tile_of(dataset, place))],
        "caption_charts": charts(
            captions,
            tokens=("captions by length (% of captions)", "text tokens, start and end counted"),
            words=("captions by words (% of captions)", "words"),
        ),
        "methods": list(dict.fromkeys(each.method for each in captions.reductions)) if captions else [],
        "contexts": CONTEXTS,
        "reductions": by_length(captions.reductions) if captions else [],
        "examples": [shown(each) for each in captions.examples] if captions else [],
        "picture_charts": charts(
            pictures,
            shorter_side=("pictures by size (% of pictures)", "shorter side, pixels"),
            aspect=("pictures by shape (% of pictures)", "width by height"),
            bytes=("pictures by bytes (% of pictures)", "bytes as stored"),
        ),
        "same": [pictured(dataset, group) for group in pictures.same] if pictures else [],
        "near": [pictured(dataset, group) for group in pictures.near] if pictures else [],
        "score_charts": [
            chart
            for name, each in inspection.scores.items()
            if (chart := chart_of(each, f"{name} (% of records)", name))
        ],
    }


def charts(facts: CaptionFacts | PictureFacts | None, **wanted: tuple[str, str]) -> list[str]:
    """The charts of some of the facts, each with its title and what its x axis says."""
    return [chart for name, told in wanted.items() if facts and (chart := chart_of(getattr(facts, name), *told))]


def chart_of(each: Histogram | None, title: str, x_name: str) -> str:
    """A histogram's chart; "" where there is none, or it has one value only."""
    return histogram(title, each.counts, each.edges, x_name=x_name) if each and each.high > each.low else ""


def by_length(reductions: Sequence[Reduction]) -> list[list[Reduction]]:
    """The rows of the table: those of one length together."""
    return [[each for each in reductions if each.context_length == context] for context in CONTEXTS]


def shown(example: Example) -> dict[str, Any]:
    """A caption with what each way keeps, as stretches of text that are kept or not; the last one fits."""
    rows: list[dict[str, Any]] = []
    for context in CONTEXTS:
        ways = {method: kept for (method, length), kept in example.kept.items() if length == context}
        if all(all(kept) for kept in ways.values()):
            rows.append(
                {"context": context, "method": "all", "parts": stretches(example.pieces, [True] * len(example.pieces))}
            )
            break
        rows += [
            {"context": context, "method": method, "parts": stretches(example.pieces, kept)}
            for method, kept in ways.items()
        ]
    return {"tokens": len(example.pieces) + 2, "rows": rows}


def stretches(pieces: Sequence[str], kept: Sequence[bool]) -> list[tuple[str, bool]]:
    """Neighbouring tokens of one fate put together: (text, kept)."""
    parts: list[tuple[str, bool]] = []
    for piece, stays in zip(pieces, kept, strict=True):
        if parts and parts[-1][1] == stays:
            parts[-1] = (parts[-1][0] + piece, stays)
        else:
            parts.append((piece, stays))
    return parts


def tile_of(dataset: Dataset, place: int) -> dict[str, Any] | None:
    """A record's small picture for the wall, with its caption or label. None if the record can't be read."""
    column, captions = find_image(dataset.features), find_caption(dataset.features)
    try:
        example = dataset.example(place) if column else {}
    except RecordError:
        return None
    picture = thumbnail(example.get(column or "") or b"", TILE_PIXELS)
    if not picture:
        return None
    caption = example[captions] if captions else None
    if captions is None and example.get("label") is not None:
        names = dataset.label_names()
        caption = names[example["label"]] if names and 0 <= example["label"] < len(names) else str(example["label"])
    words = str(caption if caption is not None else "").split()
    return {
        "place": place,
        "picture": data_url(picture),
        "caption": " ".join(words[:WORDS]) + (" …" if len(words) > WORDS else ""),
        "key": example.get("key") or example.get("file_name") or dataset.key(place),
    }


def pictured(dataset: Dataset, group: Group) -> dict[str, Any]:
    """A group of records that are alike, with the first of them to look at."""
    return {"count": group.count, "tiles": [tile for place in group.places if (tile := tile_of(dataset, place))]}
