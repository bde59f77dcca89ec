"""Run task families together: all cells in one graph on one executor, then each family's table and figures.

The command of one family runs a study of that family alone.
"""

import dataclasses
import functools
import importlib.util
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from sbeval import registry
from sbeval.errors import InputError
from sbeval.models import decoder, own
from sbeval.report.figures import draw_figures
from sbeval.runtime.console import say
from sbeval.sweep import finished, graph, scheduler
from sbeval.sweep.cell import Cell, cell_id
from sbeval.sweep.context import RunContext
from sbeval.sweep.executor import Executor
from sbeval.sweep.family import Say, unsaid
from sbeval.sweep.study_file import Part
from sbeval.tables import provenance
from sbeval.tables.results import Results
from sbeval.tables.selection import beside
from sbeval.tables.table import read
from sbeval.training.text_model import TextModel, trained_on

# cells of a family in one command: that many take seconds to list
MAX_CELLS = 10_000


def cells(part: Part) -> list[Cell]:
    """Return the first cells of a part, which depend on no results; InputError where they would be too many, or have a
    model that cannot be."""
    found = list(dict.fromkeys(cell for config in part.configs for cell in _cells(part, config)))
    for shape in {step.leaves: None for step in graph.steps(found)}:
        if shape is not None:
            # builds it without memory: a method may not take such heads, which would end its cell after hours of others
            try:
                decoder.n_parameters(shape)
            except InputError as error:
                of = f"{shape.attention} of width {shape.width} with {shape.heads} heads"
                raise InputError(f"{part.family}: {of}: {error}") from None
    return found


def _cells(part: Part, config: Any) -> list[Cell]:
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    swept = {name: len(set(some)) for name, some in values.items() if isinstance(some, tuple) and len(set(some)) > 1}
    if (count := math.prod(swept.values())) > MAX_CELLS:
        sizes = " x ".join(f"{size:,} {name}" for name, size in swept.items())
        raise InputError(f"{part.family}: {sizes} are {count:,} cells, of at most {MAX_CELLS:,}: give several studies")
    return list(registry.task(part.family).cells(config))


def method_notes(cells: Sequence[Cell], place: torch.device) -> list[str]:
    """Return lines on own methods of attention that could not be checked; InputError for one that sees what it must
    not. Nothing is trained before."""
    shapes = {
        # options of evaluation alone are the cell's
        (dataclasses.replace(step.leaves, attention=attention), step.dtype): None
        for cell in cells
        for step in (*cell.needs, cell)
        if step.leaves is not None
        for attention in (step.leaves.attention, getattr(cell, "attention", step.leaves.attention))
    }
    lines = [own.check(shape, place, dtype) for shape, dtype in shapes]
    return list(dict.fromkeys(filter(None, lines)))


def further(part: Part, results_dir: Path | None, say: Say = unsaid) -> list[Cell]:
    """Return the cells that depend on results of the first and are none of them; without a results folder an upper
    bound.

    say: prints which of them have no results to depend on.
    """
    more = registry.task(part.family).more
    if more is None:
        return []
    first: set[Cell] = set()
    found: dict[Cell, None] = {}
    for config in part.configs:
        some = _cells(part, config)
        first.update(some)
        results = None if results_dir is None else finished.results_of(some, results_dir)
        found |= dict.fromkeys(more(config, results, say))
    return [cell for cell in found if cell not in first]


def notes(parts: Sequence[Part]) -> list[str]:
    """Return lines on what is not run, and why: within the families, and for a study the other families."""
    every = (line for part in parts for config in part.configs for line in registry.task(part.family).notes(config))
    lines = list(dict.fromkeys(every))
    others = [name for name in registry.TASKS if name not in {part.family for part in parts}]
    if len(parts) > 1 and others:
        lines.append(
            f"left out: {', '.join(others)}; a section in the study, or --set {others[0]}.preset=quick, adds it"
        )
    return lines


def cautions(parts: Sequence[Part], context: RunContext) -> list[str]:
    """Return warnings about the epochs of training, before it starts; opens the texts."""
    # open the text once for families that share models: it can take a second
    different = {
        (*trained_on(config), getattr(config, "checkpoint", None)) if isinstance(config, TextModel) else part.family: (
            part.family,
            config,
        )
        for part in parts
        for config in part.configs
    }
    with scheduler.progress_of(context) as progress:
        lines = [registry.task(family).cautions(config, progress) for family, config in different.values()]
    return list(dict.fromkeys(line for some in lines for line in some))


