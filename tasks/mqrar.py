"""Multi-query repeated associative recall (Tan et al., ICLR 2025, arXiv 2410.17980, section 5.1).

A variable is assigned, used and assigned again; each use must return its latest value. The rules are those of the
public code of the paper's first author. With V tokens, L positions and N pairs (V > L, 4 N <= L, L even):

    keys are 1 ... V/2 - 1, values V/2 ... V - 1, token 0 never occurs
    prefix      k1 v1 ... kN vN, keys and values drawn with replacement
    then        S = (L - 2 N) / 2 slots of two tokens; N of them, drawn without replacement with p_j ~ (j + 1)^(a - 1),
                begin with one of the example's keys; every other token is a random value
    label       at a key that has a value: that value; then the token after the key becomes its value

For keys 1 2 and values 5 ... 8, N = 2, with labels under the tokens (loss and labels are not shifted):

    tokens   1 7 2 5 | 8 6 1 8 7 7 1 5 2 6
    labels   . . . . | . . 7 . . . 8 . 5 .
                             ^       ^   ^ fresh: its first use after one assignment
                                     | stale: 7 was its value before
"""

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from rich.table import Table
from torch import Tensor

from sbeval import counter, model, selection, statistics, synthetic
from sbeval.cell import Outcome
from sbeval.config import LATER
from sbeval.errors import InputError, check_swept
from sbeval.model import IGNORE, ModelConfig
from sbeval.place import Place
from sbeval.progress import Progress
from sbeval.recall import Examples, Recall, generate, label
from sbeval.statistics import Estimate
from sbeval.synthetic import METHODS, TEST_SEED, TRAIN_SEED, VALIDATION_SEED, Scores, predict
from sbeval.table import Measurement
from sbeval.train import TrainConfig, Trained

__all__ = ["Examples", "Recall", "generate", "label"]

