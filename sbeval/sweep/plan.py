"""Dry runs: list the cells of a study or family and estimate their cost, without opening or writing anything."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from sbeval.models import decoder
from sbeval.runtime import device
from sbeval.runtime.console import say
from sbeval.sweep import cost, finished, graph, scheduler, study
from sbeval.sweep.cell import Cell, Step, TrainingStep, cell_id
from sbeval.sweep.context import RunContext
from sbeval.sweep.executor import Executor
from sbeval.sweep.study_file import Part
from sbeval.training.text_model import TextModel, likely_tokens, likely_vocabulary

NOTE = (
    "Estimates, without models that are trained already; training can stop early. Disk counts model weights (three "
    "times that while a model trains, and for what branches of schedule wsd share) and the tokens of the text, but not "
    "prompts, answers, tables and figures."
)


@dataclass(frozen=True, slots=True)
class Line:
    """A row of the plan. cells: to run; models: to train; hours: least and most; disk: bytes, None if unknown."""

    name: str
    cells: int = 0
    finished: int = 0
    models: int = 0
    flops: float = 0.0
    hours: cost.Span = (0.0, 0.0)
    disk: float | None = 0.0


def list_cells(part: Part, context: RunContext, console: Console, executor: Executor = scheduler.HERE) -> None:
    """Print the cost of each cell of a family and the total of the unfinished ones."""
    cells, later = _known(part, context)
    pending = cells if context.force else finished.unfinished(cells, context.results_dir)
    steps = graph.steps(pending)
    _list_trainings(steps, cost.untrained(steps, context), console)
    missing = set(pending)
    for cell in cells:
        say(f"{cell_id(cell)}  {_flops(cell)}{'' if cell in missing else '  finished'}", console)
    say(cost.describe(pending, context, cost.at_once(executor, context)), console)
    if later:
        known = set(steps)
        flops = sum(step.flops for step in cost.untrained(graph.steps(later), context) if step not in known)
        count = f"{len(later)} cell{'s' if len(later) > 1 else ''}"
        say(f"then at most {count} at what rates turn out best, {flops:.1e} FLOPs", console)


def list_trainings(part: Part, context: RunContext, console: Console) -> None:
    """Print the cost of each training that the cells of a family need, and the total of those that are not done."""
    steps = [step for step in graph.steps(study.cells(part)) if isinstance(step, TrainingStep)]
    untrained = cost.untrained(steps, context)
    _list_trainings(steps, untrained, console)
    say(cost.describe(untrained, context), console)


def _list_trainings(steps: Iterable[Step], untrained: Iterable[Step], console: Console) -> None:
    missing = set(untrained)
    for step in steps:
        if isinstance(step, TrainingStep):
            say(f"{step.title}  {_flops(step)}{'' if step in missing else '  trained'}", console)


def _flops(step: Step) -> str:
    """Return the cost of a step; that of a model on the hub is unknown before its download."""
    return f"{step.flops:.1e} FLOPs" if step.flops else "cost unknown"


def _known(part: Part, context: RunContext) -> tuple[list[Cell], list[Cell]]:
    """Return the known cells, and an upper bound of those that depend on their results."""
    cells = study.cells(part)
    later = study.further(part, None)
    if not later or context.force or finished.unfinished(cells, context.results_dir):
        return cells, later
    return [*cells, *study.further(part, context.results_dir)], []


def table(title: str, parts: Sequence[Part], context: RunContext) -> Table:
    """Return a table of the families of a study: cells, models, FLOPs, hours on this device, disk."""
    on_gpu = context.device.type == "cuda"
    grid = Table(title=f"{title} on {device.describe(context.device)}", caption=NOTE, caption_justify="left")
    hours = "GPU hours" if on_gpu else "hours"
    grid.add_column("", no_wrap=True)
    for name in ("cells", "finished", "models", "FLOPs", hours, "disk"):
        # a span of hours is the widest: in a narrow terminal it takes two lines, and names stay whole
        grid.add_column(name, justify="right", no_wrap=name != hours)
    rows = lines(parts, context)
    for line in rows:
        grid.add_row(*_words(line), end_section=line is rows[-1])
    grid.add_row(*_words(_all(rows)))
    return grid


def lines(parts: Sequence[Part], context: RunContext) -> list[Line]:
    """Return the rows of the text, of the training that cells share, and of each family."""
    cells = {part.family: [cell for some in _known(part, context) for cell in some] for part in parts}
    todo = {
        family: known if context.force else finished.unfinished(known, context.results_dir)
        for family, known in cells.items()
    }
    shares = {name: cost.untrained(share, context) for name, share in _shares(todo).items()}
    every = [step for share in shares.values() for step in share]
    seconds = dict(zip(every, cost.seconds(every, cost.speeds(every, context.device), context.device), strict=True))
    rows = [Line("text", disk=_text([step.reads for step in every if step.reads]))]
    for name, share in shares.items():
        parameters = {step: decoder.n_parameters(step.leaves) for step in share if step.leaves}
        pending = len(todo.get(name, ()))
        rows.append(
            Line(
                name,
                cells=pending,
                finished=len(cells.get(name, ())) - pending,
                models=len(parameters),
                flops=sum(step.flops for step in share),
                hours=_hours(seconds[step] for step in share),
                disk=4.0 * sum(step.copies * count for step, count in parameters.items()),
            )
        )
    return rows


def _hours(seconds: Iterable[cost.Span]) -> cost.Span:
    low, high = cost.total(seconds)
    return low / 3600, high / 3600


def _shares(todo: Mapping[str, Sequence[Cell]]) -> dict[str, list[Step]]:
    """Return the steps of each family, and those that train models under `training`; each step once."""
    shares: dict[str, list[Step]] = {name: [] for name in ("training", *todo)}
    seen: set[Step] = set()
    for family, cells in todo.items():
        for step in graph.steps(cells):
            if step not in seen:
                seen.add(step)
                shares[family if isinstance(step, Cell) else "training"].append(step)
    return shares


def _text(models: Sequence[TextModel]) -> float | None:
    """Return the bytes that the tokens of all corpora take in the cache; None if the size of one is unknown."""
    total = 0.0
    for corpus, tokenizer, limit in {(one.corpus, one.tokenizer, one.corpus_tokens) for one in models}:
        tokens = likely_tokens(corpus, tokenizer, limit, with_held_out=True)
        if tokens is None:
            return None
        total += tokens * (2 if likely_vocabulary(tokenizer) <= 1 << 16 else 4)
    return total


def _all(rows: Sequence[Line]) -> Line:
    disk = [line.disk for line in rows]
    return Line(
        "all",
        sum(line.cells for line in rows),
        sum(line.finished for line in rows),
        sum(line.models for line in rows),
        sum(line.flops for line in rows),
        cost.total(line.hours for line in rows),
        None if None in disk else sum(filter(None, disk)),
    )


def _words(line: Line) -> list[str]:
    hours = " to ".join(f"{hours:.2f}" if hours < 100 else f"{hours:,.0f}" for hours in line.hours)
    disk = "unknown" if line.disk is None else decimal(round(line.disk)) if line.disk else ""
    return [
        line.name,
        *(f"{count or ''}" for count in (line.cells, line.finished, line.models)),
        f"{line.flops:.1e}" if line.flops else "",
        hours if line.flops else "",
        disk,
    ]
