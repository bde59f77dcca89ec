"""The rules by which result tables decide claims; in words they stand beside each claim in `sbeval.report.claims`."""

import pandas as pd

from sbeval.errors import InputError
from sbeval.report.findings import AGREES, DISAGREES, METHODS, UNDECIDED, Judged, nearest, size, too_small, verdict
from sbeval.tables import few_shot as scores
from sbeval.tables import selection
from sbeval.tables.published import LENGTHS, SOLVED, SOLVED_ACCURACY, SOLVED_AT, SOLVED_TOKENS, SPEED
from sbeval.tables.statistics import Interval, below, by_seed, difference, interval, logarithm, method, percent

# a perplexity that is higher by less has not risen
RISE = 0.02
# a mean score below this says that a model finds nothing
NOTHING = 0.05
# percentage points by which competitive scores may differ
POINTS = 1.0
BILLION = 1e9
KERNELS = ["triton", "flash"]
# a model that answers fewer of the queries with stale values has not learned to
LEARNED = 0.95
# in tasks of recall stick-breaking has the scale of the author's code, unless told otherwise
SCALED = "logit_scale=1.5"
TIMES = ["time", "time_q20", "time_q80"]
STICK, ROPE = METHODS.values()


def lengths(table: pd.DataFrame) -> Judged:
    """Does perplexity rise from the training length to eight times that?"""
    train_len, read = LENGTHS
    rows = selection.by_context(table)
    rows = rows[(rows["train_len"] == train_len) & rows["x"].isin(LENGTHS)]
    setting = selection.LENGTH_GEN.columns
    rows = rows[
        rows.groupby(["attention", "options", *setting], dropna=False)["x"].transform("nunique") == len(LENGTHS)
    ]
    if rows.empty:
        raise InputError(f"no model trained at {train_len} tokens was read to {read}")
    rows = nearest(rows, setting)
    ends = {name: [by_seed(rows[rows["x"] == at], of) for at in LENGTHS] for name, of in METHODS.items()}
    changes = {name: difference(logarithm(end), logarithm(start), "documents") for name, (start, end) in ends.items()}
    said = " and ".join(
        f"{name} from {start['value'].mean():.1f} to {end['value'].mean():.1f}, {changes[name].text(percent)}"
        for name, (start, end) in ends.items()
    )
    stick, rope = changes["stick-breaking"], changes["RoPE"]
    found = f"Perplexity goes with {said} ({stick.over}; {_models(rows)})."
    if below(stick, RISE) is False or below(rope, RISE):
        return Judged(DISAGREES, found)
    decided = below(rope, RISE) is False and stick.mean <= RISE and stick.high < rope.low
    return verdict(True if decided else None, found)


def within(table: pd.DataFrame) -> Judged:
    """Is perplexity at the training length as low as RoPE's?"""
    rows = selection.by_context(table)
    rows = nearest(rows[rows["x"] == rows["train_len"]], selection.LENGTH_GEN.columns)
    stick, rope = by_seed(rows, STICK), by_seed(rows, ROPE)
    change = difference(logarithm(stick), logarithm(rope), "documents")
    found = (
        f"Perplexity at {rows['x'].iloc[0]} tokens: stick-breaking {stick['value'].mean():.1f}, RoPE "
        f"{rope['value'].mean():.1f}; {change.text(percent)} ({change.over}; {_models(rows)})."
    )
    return verdict(below(change, RISE), found, far=too_small(rows, BILLION))


def recall(table: pd.DataFrame) -> Judged:
    """Which numbers of key-value pairs are solved?"""
    rows = selection.recall_accuracy(table)
    rows = _plain(rows[(rows["split"] == "all") & (rows["n_back"] == 1)])
    same = (rows[list(SOLVED_AT)] == pd.Series(SOLVED_AT)).all(axis=1)
    by = [name for name in selection.recall_setting(rows).columns if name != "preset"]
    mine = nearest(rows[same] if same.any() else rows, by)
    found = " ".join(_solved(mine, name) for name in METHODS)
    found += f" Vocabulary {mine['vocab_size'].iloc[0]}, {mine['seq_len'].iloc[0]} tokens."
    if not same.any():
        wanted = f"vocabulary of {SOLVED_AT['vocab_size']} in {SOLVED_AT['seq_len']} tokens"
        return Judged(UNDECIDED, found, f"nothing was measured at the paper's {wanted}")
    most = SOLVED["stick_breaking"]
    asked = {("stick-breaking", most): True, ("RoPE", SOLVED["rope"]): True, ("RoPE", most): False}
    answers = {(name, pairs): _solves(mine, METHODS[name], pairs) for name, pairs in asked}
    if any(answers[key] is (not wanted) for key, wanted in asked.items()):
        return Judged(DISAGREES, found)
    if missing := [f"{name} with {pairs} pairs" for (name, pairs), answer in answers.items() if answer is None]:
        return Judged(UNDECIDED, found, f"not measured, or too briefly trained: {', '.join(missing)}")
    return Judged(AGREES, found)


