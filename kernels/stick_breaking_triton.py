"""Triton kernels of stick-breaking attention; `stick_breaking.py` has the mathematics and is the way in.

Every kernel walks from the newest key a query sees towards the past and carries, per query, the stick that is left.
Four ideas, measured in NOTES.md:

- Linear, no logarithms. With t = exp(z), u = 1 + t, a key breaks off t / u of the stick and leaves 1 / u. Four keys in
  a row (0 the oldest) share one reciprocal: with s the stick that all four leave and p_k = u_0 ... u_k,

      q_k = t_k p_(k-1)        p_k = p_(k-1) + q_k        A_k = q_k s        s = stick / p_3
      beta_k = q_k / p_k, for which        w_k = 1 / p_k:        w_(k-1) = w_k + t_k w_k

  All terms are positive, so that nothing cancels. Logits are in log2 units and end at 30, where a key leaves 2^-30:
  four of them stay far inside float32.
- Keys of a tile are loaded in the order in which tensor cores deal out the columns of a product: each of the four
  threads that share a row gets a quarter of the tile, keys in a row. Scans then run inside a thread, and two exchanges
  join the quarters.
- Backward needs no snapshot of the forward walk: with delta_i = do_i . o_i = sum_l g_il (see stick_breaking.py),

      sum_{l <= j} g_il = delta_i - sum_{l > j} g_il

  so that it walks the same way as forward. Where less than 2^-24 of the stick is left the difference is rounding noise
  around a value that small, and is set to 0.
- Two passes and no atomics: one program for a query tile finds dq and leaves the state of its walk at every key tile;
  then one program for a key tile collects dk and dv from the query tiles, in one order. Same inputs, same bits. States
  of as many heads at a time are kept as fit `STATE_BYTES`.

Forward writes for each query tile the key at which its walk stopped, and backward stops there.

Variable grammar: i_ index, o_ offsets, p_ pointers, m_ masks, b_ block values.
"""

import math
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = math.log2(math.e)
# float32 cannot resolve a smaller share of the stick
RESOLUTION = tl.constexpr(2.0**-24)
# the interpreter has no inline assembly
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
STATE_BYTES = 512 << 20


@triton.jit
def _exp2(x):
    if INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
    )  # fmt: skip


@triton.jit
def _reciprocal(x):
    if INTERPRETED:
        return 1.0 / x
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
    )  # fmt: skip


@triton.jit
def _product(a, b, EXACT: tl.constexpr):
    if EXACT:
        return tl.dot(a, b, input_precision="tf32x3")
    else:
        return tl.dot(a, b)


@triton.jit
def _key_order(BLOCK_N: tl.constexpr):
    """Key of each column: column 8 i + 2 q + r of a product belongs to thread q of four, which gets keys in a row."""
    o_column = tl.arange(0, BLOCK_N)
    return o_column % 8 // 2 * (BLOCK_N // 4) + o_column // 8 * 2 + o_column % 2


