"""Settings of a training: invalid ones are errors; tokens are those of all steps."""

import math
from typing import Any

import pytest

from sbeval.errors import InputError
from sbeval.training.config import TrainConfig

# looks at the loss after 4, 8, ... steps, and asks whether to stop after 8 and 16
RUN: dict[str, Any] = {
    "steps": 18,
    "batch": 4,
    "length": 8,
    "lr": 0.01,
    "warmup": 3,
    "log_every": 4,
    "check_every": 8,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "cosin"}, "unknown schedule 'cosin'; did you mean 'cosine'"),
        *(({name: 0}, f"{name} must be above 0 and finite; got 0") for name in ("steps", "batch", "length", "lr")),
        ({"log_every": 0}, "log_every must be above 0 and finite; got 0"),
        ({"lr": math.nan}, "lr must be above 0 and finite; got nan"),
        ({"lr": math.inf}, "lr must be above 0 and finite; got inf"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0 and finite; got -1"),
        ({"batch": 2**36}, "a step must have at most 16777216 sequences of 8; got 68719476736"),
        ({"micro_batch": 5}, r"micro_batch must be 1 to 4 \(the batch\); got 5"),
        ({"micro_batch": 0}, r"micro_batch must be 1 to 4 \(the batch\); got 0"),
        ({"dtype": "bf16"}, "unknown dtype 'bf16'; did you mean 'bfloat16'"),
        *(({name: -1}, f"{name} must be at least 0 and finite; got -1") for name in ("clip", "warmup", "epoch_rows")),
        ({"beta_2": 1.0}, "beta_2 must be at least 0 and below 1; got 1"),
    ],
)
def test_configs_that_will_not_do(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainConfig(**(RUN | changes))


def test_tokens() -> None:
    assert TrainConfig(**RUN).tokens == 18 * 4 * 8
