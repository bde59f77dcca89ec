"""The fine-tuned model that a cell of needles evaluates: of several learning rates that which validation chose.

The rows, curves and entries of run files are of all rates, so that the choice can be followed.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sbeval.tables.needle import Row
from sbeval.tasks.needle_tuning import Tuned, Tuning

if TYPE_CHECKING:
    import pandas as pd

    from sbeval.evaluation.ruler_prompts import Writer
    from sbeval.runtime.progress import Progress
    from sbeval.sweep.context import RunContext
    from sbeval.tables.curves import Curves


@dataclass(frozen=True, slots=True, kw_only=True)
class Taught:
    """The model that a cell evaluates: its checkpoint, the columns on fine-tuning of its rows, and the rows, curves
    and entries of run files of the fine-tuning at all rates."""

    folder: str
    factors: Mapping[str, Any] = field(default_factory=dict)
    rows: Sequence[Row] = ()
    curves: "Curves" = field(default_factory=dict)
    measured: Mapping[str, object] = field(default_factory=dict)


def taught(
    task: str,
    tunings: Sequence[Tuning],
    trained: str,
    writer: "Writer",
    context: "RunContext",
    progress: "Progress",
) -> Taught:
    """Fine-tune the model of checkpoint `trained` by each of `tunings`, and return the one to evaluate on a task."""
    from sbeval.training.trainer import DivergedError

    if not tunings:
        return Taught(folder=trained)
    budget = tunings[0].schedule().tokens
    factors = {"finetune_tokens": budget}
    tuned = [one.run(trained, writer, context, progress) for one in tunings]
    if all(one.diverged for one in tuned):
        raise DivergedError(f"the loss of fine-tuning is not finite at any of {len(tuned)} learning rates")
    chosen = best([one for one in tuned if not one.diverged], budget)
    rows: list[Row] = []
    curves: dict[str, Sequence[tuple[int, float]]] = {}
    for one in tuned:
        rate = {"finetune_lr": one.lr, "chosen": int(one is chosen)}
        rows += _rows(task, one, tunings[0].length, budget, factors | _factors(task, one) | rate)
        curves[f"finetune_loss_{one.lr:g}"] = [(step, round(loss, 4)) for step, loss in enumerate(one.losses, start=1)]
        curves[f"held_out_{one.lr:g}"] = [(each.step, each.score) for each in one.scores.get(task, ())]
    measured = {"finetune": [{"lr": one.lr, "tokens": one.tokens, **one.measured} for one in tuned]}
    return Taught(
        folder=str(chosen.folder),
        factors=factors | _factors(task, chosen) | {"finetune_lr": chosen.lr},
        rows=rows,
        curves=curves,
        measured=measured,
    )


def _factors(task: str, of: Tuned) -> dict[str, Any]:
    return {"ended": of.ended(task), "copy_gain": round(of.copy_gain, 4)}


def _rows(task: str, of: Tuned, length: int, budget: int, factors: Mapping[str, Any]) -> list[Row]:
    """Return the rows of fine-tuning at one rate, on prompts of the training length; none of a task that it was not on.

    The tokens until a task was solved are those of the budget where it was not.
    """
    if task not in of.tasks:
        return []
    after = float(of.solved_after[task] if of.ended(task) == "solved" else budget)
    row = Row(metric="tokens_to_solve", unit="tokens", value=after, n=1, length=length, **factors)
    if of.diverged:
        return [row]
    last = of.held_out(task)
    return [row, Row(metric="held_out", unit="1", value=last.score, n=last.n, length=length, **factors)]


def best(candidates: Iterable[Tuned], budget: int) -> Tuned:
    """Return the model that solved the most tasks, then in the fewest tokens, then with the most held-out prompts right
    at the end; ties go to the smallest rate."""

    def rank(one: Tuned) -> tuple[float, ...]:
        tokens = [one.solved_after.get(task, budget) for task in one.scores]
        return -len(one.solved_after), sum(tokens), -sum(one.held_out(task).score for task in one.scores), one.lr

    return min(candidates, key=rank)


def chosen_rates(rates: Sequence[float], mine: "pd.DataFrame") -> tuple[float, ...]:
    """Return the learning rate that validation chose for a model, of `rates`, given its rows: all that did not diverge
    where none solved a task, and none where all cells failed.

    Where no model was taught these tasks, nothing says that one was solved, and the rate is that of the scores.
    """
    if mine.empty:
        return ()
    learned = mine[mine["metric"] == "tokens_to_solve"]
    unsolved = len(learned) and not (learned["ended"] == "solved").any()
    # rows of scores have a rate since later than those of fine-tuning
    chosen = mine[(mine["metric"] == "score") | (mine["chosen"] == 1)]["finetune_lr"].dropna().unique()
    if len(chosen) and not unsolved:
        return tuple(map(float, chosen))
    diverged = {*learned.loc[learned["ended"] == "diverged", "finetune_lr"]}
    return tuple(rate for rate in dict.fromkeys(rates) if rate not in diverged)
