"""Multi-query repeated associative recall: accuracy by the number of key-value pairs.

This is figure 3 of the paper (Tan et al., ICLR 2025, arXiv 2410.17980): a panel for each size of model. Settings that
differ in anything else, such as vocabulary, steps or optimizer, have figures of their own. What older values of a key
cost is shown by `mqrar_splits` and, as fresh and stale, by the interactive page, which has all settings.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sbeval.errors import NothingToDraw
from sbeval.plots import chart as charts
from sbeval.plots import legend, style
from sbeval.plots.chart import Chart, Group, Lines
from sbeval.tables import intervals, mqrar
from sbeval.tables.rows import Method
from sbeval.tables.selection import MQRAR, recall_accuracy, recall_setting
from sbeval.tables.statistics import Scale

TABLE = "mqrar"
# what tells settings apart at any number of pairs, and is named in their titles
NAMED = ("vocab_size", "optimizer", "positions", "max_steps", "patience")
SIZE = ("model", "width", "layers", "heads")
# panels in a row
MOST = 3
AXES = {"kv_pairs": "key-value pairs", "n_back": "n, where the n-th last value is asked for"}
COUNTED = {"kv_pairs": "pairs", "n_back": "back"}
COLUMNS = ("attention", "options", "seed", "metric", "value", "stderr", "kv_pairs", "lr", "split", *MQRAR.columns)
CHANCE: dict[str, Any] = {"color": style.MARK, "linewidth": 1.0, "linestyle": ":"}
# how training ended
ENDS = {"solved": "solved", "plateau": "without progress", "budget": "out of steps"}
# a recalled value is fresh when it is its key's first, stale when the key had another before
KINDS = {"fresh": "fresh: the key's first value", "stale": "stale: the key had another"}


@dataclass(frozen=True, slots=True)
class Picture:
    """The rows of one setting by column `x`; panels: title and rows of each size of model."""

    title: str
    x: str
    rows: pd.DataFrame
    panels: list[tuple[str, pd.DataFrame]]


def draw(table: pd.DataFrame) -> Figure:
    """Draw the setting with the most rows, each method at the rate that solves it soonest (`recall_accuracy`)."""
    return figures(table)[""]


def figures(table: pd.DataFrame) -> dict[str, Figure]:
    """Draw each setting, by the words that tell it from the first, which has the most rows and no words."""
    rows = drawn(table)
    looks, named = legend.looks(rows), by_name(pictures(rows))
    beside = " Other settings have figures of their own." if len(named) > 1 else ""
    return {name: _figure(picture, looks, _ended(table, picture.rows) + beside) for name, picture in named.items()}


def by_name(found: list[Picture]) -> dict[str, Picture]:
    """Return pictures by the words that tell each from the first, which has none."""
    first, *others = found
    named = {"": first}
    for picture in others:
        words = [word for word in picture.title.lower().split(", ") if word not in first.title.lower().split(", ")]
        words += ["n-back"] if picture.x == "n_back" else []
        name = "".join(f"-{re.sub('[^a-z0-9]+', '-', word)}" for word in words)
        named[f"{name}-{len(named) + 1}" if name in named else name] = picture
    return named


def chart(table: pd.DataFrame) -> Chart:
    """Return the interactive figure, with a panel for each split."""
    best = drawn(table)
    looks = legend.looks(best)
    groups = []
    for title, rows, x in settings(best):
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
    note = intervals.explain(charts.spreads(groups), "bars and bands", "sequences") + _ended(table, best)
    return Chart("Associative recall by number of pairs", sentence, groups, note)


def _ended(table: pd.DataFrame, rows: pd.DataFrame) -> str:
    """Count how training of the drawn models ended, where the table has it: not solved is not refuted. Add cautions."""
    if not {"cell", "status"} <= set(table):
        return ""
    solved = table[(table["metric"] == "solved") & table["cell"].isin(rows["cell"])]
    counts = solved.drop_duplicates("cell")["status"].value_counts()
    parts = [f"{counts[how]} {words}" for how, words in ENDS.items() if how in counts]
    ended = [f"Training ended: {', '.join(parts)}."] if parts else []
    return "".join(f" {sentence}" for sentence in [*ended, *mqrar.cautions(rows)])


def drawn(table: pd.DataFrame) -> pd.DataFrame:
    """Return the accuracies of each method at its best learning rate (`recall_accuracy`)."""
    table = recall_accuracy(table)
    if not (table["split"] == "all").any():
        raise NothingToDraw("there are no rows with metric 'accuracy' and split 'all' to draw")
    return table


def settings(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame, str]]:
    """Return title and rows of each setting and size and the column of its x; those with the most rows first."""
    grouped = [
        (title, part, x)
        for rows, x, always, others in _by_x(table)
        for title, part in style.panels(rows, always, others, within=[x], named=NAMED)
    ]
    return sorted(grouped, key=lambda setting: -len(setting[1]))


def pictures(table: pd.DataFrame) -> list[Picture]:
    """Return the settings, in each the sizes of models; those with the most rows first."""
    found = []
    for rows, x, always, others in _by_x(table):
        # each number of pairs has a panel where x is how old a value is
        panel = [name for name in always if name in ("model", "kv_pairs")]
        always, others = ([name for name in names if name not in (*panel, *SIZE)] for names in (always, others))
        for title, part in style.panels(rows, always, others, within=[x], named=NAMED):
            sizes = style.panels(part, panel, SIZE[1:])
            found.append(Picture(title, x, part, sorted(sizes, key=lambda size: int(size[1]["width"].iloc[0]))))
    return sorted(found, key=lambda picture: -len(picture.rows))


def _by_x(table: pd.DataFrame) -> Iterator[tuple[pd.DataFrame, str, list[str], list[str]]]:
    """Split rows by what their x is, number of pairs or age; yield rows, x, and the two kinds of `style.panels`."""
    always, others = [*MQRAR.always], [*recall_setting(table).others]
    by_age = table.groupby([*always, *others, "kv_pairs"], dropna=False)["n_back"].transform("nunique") > 1
    if len(rows := table[~by_age]):
        yield rows, "kv_pairs", always, [*others, "n_back"]
    if len(rows := table[by_age]):
        yield rows, "n_back", [*always, "kv_pairs"], others


def _figure(picture: Picture, looks: dict[Method, legend.Look], ended: str) -> Figure:
    methods = legend.methods(picture.rows, looks)
    figure, places, first = style.tiles(len(picture.panels), MOST)
    alone = len(picture.panels) == 1
    style.title(places[0], f"{picture.panels[0][0]}, {style.inside(picture.title)}" if alone else picture.title)
    spreads: list[pd.DataFrame] = []
    for (size, rows), axis in zip(picture.panels, places, strict=True):
        spreads += _lines(axis, rows[rows["split"] == "all"], methods, picture.x)
        style.label(axis, AXES[picture.x], "accuracy" if axis in first else "")
        if not alone:
            style.subtitle(axis, size)
            axis.tick_params(axis="x", labelrotation=45)
    values = sorted({size - size // 2 for size in picture.rows["vocab_size"]})
    chances = [Line2D([], [], label=f"chance, 1/{value}", **CHANCE) for value in values]
    note = intervals.explain(spreads, "bars", "sequences") + ended
    style.finish(figure, [*(look.handle() for look in methods.values()), *chances], note)
    return figure


def _lines(axis: Axes, rows: pd.DataFrame, looks: dict[Method, legend.Look], x: str) -> list[pd.DataFrame]:
    """Draw a line for each method, with bars, and the chance level; return their points."""
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
    for value in {size - size // 2 for size in rows["vocab_size"]}:
        axis.axhline(1 / value, label=f"chance, 1/{value}", **CHANCE)
    return spreads


def _dodge(index: int, count: int) -> float:
    """Spread `count` methods over four fifths of the unit around 0."""
    return 0.8 * ((index + 0.5) / count - 0.5)
