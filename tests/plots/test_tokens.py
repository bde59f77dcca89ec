"""The figure of gaps by training tokens: its points are the gaps, its lines the fit, and most tables have none."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from sbeval import registry
from sbeval.errors import InputError
from sbeval.plots import legend, tokens
from sbeval.report.figures import draw_figures
from sbeval.tables.tokens import Ladder, Law, ladders

# the made-up tables of the fit's own tests
SPEC = importlib.util.spec_from_file_location("made_up", Path(__file__).parents[1] / "sbeval/tables/test_tokens.py")
assert SPEC and SPEC.loader
made_up: Any = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(made_up)


def table(seeds: int = 2) -> pd.DataFrame:
    rows: pd.DataFrame = made_up.table(made_up.law(-0.05, 0.3, 1.0), seeds=seeds, noise=0.002)
    return rows


def fitted_ladder() -> tuple[Ladder, Law]:
    (ladder,) = ladders(table())
    assert ladder.law
    return ladder, ladder.law


def test_points_are_the_gaps_and_lines_the_fit() -> None:
    ladder, law = fitted_ladder()
    axis, beside = tokens.draw(table()).axes
    points, fitted, beyond = [line for line in axis.get_lines() if len(line.get_xdata()) != 2]  # type: ignore[arg-type]
    assert (fitted.get_linestyle(), beyond.get_linestyle()) == ("-", ":")
    assert np.asarray(points.get_xdata()).tolist() == ladder.tokens.tolist()
    assert np.asarray(points.get_ydata()).tolist() == [gap.value for gap in ladder.gaps]
    (bars,) = axis.collections
    assert [sorted(part[:, 1]) for part in bars.get_segments()] == [[gap.low, gap.high] for gap in ladder.gaps]  # type: ignore[attr-defined]
    for line, ends in ((fitted, (6e7, 9.6e8)), (beyond, (9.6e8, 4 * 9.6e8))):
        x = np.asarray(line.get_xdata())
        assert (x[0], x[-1]) == pytest.approx(ends)
        assert np.asarray(line.get_ydata()) == pytest.approx(law.at(x))
    limit, _ = beside.get_lines()
    (bar,) = beside.collections
    assert np.asarray(limit.get_ydata()).tolist() == [law.limit.value] and beside.get_ylim() == axis.get_ylim()
    assert sorted(bar.get_segments()[0][:, 1]) == [law.limit.low, law.limit.high]  # type: ignore[attr-defined]
    assert to_hex(points.get_color()) == legend.COLOURS[0] and axis.get_xscale() == "log"


def test_a_method_far_behind_leaves_the_panel_to_the_others() -> None:
    far: Any = made_up.table(made_up.law(0.4, 0.3, 1.0), seeds=2, noise=0.002)
    both = pd.concat([table(), far[far["attention"] != "rope"].assign(attention="nope")])
    figure = tokens.draw(both)
    assert max(gap.high for gap in ladders(table())[0].gaps) < figure.axes[0].get_ylim()[1] < 0.4
    assert str(figure.get_supxlabel()).endswith("NoPE leaves the panels.")
    # beside each other at the same tokens
    first, second = [line.get_xdata() for line in figure.axes[0].get_lines() if line.get_linestyle() == "None"]
    assert np.asarray(first) / np.asarray(second) == pytest.approx(1 / tokens.APART)


def test_where_all_methods_are_far_behind_all_leave_the_panel() -> None:
    figure = tokens.draw(made_up.table(made_up.law(0.4, 0.3, 1.0), seeds=2, noise=0.002))
    assert " ".join(str(figure.get_supxlabel()).split()).endswith("stick-breaking leaves the panels.")


def test_a_method_with_few_token_counts_has_points_alone() -> None:
    few: Any = made_up.table(made_up.law(-0.05, 0.1, 1.0), seeds=2, noise=0.002)
    few = few[(few["attention"] != "rope") & (few["train_tokens"] < 4e8)].assign(attention="alibi")
    axis, beside = tokens.draw(pd.concat([table(), few])).axes
    points = [line for line in axis.get_lines() if line.get_linestyle() == "None"]
    assert sorted(len(np.asarray(line.get_xdata())) for line in points) == [3, 5]
    assert [line.get_linestyle() for line in axis.get_lines()].count(":") == 1 and len(beside.collections) == 1
    assert "ALiBi" not in tokens.chart(pd.concat([table(), few])).note


def test_the_page_has_the_same_numbers_and_the_limit() -> None:
    ladder, law = fitted_ladder()
    chart = tokens.chart(table())
    (panel,) = chart.groups[0].panels
    assert panel.rows()["low"].tolist() == [gap.low for gap in ladder.gaps]
    assert f"stick-breaking {law.limit.text()}" in chart.note and "2 seeds" in chart.note
    alone = tokens.chart(table(seeds=1))
    (panel,) = alone.groups[0].panels
    # without an interval a point has no bar
    assert (panel.rows()["low"] == panel.rows()["high"]).all()
    assert chart.note.startswith("Means of 2 seeds; bars: 95 % intervals; lines: ")
    assert alone.note.startswith("One seed; lines: ")


def test_a_table_of_one_token_count_has_no_such_figure(tmp_path: Path) -> None:
    once = table()
    once = once[once["train_tokens"] == once["train_tokens"].max()]
    assert registry.has_rows("tokens", table()) and not registry.has_rows("tokens", once)
    assert registry.has_rows("length_gen", once)
    once.assign(position_start="", position_end="", stderr="", cell="x").to_csv(
        tmp_path / "length_gen.csv", index=False
    )
    with pytest.raises(InputError, match="no method has 4 or more counts of training tokens"):
        draw_figures(tmp_path, ["tokens"], ["png"])
