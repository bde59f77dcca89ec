"""Run the cells of a sweep that have no result yet, and keep each as it finishes.

cell -> build or load the model, train, evaluate -> results/runs/<cell>.json -> rows of results/<family>.csv
"""

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console

from sbeval.errors import InputError
from sbeval.runtime import device, distributed, files
from sbeval.runtime.progress import Heard, Progress, Task, Telling
from sbeval.sweep import pool
from sbeval.sweep.cell import FAILED, Cell, Outcome, Step, TrainingStep, cell_id
from sbeval.sweep.context import Place
from sbeval.sweep.executor import Executor
from sbeval.sweep.graph import Graph, steps
from sbeval.sweep.pool import Lost
from sbeval.tables import provenance, table
from sbeval.tables.results import Results
from sbeval.tables.rows import Provenance
from sbeval.training.trainer import DivergedError

# what a small model reaches of the speed of a large matrix product: a guess, good enough for an estimate
EFFICIENCY = {"cpu": 0.35, "cuda": 0.25}
HERE = Executor()
# what a cell's own sizes and numbers can cause: a device short of memory, a kernel that does not fit, an overflow
CELL_ERRORS = (RuntimeError, MemoryError, ArithmeticError)


def unfinished(cells: Sequence[Cell], results_dir: Path) -> list[Cell]:
    """The cells without rows in their table; InputError when a table cannot be read or could not take their rows."""
    paths = {Results(results_dir).table(cell.family): table.required(cell.row) for cell in cells}
    done: set[str] = set()
    for path, names in paths.items():
        if path.exists():
            done.update(found(table.read(path, names))["cell"])
    return [cell for cell in cells if cell_id(cell) not in done]


