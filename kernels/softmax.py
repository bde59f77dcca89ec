"""Causal softmax attention, shared by all methods but stick-breaking.

    o_i = sum_j a_ij v_j        a_ij = softmax over the keys j that i sees of  scale * q_i . k_j + bias(i, j)

Vaswani et al., arXiv 1706.03762, eq. 1, with a causal mask and an additive bias.

    B, T, S, H, G, D    batch, queries, keys, query heads, key-value heads (G divides H), head size
    q: (B, T, H, D)     k, v: (B, S, G, D)     the queries are the last T of the S positions
    cu_seqlens: int32 (N + 1,), bounds of N sequences packed into one row; then B = 1 and S = T

Two ideas carry every variant. Query i sees an interval of keys, `first[i] .. i`, whose lower end never decreases with
i: 0, the start of the sequence or the edge of a window. The term added to a logit is a function of indices, a `Bias`:
the CPU evaluates it for some rows at a time, FlexAttention compiles it, and no T x S matrix is ever stored.
"""

import functools
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint

from sbeval.errors import InputError, choose
from sbeval.kernels import check

# bias(b, h, i, j): the term added to the logit of query i and key j, both counted from the start of the row, in batch
# entry b and query head h; integer tensors that broadcast, 0-dimensional in FlexAttention
Bias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# of a BlockMask: how many partial blocks each row has, and which; how many full ones, and which
Blocks = tuple[Tensor, Tensor, Tensor, Tensor]

BACKENDS = ("torch", "sdpa", "cudnn", "flash", "flex")
# rows whose logits the CPU computes at a time
CHUNK = 256
# FlexAttention's mask is sparse in squares of this side
BLOCK = 128


