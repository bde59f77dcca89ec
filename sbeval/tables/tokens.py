"""The gap between methods by training tokens: a limit plus a power of tokens, with intervals.

    gap(D) = limit + amplitude (D / D1)^-exponent

D are training tokens, D1 the fewest. A gap is a method's mean loss over test documents at the training length (nats per
token, the logarithm of perplexity) minus the baseline's. The fit is by least squares, with exponents from 0.1 to 3; at
an end of this range the tokens do not tell the limit. It crosses 0 where a method that is behind at first passes the
baseline, or one that is ahead falls behind. Gaps at two or three token counts are given without a fit.

Intervals are 95 %. Models of one seed share a trunk, so their errors do too: the errors of a method's means at all
token counts are drawn together, from the covariance of seeds around the mean of their method, with Student's t for its
degrees of freedom; the gaps with these errors are fitted again. The covariance is pooled over methods, but for one
whose seeds vary more than the others' (`sbeval.tables.pooling`), which keeps its own. Documents are the same for all
methods and token counts, and their sampling is not part of it. If no method has a second seed there is no interval.
"""

import itertools
import math
from collections.abc import Callable, Set
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from rich.table import Table as Terminal

from sbeval.errors import InputError, choose
from sbeval.tables import intervals, markup, mqrar, pooling
from sbeval.tables.rows import ROPE, Identity, Method, Provenance, labels, spec_of
from sbeval.tables.selection import LENGTH_GEN, RECIPE, at_training_length, length_gen_setting
from sbeval.tables.statistics import Floats, Scale

COLUMNS = ("attention", "options", "seed", "metric", "value", "context_length", *LENGTH_GEN.columns)
# token counts below which three parameters are not fitted
FEWEST = 4
EXPONENTS = np.linspace(0.1, 3.0, 581)
DRAWS = 4000
TAILS = (2.5, 97.5)
LABELS = labels(Identity, Provenance, mqrar.Row)
FORMATS = ("terminal", "markdown", "csv")


@dataclass(frozen=True, slots=True)
class Bounded:
    """A number and its 95 % interval; NaN where there is none."""

    value: float
    low: float = math.nan
    high: float = math.nan

    def text(self) -> str:
        shown = f"{self.value:+.3f}"
        return (shown if math.isnan(self.low) else f"{shown} [{self.low:+.3f}, {self.high:+.3f}]").replace("-", "−")


@dataclass(frozen=True, slots=True, kw_only=True)
class Law:
    """A fit. first: the fewest tokens; crossing: tokens at which it is 0, infinite if it never is."""

    first: float
    limit: Bounded
    amplitude: float
    exponent: Bounded
    crossing: Bounded

    def at(self, tokens: Floats) -> Floats:
        """Return the fitted gap at these training tokens."""
        fitted: Floats = self.limit.value + self.amplitude * (tokens / self.first) ** -self.exponent.value
        return fitted

    @property
    def tells_limit(self) -> bool:
        """Whether the exponent is inside the range that is tried: at its ends the tokens do not tell the limit."""
        return bool(EXPONENTS[0] < self.exponent.value < EXPONENTS[-1])

    def crosses(self, write: Callable[[float], str] = "{:.2g}".format) -> str:
        """Return at how many tokens the fit is 0, in words, with its interval."""
        value, *bounds = (
            write(count) if count < math.inf else "never"
            for count in (self.crossing.value, self.crossing.low, self.crossing.high)
        )
        if not math.isnan(self.crossing.low) and set(bounds) != {value}:
            return f"{value} [{bounds[0]}, {bounds[1]}]"
        if self.crossing.value == math.inf:
            return f"nowhere, {'ahead' if self.limit.value < 0 else 'behind'} throughout"
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Ladder:
    """The gap of one method to the baseline in one setting, at two token counts or more.

    seeds: of the method and of the baseline, at each count. law: the fit, None at fewer than FEWEST counts.
    """

    setting: str
    method: Method
    seeds: list[tuple[int, int]]
    tokens: Floats
    gaps: list[Bounded]
    law: Law | None

    def over(self, word: str = "", write: Callable[[float], str] = "{:.3g}".format) -> str:
        """Return the seeds of the method and of the baseline; where they change, up to how many tokens each are."""
        (mine, base), changes = self.seeds[0], [pair != after for pair, after in itertools.pairwise(self.seeds)]
        if not any(changes):
            return f"{mine} and {base}{word}"
        ends = [index for index, change in enumerate([*changes, True]) if change]
        counts = [f"{mine} and {base}" for mine, base in (self.seeds[end] for end in ends)]
        return ", ".join(
            f"{count}{'' if number else word} to {write(self.tokens[end])}"
            for number, (count, end) in enumerate(zip(counts, ends, strict=True))
        )


