"""Time that block skipping saves on a trained model, from skipping.csv: milliseconds in all layers by tokens.

A row of panels for each model: a whole sequence forward, then forward and backward, then decoding one token with a
cache, for one sequence and for a batch.
"""

from string import ascii_uppercase

import pandas as pd
from matplotlib.figure import Figure

from sbeval.errors import NothingToDraw
from sbeval.plots import chart as charts
from sbeval.plots import legend, style
from sbeval.plots.chart import Chart, Group, Lines
from sbeval.tables import intervals

TABLE = "skipping"
COLUMNS = (
    "model",
    "params",
    "attention",
    "backend",
    "metric",
    "value",
    "step",
    "batch",
    "keys",
    "layer",
    "epsilon",
    "device",
)
# times that differ by more than this factor are drawn on a logarithmic axis
WIDE = 4
LABELS = {
    "forward": ("tokens", "forward (ms)"),
    "forward_backward": ("tokens", "forward + backward (ms)"),
    "decode": ("keys in the cache", "one token (ms)"),
}


def draw(table: pd.DataFrame) -> Figure:
    """Draw time by tokens, a line for each kernel."""
    rows = totals(table)
    looks = legend.looks(rows)
    groups, panels = _models(rows), _panels(rows)
    figure, axes = style.grid(len(groups), len(panels), share_y=False)
    for line, (title, of_model) in zip(axes, groups, strict=True):
        style.title(line[0], title)
        for axis, (step, batch) in zip(line, panels, strict=True):
            style.label(axis, *LABELS[step])
            style.subtitle(axis, _name(step, batch))
            chosen = of_model[(of_model["step"] == step) & (of_model["batch"] == batch)]
            for method, look in looks.items():
                of_method = intervals.method(chosen, method)
                axis.plot(of_method["keys"], of_method["value"], **look.line())
            style.octaves(axis, chosen["keys"].min(), chosen["keys"].max(), chosen["keys"].max(), most=4)
            if _wide(chosen):
                style.decades(axis)
            else:
                axis.set_ylim(bottom=0)
    style.finish(figure, [look.handle() for look in looks.values()], _note(rows))
    return figure


def chart(table: pd.DataFrame) -> Chart:
    """Return the interactive figure."""
    rows = totals(table)
    looks = legend.looks(rows)
    groups = []
    for title, of_model in _models(rows):
        panels = []
        for step, batch in _panels(of_model):
            chosen = of_model[(of_model["step"] == step) & (of_model["batch"] == batch)]
            times = {method: intervals.method(chosen, method).set_index("keys")["value"] for method in looks}
            x, y = LABELS[step]
            lines = charts.bare(times, looks)
            panels.append(Lines(title=_name(step, batch), x=x, y=y, lines=lines, decades=_wide(chosen)))
        groups.append(Group(title, panels))
    sentence = (
        "Milliseconds of attention in all layers of a trained model, on its own queries, keys and values: how much "
        "time is saved by stopping where no mass remains? Lower is better."
    )
    return Chart("Block skipping on a trained model", sentence, groups, _note(rows))


def totals(table: pd.DataFrame) -> pd.DataFrame:
    """Return the time in all layers of each kernel, by keys; `options` is `skipping`, or the backend if not ours."""
    rows = table[table["metric"] == "time"]
    if rows.empty:
        raise NothingToDraw("no rows with the metric time")
    skips = rows["epsilon"].fillna(0) > 0
    others = rows["backend"].where(~rows["backend"].str.startswith("triton"), "")
    rows = rows.assign(options=others.where(~skips, "skipping"))
    by = ["model", "params", "attention", "options", "step", "batch", "keys", "device"]
    return rows.groupby(by)["value"].sum().reset_index().sort_values("keys")


def _models(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Return title and rows of each model; several have letters, which the note explains."""
    groups = list(rows.groupby("model"))
    names = [f"model {letter}" for letter in ascii_uppercase] if len(groups) > 1 else ["a model"]
    return [
        (f"All layers of {name} of {part['params'].iloc[0] / 1e6:.0f} M parameters", part)
        for name, (_, part) in zip(names, groups, strict=False)
    ]


def _panels(rows: pd.DataFrame) -> list[tuple[str, int]]:
    """Return step and batch of each panel, whole sequences first."""
    order = list(LABELS)
    return sorted({*zip(rows["step"], rows["batch"], strict=True)}, key=lambda panel: (order.index(panel[0]), panel[1]))


def _name(step: str, batch: int) -> str:
    if step == "decode":
        return f"decoding, batch {batch}"
    return "a whole sequence" if step == "forward" else "a whole sequence, with backward"


def _wide(rows: pd.DataFrame) -> bool:
    return bool(rows["value"].max() > WIDE * rows["value"].min())


def _note(rows: pd.DataFrame) -> str:
    names = sorted(rows["model"].unique())
    models = ", ".join(f"{letter} {name}" for letter, name in zip(ascii_uppercase, names, strict=False))
    which = f" Models by digest: {models}." if len(names) > 1 else ""
    return f"Medians; {', '.join(sorted(rows['device'].unique()))}.{which}"