def reference(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, cu_seqlens: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Attend densely, in the dtype of q. bias: added to the logits, broadcast to (B, H, T, S). Returns (B, T, H, D)."""
    t, s = q.shape[1], k.shape[1]
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    seen = torch.ones(t, s, dtype=torch.bool, device=q.device).tril(s - t)
    if cu_seqlens is not None:
        lengths = cu_seqlens.diff()
        sequence = torch.arange(len(lengths), device=q.device).repeat_interleave(lengths)
        seen &= sequence[:, None] == sequence
    logits = scale * torch.einsum("bthd,bshd->bhts", q, k)
    if bias is not None:
        logits = logits + bias
    return torch.einsum("bhts,bshd->bthd", logits.masked_fill(~seen, -torch.inf).softmax(-1), v)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    longest: int | None = None,
    starts: Tensor | None = None,
    backend: str | None = None,
    bias: Bias | None = None,
    window: int | None = None,
) -> Tensor:
    """Attend causally in memory linear in T and S; returns (B, T, H, D) in the dtype of q.

    scale: multiplies q . k but not the bias; D ** -0.5 when None. bias: tensors that it reads may require gradients,
    slowly: dense on a CPU, by atomic sums on a GPU, where it may read such a tensor once. window: the number of keys
    that a query sees, itself and those just before it, at least 1; all when None. longest: the most tokens that a
    packed sequence has, for speed; longer ones give wrong results. starts: int32 (B,), the first key of
    each row of a cache, for few queries, without gradient and with one implementation on all devices. backend: one of
    BACKENDS, or None for the fastest that is correct. Raise InputError for inputs that `check.inputs` or `check.bounds`
    refuses and for a backend that does not support them.
    """
    check.inputs(q, k, v, cu_seqlens)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if window is not None and window >= k.shape[1]:
        window = None
    if starts is not None:
        check.bounds(q, cu_seqlens, k.shape[1] - 1, starts=starts)
        return _decode(q, k, v, scale, starts, bias, window)
    chosen = _backend(q, k, cu_seqlens is not None, bias is not None or window is not None, backend)
    if chosen == "torch":
        return _torch(q, k, v, scale, cu_seqlens, bias, window)
    # the fused kernels take head sizes in steps of 8 from 16 on; zeros change no product
    size = q.shape[-1]
    q, k, v = (F.pad(x, (0, max(16 - size, -size % 8))) if size < 16 or size % 8 else x for x in (q, k, v))
    if chosen == "flex":
        out = _flex(q, k, v, scale, cu_seqlens, bias, window)
    elif chosen == "flash" and (cu_seqlens is not None or 1 < q.shape[1] < k.shape[1]):
        out = _varlen(q, k, v, scale, cu_seqlens, longest)
    else:
        out = _sdpa(q, k, v, scale, chosen)
    return out[..., :size]


def backend_name(device_type: str, *, biased: bool = False) -> str:
    """Name the default backend for whole sequences on a device of this type, `cpu` or `cuda`."""
    if device_type != "cuda":
        return "torch"
    return "flex" if biased else "sdpa"


def starts(length: int, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """Return int32 (length,): the start in the row of each position's sequence; 0 without packing."""
    if cu_seqlens is None:
        return torch.zeros(length, dtype=torch.int32, device=device)
    positions = torch.arange(length, dtype=torch.int32, device=device)
    return cu_seqlens[torch.searchsorted(cu_seqlens, positions, right=True) - 1]


def first_keys(length: int, cu_seqlens: Tensor | None, window: int | None, device: torch.device) -> Tensor:
    """Return int32 (length,): the first key that each position sees, in its sequence and its window."""
    first = starts(length, cu_seqlens, device)
    if window is None:
        return first
    return torch.maximum(first, torch.arange(1 - window, length - window + 1, dtype=torch.int32, device=device))


def _backend(q: Tensor, k: Tensor, packed: bool, biased: bool, requested: str | None) -> str:
    """Return the backend to run; raise InputError when the requested one cannot. biased: with a bias or a window."""
    t, s = q.shape[1], k.shape[1]
    half = q.dtype in (torch.float16, torch.bfloat16)
    # SDPA's causal mask is aligned to the first key: right for whole sequences, and not needed for one query
    aligned = not packed and t in (1, s)
    if requested is None:
        if not q.is_cuda or q.dtype == torch.float64:
            return "torch"
        if biased:
            return "flex"
        return "sdpa" if aligned else "flash" if half else "flex"
    if choose("backend", requested, BACKENDS) == "torch":
        return requested
    if not q.is_cuda:
        raise InputError(f"backend {requested!r} needs a GPU; this tensor is on {q.device.type}")
    if q.dtype == torch.float64 or (requested in ("cudnn", "flash") and not half):
        offer = "'torch'" if q.dtype == torch.float64 else "'flex'"
        raise InputError(f"backend {requested!r} does not take {q.dtype}; use {offer}")
    if biased and requested != "flex":
        raise InputError(f"backend {requested!r} takes no attention bias or window; use 'flex'")
    if requested in ("sdpa", "cudnn") and not aligned:
        raise InputError(
            f"backend {requested!r} takes neither packed sequences nor {t} queries of {s} keys; use 'flex'"
        )
    return requested


def _torch(
    q: Tensor, k: Tensor, v: Tensor, scale: float, cu_seqlens: Tensor | None, bias: Bias | None, window: int | None
) -> Tensor:
    """Attend on any device, sequence by sequence and CHUNK rows at a time."""
    # with a strided head dimension SDPA does not use its fused kernel and stores T x S weights
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    past = k.shape[1] - q.shape[1]
    recompute = q.shape[1] > CHUNK and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    outputs = []
    for first, stop in [(0, k.shape[1])] if cu_seqlens is None else pairwise(cu_seqlens.tolist()):
        narrow = window is not None and window < stop - first
        if bias is None and not narrow and past == 0 and q.is_cpu and first < stop:
            outputs.append(_fused(q[:, first:stop], k[:, first:stop], v[:, first:stop], scale, causal=True))
            continue
        for start, end in _chunks(max(first, past), stop):
            low = first if window is None else max(first, start - window + 1)
            args = q[:, start - past : end - past], k[:, low:end], v[:, low:end], scale, low, start, bias, window
            # the backward of a fused kernel stores its mask, T x S over all chunks: recompute it instead
            outputs.append(
                cast(Tensor, checkpoint(_rows, *args, use_reentrant=False, preserve_rng_state=False))
                if recompute
                else _rows(*args)
            )
    return torch.cat(outputs, dim=1)


# not cuDNN, PyTorch's first choice on Hopper: it takes tens of ms to plan each new number of keys, and so each step
DECODING = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def _decode(
    q: Tensor, k: Tensor, v: Tensor, scale: float, first: Tensor, bias: Bias | None, window: int | None
) -> Tensor:
    """Attend the last T of S positions, row b seeing keys from first[b] on; all T x S at once, since T is small."""
    (batch, t, count, _), s, groups = q.shape, k.shape[1], k.shape[2]
    # keys that no query sees are not read
    low = 0 if window is None else max(0, s - t - window + 1)
    b = torch.arange(batch, device=q.device)[:, None, None, None]
    h = torch.arange(count, device=q.device)[:, None, None]
    i, j = torch.arange(s - t, s, device=q.device)[:, None], torch.arange(low, s, device=q.device)
    mask = (j <= i) & (j >= first[b])
    if window is not None:
        mask = mask & (j > i - window)
    out_dtype = q.dtype
    if bias is not None:
        # at long distances a bias is large, and in 16 bits it would equal its neighbours
        exact = torch.float64 if q.dtype == torch.float64 else torch.float32
        q, k, v = (x.to(exact) for x in (q, k, v))
        mask = torch.where(mask, bias(b, h, i, j), -torch.inf).to(exact)
    # the heads of a group become queries of the same keys, so the kernel need not support groups
    q, mask = (x.unflatten(1, (groups, -1)).flatten(2, 3) for x in (q.transpose(1, 2), mask.expand(-1, count, -1, -1)))
    k, v = (x[:, low:].transpose(1, 2) for x in (k, v))
    with torch.autocast(q.device.type, enabled=False), sdpa_kernel(DECODING):
        out: Tensor = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    by_head: Tensor = out.unflatten(2, (-1, t)).flatten(1, 2)
    return by_head.transpose(1, 2).to(out_dtype)


def _chunks(start: int, stop: int) -> Iterator[tuple[int, int]]:
    for i in range(start, stop, CHUNK):
        yield i, min(i + CHUNK, stop)


def _rows(
    q: Tensor, k: Tensor, v: Tensor, scale: float, first: int, start: int, bias: Bias | None, window: int | None
) -> Tensor:
    """Attend some rows: q holds positions from `start`, k and v from `first` to the last position of q."""
    batch, rows, heads, _ = q.shape
    i = torch.arange(start, start + rows, device=q.device)[:, None]
    j = torch.arange(first, start + rows, device=q.device)
    mask = j <= i
    if window is not None:
        mask &= j > i - window
    if bias is not None:
        b = torch.arange(batch, device=q.device)[:, None, None, None]
        h = torch.arange(heads, device=q.device)[:, None, None]
        # beside a float64 q SDPA misreads a mask of float32, as a bias may be
        exact = torch.float64 if q.dtype == torch.float64 else torch.float32
        mask = torch.where(mask, bias(b, h, i, j), -torch.inf).to(exact)
        # SDPA uses its fused kernel only with four dimensions
        mask = mask.expand(batch, heads, *mask.shape[-2:])
    return _fused(q, k, v, scale, mask=mask)


def _decided(condition: bool) -> bool:
    """Return a plain bool, which SDPA takes alone: while a model is compiled, a comparison of sizes is symbolic."""
    return True if condition else False


def _fused(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, mask: Tensor | None = None
) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=_decided(q.shape[1] != k.shape[1])
    )
    return out.transpose(1, 2)


