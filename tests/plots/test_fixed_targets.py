from typing import Any

import numpy as np
import pandas as pd
import pytest

from sbeval.errors import InputError
from sbeval.plots import fixed_targets

COMMON: dict[str, Any] = {
    "task": "language",
    "model": "small",
    "options": "",
    "train_len": 256,
    "eval_len": 1024,
    "seed": 0,
    "corpus": "books",
    "tokenizer": "bytes",
    "preset": "quick",
    "train_tokens": 10**6,
    "dtype": "float32",
    "stderr": 0.1,
    "n": 4,
    "metric": "loss_fixed_targets",
    "targets": 128,
}


def rows(attention: str, losses: dict[int, float], **changes: Any) -> list[dict[str, Any]]:
    return [
        COMMON | {"attention": attention, "context_length": length, "value": loss} | changes
        for length, loss in losses.items()
    ]


ROPE, STICKS = rows("rope", {128: 2.0, 256: 1.9, 512: 3.5}), rows("stick_breaking", {128: 2.1, 256: 2.0, 512: 1.95})


def test_lines_are_losses_by_context() -> None:
    # losses of other tokens at the same context lengths are left out
    others = rows("rope", {128: 7.0}, metric="loss_last_k", targets=pd.NA)
    (axis,) = fixed_targets.draw(pd.DataFrame([*ROPE, *STICKS, *others])).axes
    lines = {str(line.get_label()): line for line in axis.get_lines()}
    np.testing.assert_allclose(np.asarray(lines["stick-breaking"].get_xdata()), [128, 256, 512])
    np.testing.assert_allclose(np.asarray(lines["stick-breaking"].get_ydata()), [2.1, 2.0, 1.95])
    np.testing.assert_allclose(np.asarray(lines["RoPE"].get_ydata()), [2.0, 1.9, 3.5])
    # a nat above the best last value, so that a method that diverges flattens no other
    assert axis.get_ylim()[1] == pytest.approx(2.95)


def test_the_page_says_how_many_tokens() -> None:
    assert "the last 128 tokens of long windows" in fixed_targets.chart(pd.DataFrame([*ROPE, *STICKS])).sentence


def test_a_table_without_fixed_targets() -> None:
    table = pd.DataFrame(rows("rope", {128: 7.0}, metric="loss_last_k"))
    assert not fixed_targets.has_rows(table) and fixed_targets.has_rows(pd.DataFrame(ROPE))
    with pytest.raises(InputError, match="no rows with metric 'loss_fixed_targets' to draw: --fixed-targets"):
        fixed_targets.draw(table)
