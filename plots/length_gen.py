"""Length generalisation, as in figure 5 of arXiv 2410.17980: perplexity by context length.

One row of panels a model, training length and corpus. Columns: attention schemes; RoPE scaled at evaluation by several
factors; sliding windows. The last two show plain RoPE and stick-breaking too, which they are compared with. A column
that no row of the table belongs to is left out.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sbeval.plots import chart as charts
from sbeval.plots import style
from sbeval.plots.chart import Chart, Group, Lines
from sbeval.tables import statistics
from sbeval.tables.selection import LENGTH_GEN, by_context
from sbeval.tables.statistics import Method

TABLE = "length_gen"
COLUMNS = ("attention", "options", "seed", "metric", "value", "stderr", *LENGTH_GEN.columns, "context_length")
# perplexities further apart than this are drawn on a logarithmic axis, and no panel shows more than this many times
# what the best method has in the end: one that is lost would flatten all others
WIDE, SHOWN = 4, 8
# a line with more points than this has markers on some of them
MARKED = 12
# of the options of sliding_window, which the table leaves out at its default
WINDOW = 512
SCALINGS = {"linear": "linear", "ntk": "NTK", "dynamic_ntk": "dynamic NTK", "yarn": "YaRN", "llama3": "Llama 3"}
REFERENCES = (("stick_breaking", ""), ("rope", ""))


@dataclass(frozen=True, slots=True)
class Column:
    """Methods that share a column of panels; `beside` are shown for comparison."""

    title: str
    own: dict[Method, style.Look]
    beside: dict[Method, style.Look]

    @property
    def looks(self) -> dict[Method, style.Look]:
        """All of them, in the order of the legend."""
        return self.beside | self.own


@dataclass(frozen=True, slots=True)
class Scale:
    """What axes are called. `wide` says of the lowest and the highest value of a row of panels whether y is
    logarithmic, `ceiling` of the lowest that a method has in the end up to where it goes."""

    x: str
    y: str
    wide: Callable[[float, float], bool]
    ceiling: Callable[[float], float]

    def top(self, rows: pd.DataFrame) -> float:
        """The highest value that is shown of a row of panels; infinite where none is left out."""
        top = self.ceiling(float(rows.loc[rows["x"] == rows["x"].max(), "value"].min()))
        return top if rows["value"].max() > top else math.inf

    def decades(self, rows: pd.DataFrame) -> bool:
        return self.wide(rows["value"].min(), min(self.top(rows), rows["value"].max()))


SCALE = Scale(
    "context length (tokens)", "perplexity (per token)", lambda low, high: high > WIDE * low, lambda best: SHOWN * best
)


def draw(table: pd.DataFrame) -> Figure:
    """Draw P(l), the perplexity over the first l tokens of a document, by l."""
    return panels(by_context(table), SCALE)


def chart(table: pd.DataFrame) -> Chart:
    """The same, to hover over."""
    groups = panel_groups(by_context(table), SCALE)
    sentence = (
        "Perplexity per token over the first l tokens of unseen documents, by l: does a method still predict past the "
        "length it was trained at? Lower is better."
    )
    return Chart("Perplexity by context length", sentence, groups, explained(groups, table))


def panels(table: pd.DataFrame, scale: Scale) -> Figure:
    """Draw lines of `value` by `x`, a method each, in rows and columns of panels; `end` is the last token of a point.

    A line that leaves its panel is named below.
    """
    columns = groups(table)
    rows = style.panels(table, LENGTH_GEN.always, LENGTH_GEN.others)
    figure, axes = style.grid(len(rows), len(columns))
    spreads: list[pd.DataFrame] = []
    beyond: dict[str, None] = {}
    for (title, of_row), line in zip(rows, axes, strict=True):
        style.title(line[0], title)
        top = scale.top(of_row)
        for axis, column in zip(line, columns, strict=True):
            drawn = _lines(axis, of_row, column)
            spreads += drawn.values()
            beyond |= {column.looks[name].label: None for name, found in drawn.items() if found["high"].max() > top}
            if axis.axison and scale.decades(of_row):
                style.decades(axis)
        if top < math.inf:
            line[0].set_ylim(top=top)
        for axis in line:
            style.label(axis, scale.x if line is axes[-1] else "", scale.y if axis is line[0] else "")
    for axis, column in zip(axes[0], columns, strict=True):
        style.column(axis, column.title, [look.handle() for look in column.looks.values()], axes[0][0])
    cut = f" {', '.join(beyond)} {'leaves' if len(beyond) == 1 else 'leave'} the panels." if beyond else ""
    said = statistics.explain(spreads, "bands", "documents") + cut
    style.note_below(figure, style.with_caution(said, table, _names(columns)))
    return figure


def panel_groups(table: pd.DataFrame, scale: Scale) -> list[Group]:
    """What `panels` draws, to hover over: a group for each panel, which has a legend of its own."""
    columns = groups(table)
    found = []
    for title, rows in style.panels(table, LENGTH_GEN.always, LENGTH_GEN.others):
        for column in columns:
            lines = charts.lines(rows, column.looks)
            if not {line.look.label for line in lines} & {look.label for look in column.own.values()}:
                continue
            marks = [int(rows["train_len"].iloc[0])]
            panel = Lines(
                title=column.title,
                x=scale.x,
                y=scale.y,
                lines=lines,
                decades=scale.decades(rows),
                marks=marks,
                top=scale.top(rows),
            )
            found.append(Group(title, [panel]))
    return found


def explained(found: list[Group], table: pd.DataFrame) -> str:
    """What the bands of these panels are, and what to know of the models."""
    said = statistics.explain(charts.spreads(found), "bands", "documents")
    return style.with_caution(said, table, _names(groups(table)))


def _names(columns: list[Column]) -> dict[Method, style.Look]:
    """The look of each method, its own before that beside others."""
    return {method: look for column in columns for method, look in column.looks.items()}


def groups(table: pd.DataFrame) -> list[Column]:
    """The columns to draw, and how each method of the table looks in them."""
    pairs = {(str(row.attention), str(row.options)): None for row in table[["attention", "options"]].itertuples()}
    scaled = {pair: _by_factor(pair[1]) for pair in pairs if pair[0] == "rope" and "scaling" in _settings(pair[1])}
    windowed = {pair: _by_window(pair[1]) for pair in pairs if pair[0] == "sliding_window"}
    schemes = style.looks_of(pair for pair in pairs if pair not in scaled and pair not in windowed)
    beside = {pair: schemes[pair] for pair in REFERENCES if pair in schemes}
    columns = [
        Column("attention schemes", schemes, {}),
        Column("RoPE scaled at evaluation", _shades(scaled), beside),
        Column("sliding windows", _shades(windowed), beside),
    ]
    return [column for column in columns if column.own]


def _settings(options: str) -> dict[str, str]:
    return dict(item.split("=", 1) for item in options.split(",") if "=" in item)


def _by_factor(options: str) -> tuple[str, float, str]:
    """Where a scaling stands in the order, and what it is called."""
    settings = _settings(options)
    kind, factor = settings.pop("scaling"), float(settings.pop("factor", 1))
    settings.pop("train_len", None)
    return kind, factor, ", ".join([SCALINGS.get(kind, kind), f"f = {factor:g}", *_rest(settings)])


def _by_window(options: str) -> tuple[str, float, str]:
    settings = _settings(options)
    window = int(settings.pop("window", WINDOW))
    return "", window, ", ".join([f"W = {window}", *_rest(settings)])


def _rest(settings: dict[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in settings.items()]


def _shades(ranks: dict[Method, tuple[str, float, str]]) -> dict[Method, style.Look]:
    """Looks of methods that have an order: from dark to light, each with its own marker and dashes."""
    colours = sns.color_palette("viridis", len(ranks)).as_hex()
    return {
        pair: style.Look(
            label=ranks[pair][2],
            colour=colour,
            marker=style.MARKERS[place % len(style.MARKERS)],
            dashes=style.DASHES[place % len(style.DASHES)],
        )
        # the first two looks are those of what stands beside
        for place, (pair, colour) in enumerate(zip(sorted(ranks, key=ranks.__getitem__), colours, strict=True), start=2)
    }


def _lines(axis: Axes, rows: pd.DataFrame, column: Column) -> dict[Method, pd.DataFrame]:
    """Draw a line and a band for each method; a panel without rows of its own stays out. Returns their spreads."""
    lines = {method: found for method in column.looks if len(found := statistics.method(rows, method))}
    if not lines.keys() & column.own.keys():
        axis.set_axis_off()
        return {}
    train_len = int(rows["train_len"].iloc[0])
    spreads = {}
    for place, (method, found) in enumerate(lines.items()):
        spread, look = statistics.spread(found, ["x"]), column.looks[method]
        # of many points every few have a marker, not where another method has its own
        every = math.ceil(len(spread) / MARKED) or 1
        marked = (place * every // len(lines), every)
        axis.plot(spread["x"], spread["mean"], label=look.label, markevery=marked, **look.line())
        axis.fill_between(spread["x"], spread["low"], spread["high"], color=look.colour, alpha=0.2, linewidth=0)
        spreads[method] = spread
    style.octaves(axis, min(rows["x"].min(), train_len), max(rows["end"].max(), train_len), train_len, most=6)
    style.training_length(axis, train_len)
    return spreads
