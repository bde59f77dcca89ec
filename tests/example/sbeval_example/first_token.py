"""Repeat the first token of a row at its end.

tokens   5 1 4 2
targets  . . . 5
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sbeval.config import IGNORE, TASK, option
from sbeval.tasks import generated
from sbeval.tasks.generated import Examples

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(generated.Config):
    """The sweep, and the length of a row in tokens."""

    seq_len: int = option(32, TASK, "Tokens of a row.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row(generated.Row):
    """Factor: tokens of a row."""

    seq_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell(generated.Generated):
    """One method, learning rate and seed."""

    config: Config
    family: str = "first_token"
    row: ClassVar[type[Row]] = Row
    vocabulary: ClassVar[int] = 8

    @property
    def length(self) -> int:
        return self.config.seq_len

    def generate(self, seed: int, rows: "Tensor") -> Examples:
        import torch

        from sbeval.data import counter_rng

        tokens = counter_rng.below(counter_rng.bits(counter_rng.key(seed, 0), rows, self.length), self.vocabulary)
        targets = torch.full_like(tokens, IGNORE)
        targets[:, -1] = tokens[:, 0]
        return Examples(tokens, targets)


QUICK = Config(attention=("stick_breaking", "rope"), steps=300)
FAMILY = generated.family(Cell, help="Repeat the first token of a row.", presets={"quick": QUICK, "small": Config()})
