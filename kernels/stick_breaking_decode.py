"""Triton kernels of stick-breaking attention for few queries against many keys, as in decoding.

The keys are split over the device, as in flash-decoding: a program walks a chunk of keys, from its newest key to its
oldest, as if it had a whole stick, and leaves what it finds (`PARTS`) and what the chunk leaves of a stick
(`REMAINDERS`). Another kernel joins the chunks, the newest first. Heads that share keys are rows of one tile, so that
keys and values are read once.

With epsilon there are several launches, for the newest keys, up to four times as many, and so on; the programs of a
later one return at once where the earlier chunks have used up the stick.

Variable grammar: i_ index, o_ offsets, p_ pointers, m_ masks, n_ counts, b_ block values.
"""

import functools
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sbeval.kernels.stick_breaking_triton import (
    LOG2_E,
    _columns,
    _key_order,
    _odds,
    _prefixes,
    _product,
    _reciprocal,
    _rows,
    _scan,
)

# what a walk leaves is at least this, the smallest normal float32: 0 says that nobody walked
LEAST = tl.constexpr(2.0**-126)
# with epsilon, keys of the first launch at least, and how many times as far each further one reaches back
NEWEST, FARTHER = 2048, 4
# programs of a tile of queries in further launches: those whose sticks last get help, as most others return at once
HELPERS = 16
# multiprocessors of a device that has none to count
INTERPRETED_PROCESSORS = 2


@triton.jit
def _multiply(a, b):
    return a * b


@triton.jit
def _stick_left(LEFT, n_chunks):
    """The most that these chunks leave of any row's stick."""
    left = 1.0
    for i in range(0, n_chunks, 128):
        o_c = i + tl.arange(0, 128)
        left *= tl.reduce(tl.load(LEFT + o_c, mask=o_c < n_chunks, other=1.0), 0, _multiply)
    return left


