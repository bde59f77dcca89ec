"""Greedy generation with a key-value cache, for our models and those of transformers."""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor

from sbeval.errors import InputError
from sbeval.runtime import device

Tokens = Sequence[int]


class Generator(Protocol):
    """A model that reads prompts and then takes one token of each at a time."""

    # prompts of one batch may differ in length
    ragged: bool

    def begin(self, prompts: Sequence[Tokens], room: int) -> tuple[Tensor, Any]:
        """Return hidden states (B, width) of the prompts' last tokens, and a cache with `room` for further tokens."""

    def extend(self, tokens: Tensor, cache: Any) -> Tensor:
        """Add one token of each row, (B, 1) int64, to the cache; return their hidden states (B, 1, width)."""

    def logits(self, hidden: Tensor, /) -> Tensor:
        """Return logits (..., vocabulary) of hidden states (..., width)."""


def generate(
    model: Generator,
    prompts: Sequence[Tokens],
    new_tokens: int,
    place: torch.device,
    *,
    dtype: str = "float32",
    stop: Callable[[Tokens], bool] | None = None,
    batch: int = 8,
) -> list[list[int]]:
    """Return `new_tokens` greedily decoded tokens of each prompt, without the prompt.

    stop: called with the tokens of a row so far; when true the row ends, its last token included. Results do not depend
    on `batch`, the prompts decoded together, but for rounding. A prompt must have a token. Memory holds the keys and
    values of one batch; a model of transformers batches prompts of equal length.
    """
    if new_tokens < 0 or batch < 1:
        raise InputError(f"new_tokens must be at least 0 and batch at least 1; got {new_tokens} and {batch}")
    if not all(len(prompt) for prompt in prompts):
        raise InputError("a prompt has no tokens: give at least one")
    completions: list[list[int]] = [[] for _ in prompts]
    for rows in _batches([len(prompt) for prompt in prompts], batch, model.ragged) if new_tokens else ():
        decoded = _continue(model, [prompts[row] for row in rows], new_tokens, place, dtype, stop)
        for row, tokens in zip(rows, decoded, strict=True):
            completions[row] = tokens
    return completions


def _batches(lengths: Sequence[int], batch: int, ragged: bool) -> Iterator[list[int]]:
    """Yield indices of prompts to decode together: of similar length, or equal if not ragged."""
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    for _, group in groupby(order, key=lambda row: 0 if ragged else lengths[row]):
        rows = list(group)
        yield from (rows[start : start + batch] for start in range(0, len(rows), batch))


@torch.inference_mode()
def _continue(
    model: Generator,
    prompts: Sequence[Tokens],
    new_tokens: int,
    place: torch.device,
    dtype: str,
    stop: Callable[[Tokens], bool] | None,
) -> list[list[int]]:
    steps: list[Tensor] = []
    rows: list[list[int]] = [[] for _ in prompts]
    going = set(range(len(prompts)))
    with device.autocast(place, dtype):
        # the last new token is not fed back
        hidden, cache = model.begin(prompts, new_tokens - 1)
        while True:
            steps.append(model.logits(hidden).float().argmax(-1))
            if stop is not None:
                for row, token in enumerate(steps[-1].tolist()):
                    if row in going:
                        rows[row].append(token)
                        if stop(rows[row]):
                            going.remove(row)
            if len(steps) == new_tokens or not going:
                break
            hidden = model.extend(steps[-1][:, None], cache)[:, 0]
    # without `stop` wait for the device once
    return rows if stop is not None else torch.stack(steps, 1).tolist()