def _solves(rows: pd.DataFrame, of: tuple[str, str], pairs: int) -> bool | None:
    """None without rows, or where a failure was trained on fewer tokens than the paper's: plateaus end late."""
    cell = rows[(rows["attention"] == of[0]) & (rows["kv_pairs"] == pairs)]
    if cell.empty:
        return None
    if by_seed(cell, of)["value"].mean() >= SOLVED_ACCURACY:
        return True
    return False if cell["train_tokens"].max() >= SOLVED_TOKENS else None


def _solved(rows: pd.DataFrame, name: str) -> str:
    of = METHODS[name]
    mine = rows[rows["attention"] == of[0]]
    counts = sorted(int(pairs) for pairs in mine["kv_pairs"].unique())
    means = {pairs: interval(by_seed(mine[mine["kv_pairs"] == pairs], of), "sequences") for pairs in counts}
    solved = [pairs for pairs, accuracy in means.items() if accuracy.mean >= SOLVED_ACCURACY]
    most = counts[-1]
    best = f"solves {max(solved)} pairs" if solved else "solves none"
    accuracy = f"accuracy with {most}: {means[most].text('{:.3f}'.format)}, {means[most].over}"
    return f"{name[:1].upper()}{name[1:]} {best} of up to {most} ({accuracy})."


def distraction(table: pd.DataFrame) -> Judged:
    """Does less of stick-breaking's attention fall on stale values, in the head that looks at the latest ones most?"""
    stale = (table["metric"] == "accuracy") & (table["split"] == "stale")
    learned = table.loc[stale & (table["value"] >= LEARNED), "cell"]
    if learned.empty:
        raise InputError(f"no model answers {LEARNED} of the queries with stale values")
    shares = _plain(table[(table["metric"] == "share") & table["cell"].isin(learned)])
    latest = shares[shares["target"] == "latest"]
    heads = latest.loc[latest.groupby("cell")["value"].idxmax(), ["cell", "layer", "head"]]
    rows = nearest(shares[shares["target"] == "stale"].merge(heads), [*selection.ATTENTION_MAP, "model"])
    stick, rope = by_seed(rows, STICK), by_seed(rows, ROPE)
    less = difference(stick, rope, "sequences")
    found = (
        f"Weight on stale values: stick-breaking {stick['value'].mean():.3f}, RoPE {rope['value'].mean():.3f}; "
        f"difference {less.text('{:+.3f}'.format)} ({less.over}; {rows['kv_pairs'].iloc[0]} pairs, model "
        f"{rows['model'].iloc[0]})."
    )
    return verdict(below(less, 0.0), found)


