"""Intervals of made-up rows: their scale, what is pooled, and how figures explain them."""

import math
from typing import Any

import pandas as pd
import pytest

from sbeval.tables import intervals
from sbeval.tables.statistics import Scale

ROPE, ALIBI = ("rope", ""), ("alibi", "")


def rows(values: dict[str, list[float]], **common: Any) -> pd.DataFrame:
    return pd.DataFrame(
        {"attention": name, "options": "", "seed": seed, "value": value, "stderr": math.nan, "n": 16, "x": 1} | common
        for name, seeds in values.items()
        for seed, value in enumerate(seeds)
    )


def test_perplexities_are_averaged_as_logarithms() -> None:
    (mean,) = intervals.points(rows({"rope": [10.0, 40.0]}), ["x"], Scale.LOG)["mean"]
    assert mean == pytest.approx(20.0)
    (mean,) = intervals.points(rows({"rope": [10.0, 40.0]}), ["x"])["mean"]
    assert mean == 25.0


def test_the_seeds_of_a_figure_are_those_of_one_method() -> None:
    table = pd.concat([rows({"rope": [1.0, 2.0]}), rows({"alibi": [1.5], "nope": [1.0]}).assign(seed=7)])
    assert intervals.most_seeds(table) == 2


def test_seeds_are_pooled_at_each_x_alone() -> None:
    table = pd.concat([rows({"rope": [1.0, 2.0], "alibi": [1.5]}), rows({"rope": [1.0, 5.0], "alibi": [1.5]}, x=2)])
    found = intervals.points(table, ["x"])
    assert found[["attention", "x", "seeds"]].values.tolist() == [
        ["alibi", 1, 1],
        ["rope", 1, 2],
        ["alibi", 2, 1],
        ["rope", 2, 2],
    ]
    # the single seed of one has the deviation of the other, which is four times as large at the second x
    near, far = (part["high"] - part["mean"] for _, part in intervals.method(found, ALIBI).groupby("x"))
    assert far.iloc[0] == pytest.approx(4 * near.iloc[0])
    assert near.iloc[0] == pytest.approx(12.706 * math.sqrt(0.5), rel=1e-4)
    assert found["each"].tolist() == [(1.5,), (1.0, 2.0), (1.5,), (1.0, 5.0)]


def test_a_band_keeps_to_one_deviation_all_along_its_line() -> None:
    """By a test at each point alone it would be the own one at the first, and the pooled one at the second."""
    tame = {f"m{index}": [1.0, 1.1, 1.2] for index in range(5)}
    table = pd.concat([rows(tame | {"rope": [1.0, by, 2 * by - 1.0]}, x=x) for x, by in ((1, 2.0), (2, 1.2))])
    found = intervals.method(intervals.points(table, ["x"]), ROPE)
    first, second = found["high"] - found["mean"]
    # 4.303: the 97.5 % quantile of Student's t with 2 degrees of freedom
    assert (first, second) == pytest.approx((4.303 * 1.0 / 3**0.5, 4.303 * 0.2 / 3**0.5), rel=1e-3)


def test_shares_are_not_pooled_and_stay_shares() -> None:
    found = intervals.points(rows({"rope": [0.0, 1.0], "alibi": [1.0, 1.0]}), ["x"], Scale.SHARE).set_index("attention")
    low, high = (found[name].to_dict() for name in ("low", "high"))
    assert low["alibi"] > 0.8 and high["alibi"] == 1.0 and low["rope"] < 0.1 and high["rope"] > 0.9


@pytest.mark.parametrize("part", intervals.PARTS)
def test_tasks_of_a_seed_are_averaged_as_independent(part: str) -> None:
    one, other = rows({"rope": [1.0]}, stderr=0.3), rows({"rope": [2.0]}, stderr=0.4)
    table = pd.concat([one.assign(**{part: 1}), other.assign(**{part: 2})])
    (sample,) = intervals.samples(table).values()
    assert sample.mean == 1.5 and sample.stderr == pytest.approx(0.25) and sample.units == 32


@pytest.mark.parametrize("scale", Scale)
def test_a_cell_that_was_run_twice_is_no_more_than_one(scale: Scale) -> None:
    """On two machines, or by two versions: its units are the same."""
    once = rows({"rope": [0.25, 0.5], "alibi": [0.125]}, stderr=0.03).assign(task="copa")
    again = once[once["seed"] == 0].assign(device="another")
    pd.testing.assert_frame_equal(
        intervals.points(pd.concat([once, again]), ["x"], scale), intervals.points(once, ["x"], scale)
    )
    # also of one of two tasks, whose mean it does not weight
    other = rows({"rope": [0.75, 0.5], "alibi": [0.5]}, stderr=0.01).assign(task="piqa")
    two = pd.concat([once, other])
    pd.testing.assert_frame_equal(
        intervals.points(pd.concat([two, again]), ["x"], scale), intervals.points(two, ["x"], scale)
    )


def test_errors_over_the_same_documents_cancel_where_seeds_tell_the_rest() -> None:
    several = intervals.samples(rows({"rope": [1.0, 1.1], "alibi": [2.0, 2.1]}, stderr=5.0))
    wide = intervals.differences(several, ROPE)[ALIBI]
    narrow = intervals.differences(several, ROPE, same_units=True)[ALIBI]
    assert wide.high > 10 and narrow.high < 1.5 and narrow.over("documents") == "95 % over 2 seeds each"
    # a single seed each: errors over documents are all there is
    single = intervals.samples(rows({"rope": [1.0], "alibi": [2.0]}, stderr=5.0))
    assert intervals.differences(single, ROPE, same_units=True)[ALIBI].high > 10


@pytest.mark.parametrize(
    ("metric", "scale"),
    [("perplexity", Scale.LOG), ("word_perplexity", Scale.LOG), ("accuracy", Scale.SHARE), ("loss", Scale.LINEAR)],
)
def test_scales(metric: str, scale: Scale) -> None:
    assert intervals.scale_of(metric) is scale


def test_what_a_band_is_is_explained() -> None:
    one, two = rows({"rope": [1.0]}, stderr=0.1), rows({"rope": [1.0, 2.0]})
    both = rows({"rope": [1.0, 2.0], "alibi": [3.0]})
    assert intervals.explain([], "bands", "books") == ""
    assert intervals.explain([intervals.points(rows({"rope": [1.0]}), ["x"])], "bands", "books") == "One seed."
    assert intervals.explain([intervals.points(one, ["x"])], "bands", "books") == (
        "One seed; bands: 95 % interval over books."
    )
    assert intervals.explain([intervals.points(two, ["x"])], "bands", "books") == (
        "Means of 2 seeds; bands: 95 % interval over seeds and books; dots: seeds."
    )
    assert intervals.explain([intervals.points(both, ["x"])], "bars", "books").startswith("Means of 1 to 2 seeds; bars")
    many = intervals.points(rows({"rope": [1.0, 2.0, 3.0, 4.0]}), ["x"])
    assert "dots" not in intervals.explain([many], "bands", "books")


def test_a_change_of_a_logarithm_in_percent() -> None:
    assert intervals.percent(math.log(1.25)) == "+25 %" and intervals.percent(-math.log(2)) == "-50 %"
