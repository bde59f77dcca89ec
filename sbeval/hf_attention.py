"""Stick-breaking attention in models of transformers: `attn_implementation="stick_breaking"`.

Importing `sbeval.hf` registers it. It replaces the softmax of any decoder that calls transformers' AttentionInterface.
The model's positions stay: a Llama still rotates queries and keys, which the paper's models do not; those are what
`sbeval export` writes. Padding may be on the left (without gradients) or on the right.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from sbeval.errors import InputError
from sbeval.kernels.stick_breaking import attention

NAME = "stick_breaking"


def forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **more: Any,
) -> tuple[Tensor, None]:
    """Return the output (B, T, H, D) with each query's remainder times its own value, as in the paper, and no weights.

    query: (B, H, T, D); key, value: (B, G, S, D), the queries being the last T positions; attention_mask: None or
    (B, S), False at padding. Raise InputError for what stick-breaking does not have.
    """
    for name in ("sliding_window", "softcap", "position_bias", "s_aux"):
        if more.get(name) is not None:
            raise InputError(f'attn_implementation="{NAME}" has no {name}, which this model uses')
    if dropout:
        raise InputError(f'attn_implementation="{NAME}" has no dropout of weights: set attention_dropout=0')
    if not getattr(module, "is_causal", True):
        raise InputError(f'attn_implementation="{NAME}" is causal: this model attends in both directions')
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out, remainder = attention(q, k, v, scale=scaling, starts=_starts(attention_mask, k.shape[1]))
    own = v[:, -q.shape[1] :].repeat_interleave(q.shape[2] // v.shape[2], 2)
    return torch.addcmul(out, remainder[..., None].to(out.dtype), own), None


def _starts(mask: Tensor | None, keys: int) -> Tensor | None:
    """Return the first key of each row, (B,) int32; None where all begin at 0."""
    if mask is None:
        return None
    if mask.ndim != 2 or mask.shape[1] != keys:
        raise InputError(f'attn_implementation="{NAME}" takes a mask of (B, {keys}) keys; got {tuple(mask.shape)}')
    real = mask.bool()
    positions = torch.arange(keys, device=mask.device)
    starts, counts = real.int().argmax(1), real.sum(1)
    if bool((real != ((positions >= starts[:, None]) & (positions < (starts + counts)[:, None]))).any()):
        raise InputError("padding must be on the left or on the right, never within a row")
    # queries after the end of a row are padding themselves
    return starts.int() if bool(starts.any()) else None


def _mask(batch_size: int, q_length: int, kv_length: int, attention_mask: Tensor | None = None, **_: Any) -> Any:
    """Return the padding of the keys, (B, S); None without padding."""
    if attention_mask is None:
        return None
    padding = attention_mask[:, -kv_length:]
    return None if bool(padding.all()) else padding


AttentionInterface.register(NAME, forward)
AttentionMaskInterface.register(NAME, _mask)
