"""Values of documents: chosen by all their factors, and paired between methods."""

import math

import pandas as pd
import pytest

from sbeval.tables import documents
from sbeval.tables.statistics import UNKNOWN, Spread


def stored(losses: dict[str, list[float]], tokens: float = 100.0, **factors: object) -> pd.DataFrame:
    """Values of cells: mean losses of their documents."""
    empty = {name: pd.NA for name in documents.FACTORS} | {"eval_corpus": ""}
    return pd.DataFrame(
        {"cell": cell, "metric": metric, "unit_id": f"book-{number}", "value": value} | empty | factors
        for cell, each in losses.items()
        for number, loss in enumerate(each)
        for metric, value in (("nll_sum", tokens * loss), ("tokens", tokens))
    )


def test_a_number_has_exactly_its_factors() -> None:
    values = pd.concat(
        [
            stored({"a": [3.0, 4.0]}, context_length=2048),
            stored({"a": [1.0, 1.0]}, context_length=2048, last_k=512),
            stored({"a": [2.0, 2.0]}, context_length=4096),
            stored({"a": [5.0, 5.0]}, context_length=2048, targets=512),
        ]
    )
    assert documents.sums(values, "nll_sum", context_length=2048).loc["a"].tolist() == [300.0, 400.0]
    assert documents.sums(values, "nll_sum", context_length=2048, targets=512).loc["a"].tolist() == [500.0, 500.0]
    assert documents.sums(values, "tokens", context_length=8192).empty
    assert documents.sums(documents.nothing(()), "tokens", context_length=8192).empty


def test_differences_are_taken_document_by_document() -> None:
    levels = [2.0, 3.0, 4.0, 5.0, 6.0]
    values = stored({"a": [level - 0.1 for level in levels], "b": levels, "c": [level + 0.2 for level in levels]})
    sums, tokens = (documents.sums(values, name) for name in ("nll_sum", "tokens"))
    # the means of one method's two seeds
    found = documents.difference(sums.loc[["a"]], sums.loc[["b", "c"]], tokens, (UNKNOWN, UNKNOWN))
    assert found is not None and found.mean == pytest.approx(-0.2) and found.high - found.low < 1e-9
    assert found.over("books") == "95 % over 1 and 2 seeds, 5 books in pairs"
    spread = Spread(0.1, 10)
    wide = documents.difference(sums.loc[["a"]], sums.loc[["b", "c"]], tokens, (spread, spread))
    # 2.228: the 97.5 % quantile of Student's t with ten degrees of freedom
    assert wide is not None and wide.high - wide.mean == pytest.approx(2.228 * 0.1 * math.sqrt(1.5), rel=0.01)


def test_other_documents_are_not_pairs() -> None:
    values = stored({"a": [1.0, 2.0, 3.0], "b": [1.0, 2.0, 3.0]})
    sums, tokens = (documents.sums(values, name) for name in ("nll_sum", "tokens"))
    renamed = sums.loc[["b"]].rename(columns="other-{}".format)
    pair = (UNKNOWN, UNKNOWN)
    assert documents.difference(sums.loc[["a"]], renamed, tokens, pair) is None
    # the same names, another text
    other = pd.concat([tokens.loc[["a"]], 2 * tokens.loc[["b"]]])
    assert documents.difference(sums.loc[["a"]], sums.loc[["b"]], other, pair) is None
    assert documents.difference(sums.loc[["a"]].iloc[:0], sums.loc[["b"]], tokens, pair) is None
