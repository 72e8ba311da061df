"""Results as tables for the screen, papers and spreadsheets: in colours, as aligned text, Markdown, LaTeX, CSV."""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from clipkit.config import to_json
from clipkit.eval.results import Result, counted_on, result_cells

if TYPE_CHECKING:
    from rich.table import Table

TableFormat = Literal["table", "csv", "md", "latex"]
LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "−": "$-$"}


@dataclass(frozen=True)
class Grid:
    """A table of texts."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def grid_text(grid: Grid, style: Literal["table", "md", "latex"]) -> str:
    """A grid as aligned columns, as Markdown, or as a LaTeX tabular."""
    lines = [grid.header, *grid.rows]
    if style == "latex":
        body = [" & ".join(map(latex, line)) + r" \\" for line in lines]
        body.insert(1, r"\hline")
        columns = "l" * len(grid.header)
        return "\n".join([f"% {grid.title}", rf"\begin{{tabular}}{{{columns}}}", *body, r"\end{tabular}"])
    if style == "md":
        cells = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
        return "\n".join([f"**{grid.title}**", "", cells[0], "|" + "---|" * len(grid.header), *cells[1:]])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join(line.rstrip() for line in [grid.title, *aligned])


def latex(text: str) -> str:
    """A text with LaTeX's own characters escaped."""
    return re.sub(r"[\\~^–−&%$#_{}]", lambda found: LATEX.get(found[0], "\\" + found[0]), text)


def csv_text(records: Sequence[Mapping[str, Any]]) -> str:
    """Records of the same keys as CSV with a header; the shares as they are, not as percentages."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return buffer.getvalue().rstrip("\n")


def results_text(results: Sequence[Result], style: TableFormat) -> str:
    """Results of any tasks, a row each."""
    if style == "csv":
        lines: list[dict[str, Any]] = [to_json(result) for result in results]
        hashes = sorted({name for line in lines for name in line["hashes"]})
        for line in lines:
            line |= {f"hash_{name}": line["hashes"].get(name, "") for name in hashes}
            line["notes"] = "; ".join(line["notes"])
            del line["hashes"]
        return csv_text(lines)
    rows = []
    for each in results:
        *cells, remark = result_cells(each)
        rows.append([each.task, *cells, f"{each.n:,}", remark])
    header = ["task", "metric", "value", "95% interval", "chance", "n", ""]
    models = list(dict.fromkeys(result.checkpoint for result in results))
    if len(models) > 1:
        header = ["model", *header]
        rows = [[each.checkpoint, *row] for each, row in zip(results, rows, strict=True)]
    return grid_text(Grid(", ".join(models), header, rows), style)


def table(results: Sequence[Result], dash: str = "–") -> "Table":
    """The results of one task as a table for the screen, each beside chance; `dash` is for intervals."""
    from rich.table import Table
    from rich.text import Text

    # Names may have square brackets, which rich would take for its own markup.
    grid = Table(
        title=Text(f"{results[0].task}: {counted_on(results)}", style="italic"),
        title_justify="left",
        box=None,
        pad_edge=False,
        header_style="bold",
    )
    for name in ("metric", "value", "95% interval", "chance"):
        grid.add_column(name, justify="left" if name == "metric" else "right", no_wrap=True)
    grid.add_column("")
    for result in results:
        *cells, remark = result_cells(result, dash)
        grid.add_row(*map(Text, (*cells, remark)), style="yellow" if remark else None)
    return grid
