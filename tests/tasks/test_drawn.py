"""Batches by step are those drawn one by one, and predictions are of scored positions alone."""

import dataclasses

import torch
from torch import Tensor

from sbeval.config import IGNORE
from sbeval.models.config import ModelConfig
from sbeval.models.decoder import Decoder
from sbeval.tasks import drawn


@dataclasses.dataclass
class Examples:
    tokens: Tensor
    targets: Tensor

    @property
    def cu_seqlens(self) -> None:
        """Examples are not packed."""


def generate(rows: Tensor) -> Examples:
    tokens = (rows[:, None] * 7 + torch.arange(6)) % 11
    return Examples(tokens, tokens.where(tokens % 2 == 0, IGNORE))


def test_a_batch_is_that_of_its_rows_whatever_was_drawn_before() -> None:
    calls: list[int] = []

    def counted(rows: Tensor) -> Examples:
        calls.append(len(rows))
        return generate(rows)

    # steps have different sizes
    def rows(step: int) -> Tensor:
        return torch.arange(step, step + 1 + step % 3)

    batches = drawn.Drawn(rows, counted)
    for step in (3, 4, 2 * drawn.AHEAD + 1, 3, 0):
        assert torch.equal(batches[step].tokens, generate(rows(step)).tokens)
        assert torch.equal(batches[step].targets, generate(rows(step)).targets)
    # steps next to each other are drawn together
    assert len(calls) == 3


def test_predictions_are_right_where_the_label_is_likeliest_and_false_elsewhere() -> None:
    torch.manual_seed(0)
    decoder = Decoder(ModelConfig(vocab_size=11, width=16, layers=1, heads=1, hidden=16))
    examples = generate(torch.arange(2 * drawn.EVAL_ROWS + 3))
    likeliest = decoder.logits(decoder(examples.tokens)).argmax(-1)
    scored = examples.targets != IGNORE
    wanted = Examples(examples.tokens, likeliest.where(scored, IGNORE))
    assert torch.equal(drawn.predict(decoder, wanted, "float32"), scored)
    correct = drawn.predict(decoder, examples, "float32")
    assert torch.equal(correct, (likeliest == examples.targets) & scored) and not correct.all()
    assert decoder.training
