"""Judge the paper's claims by result tables: for each claim a function from its table to a verdict with numbers.

A rule compares plain stick-breaking with plain RoPE in the same setting: of several, the one nearest the paper's, which
is that of the largest model, then of the most training tokens. `sbeval.report.claims` states each rule in words.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import pandas as pd

from sbeval.errors import InputError
from sbeval.tables import epochs, few_shot, selection
from sbeval.tables.published import LENGTHS, SOLVED, SOLVED_ACCURACY, SOLVED_AT, SOLVED_TOKENS, SPEED
from sbeval.tables.statistics import Interval, below, by_seed, difference, interval, logarithm, method, percent

AGREES, DISAGREES, UNDECIDED = "agrees", "disagrees", "not decided"
METHODS = {"stick-breaking": ("stick_breaking", ""), "RoPE": ("rope", "")}
STICK, ROPE = METHODS.values()
BILLION = 1e9
# a model this many times smaller than the paper's does not decide a claim about the paper's size
FAR = 4
# a perplexity that is higher by less has not risen
RISE = 0.02
# a model with a mean score below this finds nothing
NOTHING = 0.05
# percentage points by which competitive scores may differ
POINTS = 1.0
KERNELS = ["triton", "flash"]
# a model that answers fewer of the queries with stale values has not learned to
LEARNED = 0.95
# the default scale of stick-breaking in recall tasks, that of the author's code
SCALED = "logit_scale=1.5"
TIMES = ["time", "time_q20", "time_q80"]


@dataclass(frozen=True, slots=True)
class Judged:
    """A verdict, what the results show in words with numbers, and the reason for no verdict or for rows left out."""

    verdict: str
    found: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A claim and its source, the rule by which `judge` decides it, and where its rows come from."""

    text: str
    source: str
    rule: str
    table: str
    command: str
    figure: str
    judge: Callable[[pd.DataFrame], Judged]


@dataclass(frozen=True, slots=True)
class Finding:
    claim: Claim
    judged: Judged


def findings(claims: Iterable[Claim], tables: Mapping[str, pd.DataFrame]) -> list[Finding]:
    """Judge each claim by its table."""
    return [Finding(claim, _judge(claim, tables)) for claim in claims]


def _judge(claim: Claim, tables: Mapping[str, pd.DataFrame]) -> Judged:
    if claim.table not in tables:
        return Judged(UNDECIDED, reason=f"not measured here; {claim.command} does")
    table, left_out = _without_overfit(tables[claim.table])
    try:
        judged = claim.judge(table)
    except InputError as error:
        judged = Judged(UNDECIDED, reason=str(error))
    reason = "; ".join(filter(None, [judged.reason, left_out]))
    return dataclasses.replace(judged, reason=reason)


