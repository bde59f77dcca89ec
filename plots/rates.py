"""Loss at the training length by peak learning rate: is each method compared at its best rate, or at another's?

A row a setting, and in it a panel for each optimizer, batch and schedule that has several rates. Points are seeds,
lines the means of those that all rates of a method have.
"""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sbeval.errors import InputError
from sbeval.plots import chart as charts
from sbeval.plots import legend, style
from sbeval.plots.chart import Chart, Group, Lines
from sbeval.tables import intervals
from sbeval.tables.rows import Method
from sbeval.tables.selection import LENGTH_GEN, RECIPE, at_training_length, of_shared_seeds

TABLE = "length_gen"
COLUMNS = ("attention", "options", "seed", "metric", "value", "context_length", *LENGTH_GEN.columns)
OTHERS = tuple(name for name in RECIPE if name != "lr")
OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon"}
X, Y = "peak learning rate", "loss (nats per token)"
# a panel ends so many nats above the lowest loss of its setting: a rate that diverges flattens no other
SHOWN = 0.6
# title, and rows by the name of a panel
Settings = list[tuple[str, dict[str, pd.DataFrame]]]


def has_rows(table: pd.DataFrame) -> bool:
    """Return whether the table has several rates in one setting: most have one."""
    return bool(_settings(table))


def draw(table: pd.DataFrame) -> Figure:
    """Draw loss by learning rate, a method each."""
    settings, looks = _some(table)
    columns = max(len(panels) for _, panels in settings)
    figure, axes = style.grid(len(settings), columns)
    figure.set_figwidth(max(figure.get_figwidth(), style.WIDTH_IN * 3 / 4))
    beyond: dict[str, None] = {}
    for (title, panels), of_row in zip(settings, axes, strict=True):
        style.title(of_row[0], title)
        best = min(float(rows["loss"].min()) for rows in panels.values())
        for axis, (name, rows) in zip(of_row, panels.items(), strict=False):
            style.subtitle(axis, name)
            style.label(axis, X, Y if axis is of_row[0] else "")
            for method, look in looks.items():
                highest = _line(axis, intervals.method(rows, method), look)
                beyond |= {look.label: None} if highest > best + SHOWN else {}
            _rates(axis, sorted(rows["lr"].unique()))
        highest = max(float(rows["loss"].max()) for rows in panels.values())
        of_row[0].set_ylim(best - 0.03, min(highest, best + SHOWN) + 0.03)
        for axis in of_row[len(panels) :]:
            axis.set_axis_off()
    style.finish(figure, [look.handle() for look in looks.values()], _note(settings) + style.leaving(beyond))
    return figure


def chart(table: pd.DataFrame) -> Chart:
    """Return the interactive figure."""
    settings, looks = _some(table)
    groups = []
    for title, of_setting in settings:
        panels = []
        for name, rows in of_setting.items():
            means: dict[Method, pd.Series[float]] = {of: _means(intervals.method(rows, of)) for of in looks}
            panels.append(Lines(title=name, x=X, y=Y, lines=charts.bare(means, looks)))
        groups.append(Group(title, panels))
    sentence = (
        "Mean loss over test documents at the training length, in nats per token, by peak learning rate. A method "
        "whose line still falls at the end has not been given its best rate. Lower is better."
    )
    return Chart("Loss by learning rate", sentence, groups, _note(settings))


def _some(table: pd.DataFrame) -> tuple[Settings, dict[Method, legend.Look]]:
    if not (settings := _settings(table)):
        raise InputError("there are no models that differ in their learning rate alone")
    return settings, legend.looks(pd.concat([rows for _, panels in settings for rows in panels.values()]))


def _settings(table: pd.DataFrame) -> Settings:
    """Return the panels with several rates of each setting; column `loss` is the logarithm of perplexity."""
    if not {"lr", *LENGTH_GEN.always, *OTHERS} <= set(table):
        return []
    # given models have no rate; a column without any number is text
    trained = pd.to_numeric(table["lr"], errors="coerce").notna()
    rows = at_training_length(table[trained])
    if rows.empty:
        return []
    rows = rows.assign(loss=np.log(rows["value"].astype(float)))
    found = []
    for title, of_setting in style.panels(rows, LENGTH_GEN.always, LENGTH_GEN.others):
        panels = {name: of_panel for name, of_panel in recipes(of_setting) if of_panel["lr"].nunique() > 1}
        found += [(title, panels)] if panels else []
    return found


def recipes(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Return name and rows of each optimizer, batch and schedule; larger batches, which have fewer steps, first."""
    parts = rows.groupby([-rows["batch_tokens"].astype(int), *OTHERS])
    return [(_recipe(part, rows["schedule"].nunique()), part) for _, part in parts]


def _recipe(rows: pd.DataFrame, schedules: int) -> str:
    """Name the optimizer, the tokens of a step, and the schedule if there are several."""
    optimizer, batch, schedule = (rows[name].iloc[0] for name in ("optimizer", "batch_tokens", "schedule"))
    name = f"{OPTIMIZERS.get(optimizer, optimizer)}, {int(batch):,} tokens a step"
    return f"{name}, {schedule}" if schedules > 1 else name


def _means(rows: pd.DataFrame) -> "pd.Series[float]":
    """Return the mean loss of a method by learning rate, over the seeds that all rates have."""
    return of_shared_seeds(rows.pivot_table("loss", "seed", "lr")).mean()


def _line(axis: Axes, rows: pd.DataFrame, look: legend.Look) -> float:
    """Draw the line of a method and its seeds; return the highest mean."""
    means = _means(rows)
    line = look.line()
    axis.plot(means.index, means, label=look.label, **(line | {"marker": ""}))
    axis.plot(rows["lr"], rows["loss"], **(line | {"linestyle": "none"}))
    return float(means.max()) if len(means) else -np.inf


def _rates(axis: Axes, rates: list[float]) -> None:
    """Make x logarithmic, with the rates as its labels."""
    axis.set_xscale("log")
    axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axis.minorticks_off()


def _note(settings: Settings) -> str:
    seeds = max(intervals.most_seeds(rows) for _, panels in settings for rows in panels.values())
    several = f"Points: up to {seeds} seeds; lines: means of those at all rates."
    return "Points: one seed each." if seeds == 1 else several
