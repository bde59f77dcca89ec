from typing import Any

import numpy as np
import pandas as pd
import pytest

from sbeval.errors import InputError
from sbeval.plots import model

COMMON: dict[str, Any] = {
    "options": "",
    "metric": "throughput",
    "batch": 4,
    "queries": 4096,
    "head_dim": 64,
    "dtype": "bfloat16",
    "device": "a card",
    "n": 1,
}
SIZES = {"350m": 350, "1b": 1000}


def table() -> pd.DataFrame:
    return pd.DataFrame(
        COMMON
        | {"attention": name, "backend": backend, "model": size, "params": params, "step": step}
        | {"value": value * scale / params}
        for name, backend, value in (("rope", "sdpa", 2000), ("stick_breaking", "triton", 1000))
        for size, params in SIZES.items()
        for step, scale in (("train", 1), ("evaluate", 3))
    )


def test_speed_stands_by_size_from_the_smallest_on() -> None:
    left, right = model.draw(table()).axes
    assert [text.get_text() for text in left.get_xticklabels()] == ["350m", "1b"]
    for axis, scale in ((left, 1), (right, 3)):
        found = {line.get_label(): np.asarray(line.get_ydata()).tolist() for line in axis.get_lines()}
        rates = [scale / 0.35, scale]
        assert found == {"stick-breaking": pytest.approx(rates), "RoPE": pytest.approx([2 * rate for rate in rates])}


def test_what_was_not_timed_leaves_its_panel_empty() -> None:
    rows = table()
    left, right = model.draw(rows[rows["step"] == "evaluate"]).axes
    assert all(
        len(np.asarray(line.get_ydata())) == (axis is right) * 2 for axis in (left, right) for line in axis.lines
    )


def test_the_page_has_the_same_numbers() -> None:
    (group,) = model.chart(table()).groups
    assert group.title == "4 sequences of 4096 tokens, heads of 64, bfloat16, a card"
    train, evaluate = (panel.rows() for panel in group.panels)
    assert train[train["method"] == "RoPE"]["training (tokens/s)"].tolist() == pytest.approx([2 / 0.35, 2])
    assert evaluate[evaluate["method"] == "RoPE"]["model"].tolist() == ["350m", "1b"]
    assert group.panels[0].plotly()["layout"]["xaxis"]["categoryarray"] == ["350m", "1b"]


def test_kernels_and_head_sizes_stand_apart() -> None:
    once = table()
    cudnn, flash, wide = (
        once.assign(backend="cudnn"),
        once.assign(backend="flash", value=1.0),
        once.assign(head_dim=128),
    )
    rope = once["attention"] == "rope"
    many = pd.concat([once[~rope], cudnn[rope], flash[rope], wide]).assign(n=5)
    first, second = model.chart(many).groups
    assert [group.title.split(", ")[1] for group in (first, second)] == ["heads of 64", "heads of 128"]
    assert set(first.panels[0].rows()["method"]) == {"stick-breaking", "RoPE (cudnn)", "RoPE (flash)"}
    assert set(second.panels[0].rows()["method"]) == {"stick-breaking", "RoPE"}
    assert model.chart(many).note == "Means of 5 runs."


def test_a_table_without_throughput_is_an_error() -> None:
    with pytest.raises(InputError, match="no rows with metric 'throughput'"):
        model.draw(table().assign(metric="mfu"))


def test_markers_are_whole_and_numbers_plain() -> None:
    figure = model.draw(table().assign(value=1_250_000.0))
    figure.draw_without_rendering()
    for axis in figure.axes:
        assert axis.get_ylim()[1] >= 1.05 * axis.dataLim.ymax
        assert axis.yaxis.get_offset_text().get_text() == "" and any(
            "," in t.get_text() for t in axis.get_yticklabels()
        )
