"""Tables of studies in docs/results.md: gaps by training tokens, losses by learning rate, perplexities by context,
steps until recall is solved, and needles.

A study without what its table needs has a sentence in place of it.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pandas as pd

from sbeval.plots import legend
from sbeval.plots.rates import recipes
from sbeval.tables import curves, few_shot, intervals, markup, pairs, selection, tokens, values
from sbeval.tables.pairs import Stored
from sbeval.tables.results import Results
from sbeval.tables.rows import ROPE, STICK, Method
from sbeval.tables.statistics import Interval, Scale, size
from sbeval.tables.table import read

# heading of a table of perplexities
CONTEXT = "perplexity per token over the first l tokens, l ="
# contexts of a table, over the training length
CONTEXTS = (0.25, 1, 2, 8, 32)
# figures of a study of lengths
LENGTHS = {
    "length_gen": "Perplexity by context length",
    "fixed_targets": "Loss of the same tokens by the context given, and its change past the training length",
}


def of_study(
    study: str, write: Callable[[pd.DataFrame, Path], str], figures: Mapping[str, str], *, of: str = "length_gen"
) -> Callable[[Path], str]:
    """Return what writes the block of a study: its table, then the figures, by name with a description, that it has.

    of: the result table that `write` is given.
    """

    def block(results: Path) -> str:
        folder = results / study
        path = Results(folder).table(of)
        text = write(read(path, ["metric"]), folder) if path.exists() else ""
        if not text:
            return f"No results yet: `sbeval run {study}`."
        drawn = [name for name in figures if (Results(folder).figures / f"{name}.png").exists()]
        images = [
            f'<img src="../results/{study}/figures/{name}.png" width="75%" alt="{figures[name]}">' for name in drawn
        ]
        return "\n\n".join([text, *images])

    return block


def gaps(table: pd.DataFrame, folder: Path) -> str:
    """Write the gap of each method to RoPE by training tokens, and its fit; empty with a single token count."""
    found = tokens.ladders(table)
    if not found:
        return ""
    setting = max(found, key=lambda ladder: ladder.tokens[-1]).setting
    found = [ladder for ladder in found if ladder.setting == setting]
    counts = sorted({count for ladder in found for count in ladder.tokens.tolist()})
    labels = _labels(ladder.method for ladder in found)
    lines = []
    for ladder in found:
        at = dict(zip(ladder.tokens.tolist(), ladder.gaps, strict=True))
        each = [at[count].text() if count in at else "" for count in counts]
        law = ladder.law
        fit = [law.limit.text(), law.exponent.text().replace("+", ""), law.crosses(size)] if law else [""] * 3
        lines.append([labels[ladder.method], *each, *fit, ladder.over(write=size)])
    fitted = ("limit", "exponent", "where the fit is 0", "seeds, and RoPE's")
    headings = ["loss minus RoPE's (nats per token) after tokens =", *map(size, counts), *fitted]
    return markup.table(headings, lines)


def best_rates(table: pd.DataFrame, folder: Path) -> str:
    """Write the loss of each method with each optimizer and batch, at the rate with the lowest held-out loss."""
    rows = selection.by_context(table)
    rows = rows[(rows["x"] == rows["train_len"]) & rows["lr"].notna()]
    read_curves = curves.read(Results(folder), rows["cell"])
    last = read_curves[read_curves["metric"] == "held_out_loss"].groupby("cell")["value"].last()
    rows = rows.assign(held_out=rows["cell"].map(last), loss=rows["value"].astype(float).map(math.log))
    if rows["held_out"].isna().any():
        return ""
    found: dict[Method, dict[str, tuple[float, float]]] = {}
    for name, of_recipe in recipes(rows):
        for method in intervals.methods(of_recipe):
            mine = intervals.method(of_recipe, method)
            means = selection.of_shared_seeds(mine.pivot_table("held_out", "seed", "lr")).mean()
            best = mine[mine["lr"] == means.idxmin()]
            found.setdefault(method, {})[name] = float(best["loss"].mean()), float(best["lr"].iloc[0])
    columns = list(dict.fromkeys(name for of_method in found.values() for name in of_method))
    labels = _labels(found)

    def cell(method: Method, name: str) -> str:
        if name not in found[method]:
            return ""
        loss, rate = found[method][name]
        other = found.get(ROPE, {}).get(name)
        gap = f" ({loss - other[0]:+.3f})".replace("-", "−") if other and method != ROPE else ""
        return f"{loss:.3f}{gap} at {rate:g}"

    lines = [[labels[method], *(cell(method, name) for name in columns)] for method in labels]
    heading = f"loss at {int(rows['x'].iloc[0])} tokens (minus RoPE's), at the best rate on held-out text"
    return markup.table([heading, *columns], lines)


def contexts(table: pd.DataFrame, folder: Path) -> str:
    """Write perplexity by context length, and scores of benchmarks if there are some."""
    rows = selection.by_context(table)
    train_len = int(rows["train_len"].iloc[0])
    lengths = [length for part in CONTEXTS if (length := int(part * train_len)) in set(rows["x"])]
    points = intervals.points(rows, ["x"], Scale.LOG)
    labels = _labels(zip(rows["attention"].map(str), rows["options"].map(str), strict=True))
    lines = []
    for method, label in labels.items():
        of = intervals.method(points, method).set_index("x")
        lines.append(
            [label, str(of["seeds"].min()), *(f"{of['mean'][at]:.1f}" if at in of.index else "" for at in lengths)]
        )
    text = markup.table([CONTEXT, "seeds", *map(str, lengths)], lines)
    path = Results(folder).table("few_shot")
    if not path.exists():
        return text
    read_values = functools.partial(values.read, Results(folder))
    return f"{text}\n\n{few_shot.markdown(few_shot.table(read(path, ['shots']), read_values))}"


def recall_steps(table: pd.DataFrame, folder: Path) -> str:
    """Write the steps of each seed until recall was solved, by heads and pairs; in brackets the test accuracy of a seed
    that did not solve it."""
    cells = selection.recall_cells(table).sort_values(["heads", "kv_pairs", "seed"])
    settings = list(cells[["heads", "kv_pairs"]].drop_duplicates().itertuples(index=False, name=None))
    lines = []
    for method, label in _labels(intervals.methods(cells)).items():
        mine = intervals.method(cells, method)
        at = [mine[(mine["heads"] == heads) & (mine["kv_pairs"] == count)] for heads, count in settings]
        lines.append([label, *map(_steps, at)])
    heads = [f"{heads:.0f} head{'s' * (heads != 1)}, {count:.0f} pairs" for heads, count in settings]
    return markup.table(["steps until solved", *heads], lines)


def recall_rates(table: pd.DataFrame, folder: Path) -> str:
    """Write the same by pairs, method and learning rate."""
    cells = selection.recall_cells(table).sort_values("seed")
    labels, rates = _labels(intervals.methods(cells)), sorted(cells["lr"].unique())
    lines = []
    for count, of_count in cells.groupby("kv_pairs"):
        for method in intervals.methods(of_count):
            mine = intervals.method(of_count, method)
            lines.append([f"{count:.0f}", labels[method], *(_steps(mine[mine["lr"] == rate]) for rate in rates)])
    return markup.table(["pairs", "steps until solved, rate =", *(f"{rate:g}" for rate in rates)], lines)


def _steps(cells: pd.DataFrame) -> str:
    """Return the steps of each seed until it solved recall, or in brackets its test accuracy."""
    rows = zip(cells["solved"].tolist(), cells["steps"].tolist(), cells["value"].tolist(), strict=True)
    return ", ".join(f"{steps:.0f}" if solved else f"({accuracy:.2f})" for solved, steps, accuracy in rows)


def needles(table: pd.DataFrame, folder: Path) -> str:
    """Write the tokens of fine-tuning until each method solved a task, seed by seed, and its mean scores by length; in
    brackets where a model did not solve it."""
    scores = selection.needle_scores(table)
    scores = scores[scores["metric"] == "score"]
    chosen = table[(table["metric"] == "tokens_to_solve") & (table["chosen"] == 1)].sort_values("seed")
    labels, lengths = _labels(intervals.methods(scores)), sorted(scores["length"].unique())

    def cell(method: Method, task: str) -> str:
        of_task = intervals.method(scores[scores["task"] == task], method)
        if of_task.empty:
            return ""
        means = of_task.groupby("length")["value"].mean()
        text = ", ".join(f"{means[length]:.2f}" if length in means else "" for length in lengths)
        if not of_task["solved"].all():
            return f"({text})"
        after = intervals.method(chosen[chosen["task"] == task], method)["value"].tolist()
        return f"{', '.join(f'{tokens / 1e6:.0f} M' for tokens in after)}: {text}"

    lines = [[task, *(cell(method, task) for method in labels)] for task in sorted(scores["task"].unique())]
    at = ", ".join(f"{length:.0f}" for length in lengths)
    return markup.table([f"tokens until solved: score at {at} tokens", *labels.values()], lines)


def distant_text(results: Path) -> pd.DataFrame:
    """Return the rows of the study `tokens` with the training tokens at which the most methods were trained."""
    table = read(Results(results / "tokens").table("length_gen"), ["metric"])
    methods = table.groupby("train_tokens").apply(lambda rows: len(intervals.methods(rows)))
    return table[table["train_tokens"] == methods.idxmax()]


def solved_needles(results: Path) -> pd.DataFrame:
    """Return the rows with scores of the study `retrieval`, of the tasks that all of its models solved."""
    table = read(Results(results / "retrieval").table("needle"))
    table = table[table["metric"] == "score"]
    solved = selection.needle_scores(table).groupby("task")["solved"].all()
    return table[table["task"].isin(solved[solved].index)]


def needle_means(results: Path) -> str:
    """Write the mean score of each method on the tasks that all solved, by length, and how much more it is than
    stick-breaking's past the training length."""
    rows = selection.needle_scores(solved_needles(results))
    lengths, more = sorted(rows["length"].unique()), _less_stick(rows, results / "retrieval")
    lines = []
    for method, label in _labels(intervals.methods(rows)).items():
        means = intervals.method(rows, method).groupby("length")["value"].mean()
        gap = more[method].text("{:+.3f}".format) if method in more else ""
        lines.append([label, *(f"{means[length]:.2f}" for length in lengths), gap])
    headings = [
        "mean score, tokens =",
        *(f"{length:.0f}" for length in lengths),
        f"past {rows['train_len'].iloc[0]}, less stick-breaking's",
    ]
    tasks = ", ".join(f"`{task}`" for task in sorted(rows["task"].unique()))
    over = "; ".join(dict.fromkeys(gap.over("prompts") for gap in more.values())) or "none"
    return f"{markup.table(headings, lines)}\n\nMeans over {tasks}; differences: {over}."


