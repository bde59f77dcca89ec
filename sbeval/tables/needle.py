"""The table of needles in haystacks: its columns, and as it is printed in the terminal."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sbeval.config import LATER
from sbeval.tables import epochs
from sbeval.tables.rows import Measurement, column, spec_of

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

# share of held-out prompts, or of those of the training length, that a solved task has right
SOLVED = 0.95
# below the table of the terminal
LEGEND = (
    "tokens to solve: of fine-tuning, until 95 % of held-out prompts of the training length were right, in the mean of "
    "four or more validations from there on too, or of 256 prompts at the end, by seed; >: they were not, and scores "
    "at other lengths do not compare the method. lr: the rate that validation chose."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row(Measurement):
    """Factors: length of prompt and answer in tokens; depth_start <= depth < depth_end of the needle, in per cent (100
    is in the last bin; empty: all samples). status: `overfit` where the model's training on text was, or empty.

    Of models that were fine-tuned: the tokens of that, at most; its learning rate, and in rows of fine-tuning whether
    validation chose that (1 or 0), as for the model of all other rows; how it ended on this task, `solved`, `budget` or
    `diverged`, empty where it was on others; nats per token that copying saved before.
    """

    length: int
    depth_start: int | None = None
    depth_end: int | None = None
    finetune_tokens: int = column("{} tokens of fine-tuning", default=0)
    finetune_lr: float | None = field(default=None, metadata=LATER)
    chosen: int | None = field(default=None, metadata=LATER)
    ended: str = field(default="", metadata=LATER)
    copy_gain: float | None = field(default=None, metadata=LATER)
    status: str = field(default="", metadata=LATER)


def summary(results: "pd.DataFrame") -> "Table":
    """Return the table for the terminal: score and greedy accuracy by task and length, mean over seeds, and means; of
    models that were fine-tuned also how a task was learned. Models of other settings have lines of their own."""
    from rich.table import Table

    from sbeval.tables import selection

    rows = results[results["metric"].isin(["score", "greedy"]) & results["depth_start"].isna()]
    lengths = sorted(rows["length"].unique())
    learned = results[results["metric"] == "tokens_to_solve"]
    table = Table(
        title="Score of completions (accuracy of greedy decoding of the reference) by length in tokens",
        caption=" ".join(filter(None, [LEGEND if len(learned) else "", epochs.caution(results)])) or None,
        caption_justify="left",
    )
    apart = selection.differing(rows, selection.NEEDLE.columns)
    for name in ("attention", *apart, "task", *(("tokens to solve", "lr") if len(learned) else ())):
        table.add_column(name)
    for length in lengths:
        table.add_column(f"{length}", justify="right")
    of_models = ["attention", "options", *apart]
    for (attention, options, *values), group in rows.groupby(of_models, dropna=False):
        method = spec_of(attention, options)
        mine = learned.merge(group[of_models].drop_duplicates())
        count = group["task"].nunique()
        # a mean is over all tasks: some may not fit the shorter lengths
        whole = group[group.groupby("length")["task"].transform("nunique") == count]
        tasks = [*group.groupby("task")] + ([("mean", whole)] if count > 1 else [])
        for task, some in tasks:
            means = some.groupby(["length", "metric"])["value"].mean()
            scores = (
                f"{means[x, 'score']:.2f} ({means[x, 'greedy']:.2f})" if (x, "score") in means else "" for x in lengths
            )
            how = _learned(mine[mine["task"] == task]) if len(learned) else ()
            table.add_row(method, *map(str, values), str(task), *how, *scores)
    return table


def _learned(rows: "pd.DataFrame") -> tuple[str, str]:
    """Say after how many tokens a task was solved at the chosen rates, and which these are, seed by seed."""
    chosen = rows[rows["chosen"] == 1].sort_values("seed")
    tokens = [
        f"{value / 1e6:.3g} M" if how == "solved" else f"> {value / 1e6:.3g} M"
        for value, how in zip(chosen["value"].tolist(), chosen["ended"].tolist(), strict=True)
    ]
    rates = [f"{rate:g}" for rate in chosen["finetune_lr"].tolist()]
    return ", ".join(tokens), ", ".join(rates if len(set(rates)) > 1 else rates[:1])
