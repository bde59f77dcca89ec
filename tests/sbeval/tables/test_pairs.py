"""Units behind rows: found by the row's factors, checked against its value, and paired."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
import pytest

from sbeval.tables import pairs
from sbeval.tables.pairs import Stored
from sbeval.tables.statistics import Joint

FIRST, SECOND = [1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0]


def stored(*frames: pd.DataFrame) -> Stored:
    everything = pd.concat(frames)

    def read(cells: Iterable[str]) -> pd.DataFrame:
        return everything[everything["cell"].isin(list(cells))]

    return Stored(read)


def values(cell: str, metric: str, each: list[float], **factors: Any) -> pd.DataFrame:
    units = [f"{number}" for number in range(len(each))]
    return pd.DataFrame({"cell": cell, "metric": metric, "unit_id": units, "value": each, **factors})


def row(cell: str, metric: str, value: float, n: int = 4, **others: Any) -> dict[str, Any]:
    return {"cell": cell, "family": "few_shot", "metric": metric, "value": value, "n": n} | others


def behind(of: Stored, *rows: dict[str, Any]) -> pairs.Units | None:
    return of.behind(pd.DataFrame(list(rows)))


def test_units_are_those_of_the_row() -> None:
    frames = [values("a", "acc", FIRST, part="", filter=""), values("a", "acc", SECOND, part="x", filter="")]
    of = stored(*frames)
    found = behind(of, row("a", "acc", 0.75, part=None, filter=""))
    assert found is not None and found.sums.tolist() == [FIRST] and found.weights.tolist() == [1.0] * 4
    part = behind(of, row("a", "acc", 0.25, part="x", filter=None))
    assert part is not None and part.sums.tolist() == [SECOND]
    # another value, another number of units, another metric, no values, and a table without the cells
    same = {"part": "", "filter": ""}
    wrong = [row("a", "acc", 0.5), row("a", "acc", 0.75, 5), row("a", "acc_norm", 0.75), row("b", "acc", 0.75)]
    assert [behind(of, one | same) for one in wrong] == [None] * 4
    assert of.behind(pd.DataFrame({"metric": ["acc"], "value": [0.75]})) is None


def test_a_group_of_tasks_is_all_of_their_items() -> None:
    of = stored(values("a", "acc", FIRST, part="x", filter=""), values("a", "acc", SECOND, part="y", filter=""))
    found = behind(of, row("a", "acc", 0.5, n=8, part="", filter=""))
    assert found is not None and found.sums.tolist() == [[*FIRST, *SECOND]]


def test_a_ratio_is_of_sums_over_weights() -> None:
    of = stored(
        *(
            values("a", metric, each, context_length=length, window=pd.NA)
            for length in (2048, 4096)
            for metric, each in (("nll_sum", [200.0, 100.0]), ("tokens", [80.0, 20.0]), ("bytes", [300.0, 100.0]))
        )
    )
    where = {"family": "length_gen", "context_length": 2048.0, "window": None, "per": None}
    perplexity = behind(of, row("a", "perplexity", math.exp(3.0), n=2) | where)
    bits = behind(of, row("a", "bits_per_byte", 0.75 / math.log(2), n=2) | where)
    assert perplexity is not None and perplexity.weights.tolist() == [80.0, 20.0]
    assert bits is not None and bits.sums[0] == pytest.approx(np.array([200.0, 100.0]) / math.log(2))
    assert behind(of, row("a", "perplexity", math.exp(3.0), n=2) | where | {"per": "word"}) is None
    assert behind(of, row("a", "perplexity", math.exp(3.0), n=2) | where | {"context_length": 8192}) is None


def test_seeds_stand_side_by_side_where_all_have_values() -> None:
    of = stored(values("a", "acc", FIRST), values("b", "acc", SECOND), values("c", "acc", FIRST[:3]))
    both = behind(of, row("a", "acc", 0.75), row("b", "acc", 0.25))
    assert both is not None and both.sums.tolist() == [FIRST, SECOND]
    assert behind(of, row("a", "acc", 0.75), row("c", "acc", 2 / 3, n=3)) is None
    assert behind(of, row("a", "acc", 0.75), row("d", "acc", 0.25)) is None


def test_only_the_same_units_are_pairs() -> None:
    one, two = values("a", "acc", FIRST), values("b", "acc", SECOND)
    of = stored(one, two, two.assign(cell="c", unit_id=["4", "5", "6", "7"]))
    first, second, other = (
        behind(of, row(cell, "acc", value)) for cell, value in (("a", 0.75), ("b", 0.25), ("c", 0.25))
    )
    found = pairs.joint(first, second)
    # differences 1, 0, 0, 1: a deviation of 0.577, and a covariance of 1/12
    assert found is not None and found.units == 4
    assert found.stderr == pytest.approx(math.sqrt(1 / 3) / 2) and found.covariance == pytest.approx(1 / 12 / 4)
    assert pairs.joint(first, other) is None and pairs.joint(None, first) is None
    assert first is not None and pairs.joint(first, pairs.Units(first.names, first.sums, 2 * first.weights)) is None


def test_a_mean_of_numbers_has_their_errors() -> None:
    found = pairs.mean([Joint(0.3, 0.02, 10), Joint(0.4, 0.01, 20)])
    assert found is not None and found.units == 30
    assert (found.stderr, found.covariance) == pytest.approx((0.25, 0.0075))
    assert pairs.mean([Joint(0.3, 0.02, 10), None]) is None and pairs.mean([]) is None


def test_methods_are_paired_with_a_reference() -> None:
    """Over two tasks, of which a third method has no values of one."""
    cells = {f"{name}-{task}": (name, task) for name in ("rope", "alibi", "nope") for task in ("x", "y")}
    each = {cell: SECOND if name == "rope" else FIRST for cell, (name, _) in cells.items()}
    of = stored(*(values(cell, "acc", some) for cell, some in each.items() if cell != "nope-y"))
    rows = pd.DataFrame(
        [
            row(cell, "acc", float(np.mean(each[cell]))) | {"attention": name, "options": "", "task": task}
            for cell, (name, task) in cells.items()
        ]
    )
    found = pairs.of_methods(rows, ("rope", ""), of, ["task"], scale=100)
    assert list(found) == [("alibi", "")]
    one = found["alibi", ""]
    assert one.units == 8 and one.stderr == pytest.approx(100 * math.sqrt(1 / 3 / 4 / 2))
    assert pairs.of_methods(rows[rows["attention"] != "rope"], ("rope", ""), of, ["task"]) == {}
