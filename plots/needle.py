"""Needles in haystacks: score by length, for each task and as their mean."""

import math

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sbeval.plots import chart as charts
from sbeval.plots import style
from sbeval.plots.chart import Chart, Group, Lines
from sbeval.tables import intervals
from sbeval.tables.selection import NEEDLE, NEEDLE_SAME, mean_over_tasks, needle_scores, shared_tasks
from sbeval.tables.statistics import Method, Scale

TABLE = "needle"
COLUMNS = ("cell", "value", "stderr", "n", "depth_start", *NEEDLE_SAME)
METRICS = {"score": "score of what is said", "greedy": "greedy decoding is right"}
ACROSS = 4


def draw(table: pd.DataFrame) -> Figure:
    """Draw the table: for each model setting and each of the two metrics the mean over tasks, then each task.

    The mean is over the tasks that all methods of the setting have.
    """
    table = needle_scores(table)
    looks = style.looks(table)
    grids = settings(table)
    split = [_parts(some) for _, some in grids]
    heights = [math.ceil(len(parts) / ACROSS) for parts in split]
    figure, lines = style.grid(sum(heights), ACROSS)
    axes = [axis for line in lines for axis in line]
    spreads: list[pd.DataFrame] = []
    for number, ((title, _), parts) in enumerate(zip(grids, split, strict=True)):
        first = sum(heights[:number]) * ACROSS
        panels = axes[first : first + heights[number] * ACROSS]
        style.title(panels[0], title)
        for column, (axis, (task, part)) in enumerate(zip(panels, parts, strict=False)):
            spreads += _lines(axis, task, part, looks, first=column % ACROSS == 0)
        for axis in panels[len(parts) :]:
            axis.set_axis_off()
    note = style.with_caution(intervals.explain(spreads, "bars", "samples"), table, looks)
    style.finish(figure, [look.handle() for look in looks.values()], note)
    return figure


def chart(table: pd.DataFrame) -> Chart:
    """Return the interactive figure."""
    table = needle_scores(table)
    looks = style.looks(table)
    groups = []
    for title, some in settings(table):
        marks = [int(length) for length in some["train_len"].unique()]
        panels = [
            Lines(title=task, x="length (tokens)", y="score", lines=lines, marks=marks)
            for task, part in _parts(some)
            if (lines := charts.lines(part, looks, by="length", scale=Scale.SHARE))
        ]
        groups.append(Group(title, panels))
    sentence = (
        "Share of what was hidden in a text that is retrieved (1 is all), by the length of text and answer in "
        "tokens, for each of RULER's tasks and as the mean of them. Higher is better."
    )
    note = style.with_caution(intervals.explain(charts.spreads(groups), "bands", "samples"), table, looks)
    return Chart("Needles in haystacks", sentence, groups, note)


def _parts(some: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Return name and rows of each panel: the mean over tasks, unless there is one task, then each task."""
    if some["task"].nunique() == 1:
        return [(str(some["task"].iloc[0]), some)]
    shared = shared_tasks(some)
    tasks = sorted(shared["task"].unique())
    name = "mean" if len(tasks) == some["task"].nunique() else f"mean of {', '.join(tasks)}"
    return [(name, mean_over_tasks(shared)), *((str(task), part) for task, part in some.groupby("task"))]


def settings(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Return title and rows of each setting and metric of a table."""
    return [
        (f"{title}{': ' if title else ''}{name}", some[some["metric"] == metric])
        for title, some in style.panels(table, NEEDLE.always, NEEDLE.others)
        for metric, name in METRICS.items()
        if (some["metric"] == metric).any()
    ]


def _lines(
    axis: Axes, task: str, some: pd.DataFrame, looks: dict[Method, style.Look], *, first: bool
) -> list[pd.DataFrame]:
    style.subtitle(axis, task)
    points = intervals.points(some, ["length"], Scale.SHARE)
    spreads = []
    for method, look in looks.items():
        spread = intervals.method(points, method)
        if spread.empty:
            continue
        style.bars(axis, spread["length"], spread, look)
        axis.plot(spread["length"], spread["mean"], label=look.label, **look.line())
        spreads.append(spread)
    if spreads:
        lengths = sorted({float(length) for length in some["length"]})
        style.ticks(axis, lengths)
        axis.set_xticklabels([f"{length / 1024:g}k" for length in lengths])
        axis.set_xlim(lengths[0] / 1.3, lengths[-1] * 1.3)
        for length in some["train_len"].unique():
            axis.axvline(length, color=style.MARK, linewidth=1.0, linestyle=(0, (2, 2)), zorder=1)
    style.shares(axis)
    style.label(axis, "length (tokens)", "share" if first else "")
    return spreads
