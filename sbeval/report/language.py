"""Rules of claims on language models: perplexity by length and within the training length, needles, benchmarks."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from sbeval.errors import InputError
from sbeval.report import far_text
from sbeval.report.judge import (
    ALPHA,
    BILLION,
    METHODS,
    UNDECIDED,
    Evidence,
    Judged,
    against,
    basis_of,
    models,
    nearest,
    too_small,
    trained,
    verdict,
    young,
)
from sbeval.report.recall import SEEDS
from sbeval.tables import documents, few_shot, intervals, pairs, pooling, selection
from sbeval.tables.intervals import percent
from sbeval.tables.pairs import Stored
from sbeval.tables.published import LENGTHS
from sbeval.tables.rows import ROPE, STICK, Method
from sbeval.tables.statistics import Interval, Sample, Scale

# the smallest effects of interest. Nats/token: a third of the paper's 13.4 against 13.8 in perplexity per word
MARGIN = 0.007
# a perplexity that is higher by less has not risen
RISE = 0.02
# share of needles by which methods differ
NEEDLES = 0.02
# percentage points by which competitive scores may differ
POINTS = 1.0
# a model with a mean score below this finds nothing
NOTHING = 0.05
# columns of a setting of benchmarks
SETTING = ("model", "train_len", "eval_len", "corpus", "preset", "train_tokens")
CONTROL = (
    "that far text is used is not shown: perplexity falls along a document without it too, and no loss of fixed "
    "targets (--fixed-targets 512) was measured of stick-breaking and a sliding window"
)


def within(table: pd.DataFrame, evidence: Evidence) -> Judged:
    """Judge whether perplexity at the training length is as low as RoPE's, or lower."""
    rows = selection.by_context(table)
    rows = nearest(rows[rows["x"] == rows["train_len"]], selection.length_gen_setting(rows).columns)
    samples = intervals.samples(rows, Scale.LOG)
    differences = trained(intervals.differences(samples, ROPE, Scale.LOG, same_units=True))
    differences |= _paired(rows, samples, evidence)
    stick = differences[STICK]
    margin, lower = against(differences, MARGIN), against(differences, 0.0)
    spread = pooling.spreads(samples)[STICK]
    found = (
        f"Perplexity at {rows['x'].iloc[0]} tokens: stick-breaking {math.exp(samples[STICK].mean):.1f}, RoPE "
        f"{math.exp(samples[ROPE].mean):.1f}; difference {stick.text('{:+.3f}'.format)} nats/token."
    )
    if lower.below:
        found += " Lower than RoPE's."
    basis = basis_of(
        f"difference: {stick.over('documents')}",
        f"it is {abs(stick.mean) / spread.sd:.1f} standard deviations of a seed" if spread.sd > 0 else "",
        f"against a difference of {MARGIN:+g}: {margin.words}",
        models(rows),
    )
    return verdict(
        margin.below, found, basis, far="; ".join(filter(None, [too_small(rows, BILLION), young(rows, evidence)]))
    )


def _paired(rows: pd.DataFrame, samples: Mapping[Method, Sample], evidence: Evidence) -> dict[Method, Interval]:
    """Return the difference to RoPE of each method whose losses of single documents are stored, for all seeds of both,
    paired by document."""
    values = evidence.values(rows["cell"]) if "cell" in rows else documents.nothing(())
    sums, tokens = (
        documents.sums(values, name, context_length=int(rows["x"].iloc[0])) for name in ("nll_sum", "tokens")
    )
    spreads = pooling.spreads(samples)
    found: dict[Method, Interval] = {}
    for method in samples:
        of, other = (sums[sums.index.isin(documents.cells_of(rows, one))] for one in (method, ROPE))
        stored = len(of) == samples[method].seeds and len(other) == samples[ROPE].seeds
        if stored and method != ROPE and pooling.SAME_WEIGHTS not in method[1]:
            difference = documents.difference(of, other, tokens, (spreads[method], spreads[ROPE]))
            found |= {} if difference is None else {method: difference}
    return found


