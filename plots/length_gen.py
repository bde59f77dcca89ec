"""Length generalisation, as in figure 5 of arXiv 2410.17980: perplexity by context length.

One row of panels a model, training length and corpus. Columns: attention schemes; RoPE scaled at evaluation by several
factors; sliding windows. The last two show plain RoPE and stick-breaking too, for comparison. A column
without rows is left out. All share one legend.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sbeval.plots import chart as charts
from sbeval.plots import legend, style
from sbeval.plots.chart import Chart, Group, Lines
from sbeval.tables import intervals, statistics
from sbeval.tables.rows import ROPE, STICK, Method
from sbeval.tables.selection import LENGTH_GEN, by_context, length_gen_setting

TABLE = "length_gen"
# settings in a row of panels, where methods are in one column
ABREAST = 3
COLUMNS = ("attention", "options", "seed", "metric", "value", "stderr", *LENGTH_GEN.columns, "context_length")
# perplexities that differ by more than this factor are drawn on a logarithmic axis, and panels end at this multiple of
# the best method's last value: one that diverges would flatten all others
WIDE, SHOWN = 4, 12
# a line with more points than this has markers on some of them only
MARKED = 12
SCALINGS = {"linear": "linear", "ntk": "NTK", "dynamic_ntk": "dynamic NTK", "yarn": "YaRN", "llama3": "Llama 3"}
REFERENCES = (STICK, ROPE)


@dataclass(frozen=True, slots=True)
class Column:
    """Methods that share a column of panels; `beside` are shown for comparison."""

    title: str
    own: dict[Method, legend.Look]
    beside: dict[Method, legend.Look]

    @property
    def looks(self) -> dict[Method, legend.Look]:
        """Return all methods, in the order of the legend."""
        return self.beside | self.own


@dataclass(frozen=True, slots=True)
class Scale:
    """Labels and scale of axes.

    wide: from the lowest and highest value of a row of panels, whether y is logarithmic. ceiling: from the lowest last
    value of any method, where y ends.
    """

    x: str
    y: str
    values: statistics.Scale
    wide: Callable[[float, float], bool]
    ceiling: Callable[[float], float]

    def top(self, rows: pd.DataFrame) -> float:
        """Return where y of a row of panels ends; infinite where no value is higher."""
        top = self.ceiling(float(rows.loc[rows["x"] == rows["x"].max(), "value"].min()))
        return top if rows["value"].max() > top else math.inf

    def decades(self, rows: pd.DataFrame) -> bool:
        return self.wide(rows["value"].min(), min(self.top(rows), rows["value"].max()))


SCALE = Scale(
    "context length (tokens)",
    "perplexity (per token)",
    statistics.Scale.LOG,
    lambda low, high: high > WIDE * low,
    lambda best: SHOWN * best,
)


def draw(table: pd.DataFrame) -> Figure:
    """Draw P(l), the perplexity over the first l tokens of a document, by l."""
    return panels(by_context(table), SCALE)


def chart(table: pd.DataFrame) -> Chart:
    """Return the interactive figure."""
    groups = panel_groups(by_context(table), SCALE)
    sentence = (
        "Perplexity per token over the first l tokens of unseen documents, by l: does a method still predict past the "
        "length it was trained at? Lower is better."
    )
    return Chart("Perplexity by context length", sentence, groups, explained(groups, table))


def panels(table: pd.DataFrame, scale: Scale) -> Figure:
    """Draw lines of `value` by `x`, a method each, in rows and columns of panels; `end` is the last token of a point.

    A row is a setting. Where there is one column, ABREAST settings are in a row. A line that leaves its panel is named
    below; its band ends where it does.
    """
    columns = groups(table)
    rows = _rows(table)
    figure, axes, lines_of_axes = _grid([title for title, _ in rows], len(columns))
    spreads: list[pd.DataFrame] = []
    beyond: dict[str, None] = {}
    for (_, of_row), line in zip(rows, lines_of_axes, strict=True):
        top = scale.top(of_row)
        points = intervals.points(of_row, ["x"], scale.values)
        for axis, column in zip(line, columns, strict=True):
            lines = _lines(axis, of_row, points, column, top)
            if lines and len(columns) > 1:
                style.subtitle(axis, column.title)
            spreads += lines.values()
            beyond |= {column.looks[name].label: None for name, spread in lines.items() if spread["mean"].max() > top}
            if axis.axison and scale.decades(of_row):
                style.decades(axis)
        if top < math.inf:
            line[0].set_ylim(0.98 * _lowest(points, top), top)
        style.label(line[0], "", scale.y if any(line[0] is row[0] for row in axes) else "")
    for below in zip(*axes, strict=True):
        next(axis for axis in reversed(below) if axis.axison).set_xlabel(scale.x, fontsize=style.TEXT_PT)
    note = intervals.explain(spreads, "bands", "documents") + style.leaving(beyond)
    looks = _names(columns)
    handles = [*(look.handle() for look in looks.values()), style.training_length_handle()]
    style.finish(figure, handles, style.with_caution(note, table, looks))
    return figure


def _grid(titles: list[str], columns: int) -> tuple[Figure, list[list[Axes]], list[list[Axes]]]:
    """Make a figure with these titles; return it, its rows of panels, and the panels of each title."""
    words = [title.split(", ") for title in titles]
    shared = [word for word in words[0] if all(word in other for other in words)]
    rests = [", ".join(word for word in each if word not in shared) for each in words]
    if columns > 1 or len(titles) <= ABREAST or not shared or not all(rests):
        figure, axes = style.grid(len(titles), columns)
        for title, line in zip(titles, axes, strict=True):
            style.title(line[0], title)
        return figure, axes, axes
    figure, axes = style.grid(math.ceil(len(titles) / ABREAST), ABREAST, share_y=False)
    panels = [axis for row in axes for axis in row]
    style.title(panels[0], ", ".join(shared))
    for rest, axis in zip(rests, panels, strict=False):
        style.subtitle(axis, rest)
    for axis in panels[len(titles) :]:
        axis.set_axis_off()
    return figure, axes, [[axis] for axis in panels[: len(titles)]]


def _lowest(points: pd.DataFrame, top: float) -> float:
    """Return the lowest end of a band; of a method that leaves the panel at `top`, the lowest mean."""
    inside = points.groupby(["attention", "options"])["high"].transform("max") <= top
    return float(points["low"].where(inside, points["mean"]).min())


def panel_groups(table: pd.DataFrame, scale: Scale) -> list[Group]:
    """Return what `panels` draws as interactive panels: a group for each, with a legend of its own."""
    columns = groups(table)
    drawn = []
    for title, rows in _rows(table):
        for column in columns:
            lines = charts.lines(rows, column.looks, scale=scale.values)
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
            drawn.append(Group(title, [panel]))
    return drawn


def _rows(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Return title and rows of each row of panels."""
    setting = length_gen_setting(table)
    return style.panels(table, setting.always, setting.others)


