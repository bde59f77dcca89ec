"""Train one model: AdamW, warm-up, cosine or power schedule, gradient accumulation and clipping, exact resume."""

import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from sbeval import checkpoint, device
from sbeval.checkpoint import State
from sbeval.errors import InputError, choose
from sbeval.model import IGNORE, Decoder, ModelConfig, flops_per_token
from sbeval.progress import Task

SCHEDULES = ("cosine", "power", "constant")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How to train. A step is `batch` sequences of `length` tokens, run `micro_batch` at a time.

    Schedules, after `warmup` steps from 0: `cosine` from lr to final_lr * lr; `power` is min(lr, batch a n^b) after n
    tokens (Shen et al. 2024, arXiv 2408.13359), then over the last `decay` of the steps exponentially to final_lr of
    where it stands; `constant`.
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
    weight_decay: float = 0.1
    beta_1: float = 0.9
    beta_2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0
    seed: int = 0
    dtype: str = "float32"
    sparse: bool = False  # run the head at scored positions only
    log_every: int = 10  # steps between looks at the loss
    check_every: int = 0  # steps between questions whether to stop; 0 never asks
    checkpoint_seconds: float = 120.0

    def __post_init__(self) -> None:
        choose("schedule", self.schedule, SCHEDULES)
        choose("dtype", self.dtype, device.DTYPES)
        for name in ("steps", "batch", "length", "lr", "log_every", "clip"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be above 0; got {getattr(self, name)}")
        if self.micro_batch is not None and not 0 < self.micro_batch <= self.batch:
            raise InputError(f"micro_batch must be 1 to {self.batch} (the batch); got {self.micro_batch}")

    @property
    def tokens(self) -> int:
        return self.steps * self.batch * self.length


class Batch(Protocol):
    """What one step learns from. tokens, targets: (B, T) int64; cu_seqlens: int32 (N + 1,) or None."""

    @property
    def tokens(self) -> Tensor: ...
    @property
    def targets(self) -> Tensor: ...
    @property
    def cu_seqlens(self) -> Tensor | None: ...


class Batches(Protocol):
    """Batches by step, the same for the same step whenever it is asked for."""

    def __getitem__(self, step: int, /) -> Batch: ...


class DivergedError(RuntimeError):
    """The loss is no number any more."""


@dataclass(slots=True)
class Trained:
    """A trained model and how training went."""

    model: Decoder
    state: State
    tokens_per_second: float | None  # median of this process's stretches; None when there was nothing left to do
    mfu: float | None  # model FLOP utilisation: against the datasheet's peak, None where that is not known


def learning_rate(config: TrainConfig, step: int) -> float:
    """Learning rate of step `step`, counted from 0."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "cosine":
        done = (step - config.warmup) / max(1, config.steps - config.warmup)
        return config.lr * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * done)))
    start = int(config.steps * (1 - config.decay))
    tokens = (min(step, start) + 1) * config.batch * config.length
    rate = min(config.lr, config.batch * config.power_a * tokens**config.power_b)
    return float(rate * config.final_lr ** (max(0, step - start) / max(1, config.steps - start)))


def optimizer_for(model: Decoder, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices alone, and their learning rate divided by m_width (muP) inside the blocks."""
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and not name.endswith("bias")
        divisor = model.config.m_width if is_matrix and name.startswith("blocks.") else 1.0
        groups.setdefault((config.weight_decay if is_matrix else 0.0, divisor), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": params, "weight_decay": decay, "divisor": divisor} for (decay, divisor), params in groups.items()],
        lr=config.lr, betas=(config.beta_1, config.beta_2), eps=config.eps, fused=True,
    )  # fmt: skip


@contextmanager
def _deferred_interrupt() -> Iterator[threading.Event]:
    """Turn SIGINT and SIGTERM into an event, so that a step is never left half done."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {sign: signal.signal(sign, lambda *_: asked.set()) for sign in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)


class Trainer:
    """One training run; it goes on from the checkpoint in `folder` when there is one, to the same end."""

    def __init__(
        self, model: ModelConfig, config: TrainConfig, batches: Batches, folder: Path | None, place: torch.device
    ) -> None:
        torch.manual_seed(config.seed)
        self.config, self.batches, self.folder, self.place = config, batches, folder, place
        self.model = Decoder(model).to(place)
        self.optimizer = optimizer_for(self.model, config)
        self.state = State()
        self.speeds: list[float] = []  # tokens/s between looks at the loss
        self._restore()
        self.loss = self._compile()

    def run(
        self,
        task: Task,
        stop: Callable[[Decoder, State], bool] | None = None,
        log: Callable[[int, dict[str, float]], None] | None = None,
    ) -> Trained:
        """Train to the last step, or until `stop` says so at a multiple of `check_every`.

        `log` gets step and loss, lr, tokens_per_second at multiples of `log_every` and of `check_every`, and at the
        end. Raises DivergedError when the loss is no number, and KeyboardInterrupt once the step in hand is done,
        looked at and saved.
        """
        saved = time.perf_counter()
        self.model.train()
        with _deferred_interrupt() as interrupted:
            while not self.state.finished and not interrupted.is_set():
                if done := self._run_steps(self._next_look(), interrupted):
                    task.advance(done, status=self._status())
                    if log:
                        log(self.state.step, self._numbers())
                    if not math.isfinite(self.state.losses[-1]):
                        raise DivergedError(f"the loss is {self.state.losses[-1]} at step {self.state.step}")
                    asks = self.config.check_every and self.state.step % self.config.check_every == 0
                    self.state.finished = bool(stop and asks and stop(self.model, self.state))
                self.state.finished |= self.state.step >= self.config.steps
                due = time.perf_counter() - saved > self.config.checkpoint_seconds
                if self.state.finished or interrupted.is_set() or due:
                    self._save()
                    saved = time.perf_counter()
        if interrupted.is_set():
            raise KeyboardInterrupt
        return self._result()

    def _next_look(self) -> int:
        """The step up to which to run before a look: the next multiple of either interval, or the end."""
        step, intervals = self.state.step, (self.config.log_every, self.config.check_every)
        return min(self.config.steps, *((step // every + 1) * every for every in intervals if every))

    def _run_steps(self, end: int, interrupted: threading.Event) -> int:
        """Run up to step `end`, or to the end of the step in which an interrupt comes; how many that were."""
        start, first = time.perf_counter(), self.state.step
        # losses stay on the device until here, so that it never waits for us
        losses: list[Tensor] = []
        while first + len(losses) < end and not interrupted.is_set():
            losses.append(self._step(first + len(losses)))
        if losses:
            self.state.losses += torch.stack(losses).tolist()
            seconds = time.perf_counter() - start
            self.state.seconds += seconds
            self.speeds.append(len(losses) * self.config.batch * self.config.length / seconds)
        return len(losses)

    def _step(self, step: int) -> Tensor:
        """One optimizer step; its loss, the mean over scored tokens."""
        batch = self.batches[step]
        rate = learning_rate(self.config, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate / group["divisor"]
        targets = batch.targets.to(self.place, non_blocking=True)
        tokens = batch.tokens.to(self.place, non_blocking=True)
        cu_seqlens = None if batch.cu_seqlens is None else batch.cu_seqlens.to(self.place, non_blocking=True)
        count = (targets != IGNORE).sum()
        size = self.config.micro_batch or self.config.batch
        total = torch.zeros((), device=self.place)
        for start in range(0, len(tokens), size):
            part = slice(start, start + size)
            within = _part_of(cu_seqlens, part, tokens.shape) if size < len(tokens) else cu_seqlens
            with device.autocast(self.place, self.config.dtype):
                loss = self.loss(tokens[part], targets[part], within) / count
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def _compile(self) -> Callable[..., Tensor]:
        """The loss, compiled on a GPU; on a CPU compiling a small model would take longer than it saves."""
        if self.place.type != "cuda":
            return self.model.sparse_loss if self.config.sparse else self.model.loss
        if self.config.sparse:
            # the number of scored positions varies: it stays outside
            self.model.compile()
            return self.model.sparse_loss
        return torch.compile(self.model.loss)

    def _restore(self) -> None:
        saved = checkpoint.find(self.folder) if self.folder else None
        if saved is not None:
            self.state = checkpoint.load_state(saved)
            checkpoint.restore(saved, self.model, None if self.state.finished else self.optimizer)

    def _save(self) -> None:
        if self.folder is not None:
            checkpoint.save(self.folder, self.model, self.state, None if self.state.finished else self.optimizer)

    def _numbers(self) -> dict[str, float]:
        rate = learning_rate(self.config, self.state.step - 1)
        return {"loss": self.state.losses[-1], "lr": rate, "tokens_per_second": self.speeds[-1]}

    def _status(self) -> str:
        recent = statistics.fmean(self.state.losses[-self.config.log_every :])
        return f"loss {recent:.3f}, {self.speeds[-1]:,.0f} tokens/s"

    def _result(self) -> Trained:
        # the first stretch includes compilation
        speed = statistics.median(self.speeds[1:] or self.speeds) if self.speeds else None
        peak = device.peak_flops(self.place)
        flops = 3 * flops_per_token(self.model.config, self.config.length)
        mfu = speed * flops / peak if speed and peak and self.config.dtype == "bfloat16" else None
        return Trained(self.model.eval(), self.state, speed, mfu)


def _part_of(cu_seqlens: Tensor | None, rows: slice, shape: torch.Size) -> Tensor | None:
    """The bounds that fall within `rows` of a batch; every row starts a sequence of its own."""
    if cu_seqlens is None:
        return None
    start, end = rows.start * shape[1], min(rows.stop, shape[0]) * shape[1]
    inside = (cu_seqlens >= start) & (cu_seqlens <= end)
    part: Tensor = cu_seqlens.masked_select(inside) - start
    return part
