"""Rules on distant text: whether the same tokens are predicted better when more text is given before them."""

import dataclasses
from collections.abc import Mapping

import numpy as np
import pandas as pd

from sbeval.report.judge import ALPHA, NO, UNDECIDED, YES, Evidence, Judged, basis_of, models
from sbeval.tables import documents, intervals, pooling, selection, statistics
from sbeval.tables.published import LENGTHS
from sbeval.tables.rows import STICK, Method
from sbeval.tables.statistics import Interval, Sample

METRIC = "loss_fixed_targets"
# the control of length: it cannot see far
WINDOW = ("sliding_window", "")
# how many times the training length is far, as in the paper's figure 5
FACTOR = LENGTHS[1] // LENGTHS[0]
# how many times the training length is near: at that length itself the first of the targets have less
# text before them than tokens have in training
NEAR = 2
# nats/token: where the interval includes 0, a gain that is surely smaller is none
GAIN = 0.002


def gains(method: Method, table: pd.DataFrame, evidence: Evidence) -> Judged:
    """Judge whether a method predicts the same tokens better with FACTOR times the training length before them than
    with NEAR times."""
    targets = table[table["metric"] == METRIC]
    targets = targets.assign(x=pd.to_numeric(targets["context_length"]))
    length = targets["train_len"].astype(float)
    targets = targets[(targets["x"] == NEAR * length) | (targets["x"] == FACTOR * length)]
    setting = [*selection.length_gen_setting(targets).columns, *(name for name in ["targets"] if name in targets)]
    parts = [part for _, part in targets.groupby(setting, dropna=False) if _has_both(intervals.method(part, method))]
    if not parts:
        reason = f"no model was given {NEAR} and {FACTOR} times its training length (--fixed-targets 512)"
        return Judged(UNDECIDED, reason=reason, measured=False)
    several = [part for part in parts if changes(intervals.method(part, method))["seed"].nunique() > 1]
    rows = max(
        several or parts,
        key=lambda part: [part[name].max() for name in ("params", "train_tokens", "targets") if name in part],
    )
    complete = rows.groupby(["attention", "options"])["x"].transform("nunique") == 2
    rows = rows[complete]
    count = {"targets": rows["targets"].iloc[0]} if "targets" in rows else {}
    mine = intervals.method(rows, method)
    change = _change(method, rows, by_document(mine, evidence, **count))
    near, far = (int(rows["x"].min()), int(rows["x"].max()))
    found = (
        f"Change of the loss of the same tokens with {far} instead of {near} tokens of context: "
        f"{change.text('{:+.3f}'.format)} nats/token"
    )
    answers, over = [change], [f"change: {change.over('documents')}"]
    other = _unrelated(table, mine, far)
    if _has_both(both := pd.concat([other.assign(x=near), mine[mine["x"] == far]])):
        each = by_document(mine, evidence, ("nll_sum_unrelated", far), **count)
        answers += [_change(method, both, each)]
        found += f", and {answers[1].text('{:+.3f}'.format)} relative to another document's text"
        over.append(f"relative to another document's text: {answers[1].over('documents')}")
    found, basis = f"{found}.", basis_of(*over, models(rows))
    sure = [each for each in answers if max(each.seeds) > 1]
    if any(each.high >= 0 and each.low > -GAIN for each in sure):
        return Judged(NO, found, basis)
    if len(sure) < len(answers):
        return Judged(UNDECIDED, found, basis, f"one seed{' with the other text' if sure else ''}")
    if all(each.high < 0 for each in answers):
        return Judged(YES, found, basis)
    return Judged(UNDECIDED, found, basis, "the interval includes both")


def _unrelated(table: pd.DataFrame, rows: pd.DataFrame, far: int) -> pd.DataFrame:
    """Return the losses of the same tokens of these models with as much text before them, the furthest of it another
    document's."""
    other = table[table["metric"] == f"{METRIC}_unrelated"]
    other = other[pd.to_numeric(other["context_length"]) == far]
    return other[other["cell"].isin(rows["cell"])] if "cell" in rows else other.iloc[:0]


def _change(method: Method, rows: pd.DataFrame, each: pd.DataFrame) -> Interval:
    """Return the interval of the change of a method, in pairs of documents where `each` has them."""
    samples = intervals.samples(changes(rows))
    return in_pairs(each, rows, method, None, samples) or intervals.intervals(samples)[method]


def _has_both(rows: pd.DataFrame) -> bool:
    return bool(rows["x"].nunique() == 2)


