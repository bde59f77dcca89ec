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
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from rich.table import Table
from torch import Tensor

from sbeval import device, estimate, model, registry
from sbeval.checkpoint import State
from sbeval.errors import InputError
from sbeval.estimate import Estimate
from sbeval.model import IGNORE, Decoder, ModelConfig
from sbeval.progress import Progress
from sbeval.sweep import LATER, Outcome, Place, timing
from sbeval.table import Identity, Measurement
from sbeval.train import TrainConfig, Trained, Trainer

FAMILY = "mqrar"
# the author's test seed; validation and training draw elsewhere
TEST_SEED, VALIDATION_SEED, TRAIN_SEED = 10, 1 << 40, 1 << 41
EVAL_ROWS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Recall:
    """Sizes of the task: V, L, N and the exponent a of the slot law."""

    vocab_size: int = 8192
    seq_len: int = 768
    kv_pairs: int = 32
    slot_power: float = 0.01

    def __post_init__(self) -> None:
        if self.seq_len < 4 or self.seq_len % 2:
            raise InputError(f"seq_len must be even and at least 4; got {self.seq_len}")
        if not 1 <= self.kv_pairs <= self.seq_len // 4:
            raise InputError(
                f"kv_pairs must be 1 to {self.seq_len // 4} at seq_len {self.seq_len} (4 kv_pairs <= seq_len); "
                f"got {self.kv_pairs}"
            )
        if self.vocab_size <= self.seq_len:
            raise InputError(f"vocab_size must be above seq_len {self.seq_len}; got {self.vocab_size}")
        # beyond, weights of slots overflow or vanish
        if not -10 <= self.slot_power <= 10:
            raise InputError(f"slot_power must be -10 to 10; got {self.slot_power}")


@dataclass(frozen=True, slots=True)
class Examples:
    """A batch of the task, (B, L) int64 each. `stale` and `distance` are 0 where there is no label."""

    tokens: Tensor
    targets: Tensor  # the label, IGNORE where there is none
    stale: Tensor  # earlier values of the key that are not its value any more
    distance: Tensor  # positions back to the value that is the answer

    @property
    def cu_seqlens(self) -> None:
        """Examples are not packed."""


def generate(task: Recall, batch: int, generator: torch.Generator) -> Examples:
    """Draw `batch` examples; the same generator state gives the same examples."""
    device, half = generator.device, task.vocab_size // 2
    slots = (task.seq_len - 2 * task.kv_pairs) // 2

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, (batch, *shape), generator=generator, device=device)

    tokens = draw(half, task.vocab_size, task.seq_len)
    keys = draw(1, half, task.kv_pairs)
    tokens[:, 0 : 2 * task.kv_pairs : 2] = keys
    weights = torch.arange(1, slots + 1, dtype=torch.float64, device=device) ** (task.slot_power - 1)
    drawn = torch.multinomial(weights.expand(batch, -1), task.kv_pairs, generator=generator)
    queries = keys.gather(1, draw(0, task.kv_pairs, task.kv_pairs))
    tokens.scatter_(1, 2 * (task.kv_pairs + drawn), queries)
    return label(task, tokens)


