"""Training configs; needs no torch."""

import math
from dataclasses import dataclass, field

from sbeval.config import DTYPES, LATER, OPTIMIZERS
from sbeval.errors import InputError, choose

# a list of more windows takes minutes and all memory before a step begins
MAX_BATCH = 1 << 24
SCHEDULES = ("cosine", "power", "constant", "wsd")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Settings of a training. A step is `batch` sequences of `length` tokens, run `micro_batch` at a time.

    Weight decay is on matrices alone, or on all parameters (`decay_all`). clip: norm to which larger gradients are
    scaled; 0: none are.

    Schedules, after a warm-up from 0 over `warmup` steps: `cosine` from lr to final_lr * lr; `power` is min(lr, batch a
    n^b) after n tokens (Shen et al. 2024, arXiv 2408.13359), then decays exponentially over the last `decay` of the
    steps, by a factor of final_lr; `constant`; `wsd` is constant, then falls linearly to 0 over the last `decay` of the
    steps (Hu et al. 2024, arXiv 2404.06395). With `epoch_rows` a step has the rate of the first sequence of its epoch,
    of that many.
    """

    steps: int
    batch: int
    length: int
    lr: float
    micro_batch: int | None = None
    schedule: str = "cosine"
    warmup: int = 0
    final_lr: float = 0.1
    decay: float = 0.1
    power_a: float = 4.0
    power_b: float = -0.51
    optimizer: str = field(default="adamw", metadata=LATER)
    weight_decay: float = 0.1
    beta_1: float = 0.9
    beta_2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0
    seed: int = 0
    dtype: str = "float32"
    sparse: bool = False  # apply the head at scored positions alone
    # the most scored positions of a forward pass, so that shapes are fixed and a GPU replays the step's graph
    capacity: int | None = field(default=None, metadata=LATER)
    log_every: int = 10  # steps between logs of the loss
    check_every: int = 0  # steps between calls of `stop`; 0: never
    look_every: int = field(default=0, compare=False)  # steps between validation steps; 0: none
    # steps between diagnoses; 0: none. Part of a training's identity: one without them has no curves to show
    diagnose_every: int = field(default=0, metadata=LATER)
    # validation steps without a new lowest held-out loss after which training ends; 0: never
    patience: int = field(default=0, metadata=LATER)
    decay_all: bool = field(default=False, metadata=LATER)
    epoch_rows: int = field(default=0, metadata=LATER)  # sequences of an epoch; 0: the rate changes at every step
    checkpoint_seconds: float = 120.0

    def __post_init__(self) -> None:
        choose("schedule", self.schedule, SCHEDULES)
        choose("optimizer", self.optimizer, OPTIMIZERS)
        choose("dtype", self.dtype, DTYPES)
        for name in ("steps", "batch", "length", "lr", "log_every"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} must be above 0 and finite; got {getattr(self, name)}")
        if self.batch > MAX_BATCH:
            raise InputError(f"a step must have at most {MAX_BATCH} sequences of {self.length}; got {self.batch}")
        for name in ("weight_decay", "clip", "warmup", "final_lr", "epoch_rows"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} must be at least 0 and finite; got {getattr(self, name)}")
        for name in ("beta_1", "beta_2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 0 and below 1; got {getattr(self, name)}")
        if self.micro_batch is not None and not 0 < self.micro_batch <= self.batch:
            raise InputError(f"micro_batch must be 1 to {self.batch} (the batch); got {self.micro_batch}")

    @property
    def tokens(self) -> int:
        return self.steps * self.batch * self.length

    @property
    def trunk_steps(self) -> int:
        """Steps before the decay of `wsd`, which any training of at least as many shares."""
        return self.steps - round(self.steps * self.decay)
