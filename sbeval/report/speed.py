"""Rules of claims on speed: of training, and of the kernel."""

import math

import pandas as pd

from sbeval.errors import InputError
from sbeval.report.judge import (
    BILLION,
    FASTER,
    SLOWER,
    UNDECIDED,
    Evidence,
    Judged,
    basis_of,
    nearest,
    too_small,
    verdict,
)
from sbeval.tables import intervals, selection
from sbeval.tables.published import SPEED
from sbeval.tables.rows import ROPE, STICK
from sbeval.tables.statistics import Interval, Scale

# options of this project's kernel, see `selection.dense_kernels`, and of the one it is compared with
KERNELS = ["", "flash"]
TIMES = ["time", "time_q20", "time_q80"]
# every key is visited
NOTHING_SKIPPED = (STICK[0], "epsilon=0")
# softmax kernels that count as FlashAttention
FUSED = ("flash", "cudnn")
# runs of a model, fewer of which decide nothing
RUNS = 3


def training_speed(table: pd.DataFrame, evidence: Evidence) -> Judged:
    """Judge which share of RoPE's tokens per second training reaches, by the faster of softmax's kernels."""
    rows = table[(table["metric"] == "throughput") & (table["step"] == "train")]
    rows = nearest(rows, ["model", "device", "dtype", "queries", "batch", "head_dim"])
    rope = _fastest(intervals.method(rows, ROPE))
    stick, dense = (intervals.method(rows, of) for of in (STICK, NOTHING_SKIPPED))
    fastest = [_fastest(each) for each in (stick, dense) if len(each)]
    changes = [_ratio(each, rope) for each in fastest]
    shares = " % of RoPE's, with nothing skipped ".join(_percent(change).text("{:.0f}".format) for change in changes)
    runs, backends = int(pd.concat([stick, dense, rope])["n"].min()), sorted(set(rope["backend"]))
    found = (
        f"Tokens a second: stick-breaking {fastest[0]['value'].mean():,.0f}, RoPE {rope['value'].mean():,.0f}; "
        f"{shares} %."
    )
    basis = basis_of(
        f"{runs} run{'s' * (runs > 1)} each",
        f"RoPE through {', '.join(backends)}",
        f"{rows['model'].iloc[0]} model, {rows['queries'].iloc[0]} tokens a sequence",
        f"{rows['device'].iloc[0]}",
    )
    far = too_small(rows, BILLION)
    if not set(backends) & set(FUSED):
        far = f"RoPE ran through {', '.join(backends)}, and the claim is about FlashAttention-2"
    elif runs < RUNS:
        far = f"{runs} run{'s' * (runs > 1)} each, fewer than {RUNS}"
    bound = math.log(SPEED)
    if any(change.high < bound for change in changes):
        return verdict(False, found, basis, far=far)
    if dense.empty:
        far = far or "with nothing skipped it was not measured (stick_breaking:epsilon=0)"
    return verdict(True if all(change.low >= bound for change in changes) else None, found, basis, far=far)


def _ratio(rows: pd.DataFrame, rope: pd.DataFrame) -> Interval:
    """Return the logarithm of the ratio of throughputs to RoPE's."""
    samples = intervals.samples(pd.concat([rows.assign(options=""), rope]), Scale.LOG)
    return intervals.differences(samples, ROPE, Scale.LOG)[STICK]


def _percent(change: Interval) -> Interval:
    """Return the ratio of a difference of logarithms, in percent."""
    mean, low, high = (100 * math.exp(end) for end in (change.mean, change.low, change.high))
    return Interval(mean, low, high)


def _fastest(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the backend with the most tokens per second."""
    means = rows.groupby("backend")["value"].mean()
    return rows[rows["backend"] == means.idxmax()]


def kernel_speed(step: str, table: pd.DataFrame, evidence: Evidence) -> Judged:
    """Judge whether the kernel is faster than FlashAttention-2 at the longest sequence that both have on a device."""
    times = pd.concat(selection.dense_kernels(table, metric) for metric in TIMES)
    times = times[(times["step"] == step) & times["options"].isin(KERNELS)]
    wide = times.pivot_table("value", ["device", "head_dim", "queries", "batch"], ["metric", "options"])
    both = wide.reindex(columns=pd.MultiIndex.from_product([TIMES, KERNELS])).dropna()
    if both.empty:
        raise InputError(f"no times of {step.replace('_', ' + ')} of both this kernel and FlashAttention-2")
    # the shortest times of one over the longest of the other
    ends = zip(("mean", "low", "high"), TIMES, ("time", "time_q80", "time_q20"), strict=True)
    each = pd.DataFrame({name: both[flash, "flash"] / both[ours, ""] for name, flash, ours in ends})
    longest = each.reset_index().groupby(["device", "head_dim"]).tail(1)
    several = longest["device"].nunique() > 1
    ratios, parts, places = [], [], {}
    for device, dim, queries, _, mean, low, high in longest.itertuples(index=False, name=None):
        ratios.append(Interval(mean, low, high))
        heads = f"heads of {dim:g}{f' on {device}' * several}"
        parts.append(f"{ratios[-1].text('{:.2f}'.format)} with {heads}")
        places[heads] = f"{queries:g} tokens{f', {device}' * (not several)}"
    found = f"Throughput relative to FlashAttention-2: {', '.join(parts)}."
    same = len(set(places.values())) == 1
    where = [next(iter(places.values()))] if same else [f"{heads}: {place}" for heads, place in places.items()]
    basis = basis_of(*where, "intervals from 20 to 80 % of timings")
    answers = {SLOWER if ratio.high <= 1 else FASTER if ratio.low > 1 else UNDECIDED for ratio in ratios}
    if len(answers) > 1:
        return Judged(UNDECIDED, found, basis, "it depends on the head size or the device")
    (answer,) = answers
    return Judged(answer, found, basis, "the timings include both" if answer == UNDECIDED else "")
