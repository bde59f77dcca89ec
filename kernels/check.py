"""Checks of the inputs of attention, common to all methods, before any kernel is launched."""

import torch
from torch import Tensor

from sbeval.errors import InputError

MAX_HEAD_SIZE = 256


def inputs(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None) -> None:
    """Raise InputError, naming the argument, unless these are valid inputs of attention.

    q: (B, T, H, D); k, v: (B, S, G, D) with 1 <= T <= S, G dividing H and D <= 256, all of one floating dtype on one
    device, no dimension empty. cu_seqlens: int32 (N + 1,) on that device, non-decreasing from 0 to T, then B = 1 and
    S = T; its values are read only on a CPU, since reading them from a GPU would wait for it.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4 or 0 in x.shape:
            raise InputError(f"{name} must have four dimensions, none empty; its shape is {tuple(x.shape)}")
        if not x.is_floating_point() or x.dtype != q.dtype:
            raise InputError(f"{name} must be floating and of the dtype of q, {q.dtype}; it is {x.dtype}")
        if x.device != q.device:
            raise InputError(f"{name} must be on the device of q, {q.device}; it is on {x.device}")
    if k.shape != v.shape:
        raise InputError(f"v must have the shape of k, {tuple(k.shape)}; its shape is {tuple(v.shape)}")
    if (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise InputError(f"k must have the batch and head size of q, {tuple(q.shape)}; its shape is {tuple(k.shape)}")
    if q.shape[2] % k.shape[2]:
        raise InputError(f"k has {k.shape[2]} heads, which must divide the {q.shape[2]} heads of q")
    if q.shape[1] > k.shape[1]:
        raise InputError(f"q has {q.shape[1]} positions, more than the {k.shape[1]} of k, of which they are the last")
    head_size(q.shape[3])
    if cu_seqlens is not None:
        _cu_seqlens(q, k, cu_seqlens)


def output(mixed: object, q: Tensor, spec: str) -> Tensor:
    """Return the output of the method `spec`; raise RuntimeError, as a kernel does, unless it has the shape of q."""
    if not isinstance(mixed, Tensor) or mixed.shape != q.shape:
        found = tuple(mixed.shape) if isinstance(mixed, Tensor) else f"a {type(mixed).__name__}"
        raise RuntimeError(f"attention {spec!r} must return (B, T, H, D) = {tuple(q.shape)}; got {found}")
    return mixed


def head_size(size: int) -> None:
    """Raise InputError for heads larger than any kernel takes."""
    if size > MAX_HEAD_SIZE:
        raise InputError(
            f"heads have a size, width / heads or head_dim, of at most {MAX_HEAD_SIZE}; it is {size}: give more heads"
        )


def bounds(q: Tensor, cu_seqlens: Tensor | None, last: int, **named: Tensor | None) -> None:
    """Raise InputError unless those given can bound the keys of the rows of a cache: int32 (B,), each in 0 to `last`.

    Values are read as those of cu_seqlens, which cannot be given beside them.
    """
    for name, bound in named.items():
        if bound is None:
            continue
        if cu_seqlens is not None:
            raise InputError(f"{name} bounds the rows of a cache and cu_seqlens packs rows: give one of them")
        if bound.shape != q.shape[:1] or bound.dtype != torch.int32 or bound.device != q.device:
            raise InputError(
                f"{name} must be int32 of shape ({len(q)},) on {q.device}; it is {bound.dtype} of shape "
                f"{tuple(bound.shape)} on {bound.device}"
            )
        if bound.is_cpu and not torch.compiler.is_compiling() and ((bound < 0) | (bound > last)).any():
            raise InputError(f"{name} must lie in 0 to {last}; it is {bound.tolist()}")


def _cu_seqlens(q: Tensor, k: Tensor, cu_seqlens: Tensor) -> None:
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2 or cu_seqlens.dtype != torch.int32:
        shape = tuple(cu_seqlens.shape)
        raise InputError(
            f"cu_seqlens must be int32 of shape (sequences + 1,); it is {cu_seqlens.dtype} of shape {shape}"
        )
    if cu_seqlens.device != q.device:
        raise InputError(f"cu_seqlens must be on the device of q, {q.device}; it is on {cu_seqlens.device}")
    if q.shape[0] != 1 or q.shape[1] != k.shape[1]:
        raise InputError(
            f"cu_seqlens packs sequences into one row: B must be 1 and S equal T; "
            f"q is {tuple(q.shape)} and k {tuple(k.shape)}"
        )
    if not cu_seqlens.is_cpu or torch.compiler.is_compiling():
        return
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != q.shape[1]:
        first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
        raise InputError(f"cu_seqlens must go from 0 to T = {q.shape[1]}; it goes from {first} to {last}")
    if (cu_seqlens.diff() < 0).any():
        raise InputError(f"cu_seqlens must not fall; it is {cu_seqlens.tolist()}")
