"""Accuracy of the task by length."""

import pandas as pd
from matplotlib.figure import Figure

from sbeval.plots import chart as charts
from sbeval.plots import legend, style
from sbeval.plots.chart import Chart, Group, Lines
from sbeval.tables import intervals
from sbeval.tables.statistics import Scale

TABLE = "first_token"
COLUMNS = ("attention", "options", "seed", "value", "stderr", "model", "seq_len")


def draw(table: pd.DataFrame) -> Figure:
    """Draw a panel for each model."""
    rows = table.assign(x=table["seq_len"])
    looks = legend.looks(rows)
    panels = style.panels(rows, ("model",), ())
    figure, axes = style.grid(len(panels), 1)
    spreads = []
    for (title, part), (axis,) in zip(panels, axes, strict=True):
        style.title(axis, title)
        style.label(axis, "tokens", "accuracy")
        spreads += style.bands(axis, part, looks)
    style.finish(figure, [look.handle() for look in looks.values()], intervals.explain(spreads, "bands", "rows"))
    return figure


def chart(table: pd.DataFrame) -> Chart:
    """Return the interactive figure."""
    lines = charts.lines(table, legend.looks(table), by="seq_len", scale=Scale.SHARE)
    groups = [Group("", [Lines(title="", x="tokens", y="accuracy", lines=lines)])]
    note = intervals.explain(charts.spreads(groups), "bands", "rows")
    return Chart(
        "First token", "Accuracy (1 is all) of repeating the first token, by length. Higher is better.", groups, note
    )
