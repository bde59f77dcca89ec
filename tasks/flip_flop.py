"""Flip-flop language (Liu et al. 2023, arXiv 2306.00946): every read must return the bit that was last written.

An example is T/2 instructions with a bit each: w (write), r (read) and i (ignore). The first instruction is a write and
the last a read; between them each is an ignore with probability p, else a write or a read, equally likely. Bits of
writes and ignores are random; that of a read is the last written bit, which is what a model must predict:

    tokens   w 1 i 0 r 1 w 0 i 1 i 1 r 0
    labels   . . . . 1 . . . . . . . 0 .

Trained at p = 0.8, tested there (in distribution), at p = 0.98 (sparse: the write is far back) and p = 0.1 (dense: many
writes compete). The loss is over reads alone, whose bits alone are determined; new examples at every step. T, p and the
tests are Liu et al.'s, the model of one layer, two heads and width 64 that of PaTH (arXiv 2505.16381, table 1), whose
figures stand beside ours. How PaTH trained is not known here: learning rates, batch and steps are ours.
"""

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from rich.table import Table
from torch import Tensor

from sbeval import counter, model, selection, statistics, synthetic
from sbeval.cell import Outcome
from sbeval.errors import InputError, check_swept
from sbeval.model import IGNORE, Decoder, ModelConfig
from sbeval.place import Place
from sbeval.progress import Progress
from sbeval.published import FLIP_FLOP, FLIP_FLOP_SOURCE
from sbeval.selection import FLIP_FLOP_TESTS as TESTS
from sbeval.statistics import Estimate
from sbeval.synthetic import METHODS, TEST_SEED, TRAIN_SEED, VALIDATION_SEED, Drawn, Scores, predict
from sbeval.table import Measurement
from sbeval.train import TrainConfig, Trained

FAMILY = "flip_flop"
# tokens: the bits 0 and 1, then the instructions
WRITE, READ, SKIP = 2, 3, 4
VOCABULARY = 5
# streams of random numbers
INSTRUCTIONS, BITS = range(2)


@dataclass(frozen=True, slots=True)
class Examples:
    """A batch, (B, T) int64 each. targets: the bit at a read, else IGNORE; distance: instructions back to its write."""

    tokens: Tensor
    targets: Tensor
    distance: Tensor

    @property
    def cu_seqlens(self) -> None:
        """Examples are not packed."""


