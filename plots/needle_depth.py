"""Needles in haystacks: score by the depth of the needle and the length of the text, a heat map for each method."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from sbeval.errors import NothingToDraw
from sbeval.plots import legend, style
from sbeval.plots.chart import Chart, Group, Heat
from sbeval.plots.needle import TABLE, settings
from sbeval.tables import intervals
from sbeval.tables.selection import NEEDLE_SAME, needle_depths, shared_tasks

DEPTHS = ("depth_start", "depth_end")
COLUMNS = ("cell", "value", "n", *DEPTHS, *NEEDLE_SAME)
__all__ = ["COLUMNS", "TABLE", "chart", "draw"]
# readable in grey and by colour-blind readers
COLOURS = "viridis"


def draw(table: pd.DataFrame) -> Figure:
    """Draw the table: a row for each setting and metric, in it a map for each method.

    A cell is the mean over seeds and over the tasks with one needle that every method with a map has solved; white is
    no sample. Models that did not solve a task at their training length are left out, and how many others there are is
    said.
    """
    table = _by_depth(table)
    looks = legend.looks(table[table["solved"]])
    if not looks:
        raise NothingToDraw("there is no row of a model that solved its task at its training length")
    grids = settings(table)
    figure, axes = style.grid(len(grids), len(looks))
    for row, (title, some) in enumerate(grids):
        drawn = [
            _map(axis, intervals.method(some, method), look.label)
            for axis, (method, look) in zip(axes[row], looks.items(), strict=True)
        ]
        # in place of the leftmost, which may be empty
        first = axes[row][drawn.index(True) if any(drawn) else 0]
        first.tick_params(labelleft=True)
        style.label(first, first.get_xlabel(), "depth of the needle (%)")
        # titles of panels have up to three lines
        style.title(axes[row][0], title, above=32)
    colours = ScalarMappable(Normalize(0, 1), COLOURS)
    bar = figure.colorbar(colours, ax=[axis for line in axes for axis in line], fraction=0.04, pad=0.02)
    bar.ax.tick_params(labelsize=style.SMALL_PT)
    bar.set_label("share", fontsize=style.TEXT_PT)
    note = f"{_mean_of(table)}; the dashed line is the training length.{_left_out(table)}"
    style.note_below(figure, style.with_caution(note, table, legend.looks(table)))
    return figure


def chart(table: pd.DataFrame) -> Chart:
    """Return the interactive figure."""
    table = _by_depth(table)
    looks = legend.looks(table)
    groups = []
    for title, some in settings(table):
        rows = {method: intervals.method(some, method) for method in looks}
        panels = [
            Heat(
                title=_title(mine, look.label), x="length (tokens)", y="depth (%)", value="score", table=_pivot(solved)
            )
            for mine, look in zip(rows.values(), looks.values(), strict=True)
            if len(solved := mine[mine["solved"]])
        ]
        groups += [Group(title, panels)] if panels else []
    sentence = (
        "Share of needles that are found (1 is all), by the length of text and answer in tokens and by the depth in "
        "the text, in percent, of the needle; blank is no sample."
    )
    lengths = ", ".join(f"{length:g}" for length in sorted(table["train_len"].unique()))
    note = style.with_caution(f"{_mean_of(table)}. Trained at length {lengths}.{_left_out(table)}", table, looks)
    return Chart("Needles by depth", sentence, groups, note)


def _by_depth(table: pd.DataFrame) -> pd.DataFrame:
    rows = shared_tasks(needle_depths(table))
    # a method without the hardest task would look the best
    compared = shared_tasks(rows[rows["solved"]])
    return rows[rows["task"].isin(compared["task"])] if len(compared) else rows


def _mean_of(table: pd.DataFrame) -> str:
    note = f"Mean of {', '.join(sorted(table['task'].unique()))}"
    return note if table["solved"].all() else f"{note}, of models that solved them at their training length"


def _left_out(table: pd.DataFrame) -> str:
    """Name the methods without a map."""
    solved = legend.looks(table[table["solved"]])
    names = [look.label for method, look in legend.looks(table).items() if method not in solved]
    return f" Solved by no model of {', '.join(names)}." if names else ""


def _title(some: pd.DataFrame, label: str) -> str:
    """Name a method, with how many of its models are shown where not all solved their task."""
    models = some.drop_duplicates(["seed", "task"])["solved"]
    return label if models.all() else f"{label} ({int(models.sum())}/{len(models)} solved)"


def _pivot(some: pd.DataFrame) -> pd.DataFrame:
    """Return the mean by depth (rows) and length (columns); a depth without samples is empty."""
    width = int((some["depth_end"] - some["depth_start"]).iloc[0])
    values = some.pivot_table(index="depth_start", columns="length", values="value")
    return values.reindex(range(0, 100, width))


def _map(axis: Axes, some: pd.DataFrame, label: str) -> bool:
    """Draw the map of one method; return whether there is one."""
    axis.grid(False)
    if not some.empty:
        style.subtitle(axis, _title(some, label).replace(" (", "\n("))
    some = some[some["solved"]]
    if some.empty:
        axis.set_axis_off()
        return False
    values = _pivot(some)
    lengths = sorted(some["length"].unique())
    axis.pcolormesh(np.arange(len(lengths) + 1), [*values.index, 100], values.to_numpy(), cmap=COLOURS, vmin=0, vmax=1)
    axis.set_xticks(np.arange(len(lengths)) + 0.5, [f"{length / 1024:g}k" for length in lengths])
    axis.set_ylim(100, 0)
    # between the last length seen in training and the first beyond
    train_len = int(some["train_len"].iloc[0])
    seen = sum(length <= train_len for length in lengths)
    if 0 < seen < len(lengths):
        axis.axvline(seen, color="white", linewidth=1.4, linestyle=(0, (3, 2)))
    style.label(axis, "length (tokens)", "")
    return True
