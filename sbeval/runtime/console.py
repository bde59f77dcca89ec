"""Consoles to print on: names stand as they are, and no table is cut where the output is no terminal."""

import os
from typing import Any

from rich.console import Console

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


def say(line: object) -> None:
    """Print a line as it is, however long."""
    plain().print(line, highlight=False, soft_wrap=True)
