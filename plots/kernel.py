"""Throughput of attention kernels by length, from kernel.csv.

One row for each head size; forward on the left, forward and backward on the right. Dense causal attention: no block
skipping.
"""

import pandas as pd
from matplotlib.figure import Figure

from sbeval.errors import NothingToDraw
from sbeval.plots import chart as charts
from sbeval.plots import legend, style
from sbeval.plots.chart import Chart, Group, Lines
from sbeval.tables import intervals
from sbeval.tables.selection import dense_kernels

TABLE = "kernel"
COLUMNS = (
    "attention",
    "backend",
    "metric",
    "value",
    "step",
    "batch",
    "queries",
    "keys",
    "heads",
    "kv_heads",
    "head_dim",
    "sequences",
    "epsilon",
    "device",
)
NAMES = {"forward": "forward", "forward_backward": "forward + backward"}
STEPS = {"forward": "forward (TFLOP/s)", "forward_backward": "forward + backward (TFLOP/s)"}


def draw(table: pd.DataFrame) -> Figure:
    """Draw throughput by length, a line for each kernel."""
    rows = _throughput(table)
    looks = legend.looks(rows)
    sizes = sorted(rows["head_dim"].unique())
    figure, axes = style.pairs(len(sizes))
    for pair, size in zip(axes, sizes, strict=True):
        style.title(pair[0], _title(rows, size))
        for axis, (step, text) in zip(pair, STEPS.items(), strict=True):
            style.label(axis, "tokens of a sequence", text)
            of_step = rows[(rows["head_dim"] == size) & (rows["step"] == step)]
            axis.set_xscale("log", base=2)
            for method, look in looks.items():
                line = best(intervals.method(of_step, method), "queries")
                axis.plot(line.index, line, label=look.label, **look.line())
            axis.set_ylim(0, 1.1 * max([1, *of_step["value"]]))
            style.ticks(axis, sorted(of_step["queries"].unique()))
    note = f"Causal attention, medians; {', '.join(sorted(rows['device'].unique()))}."
    style.finish(figure, [look.handle() for look in looks.values()], note)
    return figure


def chart(table: pd.DataFrame) -> Chart:
    """Return the interactive figure."""
    rows = _throughput(table)
    looks = legend.looks(rows)
    groups = []
    for size in sorted(rows["head_dim"].unique()):
        panels = []
        for step, text in STEPS.items():
            of_step = rows[(rows["head_dim"] == size) & (rows["step"] == step)]
            speeds = {method: best(intervals.method(of_step, method), "queries") for method in looks}
            if lines := charts.bare(speeds, looks):
                panels.append(Lines(title=NAMES[step], x="tokens of a sequence", y=text, lines=lines, from_zero=True))
        groups.append(Group(_title(rows, size), panels))
    sentence = (
        "Throughput in TFLOP/s of causal attention over whole sequences, all keys visited: stick-breaking's kernel "
        "beside softmax's in the same run. Higher is better."
    )
    note = f"Medians of timings; {', '.join(sorted(rows['device'].unique()))}."
    return Chart("Throughput of attention kernels", sentence, groups, note)


def _title(rows: pd.DataFrame, size: float) -> str:
    """Name the head size, and the device of most of its rows where not all were timed on the same."""
    device = _usual(rows.loc[rows["head_dim"] == size, "device"])
    return f"Heads of size {size:g}{'' if rows['device'].nunique() == 1 else f', {device}'}"


def _usual(devices: pd.Series) -> str:
    return str(devices.value_counts().index[0])


def dense(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return `dense_kernels`; what was timed on another device than most rows of its head size has it in `options`."""
    rows = dense_kernels(table, metric)
    if rows.empty:
        return rows
    usual = rows.groupby("head_dim")["device"].transform(_usual)
    named = rows["options"].str.cat(rows["device"], sep=",").str.strip(",")
    return rows.assign(options=rows["options"].mask(rows["device"] != usual, named))


def best(rows: pd.DataFrame, by: str) -> "pd.Series[float]":
    """Return the highest value of each `by`: of several batch sizes the one that fills the device best."""
    return rows.groupby(by)["value"].max()


def _throughput(table: pd.DataFrame) -> pd.DataFrame:
    rows = dense(table, "throughput")
    if rows.empty:
        raise NothingToDraw("no rows with the metric throughput of whole sequences")
    return rows
