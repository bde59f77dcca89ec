"""Consoles to print on: names stand as they are, and no table is cut where the output is no terminal."""

import os
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

# columns of a pipe or file
WIDE = 10_000


def plain(**options: Any) -> Console:
    """Return a console that reads no markup in what it prints, such as `[a]` in a name. options: of Rich's Console.

    COLUMNS is the width where it is set.
    """
    found = Console(markup=False, emoji=False, **options)
    if not found.is_terminal and "COLUMNS" not in os.environ:
        found.width = WIDE
    return found


def say(line: object, console: Console | None = None) -> None:
    """Print a line as it is, however long."""
    (console or plain()).print(line, markup=False, highlight=False, soft_wrap=True)


def print_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table in a terminal, elsewhere plain lines with aligned columns, however wide."""
    console = plain()
    if console.is_terminal:
        grid = Table(*headings, title=title)
        for row in rows:
            grid.add_row(*row)
        console.print(grid)
        return
    widths = [max(len(row[index]) for row in (headings, *rows)) for index in range(len(headings))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (headings, *rows))
    say("\n".join([title, *(f"  {line.rstrip()}" for line in lines), ""]))