def found(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows without those that say that a cell found nothing."""
    return rows[~rows["status"].isin(FAILED)] if "status" in rows else rows


def speeds(parts: Sequence[Step], place: torch.device) -> dict[str, float]:
    """FLOP/s of a matrix product timed just now, in each dtype of the steps."""
    return {dtype: device.measured_flops(place, dtype) for dtype in {step.dtype for step in parts}}


def seconds(parts: Sequence[Step], speeds: Mapping[str, float], place: torch.device) -> list[float]:
    """How long one process takes for each step, roughly."""
    return [step.flops / speeds[step.dtype] / EFFICIENCY[place.type] for step in parts]


def at_once(executor: Executor, place: Place) -> int:
    """On how many GPUs of this machine its workers run cells: 1 of a CPU too, whose cores they share."""
    return max(1, min(executor.workers or 1, len(device.spread(place.device))))


def describe_cost(cells: Sequence[Step], place: Place, at_once: int = 1) -> str:
    """What the cells will cost, in words: FLOPs and a rough time; what several need is counted once.

    at_once: GPUs that share them out.
    """
    if not cells:
        return "nothing to run"
    parts = steps(cells)
    count = f"{len(cells)} cell{'s' if len(cells) > 1 else ''} to run"
    if not any(step.flops for step in parts):
        # a model of the hub, whose size is not known before it is here
        return f"{count}, at a cost that is not known yet"
    at_once = min(at_once, len(cells)) * place.world.size
    time_s = sum(seconds(parts, speeds(parts, place.device), place.device)) / at_once
    devices = f"{at_once} x " if at_once > 1 else ""
    return (
        f"{count}, {sum(step.flops for step in parts):.1e} FLOPs: "
        f"roughly {in_words(time_s)} on {devices}{device.describe(place.device)}"
    )


def in_words(time_s: float) -> str:
    """A time for people."""
    if time_s < 90:
        return f"{max(1, round(time_s))} s"
    if time_s < 5400:
        return f"{round(time_s / 60)} min"
    return f"{time_s / 3600:.1f} h" if time_s < 172800 else f"{time_s / 86400:.0f} days"


@dataclass(frozen=True, slots=True)
class Done:
    """What a step leaves: of a cell its run file, and its rows if there are any. `how` is empty or one of FAILED."""

    record: dict[str, Any] | None = None
    rows: pd.DataFrame | None = None
    how: str = ""
    reason: str = ""
    emptied: frozenset[Path] = frozenset()


@dataclass(frozen=True, slots=True)
class Work:
    """Runs steps wherever they are sent, and shows them on `progress`, where one is given, else tells of them."""

    place: Place
    presets: Mapping[str, str]
    errors: tuple[type[Exception], ...]
    argv: tuple[str, ...]
    progress: Progress | None = None

    def __call__(self, step: Step) -> Done:
        if self.progress is not None:
            return self._done(step, self.progress)
        sys.argv = list(self.argv)
        device.use(self.place.device)
        with Telling(pool.tell) as progress:
            return self._done(step, progress)

    def _done(self, step: Step, progress: Progress) -> Done:
        try:
            done = self._attempt(step, progress)
        except self.errors as error:
            if self.place.device.type == "cuda":
                torch.cuda.empty_cache()
            done = self.failure(step, *_mishap(error))
        # elsewhere `place` is a copy
        return dataclasses.replace(done, emptied=frozenset(self.place.emptied))

    def _attempt(self, step: Step, progress: Progress) -> Done:
        if isinstance(step, Cell):
            return run_cell(step, self.place, self.presets[step.family], progress)
        assert isinstance(step, TrainingStep), "what is no cell trains a model"
        step.train(self.place, progress)
        return Done()

    def failure(self, step: Step, how: str, reason: str) -> Done:
        """What a step leaves that failed."""
        if not isinstance(step, Cell):
            return Done(how=how, reason=reason)
        outcome = step.failed(how, self.place)
        origin = _origin(step, self.place, self.presets[step.family], outcome)
        record = provenance.run_record(config=step, provenance=origin, status="failed", reason=reason)
        return Done(record, table.frame(outcome.identity, outcome.rows, origin) if outcome else None, how, reason)


def run(
    cells: Sequence[Cell],
    place: Place,
    *,
    preset: str | Mapping[str, str],
    console: Console,
    executor: Executor = HERE,
    more: Mapping[str, Callable[[], Sequence[Cell]]] | None = None,
) -> bool:
    """Run what has no result yet, or one from another text; True when every cell has one now.

    A cell whose loss diverges, or that ends in an error of its own sizes, is recorded as such, and the sweep goes on;
    of several families also one that ends in an error of the user's. What several cells need is done before them.
    preset: of all cells, or of each family. more: by family, the cells that follow when those given are done.
    """
    if executor.kind == "ray" and place.device.index is not None:
        raise InputError(f"--device {place.device}: a Ray task sees the GPU alone that Ray gives it; give cuda or cpu")
    for folder in (place.results.runs, place.results.checkpoints):
        files.prepare(folder)
    families = dict.fromkeys(cell.family for cell in cells)
    presets = dict.fromkeys(families, preset) if isinstance(preset, str) else preset
    errors = _errors(place) if len(families) < 2 else (*_errors(place), InputError)
    gpus = device.spread(place.device)
    with progress_of(place) as progress:
        work = Work(place, presets, errors, tuple(sys.argv), progress if executor.alone else None)
        overall = None if executor.alone else progress.add("cells", total=0)
        course = _Course(work, console, progress, dict(more or {}), overall, at_once(executor, place))
        first = course.begin(cells)
        if executor.alone and min(len(gpus), len(first)) > 1:
            course.say(f"1 of {len(gpus)} GPUs is used; --workers {len(gpus)} spreads the cells over all of them")
        for step, done in executor.run(work, first, course.then, gpus=gpus, hear=Heard(progress)):
            course.keep(step, work.failure(step, "failed", done.reason) if isinstance(done, Lost) else done)
        if overall:
            overall.close()
    return not course.failed


@dataclass(slots=True)
class _Course:
    """A run as the driver sees it: what comes of each step is kept, and what waited for it begins."""

    work: Work
    console: Console
    progress: Progress
    more: dict[str, Callable[[], Sequence[Cell]]]
    overall: Task | None
    at_once: int = 1
    failed: bool = False
    graph: Graph = field(default_factory=Graph)
    left: dict[str, set[Step]] = field(default_factory=dict)  # the cells of each family that are not done

    def begin(self, cells: Sequence[Cell]) -> list[Step]:
        """What can begin of these cells, and of those that follow where these are done already."""
        pending = _pending(cells, self.work.place, self.progress)
        # no process writes what another has yet to look at
        distributed.wait(self.work.place.world)
        if len(pending) < len(cells):
            finished = f"{len(cells) - len(pending)} of {len(cells)}"
            self.say(f"{finished} cells are finished already; --force runs them again")
        self.say(describe_cost(pending, self.work.place, self.at_once))
        begin = self.graph.add(pending)
        _check(pending, self.progress)
        if self.overall:
            self.overall.extend(len(pending))
        for family in dict.fromkeys(cell.family for cell in cells):
            self.left[family] = {cell for cell in pending if cell.family == family}
            begin += self.following(family)
        return begin

    def keep(self, step: Step, done: Done) -> None:
        """Write what a step leaves, and of those that cannot begin without it that they failed."""
        place = self.work.place
        place.emptied.update(done.emptied)
        lost = [other for other in self.graph.lost(step) if isinstance(other, Cell)] if done.how else []
        left = [(other, self.work.failure(other, done.how, f"{step.title}: {done.reason}")) for other in lost]
        for cell, what in [(step, done), *left] if isinstance(step, Cell) else left:
            if place.world.leads:
                _keep(cell, what, place)
            self.left[cell.family].discard(cell)
            if self.overall:
                self.overall.advance(status=cell.title)
        if done.how:
            self.failed = True
            recorded = f"{len(lost)} cells that need it recorded" if lost else "recorded"
            self.say(f"{step.title}: {done.reason}; {recorded} as {done.how}, going on with the next")

    def then(self, step: Step) -> list[Step]:
        """What can begin after a step."""
        return self.graph.done(step) + [new for family in self.left.copy() for new in self.following(family)]

    def following(self, family: str) -> list[Step]:
        """What can begin of the cells that follow those of a family, once these are done."""
        if self.left[family] or family not in self.more:
            return []
        cells = self.more.pop(family)()
        return self.begin(cells) if cells else []

    def say(self, line: str) -> None:
        self.console.print(line, soft_wrap=True, markup=False, highlight=False)


def train(cells: Sequence[Cell], place: Place, *, console: Console) -> bool:
    """Train the models that the cells need and say where each is; `run` with the same cells then evaluates them.

    True unless one diverged or ended in an error of its own sizes, which is said.
    """
    files.prepare(place.results.checkpoints)
    needed = [step for step in steps(cells) if isinstance(step, TrainingStep)]
    console.print(describe_cost(needed, place), highlight=False, soft_wrap=True)
    errors, failed = _errors(place), False
    with progress_of(place) as progress:
        for step in needed:
            try:
                said = str(step.train(place, progress))
            except errors as error:
                failed, said = True, f"{error}; going on with the next"
            console.print(f"{step.title}: {said}", highlight=False, soft_wrap=True, markup=False)
    return not failed


def _errors(place: Place) -> tuple[type[Exception], ...]:
    """What ends a cell and not the sweep. Of several processes one may fail alone, and the others would wait for it."""
    return (DivergedError,) if place.world.size > 1 else CELL_ERRORS


def progress_of(place: Place) -> Progress:
    """A progress display; of several processes one shows it."""
    return Progress(None if place.world.leads else Console(quiet=True, force_terminal=False))


def _pending(cells: Sequence[Cell], place: Place, progress: Progress) -> list[Cell]:
    # with `force` too: a table that cannot be read is said before the work, not after it
    missing = unfinished(cells, place.results_dir)
    if place.force:
        return list(cells)
    return [cell for cell in cells if cell in missing or _source_of_run(cell, place) != cell.source(progress)]


def _check(cells: Sequence[Cell], progress: Progress) -> None:
    """InputError where something cannot be asked, before anything runs; all models are asked the same."""
    first: dict[str, tuple[Step, ...]] = {}
    for cell in cells:
        if first.setdefault(cell.family, cell.needs) == cell.needs:
            cell.check(progress)


def _source_of_run(cell: Cell, place: Place) -> str:
    """Digest of the text behind a finished cell, from its run file: a row never stands without one."""
    return str(provenance.read_run(place.results.run_file(cell_id(cell)))["corpus_digest"])


def run_cell(cell: Cell, place: Place, preset: str, progress: Progress) -> Done:
    """Run one cell and gather what it leaves, wherever this is."""
    start = time.perf_counter()
    outcome = cell.run(place, progress)
    # the last step can be the one that goes wrong
    if not all(math.isfinite(row.value) for row in outcome.rows):
        raise DivergedError("what was measured is no finite number")
    origin = _origin(cell, place, preset, outcome)
    record = provenance.run_record(
        config=cell,
        provenance=origin,
        status="finished",
        corpus_digest=outcome.corpus_digest,
        wall_s=time.perf_counter() - start,
        tokens_per_s=outcome.tokens_per_s,
        measured=outcome.measured,
    )
    return Done(record, table.frame(outcome.identity, outcome.rows, origin))


def _mishap(error: Exception) -> tuple[str, str]:
    """How a step failed, one of FAILED, and why."""
    if isinstance(error, DivergedError):
        return "diverged", str(error)
    return "failed", str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"


def _origin(cell: Cell, place: Place, preset: str, outcome: Outcome | None) -> Provenance:
    return provenance.collect(
        cell=cell_id(cell),
        preset=preset,
        corpus=outcome.corpus if outcome else "",
        tokenizer=outcome.tokenizer if outcome else "",
        train_tokens=outcome.train_tokens if outcome else 0,
        dtype=cell.dtype,
        device=str(place.device),
        device_name=device.describe(place.device),
        backend=outcome.backend if outcome else "",
        unique_tokens=outcome.unique_tokens if outcome else None,
        epochs=outcome.epochs if outcome else None,
    )


def _keep(cell: Cell, done: Done, place: Place) -> None:
    assert done.record is not None, "a cell has a run file"
    # before its rows, which never stand without it
    provenance.write_run(place.results.run_file(cell_id(cell)), done.record)
    if done.rows is not None:
        table.write(place.results.table(cell.family), done.rows)


def results_of(cells: Sequence[Cell], results_dir: Path) -> pd.DataFrame:
    """The rows that the table of these cells' family holds of them."""
    rows = table.read(Results(results_dir).table(cells[0].family), table.required(cells[0].row))
    return rows[rows["cell"].isin([cell_id(cell) for cell in cells])]
