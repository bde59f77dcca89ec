"""Run the unfinished cells of a sweep, and store each result as it completes.

cell -> build or load the model, train, evaluate -> results/runs/<cell>.json -> rows of results/<family>.csv
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from rich.console import Console

from sbeval.errors import InputError, reason
from sbeval.runtime import device, distributed, files
from sbeval.runtime.progress import Heard, Progress, Task, Telling
from sbeval.sweep import pool
from sbeval.sweep.cell import FAILED, Cell, Outcome, Step, TrainingStep, cell_id
from sbeval.sweep.context import RunContext
from sbeval.sweep.executor import Executor
from sbeval.sweep.graph import Graph, steps
from sbeval.sweep.pool import Lost, Result
from sbeval.tables import check, provenance, store, table
from sbeval.tables.results import Results
from sbeval.tables.rows import Provenance
from sbeval.tables.store import Stored
from sbeval.training.trainer import DivergedError

# throughput of a model relative to a large matrix product, least and most: on a GPU that of the models in results/
EFFICIENCY = {"cpu": (0.2, 0.5), "cuda": (0.12, 0.4)}
# models no wider than this keep a GPU waiting
NARROW, NARROW_EFFICIENCY = 256, (0.006, 0.15)
HERE = Executor()
# least and most
Span = tuple[float, float]
# errors that the sizes and numbers of one cell can cause: out of memory, a kernel that does not fit, an overflow
CELL_ERRORS = (RuntimeError, MemoryError, ArithmeticError)


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


def speeds(parts: Sequence[Step], place: torch.device) -> dict[str, float]:
    """Measure the FLOP/s of a matrix product in each dtype of the steps."""
    return {dtype: device.measured_flops(place, dtype) for dtype in {step.dtype for step in parts}}


def seconds(parts: Sequence[Step], speeds: Mapping[str, float], place: torch.device) -> list[Span]:
    """Estimate the seconds that one process takes for each step, least and most."""
    found = []
    for step in parts:
        ideal = step.flops / speeds[step.dtype]
        low, high = _efficiency(step, place)
        found.append((ideal / high, ideal / low))
    return found


def _efficiency(step: Step, place: torch.device) -> Span:
    narrow = place.type == "cuda" and step.leaves is not None and step.leaves.width <= NARROW
    return NARROW_EFFICIENCY if narrow else EFFICIENCY[place.type]


def total(spans: Iterable[Span]) -> Span:
    """Return the sum of times that are known as least and most."""
    each = list(spans)
    return sum(low for low, _ in each), sum(high for _, high in each)


def untrained(parts: Sequence[Step], context: RunContext) -> list[Step]:
    """Return the steps without trainings whose finished checkpoint is there, unless the context forces them."""
    if context.force:
        return list(parts)
    return [step for step in parts if not (isinstance(step, TrainingStep) and step.trained(context))]


def at_once(executor: Executor, context: RunContext) -> int:
    """Return the number of GPUs on which the workers run cells; 1 on a CPU, whose cores they share."""
    return max(1, min(executor.workers or 1, len(device.spread(context.device))))


# from which on an estimate comes with advice
YEAR_S = 365 * 86400
IMPRACTICAL_S = 60 * 86400


def describe_cost(cells: Sequence[Step], context: RunContext, at_once: int = 1) -> str:
    """Describe the cost of the cells: FLOPs and a rough time; shared dependencies count once.

    at_once: number of GPUs that run cells in parallel.
    """
    if not cells:
        return "nothing to run"
    every = steps(cells)
    parts = untrained(every, context)
    count = f"{len(cells)} cell{'s' if len(cells) > 1 else ''} to run"
    if not any(step.flops for step in every):
        # the size of a model on the hub is unknown before its download
        return f"{count}, at a cost that is not known yet"
    at_once = min(at_once, len(cells)) * context.world.size
    low, high = total(seconds(parts, speeds(parts, context.device), context.device))
    low, high = low / at_once, high / at_once
    devices = f"{at_once} x " if at_once > 1 else ""
    where = f"{devices}{device.describe(context.device)}"
    trained = len(every) - len(parts)
    without = f" without {trained} model{'s' if trained > 1 else ''} trained already" if trained else ""
    cost = f"{count}, {sum(step.flops for step in parts):.1e} FLOPs{without}: "
    if low > IMPRACTICAL_S:
        return f"{cost}not practical on {where}, {span(low, high)}; a smaller --preset or more devices would do"
    return f"{cost}roughly {span(low, high)} on {where}"


def span(low_s: float, high_s: float) -> str:
    """Format a duration that is known as least and most: `3 to 12 min`."""
    low, high = in_words(low_s), in_words(high_s)
    if low == high:
        return low
    return f"{low.split()[0] if low.split()[1] == high.split()[1] else low} to {high}"


def in_words(time_s: float) -> str:
    """Format a duration."""
    if time_s < 90:
        return f"{max(1, round(time_s))} s"
    if time_s < 5400:
        return f"{round(time_s / 60)} min"
    if time_s < 172800:
        return f"{time_s / 3600:.1f} h"
    return f"{time_s / 86400:.0f} days" if time_s < 2 * YEAR_S else f"{time_s / YEAR_S:,.0f} years"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a step has no result. `how`: one of FAILED."""

    how: str
    reason: str


