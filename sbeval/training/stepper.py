"""The steps of a training: forward, backward and update, as many sequences at a time as fit, in one or more processes.

Each of several processes runs its share of a step's sequences. A loss is summed over scored tokens and divided by their
number in the whole step, so gradients and losses are those of one process.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sbeval.config import IGNORE
from sbeval.data import counter_rng
from sbeval.data.dataloader import WeightedBatch
from sbeval.models.decoder import Decoder
from sbeval.runtime import device, distributed, oom
from sbeval.runtime.distributed import World
from sbeval.training.config import TrainConfig
from sbeval.training.graph import WARM_UP, Graph, refused, waits
from sbeval.training.held_out import Rows
from sbeval.training.loss import Loss, forget, make_room
from sbeval.training.optimizer import optimizer_for, set_rate
from sbeval.training.schedule import learning_rate


class Batch(Protocol):
    """The data of one step. tokens, targets: (B, T) int64; cu_seqlens: int32 (N + 1,) or None."""

    @property
    def tokens(self) -> Tensor: ...
    @property
    def targets(self) -> Tensor: ...
    @property
    def cu_seqlens(self) -> Tensor | None: ...


class Stepper:
    """Runs the steps of a model. On a GPU its code is compiled, and that of small models replayed as a CUDA graph."""

    def __init__(
        self, model: Decoder, config: TrainConfig, place: torch.device, world: World, *, shard: bool = False
    ) -> None:
        self.model, self.config, self.place, self.world, self.shard = model, config, place, world, shard
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
        self.optimizer = optimizer_for(model, config, recorded=self.replays)

    def replicate(self) -> None:
        """Average gradients over processes that each have the whole model, once its weights are those to begin with."""
        if not self.shard and self.world.size > 1:
            devices = [self.place] if self.place.type == "cuda" else None
            self.loss = DistributedDataParallel(self.loss, device_ids=devices, gradient_as_bucket_view=True)

    def run(self, batch: Batch, step: int) -> Tensor:
        """Run one optimizer step; return the mean loss over scored tokens, of several processes the mean of theirs."""
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

    @contextmanager
    def on_stream(self) -> Iterator[None]:
        """Run steps on the stream that a graph is recorded on, in order with what is before and after them."""
        if self.stream is None:
            yield
            return
        others = torch.cuda.current_stream(self.place)
        self.stream.wait_stream(others)
        with torch.cuda.stream(self.stream):
            yield
        others.wait_stream(self.stream)

    def mean_loss(self, batch: Batch) -> float:
        """Return the mean loss over the scored tokens of a batch, without a step."""
        losses: list[float] = []
        while not oom.enough(lambda: losses.append(self._mean_loss(batch))):
            self._halve()
        return losses[0]

    def _mean_loss(self, batch: Batch) -> float:
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
            forget()
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

    def _prepare(self) -> nn.Module:
        """Return the loss, compiled on a GPU; on a CPU compiling a small model takes longer than it saves."""
        loss = Loss(self.model, self.config.sparse, self.config.capacity)
        if self.place.type == "cuda":
            make_room(self.model.config, (self.rows, self.config.length, self.config.sparse, self.config.capacity))
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


def _part_of(cu_seqlens: Tensor | None, rows: slice, shape: torch.Size) -> Tensor | None:
    """Return the bounds of sequences within `rows` of a batch; every row starts a new sequence."""
    if cu_seqlens is None:
        return None
    start, end = rows.start * shape[1], min(rows.stop, shape[0]) * shape[1]
    inside = (cu_seqlens >= start) & (cu_seqlens <= end)
    part: Tensor = cu_seqlens.masked_select(inside) - start
    return part
