"""Learning rates by step."""

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest

from sbeval.training.config import TrainConfig
from sbeval.training.schedule import learning_rate


def schedule(name: str, **changes: Any) -> Callable[[float], float]:
    fields: dict[str, Any] = {"steps": 100, "batch": 128, "length": 4096, "lr": 0.5, "warmup": 10, "schedule": name}
    return functools.partial(learning_rate, TrainConfig(**(fields | changes)))


@pytest.mark.parametrize("name", ["cosine", "power", "constant", "wsd"])
def test_warm_up_rises_evenly_to_the_peak(name: str) -> None:
    rate = schedule(name)
    assert [rate(step) for step in range(10)] == pytest.approx([0.05 * (step + 1) for step in range(10)])
    assert schedule(name, warmup=0, power_a=1e9)(0) == 0.5


def test_cosine() -> None:
    rate = schedule("cosine", final_lr=0.2)
    assert rate(10) == 0.5
    assert rate(55) == pytest.approx(0.5 * 0.6)
    assert rate(32) == pytest.approx(0.5 * (0.2 + 0.8 * (1 + math.cos(math.pi * 22 / 90)) / 2))
    assert rate(100) == pytest.approx(0.1)
    rates = [rate(step) for step in range(10, 101)]
    assert rates == sorted(rates, reverse=True)


def test_a_rate_of_epochs_is_that_of_their_beginning() -> None:
    # epochs of 2.5 steps
    smooth, rate = schedule("cosine", warmup=0), schedule("cosine", warmup=0, epoch_rows=320)
    assert [rate(step) for step in range(6)] == [smooth(start) for start in (0, 0, 0, 2.5, 2.5, 5)]
    later = schedule("cosine", epoch_rows=320 * 8)
    assert [later(step) for step in (8, 9, 10, 19)] == pytest.approx([0.45, 0.5, 0.5, 0.5])
    assert later(20) == schedule("cosine")(20) < 0.5


def test_constant() -> None:
    assert {schedule("constant")(step) for step in range(9, 100)} == {0.5}


def test_constant_then_linear_to_zero() -> None:
    rate = schedule("wsd", decay=0.25)
    assert {rate(step) for step in range(9, 76)} == {0.5}
    assert [rate(step) for step in range(75, 101)] == pytest.approx(
        [0.5 * (100 - step) / 25 for step in range(75, 101)]
    )
    # trainings of other lengths share what is before their decay
    longer = schedule("wsd", steps=200, decay=0.25)
    assert [longer(step) for step in range(75)] == [rate(step) for step in range(75)]
    steps = range(1, 200)
    trunks = [
        TrainConfig(steps=count, batch=4, length=8, lr=0.01, warmup=3, schedule="wsd", decay=1 / 6).trunk_steps
        for count in steps
    ]
    assert trunks == [count - round(count / 6) for count in steps]


def test_power() -> None:
    # 1000 steps are 524,288,000 tokens: 128 x 4 x 524288000^-0.51
    rate = schedule("power", steps=10000)
    assert rate(999) == pytest.approx(0.01829318, rel=1e-5)
    assert rate(3999) / rate(999) == pytest.approx(4**-0.51)
    assert schedule("power", steps=10000, lr=0.01)(999) == 0.01
    # the last tenth falls by the same factor at each step, from where the power law stands
    assert rate(9000) == pytest.approx(128 * 4 * (9001 * 128 * 4096) ** -0.51)
    assert rate(9500) == pytest.approx(rate(9000) * math.sqrt(0.1))
    assert rate(10000) == pytest.approx(rate(9000) * 0.1)
    assert schedule("power", steps=10000, final_lr=0.5, decay=0.4)(8000) == pytest.approx(rate(6000) * 0.5**0.5)
