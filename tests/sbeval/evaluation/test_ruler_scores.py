"""Log-probabilities are those of each prompt alone; the likeliest tokens are the completion."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sbeval.data.tokenizer import Bytes
from sbeval.evaluation.response_cache import Answers
from sbeval.evaluation.ruler_prompts import Prompt
from sbeval.evaluation.ruler_scores import completions, evaluate, score, teacher_forced
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
    tokens = completions(Oracle(), PROMPTS, Bytes().eos, 32, CPU, "float32", 2)
    assert [Bytes().decode(np.array(row)) for row in tokens] == ["1234", "a longer answer", "y"]


class Display:
    """A progress bar that counts."""

    def __init__(self, total: int, completed: int) -> None:
        self.total, self.completed = total, completed
        shown.append(self)

    def advance(self, steps: int, /) -> None:
        self.completed += steps

    def say(self, line: str) -> None: ...

    def close(self) -> None:
        assert self.completed == self.total


shown: list[Display] = []


def test_stored_answers_are_not_evaluated_again() -> None:
    answers = Answers()
    how: Any = {"rule": "all", "device": CPU, "dtype": "float32", "batch": 2, "begin": Display}
    shown.clear()
    first = evaluate(Oracle(), PROMPTS[:2], Bytes(), answers, new_tokens=32, **how)
    assert [(item.index, item.score, item.greedy, item.completion) for item in first] == [
        (0, 1.0, True, "1234"),
        (1, 1.0, True, "a longer answer"),
    ]
    # the new prompt alone is run, whatever its number, and one that is there twice is run once
    oracle = Oracle()
    oracle.texts = oracle.texts[2:]
    again = evaluate(oracle, [PROMPTS[2], *PROMPTS, PROMPTS[2]], Bytes(), answers, new_tokens=32, **how)
    assert [item.completion for item in again] == ["y", "1234", "a longer answer", "y", "y"]
    assert [item.index for item in again] == [0, 1, 2, 3, 4] and all(item.score == 1 for item in again)
    assert [bar.total for bar in shown] == [2, 5]
    # another number of new tokens is another request
    (short,) = evaluate(Oracle(), PROMPTS[1:2], Bytes(), answers, new_tokens=3, **how)
    assert short.completion == "a l" and short.score == 0


def test_an_answer_is_scored_by_the_references_of_its_prompt() -> None:
    answers = Answers()
    how: Any = {"new_tokens": 32, "device": CPU, "dtype": "float32", "batch": 2}
    evaluate(Oracle(), PROMPTS[:1], Bytes(), answers, rule="all", **how)
    other = dataclasses.replace(PROMPTS[0], references=("1234", "99"))
    for rule, wanted in (("all", 0.5), ("part", 1.0)):
        (found,) = evaluate(Oracle(), [other], Bytes(), answers, rule=rule, **how)
        assert found.score == wanted


def test_one_wrong_token_is_not_greedy() -> None:
    oracle = Oracle()
    oracle.texts[0][-2] = ord("5")
    ((log_probability, greedy),) = teacher_forced(oracle, PROMPTS[:1], CPU, "float32", batch=1)
    assert log_probability == pytest.approx(-100, rel=1e-3) and not greedy
    assert bytes(completions(oracle, PROMPTS[:1], Bytes().eos, 32, CPU, "float32", 1)[0][:-1]) == b"1235"


def test_scores_are_rulers() -> None:
    assert score("It is A or\x07b", ("a", "B", "c", "d"), "all") == 0.5
    assert score("it is b", ("a", "B", "c"), "part") == 1 and score("", ("a",), "part") == 0
    assert score("8231406, 12", ("8231406",), "all") == 1 and score("823140", ("8231406",), "all") == 0
