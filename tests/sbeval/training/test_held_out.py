"""Held-out text costs little and is looked at often enough; rows that fill a batch count for nothing."""

import pytest
import torch

from sbeval.models.decoder import IGNORE
from sbeval.tasks import length_gen
from sbeval.training import held_out
from sbeval.training.held_out import Rows


@pytest.mark.parametrize(
    ("tokens", "length"),
    [(config.train_tokens, config.train_len) for config in length_gen.PRESETS.values()]
    + [(50 * 4096, 512), (10**7, 2048)],
)
def test_looks_are_many_and_cost_less_than_three_hundredths(tokens: int, length: int) -> None:
    looks, windows = held_out.plan(tokens, length)
    assert 20 <= looks <= 50 and 1 <= windows and windows * length <= 1 << 16
    # a forward pass is a third of a training step
    assert looks * windows * length / 3 < 0.03 * tokens


def test_a_model_of_gpu_size_looks_at_all_that_it_may() -> None:
    assert held_out.plan(800 * 131072, 2048) == (25, 32)


@pytest.mark.parametrize(("tokens", "length"), [(1, 8), (96, 8), (1 << 20, 1 << 17)])
def test_short_training_has_a_look_at_least(tokens: int, length: int) -> None:
    looks, windows = held_out.plan(tokens, length)
    assert looks >= 1 and windows == 1


@pytest.mark.parametrize("packed", [False, True])
def test_rows_are_filled_up_with_nothing_to_score(packed: bool) -> None:
    tokens = torch.arange(12).view(3, 4)
    bounds = torch.tensor([0, 2, 4, 8, 12], dtype=torch.int32) if packed else None
    found = Rows(tokens, tokens + 1, bounds).filled(4)
    assert found.tokens.shape == (4, 4) and torch.equal(found.tokens[:3], tokens)
    assert torch.equal(found.targets[:3], tokens + 1) and (found.targets[3] == IGNORE).all()
    assert found.cu_seqlens is None or found.cu_seqlens.tolist() == [0, 2, 4, 8, 12, 16]
    assert found.cu_seqlens is None or found.cu_seqlens.dtype == torch.int32
    same = Rows(tokens, tokens + 1, bounds).filled(3)
    assert torch.equal(same.tokens, tokens) and torch.equal(same.targets, tokens + 1)
