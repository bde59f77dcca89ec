"""Losses of single documents: sums of exactly one number, and differences of methods on the texts that they share."""

import numpy as np
import pandas as pd

from sbeval.tables import documents
from sbeval.tables.statistics import Spread

LOSSES = {"a": 100.0, "b": 240.0, "c": 310.0}
NO_SPREAD = (Spread(0.0, 0), Spread(0.0, 0))


def values(cell: str, by: float = 0.0, **factors: object) -> list[dict[str, object]]:
    same = {"cell": cell, "metric": "nll_sum", "context_length": None, "window": None} | factors
    return [same | {"unit_id": name, "value": loss + by} for name, loss in LOSSES.items()]


def test_sums_are_of_the_number_with_exactly_these_factors() -> None:
    frame = pd.DataFrame([*values("x"), *values("x", 5.0, context_length=64), *values("y", 7.0, context_length=64)])
    assert documents.sums(frame, "nll_sum").to_dict("list") == {name: [loss] for name, loss in LOSSES.items()}
    by_context = documents.sums(frame, "nll_sum", context_length=64)
    assert by_context.loc[["x", "y"]].to_numpy().tolist() == [[105, 245, 315], [107, 247, 317]]
    assert documents.sums(frame, "tokens").empty


def test_a_document_that_a_cell_lacks_is_left_out() -> None:
    frame = pd.DataFrame([*values("x"), *values("y")[:2]])
    assert list(documents.sums(frame, "nll_sum").columns) == ["a", "b"]


def test_a_difference_is_paired_by_document() -> None:
    one = pd.DataFrame([LOSSES])
    tokens = pd.DataFrame([{name: 10.0 for name in LOSSES}])
    found = documents.difference(one + 5.0, one, tokens, NO_SPREAD)
    # all documents differ by half a nat a token, however different they are
    assert found is not None and np.allclose([found.mean, found.low, found.high], 0.5)
    assert documents.difference(one[["a"]], one, tokens, NO_SPREAD) is None
    other = pd.concat([tokens, tokens + 1])
    assert documents.difference(one, one, other, NO_SPREAD) is None


def test_cells_are_those_of_the_method() -> None:
    rows = pd.DataFrame(
        [{"attention": "rope", "options": option, "cell": option or "plain"} for option in ("", "", "o")]
    )
    assert documents.cells_of(rows, ("rope", "")) == ["plain"] and documents.cells_of(rows, ("nope", "")) == []
    assert documents.nothing(["plain"]).empty
