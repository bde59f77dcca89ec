"""What a sweep is made of: its steps, which need others, and the cells among them, which leave rows."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from sbeval.config import digest_of
from sbeval.tables.rows import Identity, Measurement

if TYPE_CHECKING:
    from sbeval.models.config import ModelConfig
    from sbeval.runtime.progress import Progress
    from sbeval.sweep.context import Place
    from sbeval.training.trainer import Trained

# `status` of the rows of a cell without a result
FAILED = ("diverged", "failed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Result of a finished cell."""

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


class Step(ABC):
    """Part of a sweep, a frozen dataclass. Steps that do the same are equal."""

    __slots__ = ()

    @property
    @abstractmethod
    def title(self) -> str:
        """Name for people."""

    @property
    @abstractmethod
    def dtype(self) -> str:
        """What matrix products run in."""

    @property
    @abstractmethod
    def flops(self) -> float:
        """Floating-point operations, roughly, without those of what it needs."""

    @property
    def needs(self) -> "tuple[Step, ...]":
        """Steps that must be done before, in that order."""
        return ()

    @property
    def leaves(self) -> "ModelConfig | None":
        """Shape of the model whose checkpoint it leaves, without reading a tokenizer; None where it trains none."""
        return None


class TrainingStep(Step):
    """A training step; equal for all cells that evaluate its model."""

    __slots__ = ()

    @abstractmethod
    def train(self, place: "Place", progress: "Progress") -> Path:
        """Train, unless that is done, and return the checkpoint folder."""


class Cell(Step):
    """One point of a sweep: its fields are all that its numbers depend on."""

    __slots__ = ()

    @property
    @abstractmethod
    def family(self) -> str:
        """Name of its task family and table."""

    @property
    @abstractmethod
    def row(self) -> type[Measurement]:
        """Class of its rows."""

    def source(self, progress: "Progress") -> str:
        """Return the digest of the text that the cell reads, empty when it reads none."""
        return ""

    def check(self, progress: "Progress") -> None:
        """Raise InputError, before anything is trained, where the text or its documents do not suffice."""
        return None

    @abstractmethod
    def run(self, place: "Place", progress: "Progress") -> Outcome:
        """Train, unless a checkpoint has the model, and evaluate."""

    def failed(self, how: str, place: "Place") -> Outcome | None:
        """Return the rows of a cell that failed, if its table has such; `how` is one of FAILED."""
        return None


def cell_id(cell: Cell) -> str:
    """Return the name of a cell in tables and of its run file: readable first, then what tells it from all others."""
    return f"{cell.family}-{cell.title.replace(' ', '-').replace(':', '-')}-{digest_of(cell)}"


def timing(trained: "Trained") -> dict[str, object]:
    """Return what a run file says about training."""
    return {
        "train_seconds": trained.state.seconds,
        "train_time": str(timedelta(seconds=round(trained.state.seconds))),
        "mfu": trained.mfu,
        "sequences_at_a_time": trained.rows,
        "losses": [round(loss, 4) for loss in trained.state.losses],
    }
