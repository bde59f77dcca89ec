"""The figures of README: figures 3, 4 and 5 of the paper as measured here, one panel each, for a third of a page,
needles found by depth and length, and losses of the same tokens with more context.

python -m sbeval.cli.documents      in a checkout, draws them anew from the tables
"""

from collections.abc import Callable
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sbeval.cli import documents_studies
from sbeval.plots import fixed_targets, legend, needle_depth, style
from sbeval.report.figures import SAVED
from sbeval.runtime.files import prepare, replacing
from sbeval.tables import intervals, selection
from sbeval.tables.results import Results
from sbeval.tables.statistics import Scale
from sbeval.tables.table import read

SIZE_IN = (3.4, 2.7)
# of the attention map: its models with the most seeds
FOLDERS = ("quick", "")
LENGTHS, RECALL = ("rope", "stick_breaking", "alibi", "sliding_window"), ("rope", "stick_breaking", "forgetting")
TARGETS = ("latest", "stale")


def figure3(results: Path, axes: Axes) -> None:
    """Draw accuracy of recall by number of pairs, at a vocabulary of 1024."""
    table = read(Results(results).table("mqrar"))
    same = (table["vocab_size"] == 1024) & (table["n_back"] == 1) & (table["max_steps"] == 6000)
    same &= (table["optimizer"] == "muon") & (table["positions"] == "none") & table["attention"].isin(RECALL)
    # the sweep of N-back has cells of one back too, with two heads and few keys
    same &= (table["heads"] == 1) & (table["key_pool"] == table["vocab_size"] / 2 - 1)
    rows = selection.recall_accuracy(table[same])
    _lines(axes, rows[rows["split"] == "all"], "kv_pairs", Scale.SHARE)
    style.ticks(axes, sorted(rows["kv_pairs"].unique()))
    style.shares(axes)
    style.label(axes, "key-value pairs", "accuracy of recall")


def figure4(results: Path, axes: Axes) -> None:
    """Draw the weight on the latest and on stale values, in the head that has the most on the latest."""
    folder = next(each for each in FOLDERS if Results(results / each).table("attention_map").exists())
    table = read(Results(results / folder).table("attention_map"))
    shares = table[table["metric"] == "share"]
    latest = shares[shares["target"] == "latest"]
    heads = latest.loc[latest.groupby("cell")["value"].idxmax(), ["cell", "layer", "head"]]
    points = intervals.points(shares[shares["target"].isin(TARGETS)].merge(heads), ["target"])
    looks = legend.looks(shares)
    for index, (method, look) in enumerate(looks.items()):
        mine = intervals.method(points, method).set_index("target").loc[list(TARGETS)]
        at = [place + 0.38 * (index - (len(looks) - 1) / 2) for place in range(len(TARGETS))]
        ends = [mine["mean"] - mine["low"], mine["high"] - mine["mean"]]
        bars = axes.bar(at, mine["mean"], width=0.36, color=look.colour, label=look.label.partition(" (")[0], yerr=ends)
        axes.bar_label(bars, fmt="%.2f", padding=1, fontsize=style.TEXT_PT)
    axes.set_xticks(range(len(TARGETS)), [f"{target} value" for target in TARGETS])
    axes.set_ylim(0, 1.1)
    style.label(axes, "where a key was assigned again", "attention weight")


def figure5(results: Path, axes: Axes) -> None:
    """Draw perplexity by context length, trained at 2048 tokens of books."""
    table = read(Results(results).table("length_gen"))
    chosen = table["attention"].isin(LENGTHS) & (table["options"] == "") & (table["train_len"] == 2048)
    rows = selection.by_context(table[chosen & (table["eval_len"] == 65536)])
    _lines(axes, rows, "x", Scale.LOG)
    axes.set_yscale("log")
    axes.set_yticks(ticks := [50, 100, 200], [f"{tick}" for tick in ticks])
    axes.set_yticks([], minor=True)
    style.ticks(axes, [512, 2048, 8192, 32768])
    style.training_length(axes, 2048)
    style.label(axes, "context length (tokens)", "perplexity")


def _lines(axes: Axes, rows: pd.DataFrame, x: str, scale: Scale) -> None:
    points = intervals.points(rows, [x], scale)
    for method, look in legend.looks(rows).items():
        mine = intervals.method(points, method)
        axes.plot(mine[x], mine["mean"], label=look.label.partition(" (")[0], **look.line())
        axes.fill_between(mine[x], mine["low"], mine["high"], color=look.colour, alpha=0.2, linewidth=0)


FIGURES: dict[str, Callable[[Path, Axes], None]] = {"figure3": figure3, "figure4": figure4, "figure5": figure5}


def distant_text(results: Path) -> Figure:
    """Draw the loss of the same tokens by the context they are given, after as many training tokens for each method."""
    rows = documents_studies.distant_text(results)
    rows = rows[rows["attention"] != "nope"]
    return fixed_targets.draw(fixed_targets.gather(rows, results / "tokens"))


def needles(results: Path) -> Figure:
    """Draw the score by depth and length, of the tasks that every method was fine-tuned on and solved."""
    return needle_depth.draw(documents_studies.solved_needles(results))


# figures of the page's width
WIDE: dict[str, Callable[[Path], Figure]] = {"needles": needles, "distant_text": distant_text}


def draw(results: Path, folder: Path) -> list[Path]:
    """Draw the figures into a folder and return the files."""
    files = []
    for name, panel in FIGURES.items():
        with matplotlib.rc_context({"text.parse_math": False, "font.size": style.TEXT_PT + 1}):
            figure = Figure(figsize=SIZE_IN, layout="constrained")
            axes = figure.subplots()
            axes.spines[["top", "right"]].set_visible(False)
            panel(results, axes)
            figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=style.TEXT_PT)
            files.append(_save(figure, folder, name))
    return [*files, *(_save(wide(results), folder, name) for name, wide in WIDE.items())]


def _save(figure: Figure, folder: Path, name: str) -> Path:
    file = prepare(folder) / f"{name}.png"
    with replacing(file) as temporary:
        figure.savefig(temporary, format="png", **SAVED["png"])
    return file