def fit(tokens: Floats, gaps: Floats) -> Floats:
    """Return limit, amplitude and exponent (N, 3) of the power laws nearest to gaps (N, T) at tokens (T,)."""
    x = (tokens / tokens[0]) ** -EXPONENTS[:, None]
    x_mean, y_mean = x.mean(1), gaps.mean(1, keepdims=True)
    x_off, y_off = x - x_mean[:, None], gaps - y_mean
    covariance = y_off @ x_off.T
    slopes = covariance / (x_off**2).sum(1)
    # the sum of squares that is left is that of y_off less this
    best = (covariance * slopes).argmax(1)
    amplitude = slopes[np.arange(len(gaps)), best]
    return np.stack([y_mean[:, 0] - amplitude * x_mean[best], amplitude, EXPONENTS[best]], 1)


def ladders(table: pd.DataFrame) -> list[Ladder]:
    """Return the gap by training tokens of every method that has two token counts in common with the baseline."""
    rows = at_training_length(table)
    setting = [name for name in length_gen_setting(rows).columns if name != "train_tokens"]
    # what tells settings apart
    titled = [name for name in setting if name in (*LENGTH_GEN.always, *RECIPE) or rows[name].nunique() > 1]
    found = []
    for key, group in rows.groupby(setting, dropna=False):
        counts = group.pivot_table("value", ["attention", "options", "seed"], "train_tokens")
        losses = counts.astype(float).map(math.log, na_action="ignore")
        samples = intervals.grouped(group.assign(stderr=math.nan), ["train_tokens"], Scale.LOG)
        apart = pooling.outlying(samples.values())
        named = dict(zip(setting, key, strict=True))
        title = ", ".join(LABELS.get(name, f"{name.replace('_', ' ')} {{}}").format(named[name]) for name in titled)
        for method in dict.fromkeys((str(attention), str(options)) for attention, options, _ in losses.index):
            if method != ROPE and (ladder := _ladder(title, losses, method, apart)):
                found.append(ladder)
    return found


def _ladder(setting: str, losses: pd.DataFrame, method: Method, apart: Set[Method]) -> Ladder | None:
    pair = [losses[_is(losses, of)] for of in (method, ROPE)]
    counts = [name for name in losses if all(of[name].notna().any() for of in pair)]
    if len(counts) < 2:
        return None
    mine, base = (of[counts] for of in pair)
    seeds = pd.DataFrame([mine.count(), base.count()])
    tokens, gaps = np.array(counts, dtype=float), (mine.mean() - base.mean()).to_numpy()
    drawn = gaps + _errors(losses[counts], method, apart, 1 / seeds.to_numpy())
    return Ladder(
        setting=setting,
        method=method,
        seeds=[(int(first), int(second)) for first, second in seeds.T.to_numpy()],
        tokens=tokens,
        gaps=[_bounded(float(gap), drawn[:, index]) for index, gap in enumerate(gaps)],
        law=_law(tokens, gaps, drawn) if len(counts) >= FEWEST else None,
    )


def _law(tokens: Floats, gaps: Floats, drawn: Floats) -> Law:
    """Return the fit of gaps (T,), with intervals by those of gaps with errors (N, T)."""
    limit, amplitude, exponent = (float(number) for number in fit(tokens, gaps[None])[0])
    refitted = fit(tokens, drawn)
    return Law(
        first=float(tokens[0]),
        limit=_bounded(limit, refitted[:, 0]),
        amplitude=amplitude,
        exponent=_bounded(exponent, refitted[:, 2]),
        crossing=_crossing(float(tokens[0]), np.array([limit, amplitude, exponent]), refitted),
    )


def fitted(table: pd.DataFrame) -> list[Ladder]:
    """Return the ladders of every setting in which one has a fit; InputError where none has."""
    found = ladders(table)
    settings = {each.setting for each in found if each.law}
    if not settings:
        raise InputError(
            f"no method has {FEWEST} or more counts of training tokens in common with RoPE in one setting; "
            "sbeval run tokens, or length-gen --schedule wsd with --branch, trains such models"
        )
    return [each for each in found if each.setting in settings]


