"""Curves at the same tokens: a line is of the same seeds throughout."""

import pandas as pd

from sbeval.tables import curves


def test_a_method_whose_seeds_share_no_tokens_keeps_its_rows() -> None:
    same = {"attention": "rope", "options": "", "value": 1.0, "stderr": 0.1}
    apart = [same | {"seed": seed, "x": at} for seed, at in ((0, 3e6), (1, 4e6))]
    shared = [row | {"attention": "alibi", "x": at} for row in apart for at in (1e6, 4e6)]
    found = curves.at_same_tokens(pd.DataFrame(apart + shared))
    assert found.loc[found["attention"] == "rope", "x"].tolist() == [3e6, 4e6]
    # of each of its two seeds at all three
    assert found.loc[found["attention"] == "alibi", "x"].tolist() == [1e6, 3e6, 4e6] * 2
