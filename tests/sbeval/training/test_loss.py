"""Which compiled code is kept; what a loss computes is in test_trainer."""

import pytest
import torch

from sbeval.models.config import named
from sbeval.training.loss import make_room


def test_compiled_code_is_kept_for_one_model_and_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    resets: list[int] = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    monkeypatch.setattr("sbeval.training.loss._compiled", set())
    rope, nope = (named("quick", vocab_size=257, attention=name) for name in ("rope", "nope"))
    steps = (
        (rope, 1, 0),
        (rope, 1, 0),
        (rope, 2, 0),
        (rope, 3, 0),
        (rope, 2, 0),
        (rope, 4, 1),
        (rope, 1, 1),
        (nope, 1, 2),
        (rope, 1, 3),
    )
    with torch._dynamo.config.patch(recompile_limit=3):
        for model, variant, known in steps:
            make_room(model, variant)
            assert len(resets) == known, (model.attention, variant)
