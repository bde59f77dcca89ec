"""Flip-flop language: error rates by test set and method, beside published ones."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from sbeval.plots import chart as charts
from sbeval.plots import legend, style
from sbeval.plots.chart import Chart, Group, Line, Lines
from sbeval.tables import intervals
from sbeval.tables.published import FLIP_FLOP as PUBLISHED_RATES
from sbeval.tables.published import FLIP_FLOP_SOURCE
from sbeval.tables.rows import Method
from sbeval.tables.selection import FLIP_FLOP, flip_flop_errors
from sbeval.tables.statistics import Scale
from sbeval.tables.table import numbers

TABLE = "flip_flop"
COLUMNS = (
    "attention",
    "options",
    "seed",
    "metric",
    "value",
    "stderr",
    "lr",
    "test",
    "p_ignore",
    "reads",
    "distance_start",
    "distance_end",
    *FLIP_FLOP.columns,
)
TESTS = {"in_distribution": "in distribution", "sparse": "sparse", "dense": "dense"}
# the axis is linear below, so that an error rate of 0 can be drawn
LINEAR = 1e-6
X, Y = "instructions since the write (sparse test)", "error rate (share of reads)"
PUBLISHED: dict[str, Any] = {"marker": "*", "markersize": 9, "linestyle": "none", "markeredgecolor": "black"}
PUBLISHED_LABEL = f"published at 512 tokens ({FLIP_FLOP_SOURCE})"


def draw(table: pd.DataFrame) -> Figure:
    """Draw a row for each setting. Left: error rate by test set. Right: in the sparse test by distance to the write."""
    best = flip_flop_errors(numbers(table, ["lr", "seq_len"]))
    looks = legend.looks(best)
    finest = _finest(table, best)
    panels = style.panels(best, FLIP_FLOP.always, FLIP_FLOP.others)
    figure, axes = style.pairs(len(panels), share_y=True)
    spreads = []
    for (title, rows), (left, right) in zip(panels, axes, strict=True):
        style.title(left, title)
        spreads += _tests(left, rows, looks)
        spreads += _distances(right, _of_setting(finest, rows), looks)
        _log(left, max(rows["value"].max(), max(max(rates.values()) for rates in PUBLISHED_RATES.values())))
    star = Line2D([], [], label=PUBLISHED_LABEL, color="0.7", **PUBLISHED)
    style.finish(
        figure, [*(look.handle() for look in looks.values()), star], intervals.explain(spreads, "bars", "sequences")
    )
    return figure


def chart(table: pd.DataFrame) -> Chart:
    """Return the interactive figure."""
    best = flip_flop_errors(numbers(table, ["lr", "seq_len"]))
    looks = legend.looks(best)
    finest = _finest(table, best)
    groups: list[Group] = []
    spreads: list[pd.DataFrame] = []
    for title, rows in style.panels(best, FLIP_FLOP.always, FLIP_FLOP.others):
        lines = charts.lines(rows.assign(test=rows["test"].map(TESTS)), looks, by="test", scale=Scale.SHARE)
        both, names = lines + _published(looks), list(TESTS.values())
        panels = [Lines(title="by test set", x="test set", y=Y, lines=both, names=names, decades=True, floor=LINEAR)]
        if len(far := _of_setting(finest, rows)):
            distances = charts.lines(_far(far), looks, scale=Scale.SHARE)
            panels.append(Lines(title="by distance", x=X, y=Y, lines=distances, decades=True, floor=LINEAR))
            lines += distances
        spreads += [line.points for line in lines]
        groups.append(Group(title, panels))
    sentence = (
        "Share of reads that do not return the bit last written, by test set, beside published rates (stars), and in "
        f"the sparse test by distance to the write. Lower is better; rates below {LINEAR:g} are drawn there."
    )
    note = intervals.explain(spreads, "bars and bands", "sequences")
    return Chart("Flip-flop language", sentence, groups, f"{note} Stars: {PUBLISHED_LABEL}.")


def _published(looks: dict[Method, legend.Look]) -> list[Line]:
    """Return the published rates, in the colour of their method if it is drawn too."""
    colours = {name: look.colour for (name, options), look in looks.items() if not options}
    return [
        Line(
            legend.Look(f"{_name(name)}, published", colours.get(name, charts.GREY), "*", ()),
            pd.DataFrame([{"x": TESTS[t], "mean": v, "low": v, "high": v, "seeds": 1} for t, v in rates.items()]),
        )
        for name, rates in PUBLISHED_RATES.items()
    ]


def _name(name: str) -> str:
    """Return the name of a method with published figures, ours or not."""
    return {"path": "PaTH"}.get(name, legend.NAMES.get(name, name))


def _finest(table: pd.DataFrame, best: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the sparse test by distance, at the learning rates of `best`."""
    finest = table[(table["metric"] == "error_rate") & (table["test"] == "sparse") & table["distance_start"].notna()]
    return finest.merge(best[["attention", "options", "lr", *FLIP_FLOP.columns]].drop_duplicates())


