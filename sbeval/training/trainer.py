"""Train one model: run its steps, validate, diagnose and log at intervals, save, and resume exactly."""

import dataclasses
import math
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from sbeval.errors import InputError
from sbeval.models.config import ModelConfig, flops_per_token
from sbeval.models.decoder import Decoder
from sbeval.runtime import device, distributed, signals
from sbeval.runtime.distributed import ALONE, World
from sbeval.runtime.progress import Task
from sbeval.tables import epochs
from sbeval.training import checkpoint
from sbeval.training.checkpoint import State
from sbeval.training.config import TrainConfig
from sbeval.training.schedule import learning_rate
from sbeval.training.stepper import Batch, Stepper


class Batches(Protocol):
    """Batches by step, deterministic."""

    def __getitem__(self, step: int, /) -> Batch: ...


class DivergedError(RuntimeError):
    """The loss is NaN or infinite."""


@dataclass(slots=True)
class Trained:
    """A trained model and the record of its training."""

    model: Decoder
    state: State
    tokens_per_second: float | None  # median over log intervals of the process that trained last
    mfu: float | None  # model FLOP utilisation of the datasheet's peak; None if that is unknown
    rows: int  # sequences per forward pass of a process: fewer than configured after running out of memory


class Trainer:
    """One training run, resumed exactly from the checkpoint in `folder` if there is one."""

    def __init__(
        self,
        model: ModelConfig,
        config: TrainConfig,
        batches: Batches,
        folder: Path | None,
        place: torch.device,
        world: World = ALONE,
        *,
        shard: bool = False,
        tokenizer: str | None = None,
        held_out: Batch | None = None,
        after: Path | None = None,
        trunk: bool = False,
        diagnose: Callable[[Decoder], Sequence[Mapping[str, object]]] | None = None,
    ) -> None:
        """tokenizer: digest of the model's tokenizer, stored in checkpoints. held_out: text whose loss is computed at
        multiples of `look_every` and at the end. after: the checkpoint of a finished trunk, from which this training
        continues. trunk: whether others continue from this one, whose checkpoint then keeps the optimizer's state.
        diagnose: called at multiples of `diagnose_every` and at the end, with the model in evaluation mode; what it
        returns is stored.
        """
        if shard and world.size == 1:
            raise InputError("--shard needs several processes: start them with torchrun --nproc-per-node")
        if shard and config.diagnose_every:
            raise InputError("--diagnostics does not support --shard: use 0, or no --shard")
        if shard and config.optimizer == "muon":
            raise InputError("optimizer muon does not support --shard: use adamw, or no --shard")
        if config.batch % world.size:
            raise InputError(f"batch must be a multiple of the {world.size} processes; got {config.batch} sequences")
        torch.manual_seed(config.seed)
        self.config, self.batches, self.folder, self.place, self.world = config, batches, folder, place, world
        self.shard, self.tokenizer, self.trunk = shard, tokenizer, trunk
        self.held_out = held_out if config.look_every else None
        self.diagnose = diagnose if config.diagnose_every else None
        self.model = Decoder(model).to(place)
        self.state = State()
        self.speeds: list[float] = []  # tokens/s of each log interval
        self.stepper = Stepper(self.model, config, place, world, shard=shard)
        self._restore(after)
        self.stepper.replicate()

    def run(
        self,
        task: Task,
        stop: Callable[[Decoder, State], bool] | None = None,
        log: Callable[[int, dict[str, float]], None] | None = None,
    ) -> Trained:
        """Train to the last step, or until `stop`, called at multiples of `check_every` and at the end, returns true.

        log: called with the step and its loss, lr and tokens_per_second at multiples of `log_every`, `check_every` and
        `look_every`, and at the end; with held_out_loss after a validation step. Raise DivergedError when a loss is not
        finite, and KeyboardInterrupt once the current step is done, logged and saved.
        """
        saved, self.stepper.say = time.perf_counter(), task.say
        self.model.train()
        with signals.deferred() as interrupted:
            ended = self._anywhere(interrupted.is_set())
            while not self.state.finished and not ended:
                if done := self._run_steps(self._next_log(), interrupted):
                    self._validate()
                    task.advance(done, status=self._status())
                    if log:
                        log(self.state.step, self._numbers())
                    self._check_finite()
                    self.state.finished = self._out_of_patience()
                    self.state.finished |= bool(stop and self._check_is_due() and stop(self.model, self.state))
                self.state.finished |= self.state.step >= self.config.steps
                self._diagnose()
                due = time.perf_counter() - saved > self.config.checkpoint_seconds
                ended = self._anywhere(interrupted.is_set())
                if self.state.finished or ended or self._anywhere(due):
                    self._save()
                    saved = time.perf_counter()
                # an interrupt during the save
                ended = ended or self._anywhere(interrupted.is_set())
            ended = ended or self._anywhere(interrupted.is_set())
        if ended:
            raise KeyboardInterrupt
        return self._result()

    def _next_log(self) -> int:
        """Return the next step to log: the next multiple of an interval, or the end."""
        step, validation = self.state.step, self.config.look_every if self.held_out else 0
        diagnosis = self.config.diagnose_every if self.diagnose else 0
        intervals = (self.config.log_every, self.config.check_every, validation, diagnosis)
        return min(self.config.steps, *((step // every + 1) * every for every in intervals if every))

    def _check_is_due(self) -> bool:
        step, every = self.state.step, self.config.check_every
        return every > 0 and (step % every == 0 or step == self.config.steps)

    def _validate(self) -> None:
        """Record the held-out loss if it is due."""
        step = self.state.step
        if self.held_out and (step % self.config.look_every == 0 or step == self.config.steps):
            self.state.held_out.append((step, self.stepper.mean_loss(self.held_out)))

    def _diagnose(self) -> None:
        """Record a diagnosis if it is due; every process makes the same one."""
        step, done = self.state.step, self.state.diagnoses[-1]["step"] if self.state.diagnoses else 0
        if self.diagnose and step > done and (step % self.config.diagnose_every == 0 or self.state.finished):
            start = time.perf_counter()
            self.model.eval()
            self.state.diagnoses += [{"step": step, **reading} for reading in self.diagnose(self.model)]
            self.model.train()
            self.state.diagnosis_seconds += time.perf_counter() - start

    def _check_finite(self) -> None:
        """Raise DivergedError when the last loss is not finite."""
        held_out = [loss for _, loss in self.state.held_out[-1:]]
        for name, loss in zip(("loss", "held-out loss"), (self.state.losses[-1], *held_out), strict=False):
            if not math.isfinite(loss):
                raise DivergedError(f"the {name} is {loss} at step {self.state.step}")

    def _out_of_patience(self) -> bool:
        return 0 < self.config.patience <= epochs.looks_without_progress(self.state.held_out)

    def _run_steps(self, end: int, interrupted: threading.Event) -> int:
        """Run up to step `end`, or to the end of the step of an interrupt; return the number of steps."""
        start, first = time.perf_counter(), self.state.step
        # losses stay on the device until the end, so that it never waits for the host
        losses: list[Tensor] = []
        with self.stepper.on_stream():
            # with several processes none stops alone
            while first + len(losses) < end and not (self.world.size == 1 and interrupted.is_set()):
                step = first + len(losses)
                losses.append(self.stepper.run(self.batches[step], step))
            mine = torch.stack(losses).double().cpu().numpy() if losses else None
        if mine is not None:
            self.state.losses += (distributed.summed(mine, self.world, self.place) / self.world.size).tolist()
            seconds = time.perf_counter() - start
            self.state.seconds += seconds
            self.speeds.append(len(losses) * self.config.batch * self.config.length / seconds)
        return len(losses)

    def _anywhere(self, flag: bool) -> bool:
        return distributed.anywhere(flag, self.world, self.place)

    def _restore(self, after: Path | None) -> None:
        saved = checkpoint.find(self.folder) if self.folder else None
        if saved is not None:
            self.state = checkpoint.load_state(saved)
            checkpoint.restore(saved, self.model, None if self.state.finished else self.stepper.optimizer)
        elif after is not None:
            self.state = dataclasses.replace(checkpoint.load_state(after), finished=False)
            checkpoint.restore(after, self.model, self.stepper.optimizer)

    def _save(self) -> None:
        self._measure()
        if self.folder is not None:
            training = dataclasses.asdict(self.config) | {"tokenizer": self.tokenizer}
            complete = self.state.finished and not self.trunk
            if self.shard and not complete:
                checkpoint.save_sharded(
                    self.folder, self.model, self.state, self.stepper.optimizer, self.world, training
                )
                return
            model = self._whole()
            if self.world.leads:
                optimizer = None if complete else self.stepper.optimizer
                checkpoint.save(self.folder, model, self.state, optimizer, training)
        distributed.wait(self.world)

    def _whole(self) -> Decoder:
        """Return the model; of a sharded one a full copy in every process."""
        if not self.shard:
            return self.model
        from sbeval.training import fsdp

        model = Decoder(self.model.config).to(self.place)
        model.load_state_dict({name: fsdp.full(x) for name, x in self.model.state_dict().items()})
        return model

    def _numbers(self) -> dict[str, float]:
        rate = learning_rate(self.config, self.state.step - 1)
        numbers = {"loss": self.state.losses[-1], "lr": rate, "tokens_per_second": self.speeds[-1]}
        if (losses := self.state.held_out) and losses[-1][0] == self.state.step:
            numbers["held_out_loss"] = losses[-1][1]
        return numbers

    def _status(self) -> str:
        recent = statistics.fmean(self.state.losses[-self.config.log_every :])
        held_out = "".join(f"held-out {loss:.3f}, " for _, loss in self.state.held_out[-1:])
        return f"loss {recent:.3f}, {held_out}{self.speeds[-1]:,.0f} tokens/s"

    def _measure(self) -> None:
        """Record the speed, if this process has trained."""
        if not self.speeds:
            return
        # the first interval includes compilation
        speed = statistics.median(self.speeds[1:] or self.speeds)
        peak = device.peak_flops(self.place)
        flops = 3 * flops_per_token(self.model.config, self.config.length)
        self.state.tokens_per_second = speed
        self.state.mfu = speed * flops / (peak * self.world.size) if peak and self.config.dtype == "bfloat16" else None

    def _result(self) -> Trained:
        return Trained(
            self._whole().eval(), self.state, self.state.tokens_per_second, self.state.mfu, self.stepper.rows
        )
