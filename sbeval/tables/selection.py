"""Select rows of result tables: for figures, for verdicts on claims, and for the choice of a learning rate."""

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from sbeval.errors import InputError, NothingToDraw
from sbeval.tables import mqrar
from sbeval.tables.needle import SOLVED
from sbeval.tables.published import FLIP_FLOP_TESTS, SOLVED_ACCURACY
from sbeval.tables.rows import labels, later
from sbeval.tables.table import numbers


@dataclass(frozen=True, slots=True)
class Setting:
    """Columns that define a setting of a family, within which its methods are compared.

    Titles of figures name the columns of `always`, and those of `others` that differ.
    """

    always: tuple[str, ...]
    others: tuple[str, ...]

    @property
    def columns(self) -> list[str]:
        return [*self.always, *self.others]


# columns of every family: what has others of these is another experiment
SHARED = ("model", "train_len", "corpus", "preset")
LENGTH_GEN = Setting(
    ("model", "train_len", "corpus"), ("task", "eval_len", "tokenizer", "preset", "train_tokens", "dtype")
)
# how models were trained: columns that older tables lack
RECIPE = ("lr", "optimizer", "batch_tokens", "schedule")
NEEDLE = Setting(("model", "train_len", "finetune_tokens"), ("tokenizer", "preset", "corpus", "train_tokens", "dtype"))
NEEDLE_METRICS = ("score", "greedy")
# columns that identify a number
NEEDLE_SAME = ["attention", "options", "seed", "task", "metric", "length", *NEEDLE.columns]
# those that identify a model and its task
_NEEDLE_TASK = [name for name in NEEDLE_SAME if name not in ("metric", "length")]
MQRAR = Setting(
    ("model", "vocab_size", "seq_len"),
    ("task", "width", "layers", "heads", "train_len", "eval_len", "preset", "dtype"),
)
# columns that older tables lack; titles name the optimizer first
_LATER = [name for name in labels(mqrar.Row) if name in later(mqrar.Row)]
MQRAR_LATER = ("optimizer", *(name for name in _LATER if name not in ("optimizer", "n_back")))
FLIP_FLOP = Setting(("model", "seq_len"), ("task", "heads", "p_train", "preset", "dtype"))
ATTENTION_MAP = ["task", "vocab_size", "seq_len", "kv_pairs"]


