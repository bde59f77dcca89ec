from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.lines import Line2D

from sbeval.errors import InputError
from sbeval.plots import loss_by_position

COMMON: dict[str, Any] = {
    "task": "language",
    "model": "small",
    "options": "",
    "train_len": 256,
    "eval_len": 1024,
    "seed": 0,
    "corpus": "books",
    "tokenizer": "bytes",
    "preset": "quick",
    "train_tokens": 10**6,
    "dtype": "float32",
    "stderr": 0.1,
    "metric": "loss",
}
BINS = ((1, 9), (9, 33), (33, 129), (129, 257), (257, 513), (513, 1025))


def cell(attention: str, losses: tuple[float, ...] = (9, 6, 4, 3, 5, 8), **common: Any) -> list[dict[str, Any]]:
    return [
        COMMON | {"attention": attention, "value": value, "position_start": start, "position_end": end} | common
        for value, (start, end) in zip(losses, BINS, strict=True)
    ]


def table(*cells: list[dict[str, Any]]) -> pd.DataFrame:
    rows = pd.DataFrame([row for rows in cells for row in rows])
    # in whatever order
    return rows.sample(frac=1, random_state=0).astype({"position_start": "Int64", "position_end": "Int64"})


def named(lines: list[Line2D]) -> dict[str, Line2D]:
    return {str(line.get_label()): line for line in lines if not str(line.get_label()).startswith("_")}


def test_lines_are_means_over_neighbouring_bins_that_do_not_cross_the_training_length() -> None:
    (axis,) = loss_by_position.draw(table(cell("rope"), cell("nope", (1, 1, 1, 1, 1, 1)))).axes
    line = named(list(axis.get_lines()))["RoPE"]
    # bins that end within the first sixteenth of the training length stay out
    np.testing.assert_allclose(
        np.asarray(line.get_xdata()), np.sqrt([9 * 32, 33 * 128, 129 * 256, 257 * 512, 513 * 1024])
    )
    expected = [
        (9 * 8 + 6 * 24 + 4 * 96) / 128,
        (6 * 24 + 4 * 96 + 3 * 128) / 248,
        (4 * 96 + 3 * 128) / 224,
        (5 * 256 + 8 * 512) / 768,
        (5 * 256 + 8 * 512) / 768,
    ]
    np.testing.assert_allclose(np.asarray(line.get_ydata()), expected)
    assert any(list(np.asarray(line.get_xdata())) == [256, 256] for line in axis.get_lines())
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("position in the document (tokens)", "loss (nats per token)")


def test_seeds_methods_and_settings_are_smoothed_apart() -> None:
    rows = table(
        cell("rope"),
        cell("rope", (8, 7, 6, 5, 4, 3), seed=1),
        cell("rope", train_len=1024),
        cell("rope", (2, 2, 2, 2, 2, 2), options="scaling=ntk,factor=2.0"),
    )
    whole = loss_by_position.smoothed(rows)
    for keys, alone in rows.groupby(["seed", "train_len", "options"]):
        found = whole[(whole[["seed", "train_len", "options"]] == list(keys)).all(axis=1)]
        pd.testing.assert_frame_equal(found, loss_by_position.smoothed(alone))
    figure = loss_by_position.draw(rows)
    # schemes and factors, by training lengths; at 1024 no factor
    assert [axis.axison for axis in figure.axes] == [True, True, True, False]


def test_an_unknown_error_stays_unknown() -> None:
    rows = loss_by_position.smoothed(table(cell("rope", stderr=None)).astype({"stderr": float}))
    assert rows["stderr"].isna().all() and rows["value"].notna().all()


def test_nothing_to_draw_and_unusable_positions_are_said() -> None:
    rows = table(cell("rope"))
    with pytest.raises(InputError, match="no rows with metric 'loss'"):
        loss_by_position.draw(rows[rows["metric"] == "perplexity"])
    with pytest.raises(InputError, match="column 'position_end' holds ''"):
        loss_by_position.draw(rows.assign(position_end=None))
