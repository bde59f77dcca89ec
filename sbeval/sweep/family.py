"""The interface of a task family to the command line, studies and plans: options, presets, cells and summary."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sbeval.sweep.cell import Cell

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

    from sbeval.runtime.progress import Progress

Say = Callable[[str], None]


def unsaid(line: str) -> None:
    """Print nothing."""


def without_rates(title: str, seed: int) -> str:
    """Return the line where the cells of all learning rates have failed with the first seed."""
    return f"{title}: no learning rate has a result with seed {seed}; the other seeds are run once one has"


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A task family; each family module in `tasks/` defines one, called FAMILY. `config`: class of its presets."""

    name: str
    help: str  # of its command, one line
    config: type[Any]
    presets: Mapping[str, Any]
    # the cells of a config; InputError names unknown values
    cells: Callable[[Any], Sequence[Cell]]
    # a table for the terminal, from rows of its result table
    summary: Callable[["pd.DataFrame"], "Table"]
    # further cells, which depend on the results of the first; without results an upper bound, for an estimate. The last
    # argument prints a line
    more: Callable[[Any, "pd.DataFrame | None", Say], Sequence[Cell]] | None = None
    # lines on what is not run, and why
    notes: Callable[[Any], Sequence[str]] = lambda config: ()
    # warnings before training, about the texts that models train on
    cautions: Callable[[Any, "Progress"], Sequence[str]] = lambda config, progress: ()
    # raises InputError for names that cells would not find; for plans, which open nothing else
    check_names: Callable[[Any], None] = lambda config: None
    # options given to the command, completed by those that they imply
    completed: Callable[[dict[str, Any]], dict[str, Any]] = lambda given: given
    # the preset that the options imply if none is named; None: the default of the device
    preset: Callable[[Mapping[str, Any]], str | None] = lambda given: None
