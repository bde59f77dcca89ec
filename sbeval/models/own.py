"""What makes the numbers of an attention method that is not of this package none of a language model, found on random
tokens before anything is trained: each is an InputError. Nothing in a table would show it.
"""

import dataclasses
import functools

import torch
from torch import Tensor

from sbeval import registry
from sbeval.errors import InputError, reason
from sbeval.models.config import ModelConfig
from sbeval.models.decoder import Attention
from sbeval.models.kv_cache import Cache
from sbeval.runtime import device

# tokens of a row, whole blocks of most kernels; where copies of it are changed: some at all tokens from one on, beside
# bounds of blocks too, and the first and the last nowhere
LENGTH = 256
CUTS = (LENGTH, 1, 2, 6, 16, 31, 63, 64, 100, 128, 200, 255, LENGTH)
# lengths of packed sequences, and of prompts, with the number of tokens that follow these
PACKED = (6, 70, 1, 30)
PROMPTS, FURTHER = (5, 2), 3
# change of an output, relative to its size, that is no rounding; one token and a whole row are computed in other ways
LEAK, OTHER_WAY, LEAK_OF_HALF = 1e-3, 1e-2, 5e-2


def check(config: ModelConfig, place: torch.device, dtype: str) -> str | None:
    """Raise InputError where an own method of attention in a model of this shape sees later tokens or, in packed rows,
    other sequences, or where it gives other outputs with a cache.

    It may raise for packed rows or a cache: what needs these will say so. Return a line where it raises an error of its
    sizes for a plain row, since rows of another length may do; None for a method that is all right, or of this package.
    """
    name = config.attention.partition(":")[0]
    if registry.ours(registry.ATTENTION.get(name, name)):
        return None
    # what else the shape has does not take part
    return _check(dataclasses.replace(config, vocab_size=1, layers=1, hidden=1), place, dtype)


@functools.cache
def _check(config: ModelConfig, place: torch.device, dtype: str) -> str | None:
    what, half = f"attention {config.attention!r}", dtype != "float32"
    gpus = [place] if place.type == "cuda" else []
    with torch.random.fork_rng(gpus), torch.no_grad(), device.autocast(place, dtype):
        torch.manual_seed(0)
        attention = Attention(config).to(place).eval()
        for weight in attention.mixer.parameters():
            # at 0, where some begin, it would hide what it adds
            weight.add_(0.1 * torch.randn_like(weight))
        x = torch.randn(1, LENGTH, config.width, device=place)
        try:
            _check_rows(attention, x, what, LEAK_OF_HALF if half else LEAK)
        except (RuntimeError, ArithmeticError, MemoryError) as error:
            raised = f"{type(error).__name__}: {reason(error)}"
            return f"{what} is not checked for later tokens: random rows of {LENGTH} tokens raise {raised}"
        for further, tolerance in ((_check_packed, LEAK), (_check_cache, OTHER_WAY)):
            try:
                further(attention, x, what, LEAK_OF_HALF if half else tolerance)
            except InputError:
                raise
            # of any kind: the method takes none
            except Exception:
                continue
    return None


def _check_rows(attention: Attention, x: Tensor, what: str, tolerance: float) -> None:
    rows, changed = (x.repeat(len(CUTS), 1, 1) for _ in range(2))
    for row, cut in zip(changed, CUTS, strict=True):
        row[cut:] = 3 * torch.randn_like(row[cut:])
    differs = _differs(_mixed(attention, rows), _mixed(attention, changed), tolerance)
    if differs[[0, -1]].any():
        raise InputError(f"{what}: the output of a row changes with other rows of its batch")
    for row, cut in zip(differs, CUTS, strict=True):
        if row[:cut].any():
            raise InputError(f"{what}: {_leak(row, cut)}, so it is not causal")


def _check_packed(attention: Attention, x: Tensor, what: str, tolerance: float) -> None:
    bounds = torch.tensor([0, *PACKED], device=x.device).cumsum(0).int()
    x = x[:, : sum(PACKED)]
    before = _mixed(attention, x, bounds)
    for length, end in zip(PACKED, bounds[1:].tolist(), strict=True):
        changed, start, cut = x.clone(), end - length, length // 2
        changed[:, start + cut : end] = 3 * torch.randn_like(changed[:, start + cut : end])
        differs = _differs(before, _mixed(attention, changed, bounds), tolerance)[0]
        if differs[start : start + cut].any():
            raise InputError(f"{what}: in a packed row {_leak(differs[start:end], cut)}, so it is not causal")
        if differs[:start].any() or differs[end:].any():
            raise InputError(f"{what}: in a packed row (cu_seqlens) the output of a sequence changes with another one")


def _check_cache(attention: Attention, x: Tensor, what: str, tolerance: float) -> None:
    cache = Cache(PROMPTS, room=FURTHER, layers=1, device=x.device)
    rows, layer = cache.rows, cache.layers[0]
    texts = [x[:, 20 * row : 20 * row + length + FURTHER] for row, length in enumerate(PROMPTS)]
    prompts = torch.cat([text[:, :length] for text, length in zip(texts, PROMPTS, strict=True)], 1)
    attention(prompts, rows.cu_seqlens, layer, rows.longest)
    for step in range(FURTHER):
        cache.advance()
        new = [text[:, length + step : length + step + 1] for text, length in zip(texts, PROMPTS, strict=True)]
        found = attention(torch.cat(new), None, layer)
        for row, (text, length) in enumerate(zip(texts, PROMPTS, strict=True)):
            whole = _mixed(attention, text[:, : length + step + 1])[:, -1:]
            if _differs(whole, found[row : row + 1].float(), tolerance).any():
                raise InputError(
                    f"{what}: after a prompt of {length} tokens, the output at position {length + step} is not that of "
                    "the whole row: use `cache` as sbeval.registry.Method states, or raise NotImplementedError for one"
                )


def _mixed(attention: Attention, x: Tensor, bounds: Tensor | None = None) -> Tensor:
    # the same random numbers each time, for a method that draws some
    torch.manual_seed(0)
    mixed: Tensor = attention(x, bounds, None, None if bounds is None else max(PACKED))
    return mixed.float()


def _differs(before: Tensor, after: Tensor, tolerance: float) -> Tensor:
    """Return at which positions (B, T) outputs differ by more than rounding, or only one is a number."""
    differs: Tensor = (after - before).norm(dim=-1) > tolerance * before.norm(dim=-1)
    return differs | (after.isnan() != before.isnan()).any(-1)


def _leak(differs: Tensor, cut: int) -> str:
    return f"the output at position {int(differs.int().argmax())} changes with the tokens from position {cut} on"
