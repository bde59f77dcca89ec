"""Learning curves of recall: validation accuracy by step of training, a panel for each number of key-value pairs.

Models that solve a task in the end differ in how soon they do, which accuracies at the end do not show. A faint line is
a seed, which ends where its training ended; the line of a method is the mean over seeds, of which those that have ended
keep their last accuracy. Settings and rates are those of `mqrar`.
"""

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sbeval.errors import NothingToDraw
from sbeval.plots import chart as charts
from sbeval.plots import legend, mqrar, style
from sbeval.plots.chart import Chart, Group, Lines
from sbeval.tables import curves, intervals
from sbeval.tables.results import Results
from sbeval.tables.rows import Method

TABLE, COLUMNS = mqrar.TABLE, (*mqrar.COLUMNS, "cell")
METRIC = "validation_accuracy"
X, Y = "steps of training", "validation accuracy"
# numbers of pairs in a row
MOST = 3


def gather(table: pd.DataFrame, results_dir: Path) -> pd.DataFrame:
    """Return the rows that `mqrar` draws, each as often as its model was validated, with `step` and `score`."""
    try:
        rows = mqrar.drawn(table)
    except NothingToDraw:
        return pd.DataFrame(columns=[*table.columns, "step", "score"])
    rows = rows[rows["split"] == "all"]
    read = curves.read(Results(results_dir), rows["cell"])
    scores = read[read["metric"] == METRIC].rename(columns={"value": "score"})
    return rows.merge(scores[["cell", "step", "score"]], on="cell")


def has_rows(rows: pd.DataFrame) -> bool:
    """Return whether several methods have such curves: one compares to nothing."""
    return rows.groupby(["attention", "options"]).ngroups > 1


def draw(rows: pd.DataFrame) -> Figure:
    """Draw the setting with the most models."""
    return figures(rows)[""]


def figures(rows: pd.DataFrame) -> dict[str, Figure]:
    """Draw each setting, by the words that tell it from the first."""
    return {name: _figure(picture, legend.looks(rows)) for name, picture in mqrar.by_name(_pictures(rows)).items()}


def chart(rows: pd.DataFrame) -> Chart:
    """Return the interactive figure."""
    looks, groups = legend.looks(rows), []
    for picture in _pictures(rows):
        panels = [
            Lines(title=title, x=X, y=Y, lines=charts.bare(_means(part), looks), octaves=False)
            for title, part in _panels(picture)
        ]
        groups.append(Group(picture.title, panels))
    sentence = "Share of validation queries that are answered, by step of training: how soon a method learns to recall."
    return Chart("Learning curves of recall", sentence, groups, _note(rows))


def _pictures(rows: pd.DataFrame) -> list[mqrar.Picture]:
    if rows.empty:
        raise NothingToDraw("the models of these rows have no validation accuracies during training")
    return mqrar.pictures(rows)


def _panels(picture: mqrar.Picture) -> list[tuple[str, pd.DataFrame]]:
    """Return the rows of each size of model and number of pairs (or age), with a title."""
    return [
        (", ".join(filter(None, [size if len(picture.panels) > 1 else "", f"{at} {mqrar.COUNTED[picture.x]}"])), part)
        for size, rows in picture.panels
        for at, part in rows.groupby(picture.x)
    ]


def _means(rows: pd.DataFrame) -> dict[Method, "pd.Series[float]"]:
    """Return the mean accuracy of each method's seeds by step; a seed that has ended keeps its last."""
    return {
        # until the last of the method's seeds has ended
        (str(name), str(options)): mine.pivot_table("score", "step", "cell").ffill().mean(axis=1)
        for (name, options), mine in rows.groupby(["attention", "options"])
    }


def _figure(picture: mqrar.Picture, looks: dict[Method, legend.Look]) -> Figure:
    panels, methods = _panels(picture), legend.methods(picture.rows, looks)
    figure, places, first = style.tiles(len(panels), MOST)
    size = f"{picture.panels[0][0]}, " if len(picture.panels) == 1 else ""
    alone = f"{panels[0][0]}, " if len(panels) == 1 else ""
    style.title(places[0], f"{size}{alone}{style.inside(picture.title) if size else picture.title}")
    for (title, rows), axis in zip(panels, places, strict=True):
        _lines(axis, rows, methods)
        style.label(axis, X, Y if axis in first else "")
        if len(panels) > 1:
            style.subtitle(axis, title)
    style.finish(figure, [look.handle() for look in methods.values()], _note(picture.rows))
    return figure


def _lines(axis: Axes, rows: pd.DataFrame, looks: dict[Method, legend.Look]) -> None:
    means = _means(rows)
    for method, look in looks.items():
        if method not in means:
            continue
        for _, seed in intervals.method(rows, method).groupby("cell"):
            axis.plot(seed["step"], seed["score"], color=look.colour, alpha=0.35, linewidth=0.8)
        mean = means[method]
        axis.plot(mean.index, mean, label=look.label, markevery=max(1, len(mean) // 12), **look.line())
    axis.set_xlim(left=0)
    style.shares(axis)


def _note(rows: pd.DataFrame) -> str:
    count = intervals.most_seeds(rows)
    return "One seed." if count == 1 else f"Means of up to {count} seeds; faint: seeds, each until its training ended."
