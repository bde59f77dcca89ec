"""Cells that have results, and their rows: a cell without them, or with those of another text, is run."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from sbeval.runtime.progress import Progress
from sbeval.sweep.cell import FAILED, Cell, cell_id
from sbeval.sweep.context import RunContext
from sbeval.tables import check, provenance, table
from sbeval.tables.results import Results


def unfinished(cells: Sequence[Cell], results_dir: Path, say: Callable[[str], None] = lambda line: None) -> list[Cell]:
    """Return the cells without rows in their table, or with others than their run wrote, of which `say` tells.

    InputError if a table is unreadable or has other columns.
    """
    results, names = Results(results_dir), {cell_id(cell) for cell in cells}
    paths = {results.table(cell.family): table.required(cell.row) for cell in cells}
    done: set[str] = set()
    for path, columns in paths.items():
        if not path.exists():
            continue
        rows = table.text(path, columns)
        rows = rows[rows["cell"].isin(names)]
        changed = {each.cell for each in check.differences(rows, results)}
        if changed:
            count = f"{len(changed)} cell{'s' * (len(changed) > 1)}"
            say(f"{path}: the rows of {count}, such as {min(changed)}, are not what the run wrote, which starts over")
        done.update(set(found(rows)["cell"]) - changed)
    return [cell for cell in cells if cell_id(cell) not in done]


def found(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of cells that did not fail."""
    return rows[~rows["status"].isin(FAILED)] if "status" in rows else rows


def pending(cells: Sequence[Cell], context: RunContext, progress: Progress) -> list[Cell]:
    """Return the cells to run: those without a result, or with one from another text; with `force` all."""
    # with `force` too: report an unreadable table before the work, not after it
    missing = set(unfinished(cells, context.results_dir, progress.say))
    if context.force:
        return list(cells)
    return [cell for cell in cells if cell in missing or not is_of_its_text(cell, context, progress)]


def is_of_its_text(cell: Cell, context: RunContext, progress: Progress) -> bool:
    """Return whether a finished cell is of the text that it reads now; its run file has the digest."""
    run = provenance.read_run(context.results.run_file(cell_id(cell)))
    return str(run["corpus_digest"]) == cell.source(progress)


def results_of(cells: Sequence[Cell], results_dir: Path) -> pd.DataFrame:
    """Return the rows of these cells, which are of one family, from its table; none where all have failed."""
    path, row = Results(results_dir).table(cells[0].family), cells[0].row
    if path.exists():
        rows = table.read(path, table.required(row))
        rows = rows[rows["cell"].isin([cell_id(cell) for cell in cells])]
        if len(rows):
            return rows
    # with columns that an older table lacks
    return pd.DataFrame(columns=list(table.columns(row)))
