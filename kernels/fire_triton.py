"""Triton kernels of FIRE; `fire.py` has the mathematics and is the way in.

The bias of a head is a network with one input u and one hidden layer of K units: piecewise linear in u, with K kinks
that all heads share. Three ideas make it cost a few instructions a logit, exactly:

- Within a tile u lies in a short interval, computed from the tile's corners, that few kinks fall into. With `below` of
  the sorted kinks under the interval, the bias is that segment's line plus what each kink inside it bends,

      b = slope[below] u + shift[below] + sum_k bend[k] relu(u - kink[k])

  A kink that is not under the interval and not inside adds 0, so that how many are looked at may be rounded up.
- The network's gradient needs, for each kink, the sums of g and of g u over all pairs with u above it, where g is the
  gradient of the logits. A program of backward walks its keys from the oldest on, so that u falls from tile to tile: a
  kink takes the running sums when it enters the interval, partial sums of the tiles in which it lies inside, and
  nothing more after that.
- c and L also move u = log(1 + c d) / bottom itself. The slope of the bias at each pair makes of g two sums a query:
  sum_j g b'(u) u, for its bottom, and sum_j g b'(u) d / (1 + c d), for c.

Forward is FlashAttention's (Dao, arXiv 2307.08691); backward is in two passes without atomics: one program for a query
tile finds dq and the sums, one for a key tile dk and dv, each in one order. Same inputs, same bits.

    C: () float32, |c|      RATE: (T,) float32, log(2) / bottom of each query
    TABLE: (1 + 3 H, WIDTH) float32, WIDTH the power of two above K; see `pieces`

Variable grammar: i_ index, o_ offsets, p_ pointers, m_ masks, b_ block values.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sbeval.kernels.stick_breaking_triton import (
    INTERPRETED,
    LOG2_E,
    _blocks,
    _cumulative,
    _exp2,
    _first_row,
    _load,
    _locate,
    _product,
    _reciprocal,
    _rows,
)  # fmt: skip


@triton.jit
def _log2(x, EXACT: tl.constexpr):
    """Of numbers from 1 on; an absolute error of 2^-22 unless EXACT."""
    if INTERPRETED or EXACT:
        return tl.log2(x)
    return tl.inline_asm_elementwise(
        "lg2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
    )  # fmt: skip


@triton.jit
def _interval(b_kinks, near, far, c, slow, fast):
    """How many kinks lie below all u of a tile, and how many below some.

    near, far: the smallest and largest distance in the tile; slow, fast: the smallest and largest RATE.
    """
    bottom = tl.log2(1.0 + c * tl.maximum(near, 0).to(tl.float32)) * slow
    top = tl.log2(1.0 + c * tl.maximum(far, 0).to(tl.float32)) * fast
    return tl.sum((b_kinks < bottom).to(tl.int32), 0), tl.sum((b_kinks < top).to(tl.int32), 0)


@triton.jit
def _reach(b_i, b_j, c, MASKED: tl.constexpr):
    """Distance d, float32, of queries at b_i from keys at b_j, and 1 + c d."""
    b_d = b_i - b_j
    if MASKED:
        # of pairs that are not seen
        b_d = tl.maximum(b_d, 0.0)
    return b_d, 1.0 + c * b_d


@triton.jit
def _bend(b_bias, b_slope, b_u, p_kink, p_bend, SLOPE: tl.constexpr):
    """Add what one kink does to the bias and, with SLOPE, to its derivative."""
    b_above = b_u - tl.load(p_kink)
    bend = tl.load(p_bend)
    b_bias += bend * tl.maximum(b_above, 0.0)
    if SLOPE:
        b_slope += tl.where(b_above > 0.0, bend, 0.0)
    return b_bias, b_slope


@triton.jit
def _bias(b_u, below, count, TABLE, i_h, n_heads, WIDTH: tl.constexpr, SLOPE: tl.constexpr):
    """Bias, in log2 units, and with SLOPE its derivative by u, of a tile with `count` kinks above `below` in it."""
    p_kink = TABLE + below
    p_bend = TABLE + (1 + i_h) * WIDTH + below
    slope = tl.load(TABLE + (1 + n_heads + i_h) * WIDTH + below)
    b_bias = b_u * slope + tl.load(TABLE + (1 + 2 * n_heads + i_h) * WIDTH + below)
    b_slope = slope
    if SLOPE:
        b_slope = tl.zeros_like(b_u) + slope
    # a loop within a branch: around another loop keys would not be loaded ahead
    if count > 0:
        for k in range(count):
            b_bias, b_slope = _bend(b_bias, b_slope, b_u, p_kink + k, p_bend + k, SLOPE)
    return b_bias, b_slope


@triton.jit
def forward_kernel(
    Q, K, V, C, RATE, TABLE, O, LSE, CU_SEQLENS, BLOCKS,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    n_batch, n_heads, n_queries, n_keys, n_blocks, n_sequences, scale,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, VARLEN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One query tile of one head a program, latest tiles first. O: (B, T, H, D) contiguous; LSE: (B, H, T) float32, the
    log2 of what a row's softmax divides by."""
    pid = tl.program_id(0)
    i_h = pid % n_heads
    i_b = ((pid // n_heads) % n_batch).to(tl.int64)
    i_tile = n_blocks - 1 - pid // (n_heads * n_batch)
    i_m, i_s, start, n_q, n_k = _locate(i_tile, BLOCKS, CU_SEQLENS, n_queries, n_keys, n_sequences, VARLEN)
    if i_m < 0:
        return
    Q += _first_row(i_b, start, i_h, stride_qb, stride_qt, stride_qh)
    K += _first_row(i_b, start, i_h // GROUP, stride_kb, stride_kt, stride_kh)
    V += _first_row(i_b, start, i_h // GROUP, stride_vb, stride_vt, stride_vh)
    o_d = tl.arange(0, BLOCK_D)
    o_key = tl.arange(0, BLOCK_N)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < n_q
    first = i_m * BLOCK_M + n_k - n_q
    last = tl.minimum(first + BLOCK_M, n_k) - 1
    RATE += start
    c = tl.load(C)
    b_rate = tl.load(RATE + o_m, mask=m_m, other=0.0)
    fast, slow = tl.load(RATE + i_m * BLOCK_M), tl.load(RATE + last - (n_k - n_q))
    b_kinks = tl.load(TABLE + tl.arange(0, WIDTH))
    b_i = (o_m + (n_k - n_q)).to(tl.float32)
    b_q = _load(Q, o_m, o_d, stride_qt, n_q, D, True)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    n_tiles = last // BLOCK_N + 1
    n_full = (first + 1) // BLOCK_N
    for masked in tl.static_range(2):
        for i_n in range(0 if masked == 0 else n_full, n_full if masked == 0 else n_tiles):
            o_n = i_n * BLOCK_N
            b_k = _load(K + tl.cast(o_n, tl.int64) * stride_kt, o_key, o_d, stride_kt, n_k - o_n, D, masked == 1)
            b_v = _load(V + tl.cast(o_n, tl.int64) * stride_vt, o_key, o_d, stride_vt, n_k - o_n, D, masked == 1)
            below, some = _interval(b_kinks, first - o_n - BLOCK_N + 1, last - o_n, c, slow, fast)
            b_j = (o_n + o_key).to(tl.float32)
            _, b_reach = _reach(b_i[:, None], b_j[None, :], c, masked == 1)
            b_u = _log2(b_reach, EXACT) * b_rate[:, None]
            b_bias, _ = _bias(b_u, below, some - below, TABLE, i_h, n_heads, WIDTH, False)
            b_logit = _product(b_q, tl.trans(b_k), EXACT) * scale + b_bias
            if masked == 1:
                b_logit = tl.where(b_i[:, None] >= b_j[None, :], b_logit, float("-inf"))
            b_new = tl.maximum(b_max, tl.max(b_logit, 1))
            b_p = _exp2(b_logit - b_new[:, None])
            b_shrink = _exp2(b_max - b_new)
            b_max = b_new
            b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
            b_acc = b_acc * b_shrink[:, None] + _product(b_p.to(b_v.dtype), b_v, EXACT)
    rows = ((i_b * n_queries + start + o_m) * n_heads + i_h).to(tl.int64)
    b_o = (b_acc / b_sum[:, None]).to(O.dtype.element_ty)
    tl.store(O + rows[:, None] * D + o_d[None, :], b_o, mask=m_m[:, None] & (o_d < D)[None, :])
    tl.store(LSE + (i_b * n_heads + i_h) * n_queries + start + o_m, b_max + tl.log2(b_sum), mask=m_m)


@triton.jit
def _above(b_sums, b_g, b_gu, b_u, kink, m_unit):
    """Add the sums of g and g u over pairs above a kink to its row of b_sums (WIDTH, 2), which m_unit marks."""
    m_above = b_u > kink
    b_pair = tl.join(tl.sum(tl.where(m_above, b_g, 0.0), 1), tl.sum(tl.where(m_above, b_gu, 0.0), 1))
    return b_sums + tl.where(m_unit[:, None], tl.sum(b_pair, 0)[None, :], 0.0)


@triton.jit
def query_kernel(
    Q, K, V, C, RATE, TABLE, O, LSE, DO, DQ, DELTA, DSUMS, DRATE, DC, CU_SEQLENS, BLOCKS,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    n_batch, n_heads, n_queries, n_keys, n_blocks, n_sequences, scale,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, VARLEN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """First pass of backward, one query tile of one head a program: dq and what the bias needs.

    O, DO, DQ: (B, T, H, D) contiguous. DELTA, DRATE, DC: (B, H, T) float32: do . o, and the sums over keys of
    g b'(u) u and of g b'(u) d / (1 + c d). DSUMS: (B, H, tiles, WIDTH + 1, 2) float32, zeros: for each kink the sums
    of g and of g u over the tile's pairs above it, and over all pairs last.
    """
    pid = tl.program_id(0)
    i_h = pid % n_heads
    i_b = ((pid // n_heads) % n_batch).to(tl.int64)
    i_tile = n_blocks - 1 - pid // (n_heads * n_batch)
    i_m, i_s, start, n_q, n_k = _locate(i_tile, BLOCKS, CU_SEQLENS, n_queries, n_keys, n_sequences, VARLEN)
    if i_m < 0:
        return
    Q += _first_row(i_b, start, i_h, stride_qb, stride_qt, stride_qh)
    K += _first_row(i_b, start, i_h // GROUP, stride_kb, stride_kt, stride_kh)
    V += _first_row(i_b, start, i_h // GROUP, stride_vb, stride_vt, stride_vh)
    o_d = tl.arange(0, BLOCK_D)
    o_key = tl.arange(0, BLOCK_N)
    o_unit = tl.arange(0, WIDTH)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < n_q
    first = i_m * BLOCK_M + n_k - n_q
    last = tl.minimum(first + BLOCK_M, n_k) - 1
    RATE += start
    c = tl.load(C)
    b_rate = tl.load(RATE + o_m, mask=m_m, other=0.0)
    fast, slow = tl.load(RATE + i_m * BLOCK_M), tl.load(RATE + last - (n_k - n_q))
    b_kinks = tl.load(TABLE + o_unit)
    b_i = (o_m + (n_k - n_q)).to(tl.float32)
    rows = ((i_b * n_queries + start + o_m) * n_heads + i_h).to(tl.int64)
    p_rows = rows[:, None] * D + o_d[None, :]
    m_rows = m_m[:, None] & (o_d < D)[None, :]
    i_row = (i_b * n_heads + i_h) * n_queries + start + o_m
    b_q = _load(Q, o_m, o_d, stride_qt, n_q, D, True)
    b_do = tl.load(DO + p_rows, mask=m_rows, other=0.0)
    b_delta = tl.sum(b_do.to(tl.float32) * tl.load(O + p_rows, mask=m_rows, other=0.0).to(tl.float32), 1)
    tl.store(DELTA + i_row, b_delta, mask=m_m)
    # rows past the end have no weights
    b_lse = tl.load(LSE + i_row, mask=m_m, other=float("inf"))
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    b_drate = tl.zeros([BLOCK_M], dtype=tl.float32)
    b_dc = tl.zeros([BLOCK_M], dtype=tl.float32)
    # sums over the keys so far, and what the kinks have got of them
    b_g_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    b_gu_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    b_sums = tl.zeros([WIDTH, 2], dtype=tl.float32)
    below_before = first * 0 + WIDTH
    n_tiles = last // BLOCK_N + 1
    n_full = (first + 1) // BLOCK_N
    for masked in tl.static_range(2):
        for i_n in range(0 if masked == 0 else n_full, n_full if masked == 0 else n_tiles):
            o_n = i_n * BLOCK_N
            b_k = _load(K + tl.cast(o_n, tl.int64) * stride_kt, o_key, o_d, stride_kt, n_k - o_n, D, masked == 1)
            b_v = _load(V + tl.cast(o_n, tl.int64) * stride_vt, o_key, o_d, stride_vt, n_k - o_n, D, masked == 1)
            below, some = _interval(b_kinks, first - o_n - BLOCK_N + 1, last - o_n, c, slow, fast)
            b_j = (o_n + o_key).to(tl.float32)
            b_d, b_reach = _reach(b_i[:, None], b_j[None, :], c, masked == 1)
            b_u = _log2(b_reach, EXACT) * b_rate[:, None]
            b_bias, b_slope = _bias(b_u, below, some - below, TABLE, i_h, n_heads, WIDTH, True)
            b_p = _exp2(_product(b_q, tl.trans(b_k), EXACT) * scale + b_bias - b_lse[:, None])
            if masked == 1:
                b_p = tl.where(b_i[:, None] >= b_j[None, :], b_p, 0.0)
            b_g = b_p * (_product(b_do, tl.trans(b_v), EXACT) - b_delta[:, None])
            b_dq += _product(b_g.to(b_k.dtype), b_k, EXACT)
            b_gu = b_g * b_u
            b_drate += tl.sum(b_gu * b_slope, 1)
            b_dc += tl.sum(b_g * b_slope * (b_d * _reciprocal(b_reach)), 1)
            if below < below_before:
                b_pair = tl.sum(tl.join(b_g_sum, b_gu_sum), 0)
                m_entered = (o_unit >= below) & (o_unit < below_before)
                b_sums += tl.where(m_entered[:, None], b_pair[None, :], 0.0)
                below_before = below
            if some > below:
                for k in range(below, some):
                    b_sums = _above(b_sums, b_g, b_gu, b_u, tl.load(TABLE + k), o_unit == k)
            b_g_sum += tl.sum(b_g, 1)
            b_gu_sum += tl.sum(b_gu, 1)
    b_pair = tl.sum(tl.join(b_g_sum, b_gu_sum), 0)
    b_sums += tl.where((o_unit < below_before)[:, None], b_pair[None, :], 0.0)
    o_pair = tl.arange(0, 2)
    p_sums = DSUMS + ((i_b * n_heads + i_h) * n_blocks + i_tile) * (2 * WIDTH + 2)
    tl.store(p_sums + o_unit[:, None] * 2 + o_pair[None, :], b_sums)
    tl.store(p_sums + 2 * WIDTH + o_pair, b_pair)
    # in log2 units the scale and the slopes had a factor that the gradients have not
    tl.store(DQ + p_rows, (b_dq * (scale * 0.6931471805599453)).to(DQ.dtype.element_ty), mask=m_rows)
    tl.store(DRATE + i_row, b_drate * 0.6931471805599453, mask=m_m)
    tl.store(DC + i_row, b_dc * 0.6931471805599453, mask=m_m)


@triton.jit
def key_kernel(
    Q, K, V, C, RATE, TABLE, LSE, DO, DELTA, DK, DV, CU_SEQLENS, BLOCKS,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    n_batch, n_heads, n_queries, n_keys, n_blocks, n_sequences, scale,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, VARLEN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Second pass of backward, one key tile of one key-value head a program: dk and dv, (B, S, G, D) contiguous.

    BLOCKS counts key tiles here. Tiles are (keys, queries), so that weights are taken from registers.
    """
    pid = tl.program_id(0)
    n_groups = n_heads // GROUP
    i_g = pid % n_groups
    i_b = ((pid // n_groups) % n_batch).to(tl.int64)
    # the oldest keys, seen by most queries, first
    i_n, i_s, start, n_q, n_k = _locate(
        pid // (n_groups * n_batch), BLOCKS, CU_SEQLENS, n_queries, n_keys, n_sequences, VARLEN
    )  # fmt: skip
    if i_n < 0:
        return
    o_d = tl.arange(0, BLOCK_D)
    o_m = tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    past = n_k - n_q
    RATE += start
    c = tl.load(C)
    b_kinks = tl.load(TABLE + tl.arange(0, WIDTH))
    b_j = o_n.to(tl.float32)
    b_k = _load(K + _first_row(i_b, start, i_g, stride_kb, stride_kt, stride_kh), o_n, o_d, stride_kt, n_k, D, True)
    b_v = _load(V + _first_row(i_b, start, i_g, stride_vb, stride_vt, stride_vh), o_n, o_d, stride_vt, n_k, D, True)
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    # query tiles from the first that sees a key of this tile; those on the diagonal need a mask
    n_tiles = (n_q + BLOCK_M - 1) // BLOCK_M
    first = tl.maximum(i_n * BLOCK_N - past, 0) // BLOCK_M
    n_diagonal = tl.minimum((tl.maximum(i_n * BLOCK_N + BLOCK_N - 1 - past, 0) + BLOCK_M - 1) // BLOCK_M, n_tiles)
    P_Q = Q + _first_row(i_b, start, i_g * GROUP, stride_qb, stride_qt, stride_qh)
    for i_member in range(GROUP):
        i_h = i_g * GROUP + i_member
        P_DO = DO + ((i_b * n_queries + start) * n_heads + i_h) * D
        row = (i_b * n_heads + i_h) * n_queries + start
        for masked in tl.static_range(2):
            for i_m in range(n_diagonal if masked == 0 else first, n_tiles if masked == 0 else n_diagonal):
                o_row = i_m * BLOCK_M + o_m
                m_row = o_row < n_q
                last = tl.minimum(i_m * BLOCK_M + BLOCK_M, n_q) - 1
                b_q = _load(P_Q, o_row, o_d, stride_qt, n_q, D, True)
                b_do = _load(P_DO, o_row, o_d, n_heads * D, n_q, D, True)
                b_rate = tl.load(RATE + o_row, mask=m_row, other=0.0)
                b_lse = tl.load(LSE + row + o_row, mask=m_row, other=float("inf"))
                b_delta = tl.load(DELTA + row + o_row, mask=m_row, other=0.0)
                below, some = _interval(
                    b_kinks, i_m * BLOCK_M + past - i_n * BLOCK_N - BLOCK_N + 1, last + past - i_n * BLOCK_N, c,
                    tl.load(RATE + last), tl.load(RATE + i_m * BLOCK_M),
                )  # fmt: skip
                b_i = (o_row + past).to(tl.float32)
                _, b_reach = _reach(b_i[None, :], b_j[:, None], c, masked == 1)
                b_u = _log2(b_reach, EXACT) * b_rate[None, :]
                b_bias, _ = _bias(b_u, below, some - below, TABLE, i_h, n_heads, WIDTH, False)
                b_p = _exp2(_product(b_k, tl.trans(b_q), EXACT) * scale + b_bias - b_lse[None, :])
                if masked == 1:
                    b_p = tl.where(b_i[None, :] >= b_j[:, None], b_p, 0.0)
                b_dv += _product(b_p.to(b_do.dtype), b_do, EXACT)
                b_g = b_p * (_product(b_v, tl.trans(b_do), EXACT) - b_delta[None, :])
                b_dk += _product(b_g.to(b_q.dtype), b_q, EXACT)
        P_Q += stride_qh
    p_rows = ((i_b * n_keys + start + o_n) * n_groups + i_g).to(tl.int64)[:, None] * D + o_d[None, :]
    m_rows = (o_n < n_k)[:, None] & (o_d < D)[None, :]
    tl.store(DK + p_rows, (b_dk * (scale * 0.6931471805599453)).to(DK.dtype.element_ty), mask=m_rows)
    tl.store(DV + p_rows, b_dv.to(DV.dtype.element_ty), mask=m_rows)


def tiles(kernel: str, head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile sizes and launch options of `forward`, `query` or `key`, for sm_80 and later."""
    block_d = max(16, triton.next_power_of_2(head_dim))
    if dtype == torch.float32:
        size = 64 if block_d <= 64 else 32 if block_d == 128 else 16
        block_m, block_n, warps, stages = size, min(size, 32), 4, 1
    elif block_d == 256:
        block_m, block_n, warps, stages = 64, 32, 4, 2 if kernel == "forward" else 1
    else:
        # larger ones spill; on sm_80 ptxas then keeps next to nothing in registers
        block_m, block_n = {"forward": (64, 64), "query": (64, 32), "key": (32, 64)}[kernel]
        warps, stages = 4, 2
    return {"BLOCK_D": block_d, "BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}


def table_shape(w2: Tensor) -> tuple[int, int]:
    """Shape of TABLE for the network's last layer (H, K)."""
    return 1 + 3 * w2.shape[0], 1 << w2.shape[1].bit_length()


def pieces(w1: Tensor, b1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
    """TABLE of the network sum_m w2_hm relu(w1_m u + b1_m), and the order (K,) that sorts its units by their kinks.

    Its rows: the kinks, rising; then for each head what each kink bends; the slope of the segment above so many kinks;
    and where its line would be at u = 0. All but the kinks are in log2 units. Past the last, kinks are at infinity.
    """
    units = len(w1)
    w1, b1, w2 = w1.double(), b1.double(), w2.double()
    kinks, order = torch.where(w1 == 0, math.inf, -b1 / w1).float().sort()
    rise, start, weight = w1[order], b1[order], w2[:, order]
    place = torch.arange(units, device=w1.device)
    segment = torch.arange(units + 1, device=w1.device)[:, None]
    # whether a unit (column) is above 0 in a segment (row); a flat one is so everywhere or nowhere
    active = torch.where(rise > 0, place < segment, torch.where(rise < 0, place >= segment, start > 0))
    table = torch.zeros(table_shape(w2), dtype=torch.float64, device=w1.device)
    table[0] = math.inf
    table[0, :units] = kinks
    bends, slopes, shifts = table[1:].unflatten(0, (3, -1))
    bends[:, :units] = weight * rise.abs() * LOG2_E
    slopes[:, : units + 1] = ((weight * rise)[:, None] * active).sum(-1) * LOG2_E
    shifts[:, : units + 1] = ((weight * start)[:, None] * active).sum(-1) * LOG2_E
    return table.float(), order


def forward(
    q: Tensor, k: Tensor, v: Tensor, c: Tensor, bottom: Tensor, w1: Tensor, b1: Tensor, w2: Tensor,
    cu_seqlens: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Output (B, T, H, D), the log2 of what each softmax divides by (B, H, T), and TABLE and order of `pieces`."""
    q, k, v = _rows(q), _rows(k), _rows(v)
    batch, n_queries, heads, dim = q.shape
    options = tiles("forward", dim, q.dtype)
    table, order = pieces(w1, b1, w2)
    out = torch.empty((batch, n_queries, heads, dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, n_queries), dtype=torch.float32, device=q.device)
    n_blocks, blocks, n_sequences = triton.cdiv(n_queries, options["BLOCK_M"]), None, 0
    if cu_seqlens is not None:
        n_sequences = len(cu_seqlens) - 1
        n_blocks += n_sequences
        blocks = _cumulative(_blocks(cu_seqlens, options["BLOCK_M"]))
    forward_kernel[(n_blocks * batch * heads,)](
        q, k, v, c, math.log(2) / bottom, table, out, lse, cu_seqlens, blocks,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        batch, heads, n_queries, k.shape[1], n_blocks, n_sequences, scale * LOG2_E,
        GROUP=heads // k.shape[2], WIDTH=table.shape[1], D=dim, VARLEN=cu_seqlens is not None,
        EXACT=q.dtype == torch.float32, **options,
    )  # fmt: skip
    return out, lse, table, order


def backward(
    q: Tensor, k: Tensor, v: Tensor, c: Tensor, bottom: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, out: Tensor,
    lse: Tensor, table: Tensor, order: Tensor, dout: Tensor, cu_seqlens: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, c, bottom, w1, b1 and w2, in their dtypes."""
    q, k, v, dout = _rows(q), _rows(k), _rows(v), dout.contiguous()
    batch, n_queries, heads, dim = q.shape
    n_keys, groups = k.shape[1:3]
    options, key_options = tiles("query", dim, q.dtype), tiles("key", dim, q.dtype)
    dq = torch.empty((batch, n_queries, heads, dim), dtype=q.dtype, device=q.device)
    dk, dv = (torch.empty((batch, n_keys, groups, dim), dtype=q.dtype, device=q.device) for _ in range(2))
    n_blocks, n_key_blocks = triton.cdiv(n_queries, options["BLOCK_M"]), triton.cdiv(n_keys, key_options["BLOCK_N"])
    n_sequences, blocks, key_blocks = 0, None, None
    if cu_seqlens is not None:
        n_sequences = len(cu_seqlens) - 1
        n_blocks, n_key_blocks = n_blocks + n_sequences, n_key_blocks + n_sequences
        blocks = _cumulative(_blocks(cu_seqlens, options["BLOCK_M"]))
        key_blocks = _cumulative(_blocks(cu_seqlens, key_options["BLOCK_N"]))
    delta, drate, dc = torch.empty((3, batch, heads, n_queries), dtype=torch.float32, device=q.device)
    dsums = torch.zeros((batch, heads, n_blocks, table.shape[1] + 1, 2), dtype=torch.float32, device=q.device)
    rate = math.log(2) / bottom
    strides = *q.stride()[:3], *k.stride()[:3], *v.stride()[:3]
    constants = {
        "GROUP": heads // groups, "WIDTH": table.shape[1], "D": dim, "VARLEN": cu_seqlens is not None,
        "EXACT": q.dtype == torch.float32,
    }  # fmt: skip
    query_kernel[(n_blocks * batch * heads,)](
        q, k, v, c, rate, table, out, lse, dout, dq, delta, dsums, drate, dc, cu_seqlens, blocks, *strides,
        batch, heads, n_queries, n_keys, n_blocks, n_sequences, scale * LOG2_E, **constants, **options,
    )  # fmt: skip
    key_kernel[(n_key_blocks * batch * groups,)](
        q, k, v, c, rate, table, lse, dout, delta, dk, dv, cu_seqlens, key_blocks, *strides,
        batch, heads, n_queries, n_keys, n_key_blocks, n_sequences, scale * LOG2_E, **constants, **key_options,
    )  # fmt: skip
    dw1, db1, dw2 = _network_gradients(dsums.sum((0, 2), dtype=torch.float64), order, w1, b1, w2)
    # of every query's u = log(1 + c d) / bottom; in part the two cancel
    dc, drate = (x.sum((0, 1), dtype=torch.float64) / bottom for x in (dc, drate))
    return dq, dk, dv, dc.sum().to(c.dtype), -drate.to(bottom.dtype), dw1, db1, dw2


def _network_gradients(
    sums: Tensor, order: Tensor, w1: Tensor, b1: Tensor, w2: Tensor
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of w1, b1 and w2 for the sums of g and g u above each kink, (H, WIDTH + 1, 2), over all pairs last."""
    everything = sums[:, -1:]
    above = torch.empty_like(sums[:, : len(w1)])
    above[:, order] = sums[:, : len(w1)]
    rise, flat = w1[:, None], torch.where(b1[:, None] > 0, everything, 0.0)
    dg, dgu = torch.where(rise > 0, above, torch.where(rise < 0, everything - above, flat)).unbind(-1)
    dw1, db1 = (w2 * dgu).sum(0), (w2 * dg).sum(0)
    return dw1.to(w1.dtype), db1.to(b1.dtype), (w1 * dgu + b1 * dg).to(w2.dtype)
