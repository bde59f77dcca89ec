"""Test which problems are timed, and what is kept; times need a GPU."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sbeval.bench import contenders, kernels, timing
from sbeval.bench.contenders import Contender
from sbeval.bench.problems import Problem
from sbeval.bench.rows import Row
from sbeval.errors import InputError

DENSE = Problem(step="forward", batch=2, queries=100, keys=100, heads=4, kv_heads=4, head_dim=64)


def test_a_benchmark_needs_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="benchmarks need a GPU; this device is cpu"):
        kernels.kernel([DENSE], torch.device("cpu"), "float32", tmp_path, print)
    assert not list(tmp_path.iterdir())


def test_a_problem_that_does_not_fit_is_timed_at_half_its_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Our own kernels too: one row of the widest is left out, and the others are timed."""

    def time(contender: Contender, device: torch.device, dtype: torch.dtype, problem: Problem) -> Iterator[Row]:
        yield kernels._row(problem, "relative_error", "1", 0.0)
        if problem.batch > 2 or problem.keys > 100:
            raise torch.OutOfMemoryError
        yield kernels._row(problem, "time", "ms", 1.0)

    kept: list[tuple[Problem, list[str]]] = []
    monkeypatch.setattr(kernels, "_time", time)
    monkeypatch.setattr(timing, "needs_gpu", lambda _: None)
    monkeypatch.setattr(
        kernels, "keep", lambda *given: kept.append((given[-1], [row.metric for row in given[3] if row.batch == 2]))
    )
    ours_and_a_peer = [one for one in contenders.CONTENDERS if one.backend in ("triton", "flash")]
    monkeypatch.setattr(contenders, "CONTENDERS", ours_and_a_peer)
    found = [replace(DENSE, batch=8), replace(DENSE, queries=200, keys=200, batch=2)]
    lines: list[str] = []
    assert kernels.kernel(found, torch.device("cpu"), "float32", tmp_path, lines.append).row_count == 2
    assert kept == [(replace(DENSE, batch=2), ["relative_error", "time"])] * 2
    assert lines[:2] == [
        f"forward 8x100 4x64: out of memory at {n} at a time: continuing with {n // 2}" for n in (8, 4)
    ]
    assert [line.partition(" (first at")[0] for line in lines[-2:]] == [
        f"not measured: {name}, out of memory at 1: nothing smaller is left to try"
        for name in ("stick_breaking by triton", "softmax by flash")
    ]
