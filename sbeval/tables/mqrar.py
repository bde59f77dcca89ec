"""Table of MQRAR for the terminal."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

# below the table where a cell was not solved: plateaus have ended after 10,000 steps
UNDECIDED = (
    "budget, plateau: not solved in these steps, which does not show that the method cannot. More --steps with "
    "--patience 0, and other rates (--lr), would decide."
)


def summary(results: "pd.DataFrame") -> "Table":
    """Return the table for the terminal: accuracy by method, pairs and rate, with lowest and highest seed."""
    from rich.table import Table

    # terminals are narrow: width and n-back only where they vary
    factors = {"kv_pairs": "pairs", "lr": "lr"}
    factors |= {name: name.replace("_", "-") for name in ("n_back", "width") if results[name].nunique() > 1}
    table = Table(title="MQRAR accuracy (mean over seeds, lowest to highest)")
    for name in ("attention", *factors.values(), "seeds", "valid.", "all", "fresh", "stale", "ended"):
        table.add_column(name, justify="left" if name in ("attention", "ended") else "right")
    for (attention, options, *values), group in results.groupby(["attention", "options", *factors]):
        validation = group[group["metric"] == "validation_accuracy"]["value"]
        accuracy = {split: rows["value"] for split, rows in group[group["metric"] == "accuracy"].groupby("split")}
        ended = group[group["metric"] == "solved"]["status"].value_counts()
        table.add_row(
            f"{attention}:{options}" if options else f"{attention}",
            *(f"{value:g}" for value in values),
            f"{len(validation)}",
            f"{validation.mean():.3f}" if len(validation) else "",
            _span(accuracy["all"]) if accuracy else "",
            *(f"{accuracy[split].mean():.3f}" if split in accuracy else "" for split in ("fresh", "stale")),
            ", ".join(f"{count} {how}" for how, count in ended.items()),
        )
    if results["status"].isin(["budget", "plateau"]).any():
        table.caption = UNDECIDED
    return table


def _span(values: "pd.Series[float]") -> str:
    several = f" ({values.min():.3f} to {values.max():.3f})" if len(values) > 1 else ""
    return f"{values.mean():.3f}{several}"