FAMILY = "mqrar"
# a stream that no example draws from: the order of a stored set
ORDER = 1 << 20
# accuracy that counts as progress
GAIN = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class Row(Measurement):
    """Factors: sizes of the task and the model; `split` is `all`, `fresh`, `stale`, or empty for the finer ones by
    number of stale values or by distance (distance_start <= d < distance_end, in positions).

    A cell's row of metric `solved` says how it ended in `status`: `solved`, `plateau`, `budget` (out of steps),
    `diverged` (no finite number) or `failed`. The last two have no accuracy; their run file gives the reason.
    """

    kv_pairs: int
    seq_len: int
    vocab_size: int
    width: int
    layers: int
    heads: int
    lr: float
    split: str = ""
    stale_values: int | None = None
    distance_start: int | None = None
    distance_end: int | None = None
    slot_power: float | None = field(default=None, metadata=LATER)
    filler: str | None = field(default=None, metadata=LATER)
    distinct: str | None = field(default=None, metadata=LATER)
    key_pool: int | None = field(default=None, metadata=LATER)
    n_back: int | None = field(default=None, metadata=LATER)
    score_prefix: str | None = field(default=None, metadata=LATER)
    positions: str | None = field(default=None, metadata=LATER)
    dropout: float | None = field(default=None, metadata=LATER)
    stored_rows: int | None = field(default=None, metadata=LATER)
    batch: int | None = field(default=None, metadata=LATER)
    max_steps: int | None = field(default=None, metadata=LATER)
    optimizer: str | None = field(default=None, metadata=LATER)
    schedule: str | None = field(default=None, metadata=LATER)
    weight_decay: float | None = field(default=None, metadata=LATER)
    init_std: float | None = field(default=None, metadata=LATER)
    stop_accuracy: float | None = field(default=None, metadata=LATER)
    patience: int | None = field(default=None, metadata=LATER)
    status: str | None = field(default=None, metadata=LATER)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A sweep over attention x pairs x n-back x width x learning rate x seed; `sbeval.recall.Recall` has the task's
    options."""

    attention: tuple[str, ...] = ("stick_breaking", "rope")
    seeds: tuple[int, ...] = (0,)
    kv_pairs: tuple[int, ...] = (8,)
    widths: tuple[int, ...] = (64,)
    lrs: tuple[float, ...] = (3e-3,)
    n_back: tuple[int, ...] = (1,)
    vocab_size: int = 128
    seq_len: int = 64
    slot_power: float = 0.01
    filler: str = "value"
    distinct: tuple[str, ...] = ()
    key_pool: int | None = None
    score_prefix: bool = True
    layers: int = 2
    heads: int = 1
    positions: bool = False  # a learned table of absolute positions for every method
    logit_scale: float = 1.5  # of stick-breaking, times 1 / sqrt(head size), where its own options do not say
    dropout: float = 0.0
    init_std: float | None = None  # 1 / sqrt(width) by default
    stored_rows: int = 0  # train in epochs on so many rows; 0 draws new ones at every step
    batch: int = 64
    steps: int = 2000
    schedule: str = "cosine"
    optimizer: str = field(default="adamw", metadata=LATER)
    weight_decay: float = 0.1
    stop_accuracy: float = 0.99  # of validation, at which training ends
    patience: int = 0  # steps without progress in validation after which training ends; 0 waits to the last
    check_every: int = 100  # steps between looks at it
    test_rows: int = 3000
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_swept(self, "attention", "seeds", "kv_pairs", "widths", "lrs", "n_back")
        for name in ("heads", "batch", "steps", "test_rows", "check_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.patience < 0:
            raise InputError(f"patience must be at least 0; got {self.patience}")
        # above 1 it is never reached
        if not self.stop_accuracy >= 0:
            raise InputError(f"stop_accuracy must be at least 0; got {self.stop_accuracy}")
        if self.stored_rows and self.stored_rows < self.batch:
            raise InputError(f"stored_rows must be 0 or at least the batch {self.batch}; got {self.stored_rows}")
        for pairs in self.kv_pairs:
            for n_back in self.n_back:
                self.task(pairs, n_back)
        for width in self.widths:
            if width % self.heads:
                raise InputError(f"width {width} is no multiple of {self.heads} heads")

    def task(self, kv_pairs: int, n_back: int) -> Recall:
        return Recall(
            vocab_size=self.vocab_size, seq_len=self.seq_len, kv_pairs=kv_pairs, slot_power=self.slot_power,
            filler=self.filler, distinct=tuple(sorted(set(self.distinct))), key_pool=self.key_pool, n_back=n_back,
            score_prefix=self.score_prefix,
        )  # fmt: skip


# the author's: four from 1e-4 to 1e-2, evenly in the logarithm
RATES = (1e-4, 4.64e-4, 2.15e-3, 1e-2)
# the author's length and width, at an eighth of the paper's vocabulary and with Muon, by which plateaus end sooner:
# within 300 M tokens for stick-breaking and forgetting, not for softmax past 32 pairs
H200 = Config(
    attention=METHODS, seeds=(0, 1, 2), kv_pairs=(32, 64, 96, 128, 160, 192), widths=(256,),
    lrs=(2.5e-4, 5e-4, 1e-3, 2e-3), vocab_size=1024, seq_len=768, batch=64, steps=6000, schedule="constant",
    optimizer="muon", patience=3000,
)  # fmt: skip

PRESETS = {
    # sizes at which two cores see the task learned in minutes
    "quick": Config(),
    "small": Config(
        kv_pairs=(32,), widths=(128,), lrs=(1e-3,), vocab_size=1024, seq_len=768, batch=64, steps=6000,
        optimizer="muon", check_every=250,
    ),
    "h200": H200,
    # does a learned bias, starting at so much, make stick-breaking learn sooner?
    "logit_bias": dataclasses.replace(
        H200, attention=("stick_breaking", *(f"stick_breaking:logit_bias={start}" for start in (-1.5, -3, -4.5, -6))),
        kv_pairs=(32, 128), lrs=(4.64e-4, 1e-3, 2.15e-3), schedule="cosine", optimizer="adamw", patience=0,
    ),
    # the N-th last value, as in PaTH (Yang et al. 2025, arXiv 2505.16381): 2 heads, 32 pairs. How few keys there are
    # and the optimiser are not known; these are ours.
    "n_back": dataclasses.replace(
        H200, kv_pairs=(32,), n_back=(1, 2, 3, 4), heads=2, key_pool=8, lrs=(5e-4, 1e-3, 2e-3),
    ),
    # the author's public code: 64 epochs of 100,000 rows, up to 4.9e9 tokens a cell. Unlike there dropout falls on what
    # attention returns, not on its weights, and a GPU multiplies in bfloat16 (--dtype float32 for the author's).
    # What is known of the optimizer is AdamW, its decay, rates and a cosine: warm-up, where the cosine ends, betas and
    # clipping are this project's
    "paper": Config(
        kv_pairs=(32, 64, 128, 192), widths=(256,), lrs=RATES, vocab_size=8192, seq_len=768, dropout=0.1,
        stored_rows=100_000, batch=256, steps=25_000, check_every=250,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One point of the sweep: a config whose swept fields have one entry each."""

    config: Config
    family: str = FAMILY

    @property
    def attention(self) -> str:
        return self.config.attention[0]

    @property
    def task(self) -> Recall:
        return self.config.task(self.config.kv_pairs[0], self.config.n_back[0])

    @property
    def title(self) -> str:
        config = self.config
        size = f"{config.kv_pairs[0]} pairs width {config.widths[0]}"
        back = f" {config.n_back[0]} back" if config.n_back[0] > 1 else ""
        return f"{self.attention} {size}{back} lr {config.lrs[0]:g} seed {config.seeds[0]}"

    @property
    def dtype(self) -> str:
        return self.config.dtype

    @property
    def row(self) -> type[Row]:
        return Row

    @property
    def flops(self) -> float:
        """Those of all steps: training may end before."""
        shape, config = self.model(), self.config
        head = 2 * shape.width * shape.vocab_size
        scored = self.task.scored(config.batch) / (config.batch * config.seq_len)
        return 3 * (model.flops_per_token(shape, config.seq_len) - (1 - scored) * head) * self.training().tokens

    def model(self) -> ModelConfig:
        config, width = self.config, self.config.widths[0]
        return ModelConfig(
            vocab_size=config.vocab_size, width=width, layers=config.layers, heads=config.heads, hidden=4 * width,
            attention=self.attention, mlp="gelu", tied=True, positions=config.seq_len if config.positions else 0,
            init_std=config.init_std, dropout=config.dropout,
        )  # fmt: skip

    @property
    def leaves(self) -> ModelConfig:
        return self.model()

    def training(self) -> TrainConfig:
        config = self.config
        return TrainConfig(
            steps=config.steps, batch=config.batch, length=config.seq_len, lr=config.lrs[0], schedule=config.schedule,
            warmup=max(1, config.steps // 20), optimizer=config.optimizer, weight_decay=config.weight_decay,
            seed=config.seeds[0], dtype=config.dtype, sparse=True, capacity=self._room(),
            check_every=config.check_every,
        )  # fmt: skip

    def _room(self) -> int:
        """Room for scored positions, in two sizes whatever the pairs are: each is compiled code of its own."""
        half = max(1, self.task.seq_len // 8)
        return self.task.scored(self.config.batch, min(-(-self.task.kv_pairs // half) * half, self.task.seq_len // 4))

    def source(self, progress: Progress) -> str:
        """Nothing is read."""
        return ""

    def run(self, place: Place, progress: Progress) -> Outcome:
        """Train until solved, without progress or out of steps, then test."""
        config, validation = self.config, self._validation(place)
        trained = self.trained(place, progress)
        test = _held_out(self.task, TEST_SEED, config.test_rows, place.device)
        found = self._rows(validation, predict(trained.model, validation, config.dtype), "validation_accuracy")[:1]
        found += self._rows(test, predict(trained.model, test, config.dtype), "accuracy")
        found += self._ended(status(config, trained.state.scores), trained.state.step)
        return self._outcome(found, place, trained)

    def trained(self, place: Place, progress: Progress) -> Trained:
        """Train until solved, without progress or out of steps, unless a checkpoint has that model."""
        config = self.config
        validation = self._validation(place)
        # validation decides when training ends
        ending = [config.stop_accuracy, config.patience, len(validation.tokens)]
        key = [self.model(), self.training(), self.task, config.stored_rows, *ending]
        with place.checkpoint(key, progress) as folder:
            return synthetic.train(
                self, folder, Batches(self, place.device),
                lambda decoder: _accuracy(validation, predict(decoder, validation, config.dtype)),
                functools.partial(status, config), place, progress,
            )  # fmt: skip

    def _validation(self, place: Place) -> Examples:
        return _held_out(self.task, VALIDATION_SEED, max(1, self.config.test_rows // 3), place.device)

    def failed(self, how: str, place: Place) -> Outcome:
        """What the table says of a cell that diverged or failed."""
        return self._outcome(self._ended(how), place)

    def _ended(self, how: str, steps: int | None = None) -> list[Row]:
        solved = Row(metric="solved", unit="1", value=float(how == "solved"), n=1, status=how, **self._sizes())
        if steps is None:
            return [solved]
        return [solved, Row(metric="steps", unit="steps", value=steps, n=1, status=how, **self._sizes())]

    def _rows(self, examples: Examples, correct: Tensor, metric: str) -> list[Row]:
        return [
            Row(metric=metric, unit="1", value=found.value, stderr=found.stderr, n=found.n, **self._sizes(), **factors)
            for found, factors in accuracies(examples, correct)
        ]

    def _sizes(self) -> dict[str, Any]:
        config, task = self.config, self.task
        return {
            "kv_pairs": task.kv_pairs, "seq_len": task.seq_len, "vocab_size": task.vocab_size,
            "width": config.widths[0], "layers": config.layers, "heads": config.heads, "lr": config.lrs[0],
            "slot_power": task.slot_power, "filler": task.filler, "distinct": " ".join(task.distinct),
            "key_pool": task.keys, "n_back": task.n_back, "score_prefix": str(task.score_prefix).lower(),
            "positions": "learned" if config.positions else "none", "dropout": config.dropout,
            "stored_rows": config.stored_rows, "batch": config.batch, "max_steps": config.steps,
            "optimizer": config.optimizer, "schedule": config.schedule, "weight_decay": config.weight_decay,
            "init_std": config.init_std, "stop_accuracy": config.stop_accuracy, "patience": config.patience,
        }  # fmt: skip

    def _outcome(self, found: list[Row], place: Place, trained: Trained | None = None) -> Outcome:
        return synthetic.outcome(self, found, place, "validation_accuracy", trained)


def status(config: Config, scores: Scores) -> str:
    """How training stands after these looks at validation, (step, accuracy): `solved`, `plateau`, or `budget` while
    neither is so."""
    best, since = 0.0, 0
    for step, accuracy in scores:
        if accuracy >= best + GAIN:
            best, since = accuracy, step
    if not scores:
        return "budget"
    step, accuracy = scores[-1]
    if accuracy >= config.stop_accuracy:
        return "solved"
    return "plateau" if config.patience and step - since >= config.patience else "budget"


class Batches(synthetic.Drawn[Examples]):
    """Training batches of a cell: new examples at every step, or those of its stored set in an order of each epoch."""

    def __init__(self, cell: Cell, device: torch.device) -> None:
        self.task, self.device, self.config = cell.task, device, cell.config
        self.seed = TRAIN_SEED + cell.config.seeds[0]
        self._order = functools.lru_cache(maxsize=2)(self._shuffled)
        super().__init__(self.rows, functools.partial(generate, self.task, self.seed))

    def rows(self, step: int) -> Tensor:
        """Numbers of the examples of a step."""
        batch, stored = self.config.batch, self.config.stored_rows
        if not stored:
            return torch.arange(step * batch, (step + 1) * batch, device=self.device)
        epoch, start = divmod(step * batch, stored)
        rows = self._order(epoch)[start : start + batch]
        missing = batch - len(rows)
        return torch.cat([rows, self._order(epoch + 1)[:missing]]) if missing else rows

    def _shuffled(self, epoch: int) -> Tensor:
        return counter.shuffled(counter.key(self.seed, ORDER, epoch), self.config.stored_rows, self.device)


def _held_out(task: Recall, seed: int, rows: int, place: torch.device) -> Examples:
    return generate(task, seed, torch.arange(rows, device=place))


def _accuracy(examples: Examples, correct: Tensor) -> float:
    return correct[examples.targets != IGNORE].float().mean().item()


def accuracies(examples: Examples, correct: Tensor) -> Iterator[tuple[Estimate, dict[str, Any]]]:
    """Accuracy over scored positions and the factors of its row: overall, by fresh or stale, stale values, distance.

    The error is over examples, since the positions of one are not independent. A split without positions has no row.
    """
    scored = examples.targets != IGNORE
    splits: list[tuple[Tensor, dict[str, Any]]] = [
        (scored, {"split": "all"}),
        (scored & (examples.stale == 0), {"split": "fresh"}),
        (scored & (examples.stale > 0), {"split": "stale"}),
    ]
    splits += [(scored & (examples.stale == n), {"stale_values": n}) for n in range(int(examples.stale.max()) + 1)]
    start = 1
    while start < examples.tokens.shape[1]:
        inside = (examples.distance >= start) & (examples.distance < 2 * start)
        splits.append((scored & inside, {"distance_start": start, "distance_end": 2 * start}))
        start *= 2
    for where, factors in splits:
        if where.any():
            right, count = ((mask & where).sum(1).double().cpu().numpy() for mask in (correct, where))
            yield statistics.ratio(right, count), factors


def cells(config: Config) -> list[Cell]:
    """The grid; of several learning rates and seeds, every rate with the first seed. `more` has the rest.

    InputError names a method or option that is not known.
    """
    seeds = dict.fromkeys(config.seeds)
    first = list(seeds)[: 1 if len(set(config.lrs)) > 1 else None]
    return [
        dataclasses.replace(cell, config=dataclasses.replace(cell.config, lrs=(rate,), seeds=(seed,)))
        for seed in first
        for cell in _settings(config)
        for rate in dict.fromkeys(config.lrs)
    ]


def more(config: Config, results: pd.DataFrame | None) -> list[Cell]:
    """The further seeds, each at the rate with the best validation accuracy of the first seed; of equals, the rate that
    took the fewest steps. Nothing where every rate failed. Without results: at the first rate, for an estimate."""
    seeds = list(dict.fromkeys(config.seeds))
    if len(set(config.lrs)) == 1:
        return []
    found = []
    for cell in _settings(config):
        rate: float | None = config.lrs[0] if results is None else _best_rate(cell, seeds[0], results)
        if rate is None:
            continue
        for seed in seeds[1:]:
            found.append(dataclasses.replace(cell, config=dataclasses.replace(cell.config, lrs=(rate,), seeds=(seed,))))
    return found


def _best_rate(cell: Cell, seed: int, results: pd.DataFrame) -> float | None:
    name, _, options = cell.attention.partition(":")
    config = cell.config
    mine = results[
        (results["attention"] == name) & (results["options"] == options) & (results["seed"] == seed)
        & (results["kv_pairs"] == config.kv_pairs[0]) & (results["width"] == config.widths[0])
        & (results["n_back"] == config.n_back[0])
    ]  # fmt: skip
    rates = selection.ranked_rates(mine)
    return rates[0] if rates else None


def _settings(config: Config) -> list[Cell]:
    """The grid without learning rates and seeds."""
    methods = dict.fromkeys(_spec(config, spec) for spec in config.attention)
    return [
        Cell(
            config=dataclasses.replace(config, attention=(spec,), kv_pairs=(pairs,), n_back=(n_back,), widths=(width,))
        )
        # models that compile to the same code follow each other
        for spec in methods
        for width in dict.fromkeys(config.widths)
        for pairs in dict.fromkeys(config.kv_pairs)
        for n_back in dict.fromkeys(config.n_back)
    ]


def _spec(config: Config, spec: str) -> str:
    """The method's canonical spec, with the sweep's logit scale where stick-breaking's own options have none."""
    name, _, options = spec.partition(":")
    if name == "stick_breaking" and "logit_scale=" not in options:
        spec = f"{name}:{options + ',' if options else ''}logit_scale={config.logit_scale}"
    return model.canonical_attention(spec)


def summary(results: pd.DataFrame) -> Table:
    """Table for the terminal: accuracy by method, pairs and rate, overall with lowest and highest seed, and split."""
    # width and n-back where they vary: a terminal is narrow
    factors = {"kv_pairs": "pairs", "lr": "lr"}
    factors |= {name: name.replace("_", "-") for name in ("n_back", "width") if results[name].nunique() > 1}
    table = Table(title="MQRAR accuracy (mean over seeds, lowest to highest)")
    for name in ("attention", *factors.values(), "seeds", "valid.", "all", "fresh", "stale", "ended"):
        table.add_column(name, justify="left" if name in ("attention", "ended") else "right")
    for (attention, options, *values), group in results.groupby(["attention", "options", *factors]):
        validation = group[group["metric"] == "validation_accuracy"]["value"]
        accuracy = {split: rows["value"] for split, rows in group[group["metric"] == "accuracy"].groupby("split")}
        ended = group[group["metric"] == "solved"]["status"].value_counts()
        table.add_row(
            f"{attention}:{options}" if options else f"{attention}", *(f"{value:g}" for value in values),
            f"{len(validation)}", f"{validation.mean():.3f}" if len(validation) else "",
            _span(accuracy["all"]) if accuracy else "",
            *(f"{accuracy[split].mean():.3f}" if split in accuracy else "" for split in ("fresh", "stale")),
            ", ".join(f"{count} {how}" for how, count in ended.items()),
        )  # fmt: skip
    return table


def _span(values: "pd.Series[float]") -> str:
    several = f" ({values.min():.3f} to {values.max():.3f})" if len(values) > 1 else ""
    return f"{values.mean():.3f}{several}"
