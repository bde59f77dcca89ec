"""Shared by all figures: panels and how rows are split into them, axes, bars and bands, titles, legends and notes."""

import math
import re
import textwrap
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from sbeval.plots.legend import Look
from sbeval.tables import epochs, intervals, mqrar, needle
from sbeval.tables.intervals import FEW
from sbeval.tables.rows import Identity, Method, Provenance, labels
from sbeval.tables.statistics import Scale, size

# titles name what the rows of a panel share; a column without a label appears as "name value"
LABELS = labels(Identity, Provenance, mqrar.Row, needle.Row)
# columns of numbers that titles write as `sizes` does
COUNTS = ("train_tokens", "finetune_tokens")
TEXT_PT, SMALL_PT = 8, 7
WIDTH_IN, ROW_IN = 7.2, 2.3
# lines of a legend for which `grid` leaves room, and the height of a further one
LEGEND_LINES, LINE_IN = 4, 0.17
MARK = "0.35"
TRAINED: dict[str, Any] = {"color": MARK, "linewidth": 1.0, "linestyle": (0, (2, 2))}


def leaving(labels: Collection[str]) -> str:
    """Name in a note the lines that leave their panels, if any."""
    return f" {', '.join(labels)} {'leaves' if len(labels) == 1 else 'leave'} the panels." if labels else ""


def with_caution(note: str, rows: pd.DataFrame, looks: dict[Method, Look]) -> str:
    """Add to a note which models of these rows overfit, or trained for too many epochs."""
    return " ".join(filter(None, [note, epochs.caution(rows, lambda method: looks[method].label)]))


def panels(
    table: pd.DataFrame,
    always: Sequence[str],
    others: Sequence[str],
    within: Sequence[str] = (),
    *,
    named: Sequence[str] = (),
) -> list[tuple[str, pd.DataFrame]]:
    """Split a table into the rows of each panel and its title.

    A column of `always` or `others` splits when it has several values for the same value of `within` or, if it is
    `named`, at all. Titles name the columns of `always`, and of `others` those that split and are `named` or needed to
    tell panels apart.
    """
    counts = anywhere = table[[*always, *others]].nunique()
    if within:
        counts = table.groupby(list(within))[[*always, *others]].nunique().max()
    split = [name for name in (*always, *others) if (anywhere if name in named else counts)[name] > 1]
    groups = [rows for _, rows in table.groupby(split, dropna=False)] if split else [table]
    named_columns = [*always, *(name for name in split if name in named and name not in always)]
    for name in others:
        apart = len(table[named_columns].drop_duplicates())
        if name in split and name not in named_columns and len(table[[*named_columns, name]].drop_duplicates()) > apart:
            named_columns.append(name)
    written = {name: sizes(table[name].unique()) for name in COUNTS if name in named_columns}
    return [(_title(rows, named_columns, written), rows) for rows in groups]


def pairs(rows: int, *, share_y: bool = False) -> tuple[Figure, list[tuple[Axes, Axes]]]:
    """Make a figure as wide as a page, with rows of two panels, and room for a legend above and a note below."""
    figure, axes = grid(rows, 2, share_y=share_y)
    figure.set_size_inches(WIDTH_IN, ROW_IN * rows + 0.7)
    return figure, [(left, right) for left, right in axes]


def grid(rows: int, columns: int, *, share_y: bool = True) -> tuple[Figure, list[list[Axes]]]:
    """Make a figure of rows and columns of panels, with room for legends above and a note below."""
    layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06, wspace=0.03, hspace=0.03)
    # three columns are as wide as a page
    figure = Figure(figsize=(WIDTH_IN * (1 + columns) / 4, ROW_IN * rows + 1.0), layout=layout)
    axes = figure.subplots(rows, columns, squeeze=False, sharey="row" if share_y else False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(True, color="0.9", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=TEXT_PT)
    return figure, [list(row) for row in axes]


def tiles(count: int, most: int) -> tuple[Figure, list[Axes], list[Axes]]:
    """Make a figure of so many panels, at most `most` in a row, with room for titles and legends of several lines.

    Return it, its panels, and those of them that begin a row.
    """
    columns = min(most, count)
    figure, axes = grid(math.ceil(count / columns), columns)
    width, height = figure.get_size_inches()
    figure.set_size_inches(max(width, WIDTH_IN * 3 / 4), height + 0.5)
    panels = [axis for row in axes for axis in row]
    for axis in panels[count:]:
        axis.set_axis_off()
    return figure, panels[:count], [row[0] for row in axes]


def label(axis: Axes, x: str, y: str) -> None:
    """Name both axes, with units."""
    axis.set_xlabel(x, fontsize=TEXT_PT)
    axis.set_ylabel(y, fontsize=TEXT_PT)


def title(axis: Axes, text: str, above: float = 16) -> None:
    """Write the title of a row of panels above its first, by so many points, wrapped to the width of the figure."""
    # about 15 bold letters fit an inch; the labels of the axes take one inch
    lines = textwrap.wrap(text, round(15 * (axis.figure.bbox.width / axis.figure.dpi - 1)))
    # reserves the height; the layout would move neighbouring panels apart for the text itself
    axis.set_title("\n".join(" " for _ in lines), loc="left", fontsize=TEXT_PT, pad=above)
    axis.annotate(
        "\n".join(lines),
        (0.0, 1.0),
        xycoords="axes fraction",
        xytext=(0, above),
        textcoords="offset points",
        fontsize=TEXT_PT,
        fontweight="bold",
        annotation_clip=False,
    ).set_in_layout(False)


def subtitle(axis: Axes, text: str) -> None:
    """Write the title of one panel of a row above it, in small print."""
    axis.annotate(
        text,
        (0.5, 1.0),
        xycoords="axes fraction",
        xytext=(0, 3),
        textcoords="offset points",
        ha="center",
        fontsize=SMALL_PT,
    )


def bars(axis: Axes, x: Any, points: pd.DataFrame, look: Look, width: float = 1.0) -> None:
    """Draw the intervals of points (see `intervals.points`) as vertical bars, and their seeds as dots."""
    axis.vlines(x, points["low"], points["high"], color=look.colour, linewidth=width)
    seeds(axis, x, points, look)


def seeds(axis: Axes, x: Any, points: pd.DataFrame, look: Look) -> None:
    """Draw each seed of points that have few as a dot."""
    few = [(at, value) for at, each in zip(x, points["each"], strict=True) if 1 < len(each) <= FEW for value in each]
    if few:
        at, values = zip(*few, strict=True)
        axis.scatter(at, values, s=5, color=look.colour, alpha=0.6, linewidths=0, zorder=2)


def bands(axis: Axes, rows: pd.DataFrame, looks: dict[Method, Look], scale: Scale = Scale.SHARE) -> list[pd.DataFrame]:
    """Draw a line of `value` by `x` and a band for each method; return their points."""
    points = intervals.points(rows, ["x"], scale)
    drawn = []
    for of, look in looks.items():
        mine = intervals.method(points, of)
        if mine.empty:
            continue
        axis.plot(mine["x"], mine["mean"], label=look.label, **look.line())
        axis.fill_between(mine["x"], mine["low"], mine["high"], color=look.colour, alpha=0.2, linewidth=0)
        seeds(axis, mine["x"], mine, look)
        drawn.append(mine)
    return drawn


def finish(figure: Figure, handles: Sequence[Any], note: str) -> None:
    """Put the legend above the panels, where it covers no data, and the note below them.

    The figure grows by the lines of a legend that it has no room for.
    """
    columns = _columns(handles, 4, figure.get_figwidth())
    longer = max(0, math.ceil(len(handles) / columns) - LEGEND_LINES)
    figure.set_figheight(figure.get_figheight() + LINE_IN * longer)
    figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=columns,
        fontsize=TEXT_PT,
        frameon=False,
        handlelength=3,
    )
    note_below(figure, note)


