"""Means, ratios and their errors against formulas and leaving units out; intervals against tables of quantiles, and
their coverage in simulations."""

import math
import statistics
import tracemalloc

import numpy as np
import pytest

from sbeval.tables.pooling import spreads
from sbeval.tables.rows import Method
from sbeval.tables.statistics import (
    UNKNOWN,
    Estimate,
    Floats,
    Interval,
    Sample,
    Spread,
    bootstrap,
    holm,
    interval,
    joint,
    less,
    mean,
    minus,
    ratio,
    share,
    shares_less,
    size,
)

# draws of a simulation, and how far its coverage may be from 95 %
DRAWS, NEAR = 2000, 0.015


def draw(n: int) -> tuple[Floats, Floats]:
    """Numerators and denominators that go together but for noise."""
    generator = np.random.default_rng(0)
    denominators = generator.integers(1, 50, n).astype(np.float64)
    return 0.7 * denominators + generator.normal(size=n), denominators


def jackknife(without: list[float]) -> float:
    """Standard error from the figures that leave one unit out each."""
    return math.sqrt((len(without) - 1) * statistics.pvariance(without))


def test_mean() -> None:
    values = [1.0, 2.0, 6.0]
    found = mean(np.array(values))
    assert found.value == 3.0
    assert found.stderr == pytest.approx(statistics.stdev(values) / math.sqrt(3), rel=1e-12)
    assert found.n == 3


def test_error_of_the_mean_is_that_of_leaving_out() -> None:
    values, _ = draw(50)
    found = mean(values).stderr
    assert found == pytest.approx(jackknife([mean(np.delete(values, i)).value for i in range(50)]), rel=1e-12)


def test_ratio() -> None:
    found = ratio(np.array([1.0, 4.0, 4.0]), np.array([2.0, 4.0, 6.0]))
    assert found.value == 0.75
    # residuals -0.5, 1 and -0.5, over the mean denominator 4
    assert found.stderr == pytest.approx(math.sqrt((0.25 + 1 + 0.25) / 2 / 3) / 4, rel=1e-12)
    assert found.n == 3


def test_error_of_a_ratio_is_that_of_leaving_out() -> None:
    above, below = draw(400)
    found = ratio(above, below).stderr
    left_out = jackknife([ratio(np.delete(above, i), np.delete(below, i)).value for i in range(400)])
    assert found == pytest.approx(left_out, rel=0.01)
    # not the error of independent quotients, nor of the numerators alone
    assert mean(above / below).stderr != pytest.approx(left_out, rel=0.1)
    assert mean(above / below.mean()).stderr != pytest.approx(left_out, rel=0.1)


def test_error_of_a_ratio_is_that_of_drawing_again() -> None:
    above, below = draw(400)
    generator = np.random.default_rng(1)
    drawn = [ratio(above[rows], below[rows]).value for rows in generator.integers(0, 400, (2000, 400))]
    assert ratio(above, below).stderr == pytest.approx(statistics.stdev(drawn), rel=0.06)


def test_units_without_a_denominator_do_not_count() -> None:
    found = ratio(np.array([1.0, 9.0, 4.0, 4.0]), np.array([2.0, 0.0, 4.0, 6.0]))
    assert found == ratio(np.array([1.0, 4.0, 4.0]), np.array([2.0, 4.0, 6.0]))


def test_a_ratio_of_counts_of_one_is_a_mean() -> None:
    values, _ = draw(20)
    found, wanted = ratio(values, np.ones(20)), mean(values)
    assert found.value == pytest.approx(wanted.value)
    assert found.stderr == pytest.approx(wanted.stderr)


def test_a_single_unit_has_no_error() -> None:
    assert mean(np.array([2.5])) == Estimate(2.5, None, 1)
    assert ratio(np.array([1.0]), np.array([4.0])) == Estimate(0.25, None, 1)
    assert ratio(np.array([1.0, 0.0]), np.array([4.0, 0.0])) == Estimate(0.25, None, 1)


def seeds(*values: float, stderr: float = 0.0, units: int = 0) -> Sample:
    return Sample(np.array(values), stderr, units)


