"""A base for tasks of generated examples: a task states its vocabulary, its length and how examples are drawn.

    class Cell(Generated):       what one example is, and how large the vocabulary
    FAMILY = family(Cell, ...)   a command, a section of studies, and a result table

It trains a small decoder for each method, learning rate and seed until all validation examples are right or its steps
are used, and measures the accuracy over labels of held-out examples. `tests/example/` is a package with such a task.
"""

import dataclasses
import functools
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sbeval.config import ATTENTION, EVALUATION, LR, MODEL, SEED, TRAINING, option
from sbeval.errors import InputError, check_swept
from sbeval.models.config import ModelConfig, flops_per_token
from sbeval.sweep.cell import Outcome
from sbeval.sweep.family import Family
from sbeval.tables.rows import Measurement, spec_of
from sbeval.tasks.synthetic import METHODS, TEST_SEED, TRAIN_SEED, VALIDATION_SEED, Scores, Synthetic, grid
from sbeval.training.config import TrainConfig

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table
    from torch import Tensor

    from sbeval.models.decoder import Decoder
    from sbeval.runtime.progress import Progress
    from sbeval.sweep.context import RunContext
    from sbeval.tables.statistics import Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A sweep over attention x learning rate x seed; a task's own class adds its factors.

    One that is a tuple is swept too: the config of a cell has one entry of it.
    """

    attention: tuple[str, ...] = option(METHODS, MODEL, ATTENTION, metavar="SPEC")
    seeds: tuple[int, ...] = option((0,), TRAINING, SEED, flag="--seed")
    lrs: tuple[float, ...] = option((3e-3,), TRAINING, LR, flag="--lr")
    width: int = option(64, MODEL, "Width of the model.")
    layers: int = option(2, MODEL, "Layers of the model.")
    heads: int = option(2, MODEL, "Attention heads.")
    batch: int = option(64, TRAINING, "Examples of an optimizer step.")
    steps: int = option(2000, TRAINING, "Optimizer steps at most.")
    check_every: int = option(100, TRAINING, "Steps between validations.")
    test_rows: int = option(1000, EVALUATION, "Examples of the test.")
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_swept(self, "attention", "seeds", "lrs", *_swept(self))
        for name in ("batch", "steps", "check_every", "test_rows"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1; got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row(Measurement):
    """Factors: the model and its learning rate; a task's own class adds fields of its config."""

    width: int
    layers: int
    heads: int
    lr: float


