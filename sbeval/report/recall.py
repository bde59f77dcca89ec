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
    basis_of,
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
    found, runs = (" ".join(each) for each in zip(*(_solved(mine, name) for name in METHODS), strict=True))
    examples = f"Vocabulary of {mine['vocab_size'].iloc[0]}, {mine['seq_len'].iloc[0]} tokens."
    basis = " ".join([runs, examples, *mqrar.cautions(mine)])
    if not same.any():
        wanted = f"vocabulary of {SOLVED_AT['vocab_size']} in {SOLVED_AT['seq_len']} tokens"
        return Judged(UNDECIDED, found, basis, f"nothing was measured at the paper's {wanted}")
    most = SOLVED["stick_breaking"]
    claimed = {("stick-breaking", most): True, ("RoPE", SOLVED["rope"]): True, ("RoPE", most): False}
    answers = {(name, pairs): _solves(mine, METHODS[name], pairs) for name, pairs in claimed}
    if any(answers[key] is (not wanted) for key, wanted in claimed.items()):
        return Judged(DISAGREES, found, basis)
    if missing := [f"{name} with {pairs} pairs" for (name, pairs), answer in answers.items() if answer is None]:
        budget = f"the paper's {SOLVED_STEPS:,} steps and {SOLVED_TOKENS / 1e9:.1f} G tokens"
        return Judged(UNDECIDED, found, basis, f"not measured, or ended before {budget}: {', '.join(missing)}")
    return Judged(AGREES, found, basis)


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


def _solved(cells: pd.DataFrame, name: str) -> tuple[str, str]:
    """Return sentences on how many pairs a method solves, and on the runs that show it."""
    mine = intervals.method(cells, METHODS[name])
    counts = sorted(int(pairs) for pairs in mine["kv_pairs"].unique())
    of_pairs = {pairs: mine[mine["kv_pairs"] == pairs] for pairs in counts}
    solved, most = [pairs for pairs in counts if _solves(cells, METHODS[name], pairs)], counts[-1]
    tried = "the most tried" if len(counts) > 1 else "the only number tried"
    if most in solved:
        found = f"solves {most} pairs, {tried}, with accuracy {_accuracy(of_pairs[most])}"
    else:
        some = f"{max(solved)} pairs, with accuracy {_accuracy(of_pairs[max(solved)])}" if solved else "none"
        found = f"solves {some}; at {most} pairs, {tried}, {_unsolved(of_pairs[most])}"
    shown = sorted({max(solved, default=most), most})
    runs = "; ".join(f"{pairs} pairs {_runs(of_pairs[pairs])}" for pairs in shown)
    title = f"{name[:1].upper()}{name[1:]}"
    return f"{title} {found}.", f"{title}: {runs}."


def _accuracy(mine: pd.DataFrame) -> str:
    """Return the accuracy at the rate that needs the fewest steps, or where none solves at that with the highest; empty
    where no run has one."""
    rate = selection.by_steps(mine)[0]
    if not mine["solved"].any() and mine["value"].notna().any():
        rate = float(mine.groupby("lr")["value"].mean().sort_values().index[-1])
    measured = mine[(mine["lr"] == rate) & mine["value"].notna()]
    found = intervals.intervals(intervals.samples(measured, Scale.SHARE), Scale.SHARE).values() if len(measured) else ()
    return "".join(accuracy.text("{:.3f}".format) for accuracy in found)


def _unsolved(mine: pd.DataFrame) -> str:
    solved = mine.loc[mine["lr"] == selection.by_steps(mine)[0], "solved"]
    seeds = f", and {int(solved.sum())} of {len(solved)} seeds solve them" if solved.any() and not solved.all() else ""
    return f"its accuracy is {accuracy}{seeds}" if (accuracy := _accuracy(mine)) else "every run failed"


def _runs(mine: pd.DataFrame) -> str:
    """Describe the runs at the rate that needs the fewest steps."""
    rate = selection.by_steps(mine)[0]
    best = mine[mine["lr"] == rate]
    measured = best[best["value"].notna()]
    solved = int(best["solved"].sum())
    seeds = f"solved by {solved} of {len(best)} seeds"
    if len(best) == 1:
        seeds = f"{'' if solved else 'not '}solved by the only seed"
    rates = "" if mine["lr"].nunique() == 1 else f" (of {mine['lr'].nunique()} tried)"
    failed = f", {len(best) - len(measured)} failed" if len(measured) < len(best) else ""
    # a number of steps that several seeds have is said once, and of three or more their range
    steps = [f"{int(step):,}" for step in sorted(measured["steps"].unique())]
    after = " and ".join(steps) if len(steps) < 3 else f"{steps[0]} to {steps[-1]}"
    return f"{seeds} at learning rate {rate:g}{rates}{failed}{f', after {after} steps' if steps else ''}"


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
        f"difference {less.text('{:+.3f}'.format)}."
    )
    basis = basis_of(
        f"difference: {less.over('sequences')}",
        answer.words,
        f"accuracies: stick-breaking {right[STICK].mean:.3f}, RoPE {right[ROPE].mean:.3f}",
        f"{rows['kv_pairs'].iloc[0]} key-value pairs",
        f"models of {rows['model'].iloc[0]} (layers x width)",
    )
    far = []
    if (fewest := min(samples[STICK].seeds, samples[ROPE].seeds)) < SEEDS:
        far.append(f"{fewest} seed{'s' * (fewest > 1)} of a method, fewer than {SEEDS}")
    if (apart := abs(right[STICK].mean - right[ROPE].mean)) > EQUAL:
        far.append(f"accuracies differ by {apart:.3f}, more than {EQUAL:g}: weights are compared at equal accuracy")
    return verdict(answer.below if abs(less.mean) >= WEIGHT else None, found, basis, far="; ".join(far))


def _plain(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.assign(options=rows["options"].mask(rows["options"] == SCALED, ""))
