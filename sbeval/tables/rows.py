"""Rows of result tables: the columns common to all families; each adds its factors in a subclass of `Measurement`."""

from dataclasses import dataclass, field

from sbeval.config import LATER

# metrics that are shares of a whole, 0 to 1, in whatever table
SHARES = (
    "acc",
    "acc_bytes",
    "acc_norm",
    "accuracy",
    "error_rate",
    "greedy",
    "score",
    "share",
    "solved",
    "validation_accuracy",
    "weight",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """The model measured: method, training and evaluation. Lengths are in tokens."""

    family: str
    task: str
    model: str
    attention: str
    options: str
    params: int
    train_len: int
    eval_len: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One number. `stderr` is its standard error as a mean over `n` units; None when it has none."""

    metric: str
    unit: str
    value: float
    stderr: float | None = None
    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Origin of a row. `cell` is the stem of its run file, results/runs/<cell>.json.

    unique_tokens: tokens of one epoch of the training text; None for generated data.
    """

    cell: str
    preset: str
    corpus: str
    tokenizer: str
    train_tokens: int
    unique_tokens: int | None = field(default=None, metadata=LATER)
    epochs: float | None = field(default=None, metadata=LATER)
    dtype: str
    device: str
    backend: str
    commit: str
    torch: str
    triton: str
    utc: str
