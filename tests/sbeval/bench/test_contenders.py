"""Test errors against the float64 reference."""

import pytest
import torch

from sbeval.bench import contenders
from sbeval.bench.contenders import Contender
from sbeval.bench.problems import Problem


def test_error_is_measured_against_the_reference() -> None:
    dense = Problem(step="forward", batch=2, queries=100, keys=100, heads=4, kv_heads=4, head_dim=64)
    contender = Contender("stick_breaking", "triton", contenders._ours())
    assert contenders.error_of(contender, dense, torch.device("cpu"), torch.float32) < 1e-5
    wrong = Contender("softmax", "triton", contenders._ours())
    with pytest.raises(ArithmeticError, match="wrong by"):
        contenders.error_of(wrong, dense, torch.device("cpu"), torch.float32)
