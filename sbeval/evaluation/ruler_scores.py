"""Scores of a model on prompts of RULER's tasks: of its completion, and of the reference answer by teacher forcing.

The completions of small models score near zero, so the reference is also evaluated after the prompt:

    log_probability   of the tokens of the reference answer, in nats, summed
    greedy            1 where each of them is the likeliest, so that greedy decoding would produce the reference
"""

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sbeval.data.tokenizer import Tokenizer
from sbeval.errors import InputError
from sbeval.evaluation import perplexity
from sbeval.evaluation.perplexity import Predictor
from sbeval.evaluation.ruler_prompts import Prompt
from sbeval.generate import Generator, generate
from sbeval.runtime import oom
from sbeval.runtime.files import storing

CONTROL = re.compile(r"[\x00-\x1f]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """The result of one sample. tokens: length of the prompt; said: the completion."""

    index: int
    depth: float | None
    tokens: int
    score: float
    log_probability: float
    greedy: bool
    said: str


def score(said: str, references: Sequence[str], rule: str) -> float:
    """Return RULER's score of a completion: the fraction of references in it (`all`), or 1 if any is in it (`part`).

    Control characters become line ends first, and case is ignored.
    """
    text = CONTROL.sub("\n", said.strip()).strip().lower()
    matches = [reference.lower() in text for reference in references]
    return float(any(matches)) if rule == "part" else sum(matches) / len(matches)


def teacher_forced(
    model: Predictor, prompts: Sequence[Prompt], place: torch.device, dtype: str, batch: int
) -> list[tuple[float, bool]]:
    """Return the log-probability of each reference answer, and whether all its tokens are the likeliest."""
    results: list[tuple[float, bool]] = []
    for start in range(0, len(prompts), batch):
        chunk = prompts[start : start + batch]
        # the last token is a target only
        rows = [np.concatenate([prompt.tokens, prompt.answer[:-1]]).tolist() for prompt in chunk]
        answers = [(index, prompt.answer.tolist()) for index, prompt in enumerate(chunk)]
        results += perplexity.endings(model, rows, answers, place=place, dtype=dtype)
    return results


class Samples:
    """The results of one model on the prompts of one task and length, in a JSON Lines file that is written at once: a
    killed run resumes after them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[int, Answered] = {}
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        # a killed writer leaves an incomplete last line
        whole = lines[:-1]
        for number, line in enumerate(whole, 1):
            try:
                item = Answered(**json.loads(line))
            except (ValueError, TypeError) as error:
                raise InputError(f"{path}:{number}: {error}; remove that line") from None
            self.found[item.index] = item
        if lines and lines[-1]:
            path.write_bytes(b"".join(line + b"\n" for line in whole))

    def add(self, answers: Sequence[Answered]) -> None:
        with storing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        with storing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(dataclasses.asdict(item)) + "\n" for item in answers))
        self.found.update((item.index, item) for item in answers)


def ask(
    model: Any,
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    samples: Samples,
    *,
    rule: str,
    new_tokens: int,
    place: torch.device,
    dtype: str,
    batch: int,
    advance: Callable[[int], None] = lambda done: None,
    notify: Callable[[str], None] = print,
) -> list[Answered]:
    """Evaluate the prompts without a result, `batch` at a time, and return the results of all.

    model: a `Predictor` that is a `Generator` too. A completion ends at the token that ends a document. batch is halved
    when out of memory, which `notify` reports.
    """

    def answer(indices: Sequence[int]) -> None:
        chosen = [prompts[index] for index in indices]
        likely = teacher_forced(model, chosen, place, dtype, len(chosen))
        said = say(model, chosen, tokenizer, new_tokens, place, dtype, len(chosen))
        samples.add(
            [
                Answered(
                    index=index,
                    depth=prompt.depth,
                    tokens=len(prompt.tokens),
                    score=score(text, prompt.references, rule),
                    log_probability=log_probability,
                    greedy=greedy,
                    said=text,
                )
                for index, prompt, text, (log_probability, greedy) in zip(indices, chosen, said, likely, strict=True)
            ]
        )
        advance(len(indices))

    oom.in_parts([index for index in range(len(prompts)) if index not in samples.found], batch, answer, notify)
    return [samples.found[index] for index in range(len(prompts))]


def say(
    model: Generator,
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    new_tokens: int,
    place: torch.device,
    dtype: str,
    batch: int,
) -> list[str]:
    """Return the greedy completion of each prompt."""
    completions = generate(
        model,
        [prompt.tokens.tolist() for prompt in prompts],
        new_tokens,
        place,
        dtype=dtype,
        batch=batch,
        stop=lambda tokens: tokens[-1] == tokenizer.eos,
    )
    return [tokenizer.decode(np.array(tokens)) for tokens in completions]
