"""Statistics of report, comparisons, figures and tables: one definition of a mean, a difference and their intervals.

A number varies with two things: the seed of training, and the units (documents, items, sequences) that it is measured
on. An interval is 95 % and covers both. Each has a variance with a Student quantile of its own, and their squared
half-widths add, as those of the two numbers of a difference do (Zou and Donner 2008). The units' part does not shrink
with the number of seeds: all are measured on the same units.

Seeds are few, so their standard deviation is pooled over the methods of a setting: see `sbeval.tables.pooling`. Seeds
of two methods are independent, not pairs: equal seeds share the order of the data, and yet their values do not
correlate.

Perplexities are averaged and compared as logarithms. Shares (accuracies) are not pooled, since their variance depends
on their mean; their interval is Wilson's with as many units as have its variance (Korn and Graubard 1998). It keeps
within 0 and 1, and has a width also where all units agree. Simulated at shares within 0.05 of 0 and 1, it covers 94.8
to 95.8 %, where Jeffreys' covers 95.1 to 97.4 and Clopper and Pearson's 96 to 99. That of a difference in pairs covers
95.0 to 95.8 % at shares of 0.05 to 0.95 of 100 items or more, and too much where one share is 0: 99 % at 100 items.
"""

import enum
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy import special

Floats = npt.NDArray[np.float64]

LEVEL = 0.95
# the quantile at the upper end of an interval
UPPER = (1 + LEVEL) / 2
# units above which a bootstrap only costs memory: 1 GB for the 67,000 items of BLiMP
MANY = 1000


class Scale(enum.Enum):
    """How values vary: additively, by a factor (perplexity), or as shares of units between 0 and 1."""

    LINEAR = "linear"
    LOG = "log"
    SHARE = "share"


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value from n independent units (documents, sequences) and its standard error, None for a single unit."""

    value: float
    stderr: float | None
    n: int


def mean(values: Floats) -> Estimate:
    """Return the mean of values, one for each unit, (n,)."""
    n = len(values)
    return Estimate(float(values.mean()), float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else None, n)


def ratio(numerators: Floats, denominators: Floats) -> Estimate:
    """Return the sum of numerators over the sum of denominators, (n,) each, with the error of the linearised ratio.

    Units with denominator 0 are ignored.
    """
    counted = denominators > 0
    numerators, denominators = numerators[counted], denominators[counted]
    value = float(numerators.sum() / denominators.sum())
    return Estimate(value, mean((numerators - value * denominators) / denominators.mean()).stderr, len(numerators))


@dataclass(frozen=True, slots=True)
class Spread:
    """The standard deviation of a method's seeds, and its degrees of freedom; NaN and 0 where none is known."""

    sd: float
    freedom: float


UNKNOWN = Spread(math.nan, 0)


@dataclass(frozen=True, slots=True)
class Joint:
    """How two numbers vary together over the same units: the error of their difference, and the covariance of their
    errors."""

    stderr: float
    covariance: float
    units: int


def joint(of: Floats, other: Floats, weights: Floats) -> Joint:
    """Return how two ratios vary together. of, other: sums of each seed and unit, (seeds, units), over `weights`,
    (units,), of two units or more."""
    units = len(weights)
    sums = np.stack([of.mean(0), other.mean(0)])
    rest = (sums - sums.sum(1, keepdims=True) / weights.sum() * weights) / weights.mean()
    covariances = rest @ rest.T / (units - 1) / units
    difference = rest[0] - rest[1]
    return Joint(math.sqrt(difference @ difference / (units - 1) / units), float(covariances[0, 1]), units)


