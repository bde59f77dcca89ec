"""Needles in haystacks: score by length, for each task and as their mean.

Of models that were fine-tuned, a task has the lines of those that solved it at their training length; the others are in
a strip below: what they score at other lengths says nothing about these. A mean is hollow where not all of its tasks
were solved. A task that no method solved has no panel, and is named below.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sbeval.plots import chart as charts
from sbeval.plots import legend, style
from sbeval.plots.chart import Chart, Group, Lines
from sbeval.plots.legend import Look
from sbeval.tables import intervals
from sbeval.tables.needle import SOLVED
from sbeval.tables.rows import Method
from sbeval.tables.selection import NEEDLE, NEEDLE_SAME, mean_over_tasks, needle_scores, shared_tasks
from sbeval.tables.statistics import Scale

TABLE = "needle"
COLUMNS = ("cell", "value", "stderr", "n", "depth_start", *NEEDLE_SAME)
METRICS = {"score": "score of what is said", "greedy": "greedy decoding is right"}
ACROSS = 4
# the middle of the strip of methods that did not solve a task
STRIP = -0.14
HOLLOW: dict[str, Any] = {"markerfacecolor": "white", "linestyle": (0, (1, 2)), "linewidth": 1.0}


@dataclass(frozen=True, slots=True)
class Part:
    """A panel: rows of its lines; lengths of its axis, training lengths; by method, how many of its models solved the
    task, and of how many, where not all did. over: the tasks of a mean, each of which counts."""

    title: str
    rows: pd.DataFrame
    lengths: list[int]
    marks: list[int]
    short: Mapping[Method, tuple[int, int]] = field(default_factory=dict)
    over: Sequence[str] = ()

    def hollow(self, method: Method) -> bool:
        return bool(self.over) and method in self.short

    def apart(self, looks: Mapping[Method, Look]) -> list[str]:
        """Return what is said of each method that did not solve the task, or a part of it."""
        said = []
        for method, look in looks.items():
            done, of = self.short.get(method, (0, 0))
            if of:
                count = f"{done} of {of} {'solved' if self.over else 'seeds'}"
                said.append(f"{look.label} ({count})" if done else look.label)
        return said


def draw(table: pd.DataFrame) -> Figure:
    """Draw the table: for each model setting and each of the two metrics the mean over tasks, then each task.

    The mean is over the tasks that all methods of the setting have.
    """
    table = needle_scores(table)
    looks = legend.looks(table)
    grids = settings(table)
    split = [_parts(some) for _, some in grids]
    drawn = [_with_lines(parts) for parts in split]
    across = min(ACROSS, max(map(len, drawn)))
    heights = [math.ceil(len(parts) / across) for parts in drawn]
    figure, lines = style.grid(sum(heights), across)
    axes = [axis for line in lines for axis in line]
    spreads: list[pd.DataFrame] = []
    for number, ((title, _), parts) in enumerate(zip(grids, drawn, strict=True)):
        first = sum(heights[:number]) * across
        panels = axes[first : first + heights[number] * across]
        style.title(panels[0], title)
        lengths = sorted({float(length) for part in parts for length in part.lengths})
        for column, (axis, part) in enumerate(zip(panels, parts, strict=False)):
            spreads += _lines(axis, part, looks, lengths, first=column % across == 0)
        # panels of a row share their y axis, which the strip makes longer
        for axis, part in zip(panels, parts, strict=False):
            if part.short:
                _strip(axis, part, looks)
        for axis in panels[len(parts) :]:
            axis.set_axis_off()
    note = style.with_caution(_note(spreads, "bars", split), table, looks)
    style.finish(figure, [look.handle() for look in looks.values()], note)
    return figure


def chart(table: pd.DataFrame) -> Chart:
    """Return the interactive figure."""
    table = needle_scores(table)
    looks = legend.looks(table)
    groups, parts = [], list[list[Part]]()
    for title, some in settings(table):
        split = _parts(some)
        panels = [
            Lines(title=_title(part, looks), x="length (tokens)", y="score", lines=lines, marks=part.marks)
            for part in split
            if (lines := charts.lines(part.rows, looks, by="length", scale=Scale.SHARE))
        ]
        parts.append(split)
        groups += [Group(title, panels)] if panels else []
    sentence = (
        "Share of what was hidden in a text that is retrieved (1 is all), by the length of text and answer in "
        "tokens, for each of RULER's tasks and as the mean of them. Higher is better."
    )
    note = style.with_caution(_note(charts.spreads(groups), "bands", parts), table, looks)
    return Chart("Needles in haystacks", sentence, groups, note)


def _title(part: Part, looks: Mapping[Method, Look]) -> str:
    apart = part.apart(looks)
    return f"{part.title}; not {'all ' if part.over else ''}solved: {', '.join(apart)}" if apart else part.title


def _note(spreads: Iterable[pd.DataFrame], shape: str, parts: Sequence[list[Part]]) -> str:
    lines = [intervals.explain(spreads, shape, "samples")]
    drawn = {part.title for some in parts for part in _with_lines(some)}
    if short := [part for some in parts for part in some if part.short]:
        some_did = any(done for part in short for done, _ in part.short.values())
        counted = ", and how many of their models did" if some_did else ""
        lines.append(
            f"Strip below 0: methods that did not solve the task ({100 * SOLVED:.0f} % right at the training length "
            f"after fine-tuning){counted}; such models have no line."
        )
        if any(part.over for part in short):
            lines.append("A mean is hollow where not all of its tasks were solved.")
    for names in dict.fromkeys(tuple(some[0].over) for some in parts if 1 < len(some[0].over) < len(some) - 1):
        lines.append(f"Mean of the {len(names)} tasks that all methods have: {', '.join(names)}.")
    if without := sorted({part.title for some in parts for part in some} - drawn):
        lines.append(f"Solved by no method, and not drawn: {', '.join(without)}.")
    return " ".join(filter(None, lines))


def _with_lines(parts: list[Part]) -> list[Part]:
    """Return the panels that have lines; all where none has."""
    return [part for part in parts if len(part.rows)] or parts


def _parts(some: pd.DataFrame) -> list[Part]:
    """Return the panels: the mean over tasks, unless there is one task, then each task."""
    tasks = [_part(str(task), part) for task, part in some.groupby("task")]
    if len(tasks) == 1:
        return tasks
    shared = shared_tasks(some)
    names = sorted(shared["task"].unique())
    of = names[0] if len(names) == 1 else f"{len(names)} tasks"
    return [_part("mean" if len(names) == len(tasks) else f"mean of {of}", shared, over=names), *tasks]


def _part(title: str, some: pd.DataFrame, over: Sequence[str] = ()) -> Part:
    models = some.drop_duplicates(["attention", "options", "seed", "task"])
    counts = models.groupby(["attention", "options"])["solved"].agg(["sum", "size"])
    short = {
        (str(name), str(options)): (int(done), int(of))
        for (name, options), done, of in counts.itertuples()
        if done < of
    }
    lengths = sorted({int(length) for length in some["length"]})
    marks = [int(length) for length in some["train_len"].unique()]
    if not over:
        return Part(title, some[some["solved"]], lengths, marks, short)
    none = [method for method, (done, _) in short.items() if not done]
    drawn = [(name, options) not in none for name, options in zip(some["attention"], some["options"], strict=True)]
    return Part(title, mean_over_tasks(some[drawn]), lengths, marks, short, over)


def settings(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Return title and rows of each setting and metric of a table."""
    return [
        (f"{title}{': ' if title else ''}{name}", some[some["metric"] == metric])
        for title, some in style.panels(table, NEEDLE.always, NEEDLE.others)
        for metric, name in METRICS.items()
        if (some["metric"] == metric).any()
    ]