def named(samples: list[Sample]) -> dict[Method, Sample]:
    return {(f"{index}", ""): sample for index, sample in enumerate(samples)}


def test_intervals_have_students_quantiles() -> None:
    # 97.5 % quantiles from a table: 12.706 for one degree of freedom, 2.776 for four, 2.131 for 15
    one = seeds(0.10, 0.25)
    assert interval(one, one.own).high - 0.175 == pytest.approx(12.706 * 0.075, rel=1e-4)
    five = seeds(1.0, 2.0, 4.0, 8.0, 16.0)
    assert interval(five, five.own).high - 6.2 == pytest.approx(2.776 * five.own.sd / 5**0.5, rel=1e-3)
    single = seeds(3.0, stderr=0.5, units=16)
    assert interval(single, UNKNOWN).high - 3.0 == pytest.approx(2.131 * 0.5, rel=1e-3)
    both = interval(seeds(0.10, 0.25, stderr=0.5, units=16), one.own)
    assert both.high - 0.175 == pytest.approx(math.hypot(12.706 * 0.075, 2.131 * 0.5), rel=1e-3)
    assert (both.seeds, both.units, both.over("books")) == ((2,), 16, "95 % over 2 seeds, 16 books")


def test_seeds_of_a_difference_are_not_pairs() -> None:
    of, other = seeds(1.0, 5.0, 9.0), seeds(0.9, 4.9)
    spread = Spread(2.0, 8)
    found = less(of, other, (spread, spread))
    # 2.306: 97.5 % quantile of Student's t with 8 degrees of freedom
    assert found.mean == pytest.approx(2.1) and found.over("") == "95 % over 3 and 2 seeds"
    assert found.high - found.mean == pytest.approx(2.306 * 2.0 * math.sqrt(1 / 3 + 1 / 2), rel=1e-3)
    apart = less(of, other, (Spread(2.0, 8), Spread(3.0, 1)))
    assert apart.high - apart.mean == pytest.approx(math.hypot(2.306 * 2.0 / 3**0.5, 12.706 * 3.0 / 2**0.5), rel=1e-3)


def test_p_values_agree_with_the_interval() -> None:
    found = interval(seeds(1.0, 2.0, 3.0), Spread(1.0, 2))
    assert found.above(found.low) == pytest.approx(0.025) and found.below(found.high) == pytest.approx(0.025)
    assert found.above(2.0) == pytest.approx(0.5) and found.above(5.0) > 0.9 and found.below(0.0) > 0.9
    exact = Interval(1.0, 1.0, 1.0)
    assert exact.above(0.5) == 0.0 and exact.above(1.0) == 1.0 and exact.below(2.0) == 0.0


def test_shares_have_wilsons_interval() -> None:
    # 0 of 10 and 1 of 10: Wilson's interval, from R's binom.confint
    nothing = share(seeds(0.0, units=10))
    assert nothing.low == 0.0 and nothing.high == pytest.approx(0.2775, abs=1e-4)
    everything = share(seeds(1.0, 1.0, 1.0, units=10))
    assert everything.low == pytest.approx(0.7225, abs=1e-4) and everything.high == 1.0
    one = share(seeds(0.1, stderr=math.sqrt(0.09 / 10), units=10))
    assert (one.low, one.high) == pytest.approx((0.0179, 0.4042), abs=1e-4)


def test_seeds_that_differ_widen_the_interval_of_a_share() -> None:
    alike, apart = share(seeds(0.9, 0.9, stderr=0.01, units=900)), share(seeds(0.85, 0.95, stderr=0.01, units=900))
    assert alike.low > 0.85 and apart.low < 0.6 and apart.high > 0.95


def test_a_difference_of_shares_is_newcombes() -> None:
    # 56/70 less 48/80, in Newcombe 1998, table II (method 10): 0.0524 to 0.3339
    first, second = (share(seeds(p, stderr=math.sqrt(p * (1 - p) / n), units=n)) for p, n in ((0.8, 70), (0.6, 80)))
    found = minus(first, second)
    assert (found.mean, found.low, found.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)


