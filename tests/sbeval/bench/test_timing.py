"""Test that the device alone is timed, which needs a GPU."""

import time

import pytest
import torch

from sbeval.bench import timing


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_only_the_device_is_timed() -> None:
    """A step that Python takes five milliseconds to launch, and the device one or two to do."""

    def step() -> None:
        time.sleep(0.005)
        torch.cuda._sleep(2_500_000)

    found = timing.timed(step)
    assert 0.8 < found["time_q20"] <= found["time"] <= found["time_q80"] < 4
