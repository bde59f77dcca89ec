"""Interactive figures: panels of lines or heat maps, with exactly the numbers of the printed figure, for plotly.

The module of a figure returns its `Chart`; a `Panel` gives itself as data for plotly, in words, and as a table.
"""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import pandas as pd
import seaborn as sns
from matplotlib.ticker import EngFormatter

from sbeval.plots import legend
from sbeval.tables import intervals
from sbeval.tables.intervals import FEW
from sbeval.tables.rows import Method
from sbeval.tables.statistics import Scale

# for each of matplotlib's markers plotly's symbol, and a letter like it
SYMBOLS = {
    "o": ("circle", "●"),
    "s": ("square", "■"),
    "^": ("triangle-up", "▲"),
    "D": ("diamond", "◆"),
    "v": ("triangle-down", "▼"),
    "P": ("cross", "✚"),
    "X": ("x", "✖"),
    "*": ("star", "★"),
    "p": ("pentagon", "⬟"),
    "<": ("triangle-left", "◀"),
    ">": ("triangle-right", "▶"),
}
# columns of a line's points
POINT = ("x", "mean", "low", "high", "seeds")
# readable on white and on black
GREY = "#888888"
# colours too faint for lines on a screen, and their replacements
FAINT = {"#fbafe4": "#c2569a", "#ece133": "#a59a00"}
# labels that fit an axis on a phone
MOST_TICKS = 7


class Panel(Protocol):
    """One pair of axes."""

    @property
    def title(self) -> str: ...

    @property
    def css(self) -> str:
        """Style of its element, such as its height; empty for the default."""

    def plotly(self) -> dict[str, Any]:
        """Return `data` and `layout`, without the template that the page has for all panels."""

    def words(self) -> str:
        """Describe it, for screen readers."""

    def rows(self) -> pd.DataFrame:
        """Return its numbers."""

    def looks(self) -> list[legend.Look]:
        """Return the entries of its legend."""


@dataclass(frozen=True, slots=True)
class Group:
    """Panels under one heading and one legend."""

    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True, slots=True)
class Chart:
    """A figure: heading, a sentence with metric and unit, groups of panels, and a note that explains bands."""

    heading: str
    sentence: str
    groups: Sequence[Group]
    note: str


@dataclass(frozen=True, slots=True)
class Line:
    """The line of one method; `points` has the columns POINT, as `intervals.points` returns them."""

    look: legend.Look
    points: pd.DataFrame

    def lowest(self, top: float) -> float:
        """Return the lowest end of its band, or, where that leaves the panel at `top`, its lowest mean."""
        return float(self.points["low" if self.points["high"].max() <= top else "mean"].min())


