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
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sbeval.config import ATTENTION, EVALUATION, LATER, LR, MODEL, SEED, TASK, TRAINING, option
from sbeval.data.recall import Recall
from sbeval.errors import InputError, check_swept
from sbeval.models.config import ModelConfig, canonical_attention, flops_per_token
from sbeval.sweep.cell import Outcome
from sbeval.sweep.family import Family
from sbeval.tables.rows import Measurement
from sbeval.tasks.synthetic import METHODS, TEST_SEED, VALIDATION_SEED, Scores, Synthetic

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table
    from torch import Tensor

    from sbeval.runtime.progress import Progress
    from sbeval.sweep.context import RunContext
    from sbeval.tasks.recall_data import Examples
    from sbeval.training.config import TrainConfig
    from sbeval.training.trainer import Trained

NAME = "mqrar"
# key of the validation scores in run files
SCORES = "validation_accuracy"
# gain in accuracy that counts as progress
GAIN = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class Row(Measurement):
    """Factors: sizes of the task and the model; `split` is `all`, `fresh`, `stale`, or empty for the finer ones by
    number of stale values or by distance (distance_start <= d < distance_end, in positions).

    `status` of the row of metric `solved` is how training ended: `solved`, `plateau`, `budget` (out of steps),
    `diverged` (a loss that is not finite) or `failed`. The last two have no accuracy; their run file has the reason.
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
    """A sweep over attention x pairs x n-back x width x learning rate x seed.

    The options of the task are documented in `sbeval.data.recall.Recall`.
    """

    attention: tuple[str, ...] = option(("stick_breaking", "rope"), MODEL, ATTENTION, metavar="SPEC")
    seeds: tuple[int, ...] = option((0,), TRAINING, SEED, flag="--seed")
    kv_pairs: tuple[int, ...] = option((8,), TASK, "Key-value pairs N.")
    widths: tuple[int, ...] = option((64,), MODEL, "Width of the model.", flag="--width")
    lrs: tuple[float, ...] = option((3e-3,), TRAINING, LR, flag="--lr")
    n_back: tuple[int, ...] = option((1,), TASK, "The answer is the n-th last value.")
    vocab_size: int = option(128, TASK, "Tokens V: half are keys, half values.")
    seq_len: int = option(64, TASK, "Positions L of an example, at least 4 N.")
    slot_power: float = option(0.01, TASK, "Exponent a of the slot law.")
    filler: str = option("value", TASK, "Tokens at all other positions: value, padding or any.")
    distinct: tuple[str, ...] = option((), TASK, "Draw keys, values or queries without replacement.")
    key_pool: int | None = option(None, TASK, "Keys to draw from. Default: all V/2 - 1.")
    score_prefix: bool = option(True, TASK, "Score keys that are repeated in the prefix.")
    layers: int = option(2, MODEL, "Layers of the model.")
    heads: int = option(1, MODEL, "Attention heads.")
    positions: bool = option(False, MODEL, "Add a learned table of absolute positions, for every method.")
    logit_scale: float = option(
        1.5, MODEL, "Scale of stick-breaking's logits, times 1 / sqrt(head size), unless --attention gives one."
    )
    dropout: float = option(0.0, MODEL, "Dropout of embeddings and of attention's output.")
    init_std: float | None = option(None, MODEL, "Standard deviation of the initial weights. Default: 1 / sqrt(width).")
    stored_rows: int = option(0, TRAINING, "Train in epochs on this many stored examples; 0: new ones at every step.")
    batch: int = option(64, TRAINING, "Examples of an optimizer step.")
    steps: int = option(2000, TRAINING, "Optimizer steps at most.")
    schedule: str = option("cosine", TRAINING, "Learning rate schedule: cosine, power or constant.")
    optimizer: str = option("adamw", TRAINING, "adamw, or muon for the matrices inside the blocks.", LATER)
    weight_decay: float = option(0.1, TRAINING, "Weight decay.")
    stop_accuracy: float = option(0.99, TRAINING, "Validation accuracy at which training ends.")
    patience: int = option(0, TRAINING, "Steps without progress in validation after which training ends; 0: never.")
    check_every: int = option(100, TRAINING, "Steps between validations.")
    test_rows: int = option(3000, EVALUATION, "Test examples.")
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_swept(self, "attention", "seeds", "kv_pairs", "widths", "lrs", "n_back")
        for name in ("heads", "batch", "steps", "test_rows", "check_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.patience < 0:
            raise InputError(f"patience must be at least 0; got {self.patience}")
        # a value above 1 is never reached
        if not self.stop_accuracy >= 0:
            raise InputError(f"stop_accuracy must be at least 0; got {self.stop_accuracy}")
        if self.stored_rows and self.stored_rows < self.batch:
            raise InputError(f"stored_rows must be 0 or at least the batch {self.batch}; got {self.stored_rows}")
        for pairs in self.kv_pairs:
            for n_back in self.n_back:
                self.task(pairs, n_back)
        for width in self.widths:
            if width % self.heads:
                raise InputError(f"width {width} is not a multiple of {self.heads} heads")

    def task(self, kv_pairs: int, n_back: int) -> Recall:
        return Recall(
            vocab_size=self.vocab_size,
            seq_len=self.seq_len,
            kv_pairs=kv_pairs,
            slot_power=self.slot_power,
            filler=self.filler,
            distinct=tuple(sorted(set(self.distinct))),
            key_pool=self.key_pool,
            n_back=n_back,
            score_prefix=self.score_prefix,
        )


# the author's: four from 1e-4 to 1e-2, evenly in the logarithm
RATES = (1e-4, 4.64e-4, 2.15e-3, 1e-2)
# the author's length and width, at an eighth of the paper's vocabulary and with Muon, which shortens the plateaus:
# within 300 M tokens for stick-breaking and forgetting, not for softmax past 32 pairs
H200 = Config(
    attention=METHODS,
    seeds=(0, 1, 2),
    kv_pairs=(32, 64, 96, 128, 160, 192),
    widths=(256,),
    lrs=(2.5e-4, 5e-4, 1e-3, 2e-3),
    vocab_size=1024,
    seq_len=768,
    batch=64,
    steps=6000,
    schedule="constant",
    optimizer="muon",
    patience=3000,
)

PRESETS = {
    # sizes that learn the task in minutes on two cores
    "quick": Config(),
    "small": Config(
        kv_pairs=(32,), widths=(128,), lrs=(1e-3,), vocab_size=1024, seq_len=768, batch=64, steps=6000,
        optimizer="muon", check_every=250,
    ),
    "h200": H200,
    # does a learned bias with these initial values make stick-breaking learn sooner?
    "logit_bias": dataclasses.replace(
        H200, attention=("stick_breaking", *(f"stick_breaking:logit_bias={start}" for start in (-1.5, -3, -4.5, -6))),
        kv_pairs=(32, 128), lrs=(4.64e-4, 1e-3, 2.15e-3), schedule="cosine", optimizer="adamw", patience=0,
    ),
    # the N-th last value, as in PaTH (Yang et al. 2025, arXiv 2505.16381): 2 heads, 32 pairs. The number
    # of keys and the optimizer are not published; these are ours.
    "n_back": dataclasses.replace(
        H200, kv_pairs=(32,), n_back=(1, 2, 3, 4), heads=2, key_pool=8, lrs=(5e-4, 1e-3, 2e-3),
    ),
    # the author's public code: 64 epochs of 100,000 rows, up to 4.9e9 tokens a cell. Unlike there, dropout applies to
    # the output of attention, not to its weights, and a GPU multiplies in bfloat16 (--dtype float32 for the author's).
    # AdamW, weight decay, learning rates and the cosine are published; warm-up, the final learning rate, betas and
    # clipping are this project's
    "paper": Config(
        kv_pairs=(32, 64, 128, 192), widths=(256,), lrs=RATES, vocab_size=8192, seq_len=768, dropout=0.1,
        stored_rows=100_000, batch=256, steps=25_000, check_every=250,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell(Synthetic):
    """One point of the sweep: a config whose swept fields have one entry each."""

    config: Config
    family: str = NAME

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
        """FLOPs of all steps, an upper bound: training may end earlier."""
        shape, config = self.model(), self.config
        head = 2 * shape.width * shape.vocab_size
        scored = self.task.scored(config.batch) / (config.batch * config.seq_len)
        return 3 * (flops_per_token(shape, config.seq_len) - (1 - scored) * head) * self.training().tokens

    def model(self) -> ModelConfig:
        config, width = self.config, self.config.widths[0]
        return ModelConfig(
            vocab_size=config.vocab_size,
            width=width,
            layers=config.layers,
            heads=config.heads,
            hidden=4 * width,
            attention=self.attention,
            mlp="gelu",
            tied=True,
            positions=config.seq_len if config.positions else 0,
            init_std=config.init_std,
            dropout=config.dropout,
        )

    def training(self) -> "TrainConfig":
        from sbeval.training.config import TrainConfig

        config = self.config
        return TrainConfig(
            steps=config.steps,
            batch=config.batch,
            length=config.seq_len,
            lr=config.lrs[0],
            schedule=config.schedule,
            warmup=max(1, config.steps // 20),
            optimizer=config.optimizer,
            weight_decay=config.weight_decay,
            seed=config.seeds[0],
            dtype=config.dtype,
            sparse=True,
            capacity=self._room(),
            check_every=config.check_every,
        )

    def _room(self) -> int:
        """Return the capacity for scored positions: one of two sizes, since each is compiled separately."""
        half = max(1, self.task.seq_len // 8)
        return self.task.scored(self.config.batch, min(-(-self.task.kv_pairs // half) * half, self.task.seq_len // 4))

    def run(self, context: "RunContext", progress: "Progress") -> Outcome:
        """Train until solved, on a plateau or out of steps, then test."""
        from sbeval.tasks.drawn import predict
        from sbeval.tasks.recall_data import held_out

        config, validation = self.config, self._validation(context)
        trained = self.trained(context, progress)
        test = held_out(self.task, TEST_SEED, config.test_rows, context.device)
        rows = self._rows(validation, predict(trained.model, validation, config.dtype), "validation_accuracy")[:1]
        rows += self._rows(test, predict(trained.model, test, config.dtype), "accuracy")
        rows += self._ended(status(config, trained.state.scores), trained.state.step)
        return self.outcome(rows, context, SCORES, trained)

    def trained(self, context: "RunContext", progress: "Progress") -> "Trained":
        """Train until solved, on a plateau or out of steps, unless a finished checkpoint exists."""
        from sbeval.tasks import drawn
        from sbeval.tasks.recall_data import Batches, accuracy

        config = self.config
        validation = self._validation(context)
        # validation decides when training ends
        ending = [config.stop_accuracy, config.patience, len(validation.tokens)]
        key = [self.model(), self.training(), self.task, config.stored_rows, *ending]
        with context.checkpoint(key, progress) as folder:
            return drawn.train(
                self,
                folder,
                Batches(self.task, config.seeds[0], config.batch, config.stored_rows, context.device),
                lambda decoder: accuracy(validation, drawn.predict(decoder, validation, config.dtype)),
                functools.partial(status, config),
                context,
                progress,
            )

    def _validation(self, context: "RunContext") -> "Examples":
        from sbeval.tasks.recall_data import held_out

        return held_out(self.task, VALIDATION_SEED, max(1, self.config.test_rows // 3), context.device)

    def failed(self, how: str, context: "RunContext") -> Outcome:
        return self.outcome(self._ended(how), context, SCORES)

    def _ended(self, how: str, steps: int | None = None) -> list[Row]:
        solved = Row(metric="solved", unit="1", value=float(how == "solved"), n=1, status=how, **self._sizes())
        if steps is None:
            return [solved]
        return [solved, Row(metric="steps", unit="steps", value=steps, n=1, status=how, **self._sizes())]

    def _rows(self, examples: "Examples", correct: "Tensor", metric: str) -> list[Row]:
        from sbeval.tasks.recall_data import accuracies

        return [
            Row(metric=metric, unit="1", value=mean.value, stderr=mean.stderr, n=mean.n, **self._sizes(), **factors)
            for mean, factors in accuracies(examples, correct)
        ]

    def _sizes(self) -> dict[str, Any]:
        config, task = self.config, self.task
        return {
            "kv_pairs": task.kv_pairs,
            "seq_len": task.seq_len,
            "vocab_size": task.vocab_size,
            "width": config.widths[0],
            "layers": config.layers,
            "heads": config.heads,
            "lr": config.lrs[0],
            "slot_power": task.slot_power,
            "filler": task.filler,
            "distinct": " ".join(task.distinct),
            "key_pool": task.keys,
            "n_back": task.n_back,
            "score_prefix": str(task.score_prefix).lower(),
            "positions": "learned" if config.positions else "none",
            "dropout": config.dropout,
            "stored_rows": config.stored_rows,
            "batch": config.batch,
            "max_steps": config.steps,
            "optimizer": config.optimizer,
            "schedule": config.schedule,
            "weight_decay": config.weight_decay,
            "init_std": config.init_std,
            "stop_accuracy": config.stop_accuracy,
            "patience": config.patience,
        }


def status(config: Config, scores: Scores) -> str:
    """Return `solved`, `plateau` or else `budget`, after validation scores of (step, accuracy)."""
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


def cells(config: Config) -> list[Cell]:
    """Return the grid; of several learning rates and seeds every rate with the first seed, `more` has the rest.

    Raise InputError for an unknown method or option.
    """
    seeds = dict.fromkeys(config.seeds)
    first = list(seeds)[: 1 if len(set(config.lrs)) > 1 else None]
    return [
        dataclasses.replace(cell, config=dataclasses.replace(cell.config, lrs=(rate,), seeds=(seed,)))
        for seed in first
        for cell in _settings(config)
        for rate in dict.fromkeys(config.lrs)
    ]


def more(config: Config, results: "pd.DataFrame | None") -> list[Cell]:
    """Return the further seeds, at the learning rate with the best validation accuracy of the first seed; of equal ones
    the rate that took the fewest steps; none where every rate failed. Without results: the first rate, for an estimate.
    """
    seeds = list(dict.fromkeys(config.seeds))
    if len(set(config.lrs)) == 1:
        return []
    cells = []
    for cell in _settings(config):
        rate: float | None = config.lrs[0] if results is None else _best_rate(cell, seeds[0], results)
        if rate is None:
            continue
        for seed in seeds[1:]:
            cells.append(dataclasses.replace(cell, config=dataclasses.replace(cell.config, lrs=(rate,), seeds=(seed,))))
    return cells


def _best_rate(cell: Cell, seed: int, results: "pd.DataFrame") -> float | None:
    from sbeval.tables import selection

    name, _, options = cell.attention.partition(":")
    config = cell.config
    mine = results[
        (results["attention"] == name)
        & (results["options"] == options)
        & (results["seed"] == seed)
        & (results["kv_pairs"] == config.kv_pairs[0])
        & (results["width"] == config.widths[0])
        & (results["n_back"] == config.n_back[0])
    ]
    rates = selection.ranked_rates(mine)
    return rates[0] if rates else None


def _settings(config: Config) -> list[Cell]:
    """Return the grid without learning rates and seeds."""
    methods = dict.fromkeys(_spec(config, spec) for spec in config.attention)
    return [
        Cell(
            config=dataclasses.replace(config, attention=(spec,), kv_pairs=(pairs,), n_back=(n_back,), widths=(width,))
        )
        # models that share compiled code are consecutive
        for spec in methods
        for width in dict.fromkeys(config.widths)
        for pairs in dict.fromkeys(config.kv_pairs)
        for n_back in dict.fromkeys(config.n_back)
    ]


def _spec(config: Config, spec: str) -> str:
    """Return the canonical spec, with the sweep's logit scale where stick-breaking's options have none."""
    name, _, options = spec.partition(":")
    if name == "stick_breaking" and "logit_scale=" not in options:
        spec = f"{name}:{options + ',' if options else ''}logit_scale={config.logit_scale}"
    return canonical_attention(spec)


# below the table where a cell was not solved: plateaus have ended after 10,000 steps
UNDECIDED = (
    "budget, plateau: not solved in these steps, which does not show that the method cannot. More --steps with "
    "--patience 0, and other rates (--lr), would decide."
)


def summary(results: "pd.DataFrame") -> "Table":
    """Return the table for the terminal: accuracy by method, pairs and rate, with lowest and highest seed."""
    from rich.table import Table

    # terminals are narrow: width and n-back only where they vary
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
            f"{attention}:{options}" if options else f"{attention}",
            *(f"{value:g}" for value in values),
            f"{len(validation)}",
            f"{validation.mean():.3f}" if len(validation) else "",
            _span(accuracy["all"]) if accuracy else "",
            *(f"{accuracy[split].mean():.3f}" if split in accuracy else "" for split in ("fresh", "stale")),
            ", ".join(f"{count} {how}" for how, count in ended.items()),
        )
    if results["status"].isin(["budget", "plateau"]).any():
        table.caption = UNDECIDED
    return table


def _span(values: "pd.Series[float]") -> str:
    several = f" ({values.min():.3f} to {values.max():.3f})" if len(values) > 1 else ""
    return f"{values.mean():.3f}{several}"


FAMILY = Family(
    name=NAME,
    help="Multi-query repeated associative recall: does each use of a variable return its latest value?",
    config=Config,
    presets=PRESETS,
    cells=cells,
    summary=summary,
    more=more,
)
