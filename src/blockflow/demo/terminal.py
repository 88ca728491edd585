"""How the demo speaks: what is under way, headings, plain tables, units."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table


@contextlib.contextmanager
def working(console: Console, what: str) -> Iterator[Callable[[str], None]]:
    """Say what is under way: a spinner on a terminal, a line elsewhere. Yields what adds detail."""
    if not console.is_terminal:
        console.print(f"{what} …", markup=False)
        yield lambda _: None
        return
    with console.status(f"{escape(what)} …") as status:
        yield lambda detail: status.update(f"{escape(what)}: {escape(detail)} …")


def print_heading(console: Console, text: str) -> None:
    console.print()
    console.print(text, style="bold underline")


def table(*columns: str, title: str | None = None) -> Table:
    """Columns marked `>` hold numbers."""
    made = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for column in columns:
        made.add_column(
            column.lstrip(">"), justify="right" if column.startswith(">") else "left", no_wrap=True
        )
    return made


def kilobytes(count: int) -> str:
    return f"{count / 1e3:,.1f} kB"


def milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} ms"
