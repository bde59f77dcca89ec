"""Multi-query repeated associative recall: accuracy by the number of key-value pairs, and what older values cost.

The left panel is figure 3 of the paper (Tan et al., ICLR 2025, arXiv 2410.17980).
"""

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sbeval.errors import InputError
from sbeval.plots import chart as charts
from sbeval.plots import style
from sbeval.plots.chart import Chart, Group, Lines
from sbeval.tables import intervals
from sbeval.tables.selection import MQRAR, recall_accuracy, recall_setting
from sbeval.tables.statistics import Method, Scale

TABLE = "mqrar"
# columns that titles always name where settings differ in them
NAMED = ("optimizer", "positions", "max_steps", "patience")
AXES = {"kv_pairs": "key-value pairs", "n_back": "n, where the n-th last value is asked for"}
COLUMNS = ("attention", "options", "seed", "metric", "value", "stderr", "kv_pairs", "lr", "split", *MQRAR.columns)
CHANCE: dict[str, Any] = {"color": style.MARK, "linewidth": 1.0, "linestyle": ":"}
# how training ended
ENDS = {"solved": "solved", "plateau": "without progress", "budget": "out of steps"}
# a recalled value is fresh when it is its key's first, stale when the key had another before
KINDS = {"fresh": "fresh: the key's first value", "stale": "stale: the key had another"}


def draw(table: pd.DataFrame) -> Figure:
    """Draw the table, one row of panels for each setting, those with the most rows first.

    Left: accuracy over all queries, with the chance level. Right: queries for fresh values beside those for stale ones.
    Of several learning rates the one with the best validation accuracy is drawn. Where queries ask for older values
    than the last, x is how old.
    """
    drawn = _best(table)
    looks = style.looks(drawn)
    panels = settings(drawn)
    figure, axes = style.pairs(len(panels), share_y=True)
    spreads: list[pd.DataFrame] = []
    for (title, rows, x), (left, right) in zip(panels, axes, strict=True):
        style.title(left, title)
        spreads += _overall(left, rows[rows["split"] == "all"], looks, x)
        spreads += _pairs(right, rows[rows["split"].isin(list(KINDS))], looks, x)
    note = intervals.explain(spreads, "bars", "sequences") + _ended(table, drawn)
    style.finish(figure, [look.handle() for look in looks.values()], note)
    return figure