def _plain(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.assign(options=rows["options"].mask(rows["options"] == SCALED, ""))


def training_speed(table: pd.DataFrame) -> Judged:
    """What share of RoPE's tokens a second does training reach, by the faster of softmax's kernels?"""
    rows = table[(table["metric"] == "throughput") & (table["step"] == "train")]
    rows = nearest(rows, ["model", "device", "dtype", "queries", "batch", "head_dim"])
    stick, rope = (method(rows, of).groupby("backend")["value"].mean().max() for of in (STICK, ROPE))
    runs = "one run each" if (rows["n"] == 1).all() else f"means of {rows['n'].min()} runs or more"
    found = (
        f"{stick:,.0f} against {rope:,.0f} tokens/s: {100 * stick / rope:.0f} % ({runs}, no interval; "
        f"{rows['model'].iloc[0]} model, {rows['queries'].iloc[0]} tokens a sequence, {rows['device'].iloc[0]})."
    )
    return verdict(bool(stick >= SPEED * rope), found, far=too_small(rows, BILLION))


def kernel_speed(step: str, table: pd.DataFrame) -> Judged:
    """Is stick-breaking's kernel slower than FlashAttention-2, at the longest sequence that both have on a device?"""
    times = pd.concat(selection.dense_kernels(table, metric) for metric in TIMES)
    times = times[(times["step"] == step) & times["backend"].isin(KERNELS)]
    wide = times.pivot_table("value", ["device", "head_dim", "queries", "batch"], ["metric", "backend"])
    both = wide.reindex(columns=pd.MultiIndex.from_product([TIMES, KERNELS])).dropna()
    if both.empty:
        raise InputError(f"no times of {step.replace('_', ' + ')} of both this kernel and FlashAttention-2")
    # the shortest times of one over the longest of the other
    ends = zip(("mean", "low", "high"), TIMES, ("time", "time_q80", "time_q20"), strict=True)
    each = pd.DataFrame({name: both[flash, "flash"] / both[ours, "triton"] for name, flash, ours in ends})
    longest = each.reset_index().groupby(["device", "head_dim"]).tail(1)
    ratios, said = [], []
    for device, dim, queries, _, mean, low, high in longest.itertuples(index=False, name=None):
        ratios.append(Interval(mean, low, high, "20 to 80 % of timings"))
        said.append(f"{ratios[-1].text('{:.2f}'.format)} (heads of {dim:g}, {queries:g} tokens, {device})")
    found = f"This kernel's throughput over FlashAttention-2's: {', '.join(said)}; {ratios[0].over}."
    answers = {below(ratio, 1.0) for ratio in ratios}
    if len(answers) > 1:
        return Judged(UNDECIDED, found, "it depends on the head size or the device")
    return verdict(answers.pop(), found)


def retrieval(table: pd.DataFrame) -> Judged:
    """Is more found past the training length?"""
    rows = selection.needle_scores(table)
    rows = rows[(rows["metric"] == "score") & (rows["length"] > rows["train_len"])]
    rows = nearest(rows, selection.NEEDLE.columns)
    means = selection.mean_over_tasks(rows)
    stick, rope = by_seed(means, STICK), by_seed(means, ROPE)
    gain = difference(stick, rope, "samples")
    lengths = ", ".join(f"{length}" for length in sorted(means["length"].unique()))
    found = (
        f"Mean score at {lengths} tokens, trained at {rows['train_len'].iloc[0]}: stick-breaking "
        f"{stick['value'].mean():.3f}, RoPE {rope['value'].mean():.3f}; difference {gain.text('{:+.3f}'.format)} "
        f"({gain.over}; {_models(rows)}; {rows['task'].nunique()} of RULER's 13 tasks)."
    )
    far = too_small(rows, BILLION)
    if max(stick["value"].mean(), rope["value"].mean()) < NOTHING:
        far = "neither finds anything there"
    answer = below(gain, 0.0)
    return verdict(None if answer is None else not answer, found, far=far)


def few_shot(table: pd.DataFrame) -> Judged:
    """Is the average as high as RoPE's, or nearly?"""
    chosen = scores.headline(table)
    chosen = chosen[[scores.METRICS[metric] for metric in chosen["metric"]]]
    chosen = chosen.assign(value=100 * chosen["value"], stderr=100 * chosen["stderr"], chance=100 * chosen["chance"])
    rows = nearest(chosen, ["model", "train_len", "eval_len", "corpus", "train_tokens"])
    shared = set(rows.loc[rows["attention"] == STICK[0], "benchmark"]) & set(
        rows.loc[rows["attention"] == ROPE[0], "benchmark"]
    )
    rows = rows[rows["benchmark"].isin(shared)]
    stick, rope = by_seed(rows, STICK), by_seed(rows, ROPE)
    gain = difference(stick, rope, "items")
    guess = rows.groupby("benchmark")["chance"].first().mean()
    found = (
        f"Average of {len(shared)} benchmarks: stick-breaking {stick['value'].mean():.1f} %, RoPE "
        f"{rope['value'].mean():.1f} %, guessing {guess:.1f} %; difference "
        f"{gain.text('{:+.1f}'.format)} points ({gain.over}; {_models(rows)})."
    )
    worse = below(gain, -POINTS)
    answer = None if gain.low < -POINTS <= gain.high else not worse
    return verdict(answer, found, far=too_small(rows, BILLION))


def _models(rows: pd.DataFrame) -> str:
    return f"{size(rows['params'].max())} parameters, {size(rows['train_tokens'].max())} training tokens"
