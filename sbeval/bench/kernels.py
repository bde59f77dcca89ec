"""Benchmark of attention kernels, each beside its peers in the same run.

Stick-breaking's Triton kernels, other installed stick-breaking kernels, and softmax through SDPA's backends and
FlexAttention. Every contender is first compared with the float64 reference on a short problem of the same heads, then
timed. FLOPs are those of causal attention, 4 B H D T S / 2 forward and 3.5 times that with backward, skipped tiles
included.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from rich.table import Table

from sbeval.bench import contenders, timing
from sbeval.bench.contenders import OURS, Contender
from sbeval.bench.problems import Problem
from sbeval.bench.rows import Row, keep
from sbeval.errors import InputError
from sbeval.runtime import device as devices
from sbeval.runtime import oom

SHOWN = {"time": ".3f", "throughput": ".0f", "bandwidth": ".0f", "peak_memory": ".0f", "relative_error": ".1e"}


def kernel(
    found: Sequence[Problem], device: torch.device, dtype: str, results_dir: Path, say: Callable[[str], None]
) -> Table:
    """Time every contender on every problem, write the rows to kernel.csv, and return a table for the terminal."""
    timing.needs_gpu(device)
    shown = Table(title=f"Attention kernels on {devices.describe(device)}, {dtype}")
    for name in ("step", "problem", "kernel", "ms", "TFLOP/s", "GB/s", "peak MB", "error"):
        shown.add_column(name, justify="right" if name not in ("step", "problem", "kernel") else "left")
    skipped: dict[str, str] = {}
    for contender in contenders.CONTENDERS:
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
                skipped.setdefault(f"{contender.attention} by {contender.backend}, {reason}", problem.title)
                continue
            keep(contender.attention, contender.backend, "kernel", rows, device, dtype, results_dir, measured)
            values = {row.metric: row.value for row in rows}
            shown.add_row(
                problem.step,
                measured.title,
                f"{contender.attention} {contender.backend}",
                *(f"{values[name]:{form}}" if name in values else "" for name, form in SHOWN.items()),
            )
    for reason, problem_title in skipped.items():
        say(f"not measured: {reason} (first at {problem_title})")
    return shown


def fitted(
    problem: Problem, time: Callable[[Problem], Iterator[Row]], say: Callable[[str], None]
) -> tuple[Problem, list[Row]]:
    """Time a problem, or where memory ends the same one at half its batch; return the problem that was timed."""

    def work(batch: int) -> list[Row]:
        return list(time(dataclasses.replace(problem, batch=batch)))

    batch, rows = oom.fitting(problem.batch, work, lambda line: say(f"{problem.step} {problem.title}: {line}"))
    return dataclasses.replace(problem, batch=batch), rows


def _time(contender: Contender, device: torch.device, dtype: torch.dtype, problem: Problem) -> Iterator[Row]:
    yield _row(problem, "relative_error", "1", contenders.error_of(contender, problem, device, dtype))
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
    times = timing.timed(step, decodes=problem.step == "decode")
    for name, ms in times.items():
        yield _row(problem, name, "ms", ms)
    yield _row(problem, "peak_memory", "MB", peak / 1e6)
    if problem.step == "decode":
        yield _row(problem, "bandwidth", "GB/s", problem.cache_bytes / times["time"] / 1e6)
    else:
        yield _row(problem, "throughput", "TFLOP/s", problem.flops / times["time"] / 1e9)


def _row(problem: Problem, metric: str, unit: str, value: float) -> Row:
    return Row(metric=metric, unit=unit, value=value, n=1, **problem.factors)
