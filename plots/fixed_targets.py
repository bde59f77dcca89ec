"""Loss of the same tokens by how much context they are given: does a method use distant text?

The targets are the last tokens of each long window. Perplexity over the first l tokens, which `length_gen` draws, also
falls where a text's beginning is harder than its rest; here only the context changes.

Two panels a setting: the loss, and beside it the change of the loss from that with the training length of context, past
that length. The change is paired by document: its band has no part of what makes one document harder than another, by
which the losses of all methods vary together. So losses have bands only where no change can be drawn. A thin line is
the change with another document's text further back than the training length: what is not due to the text itself.
"""

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sbeval.errors import InputError
from sbeval.plots import chart as charts
from sbeval.plots import legend, style
from sbeval.plots.chart import Chart, Group, Lines
from sbeval.tables import documents, intervals, values
from sbeval.tables.results import Results
from sbeval.tables.rows import Method
from sbeval.tables.selection import LENGTH_GEN, length_gen_setting

TABLE = "length_gen"
METRIC = "loss_fixed_targets"
UNRELATED = f"{METRIC}_unrelated"
COLUMNS = ("attention", "options", "seed", "metric", "value", "stderr", *LENGTH_GEN.columns, "context_length")
X = "context given (tokens)"
LOSS, CHANGE = "loss (nats)", "change of the loss (nats)"
NAMES = {LOSS: "the same tokens", CHANGE: "past the training length"}
# where panels end: nats above the best method's last loss, and above no change
SHOWN = {LOSS: 0.5, CHANGE: 0.02}


def gather(table: pd.DataFrame, results_dir: Path) -> pd.DataFrame:
    """Return the rows of fixed targets, with standard errors of their changes, in column `paired`, over documents."""
    rows = table[table["metric"].isin([METRIC, UNRELATED])].assign(paired=float("nan"))
    own = rows[rows["metric"] == METRIC]
    if own.empty or not {"cell", "targets"} <= {*own}:
        return rows
    stored = values.read(Results(results_dir), own["cell"])
    if stored.empty or "targets" not in stored:
        return rows
    stored = stored[stored["metric"].isin(["nll_sum", "tokens"]) & stored["targets"].isin(own["targets"])]
    stored = documents.only(stored, "targets", "context_length")
    errors = [_paired(stored[stored["cell"] == cell], of) for cell, of in own.groupby("cell", sort=False)]
    return rows.assign(paired=pd.concat(errors).reindex(rows.index))


def _paired(stored: pd.DataFrame, rows: pd.DataFrame) -> "pd.Series[float]":
    """Return the standard error over documents of each row's change; NaN where values are not stored."""
    each = stored.groupby(["metric", "targets", "context_length"])
    sums = {key: of.groupby("unit_id")["value"].sum() for key, of in each}
    errors = {}
    for index, targets, length, trained in rows[["targets", "context_length", "train_len"]].itertuples(name=None):
        wanted = ("nll_sum", targets, length), ("nll_sum", targets, trained), ("tokens", targets, length)
        if all(key in sums for key in wanted):
            here, there, tokens = (sums[key] for key in wanted)
            errors[index] = ((here - there) / tokens).sem()
    return pd.Series(errors, rows.index, dtype="float64")


def has_rows(table: pd.DataFrame) -> bool:
    """Return whether fixed targets were measured: `--fixed-targets` is an option."""
    return bool((table["metric"] == METRIC).any())


def draw(rows: pd.DataFrame) -> Figure:
    """Draw the mean loss of the targets by the context they are given, and its change, a method each."""
    settings, looks = _settings(rows), legend.looks(rows)
    figure, axes = style.pairs(len(settings))
    spreads: list[pd.DataFrame] = []
    beyond: dict[str, None] = {}
    for (title, panels), of_row in zip(settings, axes, strict=True):
        style.title(of_row[0], title)
        for axis, (y, of) in zip(of_row, panels.items(), strict=False):
            points = intervals.points(of, ["x"])
            last = y == [*panels][-1]
            beyond |= dict.fromkeys(_lines(axis, points, looks, _top(y, of), bands=last))
            if y == CHANGE:
                _thin(axis, of, looks)
            train_len = int(of["train_len"].iloc[0])
            style.octaves(axis, of["x"].min(), of["x"].max(), train_len, most=6)
            style.training_length(axis, train_len)
            style.label(axis, X, y)
            style.subtitle(axis, NAMES[y])
            spreads += [points] if last else []
        if len(panels) < len(of_row):
            of_row[-1].set_axis_off()
    note = intervals.explain(spreads, "bands", "documents") + style.leaving(beyond)
    if (rows["metric"] == UNRELATED).any():
        note += " Thin lines: with another document's text past the training length."
    note = style.with_caution(note, rows, looks)
    style.finish(figure, [*(look.handle() for look in looks.values()), style.training_length_handle()], note)
    return figure