def lengths(table: pd.DataFrame, evidence: Evidence) -> Judged:
    """Judge whether perplexity rises from the training length to eight times that, and whether far text is used."""
    rows, (train_len, longest) = _evaluated_far(selection.by_context(table))
    rows = nearest(rows, selection.length_gen_setting(rows).columns)
    rows = rows.assign(stderr=rows["stderr"] / rows["value"], value=np.log(rows["value"].astype(float)))
    samples = intervals.samples(far_text.changes(rows))
    change, by_document = intervals.intervals(samples), far_text.by_document(rows, evidence)
    change |= {of: pairs for of in (STICK, ROPE) if (pairs := far_text.in_pairs(by_document, rows, of, None, samples))}
    ends = {name: [_level(rows[rows["x"] == at], of) for at in (train_len, longest)] for name, of in METHODS.items()}
    rises = "; ".join(
        f"{name} {start:.1f} to {end:.1f}, {change[METHODS[name]].text(_without_sign)} %"
        for name, (start, end) in ends.items()
    )
    stick, rope = change[STICK], change[ROPE]
    far, of_targets, over_targets = far_text.beyond_window(table, rows, evidence)
    found = f"Perplexity from {train_len} to {longest} tokens of context: {rises}.{of_targets}"
    basis = basis_of(
        f"stick-breaking's change: {stick.over('documents')}",
        f"RoPE's: {rope.over('documents')}",
        over_targets,
        models(rows),
    )
    other = "" if train_len == LENGTHS[0] else f"trained at {train_len} tokens, the paper's at {LENGTHS[0]}"
    reason = "; ".join(filter(None, [other, young(rows, evidence)]))
    if stick.above(RISE) < ALPHA or rope.below(RISE) < ALPHA:
        return verdict(False, found, basis, far=reason)
    rises_not = rope.above(RISE) < ALPHA and stick.mean <= RISE and stick.high < rope.low
    holds = rises_not and (far or not of_targets)
    return verdict(True if holds else None, found, basis, far=reason or ("" if of_targets else CONTROL))


def _without_sign(change: float) -> str:
    return percent(change).removesuffix(" %")


def _evaluated_far(rows: pd.DataFrame) -> tuple[pd.DataFrame, tuple[int, int]]:
    """Return perplexities at the training length and at eight times that of methods that have both, and these lengths.

    The paper's training length is chosen where it was measured, else the longest. InputError where none was.
    """
    paper, factor = LENGTHS[0], LENGTHS[1] // LENGTHS[0]
    keys = ["attention", "options", *selection.length_gen_setting(rows).columns]
    others = sorted({int(length) for length in rows["train_len"]} - {paper}, reverse=True)
    for train_len in (paper, *others):
        ends = (train_len, factor * train_len)
        mine = rows[(rows["train_len"] == train_len) & rows["x"].isin(ends)]
        mine = mine[mine.groupby(keys, dropna=False)["x"].transform("nunique") == len(ends)]
        if len(mine):
            return mine, ends
    raise InputError(f"no model was evaluated up to {factor} times its training length")


def _level(rows: pd.DataFrame, of: Method) -> float:
    return math.exp(intervals.samples(intervals.method(rows, of))[of].mean)


