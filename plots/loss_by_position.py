"""Loss by position: L(i), the mean loss of token i of a document given the i - 1 before it, smoothed.

Panels as in `length_gen`. Points are bins of positions, a quarter of an octave wide; a line is the mean over each bin
and its two neighbours on the same side of the training length, weighted by their numbers of positions.
"""

import math

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from sbeval.errors import InputError
from sbeval.plots import length_gen
from sbeval.plots.chart import Chart
from sbeval.plots.length_gen import TABLE
from sbeval.tables.selection import LENGTH_GEN, length_gen_setting
from sbeval.tables.statistics import Scale
from sbeval.tables.table import numbers

FACTORS = ("position_start", "position_end")
COLUMNS = ("attention", "options", "seed", "metric", "value", "stderr", *LENGTH_GEN.columns, *FACTORS)
__all__ = ["COLUMNS", "TABLE", "chart", "draw", "smoothed"]
# the first tokens of a document are hard to predict for every method and would set the scale
FIRST_SHOWN = 1 / 16
SCALE = length_gen.Scale(
    "position in the document (tokens)",
    "loss (nats per token)",
    Scale.LINEAR,
    lambda *_: False,
    lambda best: best + math.log(length_gen.SHOWN),
)


def draw(table: pd.DataFrame) -> Figure:
    """Draw the smoothed L(i) at the bins' geometric middles, from a sixteenth of the training length on."""
    return length_gen.panels(_plotted(table), SCALE)


def chart(table: pd.DataFrame) -> Chart:
    """Return the interactive figure."""
    groups = length_gen.panel_groups(_plotted(table), SCALE)
    sentence = (
        "Mean loss, in nats per token, of the token at a position given all before it, smoothed over neighbouring "
        "bins: a line that rises past the training length shows a context that confuses. Lower is better."
    )
    return Chart("Loss by position", sentence, groups, length_gen.explained(groups, _plotted(table)))


def _plotted(table: pd.DataFrame) -> pd.DataFrame:
    table = table[table["metric"] == "loss"]
    if table.empty:
        raise InputError("there are no rows with metric 'loss' to draw")
    table = numbers(table, FACTORS)
    table = smoothed(table.assign(end=table["position_end"] - 1))
    first = FIRST_SHOWN * np.minimum(table["train_len"], table["end"].max())
    table = table.assign(x=np.sqrt(table["position_start"] * table["end"]))
    plotted: pd.DataFrame = table[table["end"] > first]
    return plotted


def smoothed(table: pd.DataFrame) -> pd.DataFrame:
    """Average `value` over each bin and its neighbours; `stderr` likewise, as if neighbours were fully correlated."""
    lines = ["attention", "options", "seed", *length_gen_setting(table).columns]
    rows = table.sort_values([*lines, "position_start"])
    past = rows["position_start"] > rows["train_len"]
    keys = [rows[name] for name in lines] + [past]
    size = (rows["position_end"] - rows["position_start"]).astype(float)

    def window(values: "pd.Series[float]") -> "pd.Series[float]":
        grouped = values.groupby(keys, dropna=False, sort=False)
        total: pd.Series[float] = values + grouped.shift(1).fillna(0.0) + grouped.shift(-1).fillna(0.0)
        return total

    whole = window(size)
    for name in ("value", "stderr"):
        known = rows[name].notna()
        mean = window((rows[name] * size).fillna(0.0)) / whole
        rows[name] = mean.where(known, math.nan)
    return rows
