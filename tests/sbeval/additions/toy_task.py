"""Toy task: repeat the first token of a row at its end.

tokens   5 1 4 2
targets  . . . 5
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sbeval.config import ATTENTION, MODEL, SEED, TASK, TRAINING, option
from sbeval.models.config import ModelConfig, canonical_attention, flops_per_token
from sbeval.sweep.cell import Outcome
from sbeval.sweep.family import Family
from sbeval.tables.rows import Measurement
from sbeval.tasks.synthetic import TEST_SEED, TRAIN_SEED, Synthetic

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from rich.table import Table

    from sbeval.training.config import TrainConfig

VOCABULARY, BATCH = 8, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Row(Measurement):
    """Factor: length of a row."""

    seq_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A sweep over attention x seed. Lengths are in tokens."""

    attention: tuple[str, ...] = option(("stick_breaking",), MODEL, ATTENTION, metavar="SPEC")
    seeds: tuple[int, ...] = option((0,), TRAINING, SEED, flag="--seed")
    seq_len: int = option(8, TASK, "Tokens of a row.")
    steps: int = option(2, TRAINING, "Optimizer steps.")
    dtype: str = "float32"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell(Synthetic):
    """One method and seed: a config whose swept fields have one entry each."""

    config: Config
    family: str = "toy"

    @property
    def row(self) -> type[Row]:
        return Row

    @property
    def attention(self) -> str:
        return self.config.attention[0]

    @property
    def title(self) -> str:
        return f"{self.attention} seed {self.config.seeds[0]}"

    @property
    def dtype(self) -> str:
        return self.config.dtype

    @property
    def flops(self) -> float:
        return 3 * flops_per_token(self.model(), self.config.seq_len) * self.training().tokens

    def model(self) -> ModelConfig:
        return ModelConfig(vocab_size=VOCABULARY, width=8, layers=1, heads=1, hidden=16, attention=self.attention)

    def training(self) -> "TrainConfig":
        from sbeval.training.config import TrainConfig

        length, dtype = self.config.seq_len, self.config.dtype
        return TrainConfig(
            steps=self.config.steps, batch=BATCH, length=length, lr=1e-2, seed=self.config.seeds[0], dtype=dtype
        )

    def run(self, place: Any, progress: Any) -> Outcome:
        import torch

        from sbeval.tables import statistics
        from sbeval.tasks import drawn

        def rows(step: int) -> "torch.Tensor":
            return torch.arange(step * BATCH, (step + 1) * BATCH, device=place.device)

        batches = drawn.Drawn(rows, functools.partial(generate, self.config.seq_len, TRAIN_SEED + self.config.seeds[0]))
        with place.checkpoint([self.family, self.model(), self.training()], progress) as folder:
            trained = drawn.train(self, folder, batches, lambda _: 0.0, lambda _: "budget", place, progress)
        test = generate(self.config.seq_len, TEST_SEED, torch.arange(50, device=place.device))
        correct = drawn.predict(trained.model, test, self.dtype)[:, -1]
        found = statistics.mean(correct.double().cpu().numpy())
        measured = dataclasses.asdict(found) | {"metric": "accuracy", "unit": "1", "seq_len": self.config.seq_len}
        return self.outcome([Row(**measured)], place, "validation", trained)


@dataclass(frozen=True, slots=True)
class Examples:
    """A batch, (B, T) int64 each; targets are IGNORE but at the end. Rows are not packed."""

    tokens: "torch.Tensor"
    targets: "torch.Tensor"
    cu_seqlens: ClassVar[None] = None


def generate(length: int, seed: int, rows: "torch.Tensor") -> Examples:
    """Return examples number `rows`, (B,) int64, of a seed."""
    import torch

    from sbeval.data import counter_rng
    from sbeval.models.decoder import IGNORE

    tokens = counter_rng.below(counter_rng.bits(counter_rng.key(seed, 0), rows, length), VOCABULARY)
    targets = torch.full_like(tokens, IGNORE)
    targets[:, -1] = tokens[:, 0]
    return Examples(tokens, targets)


def cells(config: Config) -> list[Cell]:
    """Return the grid, seeds outermost. InputError names an unknown method or option."""
    return [
        Cell(config=dataclasses.replace(config, attention=(canonical_attention(spec),), seeds=(seed,)))
        for seed in config.seeds
        for spec in config.attention
    ]


def summary(results: "pd.DataFrame") -> "Table":
    """Return a table of accuracies for the terminal."""
    from rich.table import Table

    table = Table("attention", "accuracy", title="Toy accuracy")
    for attention, group in results.groupby("attention"):
        table.add_row(str(attention), f"{group['value'].mean():.3f}")
    return table


FAMILY = Family(
    name="toy",
    help="Toy: repeat the first token.",
    config=Config,
    presets={"quick": Config()},
    cells=cells,
    summary=summary,
)
