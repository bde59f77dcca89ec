"""Table of needles in haystacks for the terminal."""

from typing import TYPE_CHECKING

from sbeval.tables import epochs

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table


def summary(results: "pd.DataFrame") -> "Table":
    """Return the table for the terminal: score and greedy accuracy by task and length, mean over seeds, and means."""
    from rich.table import Table

    rows = results[results["metric"].isin(["score", "greedy"]) & results["depth_start"].isna()]
    lengths = sorted(rows["length"].unique())
    table = Table(
        title="Score of what is said (accuracy of greedy decoding of the reference) by length in tokens",
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
