"""Rows of result tables: the columns common to all families; each adds its factors in a subclass of `Measurement`."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from sbeval.config import LATER

# name and options of an attention method
Method = tuple[str, str]
STICK: Method = ("stick_breaking", "")
ROPE: Method = ("rope", "")
# metrics that are shares of a whole, 0 to 1, in whatever table
SHARES = (
    "acc",
    "acc_bytes",
    "acc_norm",
    "accuracy",
    "error_rate",
    "greedy",
    "held_out",
    "score",
    "share",
    "solved",
    "validation_accuracy",
    "weight",
)


def spec_of(name: object, options: object) -> str:
    """Write a method as `--attention` takes it: `rope:theta=500.0`."""
    return f"{name}:{options}" if options else f"{name}"


def method_of(spec: str) -> Method:
    """Return name and options of a method that `spec_of` wrote."""
    name, _, options = spec.partition(":")
    return name, options


def column(label: str, *metadata: Mapping[str, Any], default: Any = MISSING) -> Any:
    """Declare a column that titles of figures can name. label: a phrase with its value, such as `{} layers`.

    metadata: marks of the field, such as LATER. Columns of one name, whatever their family, share the label.
    """
    marks = {key: value for part in (*metadata, {"label": label}) for key, value in part.items()}
    return field(default=default, metadata=marks)


def labels(*rows: type[Any]) -> dict[str, str]:
    """Return the labels of the columns of these dataclasses."""
    return {entry.name: entry.metadata["label"] for of in rows for entry in fields(of) if "label" in entry.metadata}


def later(*rows: type[Any]) -> set[str]:
    """Return the columns of these dataclasses that published tables may lack."""
    return {entry.name for of in rows for entry in fields(of) if LATER.items() <= entry.metadata.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """The model measured: method, training and evaluation. Lengths are in tokens."""

    family: str
    task: str = column("{}")
    model: str = column("{} model")
    attention: str
    options: str
    params: int
    train_len: int = column("trained at length {}")
    eval_len: int = column("evaluated to {} tokens")
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
    preset: str = column("preset {}")
    corpus: str = column("{}")
    tokenizer: str = column("{} tokenizer")
    train_tokens: int = column("{} training tokens")
    unique_tokens: int | None = field(default=None, metadata=LATER)
    epochs: float | None = field(default=None, metadata=LATER)
    dtype: str = column("{}")
    device: str
    backend: str
    commit: str
    torch: str
    triton: str
    utc: str
