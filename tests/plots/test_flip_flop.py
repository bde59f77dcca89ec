from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.lines import Line2D

from sbeval.errors import InputError
from sbeval.plots import flip_flop
from sbeval.tables.published import FLIP_FLOP
from sbeval.tables.selection import flip_flop_errors

CHANCES = {"in_distribution": 0.8, "sparse": 0.98, "dense": 0.1}


def cell(
    attention: str, rates: dict[str, float], validation: float, seed: int = 0, lr: float = 1e-3, **common: Any
) -> pd.DataFrame:
    same: dict[str, Any] = {
        "task": "flip_flop",
        "model": "1x64",
        "attention": attention,
        "options": "",
        "seed": seed,
        "seq_len": 512,
        "heads": 2,
        "p_train": 0.8,
        "preset": "h200",
        "dtype": "float32",
        "metric": "error_rate",
        "stderr": 0.001,
        "reads": 1000,
        "lr": lr,
        "distance_start": None,
        "distance_end": None,
    } | common
    rows = [same | {"test": test, "p_ignore": CHANCES[test], "value": rate} for test, rate in rates.items()]
    rows.append(same | {"test": "validation", "p_ignore": 0.8, "value": validation})
    for start in (1, 2, 4):
        octave = {"distance_start": start, "distance_end": 2 * start, "test": "sparse", "p_ignore": 0.98}
        rows.append(same | octave | {"value": start / 10})
    return pd.DataFrame(rows).astype({"distance_start": float, "distance_end": float})


def rates(ours: float, sparse: float, dense: float) -> dict[str, float]:
    return {"in_distribution": ours, "sparse": sparse, "dense": dense}


def xs(line: Line2D) -> list[float]:
    return [float(value) for value in np.asarray(line.get_xdata())]


def ys(line: Line2D) -> list[float]:
    return [float(value) for value in np.asarray(line.get_ydata())]


def lines(axis: Axes) -> dict[str, Line2D]:
    return {str(line.get_label()): line for line in axis.get_lines() if not str(line.get_label()).startswith("_")}


def test_our_rates_stand_beside_the_published_ones() -> None:
    rows = pd.concat(
        [
            cell("rope", rates(0.1, 0.4, 0.0), 0.1, seed=0),
            cell("rope", rates(0.3, 0.2, 0.0), 0.1, seed=1),
            cell("nope", rates(0.5, 0.5, 0.5), 0.5),
        ],
        ignore_index=True,
    )
    figure = flip_flop.draw(rows)
    left, right = figure.axes
    found = lines(left)
    assert ys(found["RoPE"]) == pytest.approx([0.2, 0.3, 0.0])
    assert ys(found["RoPE, published"]) == list(FLIP_FLOP["rope"].values())
    assert xs(found["RoPE, published"]) == xs(found["RoPE"])
    # published methods that we do not have in the table, and none for what was not published
    assert {"stick-breaking, published", "forgetting, published", "PaTH, published"} <= set(found)
    assert "NoPE, published" not in found and "NoPE" in found
    # a rate of 0 is on the axis
    assert left.get_yscale() == "symlog" and left.get_ylim()[0] < 0 < left.get_ylim()[1]
    assert ys(lines(right)["RoPE"]) == pytest.approx([0.1, 0.2, 0.4])
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert any("2505.16381" in text for text in legend)
    bars = [segment for part in left.collections if isinstance(part, LineCollection) for segment in part.get_segments()]
    # wider than the two seeds, and within what a rate can be
    assert any(0 <= low < 0.1 and 0.3 < high <= 1 for low, high in (np.asarray(bar)[:, 1] for bar in bars))


def test_validation_chooses_the_learning_rate() -> None:
    rows = pd.concat(
        [
            cell("rope", rates(0.2, 0.2, 0.2), 0.05, lr=1e-2),
            cell("rope", rates(0.0, 0.0, 0.0), 0.1, lr=1e-3),
            cell("rope", rates(0.3, 0.3, 0.3), 0.05, lr=2e-2),
        ],
        ignore_index=True,
    )
    best = flip_flop_errors(rows)
    assert set(best["lr"]) == {1e-2} and len(best) == 3


def test_settings_have_a_row_each() -> None:
    rows = pd.concat([cell("rope", rates(0.2, 0.2, 0.2), 0.1), cell("rope", rates(0.2, 0.2, 0.2), 0.1, seq_len=128)])
    figure = flip_flop.draw(rows.reset_index(drop=True))
    assert len(figure.axes) == 4
    titles = [axis.texts[0].get_text() for axis in figure.axes[::2]]
    assert titles == ["1x64 model, sequences of 128 tokens", "1x64 model, sequences of 512 tokens"]


def test_a_table_without_error_rates_is_an_error() -> None:
    rows = cell("rope", rates(0.2, 0.2, 0.2), 0.1)
    with pytest.raises(InputError, match="error_rate"):
        flip_flop.draw(rows.assign(metric="solved"))
