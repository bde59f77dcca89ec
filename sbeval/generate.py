"""Greedy generation with a cache of keys and values, for our models and those of transformers."""

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

    # whether prompts of one batch may differ in length
    ragged: bool

    def begin(self, prompts: Sequence[Tokens], room: int) -> tuple[Tensor, Any]:
        """Hidden states (B, width) of the last token of each prompt, and a cache with `room` for further tokens."""

    def extend(self, tokens: Tensor, cache: Any) -> Tensor:
        """Hidden states (B, 1, width) of one further token of each row, (B, 1) int64, which the cache takes in."""

    def logits(self, hidden: Tensor, /) -> Tensor:
        """Logits (..., vocabulary) of hidden states (..., width)."""


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
    """The likeliest continuation of each prompt, token by token, without the prompt: `new_tokens` of them.

    stop: is asked of what a row has so far; when it says yes the row ends there, the last token included. Results do
    not depend on `batch` or on what else is in it, but for rounding. A prompt must have a token. Memory is that of the
    keys and values of one batch; a model of transformers takes prompts of one length together.
    """
    if new_tokens < 0 or batch < 1:
        raise InputError(f"new_tokens must be at least 0 and batch at least 1; got {new_tokens} and {batch}")
    if not all(len(prompt) for prompt in prompts):
        raise InputError("a prompt has no tokens: there is nothing to continue")
    found: list[list[int]] = [[] for _ in prompts]
    for rows in _batches([len(prompt) for prompt in prompts], batch, model.ragged) if new_tokens else ():
        continued = _continue(model, [prompts[row] for row in rows], new_tokens, place, dtype, stop)
        for row, tokens in zip(rows, continued, strict=True):
            found[row] = tokens
    return found


def _batches(lengths: Sequence[int], batch: int, ragged: bool) -> Iterator[list[int]]:
    """Indices of prompts that are read together: alike in length, or equal."""
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    for _, group in groupby(order, key=lambda row: 0 if ragged else lengths[row]):
        rows = list(group)
        yield from (rows[start : start + batch] for start in range(0, len(rows), batch))


@torch.inference_mode()
def _continue(
    model: Generator, prompts: Sequence[Tokens], new_tokens: int, place: torch.device, dtype: str,
    stop: Callable[[Tokens], bool] | None,
) -> list[list[int]]:  # fmt: skip
    steps: list[Tensor] = []
    rows: list[list[int]] = [[] for _ in prompts]
    going = set(range(len(prompts)))
    with device.autocast(place, dtype):
        # the last token is not read
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
    # without `stop` the device is waited for once
    return rows if stop is not None else torch.stack(steps, 1).tolist()
