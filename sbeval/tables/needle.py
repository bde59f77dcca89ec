"""The table of needles in haystacks: its columns, and as it is printed in the terminal."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sbeval.config import LATER
from sbeval.tables import epochs
from sbeval.tables.rows import Measurement, column

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Row(Measurement):
    """Factors: length of prompt and answer in tokens; depth_start <= depth < depth_end of the needle, in per cent (100
    is in the last bin; empty: all samples); tokens of fine-tuning. status: `overfit` where the model's training on text
    was, or empty."""

    length: int
    depth_start: int | None = None
    depth_end: int | None = None
    finetune_tokens: int = column("{:,.0f} tokens of fine-tuning", default=0)
    status: str = field(default="", metadata=LATER)


def summary(results: "pd.DataFrame") -> "Table":
    """Return the table for the terminal: score and greedy accuracy by task and length, mean over seeds, and means."""
    from rich.table import Table

    rows = results[results["metric"].isin(["score", "greedy"]) & results["depth_start"].isna()]
    lengths = sorted(rows["length"].unique())
    table = Table(
        title="Score of completions (accuracy of greedy decoding of the reference) by length in tokens",
        caption=epochs.caution(results) or None,
        caption_justify="left",
    )
    for name in ("attention", "task"):
        table.add_column(name)
    for length in lengths:
        table.add_column(f"{length}", justify="right")
    for (attention, options), group in rows.groupby(["attention", "options"]):
        method = f"{attention}:{options}" if options else f"{attention}"
        tasks = [*group.groupby("task")] + ([("mean", group)] if group["task"].nunique() > 1 else [])
        for task, some in tasks:
            means = some.groupby(["length", "metric"])["value"].mean()
            table.add_row(method, str(task), *(f"{means[x, 'score']:.2f} ({means[x, 'greedy']:.2f})" for x in lengths))
    return table
