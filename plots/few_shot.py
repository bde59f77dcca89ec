"""Few-shot scores: the score of each benchmark by method with its interval, beside the score of guessing."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from sbeval.errors import NothingToDraw
from sbeval.plots import chart as charts
from sbeval.plots import legend, style
from sbeval.plots.chart import Chart, Group, Lines
from sbeval.tables import few_shot, intervals
from sbeval.tables.rows import Method

TABLE = "few_shot"
COLUMNS = few_shot.COLUMNS
# height of a benchmark
ROW_IN = 0.34
GUESSING = legend.Look("guessing", charts.GREY, "p", ())


def draw(table: pd.DataFrame) -> Figure:
    """Draw a line of each benchmark in percent, one panel for each model, training length and corpus.

    A tick marks the score of guessing. A score whose interval includes it is no evidence.
    """
    chosen = _percent(table)
    looks = legend.looks(chosen)
    panels = _panels(chosen)
    counts = [rows["benchmark"].nunique() for _, rows in panels]
    layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06)
    figure = Figure(figsize=(style.WIDTH_IN, ROW_IN * sum(counts) + 0.8 * len(counts) + 0.6), layout=layout)
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=counts)[:, 0]
    spreads = []
    for (title, rows), axis in zip(panels, axes, strict=True):
        style.title(axis, title)
        spreads += _panel(axis, rows, looks)
    guess = Line2D([], [], label="guessing", color=style.MARK, marker="|", markersize=10, linestyle="")
    note = f"{intervals.explain(spreads, 'bars', 'items')} In brackets: examples in the prompt."
    note = style.with_caution(note, chosen, looks)
    style.finish(figure, [*(_handle(look) for look in looks.values()), guess], note)
    return figure


def chart(table: pd.DataFrame) -> Chart:
    """Return the interactive figure."""
    chosen = _percent(table)
    looks = legend.looks(chosen)
    groups: list[Group] = []
    spreads: list[pd.DataFrame] = []
    for title, rows in _panels(chosen):
        names = [f"{row.benchmark} {row.metric}" for row in rows.itertuples()]
        lines = charts.lines(rows.assign(benchmark=names), looks, by="benchmark")
        spreads += [line.points for line in lines]
        guess = rows.assign(x=names).groupby("x", as_index=False)["chance"].first().dropna()
        if len(guess):
            guess = guess.assign(mean=guess["chance"], low=guess["chance"], high=guess["chance"], seeds=1)
            lines.append(charts.Line(GUESSING, guess))
        groups.append(Group(title, [Lines(title="", x="benchmark", y="score (%)", lines=lines, across=True)]))
    sentence = (
        "Score in percent of each benchmark (examples in the prompt in brackets) beside that of guessing; a score "
        "whose interval includes that of guessing is no evidence. Higher is better."
    )
    note = style.with_caution(intervals.explain(spreads, "bars", "items"), chosen, looks)
    return Chart("Few-shot benchmarks", sentence, groups, note)


def _percent(table: pd.DataFrame) -> pd.DataFrame:
    """Return the scores to draw, in percent."""
    chosen = few_shot.headline(table)
    chosen = chosen[[few_shot.METRICS[metric] for metric in chosen["metric"]]]
    if chosen.empty:
        raise NothingToDraw("there are no scores in percent to draw")
    # a model of another library is its own method
    chosen = chosen.assign(
        options=chosen["options"].where(chosen["attention"] != "hf", chosen["model"]),
        model=chosen["model"].where(chosen["attention"] != "hf", ""),
    )
    chosen[["value", "stderr", "chance"]] *= 100
    return chosen


def _panels(chosen: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    return style.panels(chosen, ("model", "train_len", "corpus"), ("train_tokens", "eval_len", "preset"))


def _panel(axis: Axes, rows: pd.DataFrame, looks: dict[Method, legend.Look]) -> list[pd.DataFrame]:
    benchmarks = list(dict.fromkeys(rows.sort_values(["task", "shots"])["benchmark"]))
    heights = {name: index for index, name in enumerate(benchmarks)}
    points = intervals.points(rows, ["benchmark"])
    spreads = []
    for index, (method, look) in enumerate(looks.items()):
        spread = intervals.method(points, method)
        if spread.empty:
            continue
        y = [heights[name] + 0.6 * ((index + 0.5) / len(looks) - 0.5) for name in spread["benchmark"]]
        bars = [spread["mean"] - spread["low"], spread["high"] - spread["mean"]]
        axis.errorbar(
            spread["mean"],
            y,
            xerr=bars,
            label=look.label,
            color=look.colour,
            marker=look.marker,
            markersize=4,
            linestyle="",
            linewidth=1.2,
        )
        spreads.append(spread)
    for name, group in rows.groupby("benchmark"):
        if group["chance"].notna().any():
            middle = heights[str(name)]
            axis.vlines(group["chance"].iloc[0], middle - 0.4, middle + 0.4, color=style.MARK, linewidth=1.2, zorder=1)
    metrics = rows.drop_duplicates("benchmark").set_index("benchmark")["metric"]
    axis.set_yticks(range(len(benchmarks)), [f"{name} {metrics[name]}" for name in benchmarks])
    axis.set_ylim(len(benchmarks) - 0.5, -0.5)
    style.label(axis, "score (%)", "")
    axis.tick_params(labelsize=style.TEXT_PT)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(True, axis="x", color="0.9", linewidth=0.6)
    axis.set_axisbelow(True)
    return spreads


def _handle(look: legend.Look) -> Line2D:
    return Line2D([], [], label=look.label, color=look.colour, marker=look.marker, markersize=4, linewidth=1.2)
