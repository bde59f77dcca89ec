"""Steps until associative recall is solved, by the number of key-value pairs: how long plateaus last.

A panel for each setting in which a method solves two or more numbers of pairs. A method is drawn at the learning rate
that solves it soonest. Cells that were not solved are hollow, at their last step: they may be solved later.
"""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sbeval.errors import NothingToDraw
from sbeval.plots import chart as charts
from sbeval.plots import legend, style
from sbeval.plots.chart import Chart, Group, Lines
from sbeval.tables import intervals, mqrar
from sbeval.tables.rows import Method
from sbeval.tables.selection import MQRAR, by_steps, recall_completed, recall_setting
from sbeval.tables.table import numbers

TABLE = "mqrar"
COLUMNS = ("attention", "options", "seed", "metric", "value", "kv_pairs", "lr", *MQRAR.columns)
X, Y = "key-value pairs", "steps until solved"
# what ends a training, and not how it goes while the rate is constant
BUDGET = ("max_steps", "patience", "preset", "stop_accuracy")
NAMED = ("vocab_size", "heads", "optimizer", "positions", "norm", "biases")
# numbers of pairs from which a power is fitted
FEWEST = 3
SEEDS = "Dots: seeds; lines: their means, at the rate that solves soonest; hollow: not solved by then."


def has_rows(table: pd.DataFrame) -> bool:
    """Return whether a method solves two or more numbers of pairs in some setting."""
    return set(COLUMNS) <= set(table) and bool(settings(table))


def draw(table: pd.DataFrame) -> Figure:
    """Draw steps until solved by pairs, a panel for each setting."""
    panels = _settings(table)
    looks = legend.looks(pd.concat([rows for _, rows in panels]))
    figure, axes = style.grid(len(panels), 1)
    figure.set_size_inches(style.WIDTH_IN * 3 / 4, style.ROW_IN * 1.3 * len(panels) + 1.0)
    for (title, rows), (axis,) in zip(panels, axes, strict=True):
        style.title(axis, title)
        style.label(axis, X, Y)
        for method, look in legend.methods(rows, looks).items():
            _line(axis, intervals.method(rows, method), look)
        style.ticks(axis, sorted(rows["kv_pairs"].unique()))
        style.decades(axis)
    style.finish(figure, [look.handle() for look in looks.values()], _note(panels, looks))
    return figure


def chart(table: pd.DataFrame) -> Chart:
    """Return the interactive figure."""
    panels = _settings(table)
    looks = legend.looks(pd.concat([rows for _, rows in panels]))
    groups = []
    for title, rows in panels:
        points = {of: solved(intervals.method(rows, of)) for of in looks}
        lines = [charts.Line(looks[of], mine) for of, mine in points.items() if len(mine)]
        groups.append(Group(title, [Lines(title="", x=X, y=Y, lines=lines, decades=True)]))
    sentence = "Optimizer steps until the latest value of each key is returned, by the number of key-value pairs."
    return Chart("Steps until recall is solved", sentence, groups, _note(panels, looks))


def _settings(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    found = settings(table)
    if not found:
        raise NothingToDraw("no method solves two or more numbers of pairs in one setting")
    return found


def settings(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Return title and rows of each setting, those with the most rows first.

    Rows are cells, each with `steps`, `solved`, at its method's and number of pairs' best rate.
    """
    cells = _cells(table)
    if cells.empty:
        return []
    setting = [name for name in recall_setting(cells).others if name not in (*BUDGET, "warmup")]
    found = style.panels(cells, MQRAR.always, [*setting, *_budget(cells)], within=["kv_pairs"], named=NAMED)
    best = [(title, _best(rows)) for title, rows in found]
    shown = [(title, rows) for title, rows in best if any(len(solved(mine)) > 1 for _, mine in _by_method(rows))]
    return sorted(shown, key=lambda panel: -len(panel[1]))


def _budget(cells: pd.DataFrame) -> list[str]:
    """Return the columns of the budget, where a schedule depends on it."""
    constant = "schedule" in cells and bool((cells["schedule"] == "constant").all())
    return [] if constant else [name for name in BUDGET if name in cells]


def _cells(table: pd.DataFrame) -> pd.DataFrame:
    # older tables do not say how training ended
    rows = recall_completed(table[table["metric"] == "steps"] if "status" in table else table.assign(status="")[:0])
    rows = numbers(rows, ["kv_pairs", "vocab_size", "lr"])
    rows = rows[rows["n_back"] == 1]
    return rows.assign(steps=rows["value"], solved=rows["status"] == "solved")


def _by_method(rows: pd.DataFrame) -> list[tuple[Method, pd.DataFrame]]:
    return [(of, intervals.method(rows, of)) for of in intervals.methods(rows)]


def _best(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the cells at the rate that solves soonest, of a seed the solved one or the longest."""
    kept = []
    for _, cells in rows.groupby(["attention", "options", "kv_pairs"]):
        cells = cells.sort_values(["solved", "steps"], ascending=False).drop_duplicates(["seed", "lr"])
        # where none is solved, every rate says that it may take longer: the longest says the most
        rate = by_steps(cells)[0] if cells["solved"].any() else cells["lr"].iloc[0]
        kept.append(cells[cells["lr"] == rate])
    return pd.concat(kept)


def solved(cells: pd.DataFrame) -> pd.DataFrame:
    """Return the points of a method: mean and range of steps at numbers of pairs that all seeds solve."""
    lines = []
    for pairs, mine in cells.groupby("kv_pairs"):
        if mine["solved"].all():
            each = tuple(mine["steps"].astype(float))
            lines.append((pairs, float(np.mean(each)), min(each), max(each), len(each), each))
    return pd.DataFrame(lines, columns=["x", "mean", "low", "high", "seeds", "each"])


def _line(axis: Axes, cells: pd.DataFrame, look: legend.Look) -> None:
    points = solved(cells)
    axis.plot(points["x"], points["mean"], label=look.label, **look.line())
    style.seeds(axis, points["x"], points, look)
    others = cells[~cells["kv_pairs"].isin(points["x"])]
    for is_solved, mine in others.groupby("solved"):
        marks = look.line() | {"linestyle": "none"} | ({} if is_solved else {"markerfacecolor": "none"})
        axis.plot(mine["kv_pairs"], mine["steps"], **marks)


def exponent(points: pd.DataFrame) -> float | None:
    """Return the power of pairs by which steps grow, least squares in logarithms; None for too few points."""
    if len(points) < FEWEST:
        return None
    return float(np.polyfit(np.log(points["x"]), np.log(points["mean"]), 1)[0])


def _note(panels: list[tuple[str, pd.DataFrame]], looks: dict[Method, legend.Look]) -> str:
    powers, unsolved = list[str](), list[str]()
    for _, rows in panels:
        for of, mine in _by_method(rows):
            points = solved(mine)
            if (power := exponent(points)) is not None:
                powers.append(f"{looks[of].label} {power:.2f}")
            if points.empty:
                unsolved.append(looks[of].label)
    notes = [SEEDS]
    if powers:
        notes.append(f"Power of pairs by which steps grow: {', '.join(dict.fromkeys(powers))}.")
    if unsolved:
        notes.append(f"Not solved by all seeds at any number of pairs: {', '.join(dict.fromkeys(unsolved))}.")
    return " ".join([*notes, *mqrar.cautions(pd.concat([rows for _, rows in panels]))])
