"""Error of attention kernels against their throughput, from kernel.csv: up and left is better in both.

Relative error of the output against float64 at 2048 tokens; throughput at the longest dense length.
"""

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sbeval.errors import InputError
from sbeval.plots import kernel, style

TABLE = kernel.TABLE
COLUMNS = kernel.COLUMNS


def draw(table: pd.DataFrame) -> Figure:
    """Draw one point a kernel, one panel a step."""
    keys = ["attention", "options", "step", "head_dim", "queries"]
    speed = kernel.dense(table, "throughput")[[*keys, "value"]].rename(columns={"value": "throughput"})
    error = kernel.dense(table, "relative_error")[[*keys, "value"]].rename(columns={"value": "error"})
    rows = speed.merge(error, on=keys)
    if rows.empty:
        raise InputError("no rows with the metrics throughput and relative_error of whole sequences")
    rows = rows[rows["queries"] == rows.groupby(["attention", "options", "step"])["queries"].transform("max")]
    looks = style.looks(rows)
    figure, [axes] = style.pairs(1)
    for axis, (step, text) in zip(axes, kernel.STEPS.items(), strict=True):
        style.label(axis, text, "relative error of the output")
        for method, look in looks.items():
            of_method = style.method(rows[rows["step"] == step], method)
            for size, point in of_method.groupby("head_dim"):
                axis.plot(point["throughput"], point["error"], **look.line() | {"linestyle": "none"})
                for x, y in zip(point["throughput"], point["error"], strict=True):
                    axis.annotate(f"{size:g}", (x, y), (4, 3), textcoords="offset points", fontsize=style.SMALL_PT)
        of_step = rows[rows["step"] == step]
        axis.set_xlim(0, 1.15 * max(of_step["throughput"].max(), 1))
        axis.set_ylim(0, 1.25 * max(rows["error"].max(), 1e-9))
    handles = [Line2D([], [], label=look.label, **look.line()) for look in looks.values()]
    style.finish(figure, handles, "Numbers at the points are head sizes. Error against float64 at 2048 tokens.")
    return figure
