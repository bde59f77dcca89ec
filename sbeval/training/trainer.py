"""Train one model: AdamW or Muon, warm-up and schedules, gradient accumulation and clipping, exact resume.

Each of several processes runs its share of a step's sequences. A loss is summed over scored tokens and divided by their
number in the whole step, so gradients and losses are those of one process.
"""

import dataclasses
import math
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sbeval.config import IGNORE
from sbeval.data import counter_rng
from sbeval.data.dataloader import WeightedBatch
from sbeval.errors import InputError
from sbeval.models.config import ModelConfig, flops_per_token
from sbeval.models.decoder import Decoder
from sbeval.runtime import device, distributed, oom, signals
from sbeval.runtime.distributed import ALONE, World
from sbeval.runtime.progress import Task
from sbeval.tables import epochs
from sbeval.training import checkpoint
from sbeval.training.checkpoint import State
from sbeval.training.config import TrainConfig
from sbeval.training.graph import WARM_UP, Graph, refused, waits
from sbeval.training.held_out import Rows
from sbeval.training.optimizer import optimizer_for, set_rate


class Batch(Protocol):
    """The data of one step. tokens, targets: (B, T) int64; cu_seqlens: int32 (N + 1,) or None."""

    @property
    def tokens(self) -> Tensor: ...
    @property
    def targets(self) -> Tensor: ...
    @property
    def cu_seqlens(self) -> Tensor | None: ...


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


