"""The table of multi-query repeated associative recall: its columns, and as it is printed in the terminal."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sbeval.config import LATER
from sbeval.tables.rows import Measurement, column, spec_of

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Row(Measurement):
    """Factors: sizes of the task and the model; `split` is `all`, `fresh`, `stale`, or empty for the finer ones by
    number of stale values or by distance (distance_start <= d < distance_end, in positions).

    `status` of the row of metric `solved` is how training ended: `solved`, `plateau`, `budget` (out of steps),
    `diverged` (a loss that is not finite) or `failed`. The last two have no accuracy; their run file has the reason.
    """

    kv_pairs: int = column("{} key-value pairs")
    seq_len: int = column("sequences of {} tokens")
    vocab_size: int = column("vocabulary of {}")
    width: int = column("width {}")
    layers: int = column("{} layers")
    heads: int = column("{} heads")
    lr: float = column("learning rate {:g}")
    split: str = ""
    stale_values: int | None = None
    distance_start: int | None = None
    distance_end: int | None = None
    slot_power: float | None = column("slot law {}", LATER, default=None)
    filler: str | None = column("filler: {}", LATER, default=None)
    distinct: str | None = column("distinct {}", LATER, default=None)
    key_pool: int | None = column("{:.0f} keys", LATER, default=None)
    n_back: int | None = column("{:g}-th last value", LATER, default=None)
    score_prefix: str | None = column("prefix scored: {}", LATER, default=None)
    positions: str | None = column("positions: {}", LATER, default=None)
    dropout: float | None = column("dropout {}", LATER, default=None)
    stored_rows: int | None = column("{:.0f} stored rows", LATER, default=None)
    batch: int | None = column("batch {:.0f}", LATER, default=None)
    max_steps: int | None = column("{:.0f} steps at most", LATER, default=None)
    optimizer: str | None = column("trained with {}", LATER, default=None)
    schedule: str | None = column("{} schedule", LATER, default=None)
    weight_decay: float | None = column("weight decay {}", LATER, default=None)
    init_std: float | None = column("weights from N(0, {}²)", LATER, default=None)
    stop_accuracy: float | None = column("stopped at {}", LATER, default=None)
    patience: int | None = column("patience {:.0f}", LATER, default=None)
    norm: str | None = column("{} norm", LATER, default=None)
    biases: str | None = column("biases: {}", LATER, default=None)
    beta_2: float | None = column("beta 2 {}", LATER, default=None)
    decayed: str | None = column("decay of {}", LATER, default=None)
    warmup: int | None = column("{:.0f} steps of warm-up", LATER, default=None)
    clip: float | None = column("clipped at {:g}", LATER, default=None)
    final_lr: float | None = column("last rate {:g}", LATER, default=None)
    status: str | None = field(default=None, metadata=LATER)


# values of runs from before the option existed
BEFORE: dict[str, str | float] = {
    "optimizer": "adamw",
    "n_back": 1,
    "norm": "rms",
    "biases": "false",
    "beta_2": 0.95,
    "decayed": "matrices",
    "clip": 1.0,
    "final_lr": 0.1,
}

# below the table: what its columns are, how training ended where it was not solved, and what that does not show
ENDED = {
    "budget": "budget: out of --steps before the task was solved",
    "plateau": "plateau: no progress for --patience steps",
}
# plateaus have ended after 10,000 steps
UNDECIDED = (
    "Not solved in these steps does not show that the method cannot: more --steps with --patience 0, and other rates "
    "(--lr), would decide."
)
# of the preset `author` from the public code that it follows, shawntan/zoology at eff3566
DEPARTURES = (
    "softmax has RoPE beside the learned positions, as that code has since eca2940; at eff3566 it has these alone "
    "(--attention nope)",
    "dropout is on the heads' outputs, not on attention weights",
    "products are in bfloat16 on a GPU (--dtype float32 for that code's)",
    "examples and weights are of another random generator",
    "25,000 full batches run on over the ends of epochs, there 391 an epoch, the last of 160 rows",
    "training ends at 0.99 on 1000 validation examples, every 250 steps; there above it on the 3000 test examples, "
    "every epoch",
    "learning rates are rounded to three digits",
    "stick-breaking skips keys for which less than 2^-24 of the stick is left",
)
# beside rows of ALiBi with one head
ONE_SLOPE = "ALiBi with one head has a single slope, 2^-8: its accuracy is an artefact of that."
LEGEND = (
    "steps: until solved, by which rates are ranked (valid. ranks them where none solves the task); fresh: queries for "
    "a key's first value; stale: the key had another before."
)


def summary(results: "pd.DataFrame") -> "Table":
    """Return the table for the terminal: accuracy by method, pairs and rate, with lowest and highest seed."""
    from rich.table import Table

    # terminals are narrow: width and n-back only where they vary
    factors = {"kv_pairs": "pairs", "lr": "lr"}
    factors |= {name: name.replace("_", "-") for name in ("n_back", "width") if results[name].nunique() > 1}
    table = Table(title="MQRAR accuracy (mean over seeds, lowest to highest)")
    for name in ("attention", *factors.values(), "seeds", "steps", "valid.", "all", "fresh", "stale", "ended"):
        table.add_column(name, justify="left" if name in ("attention", "ended") else "right")
    for (attention, options, *values), group in results.groupby(["attention", "options", *factors]):
        validation = group[group["metric"] == "validation_accuracy"]["value"]
        accuracy = {split: rows["value"] for split, rows in group[group["metric"] == "accuracy"].groupby("split")}
        how_ended = group[group["metric"] == "solved"]["status"].value_counts()
        steps = group[(group["metric"] == "steps") & (group["status"] == "solved")]["value"]
        table.add_row(
            spec_of(attention, options),
            *(f"{value:g}" for value in values),
            f"{len(validation)}",
            f"{steps.mean():,.0f}" if len(steps) else "",
            f"{validation.mean():.3f}" if len(validation) else "",
            _span(accuracy["all"]) if accuracy else "",
            *(f"{accuracy[split].mean():.3f}" if split in accuracy else "" for split in ("fresh", "stale")),
            ", ".join(f"{count} {how}" for how, count in how_ended.items()),
        )
    ended = [words for how, words in ENDED.items() if (results["status"] == how).any()]
    table.caption = "; ".join([LEGEND.removesuffix("."), *ended]) + "."
    if ended:
        table.caption += f" {UNDECIDED}"
    table.caption = " ".join([table.caption, *cautions(results)])
    return table


def cautions(rows: "pd.DataFrame") -> list[str]:
    """Return sentences on what qualifies these rows: how the preset `author` differs from its code, and an artefact."""
    notes = []
    if "preset" in rows and (rows["preset"] == "author").any():
        notes.append(f"Departures of the preset author from the authors' code: {'; '.join(DEPARTURES)}.")
    if ((rows["attention"] == "alibi") & (rows["heads"] == 1)).any():
        notes.append(ONE_SLOPE)
    return notes


def _span(values: "pd.Series[float]") -> str:
    several = f" ({values.min():.3f} to {values.max():.3f})" if len(values) > 1 else ""
    return f"{values.mean():.3f}{several}"
