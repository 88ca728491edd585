"""How verbs print: tables without frames, short digests, sizes."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from blockflow.quantities import scaled


def print_table(console: Console, columns: Iterable[str], rows: Iterable[tuple[str, ...]]) -> None:
    """Print a table, unless it has no rows.

    Columns marked `>` hold numbers; those marked `~` are folded where the line is too short.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(
            column.lstrip(">~"),
            justify="right" if column.startswith(">") else "left",
            no_wrap=not column.startswith("~"),
            overflow="fold",
        )
    for row in rows:
        # Text: rich would read brackets in plain strings as markup.
        table.add_row(*(Text(cell) for cell in row))
    if table.row_count:
        console.print()
        console.print(table)


def short_digest(digest: str) -> str:
    return digest.removeprefix("sha256-")[:12]


def yes(value: bool) -> str:
    return "yes" if value else "no"


def size(count: int | None) -> str:
    """Bytes with a decimal unit: "1.2 MB"."""
    return "-" if count is None else scaled(count, ("B", "kB", "MB", "GB", "TB"))


def operations(count: int) -> str:
    """Floating-point operations: "1.2 GFLOP". 0 is what cannot be counted."""
    return scaled(count, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP")) if count else "-"
