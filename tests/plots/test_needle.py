from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, QuadMesh
from matplotlib.figure import Figure

from sbeval.errors import InputError
from sbeval.plots import needle, needle_depth
from sbeval.tables.selection import mean_over_tasks, needle_scores

COMMON: dict[str, Any] = {
    "model": "25m",
    "options": "",
    "params": 25_000_000,
    "train_len": 1024,
    "train_tokens": 10**8,
    "eval_len": 2048,
    "seed": 0,
    "n": 100,
    "stderr": 0.05,
    "corpus": "books",
    "tokenizer": "bpe:8192",
    "preset": "h200",
    "dtype": "bfloat16",
    "finetune_tokens": 1000,
    "depth_start": np.nan,
    "depth_end": np.nan,
    "metric": "score",
    "attention": "rope",
    "task": "vt",
    "length": 1024,
    "cell": "one",
}
SCORES = {("vt", 1024): 0.5, ("vt", 2048): 0.25, ("cwe", 1024): 0.9, ("cwe", 2048): 0.75}


def rows(**others: Any) -> list[dict[str, Any]]:
    return [
        COMMON | {"task": task, "length": length, "value": value} | others for (task, length), value in SCORES.items()
    ]


def depths(**others: Any) -> list[dict[str, Any]]:
    return [
        COMMON | {"length": length, "depth_start": start, "depth_end": start + 10, "value": start / length} | others
        for length in (1024, 2048)
        for start in (0, 10, 90)
    ]


def names(axis: Axes) -> list[str]:
    return [text.get_text() for text in axis.texts]


def panel(figure: Figure, name: str, number: int = 0) -> Axes:
    return [axis for axis in figure.axes if name in names(axis)][number]


def line(axis: Axes, label: str) -> dict[float, float]:
    (found,) = [line for line in axis.get_lines() if line.get_label() == label]
    x, y = (np.asarray(data, dtype=float).tolist() for data in (found.get_xdata(), found.get_ydata()))
    return dict(zip(x, y, strict=True))


def test_scores_stand_by_task_and_as_their_mean() -> None:
    figure = needle.draw(pd.DataFrame(rows() + rows(attention="alibi", value=0.1)))
    assert line(panel(figure, "vt"), "RoPE") == pytest.approx({1024: 0.5, 2048: 0.25})
    assert line(panel(figure, "cwe"), "RoPE") == pytest.approx({1024: 0.9, 2048: 0.75})
    assert line(panel(figure, "mean"), "RoPE") == pytest.approx({1024: 0.7, 2048: 0.5})
    assert line(panel(figure, "mean"), "ALiBi") == pytest.approx({1024: 0.1, 2048: 0.1})
    # the training length
    assert any(set(np.asarray(one.get_xdata(), dtype=float)) == {1024.0} for one in panel(figure, "vt").get_lines())
    title = "25m model, trained at length 1024, 1,000 tokens of fine-tuning: score of what is said"
    assert title in names(panel(figure, "mean"))


def test_bars_are_intervals_and_that_of_a_mean_is_narrower() -> None:
    figure = needle.draw(pd.DataFrame(rows()))

    def height(name: str) -> float:
        (bars,) = [item for item in panel(figure, name).collections if isinstance(item, LineCollection)]
        low, high = bars.get_segments()[0][:, 1]
        return float(high - low)

    # Wilson's interval of a half is a little narrower than the normal one
    assert height("vt") == pytest.approx(2 * 1.96 * 0.05, rel=0.03)
    assert height("mean") == pytest.approx(2 * 1.96 * 0.05 / 2**0.5, rel=0.03)


def test_a_mean_compares_methods_on_the_same_tasks() -> None:
    figure = needle.draw(pd.DataFrame(rows() + [row for row in rows(attention="alibi") if row["task"] == "vt"]))
    shared = panel(figure, "mean of vt")
    assert line(shared, "RoPE") == line(shared, "ALiBi") == pytest.approx({1024: 0.5, 2048: 0.25})


def test_a_mean_is_of_all_tasks_or_is_none() -> None:
    table = pd.DataFrame(rows())
    table = table[(table["task"] != "cwe") | (table["length"] != 2048)]
    assert line(panel(needle.draw(table), "mean"), "RoPE") == pytest.approx({1024: 0.7})


