"""How numbers, sizes, shares and times are written for people, in messages, progress lines and pages alike."""

from collections.abc import Iterable, Mapping, Sequence


def duration(seconds: float) -> str:
    """Seconds as a person says them: `42s`, `3m 05s`, `2h 10m`, `3d 4h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d {whole % 86400 // 3600}h"


def size_text(count: float) -> str:
    """Bytes as a person says them, in decimal units: `950 B`, `12.3 kB`, `256.0 MB`, `1.5 TB`."""
    for limit, unit in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= limit * 0.99995:  # what would be said as 1000.0 of the unit below
            return f"{count / limit:,.1f} {unit}"
    return f"{count:.0f} B"


def counted(number: int, one: str, many: str = "") -> str:
    """A number with its noun: `1 shard`, `1,024 shards`; `many` where the plural isn't `one` with an s."""
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


def counts_text(counts: Mapping[str, int]) -> str:
    """What was counted by name: `dns 1,024, timeout 12`."""
    return ", ".join(f"{name} {number:,}" for name, number in counts.items())


def short(value: float) -> str:
    """A number in at most four characters or so: 950, 12.8k, 3.2M, 0.0002 as 2e-4."""
    if value == 0:
        return "0"
    size = abs(value)
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if size >= limit * 0.9995:
            return f"{value / limit:.3g}{unit}"
    if size < 0.001:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.3g}"


def share(value: float) -> str:
    """A share as a percentage."""
    return f"{value * 100:.3g}%"


def percent(share: float) -> str:
    """A share as a percentage: two digits below 1%, one above."""
    return f"{share:.2%}" if share < 0.01 else f"{share:.1%}"


def count(number: float) -> str:
    """A whole number with separators."""
    return f"{number:,.0f}"


def short_flops(flops: float) -> str:
    """Operations in two digits: 1.4e20."""
    return f"{flops:.1e}".replace("e+", "e")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> None:
    """A table on stdout, of words in the first columns and of numbers in the others."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number >= words else "left")
    for row in rows:
        table.add_row(*row)
    Console(markup=False, emoji=False).print(table)