def retrieval(table: pd.DataFrame, evidence: Evidence) -> Judged:
    """Judge whether stick-breaking finds more needles past the training length, on tasks that both solve at it."""
    rows = selection.needle_scores(table)
    rows = rows[rows["metric"] == "score"]
    run = {name: mine for name, of in METHODS.items() if len(mine := intervals.method(rows, of))}
    if len(run) == 1:
        return _retrieval_of_one(*run.popitem())
    rows = nearest(rows[rows["length"] > rows["train_len"]], selection.NEEDLE.columns)
    asked = _of_both(rows, "task")
    if not asked:
        raise InputError(f"{' and '.join(METHODS)} have no task in common")
    both = rows[rows["task"].isin(asked)]
    rows, unsolved = _solved_by_both(both)
    tasks = _of_both(rows, "task")
    if not tasks:
        some = any(intervals.method(both, of)["solved"].any() for of in (STICK, ROPE))
        by = "both methods" if some else "either method"
        found = f"None of the {len(asked)} RULER tasks tried (of 13) is solved by {by} at the training length."
        return Judged(UNDECIDED, found, basis_of(models(both)), unsolved)
    rows = rows[rows["task"].isin(tasks)]
    means = selection.mean_over_tasks(rows)
    means = selection.of_all(means, "length", _of_both(means, "length"))
    samples = intervals.samples(means, Scale.SHARE)
    if not {STICK, ROPE} <= samples.keys():
        raise InputError("there is no length past the training length at which both have the same tasks")
    # prompts of a task and length are the same for all methods
    shown = rows.merge(means[["attention", "options", "seed", "length"]].drop_duplicates())
    joint = pairs.of_methods(shown, ROPE, Stored(evidence.values), ["task", "length"])
    gains = trained(intervals.differences(samples, ROPE, Scale.SHARE, pairs=joint))
    gain, answer = gains[STICK], against(gains, 0.0)
    lengths = ", ".join(f"{length}" for length in sorted(means["length"].unique()))
    found = (
        f"Mean score of {len(tasks)} of RULER's 13 tasks at {lengths} tokens: stick-breaking "
        f"{samples[STICK].mean:.3f}, RoPE {samples[ROPE].mean:.3f}; difference {gain.text('{:+.3f}'.format)}."
    )
    trained_at = f"{models(rows)}, trained at {rows['train_len'].iloc[0]} tokens"
    basis = basis_of(f"difference: {gain.over('samples')}", answer.words, trained_at) + unsolved
    if max(samples[STICK].mean, samples[ROPE].mean) < NOTHING:
        return Judged(UNDECIDED, found, basis, "neither finds anything there")
    far = [too_small(rows, BILLION), young(rows, evidence)]
    fewest = min(samples[STICK].seeds, samples[ROPE].seeds)
    if (rows["finetune_tokens"] > 0).any() and fewest < SEEDS:
        far.append(f"{fewest} seed{'s' * (fewest > 1)} of a method that was fine-tuned, fewer than {SEEDS}")
    more = None if answer.below is None else not answer.below
    return verdict(more if abs(gain.mean) >= NEEDLES else None, found, basis, far="; ".join(filter(None, far)))


def _retrieval_of_one(name: str, rows: pd.DataFrame) -> Judged:
    """Say which of the tasks that it was fine-tuned on the only method with rows solves, by all of its models."""
    (other,) = METHODS.keys() - {name}
    reason = f"no rows of {other}"
    taught = rows[rows["finetune_tokens"] > 0]
    if "ended" in taught:
        # a task that was not taught has none
        taught = taught[taught["ended"].fillna("") != ""]
    if taught.empty:
        return Judged(UNDECIDED, reason=reason)
    parts = [part for _, part in taught.groupby(list(selection.NEEDLE.columns), dropna=False)]
    most = max(parts, key=lambda part: (part["params"].max(), part["train_tokens"].max(), len(part)))
    solved = most.groupby("task")["solved"].all()
    found = f"{name} solves {solved.sum()} of the {len(solved)} RULER tasks that it was fine-tuned on"
    return Judged(
        UNDECIDED, f"{found}, at the training length; no rows of {other} to compare.", basis_of(models(most)), reason
    )


def _of_both(rows: pd.DataFrame, name: str) -> set[Any]:
    """Return the values of a column that every seed of stick-breaking and of RoPE has."""
    by_method = [intervals.method(rows, of) for of in (STICK, ROPE)]
    each = [set(seed[name]) for mine in by_method for _, seed in mine.groupby("seed")]
    return set() if any(mine.empty for mine in by_method) else set.intersection(*each)