def table_of_two(both: int, first: int, second: int, neither: int) -> tuple[Floats, Floats]:
    """Two models' answers, (1, items): of so many items right by both, by one alone, and by neither."""
    right = np.repeat([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], [both, first, second, neither], axis=0)
    return right[None, :, 0], right[None, :, 1]


def sample(each: Floats) -> Sample:
    error = mean(each[0]).stderr
    assert error is not None
    return Sample(each.mean(1), error, each.shape[1])


def test_errors_of_pairs() -> None:
    """Two seeds of one method and one of the other, over three documents of 2, 4 and 6 tokens."""
    of, other, tokens = (
        np.array([[2.0, 5.0, 8.0], [4.0, 3.0, 10.0]]),
        np.array([[2.0, 4.0, 3.0]]),
        np.array([2, 4, 6.0]),
    )
    found = joint(of, other, tokens)
    first, second = of.mean(0) - 16 / 12 * tokens, other[0] - 9 / 12 * tokens
    assert found.units == 3
    assert found.stderr == pytest.approx(ratio(of.mean(0) - other[0], tokens).stderr, rel=1e-12)
    assert found.covariance == pytest.approx((first * second).sum() / 4**2 / 2 / 3, rel=1e-12)


def test_a_difference_in_pairs_has_their_error_alone() -> None:
    of, other = np.array([[1.0, 2.0, 4.0, 8.0]]), np.array([[0.9, 1.8, 3.9, 7.8]])
    pairs = joint(of, other, np.ones(4))
    found = less(sample(of), sample(other), (UNKNOWN, UNKNOWN), pairs)
    # 3.182: Student's t with three degrees of freedom
    assert found.mean == pytest.approx(0.15) and found.high - 0.15 == pytest.approx(3.182 * 0.0577 / 2, rel=1e-3)
    assert found.over("items") == "95 % over 1 seed each, 4 items in pairs"
    # 2.228: with ten
    seeds = less(sample(of), sample(other), (Spread(0.1, 10), Spread(0.1, 10)), pairs)
    half = math.hypot(3.182 * 0.0577 / 2, 2.228 * 0.1 * math.sqrt(2))
    assert seeds.high - 0.15 == pytest.approx(half, rel=1e-3)


def test_a_difference_of_shares_in_pairs_is_newcombes() -> None:
    of, other = table_of_two(36, 12, 2, 10)
    found = shares_less(sample(of), sample(other), joint(of, other, np.ones(60)))
    one, two = share(sample(of)), share(sample(other))
    phi = (36 * 10 - 12 * 2) / math.sqrt(48 * 12 * 38 * 22)
    down, up = one.mean - one.low, two.high - two.mean
    assert found.mean == pytest.approx(10 / 60) and found.paired and found.units == 60
    assert found.mean - found.low == pytest.approx(math.sqrt(down**2 - 2 * phi * down * up + up**2), rel=1e-9)
    assert found.low > 0.04 > 0.004 > shares_less(sample(of), sample(other)).low
    # items that both answer alike have no error, and yet the interval has a width
    same = table_of_two(50, 0, 0, 0)
    alike = shares_less(sample(same[0]), sample(same[1]), joint(*same, np.ones(50)))
    assert alike.low < 0 < alike.high


def test_many_units_take_little_memory() -> None:
    """The 67,000 items of BLiMP, 2,000 times drawn, are 1 GB."""
    generator = np.random.default_rng(0)
    of, other = (generator.normal(at, 1, (2, 67_000)) for at in (0.02, 0.0))
    spread = Spread(0.001, 5)
    tracemalloc.start()
    found = bootstrap(of, other, np.ones(67_000), (spread, spread))
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()
    error = (of.mean(0) - other.mean(0)).std(ddof=1) / math.sqrt(67_000)
    assert found.paired and found.mean == pytest.approx(of.mean() - other.mean())
    # 2.571: Student's t with five degrees of freedom
    assert found.high - found.mean == pytest.approx(math.hypot(1.96 * error, 2.571 * 0.001), rel=1e-3)


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


def covers(found: Interval, truth: float = 0.0) -> bool:
    return found.low <= truth <= found.high


