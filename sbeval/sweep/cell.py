"""Steps of a sweep: trainings, and cells, which depend on trainings and produce the rows of result tables."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from sbeval.config import digest_of
from sbeval.tables.rows import Identity, Measurement

if TYPE_CHECKING:
    import pandas as pd

    from sbeval.models.config import ModelConfig
    from sbeval.runtime.progress import Progress
    from sbeval.sweep.context import RunContext
    from sbeval.tables.curves import Curves
    from sbeval.training.checkpoint import State
    from sbeval.training.text_model import TextModel
    from sbeval.training.trainer import Trained

# `status` of the rows of a cell without a result
FAILED = ("diverged", "failed")
# bytes of a cell's title in its id: the name of a file has 255, with what temporary files and locks add to it
LONGEST_TITLE = 160


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Result of a finished cell.

    values: one for each document, item or prompt behind the rows (see `sbeval.tables.values`). curves: by training step
    (see `sbeval.tables.curves`).
    """

    identity: Identity
    rows: Sequence[Measurement]
    corpus: str = ""
    corpus_digest: str = ""
    tokenizer: str = ""
    train_tokens: int
    unique_tokens: int | None = None
    epochs: float | None = None
    backend: str
    tokens_per_s: float | None
    measured: Mapping[str, object] = field(default_factory=dict)
    values: "pd.DataFrame | None" = None
    curves: "Curves" = field(default_factory=dict)


class Step(ABC):
    """Part of a sweep, a frozen dataclass. Steps that do the same work are equal."""

    __slots__ = ()

    @property
    @abstractmethod
    def title(self) -> str:
        """Human-readable name."""

    @property
    @abstractmethod
    def dtype(self) -> str:
        """Data type of matrix products."""

    @property
    @abstractmethod
    def flops(self) -> float:
        """Estimated floating-point operations, without those of its dependencies."""

    @property
    def needs(self) -> "tuple[Step, ...]":
        """Dependencies, in the order in which they must run."""
        return ()

    @property
    def leaves(self) -> "ModelConfig | None":
        """Config of the model that it trains, without reading a tokenizer; None if it trains none."""
        return None

    @property
    def copies(self) -> int:
        """Return how many times its checkpoint has the size of the weights in the end: 3 with the optimizer's state."""
        return 1

    @property
    def reads(self) -> "TextModel | None":
        """Options whose corpus it trains on; None if it trains on no text."""
        return None


class TrainingStep(Step):
    """A training step; equal for all cells that evaluate its model."""

    __slots__ = ()

    @abstractmethod
    def train(self, context: "RunContext", progress: "Progress") -> Path:
        """Train, or reuse a finished checkpoint, and return the checkpoint folder."""

    def trained(self, context: "RunContext") -> bool:
        """Return whether a finished checkpoint is known to be there, without opening or writing more than that."""
        return False


class Cell(Step):
    """One point of a sweep; its results depend on its fields alone."""

    __slots__ = ()

    @property
    @abstractmethod
    def family(self) -> str:
        """Name of its task family and result table."""

    @property
    @abstractmethod
    def row(self) -> type[Measurement]:
        """Class of its rows."""

    def source(self, progress: "Progress") -> str:
        """Return the digest of the text that the cell reads; empty if it reads none."""
        return ""

    def check(self, progress: "Progress") -> None:
        """Validate the inputs before training; raise InputError if the text or its documents are too short."""
        return None

    @abstractmethod
    def run(self, context: "RunContext", progress: "Progress") -> Outcome:
        """Train, or load a finished checkpoint, and evaluate."""

    def failed(self, how: str, context: "RunContext") -> Outcome | None:
        """Return the rows that record a failure, or None if the table records none; `how` is one of FAILED."""
        return None


def cell_id(cell: Cell) -> str:
    """Return the id of a cell in tables and of its run file: a readable name, then a digest of all fields."""
    return f"{cell.family}-{step_id(cell)}"


def step_id(step: Step) -> str:
    """Return a readable name and a digest of all fields of a step, for folders of logs."""
    title = step.title.replace(" ", "-").replace(":", "-")
    if len(title.encode()) > LONGEST_TITLE:
        title = title.encode()[:LONGEST_TITLE].decode(errors="ignore")
    return f"{title}-{digest_of(step)}"


def timing(trained: "Trained") -> dict[str, object]:
    """Return the entries on training for a run file."""
    return {
        "train_seconds": trained.state.seconds,
        "train_time": str(timedelta(seconds=round(trained.state.seconds))),
        "mfu": trained.mfu,
        "sequences_at_a_time": trained.rows,
    }


def loss_curves(state: "State") -> "Curves":
    """Return the loss of every training step, and the held-out losses if there are any, in nats/token."""
    losses = [(step, round(loss, 4)) for step, loss in enumerate(state.losses, start=1)]
    return {"loss": losses, **held_out_curve(state)}


def held_out_curve(state: "State") -> "Curves":
    """Return the held-out losses, if there are any, in nats/token."""
    return {"held_out_loss": [(step, round(loss, 4)) for step, loss in state.held_out]} if state.held_out else {}
