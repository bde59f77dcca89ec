"""Loss at the training length by peak learning rate: is each method compared at its best rate, or at another's?

One panel for each optimizer, batch, schedule and setting that has several rates. Points are seeds, lines their means.
"""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sbeval.errors import InputError
from sbeval.plots import chart as charts
from sbeval.plots import style
from sbeval.plots.chart import Chart, Group, Lines
from sbeval.tables import intervals
from sbeval.tables.selection import LENGTH_GEN, RECIPE
from sbeval.tables.statistics import Method

TABLE = "length_gen"
COLUMNS = ("attention", "options", "seed", "metric", "value", "context_length", *LENGTH_GEN.columns)
ALWAYS = (*LENGTH_GEN.always, *(name for name in RECIPE if name != "lr"))
X, Y = "peak learning rate", "loss (nats per token)"


def has_rows(table: pd.DataFrame) -> bool:
    """Return whether the table has several rates in one setting: most have one."""
    return bool(_panels(table))


def draw(table: pd.DataFrame) -> Figure:
    """Draw loss by learning rate, a method each."""
    panels = _some(table)
    looks = style.looks(pd.concat([rows for _, rows in panels]))
    figure, axes = style.grid(len(panels), 1)
    figure.set_size_inches(style.WIDTH_IN, style.ROW_IN * len(panels) + 1.0)
    for (title, rows), (axis,) in zip(panels, axes, strict=True):
        style.title(axis, title)
        style.label(axis, X, Y)
        for method, look in looks.items():
            _line(axis, intervals.method(rows, method), look)
        axis.set_xscale("log")
        rates = sorted(rows["lr"].unique())
        axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axis.minorticks_off()
    style.finish(figure, [look.handle() for look in looks.values()], _note(panels))
    return figure


def chart(table: pd.DataFrame) -> Chart:
    """Return the interactive figure."""
    panels = _some(table)
    looks = style.looks(pd.concat([rows for _, rows in panels]))
    groups = []
    for title, rows in panels:
        means: dict[Method, pd.Series[float]] = {of: _means(intervals.method(rows, of)) for of in looks}
        lines = charts.bare(means, looks)
        groups.append(Group(title, [Lines(title="", x=X, y=Y, lines=lines)]))
    sentence = (
        "Mean loss over test documents at the training length, in nats per token, by peak learning rate. A method "
        "whose line still falls at the end has not been given its best rate. Lower is better."
    )
    return Chart("Loss by learning rate", sentence, groups, _note(panels))


def _some(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    if not (panels := _panels(table)):
        raise InputError("there are no models that differ in their learning rate alone")
    return panels


def _panels(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Return title and rows of each setting with several rates; column `loss` is the logarithm of perplexity."""
    if not {"lr", *ALWAYS} <= set(table):
        return []
    rows = table[
        (table["metric"] == "perplexity") & (table["context_length"] == table["train_len"]) & table["lr"].notna()
    ]
    if rows.empty:
        return []
    rows = rows.assign(loss=np.log(rows["value"].astype(float)))
    panels = style.panels(rows, ALWAYS, LENGTH_GEN.others)
    return [(title, of_panel) for title, of_panel in panels if of_panel["lr"].nunique() > 1]


def _means(rows: pd.DataFrame) -> "pd.Series[float]":
    """Return the mean loss of a method by learning rate, over seeds."""
    return rows.groupby("lr")["loss"].mean()


def _line(axis: Axes, rows: pd.DataFrame, look: style.Look) -> None:
    means = _means(rows)
    line = look.line()
    axis.plot(means.index, means, label=look.label, **(line | {"marker": ""}))
    axis.plot(rows["lr"], rows["loss"], **(line | {"linestyle": "none"}))


def _note(panels: list[tuple[str, pd.DataFrame]]) -> str:
    seeds = max(int(rows["seed"].nunique()) for _, rows in panels)
    return "Points: one seed each." if seeds == 1 else f"Points: up to {seeds} seeds; lines: their means."
