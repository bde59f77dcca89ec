"""Loss of the same tokens by how much context they are given: does a method use distant text?

Panels as in `length_gen`. The targets are the last tokens of each long window. Perplexity over the first l tokens,
which `length_gen` draws, also falls where a text's beginning is harder than its rest; here only the context changes.
"""

import pandas as pd
from matplotlib.figure import Figure

from sbeval.errors import InputError
from sbeval.plots import length_gen
from sbeval.plots.chart import Chart
from sbeval.plots.length_gen import TABLE
from sbeval.tables.selection import LENGTH_GEN
from sbeval.tables.statistics import Scale

METRIC = "loss_fixed_targets"
COLUMNS = ("attention", "options", "seed", "metric", "value", "stderr", *LENGTH_GEN.columns, "context_length")
__all__ = ["COLUMNS", "TABLE", "chart", "draw", "has_rows"]
# where a panel ends, in nats above the best method's last value
SHOWN = 1.0
SCALE = length_gen.Scale(
    "context given (tokens)",
    "loss of the same tokens (nats)",
    Scale.LINEAR,
    lambda *_: False,
    lambda best: best + SHOWN,
)


def has_rows(table: pd.DataFrame) -> bool:
    """Return whether fixed targets were measured: `--fixed-targets` is an option."""
    return bool((table["metric"] == METRIC).any())


def draw(table: pd.DataFrame) -> Figure:
    """Draw the mean loss of the targets by the context they are given, a method each."""
    return length_gen.panels(_plotted(table), SCALE)


def chart(table: pd.DataFrame) -> Chart:
    """Return the interactive figure."""
    rows = _plotted(table)
    groups = length_gen.panel_groups(rows, SCALE)
    counts = rows["targets"].unique()
    tokens = f"the last {int(counts[0])} tokens" if len(counts) == 1 else "the last tokens"
    sentence = (
        f"Mean loss, in nats per token, of {tokens} of long windows, given more and more of the text before them. A "
        "line that stays level past a length uses nothing further away; one that rises is confused by it. Lower is "
        "better."
    )
    return Chart("Loss of fixed targets", sentence, groups, length_gen.explained(groups, rows))


def _plotted(table: pd.DataFrame) -> pd.DataFrame:
    rows = table[table["metric"] == METRIC]
    if rows.empty:
        raise InputError(f"there are no rows with metric {METRIC!r} to draw: --fixed-targets measures them")
    length = rows["context_length"].astype(float)
    return rows.assign(x=length, end=length, value=rows["value"].astype(float))
