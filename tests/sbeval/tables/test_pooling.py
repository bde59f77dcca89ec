"""Which methods' standard deviations over seeds are pooled, and which are kept."""

import math

import numpy as np
import pytest

from sbeval.tables.pooling import outlying, spreads
from sbeval.tables.rows import Method
from sbeval.tables.statistics import UNKNOWN, Sample


def seeds(*values: float, stderr: float = 0.0, units: int = 0) -> Sample:
    return Sample(np.array(values), stderr, units)


def named(samples: list[Sample]) -> dict[Method, Sample]:
    return {(f"{index}", ""): sample for index, sample in enumerate(samples)}


def test_the_deviation_of_seeds_is_pooled_over_methods() -> None:
    found = spreads(named([seeds(1.0, 2.0), seeds(0.0, 1.0, 5.0), seeds(9.0)]))
    # squares 0.5 and 14, with one and two degrees of freedom; a single seed takes the pooled one
    assert [spread.sd for spread in found.values()] == pytest.approx(3 * [math.sqrt(14.5 / 3)])
    assert {spread.freedom for spread in found.values()} == {3}
    assert spreads(named([seeds(1.0), seeds(2.0)])) == {("0", ""): UNKNOWN, ("1", ""): UNKNOWN}


def test_a_method_with_wilder_seeds_keeps_its_own_deviation() -> None:
    tame = [seeds(0.0, 0.1, 0.2) for _ in range(5)]
    found = spreads(named([*tame, seeds(0.0, 1.0, 2.0)]))
    assert (found["5", ""].sd, found["5", ""].freedom) == pytest.approx((1.0, 2))
    assert (found["0", ""].sd, found["0", ""].freedom) == pytest.approx((0.1, 10))
    # twice as wide is not beyond chance with three seeds
    assert spreads(named([*tame, seeds(0.0, 0.2, 0.4)]))["0", ""].freedom == 12


def test_one_decision_for_all_points_of_a_curve() -> None:
    tame, wild, twice = ([seeds(0.0, by, 2 * by)] for by in (0.1, 1.0, 0.2))
    # at ten times the level everything varies ten times as much
    points = [named([*5 * tame, *wild]), named([*5 * tame, *twice]), named([*5 * wild, seeds(0.0, 8.0, 16.0)])]
    last = ("5", "")
    assert [bool(outlying([of])) for of in points] == [True, False, True]
    assert outlying(points) == {last} and not outlying([points[1], *9 * [named(6 * tame)]])
    assert spreads(points[1], {last})[last].sd == pytest.approx(0.2)
    common = spreads(points[1], {last})["0", ""]
    assert common.sd == pytest.approx(0.1) and common.freedom == 10
    # with one seed there it takes the others'
    assert spreads(named([*5 * tame, seeds(3.0)]), {last})[last].sd == pytest.approx(0.1)
    # a variance counts as that of its seeds, however many points there are
    assert outlying(10 * [points[1]]) == set()


def test_most_points_do_not_hide_the_others_of_a_curve() -> None:
    """As of RoPE past its training length, whose seeds vary as the others' within it."""
    tame, wild = [seeds(0.0, 0.1, 0.2)], [seeds(0.0, 0.6, 1.2)]
    points = [*5 * [named(11 * tame)], *4 * [named([*10 * tame, *wild])]]
    assert outlying(points) == {("10", "")}


def test_a_model_evaluated_in_another_way_is_not_another_sample() -> None:
    scaled = {("rope", f"scaling=ntk,factor={factor}"): seeds(0.0, 2.0) for factor in (2, 4, 8)}
    found = spreads({("rope", ""): seeds(0.0, 2.0)} | scaled)
    assert [spread.sd for spread in found.values()] == pytest.approx(4 * [math.sqrt(2)])
    assert {spread.freedom for spread in found.values()} == {1}
