"""Test FLOP counts and errors of the benchmarks, which themselves need a GPU."""

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sbeval.bench import kernels
from sbeval.bench.kernels import Problem, Row
from sbeval.errors import InputError
from sbeval.kernels import stick_breaking

DENSE = Problem(step="forward", batch=2, queries=100, keys=100, heads=4, kv_heads=4, head_dim=64)


def test_flops_are_those_of_half_a_square() -> None:
    assert DENSE.flops == 4 * 2 * 4 * 64 * 100 * 100 / 2
    assert replace(DENSE, step="forward_backward").flops == 3.5 * DENSE.flops
    # two sequences of half the length hold half the pairs
    assert replace(DENSE, bounds=(0, 50, 100)).flops == DENSE.flops / 2
    # the last of 100 queries sees all the keys
    one = replace(DENSE, step="decode", queries=1)
    assert one.flops == 4 * 2 * 4 * 64 * (100 - 0.5)
    assert one.cache_bytes == 2 * 2 * 100 * 4 * 64 * 2


def test_problems_cover_what_is_measured() -> None:
    found = kernels.problems((1024, 16384), (64,), 12, caches=(4096,))
    assert {problem.step for problem in found} == {"forward", "forward_backward", "decode"}
    assert any(problem.kv_heads < problem.heads for problem in found)
    # whatever is timed with all keys visited is timed as training runs it
    dense = [problem for problem in found if problem.step != "decode" and not problem.bounds and not problem.epsilon]
    for problem in dense:
        if problem.heads == problem.kv_heads:
            lasting = -math.log(problem.keys)
            assert replace(problem, epsilon=2.0**-24, logit_mean=lasting) in found
    assert any(problem.epsilon > 0 and problem.logit_mean is None for problem in found)
    packed = [problem for problem in found if problem.bounds]
    assert packed and all(problem.bounds[-1] == 16384 and len(problem.bounds) > 2 for problem in packed)
    assert all(b > a for a, b in zip(packed[0].bounds, packed[0].bounds[1:], strict=False))


def test_sticks_that_last_leave_nothing_to_skip() -> None:
    problem = Problem(step="forward", batch=1, queries=1024, keys=1024, heads=2, kv_heads=2, head_dim=32)
    for mean, lasts in ((-math.log(1024), True), (None, False)):
        torch.manual_seed(0)
        q, k, v = replace(problem, logit_mean=mean).draw(torch.device("cpu"), torch.float32)
        _, rest = stick_breaking.attention(q, k, v, epsilon=0.0)
        assert (float(rest[:, -1].amin()) > kernels.EPSILON) == lasts


def test_a_benchmark_needs_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="benchmarks need a GPU; this device is cpu"):
        kernels.kernel([DENSE], torch.device("cpu"), "float32", tmp_path, print)
    assert not list(tmp_path.iterdir())


def test_a_problem_that_does_not_fit_is_timed_at_half_its_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Our own kernels too: one row of the widest is left out, and the others are timed."""

    def time(contender: kernels.Contender, device: torch.device, dtype: torch.dtype, problem: Problem) -> Iterator[Row]:
        yield kernels._row(problem, "relative_error", "1", 0.0)
        if problem.batch > 2 or problem.keys > 100:
            raise torch.OutOfMemoryError
        yield kernels._row(problem, "time", "ms", 1.0)

    kept: list[tuple[Problem, list[str]]] = []
    monkeypatch.setattr(kernels, "_time", time)
    monkeypatch.setattr(kernels, "needs_gpu", lambda _: None)
    monkeypatch.setattr(
        kernels, "keep", lambda *given: kept.append((given[-1], [row.metric for row in given[3] if row.batch == 2]))
    )
    ours_and_a_peer = [one for one in kernels.CONTENDERS if one.backend in ("triton", "flash")]
    monkeypatch.setattr(kernels, "CONTENDERS", ours_and_a_peer)
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


def test_error_is_measured_against_the_reference() -> None:
    contender = kernels.Contender("stick_breaking", "triton", kernels._ours())
    assert kernels._error(contender, DENSE, torch.device("cpu"), torch.float32) < 1e-5
    wrong = kernels.Contender("softmax", "triton", kernels._ours())
    with pytest.raises(ArithmeticError, match="wrong by"):
        kernels._error(wrong, DENSE, torch.device("cpu"), torch.float32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_only_the_device_is_timed() -> None:
    """A step that Python takes five milliseconds to launch, and the device one or two to do."""

    def step() -> None:
        time.sleep(0.005)
        torch.cuda._sleep(2_500_000)

    found = kernels.timed(step)
    assert 0.8 < found["time_q20"] <= found["time"] <= found["time_q80"] < 4
