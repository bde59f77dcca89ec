"""Tokens per second of whole models, from model.csv: optimizer steps on the left, evaluation on the right."""

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from sbeval.errors import NothingToDraw
from sbeval.plots import chart as charts
from sbeval.plots import legend, style
from sbeval.plots.chart import Chart, Group, Lines
from sbeval.tables import intervals
from sbeval.tables.rows import Method

TABLE = "model"
SETTING = ("batch", "queries", "head_dim", "dtype", "device")
COLUMNS = ("attention", "options", "backend", "model", "params", "metric", "value", "n", "step", *SETTING)
# kernels of softmax, of which a method may have run several
SOFTMAX = ("cudnn", "flash")
STEPS = {"train": "training (tokens/s)", "evaluate": "evaluation (tokens/s)"}


def draw(table: pd.DataFrame) -> Figure:
    """Draw throughput by size of the model, a row for each setting."""
    rows = _throughput(table)
    looks = legend.looks(rows)
    settings = _settings(rows)
    figure, axes = style.pairs(len(settings))
    for (title, of_setting), pair in zip(settings, axes, strict=True):
        style.title(pair[0], title)
        sizes = list(dict.fromkeys(of_setting["model"]))
        for axis, (step, text) in zip(pair, STEPS.items(), strict=True):
            style.label(axis, "model", text)
            for method, look in looks.items():
                line = _line(of_setting, step, method)
                axis.plot([sizes.index(size) for size in line.index], line, label=look.label, **look.line())
            axis.set_xticks(range(len(sizes)), sizes)
            axis.set_xlim(-0.5, len(sizes) - 0.5)
            # room for the whole markers
            axis.set_ylim(0, 1.1 * max(of_setting.loc[of_setting["step"] == step, "value"], default=1))
            axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    devices = ", ".join(sorted(rows["device"].unique()))
    style.finish(figure, [look.handle() for look in looks.values()], f"{_runs(rows)}; {devices}.")
    return figure


def chart(table: pd.DataFrame) -> Chart:
    """Return the interactive figure."""
    rows = _throughput(table)
    looks = legend.looks(rows)
    groups = []
    for title, of_setting in _settings(rows):
        panels = []
        sizes = list(dict.fromkeys(of_setting["model"]))
        for step, text in STEPS.items():
            name, speeds = text.partition(" (")[0], {method: _line(of_setting, step, method) for method in looks}
            if lines := charts.bare(speeds, looks):
                panels.append(Lines(title=name, x="model", y=text, lines=lines, names=sizes, from_zero=True))
        groups.append(Group(title, panels))
    sentence = "Tokens per second of whole models, in training and in evaluation, by size. Higher is better."
    return Chart("Speed of models", sentence, groups, f"{_runs(rows)}.")


def _throughput(table: pd.DataFrame) -> pd.DataFrame:
    rows = table[(table["metric"] == "throughput") & table["step"].isin(list(STEPS))]
    if rows.empty:
        raise NothingToDraw("there are no rows with metric 'throughput' of a model")
    named = rows["options"].fillna("").str.cat(rows["backend"], sep=",").str.strip(",")
    rows = rows.assign(options=rows["options"].mask(rows["backend"].isin(SOFTMAX), named))
    return rows.sort_values("params", kind="stable")


def _runs(rows: pd.DataFrame) -> str:
    most, least = int(rows["n"].max()), int(rows["n"].min())
    if most == 1:
        return "One run each"
    return f"Means of {most} runs" if least == most else f"Means of {least} to {most} runs"


def _settings(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    return [
        (f"{batch:g} sequence{'s' * (batch != 1)} of {queries:g} tokens, heads of {dim:g}, {dtype}, {device}", part)
        for (batch, queries, dim, dtype, device), part in rows.groupby(list(SETTING))
    ]


def _line(rows: pd.DataFrame, step: str, method: Method) -> "pd.Series[float]":
    """Return tokens per second by model, the smallest first."""
    return intervals.method(rows[rows["step"] == step], method).groupby("model", sort=False)["value"].max()