@dataclass(frozen=True, slots=True)
class Examples:
    """A batch: tokens and targets, (B, T) int64 each, the target IGNORE where nothing is scored."""

    tokens: "Tensor"
    targets: "Tensor"
    cu_seqlens: ClassVar[None] = None  # rows are not packed


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated(Synthetic):
    """One method, learning rate and seed: a config whose swept fields have one entry each.

    A task's class adds `family`, the name of the family, and `row`, a subclass of Row.
    """

    config: Config

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """Number of tokens."""

    @property
    @abstractmethod
    def length(self) -> int:
        """Tokens of an example."""

    @abstractmethod
    def generate(self, seed: int, rows: "Tensor") -> Examples:
        """Return examples number `rows`, (B,) int64, of a seed, on the device of `rows`."""

    @property
    def flops(self) -> float:
        """FLOPs of all steps and of the test, an upper bound: training may end earlier."""
        forward = flops_per_token(self.model(), self.length)
        return forward * (3 * self.training().tokens + self.config.test_rows * self.length)

    def model(self) -> ModelConfig:
        config = self.config
        return ModelConfig(
            vocab_size=self.vocabulary,
            width=config.width,
            layers=config.layers,
            heads=config.heads,
            hidden=2 * config.width,
            attention=self.attention,
        )

    def training(self) -> TrainConfig:
        config = self.config
        return TrainConfig(
            steps=config.steps,
            batch=config.batch,
            length=self.length,
            lr=config.lrs[0],
            warmup=max(1, config.steps // 20),
            seed=config.seeds[0],
            dtype=config.dtype,
            check_every=config.check_every,
        )

    def run(self, context: "RunContext", progress: "Progress") -> Outcome:
        """Train until solved or out of steps, then test."""
        from sbeval.tasks import drawn

        config, device = self.config, context.device
        batches = drawn.Drawn(
            lambda step: _numbers(config.batch, device) + step * config.batch,
            lambda rows: self.generate(TRAIN_SEED + config.seeds[0], rows),
        )
        validation = self.generate(VALIDATION_SEED, _numbers(max(1, config.test_rows // 3), device))
        with context.checkpoint(self, progress) as folder:
            trained = drawn.train(
                self, folder, batches, lambda model: self._accuracy(model, validation).value, _status, context, progress
            )
        test = self.generate(TEST_SEED, _numbers(config.test_rows, device))
        found = dataclasses.asdict(self._accuracy(trained.model, test)) | {"metric": "accuracy", "unit": "1"}
        return self.outcome([self.row(**found, **self._factors())], context, "validation_accuracy", trained)

    def _factors(self) -> dict[str, Any]:
        names = {field.name for field in dataclasses.fields(self.row)} - {
            x.name for x in dataclasses.fields(Measurement)
        }
        found = {name: getattr(self.config, name) for name in names - {"lr"}} | {"lr": self.config.lrs[0]}
        return {name: value[0] if isinstance(value, tuple) else value for name, value in found.items()}

    def _accuracy(self, model: "Decoder", examples: Examples) -> "Estimate":
        """Return the accuracy over labels; its standard error is over examples."""
        from sbeval.config import IGNORE
        from sbeval.tables import statistics
        from sbeval.tasks.drawn import predict

        correct, scored = predict(model, examples, self.dtype), examples.targets != IGNORE
        right, of = (mask.sum(1).double().cpu().numpy() for mask in (correct, scored))
        return statistics.ratio(right, of)


def _swept(config: Config) -> list[str]:
    """Return the names of a task's own factors that are swept."""
    fields = {field.name for field in dataclasses.fields(Config)}
    own = (field.name for field in dataclasses.fields(config) if field.name not in fields)
    return [name for name in own if isinstance(getattr(config, name), tuple)]


def _numbers(count: int, device: Any) -> "Tensor":
    import torch

    return torch.arange(count, device=device)


def _status(scores: Scores) -> str:
    return "solved" if scores and scores[-1][1] == 1 else "budget"


def family(cell: type[Generated], *, help: str, presets: Mapping[str, Config]) -> Family:
    """Return the family of a task, named by the default of `family` in its cells; one preset must be `quick`."""
    name = {field.name: field.default for field in dataclasses.fields(cell)}["family"]
    config = type(presets["quick"])
    assert isinstance(name, str)

    def cells(sweep: Config) -> list[Generated]:
        """Return the grid, seeds outermost. Raise InputError for an unknown method or option."""
        points: list[dict[str, Any]] = [{}]
        for factor in _swept(sweep):
            points = [point | {factor: (value,)} for point in points for value in getattr(sweep, factor)]
        return [cell(config=dataclasses.replace(one, **point)) for one in grid(sweep) for point in points]

    summary = functools.partial(_summary, factors=_swept(presets["quick"]))
    return Family(name=name, help=help, config=config, presets=presets, cells=cells, summary=summary)


def _summary(results: "pd.DataFrame", factors: list[str]) -> "Table":
    """Return the table for the terminal: accuracy by method, swept factors and learning rate, averaged over seeds."""
    from rich.table import Table

    factors = [name for name in factors if name in results]
    table = Table(title=f"{results['family'].iloc[0]}: accuracy")
    table.add_column("attention")
    for name in (*factors, "lr", "accuracy", "seeds"):
        table.add_column(name, justify="right")
    for (attention, options, *point, lr), group in results.groupby(["attention", "options", *factors, "lr"]):
        mean, seeds = f"{group['value'].mean():.3f}", f"{group['seed'].nunique()}"
        table.add_row(spec_of(attention, options), *(f"{value}" for value in point), f"{lr:g}", mean, seeds)
    return table
