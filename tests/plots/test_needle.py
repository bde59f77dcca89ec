from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, QuadMesh
from matplotlib.figure import Figure

from sbeval.errors import InputError, NothingToDraw
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
    "ended": "solved",
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
    # several have no room in a title: the note names them
    more = needle.draw(pd.DataFrame([*rows(), *rows(attention="alibi"), COMMON | {"task": "fwe", "value": 0.1}]))
    assert line(panel(more, "mean of 2 tasks"), "ALiBi") == pytest.approx({1024: 0.7, 2048: 0.5})
    assert "Mean of the 2 tasks that all methods have: cwe, vt." in more.get_supxlabel().replace("\n", " ")


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


def apart(axis: Axes) -> list[str]:
    """Methods in the strip below 0, in its order."""
    names = [str(one.get_label()) for one in axis.get_lines()]
    return [name.removeprefix("not solved: ") for name in names if name.startswith("not solved: ")]


def test_methods_that_did_not_solve_a_task_are_named_and_have_no_line() -> None:
    # solved by RoPE alone; ALiBi solved one of two tasks, forgetting one of two seeds of one
    alibi = [row | {"ended": "budget" if row["task"] == "vt" else "solved"} for row in rows(attention="alibi")]
    forgetting = rows(attention="forgetting", value=0.6) + [
        row | {"ended": "budget" if row["task"] == "vt" else "solved"}
        for row in rows(attention="forgetting", seed=1, value=0.2)
    ]
    none = rows(attention="nope", ended="budget", value=0.0)
    table = pd.DataFrame(rows() + alibi + forgetting + none)
    figure = needle.draw(table)
    vt, mean = panel(figure, "vt"), panel(figure, "mean")
    assert apart(vt) == ["ALiBi", "NoPE", "forgetting"] and "1/2" in names(vt) and vt.get_ylim()[0] < -0.1
    drawn = {one.get_label() for one in vt.get_lines()} & {"RoPE", "ALiBi", "NoPE", "forgetting"}
    assert drawn == {"RoPE", "forgetting"}
    # of the seed that did
    assert line(vt, "forgetting")[2048] == pytest.approx(0.6)
    assert apart(panel(figure, "cwe")) == ["NoPE"]
    # the mean is over the tasks that all were asked, hollow where not all were solved
    assert apart(mean) == ["ALiBi", "NoPE", "forgetting"] and {"1/2", "3/4"} <= set(names(mean))
    assert line(mean, "ALiBi") == pytest.approx({1024: 0.7, 2048: 0.5})
    faces = {one.get_label(): one.get_markerfacecolor() for one in mean.get_lines()}
    assert "NoPE" not in faces and faces["ALiBi"] == faces["forgetting"] == "white" != faces["RoPE"]
    # panels of a row share an axis: the strip of the mean is seen although the tasks beside it have none
    some = needle.draw(pd.DataFrame(rows() + [row | {"ended": "budget"} for row in rows(task="fwe", value=0.1)]))
    assert panel(some, "mean").get_ylim()[0] < -0.1 and panel(some, "vt").get_ylim()[0] < -0.1
    assert "(95 % right at the training length" in figure.get_supxlabel().replace("\n", " ")
    assert "and how many of their models did" in figure.get_supxlabel().replace("\n", " ")
    assert "A mean is hollow" in figure.get_supxlabel().replace("\n", " ")
    one = needle.draw(pd.DataFrame(rows(task="vt") + rows(task="vt", attention="nope", ended="budget", value=0.0)))
    assert "Strip below 0" in one.get_supxlabel() and "mean is hollow" not in one.get_supxlabel().replace("\n", " ")
    # where none did, there is no count to explain
    assert "how many" not in needle.draw(pd.DataFrame(rows() + none)).get_supxlabel().replace("\n", " ")
    titles = [panel.title for group in needle.chart(table).groups for panel in group.panels]
    assert "vt; not solved: ALiBi, NoPE, forgetting (1 of 2 seeds)" in titles


