"""Multi-query repeated associative recall: accuracy by what makes a query hard.

Left: how many values its key has had before. Right: how far back its answer was assigned.
"""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sbeval.errors import InputError
from sbeval.plots import chart as charts
from sbeval.plots import mqrar, style
from sbeval.plots.chart import Chart, Group, Lines
from sbeval.table import numbers

TABLE = "mqrar"
COLUMNS = (*mqrar.COLUMNS, "n", "stale_values", "distance_start", "distance_end")
# queries of a seed without which a point is noise
FEWEST = 10


def draw(table: pd.DataFrame) -> Figure:
    """Draw the table, one row of panels for each setting and number of pairs, at the best learning rate of each method.

    Distances are drawn at the geometric middle of their bin.
    """
    table, by_age, by_distance = _best(table)
    looks = style.looks(table)
    panels = style.panels(table, ("kv_pairs", *mqrar.ALWAYS), [*mqrar.others(table), "n_back"])
    figure, axes = style.pairs(len(panels), share_y=True)
    spreads: list[pd.DataFrame] = []
    for (title, rows), (left, right) in zip(panels, axes, strict=True):
        style.title(left, title)
        style.label(left, "earlier values of the key", "accuracy")
        style.label(right, "distance to the answer (positions)", "accuracy")
        spreads += _lines(left, _older(rows[by_age.loc[rows.index]]), looks)
        left.xaxis.set_major_locator(MaxNLocator(integer=True))
        far = _far(rows[by_distance.loc[rows.index]])
        spreads += _lines(right, far, looks)
        if len(far):
            style.octaves(right, far["distance_start"].min(), far["distance_end"].max(), far["distance_start"].min())
    style.finish(figure, [look.handle() for look in looks.values()], style.explain(spreads, "bands", "sequences"))
    return figure


def chart(table: pd.DataFrame) -> Chart:
    """The same, to hover over."""
    table, by_age, by_distance = _best(table)
    looks = style.looks(table)
    groups = []
    for title, rows in style.panels(table, ("kv_pairs", *mqrar.ALWAYS), [*mqrar.others(table), "n_back"]):
        kinds = {
            "earlier values of the key": _older(rows[by_age.loc[rows.index]]),
            "distance to the answer (positions)": _far(rows[by_distance.loc[rows.index]]),
        }
        panels = [
            Lines(title=f"by {x.partition(' (')[0]}", x=x, y="accuracy", lines=lines, octaves="distance" in x)
            for x, part in kinds.items()
            if (lines := charts.lines(part[part["n"] >= FEWEST], looks, share=True))
        ]
        groups.append(Group(title, panels))
    sentence = (
        "Share of queries answered rightly (1 is all), by how many values the key had before and by how many positions "
        "back the answer stands."
    )
    note = style.explain(charts.spreads(groups), "bands", "sequences")
    return Chart("Associative recall by what makes a query hard", sentence, groups, note)


def _best(table: pd.DataFrame) -> tuple[pd.DataFrame, "pd.Series[bool]", "pd.Series[bool]"]:
    """The rows at the best learning rates, and which of them are by earlier values, and by distance."""
    table = mqrar.best_rates(table)
    by_age, by_distance = (_has(table, name) for name in ("stale_values", "distance_start"))
    if not (by_age | by_distance).any():
        raise InputError("there are no rows with stale_values or distance_start to draw")
    return table, by_age, by_distance


def _older(rows: pd.DataFrame) -> pd.DataFrame:
    rows = numbers(rows, ["stale_values"])
    return rows.assign(x=rows["stale_values"])


def _far(rows: pd.DataFrame) -> pd.DataFrame:
    rows = numbers(rows, ["distance_start", "distance_end"])
    return rows.assign(x=np.sqrt(rows["distance_start"] * (rows["distance_end"] - 1)))


def _has(table: pd.DataFrame, name: str) -> "pd.Series[bool]":
    return pd.to_numeric(table[name], errors="coerce").notna()


def _lines(axis: Axes, rows: pd.DataFrame, looks: dict[style.Method, style.Look]) -> list[pd.DataFrame]:
    """Draw a line and a band for each method; a panel without rows stays out."""
    if rows.empty:
        axis.set_axis_off()
        return []
    return style.bands(axis, rows[rows["n"] >= FEWEST], looks)
