"""When a method learns to retrieve: diagnostics by the tokens that models have seen, and at the end by distance.

Two rows of panels a setting: over training, and at its end.
"""

from dataclasses import dataclass

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sbeval.errors import InputError
from sbeval.plots import chart as charts
from sbeval.plots import legend, style
from sbeval.plots.chart import Chart, Group, Lines
from sbeval.tables import curves, intervals
from sbeval.tables.rows import Method
from sbeval.tables.selection import RECIPE
from sbeval.tables.statistics import Scale
from sbeval.tables.table import numbers

TABLE = "diagnostics"
ALWAYS = ("model", "train_len", "corpus")
OTHERS = ("task", "tokenizer", "preset", "train_tokens", "dtype", *RECIPE)
FACTORS = ("tokens_seen", "distance", "layer", "heads")
COLUMNS = ("attention", "options", "seed", "metric", "value", "stderr", *ALWAYS, *OTHERS, *FACTORS)
SEEN, DISTANCE = "training tokens (millions)", "distance (tokens)"


@dataclass(frozen=True, slots=True)
class View:
    """A panel: a metric by tokens seen, or at the end by distance. distance: by tokens seen, the longest one up to this
    that there is, named in the title."""

    title: str
    y: str
    metric: str
    heads: str = ""
    distance: int | None = None
    by_distance: bool = False

    @property
    def x(self) -> str:
        return DISTANCE if self.by_distance else SEEN

    def named(self, rows: pd.DataFrame) -> str:
        """Return the title, with the distance of the rows."""
        return self.title if self.distance is None else self.title.format(int(rows["distance"].iloc[0]))

    def rows(self, table: pd.DataFrame) -> pd.DataFrame:
        """Return the rows to draw, with their `x`: tokens seen are those of all seeds (`curves.at_same_tokens`)."""
        mine = table[(table["metric"] == self.metric) & (table["heads"] == self.heads) & table["layer"].isna()]
        if self.by_distance:
            mine = mine[
                mine["tokens_seen"] == mine.groupby(["attention", "options", "seed"])["tokens_seen"].transform("max")
            ]
            return mine.assign(x=mine["distance"])
        if self.distance is not None:
            mine = mine[mine["distance"] == mine["distance"].where(mine["distance"] <= self.distance).max()]
        # a model whose training is not known has no place on this axis
        mine = mine[mine["tokens_seen"] > 0]
        return curves.at_same_tokens(mine.assign(x=mine["tokens_seen"] / 1e6))


OVER_TRAINING = (
    View("copy of {} random tokens", "gain (nats per token)", "copy_gain", distance=256),
    View("best induction head", "prefix matching", "prefix_matching", heads="highest"),
    View("loss at 500 − loss at 50", "nats per token", "in_context_score"),
    View("weight past {} keys", "mean of heads", "weight_beyond", heads="mean", distance=64),
)
AT_END = (
    View("copy of random tokens", "gain (nats per token)", "copy_gain", by_distance=True),
    View("copy of 64 tokens of text", "gain (nats per token)", "passage_gain", by_distance=True),
    View("weight past k keys", "mean of heads", "weight_beyond", heads="mean", by_distance=True),
    View("weight past k keys", "farthest head", "weight_beyond", heads="highest", by_distance=True),
)


def draw(table: pd.DataFrame) -> Figure:
    """Draw each metric by the tokens seen, and below, for the end of training, by distance."""
    table = _plotted(table)
    looks, settings = legend.looks(table), style.panels(table, ALWAYS, OTHERS)
    figure, axes = style.grid(2 * len(settings), len(OVER_TRAINING), share_y=False)
    spreads: list[pd.DataFrame] = []
    for index, (title, rows) in enumerate(settings):
        style.title(axes[2 * index][0], title)
        for line, views in zip(axes[2 * index : 2 * index + 2], (OVER_TRAINING, AT_END), strict=True):
            for axis, view in zip(line, views, strict=True):
                spreads += _lines(axis, view, rows, looks)
    note = intervals.explain(spreads, "bands", "rows of tokens")
    style.finish(figure, [look.handle() for look in looks.values()], style.with_caution(note, table, looks))
    return figure


def chart(table: pd.DataFrame) -> Chart:
    """Return the interactive figure."""
    table = _plotted(table)
    looks = legend.looks(table)
    groups = [
        Group(
            f"{title}: {when}",
            [
                Lines(title=view.named(mine), x=view.x, y=view.y, lines=charts.lines(mine, looks))
                for view in views
                if len(mine := view.rows(rows))
            ],
        )
        for title, rows in style.panels(table, ALWAYS, OTHERS)
        for when, views in (("over training", OVER_TRAINING), ("at its end", AT_END))
    ]
    sentence = (
        "What a model saves, in nats per token, on tokens that it has read before, how much weight its best head puts "
        "on what followed the same token, how much text of 500 tokens helps, and how far heads reach."
    )
    note = intervals.explain(charts.spreads(groups), "bands", "rows of tokens")
    return Chart("Learning to retrieve", sentence, groups, style.with_caution(note, table, looks))


def _plotted(table: pd.DataFrame) -> pd.DataFrame:
    metrics = [view.metric for view in (*OVER_TRAINING, *AT_END)]
    table = table[table["metric"].isin(metrics)]
    if table.empty:
        raise InputError(f"there are no rows with one of the metrics {', '.join(dict.fromkeys(metrics))} to draw")
    # a blank column is read as text
    blank = {name: pd.to_numeric(table[name], errors="coerce") for name in ("distance", "layer")}
    return numbers(table.assign(heads=table["heads"].fillna(""), **blank), ["tokens_seen", "train_len"])


def _lines(axis: Axes, view: View, table: pd.DataFrame, looks: dict[Method, legend.Look]) -> list[pd.DataFrame]:
    """Draw a line and a band for each method; an empty panel is hidden."""
    rows = view.rows(table)
    if rows.empty:
        axis.set_axis_off()
        return []
    spreads = style.bands(axis, rows, looks, Scale.LINEAR)
    style.subtitle(axis, view.named(rows))
    style.label(axis, view.x, view.y)
    if view.by_distance:
        style.octaves(axis, rows["x"].min(), rows["x"].max(), rows["x"].min(), most=4)
    else:
        axis.set_xlim(left=0)
    return spreads