@dataclass(frozen=True, slots=True, kw_only=True)
class Lines:
    """A line with a band for each method; points with bars where x is a name, a single value or not `joined`."""

    title: str
    x: str
    y: str
    lines: Sequence[Line]
    octaves: bool = True  # x to base 2
    counts: bool = False  # round numbers of x instead, as 20 M
    decades: bool = False  # y to base 10
    joined: bool = True
    across: bool = False  # names down the page, values across it
    from_zero: bool = False
    marks: Sequence[float] = ()  # training lengths
    levels: Mapping[str, float] = field(default_factory=dict)  # by name, such as chance
    floor: float = -math.inf  # lower values are drawn at this one
    top: float = math.inf  # the axis ends here until zoomed out
    names: Sequence[str] = ()  # the order of x where it is a name

    @property
    def css(self) -> str:
        names = {at for line in self.lines for at in line.points["x"]}
        return f"height: {90 + len(names) * (14 + 8 * len(self.lines))}px" if self.across else ""

    def looks(self) -> list[legend.Look]:
        return [line.look for line in self.lines]

    def rows(self) -> pd.DataFrame:
        tables = [line.points.assign(method=line.look.label) for line in self.lines]
        return pd.concat(tables)[["method", *POINT]].rename(columns={"x": self.x, "mean": self.y})

    def words(self) -> str:
        ends = "; ".join(f"{line.look.label} {_ends(line.points)}" for line in self.lines)
        return f"{self.title + ': ' if self.title else ''}{self.y} by {self.x}. {ends}."

    def plotly(self) -> dict[str, Any]:
        named = self._named()
        # a label beside the line would cross the edge of some panel
        marks = "".join(f"<br>dotted: training length {value:g}" for value in self.marks)
        x: dict[str, Any] = {"title": {"text": html.escape(self.x) + marks}}
        y: dict[str, Any] = {"title": {"text": html.escape(self.y)}}
        if named:
            x |= {"type": "category"} | ({"title": {"text": ""}} if self.across else {})
            x |= {"categoryorder": "array", "categoryarray": list(self.names)} if self.names else {}
        elif self.octaves:
            ticks = _counts if self.counts else _octaves
            x |= {"type": "log"} | ticks([float(at) for line in self.lines for at in line.points["x"]])
        if self.from_zero:
            y |= {"rangemode": "tozero"}
        if self.decades:
            y |= {"type": "log"} | (_ones_twos_fives() if self._narrow() else {"dtick": 1, "exponentformat": "power"})
        if self.top < math.inf:
            low = min(line.lowest(self.top) for line in self.lines)
            y |= {"range": [math.log10(value) if self.decades else value for value in (low, self.top)]}
        lines = [_level(y=value, text=name) for name, value in self.levels.items()]
        lines += [_level(x=value) for value in self.marks]
        layout: dict[str, Any] = {"shapes": lines}
        if self.across:
            layout |= {"xaxis": y, "yaxis": x | {"autorange": "reversed"}, "scattermode": "group", "scattergap": 0.3}
        else:
            layout |= {"xaxis": x, "yaxis": y} | ({"scattermode": "group", "scattergap": 0.3} if named else {})
        data = [trace for line in self.lines if len(line.points) for trace in self._traces(line, named)]
        return {"data": data, "layout": layout}

    def _named(self) -> bool:
        values = {at for line in self.lines for at in line.points["x"]}
        return self.octaves and (len(values) == 1 or any(isinstance(at, str) for at in values))

    def _narrow(self) -> bool:
        means = pd.concat([line.points["mean"] for line in self.lines]).clip(lower=self.floor)
        return bool(means.max() < 100 * means.min())

    def _traces(self, line: Line, named: bool) -> list[dict[str, Any]]:
        """Return the traces of a line and its band, or of points with bars."""
        look, colour = line.look, readable(line.look)
        at = [str(value) if named else _short(value) for value in line.points["x"]]
        mean, low, high = ([_short(max(v, self.floor)) for v in line.points[name]] for name in ("mean", "low", "high"))
        common: dict[str, Any] = {"type": "scatter", "meta": look.label}
        points = common | {
            "mode": "markers",
            "x": at,
            "y": mean,
            "text": self._texts(line),
            "hoverinfo": "text",
            "marker": {"color": colour, "symbol": SYMBOLS[look.marker][0], "size": 7},
        }
        if self.joined and not named:
            points |= {"mode": "lines+markers", "line": {"color": colour, "width": 2, "dash": _dash(look.dashes)}}
            band = common | {
                "mode": "lines",
                "x": at + at[::-1],
                "y": low + high[::-1],
                "fill": "toself",
                "hoverinfo": "skip",
                "fillcolor": _faint(colour),
                "line": {"width": 0},
            }
            return [*([band] if low != high else []), *self._seeds(line), points]
        bars = {
            "type": "data",
            "symmetric": False,
            "thickness": 1.5,
            "width": 0,
            "color": colour,
            "array": [_short(h - m) for m, h in zip(mean, high, strict=True)],
            "arrayminus": [_short(m - b) for m, b in zip(mean, low, strict=True)],
        }
        if named:
            # beside other methods' points, not on top of them
            points["offsetgroup"] = look.label
        if self.across:
            return [points | {"x": mean, "y": at, "orientation": "h", "error_x": bars}]
        return [points | {"error_y": bars}]

    def _seeds(self, line: Line) -> list[dict[str, Any]]:
        """Return a trace of the seeds of points that have few."""
        each: Sequence[Sequence[float]] = list(line.points["each"]) if "each" in line.points else []
        few = [(at, one) for at, of in zip(line.points["x"], each, strict=False) if 1 < len(of) <= FEW for one in of]
        if not few:
            return []
        at, values = zip(*few, strict=True)
        return [
            {
                "type": "scatter",
                "meta": line.look.label,
                "mode": "markers",
                "x": list(map(_short, at)),
                "y": [_short(max(value, self.floor)) for value in values],
                "hoverinfo": "skip",
                "marker": {"color": readable(line.look), "size": 3, "opacity": 0.6},
            }
        ]

    def _texts(self, line: Line) -> list[str]:
        """Return the text of each point on hover."""
        x, y = html.escape(self.x), html.escape(self.y)
        texts = []
        for at, mean, low, high, seeds in line.points[list(POINT)].itertuples(index=False, name=None):
            parts = [f"<b>{html.escape(line.look.label)}</b>", f"{x}: {html.escape(plain(at))}", f"{y}: {plain(mean)}"]
            parts += [f"{plain(low)} to {plain(high)}"] if high > low else []
            parts += [f"{seeds} seeds"] if seeds > 1 else []
            texts.append("<br>".join(parts))
        return texts