def generate(length: int, p_ignore: float, seed: int, rows: Tensor) -> Examples:
    """Examples number `rows`, (B,) int64, of a seed: the same on every device, that of `rows`."""
    count = length // 2
    draw = counter.uniform(counter.bits(counter.key(seed, INSTRUCTIONS), rows, count))
    bits = counter.below(counter.bits(counter.key(seed, BITS), rows, count), 2)
    instructions = torch.where(draw < p_ignore, SKIP, torch.where(draw < (1 + p_ignore) / 2, WRITE, READ))
    instructions[:, 0], instructions[:, -1] = WRITE, READ
    number = torch.arange(count, device=rows.device).expand_as(bits)
    write = number.where(instructions == WRITE, 0).cummax(1).values
    reads = instructions == READ
    bits = bits.gather(1, write).where(reads, bits)
    nowhere = torch.full_like(bits, IGNORE)

    def interleaved(first: Tensor, second: Tensor) -> Tensor:
        return torch.stack([first, second], 2).flatten(1)

    return Examples(
        tokens=interleaved(instructions, bits),
        targets=interleaved(bits.where(reads, IGNORE), nowhere),
        distance=interleaved((number - write).where(reads, 0), torch.zeros_like(bits)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Row(Measurement):
    """Factors: sizes of task and model; the `test` (in_distribution, sparse, dense, validation) and its p_ignore; over
    how many `reads` an error rate was measured; distance_start <= d < distance_end of reads d instructions after their
    write. A cell's row of metric `solved` says in `status` how it ended: as `mqrar`'s does."""

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

    attention: tuple[str, ...] = METHODS
    seeds: tuple[int, ...] = (0, 1, 2)
    lrs: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    seq_len: int = 512
    p_ignore: float = 0.8
    p_sparse: float = 0.98
    p_dense: float = 0.1
    width: int = 64
    layers: int = 1
    heads: int = 2
    batch: int = 64
    steps: int = 10_000
    schedule: str = "cosine"
    weight_decay: float = 0.1
    stop_error: float = 0.0  # of validation, in distribution: at or below it training ends
    patience: int = 0  # steps without a better validation error after which training ends; 0 waits to the last
    check_every: int = 250
    test_rows: int = 10_000  # examples of each test
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
            raise InputError(f"width {self.width} is no multiple of {self.heads} heads")


PRESETS = {
    # a fourth of the length, two methods: two minutes on two cores
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
class Cell:
    """One method, learning rate and seed: a config whose swept fields have one entry each."""

    config: Config
    family: str = FAMILY

    @property
    def attention(self) -> str:
        return self.config.attention[0]

    @property
    def title(self) -> str:
        return f"{self.attention} lr {self.config.lrs[0]:g} seed {self.config.seeds[0]}"

    @property
    def dtype(self) -> str:
        return self.config.dtype

    @property
    def row(self) -> type[Row]:
        return Row

    @property
    def flops(self) -> float:
        """Those of all steps, and of the tests: training may end before."""
        config = self.config
        forward = model.flops_per_token(self.model(), config.seq_len)
        return forward * (3 * self.training().tokens + len(TESTS) * config.test_rows * config.seq_len)

    def model(self) -> ModelConfig:
        config = self.config
        return ModelConfig(
            vocab_size=VOCABULARY, width=config.width, layers=config.layers, heads=config.heads,
            hidden=4 * config.width, attention=self.attention, mlp="gelu", tied=True,
        )  # fmt: skip

    @property
    def leaves(self) -> ModelConfig:
        return self.model()

    def training(self) -> TrainConfig:
        config = self.config
        return TrainConfig(
            steps=config.steps, batch=config.batch, length=config.seq_len, lr=config.lrs[0], schedule=config.schedule,
            warmup=max(1, config.steps // 20), weight_decay=config.weight_decay, seed=config.seeds[0],
            dtype=config.dtype, sparse=True, capacity=config.batch * config.seq_len // 2,
            check_every=config.check_every,
        )  # fmt: skip

    def source(self, progress: Progress) -> str:
        """Nothing is read."""
        return ""

    def run(self, place: Place, progress: Progress) -> Outcome:
        """Train until no validation error is left, none fewer came for long, or out of steps; then test."""
        config = self.config
        validation = self._examples(config.p_ignore, VALIDATION_SEED, max(1, config.test_rows // 3), place)
        # validation decides when training ends
        ending = [config.p_ignore, config.stop_error, config.patience, len(validation.tokens)]
        with place.checkpoint([FAMILY, self.model(), self.training(), *ending], progress) as folder:
            trained = synthetic.train(
                self, folder, batches(config, place.device), lambda decoder: self._error(decoder, validation).value,
                functools.partial(status, config), place, progress,
            )  # fmt: skip
        found = self._rows(trained.model, validation, "validation", config.p_ignore)[:1]
        for test, p_ignore in zip(TESTS, (config.p_ignore, config.p_sparse, config.p_dense), strict=True):
            found += self._rows(
                trained.model, self._examples(p_ignore, TEST_SEED, config.test_rows, place), test, p_ignore
            )
        how = status(config, trained.state.scores)
        return self._outcome([*found, self._ended(how)], place, trained)

    def failed(self, how: str, place: Place) -> Outcome:
        """What the table says of a cell that diverged or failed."""
        return self._outcome([self._ended(how)], place)

    def _examples(self, p_ignore: float, seed: int, rows: int, place: Place) -> Examples:
        return generate(self.config.seq_len, p_ignore, seed, torch.arange(rows, device=place.device))

    def _error(self, decoder: Decoder, examples: Examples) -> Estimate:
        return next(errors(examples, predict(decoder, examples, self.config.dtype)))[0]

    def _rows(self, decoder: Decoder, examples: Examples, test: str, p_ignore: float) -> list[Row]:
        where: dict[str, Any] = {"test": test, "p_ignore": p_ignore} | self._sizes()
        return [
            Row(metric="error_rate", unit="1", value=found.value, stderr=found.stderr, n=found.n, **where, **factors)
            for found, factors in errors(examples, predict(decoder, examples, self.config.dtype))
        ]

    def _ended(self, how: str) -> Row:
        return Row(metric="solved", unit="1", value=float(how == "solved"), n=1, status=how, **self._sizes())

    def _sizes(self) -> dict[str, Any]:
        config = self.config
        return {
            "seq_len": config.seq_len, "p_train": config.p_ignore, "width": config.width, "layers": config.layers,
            "heads": config.heads, "lr": config.lrs[0],
        }  # fmt: skip

    def _outcome(self, found: list[Row], place: Place, trained: Trained | None = None) -> Outcome:
        return synthetic.outcome(self, found, place, "validation_error", trained)


def batches(config: Config, device: torch.device) -> Drawn[Examples]:
    """Training batches: new examples at every step."""

    def rows(step: int) -> Tensor:
        return torch.arange(step * config.batch, (step + 1) * config.batch, device=device)

    return Drawn(rows, functools.partial(generate, config.seq_len, config.p_ignore, TRAIN_SEED + config.seeds[0]))


def status(config: Config, scores: Scores) -> str:
    """How training stands after these looks at validation, (step, error rate): `solved`, `plateau` or `budget`."""
    if not scores:
        return "budget"
    step, error = scores[-1]
    if error <= config.stop_error:
        return "solved"
    best = min(scores, key=lambda score: score[1])[0]
    return "plateau" if config.patience and step - best >= config.patience else "budget"


def errors(examples: Examples, correct: Tensor) -> Iterator[tuple[Estimate, dict[str, Any]]]:
    """Error rate over reads and the factors of its row: overall, then by distance in octaves; error over examples."""
    scored = examples.targets != IGNORE
    splits: list[tuple[Tensor, dict[str, Any]]] = [(scored, {})]
    start = 1
    while start < examples.tokens.shape[1] // 2:
        inside = scored & (examples.distance >= start) & (examples.distance < 2 * start)
        splits.append((inside, {"distance_start": start, "distance_end": 2 * start}))
        start *= 2
    for where, factors in splits:
        wrong, count = ((mask & where).sum(1).double().cpu().numpy() for mask in (~correct, where))
        if count.any():
            yield statistics.ratio(wrong, count), {"reads": int(count.sum()), **factors}


def cells(config: Config) -> list[Cell]:
    """The grid, seeds outermost. InputError names a method or option that is not known."""
    methods = dict.fromkeys(model.canonical_attention(spec) for spec in config.attention)
    return [
        Cell(config=dataclasses.replace(config, attention=(spec,), seeds=(seed,), lrs=(lr,)))
        for seed in dict.fromkeys(config.seeds)
        for lr in dict.fromkeys(config.lrs)
        for spec in methods
    ]


def summary(results: pd.DataFrame) -> Table:
    """Table for the terminal: error rates at the rate with the lowest validation error, and the published ones."""
    table = Table(title=f"Flip-flop error rates over reads, % (published: {FLIP_FLOP_SOURCE}, 512 tokens)")
    table.add_column("attention")
    for name in ("", "lr", *TESTS):
        table.add_column(name.replace("_", " "), justify="right", no_wrap=True)
    measured = selection.flip_flop_errors(results) if (results["metric"] == "error_rate").any() else results[:0]
    for (attention, options, lr), group in measured.groupby(["attention", "options", "lr"]):
        rates = {str(test): rows["value"].to_numpy() * 100 for test, rows in group.groupby("test")}
        name = f"{attention}:{options}" if options else f"{attention}"
        table.add_row(name, "here", f"{lr:g}", *(f"{rates[test].mean():.3g}" for test in TESTS))
        if group["seed"].nunique() > 1:
            spans = (f"{rates[test].min():.3g} to {rates[test].max():.3g}" for test in TESTS)
            table.add_row("", "seeds", "", *spans)
    lost = results[(results["metric"] == "solved") & results["status"].isin(("diverged", "failed"))]
    for (attention, options, lr, how), group in lost.groupby(["attention", "options", "lr", "status"]):
        table.add_row(f"{attention}:{options}" if options else f"{attention}", f"{len(group)} {how}", f"{lr:g}")
    for name, published in FLIP_FLOP.items():
        table.add_row(name, "published", "", *(f"{100 * published[test]:.3g}" for test in TESTS))
    return table