def _columns(handles: Sequence[Any], most: int, width_in: float) -> int:
    """Return how many columns of a legend, at most `most`, fit a width; entries fill one column after the other."""
    for columns in range(min(most, len(handles)), 1, -1):
        lines = math.ceil(len(handles) / columns)
        # inches of a handle and of a letter, roughly
        widths = [
            0.55 + 0.06 * max(len(handle.get_label()) for handle in handles[start : start + lines])
            for start in range(0, len(handles), lines)
        ]
        if sum(widths) <= width_in - 0.1:
            return len(widths)
    return 1


def note_below(figure: Figure, text: str) -> None:
    """Write a note below the panels."""
    # about 19 letters fit an inch
    lines = textwrap.fill(text, round(19 * figure.get_figwidth()))
    figure.supxlabel(lines, x=0.01, ha="left", fontsize=SMALL_PT, color=MARK)


def shares(axis: Axes) -> None:
    """Draw a y axis of shares from 0 to 1, with room for markers at both ends."""
    axis.set_ylim(-0.03, 1.03)


def octaves(axis: Axes, low: float, high: float, through: float, most: int = 8) -> None:
    """Make x logarithmic from `low` to `high`, with at most `most` labels at powers of two, one next to `through`."""
    first, last = math.ceil(math.log2(low)), math.floor(math.log2(high))
    step = max(1, math.ceil((last - first + 1) / most))
    start = first + (round(math.log2(through)) - first) % step
    ticks(axis, [2.0**exponent for exponent in range(start, last + 1, step)])
    axis.set_xlim(low / 1.2, high * 1.2)


def ticks(axis: Axes, values: Sequence[float]) -> None:
    """Make x logarithmic to base 2 with labels at exactly these values."""
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(FixedLocator(list(values)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_locator(NullLocator())


def decades(axis: Axes) -> None:
    """Make y logarithmic, with plain numbers as labels."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def counts(axis: Axes) -> None:
    """Make x logarithmic, with large numbers such as 20 M as labels."""
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axis.xaxis.set_minor_formatter(NullFormatter())


def training_length(axis: Axes, length: int) -> None:
    """Mark the training length by a vertical line."""
    axis.axvline(length, zorder=1, **TRAINED)


def training_length_handle() -> Line2D:
    """Return the entry of `training_length` for a legend."""
    return Line2D([], [], label="training length", **TRAINED)


def inside(text: str) -> str:
    """Return a title as it goes on within another."""
    return text[:1].lower() + text[1:]


def sizes(values: Iterable[float]) -> dict[float, str]:
    """Write numbers short (`statistics.size`), and in full those that would look the same."""
    short = {value: size(value) for value in values}
    common = Counter(short.values())
    return {value: f"{value:,.0f}" if common[text] > 1 else text for value, text in short.items()}


def _title(rows: pd.DataFrame, names: Sequence[str], written: Mapping[str, Mapping[float, str]]) -> str:
    """Name what rows share. written: the words for the values of some columns."""
    single = {name: rows[name].iloc[0] for name in names if rows[name].nunique() == 1 and str(rows[name].iloc[0])}
    words = ", ".join(
        LABELS.get(name, f"{name.replace('_', ' ')} {{}}").format(written.get(name, {}).get(value, value))
        for name, value in single.items()
    )
    words = re.sub(r"\b1 (head|layer)s", r"1 \1", words)
    return words[:1].upper() + words[1:]
