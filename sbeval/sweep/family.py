"""What a task family is to the command line, studies and plans: its options, presets, cells and summary."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sbeval.sweep.cell import Cell

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

    from sbeval.runtime.progress import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A module of `tasks/` has one, called FAMILY. `config` is the class of its presets and of what `cells` takes."""

    name: str
    help: str  # of its command, in a line
    config: type[Any]
    presets: Mapping[str, Any]
    # the cells of a config; InputError names what is not known
    cells: Callable[[Any], Sequence[Cell]]
    # a table for the terminal, of rows of its result table
    summary: Callable[["pd.DataFrame"], "Table"]
    # the cells that follow from the results of those; without results as many as there can be, for an estimate
    more: Callable[[Any, "pd.DataFrame | None"], Sequence[Cell]] | None = None
    # what is not run, and why
    notes: Callable[[Any], Sequence[str]] = lambda config: ()
    # what to say before models train, of the texts that they read
    cautions: Callable[[Any, "Progress"], Sequence[str]] = lambda config, progress: ()
    # options of a command, completed by those that follow from what was given
    completed: Callable[[dict[str, Any]], dict[str, Any]] = lambda given: given
    # the preset that options are for where none is named, None for that of the device
    preset: Callable[[Mapping[str, Any]], str | None] = lambda given: None