@dataclass(frozen=True, slots=True, kw_only=True)
class Heat:
    """A heat map of values from 0 to 1: the table's index down, its columns across; absent values are blank."""

    title: str
    x: str
    y: str
    value: str
    table: pd.DataFrame
    css: str = ""

    def looks(self) -> list[legend.Look]:
        return []

    def rows(self) -> pd.DataFrame:
        long = self.table.stack().reset_index()
        return long.set_axis([self.y, self.x, self.value], axis=1)

    def words(self) -> str:
        means = self.table.mean()
        by = "; ".join(f"{plain(value)} at {plain(at)}" for at, value in means.items())
        return f"{self.title}: {self.value} by {self.x} and {self.y}. Mean by {self.x}: {by}."

    def plotly(self) -> dict[str, Any]:
        names = [html.escape(name) for name in (self.x, self.y, self.value)]
        across, down = [plain(at) for at in self.table.columns], [plain(at) for at in self.table.index]
        z = [[None if pd.isna(value) else _short(value) for value in row] for row in self.table.to_numpy()]
        text = [
            [
                f"{names[0]}: {at}<br>{names[1]}: {by}<br>{names[2]}: {plain(value)}"
                for at, value in zip(across, row, strict=True)
            ]
            for by, row in zip(down, self.table.to_numpy(), strict=True)
        ]
        heat = {
            "type": "heatmap",
            "x": across,
            "y": down,
            "z": z,
            "zmin": 0,
            "zmax": 1,
            "colorscale": "Viridis",
            "text": text,
            "hoverinfo": "text",
            "hoverongaps": False,
            "colorbar": {"thickness": 8, "outlinewidth": 0, "tickvals": [0, 0.5, 1]},
        }
        axes = {
            "xaxis": {"type": "category", "title": {"text": html.escape(self.x)}},
            "yaxis": {"type": "category", "title": {"text": html.escape(self.y)}, "autorange": "reversed"},
        }
        return {"data": [heat], "layout": axes}


def lines(
    rows: pd.DataFrame, looks: Mapping[Method, legend.Look], by: str = "x", scale: Scale = Scale.LINEAR
) -> list[Line]:
    """Return the line of each method that has rows, by column `by`; `rows` are all those of one setting."""
    return of_points(intervals.points(rows, [by], scale).rename(columns={by: "x"}), looks)


def of_points(points: pd.DataFrame, looks: Mapping[Method, legend.Look]) -> list[Line]:
    """Return the line of each method that has points."""
    return [Line(look, mine) for method, look in looks.items() if len(mine := intervals.method(points, method))]


