"""Options and presets of multi-query repeated associative recall (see `sbeval.tasks.mqrar`), and the values of
the columns that record them."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from sbeval.config import ATTENTION, EVALUATION, LATER, LR, MODEL, SEED, TASK, TRAINING, option
from sbeval.data.recall import Recall
from sbeval.errors import InputError, check_swept, choose
from sbeval.models.config import NORMS
from sbeval.tasks.synthetic import METHODS


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
    schedule: str = option("cosine", TRAINING, "Learning rate schedule: cosine, power, constant or wsd.")
    optimizer: str = option("adamw", TRAINING, "adamw, or muon for the matrices inside the blocks.", LATER)
    weight_decay: float = option(0.1, TRAINING, "Weight decay.")
    stop_accuracy: float = option(0.99, TRAINING, "Validation accuracy at which training ends.")
    patience: int = option(0, TRAINING, "Steps without progress in validation after which training ends; 0: never.")
    check_every: int = option(100, TRAINING, "Steps between validations.")
    norm: str = option("rms", MODEL, "Norm of the blocks: rms, or layer (with biases).", LATER)
    biases: bool = option(False, MODEL, "Biases of all projections inside the blocks.", LATER)
    beta_2: float = option(0.95, TRAINING, "AdamW's decay rate of squared gradients.", LATER)
    decay_all: bool = option(False, TRAINING, "Weight decay of all parameters, not of matrices alone.", LATER)
    warmup: int | None = option(None, TRAINING, "Steps of the warm-up; 0: none. Default: 5 % of --steps.", LATER)
    clip: float = option(1.0, TRAINING, "Norm to which larger gradients are clipped; 0: none are.", LATER)
    final_lr: float = option(0.1, TRAINING, "Last rate of the cosine, as a share of the peak.", LATER)
    lr_by_epoch: bool = option(False, TRAINING, "Change the rate between epochs of --stored-rows alone.", LATER)
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
        if self.lr_by_epoch and not self.stored_rows:
            raise InputError("--lr-by-epoch needs --stored-rows, whose epochs it is about")
        if self.warmup is not None and self.warmup < 0:
            raise InputError(f"warmup must be at least 0, or left out; got {self.warmup}")
        choose("norm", self.norm, NORMS)
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


def factors(config: Config) -> dict[str, Any]:
    """Return the factors of the rows of a config whose swept fields have one entry each."""
    task = config.task(config.kv_pairs[0], config.n_back[0])
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
        "schedule": f"{config.schedule} by epoch" if config.lr_by_epoch else config.schedule,
        "weight_decay": config.weight_decay,
        "init_std": config.init_std,
        "stop_accuracy": config.stop_accuracy,
        "patience": config.patience,
        "norm": config.norm,
        "biases": str(config.biases).lower(),
        "beta_2": config.beta_2,
        "decayed": "all" if config.decay_all else "matrices",
        "warmup": config.warmup,
        "clip": config.clip,
        "final_lr": config.final_lr,
    }


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
    # does an offset of the logits with these initial values make stick-breaking learn sooner?
    "logit_bias": dataclasses.replace(
        H200, attention=("stick_breaking", *(f"stick_breaking:logit_bias={start}" for start in (-1.5, -3, -4.5, -6))),
        kv_pairs=(32, 128), lrs=(4.64e-4, 1e-3, 2.15e-3), schedule="cosine", optimizer="adamw", patience=0,
    ),
    # the N-th last value, as in PaTH (Yang et al. 2025, arXiv 2505.16381): 2 heads, 32 pairs. The number
    # of keys and the optimizer are not published; these are ours.
    "n_back": dataclasses.replace(
        H200, kv_pairs=(32,), n_back=(1, 2, 3, 4), heads=2, key_pool=8, lrs=(5e-4, 1e-3, 2e-3),
    ),
    # the paper's setting in this project's block and with its warm-up, betas, clipping and last learning rate
    "paper": Config(
        kv_pairs=(32, 64, 128, 192), widths=(256,), lrs=RATES, vocab_size=8192, seq_len=768, dropout=0.1,
        stored_rows=100_000, batch=256, steps=25_000, check_every=250,
    ),
    # the public code of the paper's first author: shawntan/zoology at eff3566, with RoPE as in the commit after it,
    # eca2940; `sbeval.tables.mqrar.DEPARTURES` lists what differs
    "author": Config(
        kv_pairs=(64, 128, 192), widths=(256,), lrs=RATES, vocab_size=8192, seq_len=768, dropout=0.1, positions=True,
        norm="layer", biases=True, init_std=0.02, beta_2=0.999, decay_all=True, warmup=0, clip=0.0, final_lr=0.0,
        lr_by_epoch=True, stored_rows=100_000, batch=256, steps=25_000, check_every=250,
    ),
}  # fmt: skip