def train(part: Part, context: RunContext, console: Console) -> bool:
    """Train the models that a part needs; return False if one failed."""
    # an option that is refused is so before a text is tokenized
    first = cells(part)
    for line in (*method_notes(first, context.device), *cautions([part], context)):
        say(line, console)
    return scheduler.train(first, context, console=console)


def run(parts: Sequence[Part], context: RunContext, console: Console, executor: Executor = scheduler.HERE) -> bool:
    """Run the unfinished cells, then print tables and draw figures; return True if every cell has a result."""
    # an option that is refused is so before a text is tokenized
    first = [cell for part in parts for cell in cells(part)]
    for line in (*method_notes(first, context.device), *cautions(parts, context)):
        say(line, console)
    complete = scheduler.run(
        first,
        context,
        console=console,
        executor=executor,
        preset={part.family: part.preset for part in parts},
        # further seeds of the best settings, which the first results decide
        more={
            part.family: functools.partial(further, part, context.results_dir, functools.partial(say, console=console))
            for part in parts
        },
    )
    everything = {part.family: [*cells(part), *further(part, context.results_dir)] for part in parts}
    if context.world.leads:
        for family, part_cells in everything.items():
            complete &= _show_family(family, part_cells, context.results_dir, console, alone=len(parts) == 1)
        if not complete:
            _say_failed(
                [cell for part_cells in everything.values() for cell in part_cells], context.results_dir, console
            )
        else:
            say(_next(context.results_dir), console)
    return complete


def _next(results_dir: Path) -> str:
    """Return a line with the command that shows results as a page of findings."""
    install = "" if importlib.util.find_spec("plotly") else "pip install 'sbeval[html]', then "
    return f"next: {install}sbeval report{_where(results_dir)} puts all results on one page, beside the paper's claims"


def _where(results_dir: Path) -> str:
    """Return the option that names a results folder in a command; none for the default."""
    return "" if results_dir == Path("results") else f" --results-dir {shlex.quote(str(results_dir))}"


def _show_family(family: str, cells: Sequence[Cell], results_dir: Path, console: Console, *, alone: bool) -> bool:
    """Show the results of a family; with several, report one that cannot be drawn and continue with the others."""
    try:
        _show(family, cells, results_dir, console)
    except InputError as error:
        if alone:
            raise
        say(f"{family}: {error}", console)
        return False
    return True


def _show(family: str, cells: Sequence[Cell], results_dir: Path, console: Console) -> None:
    """Print the table of the cells, and draw the figures of their settings and, if plotly is installed, the pages."""
    path = Results(results_dir).table(family)
    if not path.exists():
        return
    rows = finished.results_of(cells, results_dir)
    if len(rows):
        console.print(registry.task(family).summary(rows))
    results = finished.found(rows)
    if not len(results):
        return say(path, console)
    everything = read(path)
    table = beside(everything, results)
    left_out = functools.partial(say, console=console)
    names = [name for name, figure in registry.all_figures(left_out).items() if figure.TABLE == family]
    figures = [name for name in names if registry.has_rows(name, registry.gather(name, table, results_dir))]
    pages = [name for name in figures if name in registry.PAGES]
    files = [path]
    if figures:
        files += draw_figures(results_dir, figures, say=left_out, required=False, like=results)
    if pages and importlib.util.find_spec("plotly"):
        files += draw_figures(results_dir, pages, ["html"], say=unsaid, required=False, like=results)
    elif pages:
        say(f"no interactive page: pip install 'sbeval[html]', then sbeval plot {family.replace('_', '-')}", console)
    for file in files:
        say(file, console)
    if len(table) < len(everything):
        others = f"other models, training lengths, corpora or presets of {path}"
        say(f"figures leave out {others}; sbeval plot{_where(results_dir)} draws all", console)


def _say_failed(cells: Sequence[Cell], results_dir: Path, console: Console) -> None:
    records = {cell: Results(results_dir).run_file(cell_id(cell)) for cell in cells}
    read = {cell: provenance.read_run(path) for cell, path in records.items() if path.exists()}
    failed = {cell: record["reason"] for cell, record in read.items() if record["status"] == "failed"}
    if failed:
        say(f"{len(failed)} of {len(cells)} cells failed; the same command retries them:", console)
    for cell, reason in failed.items():
        say(f"  {cell_id(cell)}: {reason}", console)