@triton.jit
def _quads(x):
    """(M, N) in the order of _key_order to four (M, 4, N / 16): oldest to newest of each four keys."""
    M: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    x = tl.permute(tl.reshape(x, [M, N // 8, 4, 2]), (0, 2, 1, 3))
    even, odd = tl.split(tl.reshape(x, [M, 4, N // 16, 2, 2]))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def _columns(x0, x1, x2, x3):
    """The inverse of _quads."""
    M: tl.constexpr = x0.shape[0]
    N: tl.constexpr = x0.shape[2] * 16
    x = tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), [M, 4, N // 8, 2])
    return tl.reshape(tl.permute(x, (0, 2, 1, 3)), [M, N])


@triton.jit
def _join(a, b, ADD: tl.constexpr):
    if ADD:
        return a + b
    else:
        return a * b


@triton.jit
def _newer_quarters(x, b_carry, ADD: tl.constexpr):
    """Scan the quarters x (M, 4): the carry joined with all newer quarters (M, 4), and with all four (M,)."""
    M: tl.constexpr = x.shape[0]
    unit = 0.0 if ADD else 1.0
    pairs = tl.reshape(x, [M, 2, 2])
    i_last = tl.arange(0, 2)[None, None, :]
    i_middle = tl.arange(0, 2)[None, :]
    newer = tl.sum(tl.where(i_last == 1, pairs, 0.0), 2)
    both = _join(newer, tl.sum(tl.where(i_last == 0, pairs, 0.0), 2), ADD)
    newer_pair = tl.sum(tl.where(i_middle == 1, both, 0.0), 1)
    total = _join(newer_pair, tl.sum(tl.where(i_middle == 0, both, 0.0), 1), ADD)
    outer = _join(tl.where(i_middle == 0, newer_pair[:, None], unit), b_carry[:, None], ADD)
    inner = tl.where(i_last == 0, newer[:, :, None], unit)
    return tl.reshape(_join(inner, outer[:, :, None], ADD), [M, 4]), _join(total, b_carry, ADD)


@triton.jit
def _scan(x, b_carry, ADD: tl.constexpr):
    """Scan x (M, 4, G) from the newest group: the carry joined with this and all newer groups, and with all (M,)."""
    M: tl.constexpr = x.shape[0]
    G: tl.constexpr = x.shape[2]
    tl.static_assert(G <= 4)
    if G == 1:
        x0 = tl.reshape(x, [M, 4])
        newer, b_carry = _newer_quarters(x0, b_carry, ADD)
        return tl.reshape(_join(x0, newer, ADD), [M, 4, 1]), b_carry
    elif G == 2:
        x0, x1 = tl.split(x)
        x0 = _join(x0, x1, ADD)
        newer, b_carry = _newer_quarters(x0, b_carry, ADD)
        return _join(tl.join(x0, x1), newer[:, :, None], ADD), b_carry
    else:
        even, odd = tl.split(tl.reshape(x, [M, 4, 2, 2]))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        x2 = _join(x2, x3, ADD)
        x1 = _join(x1, x2, ADD)
        x0 = _join(x0, x1, ADD)
        newer, b_carry = _newer_quarters(x0, b_carry, ADD)
        x = tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), [M, 4, 4])
        return _join(x, newer[:, :, None], ADD), b_carry


@triton.jit
def _odds(b_products, scale, b_bias, m_tile, MASKED: tl.constexpr):
    """exp of the logits, which `scale` and `b_bias` give in log2 units; 0 where masked."""
    b_logit = tl.minimum(b_products * scale + b_bias, 30.0)
    if MASKED:
        b_logit = tl.where(m_tile, b_logit, float("-inf"))
    return _exp2(b_logit)


@triton.jit
def _prefixes(b_odds):
    """q_0 ... q_3 and t_1 ... t_3 of each four keys, and the product of their u, (M, 4, N / 16) each."""
    q0, t1, t2, t3 = _quads(b_odds)
    p = 1.0 + q0
    q1 = t1 * p
    p += q1
    q2 = t2 * p
    p += q2
    q3 = t3 * p
    return q0, q1, q2, q3, t1, t2, t3, p + q3


@triton.jit
def _rounded(x0, x1, x2, x3, DTYPE: tl.constexpr):
    """Four numbers as DTYPE has them, in float32; bfloat16 two at a time: one alone would take as long as an exp2."""
    if INTERPRETED or DTYPE != tl.bfloat16:
        return (
            x0.to(DTYPE).to(tl.float32), x1.to(DTYPE).to(tl.float32), x2.to(DTYPE).to(tl.float32),
            x3.to(DTYPE).to(tl.float32),
        )  # fmt: skip
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 x;
        .reg .b32 y;
        cvt.rn.bf16x2.f32 x, $5, $4;
        cvt.rn.bf16x2.f32 y, $7, $6;
        shl.b32 $0, x, 16;
        and.b32 $1, x, 0xffff0000;
        shl.b32 $2, y, 16;
        and.b32 $3, y, 0xffff0000;
        }""",
        "=r,=r,=r,=r,r,r,r,r", [x0, x1, x2, x3], dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True,
        pack=1,
    )  # fmt: skip


@triton.jit
def _find_sequence(i_block, BLOCKS, n_sequences):
    """Index of the packed sequence whose tiles include tile i_block; BLOCKS counts tiles cumulatively."""
    low = 0
    high = n_sequences
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(BLOCKS + middle)
        low = tl.where(before <= i_block, middle, low)
        high = tl.where(before <= i_block, high, middle)
    return low


@triton.jit
def _locate(i_tile, BLOCKS, CU_SEQLENS, n_queries, n_keys, n_sequences, VARLEN: tl.constexpr):
    """Tile within its sequence (-1: no work), sequence, first row, queries, keys; of tile i_tile of the row."""
    i_s = i_tile * 0
    start = i_s
    if VARLEN:
        if i_tile < tl.load(BLOCKS + n_sequences):
            i_s = _find_sequence(i_tile, BLOCKS, n_sequences)
            i_tile -= tl.load(BLOCKS + i_s)
            start = tl.load(CU_SEQLENS + i_s)
            n_queries = tl.load(CU_SEQLENS + i_s + 1) - start
            n_keys = n_queries
        else:
            i_tile = -1
    return i_tile, i_s, start.to(tl.int64), n_queries, n_keys


@triton.jit
def _first_row(i_b, start, i_h, stride_b, stride_t, stride_h):
    """Where a head's rows begin; with heads outermost they may be further apart than 32 bits count."""
    return i_b * stride_b + start * stride_t + i_h.to(tl.int64) * stride_h


@triton.jit
def _load(P, o_rows, o_d, stride, n_rows, D: tl.constexpr, MASKED: tl.constexpr):
    """Rows o_rows of a (rows, D) matrix; what lies outside is 0."""
    BLOCK_D: tl.constexpr = o_d.shape[0]
    p_rows = P + o_rows.to(tl.int64)[:, None] * stride + o_d[None, :]
    if MASKED:
        return tl.load(p_rows, mask=(o_rows < n_rows)[:, None] & (o_d < D)[None, :], other=0.0)
    elif D < BLOCK_D:
        return tl.load(p_rows, mask=(o_d < D)[None, :], other=0.0)
    else:
        return tl.load(p_rows)


@triton.jit
def _forward_tile(
    i_n, b_q, b_acc, b_left, b_bias, K, V, o_key, o_pos, o_d, stride_kt, stride_vt, n_keys, scale,
    D: tl.constexpr, BLOCK_N: tl.constexpr, CURRENT: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    o_n = i_n * BLOCK_N
    K += tl.cast(o_n, tl.int64) * stride_kt
    V += tl.cast(o_n, tl.int64) * stride_vt
    b_k = _load(K, o_key, o_d, stride_kt, n_keys - o_n, D, MASKED)
    b_v = _load(V, o_key, o_d, stride_vt, n_keys - o_n, D, MASKED)
    m_tile = (o_n + o_key)[None, :] < o_pos[:, None] + CURRENT
    b_odds = _odds(_product(b_q, tl.trans(b_k), EXACT), scale, b_bias, m_tile, MASKED)
    q0, q1, q2, q3, _, _, _, p = _prefixes(b_odds)
    b_stick, b_left = _scan(_reciprocal(p), b_left, False)
    b_weight = _columns(q0 * b_stick, q1 * b_stick, q2 * b_stick, q3 * b_stick)
    b_acc += _product(b_weight.to(b_v.dtype), b_v, EXACT)
    return b_acc, b_left


@triton.jit
def forward_kernel(
    Q, K, V, BIAS, O, RESIDUAL, REMAINDER, STOP, CU_SEQLENS, BLOCKS,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    n_batch, n_heads, n_queries, n_keys, n_blocks, n_sequences, scale, epsilon,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    LOOK: tl.constexpr, CURRENT: tl.constexpr, VARLEN: tl.constexpr, SKIP: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One query tile of one head a program, latest tiles first; heads that share keys lie next to each other.

    O, RESIDUAL: (B, T, H, D) contiguous; REMAINDER: (B, T, H) float32; STOP: (B, H, tiles) int32, the oldest key
    visited.
    """
    pid = tl.program_id(0)
    i_h = pid % n_heads
    i_b = ((pid // n_heads) % n_batch).to(tl.int64)
    i_tile = n_blocks - 1 - pid // (n_heads * n_batch)
    i_m, i_s, start, n_q, n_k = _locate(i_tile, BLOCKS, CU_SEQLENS, n_queries, n_keys, n_sequences, VARLEN)
    if i_m < 0:
        return
    i_g = i_h // GROUP
    K += _first_row(i_b, start, i_g, stride_kb, stride_kt, stride_kh)
    V += _first_row(i_b, start, i_g, stride_vb, stride_vt, stride_vh)
    o_d = tl.arange(0, BLOCK_D)
    o_key = _key_order(BLOCK_N)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < n_q
    o_pos = o_m + (n_k - n_q)
    b_q = _load(Q + _first_row(i_b, start, i_h, stride_qb, stride_qt, stride_qh), o_m, o_d, stride_qt, n_q, D, True)
    b_bias = 0.0
    if BIAS is not None:
        b_bias = tl.load(BIAS + i_h) * 1.4426950408889634
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    # rows past the end have no stick, so that they keep no tile alive
    b_left = tl.where(m_m, 1.0, 0.0)

    first = i_m * BLOCK_M + n_k - n_q
    end = tl.minimum(first + BLOCK_M, n_k) - 1 + CURRENT
    n_tiles = tl.maximum((end + BLOCK_N - 1) // BLOCK_N, 0)
    n_full = tl.minimum(tl.maximum((first + CURRENT) // BLOCK_N, 0), n_tiles)
    for i in range(n_full, n_tiles):
        b_acc, b_left = _forward_tile(
            n_tiles - 1 - (i - n_full), b_q, b_acc, b_left, b_bias, K, V, o_key, o_pos, o_d, stride_kt, stride_vt, n_k,
            scale, D, BLOCK_N, CURRENT, True, EXACT,
        )  # fmt: skip
    i_n = n_full
    if SKIP:
        while (i_n > 0) & (tl.max(b_left, 0) > epsilon):
            look = tl.minimum(i_n, LOOK)
            for i in range(look):
                b_acc, b_left = _forward_tile(
                    i_n - 1 - i, b_q, b_acc, b_left, b_bias, K, V, o_key, o_pos, o_d, stride_kt, stride_vt, n_k, scale,
                    D, BLOCK_N, CURRENT, False, EXACT,
                )  # fmt: skip
            i_n -= look
    else:
        for i in range(i_n):
            b_acc, b_left = _forward_tile(
                i_n - 1 - i, b_q, b_acc, b_left, b_bias, K, V, o_key, o_pos, o_d, stride_kt, stride_vt, n_k, scale,
                D, BLOCK_N, CURRENT, False, EXACT,
            )  # fmt: skip
        i_n = 0

    rows = (i_b * n_queries + start + o_m) * n_heads + i_h
    p_rows = rows[:, None] * D + o_d[None, :]
    m_rows = m_m[:, None] & (o_d < D)[None, :]
    b_o = b_acc.to(O.dtype.element_ty)
    tl.store(O + p_rows, b_o, mask=m_rows)
    if RESIDUAL is not None:
        tl.store(RESIDUAL + p_rows, (b_acc - b_o.to(tl.float32)).to(O.dtype.element_ty), mask=m_rows)
    tl.store(STOP + (i_b * n_heads + i_h) * n_blocks + i_tile, i_n * BLOCK_N)
    tl.store(REMAINDER + rows, b_left, mask=m_m)


@triton.jit
def _backward_tile(
    b_products, b_dweights, b_left, b_later, b_delta, b_drem, b_bias, m_tile, scale,
    MASKED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Weights and gradients of the logits (M, N), both in DTYPE; the stick and the sum of g after this tile."""
    q0, q1, q2, q3, t1, t2, t3, p = _prefixes(_odds(b_products, scale, b_bias, m_tile, MASKED))
    d0, d1, d2, d3 = _quads(b_dweights)
    w3 = _reciprocal(p)
    s, b_left = _scan(w3, b_left, False)
    # rounded as in forward, so that the sum of g is do . o, not that and the rounding errors of all weights
    a0, a1, a2, a3 = _rounded(q0 * s, q1 * s, q2 * s, q3 * s, DTYPE)
    g0, g1, g2, g3 = a0 * d0, a1 * d1, a2 * d2, a3 * d3
    since, b_later = _scan((g0 + g1) + (g2 + g3), b_later, True)
    w2 = w3 + t3 * w3
    w1 = w2 + t2 * w2
    w0 = w1 + t1 * w1
    # sum of g over all keys older than the four
    b_older = tl.where(s > RESOLUTION, b_delta[:, None, None] - since, 0.0) + b_drem[:, None, None]
    b_older += g0
    z0 = g0 - (q0 * w0) * b_older
    b_older += g1
    z1 = g1 - (q1 * w1) * b_older
    b_older += g2
    z2 = g2 - (q2 * w2) * b_older
    b_older += g3
    z3 = g3 - (q3 * w3) * b_older
    return _columns(a0, a1, a2, a3).to(DTYPE), _columns(z0, z1, z2, z3), b_left, b_later


@triton.jit
def _state_slot(i_m, n_past, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where the states of query tile i_m begin, in tiles of BLOCK_M rows: earlier tiles see fewer keys."""
    ratio: tl.constexpr = BLOCK_M // BLOCK_N
    past = (n_past + BLOCK_N - 1) // BLOCK_N + 1
    i_m = tl.cast(i_m, tl.int64)
    return ratio * (i_m * (i_m + 1) // 2) + past * i_m


@triton.jit
def _chunk(n_chunk, n_slots, n_all, SLOTS, n_sequences, VARLEN: tl.constexpr):
    """Key-value heads that a launch of backward works on, i_launch * n_chunk and on, and the slots of one.

    What packed sequences take only the device knows: as many heads as fit the room that is there. The launches that are
    then left have nothing to do.
    """
    if VARLEN:
        used = tl.maximum(tl.load(SLOTS + n_sequences), 1)
        n_chunk = tl.minimum(tl.cast(n_slots, tl.int64) * n_chunk // used, n_all).to(tl.int32)
        n_slots = used
    return n_chunk, n_slots


@triton.jit
def query_kernel(
    Q, K, V, BIAS, O, RESIDUAL, REMAINDER, STOP, DO, DREMAINDER, DQ, DBIAS, STATE, DELTA, REACH, CU_SEQLENS, BLOCKS,
    FORWARD_BLOCKS, SLOTS,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    i_launch, n_chunk, n_batch, n_heads, n_queries, n_keys, n_blocks, n_forward_blocks, n_key_blocks, n_sequences,
    n_slots, scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    FORWARD_M: tl.constexpr, CURRENT: tl.constexpr, VARLEN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """First pass of backward, one query tile of one head a program: dq, and the state at each key tile.

    Heads are those of the launch, see `_chunk`. O, RESIDUAL, DO, DQ: (B, T, H, D) contiguous; REMAINDER, DREMAINDER:
    (B, T, H) float32; STATE: (heads of a launch, slots, 2, BLOCK_M) float32: stick left and sum of g before a key tile;
    DELTA: (B, H, 2, T) float32; REACH: (B, H, key tiles) int32, zeros: one more than the latest query tile that goes no
    further than this key tile; DBIAS: (B, H, tiles) float32.
    """
    pid = tl.program_id(0)
    n_groups = n_heads // GROUP
    n_chunk, n_slots = _chunk(n_chunk, n_slots, n_batch * n_groups, SLOTS, n_sequences, VARLEN)
    i_head = pid % (n_chunk * GROUP)
    i_tile = n_blocks - 1 - pid // (n_chunk * GROUP)
    i_bg = i_launch * n_chunk + i_head // GROUP
    if (i_tile < 0) | (i_bg >= n_batch * n_groups):
        return
    i_m, i_s, start, n_q, n_k = _locate(i_tile, BLOCKS, CU_SEQLENS, n_queries, n_keys, n_sequences, VARLEN)
    i_b = (i_bg // n_groups).to(tl.int64)
    i_g = i_bg % n_groups
    i_h = i_g * GROUP + i_head % GROUP
    i_bh = i_b * n_heads + i_h
    if i_m < 0:
        if BIAS is not None:
            tl.store(DBIAS + i_bh * n_blocks + i_tile, 0.0)
        return
    o_d = tl.arange(0, BLOCK_D)
    o_key = _key_order(BLOCK_N)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < n_q
    o_pos = o_m + (n_k - n_q)
    Q += _first_row(i_b, start, i_h, stride_qb, stride_qt, stride_qh)
    K += _first_row(i_b, start, i_g, stride_kb, stride_kt, stride_kh)
    V += _first_row(i_b, start, i_g, stride_vb, stride_vt, stride_vh)
    slot = i_head.to(tl.int64) * n_slots + _state_slot(i_m, n_k - n_q, BLOCK_M, BLOCK_N)
    i_forward = i_m * BLOCK_M // FORWARD_M
    i_key_tile = 0
    if VARLEN:
        slot += tl.load(SLOTS + i_s)
        i_forward += tl.load(FORWARD_BLOCKS + i_s)
        i_key_tile = tl.load(CU_SEQLENS + i_s) // BLOCK_N + i_s
    p_state = STATE + slot * (2 * BLOCK_M) + tl.arange(0, BLOCK_M)
    low = tl.load(STOP + i_bh * n_forward_blocks + i_forward) // BLOCK_N
    b_bias = 0.0
    if BIAS is not None:
        b_bias = tl.load(BIAS + i_h) * 1.4426950408889634

    rows = ((i_b * n_queries + start + o_m) * n_heads + i_h).to(tl.int64)
    p_rows = rows[:, None] * D + o_d[None, :]
    m_rows = m_m[:, None] & (o_d < D)[None, :]
    b_q = _load(Q, o_m, o_d, stride_qt, n_q, D, True)
    b_do = tl.load(DO + p_rows, mask=m_rows, other=0.0)
    b_o = tl.load(O + p_rows, mask=m_rows, other=0.0).to(tl.float32)
    if RESIDUAL is not None:
        b_o += tl.load(RESIDUAL + p_rows, mask=m_rows, other=0.0).to(tl.float32)
    b_delta = tl.sum(b_o * b_do.to(tl.float32), axis=1)
    b_drem = tl.load(REMAINDER + rows, mask=m_m, other=0.0) * tl.load(DREMAINDER + rows, mask=m_m, other=0.0)
    p_delta = DELTA + i_bh * 2 * n_queries + start + o_m
    tl.store(p_delta, b_delta, mask=m_m)
    tl.store(p_delta + n_queries, b_drem, mask=m_m)
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    b_dbias = tl.zeros([BLOCK_M], dtype=tl.float32)
    b_later = tl.zeros([BLOCK_M], dtype=tl.float32)
    b_left = tl.where(m_m, 1.0, 0.0)

    first = i_m * BLOCK_M + n_k - n_q
    end = tl.minimum(first + BLOCK_M, n_k) - 1 + CURRENT
    n_tiles = (end + BLOCK_N - 1) // BLOCK_N
    n_full = tl.maximum((first + CURRENT) // BLOCK_N, low)
    for masked in tl.static_range(2):
        high = n_tiles if masked == 0 else tl.minimum(n_full, n_tiles)
        for i in range(high - (n_full if masked == 0 else low)):
            i_n = high - 1 - i
            tl.store(p_state + tl.cast(i_n, tl.int64) * (2 * BLOCK_M), b_left)
            tl.store(p_state + tl.cast(i_n, tl.int64) * (2 * BLOCK_M) + BLOCK_M, b_later)
            o_n = i_n * BLOCK_N
            b_k = _load(K + tl.cast(o_n, tl.int64) * stride_kt, o_key, o_d, stride_kt, n_k - o_n, D, masked == 0)
            b_v = _load(V + tl.cast(o_n, tl.int64) * stride_vt, o_key, o_d, stride_vt, n_k - o_n, D, masked == 0)
            m_tile = (o_n + o_key)[None, :] < o_pos[:, None] + CURRENT
            _, b_dz, b_left, b_later = _backward_tile(
                _product(b_q, tl.trans(b_k), EXACT), _product(b_do, tl.trans(b_v), EXACT), b_left, b_later, b_delta,
                b_drem, b_bias, m_tile, scale, masked == 0, b_v.dtype,
            )  # fmt: skip
            if BIAS is not None:
                b_dbias += tl.sum(b_dz, 1)
            b_dq += _product(b_dz.to(b_k.dtype), b_k, EXACT)
    # in log2 units the scale had a factor that the gradient has not
    tl.store(DQ + p_rows, (b_dq * (scale * 0.6931471805599453)).to(DQ.dtype.element_ty), mask=m_rows)
    tl.atomic_max(REACH + i_bh * n_key_blocks + i_key_tile + low, i_m + 1, sem="relaxed")
    if BIAS is not None:
        tl.store(DBIAS + i_bh * n_blocks + i_tile, tl.sum(b_dbias, 0))


@triton.jit
def _load_state(
    i_m, finish, first_key, n_q, n_queries, n_past, p_stop, STATE, slot, p_delta,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FORWARD_M: tl.constexpr,
):  # fmt: skip
    """Stick left, sum of g, delta and the remainder's part of query tile i_m before a key tile, (BLOCK_M,) each.

    All 0, so that nothing comes of them, where the walk of this query tile had stopped before, and from `finish` on.
    """
    o_m = tl.arange(0, BLOCK_M)
    o_row = i_m * BLOCK_M + o_m
    stop = tl.load(p_stop + i_m * BLOCK_M // FORWARD_M, mask=i_m < finish, other=first_key + 1)
    m_visited = (o_row < n_q) & (stop <= first_key)
    p_state = STATE + (slot + _state_slot(i_m, n_past, BLOCK_M, BLOCK_N)) * (2 * BLOCK_M) + o_m
    return (
        tl.load(p_state, mask=m_visited, other=0.0),
        tl.load(p_state + BLOCK_M, mask=m_visited, other=0.0),
        tl.load(p_delta + o_row, mask=m_visited, other=0.0),
        tl.load(p_delta + n_queries + o_row, mask=m_visited, other=0.0),
    )


@triton.jit
def key_kernel(
    Q, K, V, BIAS, STOP, DO, DK, DV, STATE, DELTA, REACH, CU_SEQLENS, BLOCKS, FORWARD_BLOCKS, SLOTS,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    i_launch, n_chunk, n_batch, n_heads, n_queries, n_keys, n_blocks, n_forward_blocks, n_key_blocks, n_sequences,
    n_slots, scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    FORWARD_M: tl.constexpr, CURRENT: tl.constexpr, VARLEN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Second pass of backward, one key tile of one key-value head a program: dk and dv, (B, S, G, D) contiguous.

    BLOCKS counts key tiles here; the rest is as in query_kernel.
    """
    pid = tl.program_id(0)
    n_groups = n_heads // GROUP
    n_chunk, n_slots = _chunk(n_chunk, n_slots, n_batch * n_groups, SLOTS, n_sequences, VARLEN)
    i_chunk = pid % n_chunk
    i_bg = i_launch * n_chunk + i_chunk
    if i_bg >= n_batch * n_groups:
        return
    # the oldest keys, seen by most queries, first
    i_n, i_s, start, n_q, n_k = _locate(pid // n_chunk, BLOCKS, CU_SEQLENS, n_queries, n_keys, n_sequences, VARLEN)
    if i_n < 0:
        return
    i_b = (i_bg // n_groups).to(tl.int64)
    i_g = i_bg % n_groups
    o_d = tl.arange(0, BLOCK_D)
    o_m = tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + _key_order(BLOCK_N)
    n_past = n_k - n_q
    b_k = _load(K + _first_row(i_b, start, i_g, stride_kb, stride_kt, stride_kh), o_n, o_d, stride_kt, n_k, D, True)
    b_v = _load(V + _first_row(i_b, start, i_g, stride_vb, stride_vt, stride_vh), o_n, o_d, stride_vt, n_k, D, True)
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    # query tiles from the first that sees a key of this tile; those of the diagonal need a mask
    first = tl.maximum(i_n * BLOCK_N + 1 - CURRENT - n_past, 0) // BLOCK_M
    n_diagonal = (tl.maximum(i_n * BLOCK_N + BLOCK_N - CURRENT - n_past, 0) + BLOCK_M - 1) // BLOCK_M
    n_tiles = (n_q + BLOCK_M - 1) // BLOCK_M
    # the last query tile is short
    n_whole = n_q // BLOCK_M
    i_key_tile = 0
    i_forward = 0
    slot = i_n.to(tl.int64)
    if VARLEN:
        slot += tl.load(SLOTS + i_s)
        i_forward = tl.load(FORWARD_BLOCKS + i_s)
        i_key_tile = tl.load(CU_SEQLENS + i_s) // BLOCK_N + i_s
    P_Q = Q + _first_row(i_b, start, i_g * GROUP, stride_qb, stride_qt, stride_qh)
    for i_member in range(GROUP):
        i_h = i_g * GROUP + i_member
        i_bh = i_b * n_heads + i_h
        i_head = (i_chunk * GROUP + i_member).to(tl.int64)
        reach = 0
        for i in range(0, i_n + 1, 128):
            o_tile = i + tl.arange(0, 128)
            p_reach = REACH + i_bh * n_key_blocks + i_key_tile + o_tile
            reach = tl.maximum(reach, tl.max(tl.load(p_reach, mask=o_tile <= i_n, other=0), 0))
        # nobody sees the last key alone
        last = tl.where(i_n * BLOCK_N < n_k - 1 + CURRENT, tl.minimum(n_tiles, reach), 0)
        b_bias = 0.0
        if BIAS is not None:
            b_bias = tl.load(BIAS + i_h) * 1.4426950408889634
        P_DO = DO + ((i_b * n_queries + start) * n_heads + i_h) * D
        p_delta = DELTA + i_bh * 2 * n_queries + start
        p_stop = STOP + i_bh * n_forward_blocks + i_forward
        for part in tl.static_range(3):
            # diagonal tiles, whole ones, the short one at the end
            if part == 0:
                begin = first
                finish = tl.minimum(n_diagonal, last)
            elif part == 1:
                begin = tl.maximum(first, n_diagonal)
                finish = tl.minimum(n_whole, last)
            else:
                begin = tl.maximum(tl.maximum(first, n_diagonal), n_whole)
                finish = last
            # a tile ahead: they come from far away, and the tile needs them first
            next_left, next_later, next_delta, next_drem = _load_state(
                begin, finish, i_n * BLOCK_N, n_q, n_queries, n_past, p_stop, STATE, i_head * n_slots + slot, p_delta,
                BLOCK_M, BLOCK_N, FORWARD_M,
            )  # fmt: skip
            for i_m in range(begin, finish):
                o_row = i_m * BLOCK_M + o_m
                b_left, b_later, b_delta, b_drem = next_left, next_later, next_delta, next_drem
                next_left, next_later, next_delta, next_drem = _load_state(
                    i_m + 1, finish, i_n * BLOCK_N, n_q, n_queries, n_past, p_stop, STATE, i_head * n_slots + slot,
                    p_delta, BLOCK_M, BLOCK_N, FORWARD_M,
                )  # fmt: skip
                b_q = _load(P_Q, o_row, o_d, stride_qt, n_q, D, part != 1)
                b_do = _load(P_DO, o_row, o_d, n_heads * D, n_q, D, part != 1)
                m_tile = o_n[None, :] < (o_row + n_past)[:, None] + CURRENT
                b_weight, b_dz, _, _ = _backward_tile(
                    _product(b_q, tl.trans(b_k), EXACT), _product(b_do, tl.trans(b_v), EXACT), b_left, b_later,
                    b_delta, b_drem, b_bias, m_tile, scale, part != 1, b_v.dtype,
                )  # fmt: skip
                b_dv += _product(tl.trans(b_weight), b_do, EXACT)
                b_dk += _product(tl.trans(b_dz.to(b_q.dtype)), b_q, EXACT)
        P_Q += stride_qh
    rows = ((i_b * n_keys + start + o_n) * n_groups + i_g).to(tl.int64)
    p_rows = rows[:, None] * D + o_d[None, :]
    m_rows = (o_n < n_k)[:, None] & (o_d < D)[None, :]
    tl.store(DK + p_rows, (b_dk * (scale * 0.6931471805599453)).to(DK.dtype.element_ty), mask=m_rows)
    tl.store(DV + p_rows, b_dv.to(DV.dtype.element_ty), mask=m_rows)


def tiles(kernel: str, head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile sizes and launch options of `forward`, `query` or `key`, for sm_80 and later.

    Backward's tiles divide forward's, and its two passes share theirs. Forward looks after every LOOK tiles whether any
    stick is left; between looks the loop is pipelined.
    """
    block_d = max(16, triton.next_power_of_2(head_dim))
    if dtype == torch.float32:
        size = 64 if block_d <= 64 else 32 if block_d == 128 else 16
        block_m, block_n, warps, stages = size, min(size, 32), 4, 1
    elif block_d == 256:
        block_m, block_n, warps, stages = 64, 32, 4, 2 if kernel == "forward" else 1
    else:
        # forward with 128 rows and four warps: ptxas serialises its products where it skips (C7515, on sm_90)
        stages = 3 if kernel != "forward" and block_d <= 64 else 2
        block_m, block_n, warps = 64, 64, 4
    options = {"BLOCK_D": block_d, "BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}
    if kernel == "forward":
        options["LOOK"] = 2 if dtype == torch.float32 else 16
    return options


def _cumulative(counts: Tensor) -> Tensor:
    """(N,) to (N + 1,): how many stand before each, and all; computed on the device, without a wait."""
    return torch.nn.functional.pad(counts.cumsum(0, dtype=counts.dtype), (1, 0))


def _blocks(cu_seqlens: Tensor, size: int) -> Tensor:
    """Tiles of `size` rows of each packed sequence, (N,) int32."""
    return (cu_seqlens.diff() + size - 1) // size


def stop_shape(q: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int, int]:
    """Shape of what `forward` says of where it stopped."""
    tiles_of_row = triton.cdiv(q.shape[1], tiles("forward", q.shape[3], q.dtype)["BLOCK_M"])
    return q.shape[0], q.shape[2], tiles_of_row + (0 if cu_seqlens is None else cu_seqlens.shape[0] - 1)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None, scale: float, attend_current: bool,
    epsilon: float, differentiable: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Output (B, T, H, D), remainder (B, T, H) float32, what rounding took off the output (empty in float32, and where
    no gradient is wanted), and the oldest key that each query tile visited (B, H, tiles)."""
    q, k, v = _rows(q), _rows(k), _rows(v)
    batch, n_queries, heads, dim = q.shape
    exact = q.dtype == torch.float32
    options = tiles("forward", dim, q.dtype)
    out = torch.empty((batch, n_queries, heads, dim), dtype=q.dtype, device=q.device)
    residual = None if exact or not differentiable else torch.empty_like(out)
    remainder = torch.empty((batch, n_queries, heads), dtype=torch.float32, device=q.device)
    stop = torch.empty(stop_shape(q, cu_seqlens), dtype=torch.int32, device=q.device)
    n_blocks, blocks, n_sequences = stop.shape[2], None, 0
    if cu_seqlens is not None:
        n_sequences = len(cu_seqlens) - 1
        blocks = _cumulative(_blocks(cu_seqlens, options["BLOCK_M"]))
    forward_kernel[(n_blocks * batch * heads,)](
        q, k, v, bias, out, residual, remainder, stop, cu_seqlens, blocks,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        batch, heads, n_queries, k.shape[1], n_blocks, n_sequences, scale * LOG2_E, epsilon,
        GROUP=heads // k.shape[2], D=dim, CURRENT=int(attend_current), VARLEN=cu_seqlens is not None,
        SKIP=epsilon > 0, EXACT=exact, **options,
    )  # fmt: skip
    return out, remainder, out.new_empty(0) if residual is None else residual, stop


def backward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, remainder: Tensor, residual: Tensor,
    stop: Tensor, dout: Tensor, dremainder: Tensor, cu_seqlens: Tensor | None, scale: float, attend_current: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, in their dtypes, and of the bias (empty without one)."""
    q, k, v = _rows(q), _rows(k), _rows(v)
    dout, dremainder = dout.contiguous(), dremainder.contiguous()
    batch, n_queries, heads, dim = q.shape
    n_keys, groups = k.shape[1:3]
    options = tiles("query", dim, q.dtype)
    key_options = tiles("key", dim, q.dtype)
    block_m, block_n = options["BLOCK_M"], options["BLOCK_N"]
    assert (key_options["BLOCK_M"], key_options["BLOCK_N"]) == (block_m, block_n)
    dq = torch.empty((batch, n_queries, heads, dim), dtype=q.dtype, device=q.device)
    dk, dv = (torch.empty((batch, n_keys, groups, dim), dtype=q.dtype, device=q.device) for _ in range(2))
    n_blocks, n_key_blocks, n_sequences = triton.cdiv(n_queries, block_m), triton.cdiv(n_keys, block_n), 0
    blocks = key_blocks = forward_blocks = slots = None
    if cu_seqlens is not None:
        n_sequences = len(cu_seqlens) - 1
        counts = _blocks(cu_seqlens, block_m)
        blocks, key_blocks = _cumulative(counts), _cumulative(_blocks(cu_seqlens, block_n))
        forward_blocks = _cumulative(_blocks(cu_seqlens, tiles("forward", dim, q.dtype)["BLOCK_M"]))
        slots = _cumulative(block_m // block_n * (counts.long() * (counts + 1) // 2) + counts)
        n_blocks += n_sequences
        n_key_blocks += n_sequences
    # as _state_slot counts them; what packed sequences take is known to the device alone, and is less
    past = triton.cdiv(n_keys - n_queries, block_n) + 1
    n_slots = block_m // block_n * (n_blocks * (n_blocks + 1) // 2) + past * n_blocks
    dbias = torch.empty((batch, heads, 0 if bias is None else n_blocks), dtype=torch.float32, device=q.device)
    group = heads // groups
    chunk = STATE_BYTES // (n_slots * 2 * block_m * 4 * group)
    chunk = min(max(1, chunk), batch * groups)
    state = torch.empty((chunk * group, n_slots, 2, block_m), dtype=torch.float32, device=q.device)
    delta = torch.empty((batch, heads, 2, n_queries), dtype=torch.float32, device=q.device)
    reach = torch.zeros((batch, heads, n_key_blocks), dtype=torch.int32, device=q.device)
    for launch in range(triton.cdiv(batch * groups, chunk)):
        # at most
        together = chunk if cu_seqlens is None else batch * groups
        sizes = (
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], launch, chunk, batch, heads, n_queries, n_keys, n_blocks,
            stop.shape[2], n_key_blocks, n_sequences, n_slots, scale * LOG2_E,
        )  # fmt: skip
        constants = {
            "GROUP": group, "D": dim, "FORWARD_M": tiles("forward", dim, q.dtype)["BLOCK_M"],
            "CURRENT": int(attend_current), "VARLEN": cu_seqlens is not None, "EXACT": q.dtype == torch.float32,
        }  # fmt: skip
        query_kernel[(n_blocks * together * group,)](
            q, k, v, bias, out, residual if residual.numel() else None, remainder, stop, dout, dremainder, dq, dbias,
            state, delta, reach, cu_seqlens, blocks, forward_blocks, slots, *sizes, **constants, **options,
        )  # fmt: skip
        key_kernel[(n_key_blocks * together,)](
            q, k, v, bias, stop, dout, dk, dv, state, delta, reach, cu_seqlens, key_blocks, forward_blocks, slots,
            *sizes, **constants, **key_options,
        )  # fmt: skip
    return dq, dk, dv, dbias.sum((0, 2)) if bias is not None else dbias.new_empty(0)