@pytest.mark.parametrize("count", [2, 3])
def test_coverage_over_seeds(count: int) -> None:
    """Eight methods with the seed noise of ln perplexity; the mean of one, and its difference to another."""
    generator = np.random.default_rng(count)
    means = differences = 0
    for values in generator.normal(0, 0.014, (DRAWS, 8, count)):
        samples = named([Sample(row, 0.0, 0) for row in values])
        spread = spreads(samples)
        means += covers(interval(samples["0", ""], spread["0", ""]))
        differences += covers(less(samples["0", ""], samples["1", ""], (spread["0", ""], spread["1", ""])))
    assert means / DRAWS == pytest.approx(0.95, abs=NEAR)
    assert differences / DRAWS == pytest.approx(0.95, abs=NEAR)


@pytest.mark.parametrize("count", [2, 3])
def test_coverage_over_seeds_and_documents(count: int) -> None:
    generator = np.random.default_rng(10 + count)
    found = 0
    for _ in range(DRAWS):
        losses = (
            generator.normal(0, 0.014, (8, count, 1))
            + generator.normal(0, 0.07, 16)
            + generator.normal(0, 0.01, (8, count, 16))
        )
        errors = losses.std(-1, ddof=1).mean(1) / 4
        samples = named([Sample(each.mean(-1), error, 16) for each, error in zip(losses, errors, strict=True)])
        found += covers(interval(samples["0", ""], spreads(samples)["0", ""]))
    assert found / DRAWS == pytest.approx(0.95, abs=NEAR)


@pytest.mark.parametrize("count", [2, 3])
def test_coverage_of_the_bootstrap_over_seeds_and_pairs_of_documents(count: int) -> None:
    """27 documents of unequal length, whose difference varies less than their level."""
    generator = np.random.default_rng(20 + count)
    found = 0
    for _ in range(DRAWS):
        tokens = generator.lognormal(9, 0.5, 27)
        noise = generator.normal(0, 0.014, (8, count))
        level, gap = generator.normal(3.7, 0.15, 27), generator.normal(0, 0.02, 27)
        each = noise[:2, :, None] + level + np.stack([gap, np.zeros(27)])[:, None]
        pooled = Spread(math.sqrt(noise.var(1, ddof=1).mean()), 8 * (count - 1))
        first, second = each * tokens
        found += covers(bootstrap(first, second, tokens, (pooled, pooled), draws=400))
    assert found / DRAWS == pytest.approx(0.95, abs=NEAR)


@pytest.mark.parametrize("count", [2, 3])
def test_coverage_in_pairs_over_seeds_and_documents(count: int) -> None:
    """The same without drawing."""
    generator = np.random.default_rng(40 + count)
    found = 0
    for _ in range(DRAWS):
        tokens = generator.lognormal(9, 0.5, 27)
        noise = generator.normal(0, 0.014, (8, count))
        level, gap = generator.normal(3.7, 0.15, 27), generator.normal(0, 0.02, 27)
        first, second = (noise[:2, :, None] + level + np.stack([gap, np.zeros(27)])[:, None]) * tokens
        pooled = Spread(math.sqrt(noise.var(1, ddof=1).mean()), 8 * (count - 1))
        samples = [Sample(each.sum(1) / tokens.sum(), 0.0, 27) for each in (first, second)]
        found += covers(less(samples[0], samples[1], (pooled, pooled), joint(first, second, tokens)))
    assert found / DRAWS == pytest.approx(0.95, abs=NEAR)


@pytest.mark.parametrize("units", [200, 500])
@pytest.mark.parametrize("low", [0.05, 0.5, 0.9])
def test_coverage_of_shares_in_pairs(units: int, low: float) -> None:
    """Items of which half are answered alike by both."""
    generator = np.random.default_rng(70 + units)
    found = 0
    for _ in range(DRAWS):
        draws = generator.random((2, 1, units))
        draws[1] = np.where(generator.random(units) < 0.5, draws[0], draws[1])
        first, second = (draws[0] < low + 0.05).astype(float), (draws[1] < low).astype(float)
        pairs = joint(first, second, np.ones(units))
        found += covers(shares_less(sample(first), sample(second), pairs), 0.05)
    assert found / DRAWS == pytest.approx(0.95, abs=NEAR)