def test_of_cells_that_say_the_same_that_with_most_samples_is_drawn() -> None:
    fewer = rows(n=30, stderr=0.09, cell="few", value=0.0)
    # the same samples, asked again with another length beside: the evaluation is longer, and no number differs
    again = [row | {"cell": "more", "eval_len": 4096} for row in rows() if row["length"] == 1024]
    table = pd.DataFrame(fewer + rows() + again)
    alone = pd.DataFrame(rows())
    for shown in (needle_scores(table), needle_scores(table.iloc[::-1])):
        columns = ["task", "length", "value", "stderr"]
        found, wanted = (
            item[columns].sort_values(columns).reset_index(drop=True) for item in (shown, needle_scores(alone))
        )
        pd.testing.assert_frame_equal(found, wanted)
        pd.testing.assert_frame_equal(mean_over_tasks(shown), mean_over_tasks(needle_scores(alone)))
    assert line(panel(needle.draw(table), "vt"), "RoPE") == pytest.approx({1024: 0.5, 2048: 0.25})
    # methods, seeds and settings are none of that
    others = rows(attention="alibi", cell="a") + rows(seed=1, cell="b") + rows(finetune_tokens=0, cell="c")
    assert len(needle_scores(pd.DataFrame(rows() + others))) == 4 * len(rows())


def test_settings_and_metrics_have_panels_of_their_own() -> None:
    figure = needle.draw(pd.DataFrame(rows() + rows(metric="greedy", value=0.3) + rows(finetune_tokens=0, value=0.2)))
    found = [line(axis, "RoPE")[1024] for axis in figure.axes if "mean" in names(axis)]
    assert sorted(found) == pytest.approx([0.2, 0.3, 0.7])


def test_a_map_has_depth_by_length() -> None:
    table = depths() + depths(task="cwe", value=0.0) + depths(attention="alibi")
    # a task that one method alone was asked would raise or lower its mean
    figure = needle_depth.draw(pd.DataFrame(table + depths(task="fwe", value=1.0)))
    alone = needle_depth.draw(pd.DataFrame(depths() + depths(task="cwe", value=0.0)))
    (mesh,) = [item for item in panel(figure, "ALiBi").collections if isinstance(item, QuadMesh)]
    values: Any = np.ma.filled(np.ma.asarray(mesh.get_array(), dtype=float), np.nan)
    # bins without a sample are there, and empty
    wanted = np.full((10, 2), np.nan)
    wanted[[0, 1, 9]] = np.array([[0, 0], [10 / 1024, 10 / 2048], [90 / 1024, 90 / 2048]])
    np.testing.assert_allclose(values.reshape(10, 2), wanted)
    for drawn, wanted_there in ((figure, 90 / 1024), (alone, 45 / 1024)):
        (found,) = [item for item in panel(drawn, "RoPE").collections if isinstance(item, QuadMesh)]
        assert np.ma.asarray(found.get_array()).reshape(10, 2)[9, 0] == pytest.approx(wanted_there)
    low, high = panel(figure, "RoPE").get_ylim()
    assert (low, high) == (100, 0)
    assert [text.get_text() for text in panel(figure, "RoPE").get_xticklabels()] == ["1k", "2k"]


def test_a_map_is_of_the_cell_with_most_samples() -> None:
    # a bin in which the smaller cell, of other samples, has more of them is the larger one's too
    fewer = depths(cell="few", n=40, value=1.0)[:2] + depths(cell="few", n=101, value=1.0)[2:3]
    drawn: list[Any] = []
    for table in (depths(), fewer + depths()):
        figure = needle_depth.draw(pd.DataFrame(table))
        (mesh,) = [item for item in panel(figure, "RoPE").collections if isinstance(item, QuadMesh)]
        drawn.append(np.ma.filled(np.ma.asarray(mesh.get_array(), dtype=float), np.nan))
    np.testing.assert_array_equal(drawn[1], drawn[0])


@pytest.mark.parametrize(("figure", "said"), [(needle, "no rows with metric"), (needle_depth, "no rows with a depth")])
def test_nothing_to_draw_is_said(figure: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        figure.draw(pd.DataFrame(rows(metric="log_probability") + depths(metric="log_probability")))


def test_models_that_overfit_are_named() -> None:
    table = pd.DataFrame(
        rows(status="overfit") + depths(value=0.5, status="overfit") + rows(attention="alibi", status="")
    )
    said = "above its lowest): RoPE."
    for figure in (needle, needle_depth):
        assert said in figure.draw(table).get_supxlabel().replace("\n", " ") and said in figure.chart(table).note


def test_one_task_is_one_panel_with_its_axis_named() -> None:
    table = pd.DataFrame(rows(task="vt"))
    panels = [axis for axis in needle.draw(table).axes if axis.axison]
    assert len(panels) == table["metric"].nunique() and all(axis.get_ylabel() == "share" for axis in panels)
