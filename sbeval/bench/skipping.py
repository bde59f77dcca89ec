"""Benchmark block skipping on the queries, keys and values of every layer of a trained model.

A stick-breaking kernel that stops when the remaining mass is below epsilon is timed beside itself without skipping
and beside softmax through SDPA, whose time does not depend on its inputs. `forward` is a whole sequence,
`forward_backward` the same with the gradients of queries, keys and values; `decode` is one query against a cache that
ends before it: the last of the text, or of 32 rows the last 32.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend

from sbeval.bench import timing
from sbeval.bench.contenders import sdpa
from sbeval.bench.problems import EPSILON, Problem
from sbeval.bench.rows import Row as ProblemRow
from sbeval.bench.rows import keep
from sbeval.data.corpus import Split
from sbeval.errors import InputError, reason
from sbeval.kernels import stick_breaking
from sbeval.models.decoder import Decoder
from sbeval.pretrained import load
from sbeval.runtime import device as devices
from sbeval.runtime import oom

DECODED = (1, 32)
# number of queries whose reach is measured, at the end of a sequence
SAMPLE = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Row(ProblemRow):
    """Factors: the problem, and the layer (from 0) and head of its inputs; head is None for all heads."""

    layer: int
    head: int | None = None


class Captured(NamedTuple):
    """Inputs of one layer: q (1, T, H, D), k and v (1, T, G, D), and the logit options of its mixer."""

    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]


@torch.no_grad()
def capture(model: Decoder, tokens: Tensor, dtype: str) -> list[Captured]:
    """Return the inputs of every attention layer for tokens (1, T)."""
    layers: list[Captured] = []

    def collect(mixer: Any, inputs: tuple[Any, ...]) -> None:
        q, k, v = (x.detach() for x in inputs[:3])
        options = {"scale": mixer.scale, "bias": mixer.logit_bias, "attend_current": mixer.options.attend_current}
        layers.append(Captured(q, k, v, options))

    mixers = [module for module in model.modules() if isinstance(module, stick_breaking.Mixer)]
    hooks = [mixer.register_forward_pre_hook(collect) for mixer in mixers]
    try:
        with devices.autocast(tokens.device, dtype):
            model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return layers


@torch.no_grad()
def reach(captured: Captured, epsilon: float, sample: int = SAMPLE) -> Tensor:
    """Return the number of keys (H,) that a query reads until its mass is below epsilon, a mean of the last queries."""
    q, k, _, options = captured
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    length, count = k.shape[1], min(sample, q.shape[1])
    z = torch.einsum("bthd,bshd->hts", q[:, -count:].float(), k.float()) * options["scale"]
    if options["bias"] is not None:
        z = z + options["bias"][:, None, None]
    i, j = torch.arange(length - count, length, device=q.device)[:, None], torch.arange(length, device=q.device)
    allowed = j <= i if options["attend_current"] else j < i
    rest = F.logsigmoid(-z).masked_fill(~allowed, 0).flip(-1).cumsum(-1).flip(-1)
    # remaining mass before key j (keys are read nearest first) is what keys after j left over
    before = F.pad(rest[..., 1:], (0, 1)).exp()
    return ((before >= epsilon) & allowed).sum(-1).float().mean(-1)


def measure(
    checkpoint: str, text: Split, lengths: Sequence[int], device: torch.device, dtype: str, results_dir: Path
) -> Table:
    """Time every layer at every length, write the rows to skipping.csv, and return a table for the terminal.

    Raise InputError if the model is not a stick-breaking model, or no document is long enough.
    """
    timing.needs_gpu(device)
    loaded = load.load(checkpoint, device, dtype)
    if not isinstance(loaded.model, Decoder) or loaded.attention != "stick_breaking":
        raise InputError(
            f"only stick-breaking skips blocks; {checkpoint} attends with {loaded.attention or 'something else'}"
        )
    grid = Table(
        title=f"{loaded.params / 1e6:.0f} M parameters on {devices.describe(device)}, {dtype}: ms in all layers"
    )
    for name in ("step", "tokens", *(_name(contender) for contender in CONTENDERS), "reach"):
        grid.add_column(name, justify="left" if name == "step" else "right")
    for length in lengths:
        document, start = text.windows(length)[0]
        tokens = text.document(document)[start : start + length].astype(np.int64)
        layers = capture(loaded.model, torch.from_numpy(tokens)[None].to(device), dtype)
        reached = torch.stack([reach(layer, EPSILON) for layer in layers])
        for step, batch in (("forward", 1), ("forward_backward", 1), *(("decode", rows) for rows in DECODED)):
            total = []
            try:
                rows_at_a_time, found = _fitted(step, batch, layers, reached)
            # others may fit
            except torch.OutOfMemoryError as error:
                print(f"not measured: {step} of {length} tokens, {reason(error)}")
                continue
            for contender, rows in zip(CONTENDERS, found, strict=True):
                problem = _problem(contender, step, rows_at_a_time, layers[0])
                keep(
                    contender.attention,
                    _backend(contender, step, layers[0]),
                    "skipping",
                    rows,
                    device,
                    dtype,
                    results_dir,
                    problem,
                    model=loaded.name,
                    params=loaded.params,
                )
                total.append(sum(row.value for row in rows if row.metric == "time"))
            grid.add_row(
                f"{step} x {rows_at_a_time}", f"{length}", *(f"{ms:.3f}" for ms in total), f"{reached.mean():.0f}"
            )
    return grid


class Contender(NamedTuple):
    """A kernel to time. backend: empty for stick-breaking, which runs by the fastest of its own; softmax: the SDPA
    backend, None for stick-breaking."""

    attention: str
    backend: str
    epsilon: float
    softmax: SDPBackend | None


CONTENDERS = (
    Contender("stick_breaking", "", 0.0, None),
    Contender("stick_breaking", "", EPSILON, None),
    Contender("softmax", "flash", 0.0, SDPBackend.FLASH_ATTENTION),
    Contender("softmax", "cudnn", 0.0, SDPBackend.CUDNN_ATTENTION),
)


def _name(contender: Contender) -> str:
    return "skipping" if contender.epsilon else f"{contender.attention} {contender.backend}".rstrip()


def _backend(contender: Contender, step: str, layer: Captured) -> str:
    """Return what runs: of ours the fastest for these inputs."""
    return contender.backend or stick_breaking.pick_backend(layer.q, layer.k, None, step == "decode")


def _problem(contender: Contender, step: str, batch: int, layer: Captured) -> Problem:
    return Problem(
        step=step,
        batch=batch,
        queries=1 if step == "decode" else layer.q.shape[1],
        keys=layer.k.shape[1],
        heads=layer.q.shape[2],
        kv_heads=layer.k.shape[2],
        head_dim=layer.q.shape[3],
        epsilon=contender.epsilon,
    )


def _fitted(step: str, batch: int, layers: Sequence[Captured], reached: Tensor) -> tuple[int, list[list[Row]]]:
    """Return the rows of each contender, all at the same batch, which is halved when out of memory, and the batch."""

    def work(batch: int) -> list[list[Row]]:
        return [_measured(contender, step, batch, layers, reached) for contender in CONTENDERS]

    return oom.fitting(batch, work, lambda line: print(f"{step} of {layers[0].k.shape[1]} tokens: {line}"))


@torch.no_grad()
def _measured(contender: Contender, step: str, batch: int, layers: Sequence[Captured], reached: Tensor) -> list[Row]:
    """Return the times of each layer; with skipping also its error in the output or, with backward, in the gradients,
    and the reach of each head."""
    rows: list[Row] = []
    for index, layer in enumerate(layers):
        problem = _problem(contender, step, batch, layer)
        row = functools.partial(_row, problem, index)
        run = _run(contender, problem, layer)
        rows += [row(name, "ms", ms) for name, ms in timing.timed(run, decodes=step == "decode").items()]
        if contender.epsilon:
            dense = _run(contender._replace(epsilon=0.0), problem, layer)()
            wrong = max(float((x - y).norm() / y.norm()) for x, y in zip(run(), dense, strict=True))
            rows.append(row("relative_error", "1", wrong))
        if contender.epsilon and step == "forward":
            rows += [row("reach", "tokens", keys, head=head) for head, keys in enumerate(reached[index].tolist())]
    return rows


def _run(contender: Contender, problem: Problem, layer: Captured) -> Callable[[], tuple[Tensor, ...]]:
    """Return the call to time: attention on the inputs of a layer; decoding takes the last queries, one per row.

    The call returns the output or, with backward, the gradients of q, k and v for a gradient that is drawn once.
    """
    q, k, v, options = layer
    lengths = None
    if problem.step == "decode":
        q = q[0, -problem.batch :, None].contiguous()
        k, v = (x.expand(problem.batch, -1, -1, -1).contiguous() for x in (k, v))
        last = torch.arange(problem.keys - problem.batch, problem.keys, device=q.device, dtype=torch.int32)
        lengths = last + 1

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return stick_breaking.attention(q, k, v, lengths=lengths, epsilon=contender.epsilon, **options)[0]

    attend = ours if contender.softmax is None else sdpa(contender.softmax)(problem, q.device)
    if problem.step != "forward_backward":
        return lambda: (attend(q, k, v),)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    dout = torch.randn(q.shape, generator=torch.Generator(q.device).manual_seed(0), device=q.device, dtype=q.dtype)

    def both() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            return torch.autograd.grad(attend(*leaves), leaves, dout)

    return both


def _row(problem: Problem, layer: int, metric: str, unit: str, value: float, *, head: int | None = None) -> Row:
    return Row(metric=metric, unit=unit, value=value, n=1, layer=layer, head=head, **problem.factors)