def chart(table: pd.DataFrame) -> Chart:
    """Return the interactive figure, with a panel for each split."""
    drawn = _best(table)
    looks = style.looks(drawn)
    groups = []
    for title, rows, x in settings(drawn):
        chance = {f"chance, 1/{size - size // 2}": 1 / (size - size // 2) for size in sorted(set(rows["vocab_size"]))}
        panels = [
            Lines(title=name, x=AXES[x], y="accuracy", lines=lines, levels=chance)
            for split, name in ({"all": "all queries"} | KINDS).items()
            if (lines := charts.lines(rows[rows["split"] == split], looks, by=x, scale=Scale.SHARE))
        ]
        groups.append(Group(title, panels))
    sentence = (
        "Share of queries for which the latest value of the key is returned (1 is all), by the number of key-value "
        "pairs in the sequence. What older values of a key cost is the difference between fresh and stale."
    )
    note = intervals.explain(charts.spreads(groups), "bars and bands", "sequences") + _ended(table, drawn)
    return Chart("Associative recall by number of pairs", sentence, groups, note)


def _ended(table: pd.DataFrame, drawn: pd.DataFrame) -> str:
    """Count how training of the drawn models ended, where the table has it: not solved is not refuted."""
    if not {"cell", "status"} <= set(table):
        return ""
    solved = table[(table["metric"] == "solved") & table["cell"].isin(drawn["cell"])]
    counts = solved.drop_duplicates("cell")["status"].value_counts()
    parts = [f"{counts[how]} {words}" for how, words in ENDS.items() if how in counts]
    return f" Training ended: {', '.join(parts)}." if parts else ""


def _best(table: pd.DataFrame) -> pd.DataFrame:
    table = recall_accuracy(table)
    if not (table["split"] == "all").any():
        raise InputError("there are no rows with metric 'accuracy' and split 'all' to draw")
    return table


def settings(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame, str]]:
    """Return title and rows of each setting and the column of its x; settings with the most rows first."""
    always, others = MQRAR.always, recall_setting(table).others
    setting = [*always, *others, "kv_pairs"]
    by_age = table.groupby(setting, dropna=False)["n_back"].transform("nunique") > 1
    grouped = []
    if len(rows := table[~by_age]):
        panels = style.panels(rows, always, [*others, "n_back"], within=["kv_pairs"], named=NAMED)
        grouped += [(title, part, "kv_pairs") for title, part in panels]
    if len(rows := table[by_age]):
        panels = style.panels(rows, (*always, "kv_pairs"), others, within=["n_back"], named=NAMED)
        grouped += [(title, part, "n_back") for title, part in panels]
    return sorted(grouped, key=lambda setting: -len(setting[1]))


def _overall(axis: Axes, rows: pd.DataFrame, looks: dict[Method, style.Look], x: str) -> list[pd.DataFrame]:
    style.label(axis, AXES[x], "accuracy (all queries)")
    counts = sorted(rows[x].unique())
    points = intervals.points(rows, [x], Scale.SHARE)
    spreads = []
    for index, (method, look) in enumerate(looks.items()):
        spread = intervals.method(points, method)
        # with a single number of pairs the methods would overlap
        at = spread[x] * 2 ** (_dodge(index, len(looks)) if len(counts) == 1 else 0)
        style.bars(axis, at, spread, look)
        # the first method on top of equal ones
        axis.plot(at, spread["mean"], label=look.label, zorder=3 - index / len(looks), **look.line())
        spreads.append(spread)
    style.ticks(axis, counts)
    style.shares(axis)
    if len(counts) == 1:
        axis.set_xlim(counts[0] * 2**-0.5, counts[0] * 2**0.5)
    values = sorted({size - size // 2 for size in rows["vocab_size"]})
    chances = [axis.axhline(1 / value, label=f"chance, 1/{value}", **CHANCE) for value in values]
    style.key(axis, chances)
    return spreads


def _pairs(axis: Axes, rows: pd.DataFrame, looks: dict[Method, style.Look], x: str) -> list[pd.DataFrame]:
    """Draw fresh and stale accuracy of a method side by side, joined: the slope is the cost of older values."""
    if rows.empty:
        axis.set_axis_off()
        return []
    style.label(axis, AXES[x], "accuracy (fresh, stale)")
    counts = sorted(rows[x].unique())
    half = 0.2 / len(looks)
    points = intervals.points(rows, [x, "split"], Scale.SHARE)
    spreads = []
    for index, (method, look) in enumerate(looks.items()):
        for count, spread in intervals.method(points, method).groupby(x):
            middle = counts.index(count) + _dodge(index, len(looks))
            ats = spread["split"].map({"fresh": middle - half, "stale": middle + half})
            axis.plot(ats, spread["mean"], color=look.colour, linewidth=1.0, zorder=2)
            style.bars(axis, ats, spread, look)
            for at, split, mean in zip(ats, spread["split"], spread["mean"], strict=True):
                axis.plot([at], [mean], label=f"{look.label}, {split}", **look.line() | _fill(split, look.colour))
            spreads.append(spread)
    axis.set_xticks(range(len(counts)), [f"{count}" for count in counts])
    axis.grid(False, axis="x")
    for index in range(0, len(counts), 2) if len(counts) > 1 else ():
        axis.axvspan(index - 0.5, index + 0.5, color="0.96", zorder=0)
    axis.set_xlim(-0.5, len(counts) - 0.5)
    dot: dict[str, Any] = {"color": style.MARK, "marker": "o", "markersize": 4, "linestyle": "none"}
    style.key(axis, [Line2D([], [], label=KINDS[kind], **dot | _fill(kind, style.MARK)) for kind in KINDS])
    return spreads


def _fill(kind: str, colour: str) -> dict[str, Any]:
    return {"markerfacecolor": colour if kind == "fresh" else "white"}


def _dodge(index: int, count: int) -> float:
    """Spread `count` methods over four fifths of the unit around 0."""
    return 0.8 * ((index + 0.5) / count - 0.5)