def _crossing(first: float, fitted: Floats, drawn: Floats) -> Bounded:
    """Return where fits are 0, by limit, amplitude and exponent: of these (3,), and the interval of those (N, 3).

    A drawn fit whose limit is on the side of the first gap never is; one that begins on the other was before.
    """
    side = math.copysign(1.0, fitted[0] + fitted[1])

    def at(limit: Floats, amplitude: Floats, exponent: Floats) -> Floats:
        across = side * limit < 0
        ratio = np.clip(amplitude / np.where(across, -limit, 1.0), 0.0, None)
        with np.errstate(over="ignore"):
            tokens: Floats = np.where(across, first * ratio ** (1 / exponent), math.inf)
        return tokens

    value = float(at(*fitted[:, None])[0])
    if not len(drawn):
        return Bounded(value)
    # not interpolated: between a number and infinity there is none
    low, high = np.percentile(at(*drawn.T), TAILS, method="nearest")
    return Bounded(value, float(low), float(high))


def _is(losses: pd.DataFrame, method: Method) -> "npt.NDArray[np.bool_]":
    return np.array([(attention, options) == method for attention, options, _ in losses.index])


def _errors(losses: pd.DataFrame, method: Method, apart: Set[Method], inverses: Floats) -> Floats:
    """Draw errors (N, T) of the gap of a method to the baseline at T token counts; none (0, T) if seeds are too few.

    apart: the methods that are not pooled; nor are those with the weights of another. inverses: 1 / seeds of the method
    and of the baseline, (2, T).
    """
    again = np.array([pooling.SAME_WEIGHTS in options for _, options, _ in losses.index])
    common = losses[~np.any([again, *(_is(losses, of) for of in apart)], axis=0)]
    generator = np.random.default_rng(0)
    if not apart & {method, ROPE}:
        errors: Floats = _drawn(common, generator) * np.sqrt(inverses.sum(0))
        return errors
    mine, base = (_drawn(losses[_is(losses, of)] if of in apart else common, generator) for of in (method, ROPE))
    known = min(len(mine), len(base))
    errors = mine[:known] * np.sqrt(inverses[0]) + base[:known] * np.sqrt(inverses[1])
    return errors


def _drawn(losses: pd.DataFrame, generator: np.random.Generator) -> Floats:
    """Draw errors (N, T) of one seed of these methods; none (0, T) if no method has a second seed."""
    losses = losses.dropna(how="all")
    groups = losses.groupby(level=["attention", "options"])
    # where a method has all of its seeds; at other token counts those of the last such count before, or else the first
    all_there = groups.transform("count").eq(groups.transform("size"), axis=0)
    off = (losses - groups.transform("mean")).where(all_there).ffill(axis=1).bfill(axis=1).dropna()
    freedom = len(off) - off.groupby(level=["attention", "options"]).ngroups
    if freedom < 1:
        return np.empty((0, losses.shape[1]))
    student = generator.standard_normal((DRAWS, len(off))) / np.sqrt(generator.chisquare(freedom, (DRAWS, 1)))
    errors: Floats = student @ off.to_numpy()
    return errors


def _bounded(value: float, drawn: Floats) -> Bounded:
    if not len(drawn):
        return Bounded(value)
    low, high = np.percentile(drawn, TAILS)
    return Bounded(value, float(low), float(high))


def frame(table: pd.DataFrame) -> pd.DataFrame:
    """Return gaps and their fits, a method each; InputError where no method has enough token counts."""
    return pd.DataFrame(
        {
            "setting": each.setting,
            "method": spec_of(*each.method),
            "seeds": each.over(),
            "tokens": f"{each.tokens[0]:.4g} to {each.tokens[-1]:.4g}",
            "gap at the most": each.gaps[-1].text(),
            "limit": each.law.limit.text() if each.law else "",
            "exponent": each.law.exponent.text().replace("+", "") if each.law else "",
            "is 0 at": each.law.crosses() if each.law else "",
        }
        for each in fitted(table)
    )


def render(table: pd.DataFrame, format: str = "terminal") -> Terminal | str:
    """Return the fits in a format."""
    choose("format", format, FORMATS)
    rows = frame(table)
    if format == "csv":
        return rows.to_csv(index=False).rstrip("\n")
    if format == "markdown":
        return markup.table([str(name) for name in rows], rows.to_numpy().tolist())
    shown = Terminal(title="Loss minus RoPE's by training tokens D (nats per token): limit + amplitude D^-exponent")
    for name in rows:
        shown.add_column(str(name))
    for line in rows.to_numpy().tolist():
        shown.add_row(*line)
    return shown