TRAINING = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, chosen: str) -> Tensor:
    """Attend T = S or T = 1 queries on a GPU; `chosen` forces a kernel unless it is `sdpa`."""
    causal = _decided(q.shape[1] > 1)
    if q.dtype == torch.float32:
        # the only float32 kernel that is linear in memory does not group heads
        k, v = heads(k, v, q.shape[2])
    if chosen == "sdpa":
        if not (q.requires_grad and torch.is_grad_enabled()):
            return _fused(q, k, v, scale, causal=causal)
        # cuDNN is the fastest on Hopper for the few shapes that training has; it plans each anew
        with sdpa_kernel(TRAINING, set_priority=True):
            return _fused(q, k, v, scale, causal=causal)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION if chosen == "cudnn" else SDPBackend.FLASH_ATTENTION):
        return _fused(q, k, v, scale, causal=causal)


def _varlen(q: Tensor, k: Tensor, v: Tensor, scale: float, cu_seqlens: Tensor | None, longest: int | None) -> Tensor:
    """Attend packed sequences, or the last T of S positions: the mask is aligned to the last key of each sequence."""
    (batch, t), s = q.shape[:2], k.shape[1]
    q_bounds = k_bounds = cu_seqlens
    if q_bounds is None:
        q_bounds = torch.arange(0, batch * t + 1, t, dtype=torch.int32, device=q.device)
        k_bounds = torch.arange(0, batch * s + 1, s, dtype=torch.int32, device=q.device)
    k, v = heads(k, v, q.shape[2])
    if cu_seqlens is not None and longest is not None:
        t = s = longest
    # so many tiles of each sequence begin, and those past its end return at once: with many sequences in a row the
    # row's length, which is all that is known without `longest`, makes these most of the time
    rows, keys, values = (x.flatten(0, 1) for x in (q, k, v))
    out = varlen_attn(rows, keys, values, q_bounds, k_bounds, t, s, scale=scale, window_size=(-1, 0))
    return cast(Tensor, out).view_as(q)


