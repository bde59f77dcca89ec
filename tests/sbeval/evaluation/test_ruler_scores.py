"""Log-probabilities are those of each prompt alone, and what is likeliest is what is said."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sbeval.data.tokenizer import Bytes
from sbeval.evaluation.ruler_prompts import Prompt
from sbeval.evaluation.ruler_scores import say, teacher_forced
from sbeval.models.config import ModelConfig
from sbeval.models.decoder import Decoder

CPU = torch.device("cpu")


def prompt(tokens: bytes, answer: bytes) -> Prompt:
    ids = [np.frombuffer(text, dtype=np.uint8).astype(np.uint16) for text in (tokens, answer)]
    return Prompt(tokens=ids[0], answer=ids[1], references=(answer.decode(),), depth=None)


PROMPTS = [prompt(b"a key is here: ", b"1234"), prompt(b"one", b"a longer answer"), prompt(b"x" * 40, b"y")]


@pytest.mark.parametrize("attention", ["stick_breaking", "rope", "alibi", "forgetting"])
def test_log_probabilities_are_those_of_each_row_alone(attention: str) -> None:
    torch.manual_seed(0)
    decoder = Decoder(ModelConfig(vocab_size=257, attention=attention, width=16, layers=2, heads=2, hidden=32))
    found = teacher_forced(decoder, PROMPTS, CPU, "float32", batch=3)
    for item, (log_probability, greedy) in zip(PROMPTS, found, strict=True):
        text = torch.from_numpy(np.concatenate([item.tokens, item.answer]).astype(np.int64))
        with torch.inference_mode():
            logits = decoder.logits(decoder(text[None, :-1]))[0, -len(item.answer) :].double()
        wanted = logits.log_softmax(-1)[range(len(item.answer)), text[-len(item.answer) :]].sum()
        assert log_probability == pytest.approx(float(wanted), rel=1e-5) and not greedy


class Oracle:
    """Knows what follows each prompt: a hidden state is the next token, 0 where there is none."""

    ragged = True
    by_length = False

    def __init__(self) -> None:
        self.texts = [[*item.tokens.tolist(), *item.answer.tolist(), Bytes().eos] for item in PROMPTS]

    def _next(self, tokens: list[int]) -> int:
        longer = [text for text in self.texts if text[: len(tokens)] == tokens and len(text) > len(tokens)]
        return longer[0][len(tokens)] if longer else 0

    def __call__(self, tokens: Tensor) -> Tensor:
        rows = [[self._next(row[: end + 1]) for end in range(len(row))] for row in tokens.tolist()]
        return torch.tensor(rows)[..., None]

    def logits(self, hidden: Tensor) -> Tensor:
        return F.one_hot(hidden[..., 0], 257).float() * 100

    def begin(self, prompts: Any, room: int) -> tuple[Tensor, list[list[int]]]:
        cache = [list(row) for row in prompts]
        return torch.tensor([[self._next(row)] for row in cache]), cache

    def extend(self, tokens: Tensor, cache: list[list[int]]) -> Tensor:
        for row, (token,) in zip(cache, tokens.tolist(), strict=True):
            row.append(token)
        return torch.tensor([[[self._next(row)]] for row in cache])


def test_a_model_that_knows_says_the_answer() -> None:
    found = teacher_forced(Oracle(), PROMPTS, CPU, "float32", batch=2)
    assert all(greedy and abs(log_probability) < 1e-6 for log_probability, greedy in found)
    said = say(Oracle(), PROMPTS, Bytes(), 32, CPU, "float32", 2)
    assert said == ["1234", "a longer answer", "y"]


def test_one_wrong_token_is_not_greedy() -> None:
    oracle = Oracle()
    oracle.texts[0][-2] = ord("5")
    ((log_probability, greedy),) = teacher_forced(oracle, PROMPTS[:1], CPU, "float32", batch=1)
    assert log_probability == pytest.approx(-100, rel=1e-3) and not greedy
    assert say(oracle, PROMPTS[:1], Bytes(), 32, CPU, "float32", 1) == ["1235"]