def _less_stick(rows: pd.DataFrame, folder: Path) -> dict[Method, Interval]:
    """Return the difference of each method's mean score past the training length to stick-breaking's; empty without
    either."""
    past = rows[rows["length"] > rows["train_len"]]
    samples = intervals.samples(selection.mean_over_tasks(past), Scale.SHARE) if len(past) else {}
    if STICK not in samples:
        return {}
    stored = Stored(functools.partial(values.read, Results(folder)))
    joint = pairs.of_methods(past, STICK, stored, ["task", "length"])
    return intervals.differences(samples, STICK, Scale.SHARE, pairs=joint)


def _labels(methods: Iterable[Method]) -> dict[Method, str]:
    """Return the name of each method, with all of its options, in the order of legends."""
    return {method: legend.looks_of([method])[method].label for method in legend.looks_of(methods)}


BLOCKS = {
    "tokens": of_study("tokens", gaps, {"tokens": "Loss minus RoPE's by training tokens, with fits"}),
    "tuning": of_study("tuning", best_rates, {"rates": "Loss by learning rate"}),
    "study_125m": of_study("125m", contexts, LENGTHS),
    "study_8192": of_study("train-len-8192", contexts, LENGTHS),
    "mqrar_author": of_study(
        "mqrar-author", recall_rates, {"recall_curves": "Validation accuracy by steps of training"}, of="mqrar"
    ),
    "plateau_causes": of_study("plateau-causes", recall_steps, {}, of="mqrar"),
    "retrieval": of_study(
        "retrieval", needles, {"needle": "Score of needle tasks by length, of models that solved them"}, of="needle"
    ),
}
