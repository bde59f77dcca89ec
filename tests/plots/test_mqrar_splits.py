from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes

from sbeval.errors import InputError
from sbeval.plots import mqrar_splits

COMMON: dict[str, Any] = {
    "task": "mqrar",
    "model": "2x32",
    "options": "",
    "train_len": 64,
    "eval_len": 64,
    "preset": "quick",
    "seed": 0,
    "dtype": "float32",
    "stderr": 0.01,
    "n": 100,
    "seq_len": 64,
    "vocab_size": 128,
    "width": 32,
    "layers": 2,
    "heads": 1,
    "lr": 1e-3,
    "metric": "accuracy",
    "split": "",
    "kv_pairs": 8,
}


def rows(attention: str, **common: Any) -> list[dict[str, Any]]:
    same = COMMON | {"attention": attention} | common
    stale = [same | {"stale_values": count, "value": 1 / (count + 1)} for count in range(3)]
    return stale + [
        same | {"distance_start": start, "distance_end": 2 * start, "value": 0.5 / start} for start in (1, 2, 4)
    ]


def line(axis: Axes, label: str) -> tuple[list[float], list[float]]:
    (found,) = [line for line in axis.get_lines() if line.get_label() == label]
    x, y = (np.asarray(data, dtype=float).tolist() for data in (found.get_xdata(), found.get_ydata()))
    return x, y


def drawn(table: pd.DataFrame) -> list[Axes]:
    """The panels that show something."""
    return [axis for axis in mqrar_splits.draw(table).axes if axis.axison]


def test_by_stale_values_and_by_distance() -> None:
    left, right = drawn(pd.DataFrame(rows("rope") + rows("nope")))
    x, y = line(left, "RoPE")
    assert x == [0, 1, 2] and y == pytest.approx([1, 1 / 2, 1 / 3])
    x, y = line(right, "NoPE")
    # the middle of 1, of 2 ... 3, of 4 ... 7
    assert x == pytest.approx([1, 6**0.5, 28**0.5]) and y == [0.5, 0.25, 0.125]
    assert (left.get_xlabel(), left.get_ylabel()) == ("earlier values of the key", "accuracy")
    assert right.get_xlabel() == "distance to the answer (positions)"


def test_a_column_of_panels_for_each_number_of_pairs_and_two_rows_for_a_setting() -> None:
    pairs = rows("rope") + rows("rope", kv_pairs=16)
    figure = mqrar_splits.draw(pd.DataFrame(pairs + rows("rope", seq_len=128)))
    titles = [[text.get_text() for text in axis.texts] for axis in figure.axes]
    # the setting with the most rows comes first
    assert titles[0][0].startswith("2x32 model") and "sequences of 64 tokens" in titles[0][0]
    assert [text[-1:] for text in titles[:4]] == [["8 pairs"], ["16 pairs"], [], []]
    assert "sequences of 128 tokens" in titles[4][0] and titles[4][-1] == "8 pairs"
    assert [axis.axison for axis in figure.axes] == [True] * 5 + [False, True, False]


def test_points_of_a_few_queries_are_left_out() -> None:
    table = pd.DataFrame(rows("rope"))
    table.loc[table["stale_values"] == 2, "n"] = mqrar_splits.FEWEST - 1
    assert line(drawn(table)[0], "RoPE")[0] == [0, 1]


def test_with_few_queries_everywhere_there_are_no_points() -> None:
    left, right = drawn(pd.DataFrame(rows("rope")).assign(n=mqrar_splits.FEWEST - 1))
    assert [len(np.asarray(one.get_xdata())) for axis in (left, right) for one in axis.get_lines()] == []


def test_nothing_to_draw_is_said() -> None:
    table = pd.DataFrame(rows("rope"))
    with pytest.raises(InputError, match="no rows with stale_values or distance_start"):
        mqrar_splits.draw(table.assign(stale_values=np.nan, distance_start=np.nan))


def test_a_figure_fits_a_page_and_says_what_it_leaves_out() -> None:
    many = [row for pairs in (2, 4, 6, 8, 10, 12) for row in rows("rope", kv_pairs=pairs)]
    figure = mqrar_splits.draw(pd.DataFrame(many))
    titles = [text.get_text() for axis in figure.axes for text in axis.texts if text.get_text().endswith("pairs")]
    assert titles == ["2 pairs", "6 pairs", "8 pairs", "12 pairs"]
    assert all(axis.get_ylim() == (-0.03, 1.03) for axis in figure.axes)
    assert any("Not all settings and sizes" in text.get_text() for text in figure.texts)
    few = mqrar_splits.draw(pd.DataFrame(rows("rope")))
    assert not any("Not all settings" in text.get_text() for text in few.texts)