def explained(drawn: list[Group], table: pd.DataFrame) -> str:
    """Explain the bands of these panels, and name the models that overfit."""
    note = intervals.explain(charts.spreads(drawn), "bands", "documents")
    return style.with_caution(note, table, _names(groups(table)))


def _names(columns: list[Column]) -> dict[Method, legend.Look]:
    """Return the look of each method, its own before that beside others."""
    return {method: look for column in columns for method, look in column.looks.items()}


def groups(table: pd.DataFrame) -> list[Column]:
    """Return the columns to draw, with the look of each method in them."""
    pairs = intervals.methods(table)
    scaled = {pair: _by_factor(pair[1]) for pair in pairs if pair[0] == "rope" and "scaling" in _settings(pair[1])}
    windowed = {pair: _by_window(pair[1]) for pair in pairs if pair[0] == "sliding_window"}
    schemes = legend.looks_of(pair for pair in pairs if pair not in scaled and pair not in windowed)
    beside = {pair: schemes[pair] for pair in REFERENCES if pair in schemes}
    columns = [
        Column("attention schemes", schemes, {}),
        Column("RoPE scaled at evaluation", _shades(scaled, "viridis"), beside),
        Column("sliding windows", _shades(windowed, f"dark:{legend.colour('sliding_window')}"), beside),
    ]
    return [column for column in columns if column.own]


def _settings(options: str) -> dict[str, str]:
    return dict(item.split("=", 1) for item in options.split(",") if "=" in item)


def _by_factor(options: str) -> tuple[str, float, str]:
    """Return the kind and factor of a scaling, by which it is sorted, and its label."""
    settings = _settings(options)
    kind, factor = settings.pop("scaling"), float(settings.pop("factor", 1))
    settings.pop("train_len", None)
    return kind, factor, ", ".join([SCALINGS.get(kind, kind), f"f = {factor:g}", *_rest(settings)])


def _by_window(options: str) -> tuple[str, float, str]:
    settings = _settings(options)
    window = int(settings.pop("window", legend.WINDOW))
    return "", window, ", ".join([f"sliding window of {window}", *_rest(settings)])


def _rest(settings: dict[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in settings.items()]


def _shades(ranks: dict[Method, tuple[str, float, str]], palette: str) -> dict[Method, legend.Look]:
    """Return looks of methods that have an order: from dark to light, each with its own marker and dashes."""
    # the darkest of some palettes is black
    colours = sns.color_palette(palette, len(ranks) + 1).as_hex()[1:]
    return {
        pair: legend.Look(
            label=ranks[pair][2],
            colour=colour,
            marker=legend.MARKERS[index % len(legend.MARKERS)],
            dashes=legend.DASHES[index % len(legend.DASHES)],
        )
        # the first two looks are those of the methods for comparison
        for index, (pair, colour) in enumerate(zip(sorted(ranks, key=ranks.__getitem__), colours, strict=True), start=2)
    }


def _lines(
    axis: Axes, rows: pd.DataFrame, points: pd.DataFrame, column: Column, top: float
) -> dict[Method, pd.DataFrame]:
    """Draw a line and a band for each method and return their points; hide a panel without rows of its own.

    The band of a line that leaves the panel at `top` would fill it, so it ends before its upper end does.
    """
    lines = {method: mine for method in column.looks if len(mine := intervals.method(points, method))}
    if not lines.keys() & column.own.keys():
        axis.set_axis_off()
        return {}
    train_len = int(rows["train_len"].iloc[0])
    for index, (method, spread) in enumerate(lines.items()):
        look = column.looks[method]
        # markers and seeds on some of many points only, at other points for each method
        every = math.ceil(len(spread) / MARKED) or 1
        marked = (index * every // len(lines), every)
        axis.plot(spread["x"], spread["mean"], label=look.label, markevery=marked, **look.line())
        band = spread[(spread["high"] <= top) | (spread["mean"].max() <= top)]
        axis.fill_between(band["x"], band["low"], band["high"], color=look.colour, alpha=0.2, linewidth=0)
        style.seeds(axis, spread["x"][marked[0] :: every], spread[marked[0] :: every], look)
    style.octaves(axis, min(rows["x"].min(), train_len), max(rows["end"].max(), train_len), train_len, most=6)
    style.training_length(axis, train_len)
    return lines
