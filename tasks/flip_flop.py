"""Flip-flop language (Liu et al. 2023, arXiv 2306.00946): every read must return the bit that was last written.

An example is T/2 instructions with a bit each: w (write), r (read) and i (ignore). The first instruction is a write and
the last a read; between them each is an ignore with probability p, else a write or a read, equally likely. Bits of
writes and ignores are random; that of a read is the last written bit, which is what a model must predict:

    tokens   w 1 i 0 r 1 w 0 i 1 i 1 r 0
    labels   . . . . 1 . . . . . . . 0 .

Trained at p = 0.8, tested there (in distribution), at p = 0.98 (sparse: the write is far back) and p = 0.1 (dense: many
writes compete). The loss is over reads alone, the only bits that are determined; examples are new at every step. T, p
and the tests are Liu et al.'s; the model of one layer, two heads and width 64 is that of PaTH (arXiv 2505.16381, table
1), whose published numbers are the baselines. PaTH's learning rates, batch and steps are not published: these are ours.
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sbeval.config import ATTENTION, EVALUATION, LR, MODEL, SEED, TASK, TRAINING, option
from sbeval.errors import InputError, check_swept
from sbeval.models.config import ModelConfig, flops_per_token
from sbeval.registry import HELP
from sbeval.sweep.cell import Outcome
from sbeval.sweep.family import Family
from sbeval.tables.published import FLIP_FLOP, FLIP_FLOP_SOURCE
from sbeval.tables.published import FLIP_FLOP_TESTS as TESTS
from sbeval.tables.rows import Measurement, spec_of
from sbeval.tasks.synthetic import METHODS, TEST_SEED, VALIDATION_SEED, Scores, Synthetic, grid
from sbeval.training.config import TrainConfig

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table
    from torch import Tensor

    from sbeval.runtime.progress import Progress
    from sbeval.sweep.context import RunContext
    from sbeval.tasks.flip_flop_data import Examples

NAME = "flip_flop"
# two bits and three instructions
VOCABULARY = 5
# key of the validation scores in run files
SCORES = "validation_error"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row(Measurement):
    """Factors: sizes of task and model; the `test` (in_distribution, sparse, dense, validation) and its p_ignore; the
    number of `reads` of an error rate; distance_start <= d < distance_end of reads d instructions after their write.
    `status` of the row of metric `solved` is how training ended, as in `mqrar`."""

    seq_len: int
    p_train: float
    width: int
    layers: int
    heads: int
    lr: float
    test: str = ""
    p_ignore: float | None = None
    reads: int | None = None
    distance_start: int | None = None
    distance_end: int | None = None
    status: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A sweep over attention x learning rate x seed. Lengths are in tokens."""

    attention: tuple[str, ...] = option(METHODS, MODEL, ATTENTION, metavar="SPEC")
    seeds: tuple[int, ...] = option((0, 1, 2), TRAINING, SEED, flag="--seed")
    lrs: tuple[float, ...] = option((3e-4, 1e-3, 3e-3), TRAINING, LR, flag="--lr")
    seq_len: int = option(512, TASK, "Tokens of an example, half of which are instructions.")
    p_ignore: float = option(0.8, TASK, "Probability of `ignore` in training and in the test in distribution.")
    p_sparse: float = option(0.98, TASK, "Probability of `ignore` in the sparse test.")
    p_dense: float = option(0.1, TASK, "Probability of `ignore` in the dense test.")
    width: int = option(64, MODEL, "Width of the model.")
    layers: int = option(1, MODEL, "Layers of the model.")
    heads: int = option(2, MODEL, "Attention heads.")
    batch: int = option(64, TRAINING, "Examples of an optimizer step.")
    steps: int = option(10_000, TRAINING, "Optimizer steps at most.")
    schedule: str = option("cosine", TRAINING, "Learning rate schedule: cosine, power, constant or wsd.")
    weight_decay: float = option(0.1, TRAINING, "Weight decay.")
    stop_error: float = option(0.0, TRAINING, "Validation error, in distribution, at or below which training ends.")
    patience: int = option(0, TRAINING, "Steps without a lower validation error after which training ends; 0: never.")
    check_every: int = option(250, TRAINING, "Steps between validations.")
    test_rows: int = option(10_000, EVALUATION, "Examples of each test.")
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_swept(self, "attention", "seeds", "lrs")
        for name in ("heads", "batch", "steps", "test_rows", "check_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.seq_len < 4 or self.seq_len % 2:
            raise InputError(f"seq_len must be even and at least 4; got {self.seq_len}")
        for name in ("p_ignore", "p_sparse", "p_dense"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must be 0 to 1; got {getattr(self, name)}")
        if self.patience < 0 or self.stop_error < 0:
            raise InputError("patience and stop_error must be at least 0")
        if self.width % self.heads:
            raise InputError(f"width {self.width} is not a multiple of {self.heads} heads")


PRESETS = {
    # a quarter of the length, two methods: two minutes on two cores
    "quick": Config(
        attention=("stick_breaking", "rope"), seeds=(0,), lrs=(3e-3,), seq_len=128, batch=32, steps=400,
        check_every=100, test_rows=1000,
    ),
    "small": Config(seeds=(0,), lrs=(1e-3,), steps=5000),
    "h200": Config(patience=4000),
    # Liu et al.'s numbers of test examples are 1,000, 100,000 and 3,000; here each has the largest
    "paper": Config(batch=256, steps=20_000, test_rows=100_000),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell(Synthetic):
    """One method, learning rate and seed: a config whose swept fields have one entry each."""

    config: Config
    family: str = NAME
    row: ClassVar[type[Row]] = Row

    @property
    def flops(self) -> float:
        """FLOPs of all steps and of the tests, an upper bound: training may end earlier."""
        config = self.config
        forward = flops_per_token(self.model(), config.seq_len)
        return forward * (3 * self.training().tokens + len(TESTS) * config.test_rows * config.seq_len)

    def model(self) -> ModelConfig:
        config = self.config
        return ModelConfig(
            vocab_size=VOCABULARY,
            width=config.width,
            layers=config.layers,
            heads=config.heads,
            hidden=4 * config.width,
            attention=self.attention,
            mlp="gelu",
            tied=True,
        )

    def training(self) -> TrainConfig:
        config = self.config
        return TrainConfig(
            steps=config.steps,
            batch=config.batch,
            length=config.seq_len,
            lr=config.lrs[0],
            schedule=config.schedule,
            warmup=max(1, config.steps // 20),
            weight_decay=config.weight_decay,
            seed=config.seeds[0],
            dtype=config.dtype,
            sparse=True,
            capacity=config.batch * config.seq_len // 2,
            check_every=config.check_every,
        )

    def run(self, context: "RunContext", progress: "Progress") -> Outcome:
        """Train until solved, on a plateau or out of steps, then test."""
        from sbeval.tables.values import counted, joined
        from sbeval.tasks import drawn
        from sbeval.tasks.flip_flop_data import batches, counts, errors

        config = self.config
        validation = self._examples(config.p_ignore, VALIDATION_SEED, max(1, config.test_rows // 3), context)
        # validation decides when training ends
        ending = [config.p_ignore, config.stop_error, config.patience, len(validation.tokens)]
        with context.checkpoint([NAME, self.model(), self.training(), *ending], progress) as folder:
            trained = drawn.train(
                self,
                folder,
                batches(config.seq_len, config.p_ignore, config.seeds[0], config.batch, context.device),
                lambda decoder: next(errors(validation, drawn.predict(decoder, validation, config.dtype)))[0].value,
                functools.partial(status, config),
                context,
                progress,
            )
        correct = drawn.predict(trained.model, validation, config.dtype)
        rows, values = self._rows(validation, correct, "validation", config.p_ignore)[:1], []
        for test, p_ignore in zip(TESTS, (config.p_ignore, config.p_sparse, config.p_dense), strict=True):
            examples = self._examples(p_ignore, TEST_SEED, config.test_rows, context)
            correct = drawn.predict(trained.model, examples, config.dtype)
            rows += self._rows(examples, correct, test, p_ignore)
            values.append(counted(counts(examples, correct), "wrong", "reads", test=test))
        how = status(config, trained.state.scores)
        return self.outcome([*rows, self._ended(how)], context, SCORES, trained, joined(values))

    def failed(self, how: str, context: "RunContext") -> Outcome:
        return self.outcome([self._ended(how)], context, SCORES)

    def _examples(self, p_ignore: float, seed: int, rows: int, context: "RunContext") -> "Examples":
        import torch

        from sbeval.tasks.flip_flop_data import generate

        return generate(self.config.seq_len, p_ignore, seed, torch.arange(rows, device=context.device))

    def _rows(self, examples: "Examples", correct: "Tensor", test: str, p_ignore: float) -> list[Row]:
        from sbeval.tasks.flip_flop_data import errors

        where: dict[str, Any] = {"test": test, "p_ignore": p_ignore} | self._sizes()
        return [
            Row(metric="error_rate", unit="1", **dataclasses.asdict(rate), **where, **factors)
            for rate, factors in errors(examples, correct)
        ]

    def _ended(self, how: str) -> Row:
        return Row(metric="solved", unit="1", value=float(how == "solved"), n=1, status=how, **self._sizes())

    def _sizes(self) -> dict[str, Any]:
        config = self.config
        return {
            "seq_len": config.seq_len,
            "p_train": config.p_ignore,
            "width": config.width,
            "layers": config.layers,
            "heads": config.heads,
            "lr": config.lrs[0],
        }


def status(config: Config, scores: Scores) -> str:
    """Return `solved`, `plateau` or else `budget`, after validation scores of (step, error rate)."""
    if not scores:
        return "budget"
    step, error = scores[-1]
    if error <= config.stop_error:
        return "solved"
    best = min(scores, key=lambda score: score[1])[0]
    return "plateau" if config.patience and step - best >= config.patience else "budget"


def cells(config: Config) -> list[Cell]:
    """Return the grid, seeds outermost. Raise InputError for an unknown method or option."""
    return [Cell(config=one) for one in grid(config)]


def summary(results: "pd.DataFrame") -> "Table":
    """Return the table for the terminal: error rates at the best learning rate by validation, and published ones."""
    from rich.table import Table

    from sbeval.tables import selection

    table = Table(title=f"Flip-flop error rates over reads, % (published: {FLIP_FLOP_SOURCE}, 512 tokens)")
    table.add_column("attention")
    for name in ("", "lr", *TESTS):
        table.add_column(name.replace("_", " "), justify="right", no_wrap=True)
    measured = selection.flip_flop_errors(results) if (results["metric"] == "error_rate").any() else results[:0]
    for (attention, options, lr), group in measured.groupby(["attention", "options", "lr"]):
        rates = {str(test): rows["value"].to_numpy() * 100 for test, rows in group.groupby("test")}
        name = spec_of(attention, options)
        table.add_row(name, "here", f"{lr:g}", *(f"{rates[test].mean():.3g}" for test in TESTS))
        if group["seed"].nunique() > 1:
            spans = (f"{rates[test].min():.3g} to {rates[test].max():.3g}" for test in TESTS)
            table.add_row("", "seeds", "", *spans)
    lost = results[(results["metric"] == "solved") & results["status"].isin(("diverged", "failed"))]
    for (attention, options, lr, how), group in lost.groupby(["attention", "options", "lr", "status"]):
        table.add_row(spec_of(attention, options), f"{len(group)} {how}", f"{lr:g}")
    for name, published in FLIP_FLOP.items():
        table.add_row(name, "published", "", *(f"{100 * published[test]:.3g}" for test in TESTS))
    return table


FAMILY = Family(
    name=NAME,
    help=HELP[NAME],
    config=Config,
    presets=PRESETS,
    cells=cells,
    summary=summary,
)