@dataclass(frozen=True, slots=True)
class Work:
    """Runs steps in any process and stores their results; reports to `progress`, or if that is None to the driver."""

    context: RunContext
    presets: Mapping[str, str]
    errors: tuple[type[Exception], ...]
    progress: Progress | None = None

    def __call__(self, step: Step) -> Failure | None:
        if self.progress is not None:
            return self._run(step, self.progress)
        device.use(self.context.device)
        with Telling(pool.tell) as progress:
            return self._run(step, progress)

    def _run(self, step: Step, progress: Progress) -> Failure | None:
        if not isinstance(step, Cell):
            assert isinstance(step, TrainingStep), "a step that is not a cell trains a model"
            result: object = self._attempt(partial(step.train, self.context, progress))
            return result if isinstance(result, Failure) else None
        with self.context.cell(cell_id(step), progress):
            return None if self._is_finished(step, progress) else self._run_cell(step, progress)

    def _run_cell(self, cell: Cell, progress: Progress) -> Failure | None:
        result = self._attempt(partial(run_cell, cell, self.context, self.presets[cell.family], progress))
        if isinstance(result, Failure):
            self.record(cell, result)
            return result
        self._keep(cell, result)
        return None

    def _attempt(self, work: Callable[[], Result]) -> Result | Failure:
        try:
            return work()
        except self.errors as error:
            if self.context.device.type == "cuda":
                torch.cuda.empty_cache()
            return Failure(*_mishap(error))

    def _is_finished(self, cell: Cell, progress: Progress) -> bool:
        """Return whether another command has finished the cell since this one began."""
        context = self.context
        found = (
            context.world.leads
            and not context.force
            # without one the table need not be read
            and context.results.run_file(cell_id(cell)).exists()
            and not unfinished([cell], context.results_dir)
            and _source_of_run(cell, context) == cell.source(progress)
        )
        return distributed.anywhere(found, context.world, context.device)

    def record(self, step: Step, failure: Failure) -> None:
        """Store that a step failed, if it is a cell."""
        if not isinstance(step, Cell):
            return
        outcome = step.failed(failure.how, self.context)
        origin = _origin(step, self.context, self.presets[step.family], outcome)
        record = provenance.run_record(
            config=step, provenance=origin, status="failed", reason=failure.reason, argv=self.context.argv
        )
        rows = table.frame(outcome.identity, outcome.rows, origin) if outcome else None
        self._keep(step, Stored(cell_id(step), record, rows))

    def _keep(self, cell: Cell, stored: Stored) -> None:
        if self.context.world.leads:
            store.keep(self.context.results, cell.family, stored)


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
    errors = _errors(context) if len(families) < 2 else (*_errors(context), InputError)
    gpus = device.spread(context.device)
    with progress_of(context) as progress, _assembled(families, context):
        work = Work(context, presets, errors, progress if executor.alone else None)
        overall = None if executor.alone else progress.add("cells", total=0)
        course = _Course(work, console, progress, dict(more or {}), overall, at_once(executor, context))
        first = course.begin(cells)
        if executor.alone and min(len(gpus), len(first)) > 1:
            course.say(f"1 of {len(gpus)} GPUs is used; --workers {len(gpus)} spreads the cells over all of them")
        for step, failure in executor.run(work, first, course.then, gpus=gpus, hear=Heard(progress)):
            if isinstance(failure, Lost):
                failure = Failure("failed", failure.reason)
                work.record(step, failure)
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
        pending = _pending(cells, self.work.context, self.progress)
        # barrier: rank 0 must not write while other ranks still read
        distributed.wait(self.work.context.world)
        if len(pending) < len(cells):
            finished = f"{len(cells) - len(pending)} of {len(cells)}"
            self.say(f"{finished} cells are finished already; --force runs them again")
        self.say(describe_cost(pending, self.work.context, self.at_once))
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
            for cell in lost:
                self.work.record(cell, Failure(failure.how, f"{step.title}: {failure.reason}"))
            ended += lost
            self.failed = True
            recorded = f"{len(lost)} cells that need it recorded" if lost else "recorded"
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
        self.console.print(line, soft_wrap=True, markup=False, highlight=False)


