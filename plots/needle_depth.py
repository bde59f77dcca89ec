"""Needles in haystacks: score by the depth of the needle and the length of the text, a heat map for each method."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from sbeval.errors import InputError
from sbeval.plots import style
from sbeval.plots.chart import Chart, Group, Heat
from sbeval.plots.needle import METRICS, TABLE, settings
from sbeval.tables import intervals
from sbeval.tables.selection import NEEDLE_SAME, most_samples, shared_tasks
from sbeval.tables.table import numbers

DEPTHS = ("depth_start", "depth_end")
COLUMNS = ("cell", "value", "n", *DEPTHS, *NEEDLE_SAME)
__all__ = ["COLUMNS", "TABLE", "chart", "draw"]
# readable in grey and by colour-blind readers
COLOURS = "viridis"


def draw(table: pd.DataFrame) -> Figure:
    """Draw the table: a row for each setting and metric, in it a map for each method.

    A cell is the mean over seeds and over the tasks with one needle that every method has; white is no sample.
    """
    table = _by_depth(table)
    looks = style.looks(table)
    grids = settings(table)
    figure, axes = style.grid(len(grids), len(looks))
    for row, (title, some) in enumerate(grids):
        for column, (method, look) in enumerate(looks.items()):
            axis = axes[row][column]
            _map(axis, intervals.method(some, method), look.label, first=column == 0)
        style.title(axes[row][0], title)
    colours = ScalarMappable(Normalize(0, 1), COLOURS)
    bar = figure.colorbar(colours, ax=[axis for line in axes for axis in line], fraction=0.04, pad=0.02)
    bar.ax.tick_params(labelsize=style.SMALL_PT)
    note = f"{_mean_of(table)}; the dashed line is the training length."
    style.note_below(figure, style.with_caution(note, table, looks))
    return figure


def chart(table: pd.DataFrame) -> Chart:
    """Return the interactive figure."""
    table = _by_depth(table)
    looks = style.looks(table)
    groups = [
        Group(
            title,
            [
                Heat(title=look.label, x="length (tokens)", y="depth (%)", value="score", table=_pivot(mine))
                for method, look in looks.items()
                if len(mine := intervals.method(some, method))
            ],
        )
        for title, some in settings(table)
    ]
    sentence = (
        "Share of needles that are found (1 is all), by the length of text and answer in tokens and by the depth in "
        "the text, in percent, of the needle; blank is no sample."
    )
    lengths = ", ".join(f"{length:g}" for length in sorted(table["train_len"].unique()))
    note = style.with_caution(f"{_mean_of(table)}. Trained at length {lengths}.", table, looks)
    return Chart("Needles by depth", sentence, groups, note)


def _by_depth(table: pd.DataFrame) -> pd.DataFrame:
    table = table[table["metric"].isin(list(METRICS)) & table["depth_start"].notna()]
    if table.empty:
        raise InputError("there are no rows with a depth to draw: tasks with a single needle have them")
    return shared_tasks(most_samples(numbers(table, [*DEPTHS, "length", "train_len", "finetune_tokens"])))


def _mean_of(table: pd.DataFrame) -> str:
    return f"Mean of {', '.join(sorted(table['task'].unique()))}"


def _pivot(some: pd.DataFrame) -> pd.DataFrame:
    """Return the mean by depth (rows) and length (columns); a depth without samples is empty."""
    width = int((some["depth_end"] - some["depth_start"]).iloc[0])
    values = some.pivot_table(index="depth_start", columns="length", values="value")
    return values.reindex(range(0, 100, width))


def _map(axis: Axes, some: pd.DataFrame, label: str, *, first: bool) -> None:
    axis.grid(False)
    if some.empty:
        axis.set_axis_off()
        return
    style.subtitle(axis, label)
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
    style.label(axis, "length (tokens)", "depth of the needle (%)" if first else "")