def heads(k: Tensor, v: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Repeat key-value heads for kernels that do not group them."""
    if k.shape[2] == count:
        return k, v
    group = count // k.shape[2]
    return k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    compiled = torch.compile(flex_attention, fullgraph=True)

    def attend(*args: Any, **options: Any) -> Tensor:
        # a sweep over methods, head sizes and dtypes exceeds the default of 8 variants, after which nothing is fused
        with torch._dynamo.config.patch(recompile_limit=256):
            return compiled(*args, **options)

    return attend


def _flex(
    q: Tensor, k: Tensor, v: Tensor, scale: float, cu_seqlens: Tensor | None, bias: Bias | None, window: int | None
) -> Tensor:
    """Attend through FlexAttention, which skips the blocks of keys that no query of a block sees."""
    t, s = q.shape[1], k.shape[1]
    compiling = torch.compiler.is_compiling()
    if cu_seqlens is None and not compiling:
        mask = _causal_blocks(t, s, q.device, window)
    else:
        mask = block_mask(t, first_keys(s, cu_seqlens, window, q.device))
    past = torch.full((), s - t, dtype=torch.int32, device=q.device)

    def score(logit: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        assert bias is not None
        return logit + bias(b, h, i + past, j)

    attend = cast(Callable[..., Tensor], flex_attention) if compiling else _compiled_flex()
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    # heads above 128, rounded up to 256, leave shared memory for one stage of keys and values alone
    options: dict[str, Any] = {"fwd_num_stages": 1} if q.shape[-1] > 128 else {}
    # the kernel for decoding holds all queries of a group at once: with many it compiles for minutes, or not at all. An
    # `if`, since the compiler does not accept a comparison of an unknown length as an option
    if t * group > 16:
        options["FORCE_USE_FLEX_ATTENTION"] = True
    score_mod = None if bias is None else score
    out = attend(
        q, k, v, score_mod=score_mod, block_mask=mask, scale=scale, enable_gqa=group > 1, kernel_options=options
    )
    return out.transpose(1, 2)


@functools.lru_cache(maxsize=32)
def _causal_blocks(t: int, s: int, device: torch.device, window: int | None = None) -> BlockMask:
    # tensors made in inference mode could not be saved for a later backward
    with torch.inference_mode(False):
        return block_mask(t, first_keys(s, None, window, device))


def block_mask(t: int, first: Tensor) -> BlockMask:
    """Build FlexAttention's mask for the last t of S positions, position i seeing the keys first[i] .. i.

    first: int32 (S,), first[i] <= i, non-decreasing. Blocks follow from the ends of the intervals, so nothing of size
    t x S is made, unlike in `create_block_mask`, and nothing is sorted: every layer of a packed batch builds it anew.
    """
    s, device = first.numel(), first.device
    past = torch.full((), s - t, dtype=torch.int32, device=device)
    lower = first[s - t :]

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (lower[i] <= j) & (j <= i + past)

    top = torch.arange(0, t, BLOCK, dtype=torch.int32, device=device)
    bottom = (top + BLOCK - 1).clamp(max=t - 1)
    # a row of blocks sees some of the blocks start .. stop - 1, and all of full .. end - 1; none of the four decreases
    start, stop = lower[top] // BLOCK, (bottom + past) // BLOCK + 1
    full = (lower[bottom] + BLOCK - 1) // BLOCK
    end = torch.maximum(full, (top + past + 1) // BLOCK)
    # a block that exceeds T is never full, nor is one that exceeds S, whose right edge lies past every query
    full = full.where(top + BLOCK <= t, end)
    columns = torch.arange(-(-s // BLOCK), dtype=torch.int32, device=device)
    # a row sees a column from when its stop is past it until its start is: the columns' stop, start, end and full
    below, above, full_below, full_above = (
        torch.searchsorted(rows, columns, right=True, out_int32=True) for rows in (start, stop, full, end)
    )
    by_row = _listed(start, stop, full, end, len(columns))
    by_column = _listed(above, below, full_above, full_below, len(top))
    return BlockMask((t, s), *by_row, *by_column, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=seen)


def _listed(start: Tensor, stop: Tensor, full: Tensor, end: Tensor, count: int) -> Blocks:
    """List, for each row, the blocks of start .. stop - 1 without full .. end - 1, and these, as BlockMask has them:
    numbers (1, 1, rows) and indices (1, 1, rows, count), which mean nothing past their number, of either."""
    place, whole = torch.arange(count, dtype=torch.int32, device=start.device), end - full
    some = start[:, None] + place
    partial = some.where(some < full[:, None], some + whole[:, None])
    return (
        (stop - start - whole)[None, None],
        partial.clamp(max=count - 1)[None, None],
        whole[None, None],
        (full[:, None] + place).clamp(max=count - 1)[None, None],
    )