@dataclass(frozen=True, slots=True)
class Sample:
    """One number of a method: values by seed, the error of one seed over its units, and how many units there are."""

    values: Floats
    stderr: float
    units: int

    @property
    def seeds(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float:
        return float(self.values.mean())

    @property
    def own(self) -> Spread:
        """Return the standard deviation of these seeds alone."""
        return Spread(float(self.values.std(ddof=1)), self.seeds - 1) if self.seeds > 1 else UNKNOWN


@dataclass(frozen=True, slots=True)
class Interval:
    """A number and its bounds; the seeds of each method in it, and its units.

    freedom: degrees of freedom of the wider of its parts. paired: whether a difference is taken unit by unit.
    """

    mean: float
    low: float
    high: float
    seeds: tuple[int, ...] = (1,)
    units: int = 0
    freedom: float = math.inf
    paired: bool = False

    def text(self, write: Callable[[float], str]) -> str:
        """Return the number, and its interval in brackets unless that is within its last digit."""
        mean, low, high = (write(value).replace("-", "−") for value in (self.mean, self.low, self.high))
        return mean if low == mean == high else f"{mean} [{low}, {high}]"

    def over(self, unit: str) -> str:
        """Return what the interval is over; `unit`: the name of several units."""
        counts = " and ".join(map(str, self.seeds)) if len(set(self.seeds)) > 1 else str(self.seeds[0])
        each = " each" * (len(self.seeds) > 1 and len(set(self.seeds)) == 1)
        parts = [f"{counts} seed{'s' * (max(self.seeds) > 1)}{each}", f"{self.units:,} {unit}" if self.units else ""]
        return f"95 % over {', '.join(filter(None, parts))}{' in pairs' if self.paired else ''}"

    def above(self, bound: float) -> float:
        """Return the one-sided p value against the number being at most `bound`."""
        half = self.mean - self.low if self.mean > bound else self.high - self.mean
        if not half > 0:
            return 0.0 if self.mean > bound else 1.0
        return float(special.stdtr(self.freedom, (bound - self.mean) / half * _quantile(self.freedom)))

    def apart(self, bound: float) -> float:
        """Return the two-sided p value against the number being `bound`; NaN where it has no interval."""
        return min(1.0, 2 * min(self.above(bound), self.below(bound))) if self.high > self.low else math.nan

    def below(self, bound: float) -> float:
        """Return the one-sided p value against the number being at least `bound`."""
        return Interval(-self.mean, -self.high, -self.low, freedom=self.freedom).above(-bound)


def _quantile(freedom: float) -> float:
    return float(special.stdtrit(freedom, UPPER))


def interval(sample: Sample, spread: Spread) -> Interval:
    """Return the interval of a mean over seeds that have this standard deviation."""
    return _combined(sample.mean, [_of_seeds(spread, 1 / sample.seeds), _of_units(sample)], [sample])


def less(of: Sample, other: Sample, spread: tuple[Spread, Spread], pairs: Joint | None = None) -> Interval:
    """Return the interval of `of` minus `other`, whose seeds have these standard deviations.

    Errors of units add, unless they are the same for both and taken in `pairs`.
    """
    inverses = (1 / of.seeds, 1 / other.seeds)
    if spread[0] == spread[1]:
        seeds = [_of_seeds(spread[0], sum(inverses))]
    else:
        seeds = [_of_seeds(*part) for part in zip(spread, inverses, strict=True)]
    value = of.mean - other.mean
    if pairs is None:
        return _combined(value, [*seeds, _of_units(of), _of_units(other)], [of, other])
    both = [replace(one, stderr=pairs.stderr, units=pairs.units) for one in (of, other)]
    return replace(_combined(value, [*seeds, _of_units(both[0])], both), paired=True)


def _of_seeds(spread: Spread, inverse: float) -> tuple[float, float]:
    """Return half-width and degrees of freedom; `inverse`: one over the number of seeds."""
    if spread.freedom == 0:
        return 0.0, math.inf
    return _quantile(spread.freedom) * spread.sd * math.sqrt(inverse), float(spread.freedom)


def _of_units(sample: Sample) -> tuple[float, float]:
    freedom = max(sample.units - 1.0, 1.0)
    return (_quantile(freedom) * sample.stderr, freedom) if sample.stderr > 0 else (0.0, math.inf)


def _combined(value: float, parts: Sequence[tuple[float, float]], samples: Sequence[Sample]) -> Interval:
    half = math.hypot(*(part for part, _ in parts))
    seeds, units = tuple(sample.seeds for sample in samples), min(sample.units for sample in samples)
    return Interval(value, value - half, value + half, seeds, units, max(parts)[1])


def share(sample: Sample) -> Interval:
    """Return the interval of a share over its seeds and units: Wilson's, with as many units as have its variance."""
    p = min(max(sample.mean, 0.0), 1.0)
    z = _quantile(math.inf)
    half = math.hypot(_of_seeds(sample.own, 1 / sample.seeds)[0], z * sample.stderr)
    count = p * (1 - p) * (z / half) ** 2 if half > 0 and 0 < p < 1 else float(sample.units)
    if count <= 0:
        return Interval(p, p, p, (sample.seeds,), sample.units)
    middle = (p + z**2 / 2 / count) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(p * (1 - p) / count + (z / 2 / count) ** 2)
    # rounding must not exclude 0 or 1 where all units agree
    return Interval(p, min(p, max(0.0, middle - half)), max(p, min(1.0, middle + half)), (sample.seeds,), sample.units)


def minus(of: Interval, other: Interval, correlation: float = 0.0) -> Interval:
    """Return the interval of a difference of two numbers from theirs; of two shares, Newcombe's.

    Newcombe (1998), Stat. Med. 17: method 10 on page 873 for independent shares, method 8 on page 2635 for pairs.
    """
    value = of.mean - other.mean
    low = value - _side(of.mean - of.low, other.high - other.mean, correlation)
    high = value + _side(of.high - of.mean, other.mean - other.low, correlation)
    return Interval(value, low, high, (*of.seeds, *other.seeds), min(of.units, other.units))


def _side(one: float, other: float, correlation: float) -> float:
    return math.sqrt(max(0.0, one**2 + other**2 - 2 * correlation * one * other))


def shares_less(of: Sample, other: Sample, pairs: Joint | None = None) -> Interval:
    """Return the interval of one share minus another; `pairs`: over the same units."""
    if pairs is None:
        return minus(share(of), share(other))
    # seeds are independent
    errors = [math.hypot(_of_seeds(one.own, 1 / one.seeds)[0] / _quantile(math.inf), one.stderr) for one in (of, other)]
    product = errors[0] * errors[1]
    correlation = min(1.0, max(-1.0, pairs.covariance / product)) if product > 0 else 0.0
    return replace(minus(share(of), share(other), correlation), units=pairs.units, paired=True)


def bootstrap(of: Floats, other: Floats, weights: Floats, spread: tuple[Spread, Spread], draws: int = 2000) -> Interval:
    """Return the interval of a difference of two ratios by a bootstrap on two levels: seeds, and units in pairs.

    of, other: sums of each seed and unit, (seeds, units), over `weights`, (units,), such as losses over tokens. Units
    are drawn with replacement, the same for both. Two or three seeds are too few to be drawn themselves: the error of
    their mean is drawn from Student's t with `spread`. Percentiles are widened for the number of units (Hesterberg
    2015, arXiv 1411.5279). Above MANY units, whose mean is normal, nothing is drawn. Degrees of freedom, for p values
    at other levels than that of the interval, are those of `less`.
    """
    generator = np.random.default_rng(0)
    units = len(weights)
    means = [Sample(each.sum(1) / weights.sum(), 0.0, units) for each in (of, other)]
    normal = less(means[0], means[1], spread, joint(of, other, weights))
    if units > MANY:
        return normal
    counts = _drawn(units, draws)
    sums = of.mean(0) - other.mean(0)
    value = float(sums.sum() / weights.sum())
    widened = math.sqrt(units / (units - 1)) * _quantile(units - 1) / _quantile(math.inf)
    errors = widened * (counts @ sums / (counts @ weights) - value)
    inverses = [1 / len(of), 1 / len(other)]
    parts = [(spread[0], sum(inverses))] if spread[0] == spread[1] else list(zip(spread, inverses, strict=True))
    for one, inverse in parts:
        if one.freedom:
            # evenly spread over Student's t: less noise of drawing
            students = special.stdtrit(one.freedom, (generator.permutation(draws) + 0.5) / draws)
            errors = errors + one.sd * math.sqrt(inverse) * students
    low, high = (float(bound) for bound in np.quantile(errors, [1 - UPPER, UPPER]))
    return replace(normal, mean=value, low=value + low, high=value + high)


@functools.lru_cache(maxsize=8)
def _drawn(units: int, draws: int) -> Floats:
    """Return how often each unit is drawn, (draws, units)."""
    return np.random.default_rng(1).multinomial(units, np.full(units, 1 / units), size=draws).astype(np.float64)


def size(count: float) -> str:
    """Write a number of parameters or tokens from a million on with three digits, such as 240 M."""
    rounded = float(f"{count:.3g}")
    for unit, letter in ((1e9, "B"), (1e6, "M")):
        if rounded >= unit:
            return f"{rounded / unit:.3g} {letter}"
    return f"{count:,.0f}"


def p_words(p: float) -> str:
    """Return a p value with its sign, for a text: `= 0.023`, or `< 0.001` for all below."""
    return f"= {p:.2g}" if p >= 0.001 else "< 0.001"


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p values for their number, as Holm (1979): the chance of any false rejection is at most the level."""
    adjusted, highest = [1.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted
