"""How verbs print: tables without frames, short digests, sizes."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text


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
    if count is None:
        return "-"
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
