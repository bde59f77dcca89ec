"""What block skipping saves on a trained model, from skipping.csv: milliseconds in all layers against tokens.

A row of panels a model: a whole sequence forward, then decoding one token against a cache, one sequence and a batch.
"""

import pandas as pd
from matplotlib.figure import Figure

from sbeval.errors import InputError
from sbeval.plots import style

TABLE = "skipping"
COLUMNS = (
    "model", "params", "attention", "backend", "metric", "value", "step", "batch", "keys", "layer", "epsilon", "device",
)  # fmt: skip
# times further apart than this are drawn on a logarithmic axis
WIDE = 4


def totals(table: pd.DataFrame) -> pd.DataFrame:
    """Time in all layers of each contender; `options` tells skipping and whose kernel apart."""
    rows = table[table["metric"] == "time"]
    skips = rows["epsilon"].fillna(0) > 0
    rows = rows.assign(options=rows["backend"].where(~skips, "skipping"))
    by = ["model", "params", "attention", "options", "step", "batch", "keys", "device"]
    return rows.groupby(by)["value"].sum().reset_index()


def draw(table: pd.DataFrame) -> Figure:
    """Draw time against tokens, one line a kernel."""
    rows = totals(table)
    if rows.empty:
        raise InputError("no rows with the metric time")
    looks = style.looks(rows)
    models, panels = (
        sorted(rows["model"].unique()),
        sorted({*zip(rows["step"], rows["batch"], strict=True)}, key=_order),
    )
    figure, axes = style.grid(len(models), len(panels), share_y=False)
    for line, model in zip(axes, models, strict=True):
        params = rows.loc[rows["model"] == model, "params"].iloc[0]
        style.heading(line[0], f"All layers of a model of {params / 1e6:.0f} M parameters ({model})", len(panels))
        for axis, (step, batch) in zip(line, panels, strict=True):
            text = "forward" if step == "forward" else "one token"
            style.label(axis, "tokens" if step == "forward" else "keys in the cache", f"{text} (ms)")
            style.subtitle(axis, "a whole sequence" if step == "forward" else f"decoding, batch {batch}")
            chosen = rows[(rows["model"] == model) & (rows["step"] == step) & (rows["batch"] == batch)]
            for method, look in looks.items():
                of_method = style.method(chosen, method).sort_values("keys")
                axis.plot(of_method["keys"], of_method["value"], **look.line())
            style.octaves(axis, chosen["keys"].min(), chosen["keys"].max(), chosen["keys"].max(), most=4)
            if chosen["value"].max() > WIDE * chosen["value"].min():
                style.decades(axis)
            else:
                axis.set_ylim(bottom=0)
    handles = [look.handle() for look in looks.values()]
    note = f"Medians; on the model's own queries, keys and values. {', '.join(sorted(rows['device'].unique()))}."
    style.finish(figure, handles, note)
    return figure


def _order(panel: tuple[str, int]) -> tuple[bool, int]:
    step, batch = panel
    return step != "forward", batch
