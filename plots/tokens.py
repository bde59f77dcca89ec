"""The gap to RoPE by training tokens, with the fit of a limit plus a power of tokens (`sbeval.tables.tokens`).

One panel a setting. Points are trained models, with 95 % intervals; a line is the fit, dotted where it extends past
them.
"""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sbeval.errors import InputError
from sbeval.plots import style
from sbeval.plots.chart import Chart, Group, Line, Lines
from sbeval.tables import tokens
from sbeval.tables.tokens import Floats, Ladder, Method

TABLE = "length_gen"
COLUMNS = tokens.COLUMNS
# the fit is drawn to so many times the most tokens
BEYOND = 4
X, Y = "training tokens", "loss minus RoPE's (nats per token)"


def has_rows(table: pd.DataFrame) -> bool:
    """Return whether the table has models of enough token counts: most have one."""
    return bool(tokens.ladders(table))


def draw(table: pd.DataFrame) -> Figure:
    """Draw gaps by training tokens, a method each."""
    settings = _settings(table)
    looks = style.looks_of(ladder.method for ladders in settings.values() for ladder in ladders)
    figure, axes = style.grid(len(settings), 1)
    figure.set_size_inches(style.WIDTH_IN, style.ROW_IN * 1.3 * len(settings) + 1.0)
    for (title, ladders), (axis,) in zip(settings.items(), axes, strict=True):
        style.title(axis, title)
        style.label(axis, X, Y)
        axis.axhline(0, color=style.MARK, linewidth=1.0)
        for ladder in ladders:
            _line(axis, ladder, looks[ladder.method])
        style.counts(axis)
    style.finish(figure, [look.handle() for look in looks.values()], _note(settings))
    return figure


def chart(table: pd.DataFrame) -> Chart:
    """Return the interactive figure."""
    settings = _settings(table)
    looks = style.looks_of(ladder.method for ladders in settings.values() for ladder in ladders)
    groups = []
    for title, ladders in settings.items():
        lines = [Line(looks[ladder.method], _points(ladder)) for ladder in ladders]
        groups.append(Group(title, [Lines(title="", x=X, y=Y, lines=lines, levels={"RoPE": 0.0})]))
    sentence = (
        "Mean loss over test documents at the training length minus RoPE's, in nats per token, by training tokens. A "
        "method below 0 is ahead of RoPE."
    )
    return Chart("Gap by training tokens", sentence, groups, _note(settings) + _limits(settings, looks))


def _settings(table: pd.DataFrame) -> dict[str, list[Ladder]]:
    settings: dict[str, list[Ladder]] = {}
    for ladder in tokens.ladders(table):
        settings.setdefault(ladder.setting, []).append(ladder)
    if not settings:
        raise InputError(
            f"no method has {tokens.FEWEST} or more counts of training tokens in common with RoPE in one setting"
        )
    return settings


def _line(axis: Axes, ladder: Ladder, look: style.Look) -> None:
    points = _points(ladder)
    marks = look.line() | {"linestyle": "none"}
    axis.plot(points["x"], points["mean"], label=look.label, **marks)
    axis.vlines(points["x"], points["low"], points["high"], color=look.colour, linewidth=1.0)
    for first, last, dashes in (
        (ladder.tokens[0], ladder.tokens[-1], look.line()["linestyle"]),
        (ladder.tokens[-1], BEYOND * ladder.tokens[-1], ":"),
    ):
        at: Floats = np.geomspace(first, last, 50)
        axis.plot(at, ladder.at(at), color=look.colour, linewidth=1.2, linestyle=dashes)


def _points(ladder: Ladder) -> pd.DataFrame:
    """Return the gaps as points of a line; without an interval it has no width."""
    rows = [(gap.value, gap.low, gap.high) for gap in ladder.gaps]
    points = pd.DataFrame(rows, columns=["mean", "low", "high"]).assign(x=ladder.tokens, seeds=min(ladder.seeds))
    return points.assign(low=points["low"].fillna(points["mean"]), high=points["high"].fillna(points["mean"]))


def _note(settings: dict[str, list[Ladder]]) -> str:
    seeds = sorted({count for ladders in settings.values() for ladder in ladders for count in ladder.seeds})
    over = f"{seeds[0]} to {seeds[-1]} seeds" if len(seeds) > 1 else f"{seeds[0]} seed{'s' * (seeds[0] > 1)}"
    return f"Means of {over}; bars: 95 % intervals; lines: a limit plus a power of tokens (sbeval table tokens)."


def _limits(settings: dict[str, list[Ladder]], looks: dict[Method, style.Look]) -> str:
    """Return the limit of each method, for a page, which has room for it."""
    each = [
        f"{looks[ladder.method].label} {ladder.limit.text()}" for ladders in settings.values() for ladder in ladders
    ]
    return f" Limits: {'; '.join(each)}."