@pytest.mark.parametrize(("score", "tokens", "lines"), [(0.96, 1000, 1), (0.94, 1000, 0), (0.1, 0, 1)])
def test_without_a_status_the_score_at_the_training_length_says_what_is_solved(
    score: float, tokens: int, lines: int
) -> None:
    old = pd.DataFrame(rows(task="vt", value=score, finetune_tokens=tokens)).drop(columns="ended")
    (axis,) = [axis for axis in needle.draw(old).axes if axis.axison]
    assert len([one for one in axis.get_lines() if one.get_label() == "RoPE"]) == lines
    assert (apart(axis) == ["RoPE"]) == (not lines)


def test_a_task_that_no_method_solved_is_named_without_a_panel() -> None:
    hard = [row | {"ended": "budget" if row["task"] == "cwe" else "solved"} for row in rows() + rows(attention="alibi")]
    table = pd.DataFrame(hard)
    figure = needle.draw(table)
    panels = [axis for axis in figure.axes if axis.axison]
    assert len(panels) == 2 and not any("cwe" in names(axis) for axis in panels)
    for note in (figure.get_supxlabel().replace("\n", " "), needle.chart(table).note):
        assert "Solved by no method, and not drawn: cwe." in note
    assert "not drawn" not in needle.draw(pd.DataFrame(rows())).get_supxlabel()


def test_rows_that_no_model_solved_have_a_figure() -> None:
    table = pd.DataFrame(rows(ended="budget") + depths(ended="budget"))
    assert apart(panel(needle.draw(table), "vt")) == ["RoPE"]
    assert not [line for axis in needle.draw(table).axes for line in axis.get_lines() if line.get_label() == "RoPE"]
    assert needle.chart(table).groups == needle_depth.chart(table).groups == []
    with pytest.raises(NothingToDraw, match="no row of a model that solved its task"):
        needle_depth.draw(table)


def test_a_map_is_of_models_that_solved_the_task() -> None:
    many = rows() + rows(attention="alibi") + rows(seed=1, ended="budget") + rows(attention="nope", ended="budget")
    some = depths() + depths(attention="alibi") + depths(seed=1, ended="budget", value=0.0)
    some += depths(attention="nope", ended="budget", value=0.0)
    figure = needle_depth.draw(pd.DataFrame(many + some))
    # the two maps and the colours
    assert len(figure.axes) == 3
    for note in (figure.get_supxlabel().replace("\n", " "), needle_depth.chart(pd.DataFrame(many + some)).note):
        assert "Solved by no model of NoPE." in note
    axis = panel(figure, "RoPE\n(1/2 solved)")
    (mesh,) = [item for item in axis.collections if isinstance(item, QuadMesh)]
    assert np.ma.asarray(mesh.get_array()).reshape(10, 2)[9, 0] == pytest.approx(90 / 1024)
    assert "of models that solved them at their training length" in figure.get_supxlabel().replace("\n", " ")


def test_maps_are_of_tasks_that_each_method_solved() -> None:
    hard = {"task": "cwe", "value": 0.0}
    table = rows() + [row | {"ended": "budget"} if row["task"] == "cwe" else row for row in rows(attention="alibi")]
    table += [*depths(), *depths(**hard), *depths(attention="alibi"), *depths(attention="alibi", **hard)]
    figure = needle_depth.draw(pd.DataFrame(table))
    for method in ("RoPE", "ALiBi"):
        (mesh,) = [item for item in panel(figure, method).collections if isinstance(item, QuadMesh)]
        assert np.ma.asarray(mesh.get_array()).reshape(10, 2)[9, 0] == pytest.approx(90 / 1024)
    for note in (figure.get_supxlabel(), needle_depth.chart(pd.DataFrame(table)).note):
        assert note.startswith("Mean of vt")


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
    assert [axis.get_ylabel() for axis in figure.axes if axis.get_label() == "<colorbar>"] == ["share"]
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