def train(cells: Sequence[Cell], context: RunContext, *, console: Console) -> bool:
    """Train the models that the cells need and print their checkpoints; `run` with the same cells evaluates them.

    Return False if one diverged or failed because of its own sizes.
    """
    files.prepare(context.results.checkpoints)
    needed = [step for step in steps(cells) if isinstance(step, TrainingStep)]
    console.print(describe_cost(needed, context), highlight=False, soft_wrap=True)
    errors, failed = _errors(context), False
    with progress_of(context) as progress:
        for step in needed:
            try:
                message = str(step.train(context, progress))
            except errors as error:
                failed, message = True, f"{reason(error)}; continuing with the next"
            console.print(f"{step.title}: {message}", highlight=False, soft_wrap=True, markup=False)
    if needed and not failed:
        then = "next: sbeval length-gen with the same options evaluates what was trained"
        console.print(then, highlight=False, soft_wrap=True, markup=False)
    return not failed


def _errors(context: RunContext) -> tuple[type[Exception], ...]:
    """Return the errors that end a cell but not the sweep; with several ranks only those that all of them raise."""
    return (DivergedError,) if context.world.size > 1 else CELL_ERRORS


def progress_of(context: RunContext) -> Progress:
    """Return a progress display, shown on rank 0 only, and not if the run is quiet."""
    shown = context.world.leads and not context.quiet
    return Progress(None if shown else Console(quiet=True, force_terminal=False))


def _pending(cells: Sequence[Cell], context: RunContext, progress: Progress) -> list[Cell]:
    # with `force` too: report an unreadable table before the work, not after it
    missing = set(unfinished(cells, context.results_dir, progress.say))
    if context.force:
        return list(cells)
    return [cell for cell in cells if cell in missing or _source_of_run(cell, context) != cell.source(progress)]


def _check(cells: Sequence[Cell], progress: Progress) -> None:
    """Validate the cells before any runs: those of the first model of each family, since the others equal them."""
    first: dict[str, tuple[Step, ...]] = {}
    for cell in cells:
        if first.setdefault(cell.family, cell.needs) == cell.needs:
            cell.check(progress)


def _source_of_run(cell: Cell, context: RunContext) -> str:
    """Return the digest of the text of a finished cell from its run file, which every row has."""
    return str(provenance.read_run(context.results.run_file(cell_id(cell)))["corpus_digest"])


def run_cell(cell: Cell, context: RunContext, preset: str, progress: Progress) -> Stored:
    """Run one cell and return what it stores."""
    start = time.perf_counter()
    outcome = cell.run(context, progress)
    # the last step can be the one that diverges
    if not all(math.isfinite(row.value) for row in outcome.rows):
        raise DivergedError("a measured value is not finite")
    origin = _origin(cell, context, preset, outcome)
    record = provenance.run_record(
        config=cell,
        provenance=origin,
        status="finished",
        corpus_digest=outcome.corpus_digest,
        wall_s=time.perf_counter() - start,
        tokens_per_s=outcome.tokens_per_s,
        measured=outcome.measured,
        argv=context.argv,
    )
    rows = table.frame(outcome.identity, outcome.rows, origin)
    return Stored(cell_id(cell), record, rows, outcome.values, outcome.curves)


def _mishap(error: Exception) -> tuple[str, str]:
    """Return how a step failed (one of FAILED), and the reason."""
    if isinstance(error, DivergedError):
        return "diverged", str(error)
    # torch's messages have several lines
    return "failed", str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {reason(error)}"


def _origin(cell: Cell, context: RunContext, preset: str, outcome: Outcome | None) -> Provenance:
    return provenance.collect(
        cell=cell_id(cell),
        preset=preset,
        corpus=outcome.corpus if outcome else "",
        tokenizer=outcome.tokenizer if outcome else "",
        train_tokens=outcome.train_tokens if outcome else 0,
        dtype=cell.dtype,
        device=str(context.device),
        device_name=device.describe(context.device),
        backend=outcome.backend if outcome else "",
        unique_tokens=outcome.unique_tokens if outcome else None,
        epochs=outcome.epochs if outcome else None,
    )


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
