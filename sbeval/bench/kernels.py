"""Benchmarks of attention kernels and of whole models, each beside its peers in the same run.

`kernel`: stick-breaking's Triton kernels, other installed stick-breaking kernels, and softmax through SDPA's backends
and FlexAttention. Every contender is first compared with the float64 reference on a short problem of the same heads,
then timed. FLOPs are those of causal attention, 4 B H D T S / 2 forward and 3.5 times that with
backward, skipped tiles included.

`sbeval.bench.models` benchmarks whole models, `sbeval.bench.skipping` kernels on the activations of a trained model.
"""

import dataclasses
import functools
import importlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from sbeval.config import LATER, digest_of
from sbeval.errors import InputError
from sbeval.kernels import softmax, stick_breaking
from sbeval.runtime import device as devices
from sbeval.runtime import oom
from sbeval.tables import provenance, store, table
from sbeval.tables.results import Results
from sbeval.tables.rows import Identity, Measurement
from sbeval.tables.store import Stored

Run = Callable[[Tensor, Tensor, Tensor], Tensor]
# half the distance from 1 to the next float32: the kernel's own default
EPSILON = 2.0**-24
# steps that are queued while the device waits: no more than its queue holds
QUEUED = 16
# cycles of a multiprocessor in a second, at most
CYCLES = 3e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Row(Measurement):
    """Factors: the problem. `queries` of `keys` positions; `sequences` packed into a row; `epsilon` of skipping;
    `logit_mean`, where inputs are not standard normal."""

    step: str  # forward, forward_backward, decode; train, evaluate
    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    sequences: int
    epsilon: float | None = None
    logit_mean: float | None = field(default=None, metadata=LATER)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Sizes of one kernel benchmark. `bounds`: cumulative lengths of packed sequences. `logit_mean`: of inputs drawn
    around it, at the default scale; standard normal ones when None."""

    step: str
    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    bounds: tuple[int, ...] = ()
    epsilon: float = 0.0
    logit_mean: float | None = field(default=None, metadata=LATER)

    @property
    def flops(self) -> float:
        lengths = [b - a for a, b in zip(self.bounds, self.bounds[1:], strict=False)]
        pairs = sum(n * n / 2 for n in lengths) if lengths else self.queries * (self.keys - self.queries / 2)
        return 4 * self.batch * self.heads * self.head_dim * pairs * (3.5 if self.step == "forward_backward" else 1)

    @property
    def factors(self) -> dict[str, Any]:
        """Columns of the problem in a row."""
        return {
            "step": self.step,
            "batch": self.batch,
            "queries": self.queries,
            "keys": self.keys,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "sequences": max(1, len(self.bounds) - 1),
            "epsilon": self.epsilon,
            "logit_mean": self.logit_mean,
        }

    @property
    def cache_bytes(self) -> float:
        """Bytes that decoding reads: keys and values in 16 bits."""
        return 4.0 * self.batch * self.keys * self.kv_heads * self.head_dim

    def draw(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        shapes = [(self.queries, self.heads), (self.keys, self.kv_heads), (self.keys, self.kv_heads)]
        q, k, v = (torch.randn(self.batch, n, heads, self.head_dim, device=device, dtype=dtype) for n, heads in shapes)
        if self.logit_mean is not None:
            # one coordinate of its own makes the mean
            q[..., 0], k[..., 0] = self.logit_mean * self.head_dim**0.5, 1.0
        return q, k, v


@dataclass(frozen=True, slots=True)
class Contender:
    """attention: what it computes; backend: whose kernel. `build` raises ImportError if it is not installed."""

    attention: str
    backend: str
    build: Callable[[Problem, torch.device], Run]


def _ours(backend: str | None = None) -> Callable[[Problem, torch.device], Run]:
    def build(problem: Problem, device: torch.device) -> Run:
        bounds = _bounds(problem, device)

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return stick_breaking.attention(q, k, v, cu_seqlens=bounds, epsilon=problem.epsilon, backend=backend)[0]

        return run

    return build


def _fla(problem: Problem, device: torch.device) -> Run:
    attend = importlib.import_module("fla.ops.stickbreaking_attn").parallel_stickbreaking_attn
    bounds = _bounds(problem, device)
    _plain(problem, "fla", packed=True)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = attend(q, k, v, scale=problem.head_dim**-0.5, cu_seqlens=bounds)[0]
        return out

    return run


def _authors(problem: Problem, device: torch.device) -> Run:
    attend = importlib.import_module("stickbreaking_attention.sb_attn").sb_attn
    _plain(problem, "the authors' package")

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out: Tensor = attend(q, k, v, inv_temp=problem.head_dim**-0.5)[0]
        return out.transpose(1, 2)

    return run


def sdpa(backend: SDPBackend) -> Callable[[Problem, torch.device], Run]:
    def build(problem: Problem, device: torch.device) -> Run:
        if problem.bounds or problem.queries not in (1, problem.keys):
            raise InputError("SDPA takes whole sequences")

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(
                    q, k, v, is_causal=q.shape[2] > 1, enable_gqa=q.shape[1] != k.shape[1]
                ).transpose(1, 2)

        return run

    return build


def _flex(problem: Problem, device: torch.device) -> Run:
    bounds = _bounds(problem, device)
    return lambda q, k, v: softmax.attention(q, k, v, cu_seqlens=bounds, backend="flex")


def _plain(problem: Problem, who: str, *, packed: bool = False) -> None:
    if problem.heads != problem.kv_heads or problem.queries != problem.keys or (problem.bounds and not packed):
        raise InputError(f"{who} takes whole sequences without grouped heads{'' if packed else ' or packing'}")


def _bounds(problem: Problem, device: torch.device) -> Tensor | None:
    return torch.tensor(problem.bounds, dtype=torch.int32, device=device) if problem.bounds else None


# whose failure ends the benchmark, but for what they say that they can't serve
OURS = ("triton", "triton-hopper")
CONTENDERS = (
    *(Contender("stick_breaking", backend, _ours(backend)) for backend in OURS),
    Contender("softmax", "flash", sdpa(SDPBackend.FLASH_ATTENTION)),
    Contender("softmax", "cudnn", sdpa(SDPBackend.CUDNN_ATTENTION)),
    Contender("softmax", "flex", _flex),
    Contender("stick_breaking", "fla", _fla),
    Contender("stick_breaking", "authors", _authors),
)


def problems(
    lengths: Sequence[int], head_dims: Sequence[int], heads: int, caches: Sequence[int] = (16384, 65536)
) -> list[Problem]:
    """Return dense problems at 16,384 tokens a batch or one sequence, with epsilon 0 and with the default where nothing
    can be skipped, since other code runs then; grouped heads; packed documents; a problem that skips; decoding."""
    found = []
    for dim in head_dims:
        for length in lengths:
            batch = max(1, 16384 // length)
            sizes: dict[str, Any] = {"batch": batch, "queries": length, "keys": length, "heads": heads, "head_dim": dim}
            for step in ("forward", "forward_backward"):
                found.append(Problem(step=step, kv_heads=heads, **sizes))
                # each key takes about one in `length` of the stick: the oldest still find some
                lasting = -math.log(length)
                found.append(Problem(step=step, kv_heads=heads, epsilon=EPSILON, logit_mean=lasting, **sizes))
        longest: dict[str, Any] = {
            "batch": 1,
            "queries": lengths[-1],
            "keys": lengths[-1],
            "heads": heads,
            "head_dim": dim,
        }
        for step in ("forward", "forward_backward"):
            found.append(Problem(step=step, kv_heads=max(1, heads // 4), **longest))
            found.append(Problem(step=step, kv_heads=heads, bounds=_documents(lengths[-1]), **longest))
            found.append(Problem(step=step, kv_heads=heads, epsilon=EPSILON, **longest))
        for batch in (1, 32):
            for keys in caches:
                cache: dict[str, Any] = {"batch": batch, "queries": 1, "keys": keys, "heads": heads, "head_dim": dim}
                found.append(Problem(step="decode", kv_heads=max(1, heads // 4), **cache))
    return found


def _documents(length: int) -> tuple[int, ...]:
    """Return bounds of documents that fill a row; lengths are log-normal, half of them between 500 and 4000 tokens."""
    generator = torch.Generator().manual_seed(0)
    bounds = [0]
    while bounds[-1] < length:
        drawn = math.exp(7.25 + 1.04 * float(torch.randn((), generator=generator)))
        bounds.append(min(length, bounds[-1] + max(1, round(drawn))))
    return tuple(bounds)


def kernel(
    found: Sequence[Problem], device: torch.device, dtype: str, results_dir: Path, say: Callable[[str], None]
) -> Table:
    """Time every contender on every problem, write the rows to kernel.csv, and return a table for the terminal."""
    needs_gpu(device)
    shown = Table(title=f"Attention kernels on {devices.describe(device)}, {dtype}")
    for name in ("step", "problem", "kernel", "ms", "TFLOP/s", "GB/s", "peak MB", "error"):
        shown.add_column(name, justify="right" if name not in ("step", "problem", "kernel") else "left")
    skipped: dict[str, str] = {}
    for contender in CONTENDERS:
        for problem in found:
            if problem.epsilon and contender.backend not in OURS:
                continue
            try:
                measured, rows = fitted(
                    problem, functools.partial(_time, contender, device, devices.DTYPES[dtype]), say
                )
            # a peer is third-party code: any error that it raises is printed, and the benchmark continues
            except Exception as error:
                if contender.backend in OURS and not isinstance(error, InputError | torch.OutOfMemoryError):
                    raise
                reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
                skipped.setdefault(f"{contender.attention} by {contender.backend}, {reason}", _title(problem))
                continue
            keep(contender.attention, contender.backend, "kernel", rows, device, dtype, results_dir, measured)
            values = {row.metric: row.value for row in rows}
            shown.add_row(
                problem.step,
                _title(measured),
                f"{contender.attention} {contender.backend}",
                *(f"{values[name]:{form}}" if name in values else "" for name, form in SHOWN.items()),
            )
    for reason, problem_title in skipped.items():
        say(f"not measured: {reason} (first at {problem_title})")
    return shown


SHOWN = {"time": ".3f", "throughput": ".0f", "bandwidth": ".0f", "peak_memory": ".0f", "relative_error": ".1e"}


def _title(problem: Problem) -> str:
    group = "" if problem.heads == problem.kv_heads else f"/{problem.kv_heads}"
    packed = f" in {len(problem.bounds) - 1} documents" if problem.bounds else ""
    skips = f" epsilon {problem.epsilon:.0e}" if problem.epsilon else ""
    skips += "" if problem.logit_mean is None else ", sticks that last"
    return f"{problem.batch}x{problem.keys} {problem.heads}{group}x{problem.head_dim}{packed}{skips}"


def needs_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise InputError(f"benchmarks need a GPU; this device is {device.type}")


def fitted(
    problem: Problem, time: Callable[[Problem], Iterator[Row]], say: Callable[[str], None]
) -> tuple[Problem, list[Row]]:
    """Time a problem, or where memory ends the same one at half its batch; return the problem that was timed."""

    def work(batch: int) -> list[Row]:
        return list(time(dataclasses.replace(problem, batch=batch)))

    batch, rows = oom.fitting(problem.batch, work, lambda line: say(f"{problem.step} {_title(problem)}: {line}"))
    return dataclasses.replace(problem, batch=batch), rows


def _time(contender: Contender, device: torch.device, dtype: torch.dtype, problem: Problem) -> Iterator[Row]:
    yield _row(problem, "relative_error", "1", _error(contender, problem, device, dtype))
    attend = contender.build(problem, device)
    inputs = problem.draw(device, dtype)
    step: Callable[[], object] = lambda: attend(*inputs)  # noqa: E731
    if problem.step == "forward_backward":
        for x in inputs:
            x.requires_grad_()
        dout = torch.randn_like(inputs[0])

        def both() -> object:
            return torch.autograd.grad(attend(*inputs), inputs, dout)

        step = both
    step()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    times = timed(step, decodes=problem.step == "decode")
    for name, ms in times.items():
        yield _row(problem, name, "ms", ms)
    yield _row(problem, "peak_memory", "MB", peak / 1e6)
    if problem.step == "decode":
        yield _row(problem, "bandwidth", "GB/s", problem.cache_bytes / times["time"] / 1e6)
    else:
        yield _row(problem, "throughput", "TFLOP/s", problem.flops / times["time"] / 1e9)


def timed(step: Callable[[], object], *, decodes: bool = False) -> dict[str, float]:
    """Return the median time that a step takes on the device in ms, `time`, and its quantiles, over a tenth of a second
    and at least ten steps, each with an empty L2 cache. How long Python takes to launch a step is left out for all
    contenders: the device waits while steps are queued for it, and decoding runs from a captured CUDA graph."""
    from triton.runtime import driver

    run = captured(step) if decodes else step
    cache = driver.active.get_empty_cache_for_benchmark()
    run()
    torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    launched = time.perf_counter() - began
    torch.cuda.synchronize()
    repeats = min(max(round(0.1 / (time.perf_counter() - began)), 10), 400)
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for i in range(0, repeats, QUEUED):
        torch.cuda._sleep(round(launched * QUEUED * CYCLES))
        for start, end in marks[i : i + QUEUED]:
            cache.zero_()
            start.record()
            run()
            end.record()
    torch.cuda.synchronize()
    times = torch.tensor([start.elapsed_time(end) for start, end in marks], dtype=torch.float64)
    low, middle, high = times.quantile(times.new_tensor([0.2, 0.5, 0.8])).tolist()
    return {"time": middle, "time_q20": low, "time_q80": high}


def captured(step: Callable[[], object]) -> Callable[[], object]:
    with torch.no_grad():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
    return graph.replay


def _error(contender: Contender, problem: Problem, device: torch.device, dtype: torch.dtype) -> float:
    """Return the relative error of the output against float64 on standard normal inputs of at most 2048 tokens."""
    length = min(2048, problem.keys)
    bounds = (0, length // 3, length) if problem.bounds else ()
    short = Problem(
        step="forward",
        batch=1,
        queries=min(length, problem.queries),
        keys=length,
        heads=problem.heads,
        kv_heads=problem.kv_heads,
        head_dim=problem.head_dim,
        bounds=bounds,
        epsilon=problem.epsilon,
        logit_mean=problem.logit_mean,
    )
    q, k, v = short.draw(device, dtype)
    packed = _bounds(short, device)
    with torch.no_grad():
        exact = [x.double() for x in (q, k, v)]
        if contender.attention == "softmax":
            wanted = softmax.reference(*exact, scale=short.head_dim**-0.5, cu_seqlens=packed)
        else:
            wanted = stick_breaking.reference(*exact, cu_seqlens=packed)[0]
        found = contender.build(short, device)(q, k, v).double()
    error = float((found - wanted).norm() / wanted.norm())
    if not error < 0.05:
        raise ArithmeticError(f"wrong by {error:.1e}")
    return error


def _row(problem: Problem, metric: str, unit: str, value: float) -> Row:
    return Row(metric=metric, unit=unit, value=value, n=1, **problem.factors)


def keep(
    attention: str,
    backend: str,
    family: str,
    rows: Sequence[Row],
    device: torch.device,
    dtype: str,
    results_dir: Path,
    config: object,
    *,
    model: str = "",
    params: int = 0,
) -> None:
    """Write the run file, then the rows."""
    step = rows[0].step
    method, _, options = attention.partition(":")
    cell = f"{family}-{step}-{method}-{backend}-{digest_of([attention, backend, dtype, model, config])}"
    origin = provenance.collect(
        cell=cell,
        preset="",
        corpus="",
        tokenizer="",
        train_tokens=0,
        dtype=dtype,
        device=str(device),
        device_name=devices.describe(device),
        backend=backend,
    )
    record = provenance.run_record(config=config, provenance=origin, status="finished")
    identity = Identity(
        family=family,
        task=step,
        model=model,
        attention=method,
        options=options,
        params=params,
        train_len=rows[0].queries,
        eval_len=rows[0].keys,
        seed=0,
    )
    results = Results(results_dir)
    store.keep(results, family, Stored(cell, record, table.frame(identity, rows, origin)))
    table.assemble(results.table(family))
