"""What a page shows of a figure: panels of lines or maps with the very numbers of the printed one, as plotly has them.

A figure's module gives its `Chart`; a `Panel` says itself in plotly's terms, in words, and as rows of a table.
"""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import pandas as pd
import seaborn as sns

from sbeval.plots import style
from sbeval.tables import statistics
from sbeval.tables.statistics import Method

# plotly's name of each of matplotlib's markers, and a letter that looks like it
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
# colours too faint for lines on a screen, and what stands for them
FAINT = {"#fbafe4": "#c2569a", "#ece133": "#a59a00"}
# labels that an axis has room for on a telephone
MOST_TICKS = 7


class Panel(Protocol):
    """One pair of axes."""

    @property
    def title(self) -> str: ...

    @property
    def css(self) -> str:
        """How high it is, where that is not as all others."""

    def plotly(self) -> dict[str, Any]:
        """`data` and `layout`; what all panels share stands in the page."""

    def words(self) -> str:
        """What it shows, for a reader who does not see it."""

    def rows(self) -> pd.DataFrame:
        """Its numbers."""

    def looks(self) -> list[style.Look]:
        """Entries of its legend."""


@dataclass(frozen=True, slots=True)
class Group:
    """Panels under one heading and one legend."""

    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True, slots=True)
class Chart:
    """A figure: its heading, a sentence on what to see, with metric and unit, its groups, and what its bands are."""

    heading: str
    sentence: str
    groups: Sequence[Group]
    note: str


@dataclass(frozen=True, slots=True)
class Line:
    """One method: `points` has the columns POINT, as `statistics.spread` gives them."""

    look: style.Look
    points: pd.DataFrame


@dataclass(frozen=True, slots=True, kw_only=True)
class Lines:
    """A line with a band for each method; points with bars where x is a name, a single value or not `joined`."""

    title: str
    x: str
    y: str
    lines: Sequence[Line]
    octaves: bool = True  # x to base 2
    decades: bool = False  # y to base 10
    joined: bool = True
    across: bool = False  # names down the page, values across it
    from_zero: bool = False
    marks: Sequence[float] = ()  # training lengths
    levels: Mapping[str, float] = field(default_factory=dict)  # by name, such as chance
    floor: float = -math.inf  # lower values are drawn here
    top: float = math.inf  # higher ones are seen when zoomed out
    names: Sequence[str] = ()  # the order of x where it is a name

    @property
    def css(self) -> str:
        names = {at for line in self.lines for at in line.points["x"]}
        return f"height: {90 + len(names) * (14 + 8 * len(self.lines))}px" if self.across else ""

    def looks(self) -> list[style.Look]:
        return [line.look for line in self.lines]

    def rows(self) -> pd.DataFrame:
        tables = [line.points.assign(method=line.look.label) for line in self.lines]
        return pd.concat(tables)[["method", *POINT]].rename(columns={"x": self.x, "mean": self.y})

    def words(self) -> str:
        ends = "; ".join(f"{line.look.label} {_ends(line.points)}" for line in self.lines)
        return f"{self.title + ': ' if self.title else ''}{self.y} by {self.x}. {ends}."

    def plotly(self) -> dict[str, Any]:
        named = self._named()
        # a label at the line itself would lie on the edge of some panel
        marks = "".join(f"<br>dotted: training length {value:g}" for value in self.marks)
        x: dict[str, Any] = {"title": {"text": html.escape(self.x) + marks}}
        y: dict[str, Any] = {"title": {"text": html.escape(self.y)}}
        if named:
            x |= {"type": "category"} | ({"title": {"text": ""}} if self.across else {})
            x |= {"categoryorder": "array", "categoryarray": list(self.names)} if self.names else {}
        elif self.octaves:
            x |= {"type": "log"} | _octaves([float(at) for line in self.lines for at in line.points["x"]])
        if self.from_zero:
            y |= {"rangemode": "tozero"}
        if self.decades:
            y |= {"type": "log"} | (_ones_twos_fives() if self._narrow() else {"dtick": 1, "exponentformat": "power"})
        if self.top < math.inf:
            low = min(line.points["low"].min() for line in self.lines)
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
        """A band under a line, or points with bars."""
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
            return [band, points] if low != high else [points]
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
            # beside those of other methods, not on them
            points["offsetgroup"] = look.label
        if self.across:
            return [points | {"x": mean, "y": at, "orientation": "h", "error_x": bars}]
        return [points | {"error_y": bars}]

    def _texts(self, line: Line) -> list[str]:
        """What hovering over each point says."""
        x, y = html.escape(self.x), html.escape(self.y)
        texts = []
        for at, mean, low, high, seeds in line.points[list(POINT)].itertuples(index=False, name=None):
            said = [f"<b>{html.escape(line.look.label)}</b>", f"{x}: {html.escape(plain(at))}", f"{y}: {plain(mean)}"]
            said += [f"{plain(low)} to {plain(high)}"] if high > low else []
            said += [f"{seeds} seeds"] if seeds > 1 else []
            texts.append("<br>".join(said))
        return texts