def beside(table: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of a table with the model, training length, corpus and preset of some of the given rows."""
    wanted, found = (pd.MultiIndex.from_frame(each[list(SHARED)].astype(str)) for each in (rows, table))
    return table[found.isin(wanted)]


def length_gen_setting(table: pd.DataFrame) -> Setting:
    """Return the columns that define a setting in a table of `length_gen`: those of RECIPE only where they differ."""
    recipe = (name for name in recipe_columns(table) if name != "train_tokens")
    return Setting(LENGTH_GEN.always, (*LENGTH_GEN.others, *recipe))


def recipe_columns(table: pd.DataFrame) -> list[str]:
    """Return the columns in which the trainings of these rows differ, besides method and seed."""
    return differing(table, ("train_tokens", *RECIPE))


def differing(table: pd.DataFrame, names: Iterable[str]) -> list[str]:
    """Return the columns of several values, of those that the table has.

    A blank cell is of a row from before the table had the column, which is no difference.
    """
    return [name for name in names if name in table and table[name].replace("", None).nunique() > 1]


def at_training_length(table: pd.DataFrame) -> pd.DataFrame:
    """Return the perplexities of `length_gen` over as many tokens as the models were trained at."""
    return table[(table["metric"] == "perplexity") & (table["context_length"] == table["train_len"])]


def by_context(table: pd.DataFrame) -> pd.DataFrame:
    """Return the perplexities of `length_gen` by context length, which is column `x`."""
    # perplexity over windows of whole documents has no context length
    table = table[(table["metric"] == "perplexity") & table["context_length"].notna()]
    if table.empty:
        raise InputError("there are no rows with metric 'perplexity' and a context length to draw")
    table = numbers(table, ["context_length"])
    return table.assign(x=table["context_length"], end=table["context_length"])


def recall_setting(table: pd.DataFrame) -> Setting:
    """Return the columns that define a setting in a table of `mqrar`; an older table has fewer."""
    return Setting(MQRAR.always, (*MQRAR.others, *(name for name in MQRAR_LATER if name in table)))


def recall_accuracy(table: pd.DataFrame) -> pd.DataFrame:
    """Return, for each method and setting of `mqrar`, the accuracies at the best learning rate.

    The best solves the task in most of the seeds that every rate has, then in the fewest steps. Where none solves it,
    the best has the highest validation accuracy, which may be chance: a failure is one of all rates (`recall_cells`).
    Ties go to the smallest rate. A single rate is kept. Several rates without validation accuracy are an InputError:
    the test score must not choose.
    """
    wanted = table["metric"].isin(["accuracy", "validation_accuracy", "steps", "solved"])
    table = numbers(table[wanted], ["kv_pairs", "vocab_size", "lr"])
    table = recall_completed(table)
    by = ["attention", "options", "kv_pairs", "n_back", *recall_setting(table).columns]
    kept = []
    for key, rows in table.groupby(by, dropna=False):
        # where all cells failed there is no accuracy
        if rows["lr"].nunique() > 1 and (rows["metric"] == "accuracy").any():
            rates = ranked_rates(rows)
            if rates is None:
                tried = ", ".join(f"{rate:g}" for rate in sorted(rows["lr"].unique()))
                raise InputError(
                    f"{key[0]} with {key[2]:g} key-value pairs has the learning rates {tried} and no "
                    "validation_accuracy to choose by; run the cells again or leave one rate"
                )
            rows = rows[rows["lr"] == rates[0]]
        kept.append(rows)
    rows = pd.concat(kept) if kept else table
    return rows[rows["metric"] == "accuracy"]


def recall_completed(table: pd.DataFrame) -> pd.DataFrame:
    """Return rows of `mqrar` in which options that older ones predate have the values that these were run with."""
    for name, value in mqrar.BEFORE.items():
        if name in table:
            table = table.assign(**{name: table[name].where(table[name].notna() & (table[name] != ""), value)})
        elif name in ("n_back", "optimizer"):
            table = table.assign(**{name: value})
    return table


def ranked_rates(rows: pd.DataFrame) -> list[float] | None:
    """Return the learning rates of one setting, the best first (see `recall_accuracy`).

    None without validation accuracy.
    """
    validation = rows[(rows["metric"] == "validation_accuracy") & (rows["split"] == "all")]
    if validation.empty:
        return None
    scores = validation.pivot_table("value", "seed", "lr")
    ended = rows[rows["metric"] == "solved"].pivot_table("value", "seed", "lr")
    # a cell that failed has no score, and solves nothing
    shared = of_shared_seeds(scores.combine_first(ended.reindex(columns=scores.columns)))
    solved, steps = (
        of.reindex_like(shared) for of in (ended, rows[rows["metric"] == "steps"].pivot_table("value", "seed", "lr"))
    )

    def rank(rate: float) -> tuple[float, float, float, float]:
        until = steps[rate][solved[rate] == 1].mean()
        at_all = solved[rate].mean()
        return (
            -at_all if at_all > 0 else 0.0,
            until if at_all > 0 else 0.0,
            # without a solved cell, accuracies may be chance and their order noise
            -shared[rate].mean(),
            0.0 if at_all > 0 or pd.isna(steps[rate].mean()) else steps[rate].mean(),
        )

    return sorted((float(rate) for rate in shared.columns), key=lambda rate: (rank(rate), rate))


def of_shared_seeds(scores: pd.DataFrame) -> pd.DataFrame:
    """Return the scores, by seed (down) and learning rate (across), of the seeds that all rates have; all where none
    does. Further seeds may have been run at one rate alone."""
    return scores.dropna() if scores.notna().all(axis=1).any() else scores


def of_all(rows: pd.DataFrame, name: str, values: Collection[Any]) -> pd.DataFrame:
    """Return the rows with these values of a column, of the seeds that have all: a mean over others is another."""
    rows = rows[rows[name].isin(values)]
    return rows[rows.groupby(["attention", "options", "seed"])[name].transform("nunique") == len(values)]


def recall_cells(table: pd.DataFrame) -> pd.DataFrame:
    """Return the test accuracy over all queries of each cell of `mqrar`, all rates, with columns `status` (how training
    ended), `steps` and `solved`.

    A cell is solved if its training stopped for it, or, in a table without that, at an accuracy of SOLVED_ACCURACY. One
    that failed is not: it has no accuracy.
    """
    cells = table[(table["metric"] == "accuracy") & (table["split"] == "all")]
    ended = table[table["metric"] == "solved"]
    failed = ended[~ended["cell"].isin(cells["cell"])].assign(value=math.nan)
    cells = numbers(recall_completed(pd.concat([cells, failed])), ["kv_pairs", "vocab_size", "lr"])
    both = {name: table[table["metric"] == name].set_index("cell")["value"] for name in ("steps", "solved")}
    solved = cells["cell"].map(both["solved"])
    statuses = dict(zip(ended["cell"], ended["status"], strict=True)) if "status" in ended else {}
    return cells.assign(
        status=[statuses.get(cell, "") for cell in cells["cell"]],
        steps=cells["cell"].map(both["steps"]).fillna(0.0),
        solved=(solved == 1) | (solved.isna() & (cells["value"] >= SOLVED_ACCURACY)),
    )


def by_steps(cells: pd.DataFrame) -> list[float]:
    """Return the learning rates of `recall_cells` of one setting: most seeds solved first, then in the fewest steps.

    By the seeds that all rates have, if one of them is solved: a rate is not worse for having failed on further seeds
    that others were not run with. Where no cell is solved the order says nothing.
    """
    common = cells.groupby("seed")["lr"].nunique() == cells["lr"].nunique()
    shared = cells[cells["seed"].map(common)]
    of = shared if shared["solved"].any() else cells
    rates = {rate: of[of["lr"] == rate] for rate in cells["lr"].unique().tolist()}

    def rank(rate: float) -> tuple[float, float, float]:
        solved = rates[rate]["solved"]
        steps = rates[rate].loc[solved, "steps"].mean() if solved.any() else 0.0
        return -float(solved.mean()), float(steps), rate

    return sorted(rates, key=rank)


def flip_flop_errors(table: pd.DataFrame) -> pd.DataFrame:
    """Return the error rates over all reads of each test of `flip_flop`, at the rate with the lowest validation error.

    The lowest of means over the seeds that all rates have; ties go to the smallest rate. A single rate is kept. Several
    without validation error are an InputError, as in `recall_accuracy`.
    """
    rows = table[(table["metric"] == "error_rate") & table["distance_start"].isna()]
    if not rows["test"].isin(FLIP_FLOP_TESTS).any():
        raise InputError("there are no rows with metric 'error_rate' of a test")
    kept = []
    for key, group in rows.groupby(["attention", "options", *FLIP_FLOP.columns], dropna=False):
        if group["lr"].nunique() > 1:
            validation = group[group["test"] == "validation"].pivot_table("value", "seed", "lr")
            if validation.empty:
                tried = ", ".join(f"{rate:g}" for rate in sorted(group["lr"].unique()))
                raise InputError(
                    f"{key[0]} has the learning rates {tried} and no error rate of test 'validation' to choose by; run "
                    "the cells again or leave one rate"
                )
            group = group[group["lr"] == of_shared_seeds(validation).mean().idxmin()]
        kept.append(group)
    best = pd.concat(kept)
    return best[best["test"].isin(FLIP_FLOP_TESTS)]


def needle_scores(table: pd.DataFrame) -> pd.DataFrame:
    """Return the scores of `needle` over all samples of a task and length; InputError where there are none.

    Column `solved`: whether the model solved the task at its training length. One that was fine-tuned did if its
    fine-tuning says so, or, where that says nothing, if it scores SOLVED there. One that was not is taken as it is.
    """
    table = table[table["metric"].isin(NEEDLE_METRICS) & table["depth_start"].isna()]
    if table.empty:
        raise InputError("there are no rows with metric 'score' or 'greedy' over all depths to draw")
    return _with_solved(most_samples(numbers(table, ["length", "train_len", "finetune_tokens"])))


def needle_depths(table: pd.DataFrame) -> pd.DataFrame:
    """Return the scores of `needle` by depth, with the column `solved` of `needle_scores`.

    InputError where there are none.
    """
    shown = table["metric"].isin(NEEDLE_METRICS)
    rows = table[shown & table["depth_start"].notna()]
    if rows.empty:
        raise NothingToDraw("there are no rows with a depth to draw: tasks with a single needle have them")
    names = ["depth_start", "depth_end", "length", "train_len", "finetune_tokens"]
    rows = most_samples(numbers(rows, names))
    if table[shown]["depth_start"].notna().all():
        return rows.assign(solved=True)
    scores = needle_scores(table)
    apart = scores[~scores["solved"]][_NEEDLE_TASK].drop_duplicates()
    found = rows.merge(apart, on=_NEEDLE_TASK, how="left", indicator="apart")
    return found.assign(solved=found["apart"] == "left_only").drop(columns="apart")


def _with_solved(scores: pd.DataFrame) -> pd.DataFrame:
    there = scores[(scores["metric"] == "score") & (scores["length"] == scores["train_len"])]
    right = there.groupby(_NEEDLE_TASK, dropna=False).agg(there=("value", "mean")).reset_index()
    found = scores.merge(right, on=_NEEDLE_TASK, how="left")
    ended = found["ended"].fillna("") if "ended" in found else pd.Series("", found.index)
    # of a task that it was not taught fine-tuning says nothing; one that was not evaluated there is not solved
    by_score = (ended == "") & (found["there"] >= SOLVED)
    solved = (ended == "solved") | by_score | (found["finetune_tokens"] == 0)
    return found.drop(columns="there").assign(solved=solved)


def most_samples(table: pd.DataFrame) -> pd.DataFrame:
    """Of rows that differ in their cell alone, return those of the cell with the most samples; ties go to the first.

    A run with more --samples or another --length adds a cell beside that of the earlier run.
    """
    samples = table.groupby([*NEEDLE_SAME, "cell"])["n"].transform("sum")
    order = samples.sort_values(ascending=False, kind="stable").index
    kept = table.loc[order, [*NEEDLE_SAME, "cell"]].drop_duplicates(NEEDLE_SAME)
    return table.merge(kept, on=[*NEEDLE_SAME, "cell"])


def shared_tasks(scores: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the tasks that every method has, so that a mean over them compares like with like.

    Return all rows where there is no such task.
    """
    methods = scores.groupby(["attention", "options"]).ngroups
    has = scores.drop_duplicates(["attention", "options", "task"])["task"].value_counts()
    shared = scores["task"].isin(has.index[has == methods])
    return scores[shared] if shared.any() else scores


def mean_over_tasks(scores: pd.DataFrame) -> pd.DataFrame:
    """Return the mean over tasks for each method, seed and length, with its standard error.

    Lengths at which a method lacks a task are left out.
    """
    by = ["attention", "options", "seed", "length", "train_len"]
    scores = scores.assign(square=scores["stderr"].fillna(0.0) ** 2)
    means = scores.groupby(by, as_index=False).agg(
        value=("value", "mean"), square=("square", "sum"), tasks=("task", "nunique"), n=("n", "sum")
    )
    means["stderr"] = means["square"] ** 0.5 / means["tasks"]
    return means[means["tasks"] == scores["task"].nunique()]


def dense_kernels(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return the rows of one metric of `kernel` for whole sequences with all keys visited.

    Column `options` is the backend, empty for this project's kernel: `triton-hopper` where it was timed, as it is the
    default there, else `triton`.
    """
    plain = (table["kv_heads"] == table["heads"]) & (table["queries"] == table["keys"]) & (table["sequences"] == 1)
    rows = table[plain & (table["epsilon"].fillna(0) == 0) & (table["metric"] == metric)]
    hopper = (rows["backend"] == "triton-hopper").groupby([rows["device"], rows["head_dim"]]).transform("any")
    default = hopper.map({True: "triton-hopper", False: "triton"})
    return rows.assign(options=rows["backend"].where(rows["backend"] != default, ""))
