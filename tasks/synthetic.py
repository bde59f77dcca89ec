"""Base of cells that train a model on generated examples, with early stopping."""

import dataclasses
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

from sbeval import registry
from sbeval.models.config import ModelConfig, canonical_attention
from sbeval.sweep.cell import Cell, Outcome, loss_curves, timing
from sbeval.tables.rows import Identity, Measurement, method_of
from sbeval.training.config import TrainConfig

if TYPE_CHECKING:
    import pandas as pd

    from sbeval.sweep.context import RunContext
    from sbeval.training.trainer import Trained

# a config of a sweep over `attention`, `seeds` and `lrs`
Sweep = TypeVar("Sweep", bound=Any)
# methods that presets compare
METHODS = ("stick_breaking", "rope", "nope", "alibi", "forgetting")
# the test seed is that of the public code of the paper's first author; the other two are far from it and any --seed
TEST_SEED, VALIDATION_SEED, TRAIN_SEED = 10, 1 << 40, 1 << 41
# validation scores during training: (step, score)
Scores = Sequence[tuple[int, float]]


def grid(config: Sweep) -> list[Sweep]:
    """Return a config for each method, learning rate and seed, seeds outermost.

    Raise InputError for an unknown method or option.
    """
    methods = dict.fromkeys(canonical_attention(spec) for spec in config.attention)
    return [
        dataclasses.replace(config, attention=(spec,), seeds=(seed,), lrs=(lr,))
        for seed in dict.fromkeys(config.seeds)
        for lr in dict.fromkeys(config.lrs)
        for spec in methods
    ]


class Synthetic(Cell):
    """A cell that trains one model on generated examples: a config whose swept fields have one entry each."""

    __slots__ = ()
    config: Any

    @property
    def attention(self) -> str:
        """Method and options."""
        return cast(str, self.config.attention[0])

    @property
    def title(self) -> str:
        return f"{self.attention} lr {self.config.lrs[0]:g} seed {self.config.seeds[0]}"

    @property
    def dtype(self) -> str:
        return cast(str, self.config.dtype)

    @abstractmethod
    def model(self) -> ModelConfig:
        """Return the shape of the model."""

    @abstractmethod
    def training(self) -> TrainConfig:
        """Return the settings of its training."""

    @property
    def leaves(self) -> ModelConfig:
        return self.model()

    def outcome(
        self,
        rows: Sequence[Measurement],
        context: "RunContext",
        scores: str,
        trained: "Trained | None" = None,
        values: "pd.DataFrame | None" = None,
    ) -> Outcome:
        """Return the result of the cell, or of a failure where `trained` is None. scores: the name of their curve."""
        from sbeval.models.decoder import n_parameters

        shape, training = self.model(), self.training()
        name, options = method_of(self.attention)
        return Outcome(
            identity=Identity(
                family=self.family,
                task=self.family,
                model=f"{shape.layers}x{shape.width}",
                attention=name,
                options=options,
                params=n_parameters(shape),
                train_len=training.length,
                eval_len=training.length,
                seed=training.seed,
            ),
            rows=rows,
            train_tokens=trained.state.step * training.batch * training.length if trained else 0,
            backend=registry.method(name).backend_name(context.device.type),
            tokens_per_s=trained.tokens_per_second if trained else None,
            measured=timing(trained) if trained else {},
            values=values,
            curves={**loss_curves(trained.state), scores: trained.state.scores} if trained else {},
        )
