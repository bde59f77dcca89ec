"""Families together: their cells in one graph on one executor, then every family's table and figures.

A command of one family runs a study of that family alone.
"""

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from sbeval import registry
from sbeval.errors import InputError
from sbeval.report.figures import draw_figures
from sbeval.sweep import scheduler
from sbeval.sweep.cell import Cell, cell_id
from sbeval.sweep.context import Place
from sbeval.sweep.executor import Executor
from sbeval.sweep.study_file import Part
from sbeval.tables import provenance
from sbeval.tables.results import Results
from sbeval.tasks.text_model import TextModel, trained_on


def cells(part: Part) -> list[Cell]:
    """The cells that a part begins with."""
    return list(registry.task(part.family).cells(part.config))


def further(part: Part, results_dir: Path | None) -> list[Cell]:
    """The cells that follow from what the first found. Without results, as many as there can be, for an estimate."""
    more = registry.task(part.family).more
    if more is None:
        return []
    return list(more(part.config, None if results_dir is None else scheduler.results_of(cells(part), results_dir)))


def notes(parts: Sequence[Part]) -> list[str]:
    """What is not run, and why: of the families that run, and of a study the other families."""
    found: list[str] = []
    for part in parts:
        found += registry.task(part.family).notes(part.config)
    left = [name for name in registry.TASKS if name not in {part.family for part in parts}]
    if len(parts) > 1 and left:
        found.append(f"left out: {', '.join(left)}; a section in the study, or --set {left[0]}.preset=quick, adds it")
    return found


def cautions(parts: Sequence[Part], place: Place) -> list[str]:
    """What to say of how often models will read their text, before they do; texts are opened."""
    # of families that share models the text is opened once, which can take a second
    different = {
        (*trained_on(part.config), getattr(part.config, "checkpoint", None))
        if isinstance(part.config, TextModel)
        else part.family: part
        for part in parts
    }
    with scheduler.progress_of(place) as progress:
        lines = [registry.task(part.family).cautions(part.config, progress) for part in different.values()]
    return list(dict.fromkeys(line for some in lines for line in some))


def train(part: Part, place: Place, console: Console) -> bool:
    """Train the models that a part needs; True unless one ended in an error of its own."""
    for line in cautions([part], place):
        say(console, line)
    return scheduler.train(cells(part), place, console=console)


def run(parts: Sequence[Part], place: Place, console: Console, executor: Executor = scheduler.HERE) -> bool:
    """Run what has no result yet, then print, draw and say what there is; True when every cell has a result."""
    for line in cautions(parts, place):
        say(console, line)
    complete = scheduler.run(
        [cell for part in parts for cell in cells(part)],
        place,
        console=console,
        executor=executor,
        preset={part.family: part.preset for part in parts},
        # what is worth more seeds follows from what the first found
        more={part.family: functools.partial(further, part, place.results_dir) for part in parts},
    )
    everything = {part.family: [*cells(part), *further(part, place.results_dir)] for part in parts}
    if place.world.leads:
        for family, found in everything.items():
            complete &= _shown(family, found, place.results_dir, console, alone=len(parts) == 1)
        if not complete:
            _say_failed([cell for found in everything.values() for cell in found], place.results_dir, console)
    return complete


def _shown(family: str, found: Sequence[Cell], results_dir: Path, console: Console, *, alone: bool) -> bool:
    """Show what a family found; of several, one whose table cannot be drawn is said and hides no other."""
    try:
        _show(family, found, results_dir, console)
    except InputError as error:
        if alone:
            raise
        say(console, f"{family}: {error}")
        return False
    return True


def _show(family: str, found: Sequence[Cell], results_dir: Path, console: Console) -> None:
    """Print a family's table, and draw its figures and, if that is installed, its pages."""
    path = Results(results_dir).table(family)
    if not path.exists():
        return
    results = scheduler.found(scheduler.results_of(found, results_dir))
    if not len(results):
        return say(console, str(path))
    console.print(registry.task(family).summary(results))
    figures = [name for name in registry.FIGURES if registry.figure(name).TABLE == family]
    pages = [name for name in figures if name in registry.PAGES]
    files = [path, *draw_figures(results_dir, figures, ["png", "pdf"])]
    if pages and importlib.util.find_spec("plotly"):
        files += draw_figures(results_dir, pages, ["html"])
    elif pages:
        say(console, f"no page to hover over: pip install 'sbeval[html]', then sbeval plot {family.replace('_', '-')}")
    for file in files:
        say(console, str(file))


def _say_failed(found: Sequence[Cell], results_dir: Path, console: Console) -> None:
    records = {cell: Results(results_dir).run_file(cell_id(cell)) for cell in found}
    read = {cell: provenance.read_run(path) for cell, path in records.items() if path.exists()}
    failed = {cell: record["reason"] for cell, record in read.items() if record["status"] == "failed"}
    if failed:
        say(console, f"{len(failed)} of {len(found)} cells failed; the same command tries them again:")
    for cell, reason in failed.items():
        say(console, f"  {cell_id(cell)}: {reason}")


def say(console: Console, line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True, markup=False)
