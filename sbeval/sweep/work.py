"""Run one step of a sweep, in any process: train, or evaluate a cell and store its result.

cell -> build or load the model, train, evaluate -> results/runs/<cell>.json -> rows of results/<family>.csv
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from sbeval.errors import InputError, reason
from sbeval.runtime import device, distributed
from sbeval.runtime.progress import Progress, Telling
from sbeval.sweep import finished, pool
from sbeval.sweep.cell import Cell, Outcome, Step, TrainingStep, cell_id
from sbeval.sweep.context import RunContext
from sbeval.sweep.pool import Result
from sbeval.tables import provenance, store, table
from sbeval.tables.rows import Provenance
from sbeval.tables.store import Stored
from sbeval.training.trainer import DivergedError

# errors that the sizes and numbers of one cell can cause: out of memory, a kernel that does not fit, an overflow
CELL_ERRORS = (RuntimeError, MemoryError, ArithmeticError)


def errors_of(context: RunContext, families: int = 1) -> tuple[type[Exception], ...]:
    """Return the errors that end a cell but not the sweep; with several ranks only those that all of them raise.

    A mistake in the options of one of several families does not end the others.
    """
    errors = (DivergedError,) if context.world.size > 1 else CELL_ERRORS
    return errors if families < 2 else (*errors, InputError)


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
            self._keep_failure(cell, result)
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
            and not finished.unfinished([cell], context.results_dir)
            and finished.is_of_its_text(cell, context, progress)
        )
        return distributed.anywhere(found, context.world, context.device)

    def record(self, step: Step, failure: Failure, progress: Progress) -> Failure | None:
        """Store that a step failed, if it is a cell; return None where another command has finished it since."""
        if not isinstance(step, Cell):
            return failure
        with self.context.cell(cell_id(step), progress):
            if self._is_finished(step, progress):
                return None
            self._keep_failure(step, failure)
        return failure

    def _keep_failure(self, cell: Cell, failure: Failure) -> None:
        outcome = cell.failed(failure.how, self.context)
        origin = _origin(cell, self.context, self.presets[cell.family], outcome)
        record = provenance.run_record(
            config=cell, provenance=origin, status="failed", reason=failure.reason, argv=self.context.argv
        )
        rows = table.frame(outcome.identity, outcome.rows, origin) if outcome else None
        self._keep(cell, Stored(cell_id(cell), record, rows))

    def _keep(self, cell: Cell, stored: Stored) -> None:
        if self.context.world.leads:
            store.keep(self.context.results, cell.family, stored)


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
