"""The gap to RoPE by training tokens, with the fit of a limit plus a power of tokens (`sbeval.tables.tokens`).

One panel a setting. Points are trained models, with 95 % intervals; a line is the fit, where there are enough points,
dotted where it extends past them. Limits stand beside it.
"""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sbeval.plots import legend, style
from sbeval.plots.chart import Chart, Group, Line, Lines
from sbeval.tables import tokens
from sbeval.tables.rows import Method
from sbeval.tables.statistics import Floats
from sbeval.tables.tokens import Ladder, Law

TABLE = "length_gen"
COLUMNS = tokens.COLUMNS
# the fit is drawn to so many times the most tokens
BEYOND = 4
# a method whose gap is larger at the most tokens leaves the panel, in nats
SHOWN = 0.2
# the distance of points of two methods at the same tokens, as a factor
APART = 1.015
X, Y = "training tokens", "loss minus RoPE's (nats per token)"


def has_rows(table: pd.DataFrame) -> bool:
    """Return whether the table has models of enough token counts: most have one."""
    return any(ladder.law for ladder in tokens.ladders(table))


def draw(table: pd.DataFrame) -> Figure:
    """Draw gaps by training tokens, a method each."""
    settings = _settings(table)
    looks = legend.looks_of(ladder.method for ladders in settings.values() for ladder in ladders)
    figure, axes = style.grid(len(settings), 2)
    figure.set_size_inches(style.WIDTH_IN, style.ROW_IN * 1.3 * len(settings) + 1.0)
    # limits beside the fits, in a narrow panel with the same y
    axes[0][0].get_gridspec().set_width_ratios([9, 1])  # type: ignore[union-attr]  # of a grid each has one
    for (title, ladders), (axis, beside) in zip(settings.items(), axes, strict=True):
        style.title(axis, title)
        style.label(axis, X, Y)
        style.subtitle(beside, "limit")
        for place, ladder in enumerate(ladders):
            _line(axis, ladder, looks[ladder.method], APART ** (place - (len(ladders) - 1) / 2))
            if ladder.law:
                _limit(beside, ladder.law, looks[ladder.method], place)
        for each in (axis, beside):
            each.axhline(0, color=style.MARK, linewidth=1.0, zorder=1)
        axis.set_ylim(*_range(ladders))
        style.counts(axis)
        beside.set_xticks([])
        beside.set_xlim(-1, len(ladders))
    away = [looks[ladder.method].label for ladders in settings.values() for ladder in ladders if not _inside(ladder)]
    style.finish(
        figure,
        [_handle(look) for look in looks.values()] + [Line2D([], [], color=style.MARK, linewidth=1.0, label="RoPE")],
        _note(settings) + style.leaving(away),
    )
    return figure


def chart(table: pd.DataFrame) -> Chart:
    """Return the interactive figure."""
    settings = _settings(table)
    looks = legend.looks_of(ladder.method for ladders in settings.values() for ladder in ladders)
    groups = []
    for title, ladders in settings.items():
        lines = [Line(looks[ladder.method], _points(ladder)) for ladder in ladders]
        groups.append(Group(title, [Lines(title="", x=X, y=Y, lines=lines, levels={"RoPE": 0.0}, counts=True)]))
    sentence = (
        "Mean loss over test documents at the training length minus RoPE's, in nats per token, by training tokens. A "
        "method below 0 is ahead of RoPE."
    )
    return Chart("Gap by training tokens", sentence, groups, _note(settings) + _limits(settings, looks))


def _settings(table: pd.DataFrame) -> dict[str, list[Ladder]]:
    settings: dict[str, list[Ladder]] = {}
    for ladder in tokens.fitted(table):
        settings.setdefault(ladder.setting, []).append(ladder)
    return settings


def _line(axis: Axes, ladder: Ladder, look: legend.Look, beside: float) -> None:
    """Draw the points of a method, beside those of others, and its fit, if any, dotted where there are none."""
    points = _points(ladder)
    points["x"] *= beside
    axis.plot(points["x"], points["mean"], label=look.label, **(look.line() | {"linestyle": "none"}))
    axis.vlines(points["x"], points["low"], points["high"], color=look.colour, linewidth=1.0)
    if ladder.law is None:
        return
    for first, last, dashes in (
        (ladder.tokens[0], ladder.tokens[-1], "-"),
        (ladder.tokens[-1], BEYOND * ladder.tokens[-1], ":"),
    ):
        at: Floats = np.geomspace(first, last, 50)
        axis.plot(at, ladder.law.at(at), color=look.colour, linewidth=1.2, linestyle=dashes)


def _limit(axis: Axes, law: Law, look: legend.Look, place: int) -> None:
    """Draw the limit of a fit and its interval, beside those of other methods."""
    axis.plot([place], [law.limit.value], **(look.line() | {"linestyle": "none"}))
    if law.limit.low < law.limit.high:
        axis.vlines([place], [law.limit.low], [law.limit.high], color=look.colour, linewidth=1.0)


def _handle(look: legend.Look) -> Line2D:
    return Line2D([], [], label=look.label, **(look.line() | {"linestyle": "-"}))


def _inside(ladder: Ladder) -> bool:
    return abs(ladder.gaps[-1].value) <= SHOWN


def _range(ladders: list[Ladder]) -> tuple[float, float]:
    """Return the ends of a panel: of the points and intervals of methods that are inside, and 0."""
    points = pd.concat(
        [_points(ladder) for ladder in ladders if _inside(ladder)] or [pd.DataFrame({"low": [], "high": []})]
    )
    low, high = min([0.0, *points["low"]]), min(2 * SHOWN, max([0.0, *points["high"]]))
    edge = 0.08 * max(high - low, 0.01)
    return low - edge, high + edge


def _points(ladder: Ladder) -> pd.DataFrame:
    """Return the gaps as points of a line; without an interval it has no width."""
    rows = [(gap.value, gap.low, gap.high) for gap in ladder.gaps]
    seeds = [min(pair) for pair in ladder.seeds]
    points = pd.DataFrame(rows, columns=["mean", "low", "high"]).assign(x=ladder.tokens, seeds=seeds)
    return points.assign(low=points["low"].fillna(points["mean"]), high=points["high"].fillna(points["mean"]))


def _note(settings: dict[str, list[Ladder]]) -> str:
    every = [ladder for ladders in settings.values() for ladder in ladders]
    seeds = sorted({count for ladder in every for pair in ladder.seeds for count in pair})
    ends = " to ".join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))
    over = "One seed" if seeds == [1] else f"Means of {ends} seeds"
    bars = "; bars: 95 % intervals" if any(gap.low < gap.high for ladder in every for gap in ladder.gaps) else ""
    return f"{over}{bars}; lines: the fit of a limit plus a power of tokens (sbeval table tokens)."


def _limits(settings: dict[str, list[Ladder]], looks: dict[Method, legend.Look]) -> str:
    """Return the limit of each method, for a page, which has room for it."""
    every = (ladder for ladders in settings.values() for ladder in ladders)
    each = [f"{looks[ladder.method].label} {ladder.law.limit.text()}" for ladder in every if ladder.law]
    return f" Limits: {'; '.join(each)}."
