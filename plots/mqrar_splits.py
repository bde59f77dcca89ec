"""Multi-query repeated associative recall: accuracy by what makes a query hard.

First the number of earlier values of its key, then the distance back to its answer.
"""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sbeval.errors import NothingToDraw
from sbeval.plots import chart as charts
from sbeval.plots import legend, mqrar, style
from sbeval.plots.chart import Chart, Group, Lines
from sbeval.tables import intervals
from sbeval.tables.rows import Method
from sbeval.tables.selection import recall_accuracy
from sbeval.tables.statistics import Scale
from sbeval.tables.table import numbers

TABLE = "mqrar"
COLUMNS = (*mqrar.COLUMNS, "n", "stale_values", "distance_start", "distance_end")
# a point over fewer queries of a seed is noise
FEWEST = 10
# what fits a page; figures of all would be two pages long
MOST_SETTINGS, MOST_COLUMNS = 2, 4
AGE, DISTANCE = "earlier values of the key", "distance to the answer (positions)"
# titles of columns of panels
VARIED = {"kv_pairs": "{:g} pairs", "n_back": "{:g}-back"}


def draw(table: pd.DataFrame) -> Figure:
    """Draw the table, two rows of panels for each setting, at the best learning rate of each method.

    A column is a number of pairs, or the age of the value asked for; a single column is drawn as a row. Distances are
    at the geometric middle of their bin.
    """
    table = _best(table)
    looks = legend.looks(table)
    every = mqrar.settings(table)
    settings = every[:MOST_SETTINGS]
    columns = max(min(MOST_COLUMNS, rows[x].nunique()) for _, rows, x in settings)
    figure, axes = style.grid(2 * len(settings), columns) if columns > 1 else style.grid(len(settings), 2)
    places = [([left], [right]) for left, right in axes] if columns == 1 else zip(axes[::2], axes[1::2], strict=True)
    spreads: list[pd.DataFrame] = []
    for (title, rows, x), (above, below) in zip(settings, places, strict=True):
        style.title(above[0], title)
        parts = _spaced([(varied, part) for varied, part in rows.groupby(x)])
        for axis in (*above[len(parts) :], *below[len(parts) :]):
            axis.set_axis_off()
        for (varied, part), upper, lower in zip(parts, above, below, strict=False):
            style.subtitle(upper, VARIED[x].format(varied))
            style.label(upper, AGE, "accuracy" if upper is above[0] else "")
            style.label(lower, DISTANCE, "accuracy" if lower is below[0] else "")
            far = _far(part)
            spreads += _lines(upper, _older(part), looks) + _lines(lower, far, looks)
            style.shares(upper)
            style.shares(lower)
            upper.xaxis.set_major_locator(MaxNLocator(integer=True))
            if len(far):
                style.octaves(
                    lower, far["distance_start"].min(), far["distance_end"].max(), far["distance_start"].min()
                )
    note = intervals.explain(spreads, "bands", "sequences")
    if len(settings) < len(every) or any(rows[x].nunique() > MOST_COLUMNS for _, rows, x in settings):
        note += " Not all settings and sizes: the page (--format html) has all, and --where selects others."
    style.finish(figure, [look.handle() for look in looks.values()], note)
    return figure


def _spaced(parts: list[tuple[Any, pd.DataFrame]]) -> list[tuple[Any, pd.DataFrame]]:
    """Return at most MOST_COLUMNS parts, evenly spaced, with the first and the last."""
    if len(parts) <= MOST_COLUMNS:
        return parts
    return [parts[round(index * (len(parts) - 1) / (MOST_COLUMNS - 1))] for index in range(MOST_COLUMNS)]


def chart(table: pd.DataFrame) -> Chart:
    """Return the interactive figure."""
    table = _best(table)
    looks = legend.looks(table)
    groups = []
    for title, rows, x in mqrar.settings(table):
        panels = [
            Lines(title=f"{VARIED[x].format(varied)}: {name}", x=name, y="accuracy", lines=lines, octaves=octaves)
            for varied, part in rows.groupby(x)
            for name, points, octaves in ((AGE, _older(part), False), (DISTANCE, _far(part), True))
            if (lines := charts.lines(points[points["n"] >= FEWEST], looks, scale=Scale.SHARE))
        ]
        groups.append(Group(title, panels))
    sentence = (
        "Share of queries answered rightly (1 is all), by how many values the key had before and by how many positions "
        "back the answer is."
    )
    note = intervals.explain(charts.spreads(groups), "bands", "sequences")
    return Chart("Associative recall by what makes a query hard", sentence, groups, note)


def _best(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows at the best learning rates."""
    table = recall_accuracy(table)
    if not (_has(table, "stale_values") | _has(table, "distance_start")).any():
        raise NothingToDraw("there are no rows with stale_values or distance_start to draw")
    return table


def _older(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows by the number of earlier values of the key."""
    rows = numbers(rows[_has(rows, "stale_values")], ["stale_values"])
    return rows.assign(x=rows["stale_values"])


def _far(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows by distance."""
    rows = numbers(rows[_has(rows, "distance_start")], ["distance_start", "distance_end"])
    return rows.assign(x=np.sqrt(rows["distance_start"] * (rows["distance_end"] - 1)))


def _has(table: pd.DataFrame, name: str) -> "pd.Series[bool]":
    return pd.to_numeric(table[name], errors="coerce").notna()


def _lines(axis: Axes, rows: pd.DataFrame, looks: dict[Method, legend.Look]) -> list[pd.DataFrame]:
    """Draw a line and a band for each method; hide a panel without rows."""
    if rows.empty:
        axis.set_axis_off()
        return []
    return style.bands(axis, rows[rows["n"] >= FEWEST], looks)