def changes(rows: pd.DataFrame) -> pd.DataFrame:
    """Return, for each model, its value at the longest x minus that at the shortest.

    Both are of the same documents, so errors over documents, unless every method has a single seed, are left out.
    """
    keys = ["attention", "options", "seed"]
    start, end = (rows[rows["x"] == at] for at in (rows["x"].min(), rows["x"].max()))
    both = end.merge(start, on=keys, suffixes=("", "_start"))
    several = both.groupby(["attention", "options"])["seed"].nunique().gt(1).any()
    errors = np.hypot(both["stderr"].fillna(0.0), both["stderr_start"].fillna(0.0))
    stderr, n = (0.0, 0) if several else (errors, both["n"])
    changed: pd.DataFrame = both.assign(value=both["value"] - both["value_start"], stderr=stderr, n=n)
    return changed


def beyond_window(table: pd.DataFrame, rows: pd.DataFrame, evidence: Evidence) -> tuple[bool | None, str, str]:
    """Return whether the same targets are predicted better with the longest context than with NEAR times the training
    length, and by more than the window's; that in words, and what it is over.

    rows: perplexities of the setting at both ends. Empty texts: fixed targets were not measured of both.
    """
    targets = table[(table["metric"] == METRIC) & (table["train_len"] == rows["train_len"].iloc[0])]
    targets = targets.assign(x=pd.to_numeric(targets["context_length"]))
    ends = (NEAR * int(rows["x"].min()), int(rows["x"].max()))
    same = [name for name in ("model", "eval_len", "corpus", "tokenizer", "train_tokens") if name in rows]
    targets = targets[targets["x"].isin(ends)].merge(rows[same].drop_duplicates(), on=same)
    if "targets" in targets:
        targets = targets[targets["targets"] == targets["targets"].max()]
    complete = targets.groupby(["attention", "options"])["x"].transform("nunique") == len(ends)
    samples = intervals.samples(changes(targets[complete])) if complete.any() else {}
    if STICK not in samples or WINDOW not in samples:
        return None, "", ""
    count = {"targets": targets["targets"].iloc[0]} if "targets" in targets else {}
    own = intervals.intervals(samples)[STICK]
    beyond = intervals.differences(samples, WINDOW)[STICK]
    each = by_document(targets, evidence, **count)
    own = in_pairs(each, targets, STICK, None, samples) or own
    beyond = in_pairs(each, targets, STICK, WINDOW, samples) or beyond
    text = (
        f" Change of stick-breaking's loss of the same tokens from {ends[0]} to {ends[1]}: "
        f"{own.text('{:+.3f}'.format)} nats/token, and {beyond.text('{:+.3f}'.format)} relative to a sliding window."
    )
    over = f"loss of the same tokens: {own.over('documents')}; relative to the window: {beyond.over('documents')}"
    both = statistics.holm([own.below(0.0), beyond.below(0.0)])
    return all(p < ALPHA for p in both), text, over


def by_document(
    rows: pd.DataFrame, evidence: Evidence, other: tuple[str, int] | None = None, **count: object
) -> pd.DataFrame:
    """Return the change of the mean loss of each document (across) from the shorter context to the longer, by cell.

    other: where the change starts instead, as the name of the sums of losses and the context length.
    """
    values = evidence.values(rows["cell"]) if "cell" in rows else documents.nothing(())
    start, end = (
        documents.sums(values, name, context_length=at, **count)
        / documents.sums(values, "tokens", context_length=at, **count)
        for name, at in (other or ("nll_sum", int(rows["x"].min())), ("nll_sum", int(rows["x"].max())))
    )
    # cells without one of them have nothing, as have documents that only some cells have
    change: pd.DataFrame = (end - start).dropna(axis=0, how="all").dropna(axis=1)
    return change


def in_pairs(
    change: pd.DataFrame, rows: pd.DataFrame, of: Method, other: Method | None, samples: Mapping[Method, Sample]
) -> Interval | None:
    """Return the mean of changes by document of a method, less another's; None where they are not stored for all
    seeds."""
    spreads = pooling.spreads(samples)
    each = pd.DataFrame(1.0, index=change.index[:1], columns=change.columns)
    mine = change[change.index.isin(documents.cells_of(rows, of))]
    if len(mine) < samples[of].seeds:
        return None
    if other is None:
        found = documents.difference(mine, 0.0 * each, each, (spreads[of], statistics.UNKNOWN))
        return found and dataclasses.replace(found, seeds=(len(mine),))
    others = change[change.index.isin(documents.cells_of(rows, other))]
    if len(others) < samples[other].seeds:
        return None
    return documents.difference(mine, others, each, (spreads[of], spreads[other]))
