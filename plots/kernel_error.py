"""Error of attention kernels by throughput, from kernel.csv: down and right is better in both.

Relative error of the output against float64 at 2048 tokens; throughput at the longest dense length.
"""

import pandas as pd
from matplotlib.figure import Figure

from sbeval.errors import NothingToDraw
from sbeval.plots import chart as charts
from sbeval.plots import kernel, legend, style
from sbeval.plots.chart import Chart, Group, Lines
from sbeval.tables import intervals

TABLE = kernel.TABLE
COLUMNS = kernel.COLUMNS


def draw(table: pd.DataFrame) -> Figure:
    """Draw a point for each kernel, in a panel for each step."""
    rows = _points(table)
    looks = legend.looks(rows)
    # points of several kernels are so close that numbers beside them would cover each other
    sizes = {float(size): 4.0 + 2.5 * index for index, size in enumerate(sorted(rows["head_dim"].unique()))}
    figure, [axes] = style.pairs(1)
    for axis, (step, text) in zip(axes, kernel.STEPS.items(), strict=True):
        style.label(axis, text, "relative error of the output")
        for method, look in looks.items():
            of_method = intervals.method(rows[rows["step"] == step], method)
            for size, point in of_method.groupby("head_dim"):
                shape = {"linestyle": "none", "markersize": sizes[float(str(size))]}
                axis.plot(point["throughput"], point["error"], **look.line() | shape)
        of_step = rows[rows["step"] == step]
        axis.set_xlim(0, 1.15 * max(of_step["throughput"].max(), 1))
        axis.set_ylim(0, 1.25 * max(rows["error"].max(), 1e-9))
    order = ", ".join(f"{size:g}" for size in sizes)
    note = f"Heads of {order}, from small to large points. Error against float64 at 2048 tokens."
    style.finish(figure, [look.handle() for look in looks.values()], note)
    return figure


def chart(table: pd.DataFrame) -> Chart:
    """Return the interactive figure."""
    rows = _points(table)
    looks = legend.looks(rows)
    groups = []
    for size, of_size in rows.groupby("head_dim"):
        panels = []
        for step, text in kernel.STEPS.items():
            of_step = of_size[of_size["step"] == step]
            errors = {method: intervals.method(of_step, method).set_index("throughput")["error"] for method in looks}
            points = charts.bare(errors, looks)
            panel = Lines(
                title=kernel.NAMES[step],
                x=text,
                y="relative error",
                lines=points,
                octaves=False,
                joined=False,
                from_zero=True,
            )
            panels += [panel] if points else []
        groups.append(Group(f"Heads of size {size:g}", panels))
    sentence = (
        "Relative error of the output against float64 at 2048 tokens (1 is all wrong), by throughput in TFLOP/s at the "
        "longest sequence. Down and right is better."
    )
    return Chart("Error of attention kernels", sentence, groups, "Medians of timings.")


def _points(table: pd.DataFrame) -> pd.DataFrame:
    keys = ["attention", "options", "step", "head_dim", "queries"]
    speed = kernel.dense(table, "throughput")[[*keys, "value"]].rename(columns={"value": "throughput"})
    error = kernel.dense(table, "relative_error")[[*keys, "value"]].rename(columns={"value": "error"})
    rows = speed.merge(error, on=keys)
    if rows.empty:
        raise NothingToDraw("no rows with the metrics throughput and relative_error of whole sequences")
    return rows[rows["queries"] == rows.groupby(["attention", "options", "step"])["queries"].transform("max")]
