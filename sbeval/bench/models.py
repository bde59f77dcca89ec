"""Speed of whole models: optimizer steps and evaluation passes of the named sizes, stick-breaking beside RoPE.

Softmax runs by each of the kernels that could be the fastest, which the row's backend names. Blocks are compiled for
both steps, so that a rotation is fused with what stands around it. Each is built and run several times, all of a
problem in random order, and a row is the mean.
"""

import dataclasses
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from rich.table import Table
from torch import Tensor

from sbeval import registry
from sbeval.bench import timing
from sbeval.bench.rows import Row, keep
from sbeval.errors import InputError, choose, reason
from sbeval.kernels import nope, rope, stick_breaking
from sbeval.models.config import SIZES, ModelConfig, flops_per_token, named, parse_attention
from sbeval.models.decoder import IGNORE, Decoder, n_parameters
from sbeval.runtime import device as devices
from sbeval.runtime import oom
from sbeval.runtime.progress import Progress, Task
from sbeval.training.config import TrainConfig
from sbeval.training.trainer import Trainer

VOCABULARY = 50304
# kernels of softmax without a bias, in 16 bits
SOFTMAX = ("cudnn", "flash")


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Sizes of one benchmark: a batch of sequences of `length` tokens; width / head_dim heads."""

    size: str
    head_dim: int
    length: int
    batch: int
    steps: int = 40

    def shape(self, attention: str) -> ModelConfig:
        width = SIZES[choose("model size", self.size, SIZES)]["width"]
        if width % self.head_dim:
            raise InputError(f"heads of {self.head_dim} do not divide the width of {self.size}, {width}")
        shape = named(self.size, vocab_size=VOCABULARY, attention=attention)
        return dataclasses.replace(shape, heads=width // self.head_dim)


class Peer(NamedTuple):
    """A method as it runs. softmax: which of SOFTMAX, None for what has a kernel of its own."""

    attention: str
    softmax: str | None

    def backend(self, device: torch.device) -> str:
        return self.softmax or registry.method(parse_attention(self.attention)[0]).backend_name(device.type)


class Speeds(NamedTuple):
    """Tokens per second of one run. evaluated: sequences of an evaluation pass, fewer than the batch if memory ends."""

    train: float
    evaluate: float
    mfu: float | None
    evaluated: int


@dataclass(frozen=True, slots=True)
class _Drawn:
    """One batch of random tokens, whatever the step."""

    tokens: Tensor
    targets: Tensor
    cu_seqlens: None = None

    def __getitem__(self, step: int) -> "_Drawn":
        return self


def problems(sizes: Sequence[str], head_dims: Sequence[int], *, length: int, batch: int) -> list[Problem]:
    return [Problem(size=size, head_dim=dim, length=length, batch=batch) for size in sizes for dim in head_dims]


def peers(attentions: Sequence[str]) -> list[Peer]:
    """Each method, those of plain softmax once for each kernel."""
    return [
        Peer(attention, kernel)
        for attention in attentions
        for kernel in (SOFTMAX if parse_attention(attention)[0] in ("nope", "rope") else (None,))
    ]


def measure(
    found: Sequence[Problem],
    contenders: Sequence[Peer],
    repeats: int,
    device: torch.device,
    dtype: str,
    results_dir: Path,
) -> Table:
    """Time all peers on every problem, keep the rows in model.csv, and return a table for the terminal."""
    timing.needs_gpu(device)
    shapes = {(problem, peer): problem.shape(peer.attention) for problem in found for peer in contenders}
    shown = Table(title=f"Models on {devices.describe(device)}, {dtype}, {repeats} runs each")
    for name in ("size", "heads of", "length", "attention", "train tokens/s", "utilisation", "evaluate tokens/s"):
        shown.add_column(name, justify="left" if name in ("size", "attention") else "right")
    for problem in found:
        runs: dict[Peer, list[Speeds]] = {peer: [] for peer in contenders}
        for peer in ordered(contenders, repeats):
            with Progress() as progress:
                name = f"{problem.size} {' '.join(filter(None, peer))}"
                task = progress.add(f"train {name}", total=problem.steps)
                try:
                    runs[peer].append(_run(problem, peer, shapes[problem, peer], device, dtype, task))
                # others may fit
                except torch.OutOfMemoryError as error:
                    task.say(f"not measured: {name}, {reason(error)}")
                task.close()
        for peer, speeds in runs.items():
            if not speeds:
                continue
            shape = shapes[problem, peer]
            backend = kernel_of(peer, problem, shape, device, dtype)
            rows = summary(problem, shape, speeds)
            keep(
                peer.attention,
                backend,
                "model",
                rows,
                device,
                dtype,
                results_dir,
                problem,
                model=problem.size,
                params=n_parameters(shape),
            )
            values = {(row.step, row.metric): row.value for row in rows}
            shown.add_row(
                problem.size,
                f"{problem.head_dim}",
                f"{problem.batch}x{problem.length}",
                f"{peer.attention} {backend}",
                f"{values['train', 'throughput']:,.0f}",
                f"{values.get(('train', 'mfu'), math.nan):.3f}",
                f"{values['evaluate', 'throughput']:,.0f}",
            )
    return shown


def kernel_of(peer: Peer, problem: Problem, shape: ModelConfig, device: torch.device, dtype: str) -> str:
    """Name the kernel that attention runs by; that of stick-breaking depends on the inputs."""
    if parse_attention(peer.attention)[0] != "stick_breaking":
        return peer.backend(device)
    sizes = problem.batch, problem.length, shape.heads, shape.d_head
    q = torch.empty(sizes, dtype=devices.DTYPES[dtype], device=device)
    return stick_breaking.pick_backend(q, q, None)


def ordered(contenders: Sequence[Peer], repeats: int) -> list[Peer]:
    """Return every peer that many times, in a fixed order that favours none."""
    runs = [peer for _ in range(repeats) for peer in contenders]
    random.Random(0).shuffle(runs)
    return runs


def _run(problem: Problem, peer: Peer, shape: ModelConfig, device: torch.device, dtype: str, task: Task) -> Speeds:
    from triton.testing import do_bench

    # what was compiled for another peer's kernel is of no use
    torch.compiler.reset()
    tokens = torch.randint(0, shape.vocab_size, (problem.batch, problem.length), device=device)
    targets = tokens.roll(-1, 1)
    targets[:, -1] = IGNORE
    config = TrainConfig(steps=problem.steps, batch=problem.batch, length=problem.length, lr=1e-4, dtype=dtype)
    # a CPU takes minutes to draw a billion weights, and which they are does not matter here
    with device:
        trainer = Trainer(shape, config, _Drawn(tokens, targets), None, device)
    choose_kernel(trainer.model, peer.softmax)
    trained = trainer.run(task)
    assert trained.tokens_per_second is not None
    decoder: Decoder = trained.model
    # there is no dropout: training mode only means that compiled blocks run
    decoder.train().compile_blocks()

    def evaluate(rows: int) -> float:
        times: list[float] = do_bench(lambda: decoder(tokens[:rows]), warmup=20, rep=100, return_mode="all")
        return statistics.median(times)

    with torch.no_grad(), devices.autocast(device, dtype):
        rows, ms = oom.fitting(problem.batch, evaluate, task.say)
    return Speeds(trained.tokens_per_second, rows * problem.length / ms * 1e3, trained.mfu, rows)


def choose_kernel(model: Decoder, softmax: str | None) -> None:
    """Let plain softmax of every layer run by this kernel."""
    for module in model.modules():
        if isinstance(module, nope.Mixer | rope.Mixer):
            module.backend = softmax


def summary(problem: Problem, shape: ModelConfig, speeds: Sequence[Speeds]) -> list[Row]:
    """Means over the runs of one peer, with standard errors where there are several."""

    def row(step: str, metric: str, unit: str, values: Sequence[float], scale: float = 1.0) -> Row:
        n = len(values)
        batch = problem.batch if step == "train" else min(run.evaluated for run in speeds)
        return Row(
            metric=metric,
            unit=unit,
            value=statistics.fmean(values) * scale,
            stderr=statistics.stdev(values) * scale / math.sqrt(n) if n > 1 else None,
            n=n,
            step=step,
            batch=batch,
            queries=problem.length,
            keys=problem.length,
            heads=shape.heads,
            kv_heads=shape.n_kv_heads,
            head_dim=shape.d_head,
            sequences=1,
        )

    train, evaluate = [run.train for run in speeds], [run.evaluate for run in speeds]
    rows = [row("train", "throughput", "tokens/s", train)]
    if utilised := [run.mfu for run in speeds if run.mfu is not None]:
        rows.append(row("train", "mfu", "1", utilised))
    flops = flops_per_token(shape, problem.length) - 2 * shape.width * shape.vocab_size
    return [
        *rows,
        row("evaluate", "throughput", "tokens/s", evaluate),
        row("evaluate", "flops", "FLOP/s", evaluate, flops),
    ]