def _of_setting(finest: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    keys = FLIP_FLOP.columns
    return finest.merge(rows[keys].drop_duplicates(), on=keys)


def _far(rows: pd.DataFrame) -> pd.DataFrame:
    rows = numbers(rows, ["distance_start", "distance_end"])
    return rows.assign(x=np.sqrt(rows["distance_start"] * (rows["distance_end"] - 1)))


def _tests(axis: Axes, rows: pd.DataFrame, looks: dict[Method, legend.Look]) -> list[pd.DataFrame]:
    style.label(axis, "test set", Y)
    others = [name for name in PUBLISHED_RATES if all(name != method for method, _ in looks)]
    width = 0.8 / (len(looks) + len(others))
    points = intervals.points(rows, ["test"], Scale.SHARE)
    spreads = []
    for index, (method, look) in enumerate(looks.items()):
        spread = intervals.method(points, method)
        spread = spread.set_index("test").reindex(list(TESTS)).dropna()
        x = np.array([list(TESTS).index(str(test)) for test in spread.index]) - 0.4 + (index + 0.5) * width
        style.bars(axis, x, spread, look, width=1.2)
        axis.plot(x, spread["mean"], label=look.label, **look.line() | {"linestyle": "none"})
        if method[0] in PUBLISHED_RATES and not method[1]:
            published = [PUBLISHED_RATES[method[0]][str(test)] for test in spread.index]
            axis.plot(x, published, color=look.colour, label=f"{look.label}, published", zorder=1, **PUBLISHED)
        spreads.append(spread.reset_index())
    for index, name in enumerate(others, start=len(looks)):
        at = np.arange(len(TESTS)) - 0.4 + (index + 0.5) * width
        published = [PUBLISHED_RATES[name][test] for test in TESTS]
        axis.plot(at, published, color="0.7", label=f"{_name(name)}, published", **PUBLISHED)
        axis.annotate(
            _name(name),
            (at[0], published[0]),
            (0, -13 if published[0] else 7),
            textcoords="offset points",
            ha="center",
            fontsize=style.SMALL_PT,
            color=style.MARK,
        )
    chances = {test: _chance(rows, test) for test in TESTS}
    axis.set_xticks(
        range(len(TESTS)), [f"{name}\np = {chances[test]}" for test, name in TESTS.items()], fontsize=style.TEXT_PT
    )
    axis.set_xlim(-0.5, len(TESTS) - 0.5)
    axis.grid(False, axis="x")
    axis.axvspan(0.5, 1.5, color="0.96", zorder=0)
    return spreads


def _chance(rows: pd.DataFrame, test: str) -> str:
    return ", ".join(f"{p:g}" for p in sorted(rows.loc[rows["test"] == test, "p_ignore"].unique()))


def _distances(axis: Axes, rows: pd.DataFrame, looks: dict[Method, legend.Look]) -> list[pd.DataFrame]:
    if rows.empty:
        axis.set_axis_off()
        return []
    style.label(axis, X, "")
    rows = _far(rows)
    spreads = style.bands(axis, rows, looks)
    style.ticks(axis, sorted(rows["distance_start"].unique()))
    return spreads


def _log(axis: Axes, highest: float) -> None:
    """Make y logarithmic down to LINEAR, and linear to 0 below."""
    axis.set_yscale("symlog", linthresh=LINEAR, linscale=0.6)
    axis.set_ylim(-LINEAR / 3, max(1.0, highest))
    axis.yaxis.set_major_locator(FixedLocator([0.0, *(10.0**e for e in range(-6, 1))]))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_locator(NullLocator())
