"""Learning curves: held-out loss by training tokens, and below it the gap of means to RoPE at the same tokens.

One panel of each a setting. The curves are those of training, results/curves/<cell>.parquet, of the models in the table
that measured a held-out loss. Methods that are options of evaluation alone share a model, which is drawn once; of the
branches of a training with schedule wsd the longest is, and those as long as another seed's longest.
"""

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sbeval.errors import NothingToDraw
from sbeval.plots import chart as charts
from sbeval.plots import legend, style
from sbeval.plots.chart import Chart, Group, Lines
from sbeval.tables import curves, intervals
from sbeval.tables.results import Results
from sbeval.tables.rows import ROPE, Method
from sbeval.tables.selection import LENGTH_GEN, RECIPE

TABLE = "length_gen"
METRIC = "held_out_loss"
COLUMNS = ("attention", "options", "seed", "cell", *LENGTH_GEN.columns)
# what a model is evaluated on makes no other training of it
OTHERS = tuple(name for name in (*LENGTH_GEN.others, *RECIPE) if name not in ("task", "eval_len"))
X, LOSS, GAP = "training tokens", "held-out loss (nats per token)", "loss minus RoPE's (nats per token)"
NAMES = {LOSS: "held-out loss", GAP: "gap to RoPE"}
# a line with more points than this has markers on some of them only
MARKED = 12


def gather(table: pd.DataFrame, results_dir: Path) -> pd.DataFrame:
    """Return the held-out losses of the models in a table, in column `value` by training tokens, column `x`."""
    of = ["cell", "attention", "options", "seed", *LENGTH_GEN.always, *(name for name in OTHERS if name in table)]
    cells = table[of].drop_duplicates("cell")
    read = curves.read(Results(results_dir), cells["cell"])
    read["last"] = read.groupby("cell")["step"].transform("max")
    rows = read[read["metric"] == METRIC].merge(cells, on="cell")
    tokens = rows["train_tokens"].astype(float) * rows["step"].astype(float) / rows["last"].astype(float)
    return _longest(_trained(rows.assign(x=tokens, value=rows["value"].astype(float), stderr=float("nan"))))


def _longest(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows without branches of a training with schedule wsd that has a longer one, which begins as they,
    unless they end where another seed of the method does."""
    if "schedule" not in rows:
        return rows
    recipe = [name for name in (*LENGTH_GEN.always, *OTHERS) if name in rows and name != "train_tokens"]
    method = ["attention", "options", *recipe]
    most = rows.groupby([*method, "seed"], dropna=False)["train_tokens"].transform("max")
    ends = rows[method].assign(train_tokens=most).drop_duplicates()
    found = rows.merge(ends, how="left", indicator="end")
    return found[(found["schedule"] != "wsd") | (found["end"] == "both")].drop(columns="end")


def _trained(rows: pd.DataFrame) -> pd.DataFrame:
    """Of cells with one training, which have the same curve, keep the first method's."""
    first: dict[tuple[object, ...], str] = {}
    for cell, curve in rows.sort_values(["options", "cell"], kind="stable").groupby("cell", sort=False):
        of = curve.iloc[0]
        training = (of["attention"], of["seed"], of["train_len"], *zip(curve["step"], curve["value"], strict=True))
        first.setdefault(training, str(cell))
    return rows[rows["cell"].isin(first.values())]


def has_rows(rows: pd.DataFrame) -> bool:
    """Return whether several methods have held-out losses: older models have none, and one compares to nothing."""
    return rows.groupby(["attention", "options"]).ngroups > 1


def draw(rows: pd.DataFrame) -> Figure:
    """Draw losses, and gaps below them, a method each."""
    settings = _settings(rows)
    looks = legend.looks(rows)
    count = sum(len(panels) for _, panels in settings)
    figure, axes = style.grid(count, 1)
    figure.set_size_inches(style.WIDTH_IN * 3 / 4, style.ROW_IN * count + 1.0)
    below = iter(axis for (axis,) in axes)
    for title, panels in settings:
        # loss and gap have the same x
        drawn = [next(below) for _ in panels]
        style.title(drawn[0], title)
        for axis, (y, points) in zip(drawn, panels.items(), strict=True):
            _lines(axis, points, looks)
            style.label(axis, X if axis is drawn[-1] else "", y)
            axis.set_xlim(drawn[0].get_xlim())
            if y == GAP:
                axis.axhline(0, color=style.MARK, linewidth=1.0)
    style.finish(figure, [look.handle() for look in looks.values()], _note(settings))
    return figure


def chart(rows: pd.DataFrame) -> Chart:
    """Return the interactive figure."""
    looks, settings = legend.looks(rows), _settings(rows)
    groups = [
        Group(
            title,
            [
                Lines(title=NAMES[y], x=X, y=y, lines=charts.of_points(of, looks), counts=True)
                for y, of in panels.items()
            ],
        )
        for title, panels in settings
    ]
    sentence = (
        "Loss on held-out text during training, in nats per token, by training tokens, and minus RoPE's at the same "
        "tokens. A gap that still closes at the end is no ranking. Lower is better."
    )
    return Chart("Learning curves", sentence, groups, _note(settings))


def _settings(rows: pd.DataFrame) -> list[tuple[str, dict[str, pd.DataFrame]]]:
    """Return the title of each setting and the points of its panels, by their y; without RoPE there are no gaps."""
    if rows.empty:
        raise NothingToDraw("the models of these rows have no held-out losses during training")
    settings = style.panels(rows, LENGTH_GEN.always, [name for name in OTHERS if name in rows])
    found = []
    for title, measured in settings:
        of = curves.at_same_tokens(measured)
        less = intervals.gaps(of, ["x"], ROPE)
        found.append((title, {LOSS: intervals.points(of, ["x"])} | ({} if less.empty else {GAP: less})))
    return found


def _lines(axis: Axes, points: pd.DataFrame, looks: dict[Method, legend.Look]) -> None:
    """Draw a line and a band for each method."""
    for method, look in looks.items():
        if (mine := intervals.method(points, method)).empty:
            continue
        every = len(mine) // MARKED or 1
        axis.plot(mine["x"], mine["mean"], label=look.label, markevery=every, **look.line())
        axis.fill_between(mine["x"], mine["low"], mine["high"], color=look.colour, alpha=0.2, linewidth=0)
    style.counts(axis)


def _note(settings: list[tuple[str, dict[str, pd.DataFrame]]]) -> str:
    count = max(int(panels[LOSS]["seeds"].max()) for _, panels in settings)
    return "One seed." if count == 1 else f"Means of up to {count} seeds; bands: 95 % interval over seeds."
