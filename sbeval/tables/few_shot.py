"""Tables of few-shot scores as papers print them: a row for each model, a column for each benchmark, and a mean.

The score of a benchmark is its acc_norm where lm-eval has it, else acc, else an exact match; perplexities are shown,
means over seeds of their logarithms, and not averaged. Scores are in percent with the half-width of their 95 % interval
(see `sbeval.tables.statistics`). A row of its own is the score of guessing: a score whose interval includes it is no
evidence. The mean is over the benchmarks on which the models together are above guessing: the others would add noise
alone. It is of the seeds that have all of them, whose means its interval is over: a seed may be better on all. Bits per
byte of right answers stand beside the scores: they have no chance floor. Below the models are their differences to
RoPE, taken item by item where the values of both are stored.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import pandas as pd
from rich.table import Table as Terminal

from sbeval.errors import NothingToDraw, choose
from sbeval.tables import epochs, intervals, markup, pairs, pooling, selection
from sbeval.tables.documents import Values, nothing
from sbeval.tables.pairs import Stored
from sbeval.tables.rows import ROPE, spec_of
from sbeval.tables.statistics import UNKNOWN, Interval, Sample, Scale, interval

# candidates for the score of a benchmark, the preferred first; whether they are in percent and averaged
METRICS = {
    "acc_norm": True,
    "acc": True,
    "exact_match": True,
    "f1": True,
    "em": True,
    "word_perplexity": False,
    "perplexity": False,
}
# what right answers cost, where it was measured; in as many decimals
GOLD = {"gold_bits_per_byte": False}
DIGITS = {"gold_bits_per_byte": 3}
# of several ways to extract an answer from a completion, the lenient one first
FILTERS = ("", "flexible-extract", "strict-match")
# columns that identify a model
MODEL = ["model", "attention", "options", "params", "train_len", "train_tokens", "eval_len", "corpus", "preset"]
# columns that models share whose seeds are pooled
ALIKE = ["model", "train_len", "train_tokens", "eval_len", "corpus", "preset"]
# the mean over benchmarks, beside them
MEAN = "mean above chance"
COLUMNS = (*MODEL, "task", "seed", "metric", "value", "stderr", "n", "part", "filter", "shots", "chance")


@dataclass(frozen=True, slots=True)
class Cell:
    """A score and the half-width of its 95 % interval, None where there is none; in percent unless a perplexity or bits
    per byte. digits: decimals that are shown. signed: a difference."""

    value: float
    half: float | None = None
    digits: int = 1
    signed: bool = False

    def text(self, between: str = " ± ") -> str:
        value = f"{self.value:{'+' * self.signed}.{self.digits}f}"
        return value if self.half is None else f"{value}{between}{self.half:.{self.digits}f}"


@dataclass(frozen=True, slots=True)
class Scores:
    """A table: headings of its columns, and name and cells of each row; None where nothing was measured."""

    headings: list[str]
    rows: list[tuple[str, list[Cell | None]]]


def headline(results: pd.DataFrame, metrics: Mapping[str, bool] = METRICS) -> pd.DataFrame:
    """Return the score of each whole benchmark, for each model and seed the one over the most items.

    metrics: candidates, the preferred first. Column `benchmark` is the task with its number of shots.
    """
    whole = results[(results["part"] == "") & results["metric"].isin(metrics) & results["filter"].isin(FILTERS)].copy()
    if whole.empty:
        raise NothingToDraw("there is no score of a whole benchmark")
    # a blank column is read as text
    whole["chance"] = pd.to_numeric(whole["chance"], errors="coerce")
    whole["benchmark"] = [f"{task} ({shots})" for task, shots in zip(whole["task"], whole["shots"], strict=True)]
    order = {metric: index for index, metric in enumerate(metrics)}
    whole["choice"] = whole["metric"].map(order) * len(FILTERS) + whole["filter"].map(FILTERS.index)
    whole = whole.sort_values(["choice", "n"], ascending=[True, False], kind="stable")
    return whole.drop_duplicates([*MODEL, "seed", "benchmark"]).sort_index()


def names(chosen: pd.DataFrame) -> dict[tuple[object, ...], str]:
    """Name each model, by its columns MODEL; with training and evaluation lengths only where names would be equal, and
    with corpus and preset where these are too."""
    found: list[dict[tuple[object, ...], str]] = [{}, {}, {}]
    short, long, longest = found
    tokens = {count: f"{count / 1e6:.0f} M" for count in chosen["train_tokens"].unique()}
    alike = Counter(tokens.values())
    for key in chosen[MODEL].drop_duplicates().itertuples(index=False, name=None):
        model, attention, options, params, train_len, train_tokens, eval_len, corpus, preset = key
        # the name of a Hugging Face model suffices
        name = f"{model}" if attention == "hf" else f"{model} {attention}"
        short[key] = name if attention == "hf" else spec_of(name, options)
        amount = tokens[train_tokens] if alike[tokens[train_tokens]] == 1 else f"{train_tokens:,}"
        long[key] = f"{short[key]} ({amount} tokens of {train_len}, evaluated to {eval_len})"
        longest[key] = f"{long[key][:-1]}, {corpus}, preset {preset})"
    counts = [Counter(names.values()) for names in found]
    alone = {
        key: next((of[key] for of, count in zip(found, counts, strict=True) if count[of[key]] == 1), longest[key])
        for key in short
    }
    return alone


def table(results: pd.DataFrame, values: Values = nothing) -> Scores:
    """Build the table of `results`, rows of the result table. values: reads those of items, for differences."""
    chosen = headline(results)
    benchmarks = list(dict.fromkeys(chosen["benchmark"]))
    metrics = {str(name): str(group["metric"].iloc[0]) for name, group in chosen.groupby("benchmark")}
    averaged = above_guessing(chosen)
    priced = headline(results, GOLD) if results["metric"].isin(GOLD).any() else results[:0].assign(benchmark="")
    bits = list(dict.fromkeys(priced["benchmark"]))
    cells, costs = _cells(chosen, averaged), _cells(priced)
    stored, named, rows, last = Stored(values), names(chosen), [], []
    less = _differences(chosen[[METRICS[metric] for metric in chosen["metric"]]], stored, averaged)
    less_gold = _differences(priced, stored)

    def line(scores: dict[str, Cell], gold: dict[str, Cell]) -> list[Cell | None]:
        return [*map(scores.get, [*benchmarks, MEAN]), *map(gold.get, bits)]

    for key, group in chosen.groupby(MODEL):
        method = (*group[ALIKE].iloc[0], *intervals.methods(group))
        mark = f" ({epochs.OVERFIT})" if epochs.overfit(group).any() else ""
        rows.append((named[key] + mark, line(cells.get(method, {}), costs.get(method, {}))))
        differences = less.get(method, {}), less_gold.get(method, {})
        if any(differences):
            last.append((f"{named[key]}{mark} less {ROPE[0]}", line(*differences)))
    rows += last
    chance = {
        str(name): Cell(100 * float(group["chance"].iloc[0]))
        for name, group in chosen.groupby("benchmark")
        if group["chance"].notna().any()
    }
    # in a benchmark without choices guessing scores nothing
    guessed = [chance[name].value if name in chance else 0.0 for name in averaged]
    if averaged:
        chance[MEAN] = Cell(sum(guessed) / len(guessed))
    rows.append(("chance", line(chance, {})))
    headings = [*(f"{name} {metrics[name]}" for name in benchmarks), MEAN]
    return Scores([*headings, *(f"{name} gold bits/byte" for name in bits)], rows)


# cells by ALIKE and method, and by benchmark
Found = dict[tuple[object, ...], dict[str, Cell]]


def _cells(chosen: pd.DataFrame, averaged: Collection[str] = ()) -> Found:
    """Return the score of each method on each benchmark, and MEAN over those that are averaged."""
    found: Found = {}
    for key, part in chosen.groupby(ALIKE, dropna=False):
        scales = part["metric"].map(intervals.scale_of)
        for scale in dict.fromkeys(scales):
            of_scale = part[scales == scale]
            metrics = of_scale.drop_duplicates("benchmark").set_index("benchmark")["metric"]
            for (name,), of_name in intervals.curves(intervals.grouped(of_scale, ["benchmark"], scale), scale).items():
                for of, each in of_name.items():
                    found.setdefault((*key, of), {})[str(name)] = _cell(each, str(metrics[name]), scale)
        for of, each in intervals.intervals(
            intervals.samples(whole := selection.of_all(part, "benchmark", averaged))
        ).items():
            found.setdefault((*key, of), {})[MEAN] = _cell(each, str(whole["metric"].iloc[0]))
    return found


def _differences(chosen: pd.DataFrame, stored: Stored, averaged: Collection[str] = ()) -> Found:
    """Return the difference of each method to RoPE on each benchmark and of MEAN, item by item."""
    found: Found = {}
    for key, part in chosen.groupby(ALIKE, dropna=False, sort=False):
        apart = pooling.outlying(intervals.grouped(part, ["benchmark"], Scale.LINEAR).values())
        parts = [(str(name), of, apart) for name, of in part.groupby("benchmark", sort=False)]
        for name, rows, own in [*parts, (MEAN, selection.of_all(part, "benchmark", averaged), None)]:
            joint = pairs.of_methods(rows, ROPE, stored, ["benchmark"])
            of_rows = intervals.differences(intervals.samples(rows), ROPE, pairs=joint, apart=own) if joint else {}
            for of in joint:
                cell = _cell(of_rows[of], str(rows["metric"].iloc[0]))
                found.setdefault((*key, of), {})[name] = replace(cell, signed=True)
    return found


def above_guessing(chosen: pd.DataFrame) -> list[str]:
    """Return the benchmarks in percent on which the mean over these models is above guessing, by its interval."""
    above = []
    for name, group in chosen[[METRICS[metric] for metric in chosen["metric"]]].groupby("benchmark", sort=False):
        guess = 0.0 if group["chance"].isna().all() else float(group["chance"].max())
        # all models answer the same items, whose error does not average out
        error = math.sqrt((group["stderr"].astype(float) ** 2).mean())
        together = Sample(group["value"].to_numpy(dtype=float), error, int(group["n"].min()))
        if interval(together, UNKNOWN).low > guess:
            above.append(str(name))
    return above


def _cell(found: Interval, metric: str, scale: Scale = Scale.LINEAR) -> Cell:
    factor = 100 if METRICS.get(metric) else 1
    mean, low, high = (factor * intervals.back(end, scale) for end in (found.mean, found.low, found.high))
    return Cell(mean, (high - low) / 2 if high > low else None, DIGITS.get(metric, 1))


def terminal(scores: Scores) -> Terminal:
    """Lay the table out for a terminal, transposed: there are more benchmarks than models."""
    table = Terminal(title="Scores in percent (perplexities as they are), ± 95 % interval")
    table.add_column("")
    for name, _ in scores.rows:
        table.add_column(name, justify="right")
    for index, heading in enumerate(scores.headings):
        table.add_row(heading, *(_text(cells[index]) for _, cells in scores.rows))
    return table


def others(results: pd.DataFrame) -> Terminal:
    """Lay out results without a score that is compared between benchmarks, as lm-eval names them."""
    table = Terminal("benchmark", "metric", "model", "value", title="Scores as lm-eval has them")
    for row in results[results["part"] == ""].itertuples():
        table.add_row(f"{row.task} ({row.shots})", f"{row.metric}", f"{row.model} {row.attention}", f"{row.value:.4g}")
    return table


def markdown(scores: Scores) -> str:
    rows = ([markup.markdown(name), *map(_text, cells)] for name, cells in scores.rows)
    return markup.table(["", *map(markup.markdown, scores.headings)], rows)


def latex(scores: Scores) -> str:
    """Write a LaTeX tabular with the rules of booktabs."""
    lines = [[name, *(_text(cell, r" $\pm$ ") for cell in cells)] for name, cells in scores.rows]
    body = [" & ".join([markup.latex(line[0]), *line[1:]]) + r" \\" for line in lines]
    head = " & ".join(["", *map(markup.latex, scores.headings)]) + r" \\"
    columns = "l" + "r" * len(scores.headings)
    begin = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule"]
    end = [r"\midrule", body[-1], r"\bottomrule", r"\end{tabular}"]
    return "\n".join([*begin, *body[:-1], *end])


def comma_separated(scores: Scores) -> str:
    """Write CSV with a column for each score and one for the half-width of its interval."""
    numbers = [
        [number for cell in cells for number in (cell and cell.value, cell and cell.half)] for _, cells in scores.rows
    ]
    names = [column for heading in scores.headings for column in (heading, f"{heading} ±")]
    models = [name for name, _ in scores.rows]
    return pd.DataFrame(numbers, models, names).to_csv(index_label="model").rstrip("\n")


def _text(cell: Cell | None, between: str = " ± ") -> str:
    return "" if cell is None else cell.text(between)


FORMATS: dict[str, Callable[[Scores], str | Terminal]] = {
    "terminal": terminal,
    "markdown": markdown,
    "latex": latex,
    "csv": comma_separated,
}


def render(results: pd.DataFrame, style: str, values: Values = nothing) -> str | Terminal:
    """Render the table in the format `style`; InputError lists the formats. values: reads those of items."""
    return FORMATS[choose("format", style, FORMATS)](table(results, values))
