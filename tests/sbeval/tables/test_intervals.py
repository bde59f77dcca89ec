"""Means of methods and their differences, seed by seed and on the scale of each metric."""

import math

import pandas as pd
import pytest

from sbeval.tables import intervals
from sbeval.tables.statistics import Scale

ROPE, NOPE = ("rope", ""), ("nope", "")


def rows(name: str, *values: float, stderr: float = 0.0, n: int = 100, **changes: object) -> list[dict[str, object]]:
    same = {"attention": name, "options": "", "stderr": stderr, "n": n, "x": 1} | changes
    return [same | {"seed": seed, "value": value} for seed, value in enumerate(values)]


def test_metrics_have_the_scale_on_which_they_vary() -> None:
    scales = {name: intervals.scale_of(name) for name in ("perplexity", "word_perplexity", "accuracy", "loss")}
    assert list(scales.values()) == [Scale.LOG, Scale.LOG, Scale.SHARE, Scale.LINEAR]


def test_a_mean_is_over_seeds_and_its_interval_holds_it() -> None:
    table = pd.DataFrame([*rows("rope", 1.0, 2.0), *rows("nope", 3.0, 3.5), *rows("rope", 9.0, x=2)])
    points = intervals.points(table, ["x"]).set_index(["attention", "x"])
    assert points.loc[("rope", 1), "mean"] == 1.5 and points.loc[("nope", 1), "mean"] == 3.25
    assert points.loc[("rope", 1), "each"] == (1.0, 2.0) and points.loc[("rope", 2), "seeds"] == 1
    assert ((points["low"] <= points["mean"]) & (points["mean"] <= points["high"])).all()


def test_perplexities_are_averaged_as_logarithms() -> None:
    table = pd.DataFrame(rows("rope", 2.0, 8.0))
    (mean,) = intervals.points(table, ["x"], Scale.LOG)["mean"]
    assert mean == pytest.approx(4.0)
    assert intervals.percent(math.log(1.5)) == "+50 %"


def test_a_difference_has_the_sign_of_the_method_minus_the_reference() -> None:
    table = pd.DataFrame([*rows("rope", 1.0, 1.1, 1.2), *rows("nope", 2.0, 2.1, 2.2)])
    found = intervals.differences(intervals.samples(table), ROPE)
    assert set(found) == {NOPE} and found[NOPE].mean == pytest.approx(1.0) and found[NOPE].low > 0
    # errors over documents widen it, unless the documents are the same
    noisy = intervals.samples(table.assign(stderr=0.5))
    wide, same = (intervals.differences(noisy, ROPE, same_units=same)[NOPE] for same in (False, True))
    assert wide.high - wide.low > same.high - same.low == pytest.approx(found[NOPE].high - found[NOPE].low)


def test_the_sentence_below_a_figure_counts_seeds() -> None:
    one = intervals.points(pd.DataFrame(rows("rope", 1.0, stderr=0.1)), ["x"])
    assert intervals.explain([one], "bands", "documents") == "One seed; bands: 95 % interval over documents."
    several = intervals.points(pd.DataFrame([*rows("rope", 1.0, 2.0), *rows("nope", 1.0)]), ["x"])
    assert intervals.explain([several], "bars", "items").startswith("Means of 1 to 2 seeds; bars: 95 % interval over")
    assert intervals.explain([], "bars", "items") == ""