def _without_overfit(table: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Return the rows of models that do not overfit, and a sentence that names the methods of the others."""
    overfit = epochs.overfit(table)
    methods = sorted({":".join(filter(None, pair)) for pair in table.loc[overfit, ["attention", "options"]].to_numpy()})
    return table[~overfit], f"left out, as they overfit: models of {', '.join(methods)}" if methods else ""


def lengths(table: pd.DataFrame) -> Judged:
    """Judge whether perplexity rises from the training length to eight times that."""
    train_len, longest = LENGTHS
    rows = selection.by_context(table)
    rows = rows[(rows["train_len"] == train_len) & rows["x"].isin(LENGTHS)]
    setting = selection.LENGTH_GEN.columns
    rows = rows[
        rows.groupby(["attention", "options", *setting], dropna=False)["x"].transform("nunique") == len(LENGTHS)
    ]
    if rows.empty:
        raise InputError(f"no model trained at {train_len} tokens was evaluated up to {longest}")
    rows = nearest(rows, setting)
    ends = {name: [by_seed(rows[rows["x"] == at], of) for at in LENGTHS] for name, of in METHODS.items()}
    changes = {name: difference(logarithm(end), logarithm(start), "documents") for name, (start, end) in ends.items()}
    rises = " and ".join(
        f"{name} from {start['value'].mean():.1f} to {end['value'].mean():.1f}, {changes[name].text(percent)}"
        for name, (start, end) in ends.items()
    )
    stick, rope = changes["stick-breaking"], changes["RoPE"]
    found = f"Perplexity goes with {rises} ({stick.over}; {_models(rows)})."
    if below(stick, RISE) is False or below(rope, RISE):
        return Judged(DISAGREES, found)
    decided = below(rope, RISE) is False and stick.mean <= RISE and stick.high < rope.low
    return verdict(True if decided else None, found)


def within(table: pd.DataFrame) -> Judged:
    """Judge whether perplexity at the training length is as low as RoPE's."""
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
    """Judge which numbers of key-value pairs are solved."""
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
    claimed = {("stick-breaking", most): True, ("RoPE", SOLVED["rope"]): True, ("RoPE", most): False}
    answers = {(name, pairs): _solves(mine, METHODS[name], pairs) for name, pairs in claimed}
    if any(answers[key] is (not wanted) for key, wanted in claimed.items()):
        return Judged(DISAGREES, found)
    if missing := [f"{name} with {pairs} pairs" for (name, pairs), answer in answers.items() if answer is None]:
        return Judged(UNDECIDED, found, f"not measured, or too briefly trained: {', '.join(missing)}")
    return Judged(AGREES, found)


def _solves(rows: pd.DataFrame, of: tuple[str, str], pairs: int) -> bool | None:
    """Return None without rows, or for a failure trained on fewer tokens than the paper's: plateaus end late."""
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
    """Judge whether stick-breaking attends less to stale values, in the head with the most weight on the latest."""
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
    """Judge which share of RoPE's tokens per second training reaches, by the faster of softmax's kernels."""
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
    """Judge whether the kernel is slower than FlashAttention-2 at the longest sequence that both have on a device."""
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
    ratios, parts = [], []
    for device, dim, queries, _, mean, low, high in longest.itertuples(index=False, name=None):
        ratios.append(Interval(mean, low, high, "20 to 80 % of timings"))
        parts.append(f"{ratios[-1].text('{:.2f}'.format)} (heads of {dim:g}, {queries:g} tokens, {device})")
    found = f"This kernel's throughput over FlashAttention-2's: {', '.join(parts)}; {ratios[0].over}."
    answers = {below(ratio, 1.0) for ratio in ratios}
    if len(answers) > 1:
        return Judged(UNDECIDED, found, "it depends on the head size or the device")
    return verdict(answers.pop(), found)


def retrieval(table: pd.DataFrame) -> Judged:
    """Judge whether stick-breaking finds more needles past the training length."""
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


def benchmarks(table: pd.DataFrame) -> Judged:
    """Judge whether the average score is as high as RoPE's, or nearly."""
    chosen = few_shot.headline(table)
    chosen = chosen[[few_shot.METRICS[metric] for metric in chosen["metric"]]]
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


def verdict(answer: bool | None, found: str, *, far: str = "") -> Judged:
    """Turn the answer to a claim into a verdict; `far` says why the setting cannot decide the claim."""
    if far:
        return Judged(UNDECIDED, found, far)
    if answer is None:
        return Judged(UNDECIDED, found, "the interval includes both")
    return Judged(AGREES if answer else DISAGREES, found)


def nearest(rows: pd.DataFrame, by: Iterable[str]) -> pd.DataFrame:
    """Return the rows of both methods in the setting nearest the paper's; InputError where no setting has both."""
    plain = rows[rows["attention"].isin([name for name, _ in METHODS.values()]) & (rows["options"] == "")]
    both = [part for _, part in plain.groupby(list(by), dropna=False) if part["attention"].nunique() == 2]
    if not both:
        raise InputError("no setting has rows of both stick-breaking and RoPE")
    return max(both, key=lambda part: (part["params"].max(), part["train_tokens"].max()))


def too_small(rows: pd.DataFrame, params: float) -> str:
    """Return why models of these rows are no evidence for a claim about `params` parameters; empty when they are."""
    mine = float(rows["params"].max())
    return "" if mine * FAR >= params else f"models of {size(mine)} parameters, the paper's have {size(params)}"


def size(params: float) -> str:
    """Write a number of parameters or tokens with three digits."""
    return f"{params / 1e9:.3g} B" if params >= 1e9 else f"{params / 1e6:.3g} M"