def bare(values: Mapping[Method, "pd.Series[float]"], looks: Mapping[Method, legend.Look]) -> list[Line]:
    """Return the line of each method that has values, by their index, without intervals."""
    return [
        Line(looks[method], pd.DataFrame({"x": list(of.index), "mean": of, "low": of, "high": of, "seeds": 1}))
        for method, of in values.items()
        if len(of)
    ]


def spreads(groups: Sequence[Group]) -> list[pd.DataFrame]:
    """Return the points of all lines, as `intervals.explain` takes them."""
    panels = [panel for group in groups for panel in group.panels]
    return [line.points for panel in panels if isinstance(panel, Lines) for line in panel.lines]


def readable(look: legend.Look) -> str:
    """Return a method's colour for a screen."""
    return FAINT.get(look.colour, look.colour)


def plain(value: Any) -> str:
    """Write a number with four digits, whole numbers and names as they are, an absent value as nothing."""
    if isinstance(value, str):
        return value
    if value is None or pd.isna(value):
        return ""
    return f"{value:.0f}" if float(value).is_integer() and abs(value) < 1e9 else f"{value:.4g}"


def _ends(points: pd.DataFrame) -> str:
    first, last = points.iloc[0], points.iloc[-1]
    start = f"{plain(first['mean'])} at {plain(first['x'])}"
    return start if len(points) == 1 else f"{start} to {plain(last['mean'])} at {plain(last['x'])}"


def _short(value: float) -> float:
    """Round to six digits: finer than any screen."""
    return float(f"{value:.6g}")


def _octaves(values: Sequence[float]) -> dict[str, Any]:
    """Label the values themselves if they are few and whole, else powers of two."""
    few = sorted(set(values))
    if len(few) > MOST_TICKS or not all(value.is_integer() for value in few):
        first, last = math.ceil(math.log2(few[0])), math.floor(math.log2(few[-1]))
        step = math.ceil((last - first + 1) / MOST_TICKS)
        few = [2.0**exponent for exponent in range(last, first - 1, -step)][::-1]
    return {"tickvals": few, "ticktext": [plain(value) for value in few]}


def _counts(values: Sequence[float]) -> dict[str, Any]:
    """Label as many round numbers as fit, or the values themselves where there is none between them."""
    write = EngFormatter(sep=" ")
    for firsts in ((1, 2, 5), (1, 3), (1,)):
        ticks = [value for value in _round_ones(firsts, range(16)) if min(values) <= value <= max(values)]
        if len(ticks) <= MOST_TICKS:
            break
    ticks = ticks or sorted(set(values))
    return {"tickvals": ticks, "ticktext": [write(value) for value in ticks]}


def _ones_twos_fives() -> dict[str, Any]:
    """Label 1, 2 and 5 times powers of ten, as plain numbers."""
    ticks = _round_ones((1, 2, 5), range(-9, 10))
    return {"tickvals": ticks, "ticktext": [plain(value) for value in ticks]}


def _round_ones(firsts: Sequence[int], powers: Sequence[int]) -> list[float]:
    return [float(f"{first}e{power}") for power in powers for first in firsts]


def _level(*, x: float | None = None, y: float | None = None, text: str = "") -> dict[str, Any]:
    """Return a dotted line across the panel, named at its end."""
    ends = {"x0": x, "x1": x, "yref": "paper", "y0": 0, "y1": 1}
    if y is not None:
        ends = {"y0": y, "y1": y, "xref": "paper", "x0": 0, "x1": 1}
    where = {"textposition": "end", "textangle": 0, "xanchor": "right", "yanchor": "bottom"}
    return ends | {
        "type": "line",
        "layer": "below",
        "line": {"color": GREY, "width": 1.5, "dash": "dot"},
        "label": where | {"text": html.escape(text), "font": {"size": 11, "color": GREY}},
    }


def _dash(dashes: Sequence[float]) -> str:
    return ",".join(f"{2 * length:g}px" for length in dashes) or "solid"


def _faint(colour: str) -> str:
    red, green, blue = (round(255 * part) for part in sns.color_palette([colour])[0])
    return f"rgba({red},{green},{blue},0.18)"