# the number of keys changes from step to step: none is worth a compilation of its own
@triton.jit(
    do_not_specialize=["n_batch", "n_groups", "n_queries", "n_keys", "n_chunks", "first_chunk", "newest", "oldest"]
)
def decode_kernel(
    Q, K, V, BIAS, PARTS, REMAINDERS, LEFT, STARTS, LENGTHS,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    n_batch, n_groups, n_queries, n_keys, n_chunks, first_chunk, newest, oldest, scale, epsilon,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CURRENT: tl.constexpr, SKIP: tl.constexpr, EXACT: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A chunk of keys for a tile of queries of the heads that share them; a row of the tile is a query of a head.

    PARTS: (B, T, H, chunks, D) and REMAINDERS: (B, T, H, chunks), float32, from `first_chunk` on for tiles of keys from
    `newest` up to and without `oldest`, counted from the newest. LEFT: (tiles of queries, chunks) float32, with
    epsilon: the most that a chunk leaves of a row's stick.
    """
    if OVERLAP:
        gdc_launch_dependents()
    pid = tl.program_id(0)
    i_g = pid % n_groups
    i_b = (pid // n_groups % n_batch).to(tl.int64)
    o_row = pid // (n_groups * n_batch) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    o_key = _key_order(BLOCK_N)
    # a cache may have its heads as far apart as it is long
    K += i_b * stride_kb + i_g.to(tl.int64) * stride_kh
    V += i_b * stride_vb + i_g.to(tl.int64) * stride_vh
    n_k = n_keys
    if LENGTHS is not None:
        n_k = tl.load(LENGTHS + i_b)
    if STARTS is not None:
        o_first = tl.load(STARTS + i_b)
        n_k -= o_first
        K += o_first.to(tl.int64) * stride_kt
        V += o_first.to(tl.int64) * stride_vt
    o_m = o_row // GROUP
    o_h = i_g * GROUP + o_row % GROUP
    m_m = o_m < n_queries
    rows = (i_b * n_queries + o_m) * (n_groups * GROUP) + o_h
    m_d = (o_d < D)[None, :]
    p_q = Q + i_b * stride_qb + o_m.to(tl.int64) * stride_qt + o_h.to(tl.int64) * stride_qh
    b_q = tl.load(p_q[:, None] + o_d[None, :], mask=m_m[:, None] & m_d, other=0.0)
    b_bias = 0.0
    if BIAS is not None:
        b_bias = (tl.load(BIAS + o_h) * 1.4426950408889634)[:, None]
    # keys that a row sees, and that any row does: tiles begin at the newest of these
    o_end = o_m + (n_k - n_queries + CURRENT)
    end = tl.maximum(tl.max(tl.where(m_m, o_end, 0), 0), 0)
    n_tiles = tl.minimum((end + BLOCK_N - 1) // BLOCK_N, oldest)
    # those of this launch, dealt out evenly
    share = (tl.maximum(n_tiles - newest, 0) + tl.num_programs(1) - 1) // tl.num_programs(1)
    i_tile = newest + tl.program_id(1) * share
    chunk = first_chunk + tl.program_id(1)
    part = rows * n_chunks + chunk
    if SKIP:
        LEFT += pid.to(tl.int64) * n_chunks
        if first_chunk > 0:
            # below half of it: `combine_kernel` multiplies in another order
            if _stick_left(LEFT, first_chunk) <= epsilon * 0.5:
                tl.store(REMAINDERS + part, tl.zeros([BLOCK_M], tl.float32), mask=m_m)
                tl.store(LEFT + chunk, 0.0)
                return
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    b_left = tl.full([BLOCK_M], 1.0, dtype=tl.float32)
    for i in range(i_tile, tl.minimum(i_tile + share, n_tiles)):
        o_n = end - (i + 1) * BLOCK_N
        m_n = (o_n + o_key >= 0)[:, None]
        b_k = tl.load(
            K + tl.cast(o_n, tl.int64) * stride_kt + (o_key[:, None] * stride_kt + o_d[None, :]), mask=m_n & m_d,
            other=0.0,
        )  # fmt: skip
        b_v = tl.load(
            V + tl.cast(o_n, tl.int64) * stride_vt + (o_key[:, None] * stride_vt + o_d[None, :]), mask=m_n & m_d,
            other=0.0,
        )  # fmt: skip
        m_tile = (o_n + o_key < o_end[:, None]) & (o_n + o_key >= 0)[None, :]
        b_odds = _odds(_product(b_q, tl.trans(b_k), EXACT), scale, b_bias, m_tile, True)
        q0, q1, q2, q3, _, _, _, p = _prefixes(b_odds)
        b_stick, b_left = _scan(_reciprocal(p), b_left, False)
        b_weight = _columns(q0 * b_stick, q1 * b_stick, q2 * b_stick, q3 * b_stick)
        b_acc += _product(b_weight.to(b_v.dtype), b_v, EXACT)
    b_left = tl.maximum(b_left, LEAST)
    tl.store(PARTS + part[:, None] * D + o_d[None, :], b_acc, mask=m_m[:, None] & m_d)
    tl.store(REMAINDERS + part, b_left, mask=m_m)
    if SKIP:
        tl.store(LEFT + chunk, tl.max(tl.where(m_m, b_left, LEAST), 0))


@triton.jit(do_not_specialize=["n_chunks"])
def combine_kernel(
    PARTS, REMAINDERS, OUT, REMAINDER, n_chunks, epsilon,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Join the chunks of one query of one head, the newest first; a program has BLOCK_D numbers of the output.

    Chunks count where those before leave more than epsilon: elsewhere nobody need have walked them.
    """
    if OVERLAP:
        # launched while the chunks were walked
        gdc_wait()
    i_row = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    REMAINDERS += i_row * n_chunks
    b_o = tl.zeros([BLOCK_D], dtype=tl.float32)
    left = 1.0
    i = 0
    while (i < n_chunks) & (left > epsilon):
        o_c = i + tl.arange(0, BLOCK_C)
        b_rest = tl.load(REMAINDERS + o_c, mask=o_c < n_chunks, other=0.0)
        b_newer = tl.load(REMAINDERS + o_c - 1, mask=(o_c > i) & (o_c < n_chunks), other=1.0)
        b_before = left * tl.cumprod(b_newer)
        m_c = (b_before > epsilon) & (b_rest > 0.0)
        p_part = PARTS + (i_row * n_chunks + o_c)[:, None] * D + o_d[None, :]
        b_part = tl.load(p_part, mask=m_c[:, None] & (o_d < D)[None, :], other=0.0)
        b_o += tl.sum(b_before[:, None] * b_part, 0)
        left = tl.min(tl.where(m_c, b_before * b_rest, left), 0)
        i += BLOCK_C
    tl.store(OUT + i_row * D + o_d, b_o.to(OUT.dtype.element_ty), mask=o_d < D)
    tl.store(REMAINDER + i_row, left)


def tiles(kernel: str, head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile sizes and launch options of `decode` or `combine`, for sm_80 and later."""
    block_d = max(16, triton.next_power_of_2(head_dim))
    if kernel == "combine":
        return {"BLOCK_D": min(32, block_d), "BLOCK_C": 128, "num_warps": 4, "num_stages": 1}
    exact = dtype == torch.float32
    block_n = (32 if exact else 64) if block_d <= 128 else (16 if exact else 32)
    # one warp has registers for heads of 64 if it loads 16 bytes at a time
    warps = 1 if block_d <= 64 and head_dim % 8 == 0 and not exact else 4
    stages = 1 if exact else 3
    return {"BLOCK_D": block_d, "BLOCK_M": 16, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}


def at_once(head_dim: int, dtype: torch.dtype) -> int:
    """Programs of `decode` that a multiprocessor of an H100 runs at a time."""
    return 4 if tiles("decode", head_dim, dtype)["num_warps"] == 1 else 2


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _overlaps(device: torch.device) -> bool:
    """Whether a kernel can be launched while the one that it waits for still runs (from sm_90 on)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def _splits(n_programs: int, slots: int) -> int:
    """In how many parts to deal out the keys of each of n_programs, of which `slots` run at a time: such that at most a
    tenth of the device is idle in the last wave, or as little as can be, and there are few waves."""

    def rank(splits: int) -> tuple[float, int, int]:
        waves = -(-n_programs * splits // slots)
        return min(n_programs * splits / slots / waves, 0.9), -waves, splits

    return max(range(1, max(1, 4 * slots // n_programs) + 1), key=rank)


def decode(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, starts: Tensor | None, lengths: Tensor | None, scale: float,
    attend_current: bool, epsilon: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output (B, T, H, D) and remainder (B, T, H) of few queries, row by row of the keys from `starts` to `lengths`."""
    q, k, v = _rows(q), _rows(k), _rows(v)
    batch, n_queries, heads, dim = q.shape
    n_keys, groups = k.shape[1:3]
    options, joined = tiles("decode", dim, q.dtype), tiles("combine", dim, q.dtype)
    n_programs = triton.cdiv(n_queries * heads // groups, options["BLOCK_M"]) * batch * groups
    n_tiles = max(1, triton.cdiv(n_keys, options["BLOCK_N"]))
    busy = _splits(n_programs, at_once(dim, q.dtype) * _processors(q.device))
    overlap = _overlaps(q.device)
    # tiles of keys of each launch, counted from the newest
    bounds = [0, n_tiles]
    if epsilon > 0:
        # a tile for each program that would else be idle takes no longer
        bounds[1:] = [max(triton.cdiv(NEWEST, options["BLOCK_N"]), busy)]
        while bounds[-1] < n_tiles:
            bounds.append(bounds[-1] * FARTHER)
        bounds[-1] = n_tiles
    splits = [
        min(max(busy, HELPERS if newest else 1), triton.cdiv(oldest - newest, 2)) for newest, oldest in pairwise(bounds)
    ]
    n_chunks = sum(splits)
    shape = (batch, n_queries, heads)
    parts = torch.empty((*shape, n_chunks, dim), dtype=torch.float32, device=q.device)
    remainders = torch.empty((*shape, n_chunks), dtype=torch.float32, device=q.device)
    left = torch.empty((n_programs, n_chunks), dtype=torch.float32, device=q.device) if epsilon > 0 else None
    for i, (newest, oldest) in enumerate(pairwise(bounds)):
        decode_kernel[(n_programs, splits[i])](
            q, k, v, bias, parts, remainders, left, starts, lengths,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            batch, groups, n_queries, n_keys, n_chunks, sum(splits[:i]), newest, oldest, scale * LOG2_E, epsilon,
            GROUP=heads // groups, D=dim, CURRENT=int(attend_current), SKIP=epsilon > 0, EXACT=q.dtype == torch.float32,
            OVERLAP=overlap, **options,
        )  # fmt: skip
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    remainder = torch.empty(shape, dtype=torch.float32, device=q.device)
    combine_kernel[(batch * n_queries * heads, triton.cdiv(dim, joined["BLOCK_D"]))](
        parts, remainders, out, remainder, n_chunks, epsilon, D=dim, OVERLAP=overlap, **joined,
        **({"launch_pdl": True} if overlap else {}),
    )  # fmt: skip
    return out, remainder