@pytest.mark.parametrize("units", [50, 100, 500])
@pytest.mark.parametrize("low", [0.0, 0.95])
def test_coverage_of_shares_near_0_and_1(units: int, low: float) -> None:
    generator = np.random.default_rng(60 + units)
    truths = generator.uniform(low, low + 0.05, DRAWS)
    shares = generator.binomial(units, truths) / units
    errors = np.sqrt(shares * (1 - shares) / (units - 1))
    found = [
        covers(share(Sample(np.array([value]), error, units)), truth)
        for truth, value, error in zip(truths, shares, errors, strict=True)
    ]
    assert np.mean(found) == pytest.approx(0.95, abs=NEAR)


@pytest.mark.parametrize("low", [0.0, 0.3, 0.95])
def test_coverage_of_shares_of_clustered_queries(low: float) -> None:
    """500 sequences of 16 queries, which succeed together (correlation 0.1)."""
    generator = np.random.default_rng(30)
    truths = generator.uniform(low, low + 0.05, DRAWS)
    rates = generator.beta(9 * truths, 9 * (1 - truths), (500, DRAWS))
    sequences = generator.binomial(16, rates) / 16
    means, errors = sequences.mean(0), sequences.std(0, ddof=1) / math.sqrt(500)
    found = [
        covers(share(Sample(np.array([value]), error, 500)), truth)
        for truth, value, error in zip(truths, means, errors, strict=True)
    ]
    assert np.mean(found) == pytest.approx(0.95, abs=NEAR)
    # as if queries were independent, it would not cover
    count = 500 * 16
    wrong = [
        covers(share(Sample(np.array([value]), math.sqrt(value * (1 - value) / count), count)), truth)
        for value, truth in zip(means, truths, strict=True)
    ]
    assert np.mean(wrong) < 0.85


@pytest.mark.parametrize("count", [2, 3])
def test_coverage_of_shares_over_seeds(count: int) -> None:
    """Seeds whose log odds vary by 1, each measured on 500 sequences."""
    generator = np.random.default_rng(40 + count)
    rates = 1 / (1 + np.exp(-generator.normal(0, 1, (DRAWS, count))))
    values = generator.binomial(500, rates) / 500
    errors = np.sqrt((values * (1 - values) / 499).mean(1))
    found = [covers(share(Sample(row, error, 500)), 0.5) for row, error in zip(values, errors, strict=True)]
    assert np.mean(found) == pytest.approx(0.95, abs=NEAR)


def test_coverage_of_ratios_of_clustered_tokens() -> None:
    """Documents of unequal length with a loss of their own: the error of the ratio counts documents, not tokens."""
    generator = np.random.default_rng(50)
    found = 0
    for _ in range(DRAWS):
        tokens = generator.integers(1000, 9000, 24).astype(np.float64)
        estimate = ratio(tokens * generator.normal(3.7, 0.15, 24), tokens)
        assert estimate.stderr is not None
        found += covers(interval(seeds(estimate.value, stderr=estimate.stderr, units=24), UNKNOWN), 3.7)
    assert found / DRAWS == pytest.approx(0.95, abs=NEAR)


def test_p_values_of_a_bootstrap_have_the_tails_of_few_seeds() -> None:
    """Holm's correction needs them below the level too. A normal distribution of the interval's width gives 0.011."""
    of = np.array([[1.00] * 16, [1.02] * 16])
    other = of - 0.05 + np.tile([0.001, -0.001], 8)
    known = Spread(0.01, 2)
    drawn = bootstrap(of, other, np.ones(16), (known, known))
    # 0.05 over 0.01, of two seeds each, by Student's t with two degrees of freedom
    assert drawn.freedom == 2 and drawn.above(0.0) == pytest.approx(0.0189, rel=0.03)


@pytest.mark.parametrize(
    ("count", "text"),
    [(239_992_832, "240 M"), (25_178_112, "25.2 M"), (999_600_000, "1 B"), (1.5e10, "15 B"), (65_536, "65,536")],
)
def test_large_numbers_are_short(count: float, text: str) -> None:
    assert size(count) == text
