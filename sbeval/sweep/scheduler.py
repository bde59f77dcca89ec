"""Schedule the unfinished cells of a sweep: each step begins when those that it needs are done."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from rich.console import Console

from sbeval.errors import InputError, reason
from sbeval.runtime import device, distributed, files
from sbeval.runtime.console import say
from sbeval.runtime.progress import Heard, Progress, Task
from sbeval.sweep import cost, finished
from sbeval.sweep.cell import Cell, Step, TrainingStep
from sbeval.sweep.context import RunContext
from sbeval.sweep.executor import Executor
from sbeval.sweep.graph import Graph, steps
from sbeval.sweep.pool import Lost
from sbeval.sweep.work import Failure, Work, errors_of
from sbeval.tables import table

HERE = Executor()


def run(
    cells: Sequence[Cell],
    context: RunContext,
    *,
    preset: str | Mapping[str, str],
    console: Console,
    executor: Executor = HERE,
    more: Mapping[str, Callable[[], Sequence[Cell]]] | None = None,
) -> bool:
    """Run the cells without a result, or with one from another text; return True if every cell now has one.

    A cell that diverges, or fails because of its own sizes, is recorded as such and the sweep continues; with several
    families this holds for an InputError too. Dependencies that cells share run first.
    preset: of all cells, or by family. more: by family, returns further cells once the given ones are done.
    """
    if executor.kind == "ray" and context.device.index is not None:
        raise InputError(f"--device {context.device}: a Ray task sees only the GPU that Ray assigns; give cuda or cpu")
    for folder in (context.results.runs, context.results.checkpoints):
        files.prepare(folder)
    for folder in context.results.written:
        files.remove_left(folder)
    families = dict.fromkeys(cell.family for cell in cells)
    presets = dict.fromkeys(families, preset) if isinstance(preset, str) else preset
    gpus = device.spread(context.device)
    with progress_of(context) as progress, _assembled(families, context):
        work = Work(context, presets, errors_of(context, len(families)), progress if executor.alone else None)
        overall = None if executor.alone else progress.add("cells", total=0)
        course = _Course(work, console, progress, dict(more or {}), overall, cost.at_once(executor, context))
        first = course.begin(cells)
        if executor.alone and min(len(gpus), len(first)) > 1:
            course.say(f"1 of {len(gpus)} GPUs is used; --workers {len(gpus)} spreads the cells over all of them")
        for step, failure in executor.run(work, first, course.then, gpus=gpus, hear=Heard(progress)):
            if isinstance(failure, Lost):
                failure = work.record(step, Failure("failed", failure.reason), progress)
            course.note(step, failure)
        if overall:
            overall.close()
    return not course.failed


@contextmanager
def _assembled(families: Iterable[str], context: RunContext) -> Iterator[None]:
    """Add the rows of finished cells to the tables at the end of the block, also of one that is interrupted.

    After a kill a reader finds them in the parts, and the next run adds them.
    """
    tables = [context.results.table(family) for family in families] if context.world.leads else []
    try:
        yield
    except BaseException:
        # the first error is what is reported: with a full disk there are two
        with suppress(InputError):
            for path in tables:
                table.assemble(path)
        raise
    for path in tables:
        table.assemble(path)


@dataclass(slots=True)
class _Course:
    """Scheduler state in the driver: which steps have ended, and which may begin."""

    work: Work
    console: Console
    progress: Progress
    more: dict[str, Callable[[], Sequence[Cell]]]
    overall: Task | None
    at_once: int = 1
    failed: bool = False
    graph: Graph = field(default_factory=Graph)
    waiting: dict[str, set[Step]] = field(default_factory=dict)  # unfinished cells by family

    def begin(self, cells: Sequence[Cell]) -> list[Step]:
        """Add cells, and those that follow finished ones, and return the steps that are ready."""
        pending = finished.pending(cells, self.work.context, self.progress)
        # barrier: rank 0 must not write while other ranks still read
        distributed.wait(self.work.context.world)
        if len(pending) < len(cells):
            done = f"{len(cells) - len(pending)} of {len(cells)}"
            self.say(f"{done} cells are finished already; --force runs them again")
        self.say(cost.describe(pending, self.work.context, self.at_once))
        ready = self.graph.add(pending)
        _check(pending, self.progress)
        if self.overall:
            self.overall.extend(len(pending))
        for family in dict.fromkeys(cell.family for cell in cells):
            self.waiting[family] = {cell for cell in pending if cell.family == family}
            ready += self.following(family)
        return ready

    def note(self, step: Step, failure: Failure | None) -> None:
        """Note that a step has ended; if it failed, record its dependents as failed too."""
        ended = [step] if isinstance(step, Cell) else []
        if failure:
            lost = [other for other in self.graph.lost(step) if isinstance(other, Cell)]
            cause = Failure(failure.how, f"{step.title}: {failure.reason}")
            count = sum(self.work.record(cell, cause, self.progress) is not None for cell in lost)
            ended += lost
            self.failed = True
            recorded = f"{count} cells that need it recorded" if lost else "recorded"
            self.say(f"{step.title}: {failure.reason}; {recorded} as {failure.how}, continuing with the next")
        for cell in ended:
            self.waiting[cell.family].discard(cell)
            if self.overall:
                self.overall.advance(status=cell.title)

    def then(self, step: Step) -> list[Step]:
        """Return the steps that are ready after a step."""
        return self.graph.done(step) + [new for family in self.waiting.copy() for new in self.following(family)]

    def following(self, family: str) -> list[Step]:
        """Return the ready steps of the cells that follow those of a family, once these are done."""
        if self.waiting[family] or family not in self.more:
            return []
        cells = self.more.pop(family)()
        return self.begin(cells) if cells else []

    def say(self, line: str) -> None:
        say(line, self.console)


def train(cells: Sequence[Cell], context: RunContext, *, console: Console) -> bool:
    """Train the models that the cells need and print their checkpoints; `run` with the same cells evaluates them.

    Return False if one diverged or failed because of its own sizes.
    """
    files.prepare(context.results.checkpoints)
    needed = [step for step in steps(cells) if isinstance(step, TrainingStep)]
    say(cost.describe(cost.untrained(needed, context), context), console)
    errors, failed = errors_of(context), False
    with progress_of(context) as progress:
        for step in needed:
            try:
                message = str(step.train(context, progress))
            except errors as error:
                failed, message = True, f"{reason(error)}; continuing with the next"
            say(f"{step.title}: {message}", console)
    if needed and not failed:
        say("next: sbeval length-gen with the same options evaluates what was trained", console)
    return not failed


def progress_of(context: RunContext) -> Progress:
    """Return a progress display, shown on rank 0 only, and not if the run is quiet."""
    shown = context.world.leads and not context.quiet
    return Progress(None if shown else Console(quiet=True, force_terminal=False))


def _check(cells: Sequence[Cell], progress: Progress) -> None:
    """Validate the cells before any runs: those of the first model of each family, since the others equal them."""
    first: dict[str, tuple[Step, ...]] = {}
    for cell in cells:
        if first.setdefault(cell.family, cell.needs) == cell.needs:
            cell.check(progress)
