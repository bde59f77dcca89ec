"""Rules of claims on associative recall: what is solved, and how much attention stale values get."""

import pandas as pd

from sbeval.errors import InputError
from sbeval.report.judge import (
    AGREES,
    DISAGREES,
    METHODS,
    UNDECIDED,
    Evidence,
    Judged,
    against,
    nearest,
    verdict,
)
from sbeval.tables import intervals, mqrar, selection
from sbeval.tables.published import SOLVED, SOLVED_AT, SOLVED_STEPS, SOLVED_TOKENS
from sbeval.tables.rows import ROPE, STICK, Method
from sbeval.tables.statistics import Scale

# a model that answers fewer of the queries with stale values has not learned to
LEARNED = 0.95
# accuracies that differ by more are not those of models that have learned equally well
EQUAL = 0.01
# models of a method, fewer of which decide nothing
SEEDS = 3
# weight on stale values by which methods differ
WEIGHT = 0.01
# the default scale of stick-breaking in recall tasks, that of the author's code
SCALED = "logit_scale=1.5"


def recall(table: pd.DataFrame, evidence: Evidence) -> Judged:
    """Judge which numbers of key-value pairs are solved."""
    cells = selection.recall_cells(_plain(table))
    cells = cells[cells["n_back"] == 1]
    same = (cells[list(SOLVED_AT)] == pd.Series(SOLVED_AT)).all(axis=1)
    by = [name for name in selection.recall_setting(cells).columns if name != "preset"]
    mine = nearest(cells[same] if same.any() else cells, by)
    found = " ".join(_solved(mine, name) for name in METHODS)
    found += f" Vocabulary {mine['vocab_size'].iloc[0]}, {mine['seq_len'].iloc[0]} tokens."
    found = " ".join([found, *mqrar.cautions(mine)])
    if not same.any():
        wanted = f"vocabulary of {SOLVED_AT['vocab_size']} in {SOLVED_AT['seq_len']} tokens"
        return Judged(UNDECIDED, found, f"nothing was measured at the paper's {wanted}")
    most = SOLVED["stick_breaking"]
    claimed = {("stick-breaking", most): True, ("RoPE", SOLVED["rope"]): True, ("RoPE", most): False}
    answers = {(name, pairs): _solves(mine, METHODS[name], pairs) for name, pairs in claimed}
    if any(answers[key] is (not wanted) for key, wanted in claimed.items()):
        return Judged(DISAGREES, found)
    if missing := [f"{name} with {pairs} pairs" for (name, pairs), answer in answers.items() if answer is None]:
        budget = f"the paper's {SOLVED_STEPS:,} steps and {SOLVED_TOKENS / 1e9:.1f} G tokens"
        return Judged(UNDECIDED, found, f"not measured, or ended before {budget}: {', '.join(missing)}")
    return Judged(AGREES, found)


def _solves(cells: pd.DataFrame, of: Method, pairs: int) -> bool | None:
    """Return whether a method solves a number of pairs; None where that is not known.

    It does if every seed does at the rate that needs the fewest steps. It does not if no seed does at any rate, in as
    many steps and tokens as the paper's: a plateau may end later.
    """
    mine = intervals.method(cells, of)
    mine = mine[mine["kv_pairs"] == pairs]
    if mine.empty:
        return None
    best = mine[mine["lr"] == selection.by_steps(mine)[0]]
    if best["solved"].any():
        return True if best["solved"].all() else None
    long = (mine["train_tokens"] >= SOLVED_TOKENS) & (mine["steps"] >= SOLVED_STEPS) & (mine["status"] != "plateau")
    return False if long.all() else None


def _solved(cells: pd.DataFrame, name: str) -> str:
    mine = intervals.method(cells, METHODS[name])
    counts = sorted(int(pairs) for pairs in mine["kv_pairs"].unique())
    parts = {pairs: _of_rate(mine[mine["kv_pairs"] == pairs]) for pairs in counts}
    solved = [pairs for pairs in counts if _solves(cells, METHODS[name], pairs)]
    best = f"solves {max(solved)} pairs ({parts[max(solved)]})" if solved else "solves none"
    most = f"; {counts[-1]}: {parts[counts[-1]]}" if not solved or counts[-1] > max(solved) else ""
    return f"{name[:1].upper()}{name[1:]} {best} of up to {counts[-1]}{most}."


def _of_rate(mine: pd.DataFrame) -> str:
    """Describe the cells at the rate that needs the fewest steps."""
    rate = selection.by_steps(mine)[0]
    best = mine[mine["lr"] == rate]
    measured = best[best["value"].notna()]
    rates = "" if mine["lr"].nunique() == 1 else f" of {mine['lr'].nunique()} rates"
    found = f"{int(best['solved'].sum())} of {len(best)} seeds at {rate:g}{rates}"
    found += f", {len(best) - len(measured)} failed" if len(measured) < len(best) else ""
    if measured.empty:
        return found
    (accuracy,) = intervals.intervals(intervals.samples(measured, Scale.SHARE), Scale.SHARE).values()
    steps = ", ".join(f"{int(step):,}" for step in sorted(measured["steps"]))
    return f"{found}, after {steps} steps, accuracy {accuracy.text('{:.3f}'.format)}"


def distraction(table: pd.DataFrame, evidence: Evidence) -> Judged:
    """Judge whether stick-breaking attends less to stale values, in the head with the most weight on the latest."""
    table = _plain(table)
    accuracy = table[(table["metric"] == "accuracy") & (table["split"] == "stale")]
    learned = accuracy.loc[accuracy["value"] >= LEARNED, "cell"]
    if learned.empty:
        raise InputError(f"no model answers {LEARNED} of the queries with stale values")
    shares = table[(table["metric"] == "share") & table["cell"].isin(learned)]
    latest = shares[shares["target"] == "latest"]
    heads = latest.loc[latest.groupby("cell")["value"].idxmax(), ["cell", "layer", "head"]]
    rows = nearest(shares[shares["target"] == "stale"].merge(heads), [*selection.ATTENTION_MAP, "model"])
    samples = intervals.samples(rows)
    differences = intervals.differences(samples, ROPE)
    less, answer = differences[STICK], against(differences, 0.0)
    right = intervals.samples(accuracy[accuracy["cell"].isin(rows["cell"])])
    found = (
        f"Weight on stale values: stick-breaking {samples[STICK].mean:.3f}, RoPE {samples[ROPE].mean:.3f}; "
        f"difference {less.text('{:+.3f}'.format)} ({less.over('sequences')}; {answer.words}; accuracies "
        f"{right[STICK].mean:.3f} and {right[ROPE].mean:.3f}; {rows['kv_pairs'].iloc[0]} pairs, model "
        f"{rows['model'].iloc[0]})."
    )
    far = []
    if (fewest := min(samples[STICK].seeds, samples[ROPE].seeds)) < SEEDS:
        far.append(f"{fewest} seed{'s' * (fewest > 1)} of a method, fewer than {SEEDS}")
    if (apart := abs(right[STICK].mean - right[ROPE].mean)) > EQUAL:
        far.append(f"accuracies differ by {apart:.3f}, more than {EQUAL:g}: weights are compared at equal accuracy")
    return verdict(answer.below if abs(less.mean) >= WEIGHT else None, found, far="; ".join(far))


def _plain(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.assign(options=rows["options"].mask(rows["options"] == SCALED, ""))