def learning_rate(config: TrainConfig, step: float) -> float:
    """Return the learning rate of a step, counted from 0."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.epoch_rows:
        # the place, in steps, at which its epoch began
        began = step * config.batch // config.epoch_rows * config.epoch_rows / config.batch
        step = max(config.warmup, began)
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "wsd":
        return config.lr * min(1.0, (config.steps - step) / max(1, config.steps - config.trunk_steps))
    if config.schedule == "cosine":
        done = (step - config.warmup) / max(1, config.steps - config.warmup)
        return config.lr * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * done)))
    start = int(config.steps * (1 - config.decay))
    tokens = (min(step, start) + 1) * config.batch * config.length
    rate = min(config.lr, config.batch * config.power_a * tokens**config.power_b)
    return float(rate * config.final_lr ** (max(0, step - start) / max(1, config.steps - start)))


# models that the compiler holds code of, and the shapes that need code of their own
_compiled: set[tuple[ModelConfig, object]] = set()


def _make_room(model: ModelConfig, variant: object) -> None:
    """Drop compiled code of other models: it is useless, and past a limit nothing more is compiled.

    Models that differ in their weights alone share it, so a sweep over learning rates and seeds compiles once.
    """
    # imported here: it takes seconds, and on a CPU nothing is compiled
    from torch._dynamo import config

    if any(model != other for other, _ in _compiled) or len(_compiled | {(model, variant)}) > config.recompile_limit:
        _forget()
    _compiled.add((model, variant))


def _forget() -> None:
    torch.compiler.reset()
    _compiled.clear()


class Loss(nn.Module):
    """A model's loss as a module, the unit of compilation, DDP and FSDP."""

    def __init__(self, model: Decoder, sparse: bool, capacity: int | None) -> None:
        super().__init__()
        self.model, self.sparse, self.capacity = model, sparse, capacity
        self.score = model.score

    def forward(
        self, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor | None, weights: Tensor | None = None
    ) -> Tensor:
        if weights is not None:
            return self.score(self.model(tokens, cu_seqlens), targets, weights)
        if self.sparse:
            return self.model.sparse_loss(tokens, targets, cu_seqlens, self.capacity)
        return self.score(self.model(tokens, cu_seqlens), targets)

    def compile_parts(self, *, in_place: bool) -> None:
        """Compile a block, whose code all blocks share, and the score: a whole model takes many times as long.

        in_place: every call of a block runs the compiled code, not those of training alone.
        """
        if in_place:
            for block in self.model.blocks:
                block.compile()
        else:
            self.model.compile_blocks()
        # eager, it would hold several float32 copies of the logits; not if sparse, as the number of positions varies
        if not self.sparse:
            self.score = torch.compile(self.model.score)


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
        self.rows = config.micro_batch or config.batch // world.size  # sequences per forward pass
        self.say: Callable[[str], None] = print
        self.compiles = place.type == "cuda"
        # whether a GPU replays the graph of a step, and the stream it is recorded on, on which all steps then run
        self.replays = place.type == "cuda" and config.capacity is not None and world.size == 1
        self.stream = torch.cuda.Stream(place) if self.replays else None
        self.graph: Graph | None = None
        self.launched = 0  # steps that were launched kernel by kernel since code was compiled
        self.loss = self._prepare()
        # after sharding, which replaces the model's parameters
        self.optimizer = optimizer_for(self.model, config, recorded=self.replays)
        self._restore(after)
        if not shard and world.size > 1:
            devices = [place] if place.type == "cuda" else None
            self.loss = DistributedDataParallel(self.loss, device_ids=devices, gradient_as_bucket_view=True)

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
        saved, self.say = time.perf_counter(), task.say
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
            batch, losses = self.held_out, list[float]()
            while not oom.enough(lambda: losses.append(self._held_out_loss(batch))):
                self._halve()
            self.state.held_out.append((step, losses[0]))

    def _diagnose(self) -> None:
        """Record a diagnosis if it is due; every process makes the same one."""
        step, done = self.state.step, self.state.diagnoses[-1]["step"] if self.state.diagnoses else 0
        if self.diagnose and step > done and (step % self.config.diagnose_every == 0 or self.state.finished):
            start = time.perf_counter()
            self.model.eval()
            self.state.diagnoses += [{"step": step, **reading} for reading in self.diagnose(self.model)]
            self.model.train()
            self.state.diagnosis_seconds += time.perf_counter() - start

    def _held_out_loss(self, batch: Batch) -> float:
        """Return the mean loss over the scored tokens of held-out text, of which each process runs a share."""
        # compiled code is for this many sequences with gradients: otherwise it would be compiled once more
        rows = Rows(batch.tokens, batch.targets, batch.cu_seqlens)
        batch = rows.filled(self.world.size * (self.rows if self.compiles else 1))
        loss = self.loss.module if isinstance(self.loss, DistributedDataParallel) else self.loss
        total = torch.zeros((), dtype=torch.float64, device=self.place)
        self.model.train(not self.model.config.dropout)
        with torch.set_grad_enabled(self.compiles), device.autocast(self.place, self.config.dtype):
            for part in self._parts(len(batch.tokens)):
                within = _part_of(batch.cu_seqlens, part, batch.tokens.shape)
                cu_seqlens = None if within is None else self._moved(within)
                total += loss(self._moved(batch.tokens[part]), self._moved(batch.targets[part]), cu_seqlens).detach()
        self.model.train()
        if self.shard:
            from sbeval.training import fsdp

            fsdp.reshard(loss)
        mean = distributed.summed(total.cpu().numpy(), self.world, self.place) / int((batch.targets != IGNORE).sum())
        return float(mean)

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
        with self._on_stream():
            # with several processes none stops alone
            while first + len(losses) < end and not (self.world.size == 1 and interrupted.is_set()):
                losses.append(self._step(first + len(losses)))
            mine = torch.stack(losses).double().cpu().numpy() if losses else None
        if mine is not None:
            self.state.losses += (distributed.summed(mine, self.world, self.place) / self.world.size).tolist()
            seconds = time.perf_counter() - start
            self.state.seconds += seconds
            self.speeds.append(len(losses) * self.config.batch * self.config.length / seconds)
        return len(losses)

    def _step(self, step: int) -> Tensor:
        """Run one optimizer step; return the mean loss over scored tokens, of several processes the mean of theirs."""
        batch = self.batches[step]
        set_rate(self.optimizer, learning_rate(self.config, step))
        tokens, targets = self._moved(batch.tokens), self._moved(batch.targets)
        cu_seqlens = None if batch.cu_seqlens is None else self._moved(batch.cu_seqlens)
        if self.model.config.dropout:
            # a resumed run draws the same dropout masks
            torch.manual_seed(counter_rng.key(self.config.seed, 0, step))
        weights = self._moved(batch.weights) if isinstance(batch, WeightedBatch) else None
        # bounds of packed sequences differ in number
        if self.replays and cu_seqlens is None and weights is None:
            if self.launched >= WARM_UP and self._record(tokens, targets):
                assert self.graph is not None
                return self.graph(tokens, targets)
            if self.launched == WARM_UP - 1:
                with waits() as waited:
                    loss = self._launch(tokens, targets, None, None)
                # not of compiling again, after memory ran out in this step
                if waited and self.launched == WARM_UP:
                    self._only_launch(f"it waits for the GPU at {waited[0]}")
                return loss
        return self._launch(tokens, targets, cu_seqlens, weights)

    def _launch(self, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor | None, weights: Tensor | None) -> Tensor:
        """Run a step kernel by kernel; return its loss."""
        losses: list[Tensor] = []
        while not oom.enough(lambda: losses.append(self._accumulate(tokens, targets, cu_seqlens, weights))):
            self._halve()
        self._update()
        self.launched += 1
        return losses[0]

    def _record(self, tokens: Tensor, targets: Tensor) -> bool:
        """Record the graph of a step, unless there is one; return False if memory ran out, after halving, and if a step
        cannot be recorded."""

        def whole(tokens: Tensor, targets: Tensor) -> Tensor:
            loss = self._accumulate(tokens, targets, None, None)
            self._update()
            return loss

        def record() -> None:
            assert self.stream is not None
            self.graph = Graph(whole, tokens, targets, self.stream)

        if self.graph is None:
            try:
                if not oom.enough(record):
                    self._halve()
            except RuntimeError as error:
                if not refused(error):
                    raise
                # gradients that were recorded were not computed
                self.optimizer.zero_grad()
                self._only_launch(str(error.__context__ or error).partition("\n")[0])
        return self.graph is not None

    def _only_launch(self, reason: str) -> None:
        self.replays = False
        slower = "Steps run kernel by kernel, which may be slower"
        self.say(f"a step cannot be recorded as a CUDA graph: {reason}. {slower}")

    def _update(self) -> None:
        """Update the weights by the gradients, and drop these."""
        if self.config.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _accumulate(self, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor | None, weights: Tensor | None) -> Tensor:
        """Accumulate the gradients of a batch, a part at a time; return its loss."""
        # gradients are averaged over processes, and their sum is wanted
        count = (1 if weights is not None else (targets != IGNORE).sum().clamp(min=1)) / self.world.size
        total = torch.zeros((), device=self.place)
        parts = self._parts(len(tokens))
        for part in parts:
            within = _part_of(cu_seqlens, part, tokens.shape) if part != slice(0, len(tokens)) else cu_seqlens
            with self._gradients_stay(part != parts[-1]):
                with device.autocast(self.place, self.config.dtype):
                    weighted = () if weights is None else (weights[part],)
                    loss = self.loss(tokens[part], targets[part], within, *weighted) / count
                loss.backward()
            total += loss.detach()
        return total

    def _halve(self) -> None:
        """Halve the sequences per forward pass: gradients are summed, so only rounding changes.

        Raise torch.OutOfMemoryError, which names what may fit, when that would change the run or is impossible.
        """
        self.optimizer.zero_grad()
        length, fewer = self.config.length, -(-self.rows // 2)
        what = f"out of memory at {self.rows} sequences of {length} tokens at a time"
        if self.rows == 1:
            raise torch.OutOfMemoryError(f"{what}: nothing smaller is left to try")
        if self.model.config.dropout:
            raise torch.OutOfMemoryError(f"{what}; fewer would drop others: give a batch of {fewer} or less")
        if self.world.size > 1:
            # the other processes have not run out
            raise torch.OutOfMemoryError(f"{what}: give --micro-batch-tokens {fewer * length} or less")
        # a graph holds the memory of its shapes
        self.rows, self.graph, self.launched = fewer, None, 0
        if self.place.type == "cuda":
            _forget()
            self.loss = self._prepare()
        self.say(
            f"{what}: continuing with {fewer}, the same run but for rounding (--micro-batch-tokens {fewer * length})"
        )

    def _parts(self, rows: int) -> list[slice]:
        """Return the rows of a batch that this process runs, one slice per forward pass."""
        share = rows // self.world.size
        first, end = self.world.rank * share, (self.world.rank + 1) * share
        return [slice(start, min(start + self.rows, end)) for start in range(first, end, self.rows)]

    def _moved(self, x: Tensor) -> Tensor:
        # a copy from pinned memory does not wait for the GPU; some batches are drawn on the GPU
        pin = x.is_cpu and self.place.type == "cuda"
        return (x.pin_memory() if pin else x).to(self.place, non_blocking=pin)

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        """Run steps on the stream that a graph is recorded on, in order with what is before and after them."""
        if self.stream is None:
            yield
            return
        others = torch.cuda.current_stream(self.place)
        self.stream.wait_stream(others)
        with torch.cuda.stream(self.stream):
            yield
        others.wait_stream(self.stream)

    @contextmanager
    def _gradients_stay(self, stay: bool) -> Iterator[None]:
        """Keep gradients in this process until the last part of a step."""
        if isinstance(self.loss, DistributedDataParallel) and stay:
            with self.loss.no_sync():
                yield
            return
        if self.shard:
            from sbeval.training import fsdp

            fsdp.keep_gradients(self.loss, stay)
        yield

    def _anywhere(self, flag: bool) -> bool:
        return distributed.anywhere(flag, self.world, self.place)

    def _prepare(self) -> nn.Module:
        """Return the loss, compiled on a GPU; on a CPU compiling a small model takes longer than it saves."""
        loss = Loss(self.model, self.config.sparse, self.config.capacity)
        if self.place.type == "cuda":
            _make_room(self.model.config, (self.rows, self.config.length, self.config.sparse, self.config.capacity))
        if self.replays:
            # whole, as the code of a small model is
            loss.compile()
        elif self.compiles:
            # a shard's weights are gathered by hooks of its block
            loss.compile_parts(in_place=self.shard)
        if self.shard:
            from sbeval.training import fsdp

            fsdp.shard(loss, self.model.blocks)
        return loss

    def _restore(self, after: Path | None) -> None:
        saved = checkpoint.find(self.folder) if self.folder else None
        if saved is not None:
            self.state = checkpoint.load_state(saved)
            checkpoint.restore(saved, self.model, None if self.state.finished else self.optimizer)
        elif after is not None:
            self.state = dataclasses.replace(checkpoint.load_state(after), finished=False)
            checkpoint.restore(after, self.model, self.optimizer)

    def _save(self) -> None:
        self._measure()
        if self.folder is not None:
            training = dataclasses.asdict(self.config) | {"tokenizer": self.tokenizer}
            complete = self.state.finished and not self.trunk
            if self.shard and not complete:
                checkpoint.save_sharded(self.folder, self.model, self.state, self.optimizer, self.world, training)
                return
            model = self._whole()
            if self.world.leads:
                optimizer = None if complete else self.optimizer
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
        return Trained(self._whole().eval(), self.state, self.state.tokens_per_second, self.state.mfu, self.rows)


def _part_of(cu_seqlens: Tensor | None, rows: slice, shape: torch.Size) -> Tensor | None:
    """Return the bounds of sequences within `rows` of a batch; every row starts a new sequence."""
    if cu_seqlens is None:
        return None
    start, end = rows.start * shape[1], min(rows.stop, shape[0]) * shape[1]
    inside = (cu_seqlens >= start) & (cu_seqlens <= end)
    part: Tensor = cu_seqlens.masked_select(inside) - start
    return part
