"""Test FLOP counts, and what is measured."""

import math
from dataclasses import replace

import torch

from sbeval.bench import problems
from sbeval.bench.problems import Problem
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
    found = problems.problems((1024, 16384), (64,), 12, caches=(4096,))
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
        assert (float(rest[:, -1].amin()) > problems.EPSILON) == lasts