def _solved_by_both(rows: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Return the rows of the tasks that every model of both methods solved at its training length, without those of
    models of other methods that did not; and a sentence on the tasks that are left out."""
    both = pd.concat([intervals.method(rows, of) for of in (STICK, ROPE)])
    unsolved = sorted(both.loc[~both["solved"], "task"].unique())
    if not unsolved:
        return rows[rows["solved"]], ""
    by = [
        f"{name} {', '.join(sorted(missed))}"
        for name, of in METHODS.items()
        if (missed := set(intervals.method(both[~both["solved"]], of)["task"]))
    ]
    text = f" Not solved at the training length, so not compared beyond: {'; '.join(by)}."
    return rows[rows["solved"] & ~rows["task"].isin(unsolved)], text


def benchmarks(table: pd.DataFrame, evidence: Evidence) -> Judged:
    """Judge whether the mean score of the benchmarks above guessing is as high as RoPE's, or nearly."""
    chosen = few_shot.headline(table)
    chosen = chosen[[few_shot.METRICS[metric] for metric in chosen["metric"]]]
    chosen = chosen[chosen["attention"] != "hf"]
    rows = nearest(chosen, SETTING)
    shared = _of_both(rows, "benchmark")
    if not shared:
        raise InputError(f"{' and '.join(METHODS)} have no benchmark in common")
    rows = rows[rows["benchmark"].isin(shared)]
    above = few_shot.above_guessing(rows[rows["attention"].isin([STICK[0], ROPE[0]]) & (rows["options"] == "")])
    far = "; ".join(filter(None, [too_small(rows, BILLION), young(rows, evidence)]))
    if not above:
        found = f"{len(shared)} benchmarks in common, none above chance."
        return Judged(UNDECIDED, found, basis_of(models(rows)), far or "all are at chance")
    rows = selection.of_all(rows, "benchmark", above)
    rows = rows.assign(value=100 * rows["value"], stderr=100 * rows["stderr"])
    samples, stored = intervals.samples(rows), Stored(evidence.values)
    # rows as they are stored; their differences are in percent
    joint = pairs.of_methods(rows.assign(value=rows["value"] / 100), ROPE, stored, ["benchmark"], scale=100)
    gains = intervals.differences(samples, ROPE, pairs=joint)
    gain, answer = gains[STICK], against(gains, -POINTS)
    # without the number of examples in the prompt where there are none
    names = [name.removesuffix(" (0)") for name in above]
    cost, over_cost = _right_answers(table, rows, stored)
    found = (
        f"Mean of the {len(above)} of {len(shared)} benchmarks above chance ({', '.join(names)}): stick-breaking "
        f"{samples[STICK].mean:.1f} %, RoPE {samples[ROPE].mean:.1f} %; difference "
        f"{gain.text('{:+.1f}'.format)} points.{cost}"
    )
    basis = basis_of(
        f"difference: {gain.over('items')}",
        f"against a difference of −{POINTS:g} point: {answer.words}",
        over_cost,
        models(rows),
    )
    return verdict(None if answer.below is None else not answer.below, found, basis, far=far)


def _right_answers(table: pd.DataFrame, rows: pd.DataFrame, stored: Stored) -> tuple[str, str]:
    """Say what right answers cost, stick-breaking's less RoPE's: the mean over the benchmarks of which both have it.
    And what that is over; both are empty where it is not known.

    rows: those of the setting.
    """
    if not table["metric"].isin(few_shot.GOLD).any():
        return "", ""
    same = [name for name in SETTING if name in rows]
    gold = few_shot.headline(table, few_shot.GOLD).merge(rows[same].drop_duplicates(), on=same)
    of_both = _of_both(gold, "benchmark")
    if not of_both:
        return "", ""
    gold = selection.of_all(gold, "benchmark", of_both)
    joint = pairs.of_methods(gold, ROPE, stored, ["benchmark"])
    gain = intervals.differences(intervals.samples(gold), ROPE, pairs=joint)[STICK]
    cost = f" Cost of right answers in {len(of_both)} benchmarks: difference {gain.text('{:+.3f}'.format)} bits/byte."
    return cost, f"cost of right answers: {gain.over('items')}"
