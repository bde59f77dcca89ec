"""What a sweep is made of: cells, what they need, what they find, and what they are called."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeGuard

from sbeval.config import digest_of
from sbeval.graph import Step
from sbeval.progress import Progress
from sbeval.table import Identity, Measurement
from sbeval.train import Trained

if TYPE_CHECKING:
    from sbeval.place import Place

# `status` of the rows of a cell that found nothing
FAILED = ("diverged", "failed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a finished cell found."""

    identity: Identity
    rows: Sequence[Measurement]
    corpus: str = ""
    corpus_digest: str = ""
    tokenizer: str = ""
    train_tokens: int
    backend: str
    tokens_per_s: float | None
    measured: Mapping[str, object] = field(default_factory=dict)


class Cell(Step, Protocol):
    """One point of a sweep: its fields are all that its numbers depend on."""

    @property
    def family(self) -> str: ...

    @property
    def row(self) -> type[Measurement]:
        """The class of its rows."""

    def source(self, progress: Progress) -> str:
        """Digest of the text that the cell reads, empty when it reads none."""

    def run(self, place: "Place", progress: Progress) -> Outcome: ...


class Training(Step, Protocol):
    """What leaves a model that cells evaluate; it is equal for all cells of that model."""

    def train(self, place: "Place", progress: Progress) -> Path:
        """Train, unless that is done, and return the checkpoint folder."""


class Checks(Cell, Protocol):
    """A cell that can say before anything is trained what is the user's to change."""

    def check(self, progress: Progress) -> None:
        """InputError where the text, its documents or what is asked cannot do."""


class Reports(Cell, Protocol):
    """A cell whose failure is a row of its table too."""

    def failed(self, how: str, place: "Place") -> Outcome:
        """What the table says; `how` is one of FAILED."""


def cell_id(cell: Cell) -> str:
    """Name of a cell in tables and of its run file: readable first, then what tells it from all others."""
    return f"{cell.family}-{cell.title.replace(' ', '-').replace(':', '-')}-{digest_of(cell)}"


def is_cell(step: Step) -> TypeGuard[Cell]:
    """Whether a step has rows, unlike a training."""
    return hasattr(step, "row")


def timing(trained: Trained) -> dict[str, object]:
    """What a run file says about training."""
    return {
        "train_seconds": trained.state.seconds,
        "train_time": str(timedelta(seconds=round(trained.state.seconds))),
        "mfu": trained.mfu,
        "sequences_at_a_time": trained.rows,
        "losses": [round(loss, 4) for loss in trained.state.losses],
    }