def _lines(
    axis: Axes, part: Part, looks: dict[Method, Look], lengths: list[float], *, first: bool
) -> list[pd.DataFrame]:
    style.subtitle(axis, part.title)
    points = intervals.points(part.rows, ["length"], Scale.SHARE)
    spreads = []
    for method, look in looks.items():
        spread = intervals.method(points, method)
        if spread.empty:
            continue
        style.bars(axis, spread["length"], spread, look)
        how = look.line() | (HOLLOW if part.hollow(method) else {})
        axis.plot(spread["length"], spread["mean"], label=look.label, **how)
        spreads.append(spread)
    style.ticks(axis, lengths)
    axis.set_xticklabels([f"{length / 1024:g}k" for length in lengths])
    axis.set_xlim(lengths[0] / 1.3, lengths[-1] * 1.3)
    for length in part.marks:
        style.training_length(axis, length)
    style.shares(axis)
    style.label(axis, "length (tokens)", "share" if first else "")
    return spreads


def _strip(axis: Axes, part: Part, looks: dict[Method, Look]) -> None:
    """Draw a strip below 0 with a hollow marker for each method that did not solve the task, or not in all models."""
    axis.axhspan(STRIP - 0.08, STRIP + 0.08, color="0.95", linewidth=0, zorder=0)
    axis.set_ylim(STRIP - 0.08, 1.03)
    axis.set_yticks([tick for tick in axis.get_yticks() if 0 <= tick <= 1])
    below = axis.get_yaxis_transform()
    for place, (method, (done, of)) in enumerate((of, part.short[of]) for of in looks if of in part.short):
        x, look = 0.06 + 0.125 * place, looks[method]
        axis.plot(
            [x], [STRIP], transform=below, color=look.colour, marker=look.marker, markersize=4, markerfacecolor="white",
            linestyle="", label=f"not solved: {look.label}",
        )  # fmt: skip
        if done:
            axis.text(
                x + 0.03, STRIP, f"{done}/{of}", transform=below, fontsize=4.5, va="center", color=style.MARK,
                bbox={"facecolor": "0.95", "edgecolor": "none", "pad": 0.4},
            )  # fmt: skip