@dataclass(frozen=True, slots=True, kw_only=True)
class Heat:
    """A map of values between 0 and 1: the table's index down, its columns across; absent ones stay blank."""

    title: str
    x: str
    y: str
    value: str
    table: pd.DataFrame
    css: str = ""

    def looks(self) -> list[style.Look]:
        return []

    def rows(self) -> pd.DataFrame:
        long = self.table.stack().reset_index()
        return long.set_axis([self.y, self.x, self.value], axis=1)

    def words(self) -> str:
        means = self.table.mean()
        by = "; ".join(f"{plain(value)} at {plain(at)}" for at, value in means.items())
        return f"{self.title}: {self.value} by {self.x} and {self.y}. Mean by {self.x}: {by}."

    def plotly(self) -> dict[str, Any]:
        across, down = [plain(at) for at in self.table.columns], [plain(at) for at in self.table.index]
        z = [[None if pd.isna(value) else _short(value) for value in row] for row in self.table.to_numpy()]
        text = [
            [
                f"{html.escape(self.x)}: {at}<br>{html.escape(self.y)}: {by}<br>{html.escape(self.value)}: {plain(value)}"
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


def lines(rows: pd.DataFrame, looks: Mapping[Method, style.Look], by: str = "x", share: bool = False) -> list[Line]:
    """The line of each method that has rows, by column `by`; bands of a `share` stay within 0 and 1."""
    found = []
    for method, look in looks.items():
        points = statistics.spread(statistics.method(rows, method), [by]).rename(columns={by: "x"})
        if share:
            points = points.assign(low=points["low"].clip(lower=0), high=points["high"].clip(upper=1))
        if len(points):
            found.append(Line(look, points))
    return found


def bare(values: Mapping[Method, "pd.Series[float]"], looks: Mapping[Method, style.Look]) -> list[Line]:
    """The line of each method that has values, by their index, without intervals."""
    return [
        Line(looks[method], pd.DataFrame({"x": list(of.index), "mean": of, "low": of, "high": of, "seeds": 1}))
        for method, of in values.items()
        if len(of)
    ]


def spreads(groups: Sequence[Group]) -> list[pd.DataFrame]:
    """The points of all lines, as `statistics.explain` takes them."""
    panels = [panel for group in groups for panel in group.panels]
    return [line.points for panel in panels if isinstance(panel, Lines) for line in panel.lines]


def readable(look: style.Look) -> str:
    """A method's colour on a screen."""
    return FAINT.get(look.colour, look.colour)


def plain(value: Any) -> str:
    """A number with four digits, whole ones and names as they are, nothing for what is absent."""
    if isinstance(value, str):
        return value
    if value is None or pd.isna(value):
        return ""
    return f"{value:.0f}" if float(value).is_integer() and abs(value) < 1e9 else f"{value:.4g}"


def _ends(points: pd.DataFrame) -> str:
    first, last = points.iloc[0], points.iloc[-1]
    said = f"{plain(first['mean'])} at {plain(first['x'])}"
    return said if len(points) == 1 else f"{said} to {plain(last['mean'])} at {plain(last['x'])}"


def _short(value: float) -> float:
    """Six digits: finer than any screen."""
    return float(f"{value:.6g}")


def _octaves(values: Sequence[float]) -> dict[str, Any]:
    """Labels at the values themselves if they are few and whole, else at powers of two."""
    few = sorted(set(values))
    if len(few) > MOST_TICKS or not all(value.is_integer() for value in few):
        first, last = math.ceil(math.log2(few[0])), math.floor(math.log2(few[-1]))
        step = math.ceil((last - first + 1) / MOST_TICKS)
        few = [2.0**exponent for exponent in range(last, first - 1, -step)][::-1]
    return {"tickvals": few, "ticktext": [plain(value) for value in few]}


def _ones_twos_fives() -> dict[str, Any]:
    """Plain labels at 1, 2 and 5 times powers of ten."""
    ticks = [float(f"{first}e{power}") for power in range(-9, 10) for first in (1, 2, 5)]
    return {"tickvals": ticks, "ticktext": [plain(value) for value in ticks]}


def _level(*, x: float | None = None, y: float | None = None, text: str = "") -> dict[str, Any]:
    """A dotted line across the panel, named at its end."""
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
