"""Means, ratios and their errors, against the formulas and against leaving units out one at a time; intervals."""

import math
import statistics

import numpy as np
import pandas as pd
import pytest

from sbeval.tables.statistics import Estimate, Floats, difference, half_width, mean, ratio


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


def test_the_half_width_is_students_of_several_seeds_and_normal_of_one() -> None:
    # 97.5 % quantiles from a table: 12.706 for one degree of freedom, 2.776 for four
    assert half_width(np.array([0.10, 0.25]), math.nan) == pytest.approx(12.706 * 0.075, rel=1e-3)
    values = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    assert half_width(values, 0.0) == pytest.approx(2.776 * statistics.stdev(values.tolist()) / 5**0.5, rel=2e-3)
    assert half_width(np.array([3.0]), 0.5) == pytest.approx(1.96 * 0.5)
    assert math.isnan(half_width(np.array([3.0]), math.nan))


def test_a_difference_is_taken_seed_by_seed() -> None:
    one = pd.DataFrame({"seed": [0, 1, 2], "value": [1.0, 5.0, 9.0], "stderr": 0.1})
    two = pd.DataFrame({"seed": [0, 1, 3], "value": [0.9, 4.75, 0.0], "stderr": 0.1})
    found = difference(one, two, "items")
    assert found.over == "95 % over 2 seeds" and found.mean == pytest.approx(0.175)
    assert (found.low, found.high) == pytest.approx((0.175 - 0.953, 0.175 + 0.953), abs=1e-3)
    single = difference(one[:1], two[:1], "items")
    assert single.over == "95 % over items" and single.high - single.mean == pytest.approx(1.96 * 0.1 * 2**0.5)
