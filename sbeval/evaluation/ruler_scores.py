"""Scores of a model on prompts of RULER's tasks: of its completion, and of the reference answer by teacher forcing.

The completions of small models score near zero, so the reference is also evaluated after the prompt:

    log_probability   of the tokens of the reference answer, in nats, summed
    greedy            1 where each of them is the likeliest, so that greedy decoding would produce the reference
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sbeval.data.tokenizer import Tokenizer
from sbeval.evaluation import perplexity
from sbeval.evaluation.perplexity import Predictor
from sbeval.evaluation.response_cache import Answers, key
from sbeval.evaluation.ruler_prompts import Prompt
from sbeval.generate import Generator, generate
from sbeval.runtime import oom
from sbeval.runtime.progress import Bar, Silent

CONTROL = re.compile(r"[\x00-\x1f]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """The result of one sample. tokens: length of the prompt; completion: its text."""

    index: int
    depth: float | None
    tokens: int
    score: float
    log_probability: float
    greedy: bool
    completion: str


def score(completion: str, references: Sequence[str], rule: str) -> float:
    """Return RULER's score of a completion: the fraction of references in it (`all`), or 1 if any is in it (`part`).

    Control characters become line ends first, and case is ignored.
    """
    text = CONTROL.sub("\n", completion.strip()).strip().lower()
    matches = [reference.lower() in text for reference in references]
    return float(any(matches)) if rule == "part" else sum(matches) / len(matches)


def teacher_forced(
    model: Predictor, prompts: Sequence[Prompt], device: torch.device, dtype: str, batch: int
) -> list[tuple[float, bool]]:
    """Return the log-probability of each reference answer, and whether all its tokens are the likeliest."""
    results: list[tuple[float, bool]] = []
    for start in range(0, len(prompts), batch):
        chunk = prompts[start : start + batch]
        # the last token is a target only
        rows = [np.concatenate([prompt.tokens, prompt.answer[:-1]]).tolist() for prompt in chunk]
        answers = [(index, prompt.answer.tolist()) for index, prompt in enumerate(chunk)]
        results += perplexity.endings(model, rows, answers, place=device, dtype=dtype)
    return results


def evaluate(
    model: Any,
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    answers: Answers,
    *,
    rule: str,
    new_tokens: int,
    device: torch.device,
    dtype: str,
    batch: int,
    begin: Callable[[int, int], Bar] = Silent,
) -> list[Answered]:
    """Evaluate the prompts without a stored answer, `batch` at a time, and return the results of all.

    model: a `Predictor` that is a `Generator` too. A completion ends at the token that ends a document. batch is halved
    when out of memory. begin: makes a progress bar for a number of prompts and the number of those that have an answer.
    """
    kind = f"generate {new_tokens} until token {tokenizer.eos}, and score the last "
    keys = [key(f"{kind}{len(item.answer)}", np.concatenate([item.tokens, item.answer]).tolist()) for item in prompts]
    known = answers.find(set(keys))
    todo = {one: prompt for one, prompt in zip(keys, prompts, strict=True) if one not in known}
    bar = begin(len(prompts), sum(one in known for one in keys))
    counts = Counter(keys)

    def answer(some: Sequence[bytes]) -> None:
        chosen = [todo[one] for one in some]
        likely = teacher_forced(model, chosen, device, dtype, len(chosen))
        tokens = completions(model, chosen, tokenizer.eos, new_tokens, device, dtype, len(chosen))
        new = {one: [*scored, completion] for one, scored, completion in zip(some, likely, tokens, strict=True)}
        answers.keep(new)
        known.update(new)
        bar.advance(sum(counts[one] for one in some))

    oom.in_parts(list(todo), batch, answer, bar.say)
    bar.close()
    return [
        _answered(index, prompt, known[one], tokenizer, rule)
        for index, (one, prompt) in enumerate(zip(keys, prompts, strict=True))
    ]


def _answered(index: int, prompt: Prompt, answer: Any, tokenizer: Tokenizer, rule: str) -> Answered:
    log_probability, greedy, tokens = answer
    completion = tokenizer.decode(np.array(tokens))
    return Answered(
        index=index,
        depth=prompt.depth,
        tokens=len(prompt.tokens),
        score=score(completion, prompt.references, rule),
        log_probability=log_probability,
        greedy=greedy,
        completion=completion,
    )


def completions(
    model: Generator,
    prompts: Sequence[Prompt],
    eos: int,
    new_tokens: int,
    device: torch.device,
    dtype: str,
    batch: int,
) -> list[list[int]]:
    """Return the tokens of the greedy completion of each prompt, up to `eos` and with it."""
    texts = [prompt.tokens.tolist() for prompt in prompts]
    return generate(model, texts, new_tokens, device, dtype=dtype, batch=batch, stop=lambda tokens: tokens[-1] == eos)
