"""Claims on speed are decided by made-up tables as their rules say."""

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import pytest

from sbeval.report import speed
from sbeval.report.judge import AGREES, DISAGREES, FASTER, SLOWER, UNDECIDED, Evidence

Tables = Callable[..., pd.DataFrame]
STICK, ROPE = "stick_breaking", "rope"
NONE = Evidence({})


@pytest.mark.parametrize(
    ("stick", "more", "verdict", "reason"),
    [
        (80.0, {}, AGREES, ""),
        (70.0, {}, DISAGREES, ""),
        # of a model that has hardly trained, what it skips is not enough
        (90.0, {"dense": 70.0}, DISAGREES, ""),
        (90.0, {"dense": None}, UNDECIDED, "with nothing skipped it was not measured (stick_breaking:epsilon=0)"),
        (70.0, {"dense": None}, DISAGREES, ""),
        (80.0, {"stderr": 3.0}, UNDECIDED, "includes both"),
        (80.0, {"params": 10**8}, UNDECIDED, "models of 100 M parameters, the paper's have 1 B"),
        (80.0, {"n": 1}, UNDECIDED, "1 run each, fewer than 3"),
        (80.0, {"fast": "sdpa"}, UNDECIDED, "RoPE ran through sdpa, and the claim is about FlashAttention-2"),
    ],
)
def test_training_speed(stick: float, more: dict[str, Any], verdict: str, reason: str, frame: Tables) -> None:
    # the faster of two kernels counts
    fast, dense = more.pop("fast", "flash"), more.pop("dense", stick)
    rows = [{"attention": STICK, "options": "", "backend": "triton", "value": stick}]
    rows += [{"attention": STICK, "options": "epsilon=0", "backend": "triton", "value": dense}] if dense else []
    rows += [
        {"attention": ROPE, "options": "", "backend": name, "value": value}
        for name, value in ((fast, 100.0), ("flex", 50.0))
    ]
    # a method that the claim is not about, and of which there is one run
    rows += [{"attention": "alibi", "options": "", "backend": "flex", "value": 60.0, "n": 1}]
    same = {"metric": "throughput", "step": "train", "queries": 4096, "batch": 4, "head_dim": 64, "n": 5, "stderr": 0.1}
    found = speed.training_speed(frame(rows, **same | more), NONE)
    assert found.verdict == verdict and reason in found.reason and f"{stick:.0f} " in found.found
    assert f"RoPE through {fast}; " in found.basis and "through" not in found.found
    assert (f", with nothing skipped {dense:.0f} " in found.found) if dense else ("nothing skipped" not in found.found)


def times(frame: Tables, ours: Sequence[float], **common: Any) -> pd.DataFrame:
    """Times at heads of 64 and 128, where FlashAttention-2 takes 10 ms; a tenth more and less at the quantiles."""
    rows = []
    for dim, ms in zip((64, 128), ours, strict=True):
        for metric, scale in (("time", 1.0), ("time_q20", 0.9), ("time_q80", 1.1)):
            at = {"metric": metric, "head_dim": dim}
            rows.append(at | {"attention": STICK, "backend": "triton", "value": ms * scale})
            rows.append(at | {"attention": "softmax", "backend": "flash", "value": 10.0 * scale})
    sizes = {"batch": 1, "queries": 16384, "keys": 16384, "heads": 12, "kv_heads": 12, "sequences": 1, "epsilon": 0.0}
    return frame(rows, **sizes | {"step": "forward"} | common)


@pytest.mark.parametrize(
    ("ours", "verdict", "reason"),
    [
        ((20, 30), SLOWER, ""),
        ((5, 6), FASTER, ""),
        ((5, 20), UNDECIDED, "it depends on the head size or the device"),
        ((10, 10), UNDECIDED, "include both"),
    ],
)
def test_kernels(ours: Sequence[float], verdict: str, reason: str, frame: Tables) -> None:
    short = times(frame, (100.0, 100.0), queries=1024, keys=1024)
    found = speed.kernel_speed("forward", pd.concat([short, times(frame, ours)]), NONE)
    assert found.verdict == verdict and reason in found.reason and "16384 tokens" in found.basis
    assert f"{10 / ours[0]:.2f} [" in found.found
    # what is the same of all ratios is said once
    assert found.basis == "16384 tokens, a card; intervals from 20 to 80 % of timings."


def test_a_kernel_is_compared_on_the_same_device(frame: Tables) -> None:
    other = times(frame, (1.0, 1.0), device="a faster card").query("backend == 'triton'")
    found = speed.kernel_speed("forward", pd.concat([times(frame, (20.0, 30.0)), other]), NONE)
    assert found.verdict == SLOWER and "faster" not in found.found
    both = pd.concat([times(frame, (20.0, 30.0)), times(frame, (5.0, 5.0), device="a faster card")])
    found = speed.kernel_speed("forward", both, NONE)
    assert found.verdict == UNDECIDED and "0.50 [0.41, 0.61] with heads of 64 on a card, 0.33 [" in found.found