def _top(y: str, rows: pd.DataFrame) -> float:
    """Return where a panel ends, so that a method that diverges flattens no other."""
    best = float(rows.loc[rows["x"] == rows["x"].max(), "value"].min()) if y == LOSS else 0.0
    return min(best + SHOWN[y], float(rows["value"].max()) + 0.1 * SHOWN[y])


def _lines(axis: Axes, points: pd.DataFrame, looks: dict[Method, legend.Look], top: float, *, bands: bool) -> list[str]:
    """Draw a line and, if `bands`, a band for each method, up to `top`; return the labels of those that leave it."""
    beyond = []
    low = float("inf")
    for method, look in looks.items():
        if (mine := intervals.method(points, method)).empty:
            continue
        axis.plot(mine["x"], mine["mean"], label=look.label, **look.line())
        inside = mine["mean"].max() <= top
        if inside and bands:
            axis.fill_between(mine["x"], mine["low"], mine["high"], color=look.colour, alpha=0.2, linewidth=0)
        if inside:
            style.seeds(axis, mine["x"], mine, look)
        else:
            beyond.append(look.label)
        low = min(low, float(mine["low" if inside and bands else "mean"].min()))
    axis.set_ylim(low - 0.05 * (top - low), top)
    return beyond


def _thin(axis: Axes, rows: pd.DataFrame, looks: dict[Method, legend.Look]) -> None:
    """Draw the change with another document's text of the methods that have it: the mean over all seeds, and above it
    what the other text costs those that were given it."""
    for method, look in looks.items():
        mine = intervals.method(rows, method)
        if mine.dropna(subset="other")["x"].nunique() > 1:
            more = (mine["other"] - mine["value"]).groupby(mine["x"]).mean()
            means = (mine.groupby("x")["value"].mean() + more).dropna()
            axis.plot(means.index, means, color=look.colour, linewidth=0.8, alpha=0.8)


def chart(rows: pd.DataFrame) -> Chart:
    """Return the interactive figure."""
    settings, looks = _settings(rows), legend.looks(rows)
    groups = [Group(title, [_panel(y, of, looks) for y, of in panels.items()]) for title, panels in settings]
    counts = rows["targets"].dropna().unique()
    tokens = f"the last {int(counts[0])} tokens" if len(counts) == 1 else "the last tokens"
    sentence = (
        f"Mean loss, in nats per token, of {tokens} of long windows, given more and more of the text before them, and "
        "its change past the training length. A line that stays level past a length uses nothing further away; one "
        "that rises is confused by it. Lower is better."
    )
    note = intervals.explain(charts.spreads(groups), "bands", "documents")
    return Chart("Loss of fixed targets", sentence, groups, style.with_caution(note, rows, looks))


def _panel(y: str, rows: pd.DataFrame, looks: dict[Method, legend.Look]) -> Lines:
    marks = [int(rows["train_len"].iloc[0])]
    return Lines(title=NAMES[y], x=X, y=y, lines=charts.lines(rows, looks), marks=marks, top=_top(y, rows))


def _settings(rows: pd.DataFrame) -> list[tuple[str, dict[str, pd.DataFrame]]]:
    """Return the title of each setting and the rows of its panels, by their y: without longer contexts no change."""
    unrelated, rows = rows[rows["metric"] == UNRELATED], rows[rows["metric"] == METRIC]
    if rows.empty:
        raise InputError(f"there are no rows with metric {METRIC!r} to draw: --fixed-targets measures them")
    if "targets" not in rows:
        raise InputError(f"rows with metric {METRIC!r} have no column 'targets'")
    length = rows["context_length"].astype(float)
    rows = rows.assign(x=length, value=rows["value"].astype(float), other=_others(rows, unrelated))
    setting = length_gen_setting(rows)
    # the losses of other targets are of another level
    panels = style.panels(rows, setting.always, [*setting.others, "targets"])
    return [(title, {LOSS: of} | ({} if (less := changes(of)).empty else {CHANGE: less})) for title, of in panels]


def _others(rows: pd.DataFrame, unrelated: pd.DataFrame) -> "pd.Series[float]":
    """Return for each row the loss of the same model and context with another document's text; NaN without."""
    if "cell" not in rows:
        return pd.Series(float("nan"), rows.index)
    keys = ["cell", "context_length", "targets"]
    found = unrelated.set_index(keys)["value"].astype(float)
    return pd.Series(found.reindex(pd.MultiIndex.from_frame(rows[keys])).to_numpy(), rows.index)


def changes(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the losses of a setting minus those with the training length of context, from that length on."""
    model = ["attention", "options", "seed", "targets"]
    at = rows["x"] == rows["train_len"].astype(float)
    reference = rows.loc[at, [*model, "value"]].rename(columns={"value": "reference"})
    both = rows[rows["x"] >= rows["train_len"].astype(float)].merge(reference, on=model)
    # with the training length of context there is nothing of another document
    other = both["other"].where(both["x"] > both["train_len"].astype(float), both["value"]) - both["reference"]
    both = both.assign(value=both["value"] - both["reference"], other=other, stderr=both["paired"])
    return both if both["x"].nunique() > 1 else both[:0]