def label(task: Recall, tokens: Tensor) -> Examples:
    """Find the labels of token rows (B, L), whose keys stand at even positions."""
    firsts, seconds = tokens[:, 0::2], tokens[:, 1::2]
    # uses of one key side by side, in their order; what is no key comes last
    ordered, order = firsts.where(firsts < task.vocab_size // 2, task.vocab_size).sort(dim=1, stable=True)
    again = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] < task.vocab_size)
    index = torch.arange(again.shape[1], device=tokens.device).expand_as(again)
    # uses before this one: the place within its run of equal keys
    before = index + 1 - (index + 1).where(~again, 0).cummax(1).values
    here, last = order[:, 1:], order[:, :-1]

    def spread(values: Tensor, empty: int) -> Tensor:
        out = torch.full_like(tokens, empty)
        return out.scatter_(1, 2 * here, values.where(again, empty))

    return Examples(
        tokens=tokens,
        targets=spread(seconds.gather(1, last), IGNORE),
        stale=spread(before - 1, 0),
        distance=spread(2 * (here - last) - 1, 0),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Row(Measurement):
    """Factors: sizes of the task and the model; `split` is `all`, `fresh`, `stale`, or empty for the finer ones by
    number of stale values or by distance (distance_start <= d < distance_end, in positions)."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A sweep over attention x pairs x width x learning rate x seed. Fresh examples at every step."""

    attention: tuple[str, ...] = ("stick_breaking", "rope")
    seeds: tuple[int, ...] = (0,)
    kv_pairs: tuple[int, ...] = (8,)
    widths: tuple[int, ...] = (64,)
    lrs: tuple[float, ...] = (3e-3,)
    vocab_size: int = 128
    seq_len: int = 64
    slot_power: float = 0.01
    layers: int = 2
    heads: int = 1
    positions: bool = False  # a learned table of absolute positions for every method
    init_std: float | None = field(default=None, metadata=LATER)  # 1 / sqrt(width) by default
    batch: int = 64
    steps: int = 2000
    schedule: str = "cosine"
    weight_decay: float = 0.1
    stop_accuracy: float = 0.99  # of validation, at which training ends
    check_every: int = 100  # steps between looks at it
    test_rows: int = 3000
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("heads", "batch", "steps", "test_rows"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1; got {getattr(self, name)}")
        for pairs in self.kv_pairs:
            Recall(vocab_size=self.vocab_size, seq_len=self.seq_len, kv_pairs=pairs, slot_power=self.slot_power)
        for width in self.widths:
            if width % self.heads:
                raise InputError(f"width {width} is no multiple of {self.heads} heads")


PRESETS = {
    # sizes at which two cores see the task learned in minutes
    "quick": Config(),
    # the author's length and width at a vocabulary that decides cells in minutes; the paper's is 8192
    "small": Config(
        kv_pairs=(32,), widths=(128,), lrs=(1e-3,), vocab_size=1024, seq_len=768, batch=64, steps=6000, check_every=250
    ),
    "h200": Config(
        kv_pairs=(32,), widths=(256,), lrs=(1e-3,), vocab_size=1024, seq_len=768, batch=128, steps=6000, check_every=250
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
        config = self.config
        return Recall(
            vocab_size=config.vocab_size, seq_len=config.seq_len, kv_pairs=config.kv_pairs[0],
            slot_power=config.slot_power,
        )  # fmt: skip

    @property
    def title(self) -> str:
        config = self.config
        size = f"{config.kv_pairs[0]} pairs width {config.widths[0]}"
        return f"{self.attention} {size} lr {config.lrs[0]:g} seed {config.seeds[0]}"

    @property
    def dtype(self) -> str:
        return self.config.dtype

    @property
    def row(self) -> type[Row]:
        return Row

    @property
    def flops(self) -> float:
        return 3 * model.flops_per_token(self.model(), self.config.seq_len) * self.training().tokens

    def model(self) -> ModelConfig:
        config, width = self.config, self.config.widths[0]
        return ModelConfig(
            vocab_size=config.vocab_size, width=width, layers=config.layers, heads=config.heads, hidden=4 * width,
            attention=self.attention, mlp="gelu", tied=True, positions=config.seq_len if config.positions else 0,
            init_std=config.init_std,
        )  # fmt: skip

    def training(self) -> TrainConfig:
        config = self.config
        return TrainConfig(
            steps=config.steps, batch=config.batch, length=config.seq_len, lr=config.lrs[0], schedule=config.schedule,
            warmup=max(1, config.steps // 20), weight_decay=config.weight_decay, seed=config.seeds[0],
            dtype=config.dtype, sparse=True, check_every=config.check_every,
        )  # fmt: skip

    def source(self, progress: Progress) -> str:
        """Nothing is read."""
        return ""

    def run(self, place: Place, progress: Progress) -> Outcome:
        """Train until solved or out of steps, then test."""
        config, training = self.config, self.training()
        validation = _held_out(self.task, VALIDATION_SEED, max(1, config.test_rows // 3), place.device)
        # validation decides when training ends
        folder = place.checkpoint([self.model(), training, self.task, config.stop_accuracy, len(validation.tokens)])
        trainer = Trainer(self.model(), training, Fresh(self, place.device), folder, place.device)

        def solved(decoder: Decoder, state: State) -> bool:
            correct = predict(decoder, validation, config.dtype)
            accuracy = correct[validation.targets != IGNORE].float().mean().item()
            state.scores.append((state.step, accuracy))
            return accuracy >= config.stop_accuracy

        task = progress.add(f"train {self.title}", total=training.steps, completed=trainer.state.step)
        trained = trainer.run(task, stop=solved, log=place.logger(self))
        task.close()
        test = _held_out(self.task, TEST_SEED, config.test_rows, place.device)
        found = self._rows(validation, predict(trained.model, validation, config.dtype), "validation_accuracy")[:1]
        found += self._rows(test, predict(trained.model, test, config.dtype), "accuracy")
        return self._outcome(trained, found, place)

    def _rows(self, examples: Examples, correct: Tensor, metric: str) -> list[Row]:
        config = self.config
        sizes: dict[str, Any] = {
            "kv_pairs": config.kv_pairs[0], "seq_len": config.seq_len, "vocab_size": config.vocab_size,
            "width": config.widths[0], "layers": config.layers, "heads": config.heads, "lr": config.lrs[0],
        }  # fmt: skip
        return [
            Row(metric=metric, unit="1", value=found.value, stderr=found.stderr, n=found.n, **sizes, **factors)
            for found, factors in accuracies(examples, correct)
        ]

    def _outcome(self, trained: Trained, found: list[Row], place: Place) -> Outcome:
        name, _, options = self.attention.partition(":")
        config = self.config
        return Outcome(
            identity=Identity(
                family=FAMILY, task=FAMILY, model=f"{config.layers}x{config.widths[0]}", attention=name,
                options=options, params=trained.model.n_parameters(), train_len=config.seq_len,
                eval_len=config.seq_len, seed=config.seeds[0],
            ),
            rows=found,
            corpus="",
            corpus_digest="",
            tokenizer="",
            train_tokens=trained.state.step * config.batch * config.seq_len,
            backend=registry.method(name).backend_name(place.device.type),
            tokens_per_s=trained.tokens_per_second,
            measured={"validation_accuracy": trained.state.scores, **timing(trained)},
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fresh:
    """Training batches: new examples at every step, drawn from the cell's seed and the step."""

    cell: Cell
    device: torch.device

    def __getitem__(self, step: int) -> Examples:
        generator = torch.Generator(self.device).manual_seed(TRAIN_SEED + (self.cell.config.seeds[0] << 24) + step)
        return generate(self.cell.task, self.cell.config.batch, generator)


def _held_out(task: Recall, seed: int, rows: int, place: torch.device) -> Examples:
    """Examples that are the same on every device."""
    examples = generate(task, rows, torch.Generator().manual_seed(seed))
    return Examples(*(x.to(place) for x in (examples.tokens, examples.targets, examples.stale, examples.distance)))


@torch.inference_mode()
def predict(decoder: Decoder, examples: Examples, dtype: str) -> Tensor:
    """Whether the most likely token is the label, (B, L) bool; false where there is no label."""
    decoder.eval()
    with device.autocast(examples.tokens.device, dtype):
        parts = []
        for tokens, targets in zip(examples.tokens.split(EVAL_ROWS), examples.targets.split(EVAL_ROWS), strict=True):
            correct = torch.zeros_like(targets, dtype=torch.bool)
            scored = targets != IGNORE
            correct[scored] = decoder.logits(decoder(tokens)[scored]).argmax(-1) == targets[scored]
            parts.append(correct)
    decoder.train()
    return torch.cat(parts)


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
            yield estimate.ratio(right, count), factors


def cells(config: Config) -> list[Cell]:
    """The grid, seeds outermost. InputError names a method or option that is not known."""
    methods = dict.fromkeys(model.canonical_attention(spec) for spec in config.attention)
    return [
        Cell(
            config=dataclasses.replace(
                config, attention=(spec,), seeds=(seed,), kv_pairs=(pairs,), widths=(width,), lrs=(lr,)
            )
        )
        for seed in dict.fromkeys(config.seeds)
        for pairs in dict.fromkeys(config.kv_pairs)
        for width in dict.fromkeys(config.widths)
        for lr in dict.fromkeys(config.lrs)
        for spec in methods
    ]


def summary(results: pd.DataFrame) -> Table:
    """Table for the terminal: accuracy by method and pairs, overall and split."""
    accuracy = results[(results["metric"] == "accuracy") & (results["split"] != "")]
    table = Table(title="MQRAR accuracy (mean over seeds)")
    for name in ("attention", "pairs", "width", "lr", "all", "fresh", "stale"):
        table.add_column(name, justify="left" if name == "attention" else "right")
    keys = ["attention", "options", "kv_pairs", "width", "lr"]
    for (attention, options, pairs, width, lr), group in accuracy.groupby(keys):
        means = group.groupby("split")["value"].mean()
        table.add_row(
            f"{attention}:{options}" if options else f"{attention}", f"{pairs}", f"{width}", f"{lr:g}",
            *(f"{means[split]:.3f}" if split in means else "" for split in ("all", "fresh", "stale")),
        )  # fmt: skip
    return table
