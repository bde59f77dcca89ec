"""Triton kernels of stick-breaking attention; `stick_breaking.py` has the mathematics and is the way in.

Both kernels walk each query tile from its diagonal towards the past and carry, per query row, log2 of the stick that is
left. Logits are in log2 units (multiplied by log2 e). The sum over the nearer keys of a tile is a product with a
triangular matrix of ones, on the tensor cores; its float32 operand is split in two bfloat16 halves, exact to 2^-17.

Backward, with delta_i = do_i . o_i = sum_l g_il (see stick_breaking.py), needs no snapshot of the forward walk:

    sum_{l <= j} g_il = delta_i - sum_{l > j} g_il

so that it walks the same way as forward and memory stays linear in T. Where less than 2^-24 of the stick is left, the
difference is rounding noise around a value that small and is set to 0. Key tiles receive dk and dv from query tiles
in one fixed order (latest query first), kept by a counter for each key tile: same inputs, same bits. Programs take
their work in the order in which they start (`TICKET`), so a program only ever waits for one that already runs.

Variable grammar: i_ index, o_ offsets, p_ pointers, m_ masks, b_ block values.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = math.log2(math.e)
# float32 cannot resolve a smaller share of the stick
RESOLUTION = tl.constexpr(-24.0)


@triton.jit
def _log2_1p(x, EXACT: tl.constexpr):
    """log2(1 + x) for 0 <= x <= 1, with a small relative error also where x is tiny."""
    if EXACT:
        # 2 atanh(s) with s = x / (2 + x) <= 1/3; the first term left out is below 2e-8 of the sum
        s = x / (2.0 + x)
        t = s * s
        poly = 1.0 + t * (1 / 3 + t * (1 / 5 + t * (1 / 7 + t * (1 / 9 + t * (1 / 11 + t * (1 / 13 + t * (1 / 15)))))))
        return s * poly * 2.8853900817779268
    else:
        series = x * (1.0 - x * (0.5 - x * (1 / 3 - x * 0.25))) * 1.4426950408889634
        return tl.where(x < 0.015625, series, tl.log2(1.0 + x))


@triton.jit
def _later(x, b_triangle, EXACT: tl.constexpr):
    """Sum of x over the later keys of the tile, the key itself not included."""
    if EXACT:
        return tl.dot(x, b_triangle, input_precision="tf32x3")
    else:
        high = x.to(tl.bfloat16)
        low = (x - high.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(low, b_triangle, acc=tl.dot(high, b_triangle))


@triton.jit
def _product(a, b, EXACT: tl.constexpr):
    if EXACT:
        return tl.dot(a, b, input_precision="tf32x3")
    else:
        return tl.dot(a, b)


@triton.jit
def _break_stick(b_logit, b_left, b_triangle, m_tile, MASKED: tl.constexpr, EXACT: tl.constexpr):
    """Return log2 beta, log2 of the stick left before each key, log2(1 - beta); all (BLOCK_M, BLOCK_N)."""
    softplus = _log2_1p(tl.exp2(-tl.abs(b_logit)), EXACT)
    log_beta = tl.minimum(b_logit, 0.0) - softplus
    log_rest = -tl.maximum(b_logit, 0.0) - softplus
    if MASKED:
        log_rest = tl.where(m_tile, log_rest, 0.0)
    return log_beta, b_left[:, None] + _later(log_rest, b_triangle, EXACT), log_rest


@triton.jit
def _find_sequence(i_block, BLOCKS, n_sequences):
    """Index of the packed sequence whose query tiles include tile i_block; BLOCKS counts tiles cumulatively."""
    low = 0
    high = n_sequences
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(BLOCKS + middle)
        low = tl.where(before <= i_block, middle, low)
        high = tl.where(before <= i_block, high, middle)
    return low


@triton.jit
def _locate(
    pid, BLOCKS, CU_SEQLENS, n_batch, n_heads, n_queries, n_keys, n_blocks, n_sequences,
    GROUP: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Work of program pid: batch, head, query tile, sequence, first row, queries, keys; a tile of -1 is no work.

    Latest query tiles first, within a tile the heads that share a key-value head next to each other.
    """
    i_h = pid % n_heads
    i_b = (pid // n_heads) % n_batch
    i_m = n_blocks - 1 - pid // (n_heads * n_batch)
    i_s = i_h * 0
    start = i_s
    if VARLEN:
        if i_m < tl.load(BLOCKS + n_sequences):
            i_s = _find_sequence(i_m, BLOCKS, n_sequences)
            i_m -= tl.load(BLOCKS + i_s)
            start = tl.load(CU_SEQLENS + i_s)
            n_queries = tl.load(CU_SEQLENS + i_s + 1) - start
            n_keys = n_queries
        else:
            i_m = -1
    return i_b.to(tl.int64), i_h, i_m, i_s, start.to(tl.int64), n_queries, n_keys


@triton.jit
def _load_rows(P, o_rows, o_d, stride, n_rows, D: tl.constexpr, MASKED: tl.constexpr):
    """Rows o_rows of a (rows, D) matrix; what lies outside is 0."""
    p_rows = P + o_rows.to(tl.int64)[:, None] * stride + o_d[None, :]
    if MASKED:
        return tl.load(p_rows, mask=(o_rows < n_rows)[:, None] & (o_d < D)[None, :], other=0.0)
    return tl.load(p_rows, mask=(o_d < D)[None, :], other=0.0)


@triton.jit
def _forward_tile(
    i_n, b_q, b_acc, b_left, b_triangle, K, V, o_pos, o_d, stride_kt, stride_vt, n_keys, scale,
    D: tl.constexpr, BLOCK_N: tl.constexpr, CURRENT: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    b_k = _load_rows(K, o_n, o_d, stride_kt, n_keys, D, MASKED)
    b_v = _load_rows(V, o_n, o_d, stride_vt, n_keys, D, MASKED)
    b_logit = _product(b_q, tl.trans(b_k), EXACT) * scale
    m_tile = o_n[None, :] < o_pos[:, None] + CURRENT
    log_beta, log_before, log_rest = _break_stick(b_logit, b_left, b_triangle, m_tile, MASKED, EXACT)
    b_weight = tl.exp2(log_beta + log_before)
    if MASKED:
        b_weight = tl.where(m_tile, b_weight, 0.0)
    b_acc += _product(b_weight.to(b_v.dtype), b_v, EXACT)
    return b_acc, b_left + tl.sum(log_rest, axis=1)


@triton.jit
def forward_kernel(
    Q, K, V, O, RESIDUAL, REMAINDER, CU_SEQLENS, BLOCKS,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    n_batch, n_heads, n_queries, n_keys, n_blocks, n_sequences, scale, log2_epsilon,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    LOOK: tl.constexpr, CURRENT: tl.constexpr, VARLEN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One query tile of one head a program. O, RESIDUAL: (B, T, H, D) contiguous; REMAINDER: (B, T, H) float32."""
    i_b, i_h, i_m, i_s, start, n_q, n_k = _locate(
        tl.program_id(0), BLOCKS, CU_SEQLENS, n_batch, n_heads, n_queries, n_keys, n_blocks, n_sequences, GROUP, VARLEN
    )
    if i_m < 0:
        return
    o_d = tl.arange(0, BLOCK_D)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < n_q
    o_pos = o_m + (n_k - n_q)
    Q += i_b * stride_qb + start * stride_qt + i_h * stride_qh
    K += i_b * stride_kb + start * stride_kt + (i_h // GROUP) * stride_kh
    V += i_b * stride_vb + start * stride_vt + (i_h // GROUP) * stride_vh
    b_q = _load_rows(Q, o_m, o_d, stride_qt, n_q, D, True)
    b_triangle = (tl.arange(0, BLOCK_N)[:, None] > tl.arange(0, BLOCK_N)[None, :]).to(
        tl.float32 if EXACT else tl.bfloat16
    )
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    # rows past the end have no stick, so that they keep no tile alive
    b_left = tl.where(m_m, 0.0, float("-inf"))

    first = i_m * BLOCK_M + n_k - n_q
    end = tl.minimum(first + BLOCK_M, n_k) - 1 + CURRENT
    n_tiles = (end + BLOCK_N - 1) // BLOCK_N
    n_full = (first + CURRENT) // BLOCK_N
    for i in range(n_full, n_tiles):
        b_acc, b_left = _forward_tile(
            n_tiles - 1 - (i - n_full), b_q, b_acc, b_left, b_triangle, K, V, o_pos, o_d, stride_kt, stride_vt, n_k,
            scale, D, BLOCK_N, CURRENT, True, EXACT,
        )  # fmt: skip
    i_n = n_full
    while (i_n > 0) & (tl.max(b_left, 0) > log2_epsilon):
        look = tl.minimum(i_n, LOOK)
        for i in range(look):
            b_acc, b_left = _forward_tile(
                i_n - 1 - i, b_q, b_acc, b_left, b_triangle, K, V, o_pos, o_d, stride_kt, stride_vt, n_k, scale,
                D, BLOCK_N, CURRENT, False, EXACT,
            )  # fmt: skip
        i_n -= look

    rows = ((i_b * n_queries + start + o_m) * n_heads + i_h).to(tl.int64)
    m_rows = m_m[:, None] & (o_d < D)[None, :]
    b_o = b_acc.to(O.dtype.element_ty)
    tl.store(O + rows[:, None] * D + o_d[None, :], b_o, mask=m_rows)
    if not EXACT:
        b_residual = (b_acc - b_o.to(tl.float32)).to(O.dtype.element_ty)
        tl.store(RESIDUAL + rows[:, None] * D + o_d[None, :], b_residual, mask=m_rows)
    tl.store(REMAINDER + rows, tl.exp2(b_left), mask=m_m)


@triton.jit
def _backward_tile(
    i_n, i_turn, b_q, b_do, b_dq, b_left, b_later, b_delta, b_drem, b_triangle, K, V, DK, DV, COUNT, o_pos, o_d,
    stride_kt, stride_vt, stride_dkt, n_keys, scale,
    D: tl.constexpr, BLOCK_N: tl.constexpr, CURRENT: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    b_k = _load_rows(K, o_n, o_d, stride_kt, n_keys, D, MASKED)
    b_v = _load_rows(V, o_n, o_d, stride_vt, n_keys, D, MASKED)
    b_logit = _product(b_q, tl.trans(b_k), EXACT) * (scale * 1.4426950408889634)
    m_tile = o_n[None, :] < o_pos[:, None] + CURRENT
    log_beta, log_before, log_rest = _break_stick(b_logit, b_left, b_triangle, m_tile, MASKED, EXACT)
    b_weight = tl.exp2(log_beta + log_before)
    if MASKED:
        b_weight = tl.where(m_tile, b_weight, 0.0)
    # rounded as in forward, so that the sum of g is do . o, not that and the rounding errors of all weights
    b_weight = b_weight.to(b_do.dtype)
    b_g = b_weight.to(tl.float32) * _product(b_do, tl.trans(b_v), EXACT)
    # sum of g over this key and all older ones
    b_older = b_delta[:, None] - (b_later[:, None] + _later(b_g, b_triangle, EXACT))
    b_older = tl.where(log_before > RESOLUTION, b_older, 0.0)
    b_dz = b_g - tl.exp2(log_beta) * (b_drem[:, None] + b_older)
    if MASKED:
        b_dz = tl.where(m_tile, b_dz, 0.0)
    b_dz = b_dz.to(b_q.dtype)
    b_dq += _product(b_dz, b_k, EXACT)
    b_dk = _product(tl.trans(b_dz), b_q, EXACT) * scale
    b_dv = _product(tl.trans(b_weight), b_do, EXACT)
    p_rows = o_n.to(tl.int64)[:, None] * stride_dkt + o_d[None, :]
    m_rows = (o_n < n_keys)[:, None] & (o_d < D)[None, :]
    while tl.atomic_add(COUNT + i_n, 0, sem="acquire") < i_turn:
        pass
    tl.atomic_add(DK + p_rows, b_dk, mask=m_rows, sem="relaxed")
    tl.atomic_add(DV + p_rows, b_dv, mask=m_rows, sem="relaxed")
    tl.debug_barrier()
    tl.atomic_add(COUNT + i_n, 1, sem="release")
    return b_dq, b_left + tl.sum(log_rest, axis=1), b_later + tl.sum(b_g, axis=1)


@triton.jit
def backward_kernel(
    Q, K, V, O, RESIDUAL, REMAINDER, DO, DREMAINDER, DQ, DK, DV, COUNT, TICKET, CU_SEQLENS, BLOCKS, KEY_BLOCKS,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    n_batch, n_heads, n_queries, n_keys, n_blocks, n_key_blocks, n_sequences, scale, log2_epsilon,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    LOOK: tl.constexpr, CURRENT: tl.constexpr, VARLEN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One query tile of one head a program.

    O, RESIDUAL, DO, DQ: (B, T, H, D) contiguous; REMAINDER, DREMAINDER: (B, T, H) float32; DK, DV: (B, S, G, D)
    float32, zeros; COUNT: (B, G, key tiles) int32, zeros: query tiles that have added to a key tile; TICKET: int32, 0.
    """
    i_b, i_h, i_m, i_s, start, n_q, n_k = _locate(
        tl.atomic_add(TICKET, 1, sem="relaxed"), BLOCKS, CU_SEQLENS, n_batch, n_heads, n_queries, n_keys, n_blocks,
        n_sequences, GROUP, VARLEN,
    )  # fmt: skip
    if i_m < 0:
        return
    n_groups = n_heads // GROUP
    i_g = i_h // GROUP
    o_d = tl.arange(0, BLOCK_D)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < n_q
    o_pos = o_m + (n_k - n_q)
    Q += i_b * stride_qb + start * stride_qt + i_h * stride_qh
    K += i_b * stride_kb + start * stride_kt + i_g * stride_kh
    V += i_b * stride_vb + start * stride_vt + i_g * stride_vh
    DK += ((i_b * n_keys + start) * n_groups + i_g) * D
    DV += ((i_b * n_keys + start) * n_groups + i_g) * D
    COUNT += (i_b * n_groups + i_g) * n_key_blocks
    if VARLEN:
        COUNT += tl.load(KEY_BLOCKS + i_s)
    i_turn = ((n_q + BLOCK_M - 1) // BLOCK_M - 1 - i_m) * GROUP + i_h % GROUP

    rows = ((i_b * n_queries + start + o_m) * n_heads + i_h).to(tl.int64)
    p_rows = rows[:, None] * D + o_d[None, :]
    m_rows = m_m[:, None] & (o_d < D)[None, :]
    b_q = _load_rows(Q, o_m, o_d, stride_qt, n_q, D, True)
    b_do = tl.load(DO + p_rows, mask=m_rows, other=0.0)
    b_o = tl.load(O + p_rows, mask=m_rows, other=0.0).to(tl.float32)
    if not EXACT:
        b_o += tl.load(RESIDUAL + p_rows, mask=m_rows, other=0.0).to(tl.float32)
    b_delta = tl.sum(b_o * b_do.to(tl.float32), axis=1)
    b_drem = tl.load(REMAINDER + rows, mask=m_m, other=0.0) * tl.load(DREMAINDER + rows, mask=m_m, other=0.0)
    b_triangle = (tl.arange(0, BLOCK_N)[:, None] > tl.arange(0, BLOCK_N)[None, :]).to(
        tl.float32 if EXACT else tl.bfloat16
    )
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    b_later = tl.zeros([BLOCK_M], dtype=tl.float32)
    b_left = tl.where(m_m, 0.0, float("-inf"))

    first = i_m * BLOCK_M + n_k - n_q
    end = tl.minimum(first + BLOCK_M, n_k) - 1 + CURRENT
    n_tiles = (end + BLOCK_N - 1) // BLOCK_N
    n_full = (first + CURRENT) // BLOCK_N
    for i in range(n_full, n_tiles):
        b_dq, b_left, b_later = _backward_tile(
            n_tiles - 1 - (i - n_full), i_turn, b_q, b_do, b_dq, b_left, b_later, b_delta, b_drem, b_triangle,
            K, V, DK, DV, COUNT, o_pos, o_d, stride_kt, stride_vt, n_groups * D, n_k, scale,
            D, BLOCK_N, CURRENT, True, EXACT,
        )  # fmt: skip
    i_n = n_full
    while (i_n > 0) & (tl.max(b_left, 0) > log2_epsilon):
        look = tl.minimum(i_n, LOOK)
        for i in range(look):
            b_dq, b_left, b_later = _backward_tile(
                i_n - 1 - i, i_turn, b_q, b_do, b_dq, b_left, b_later, b_delta, b_drem, b_triangle,
                K, V, DK, DV, COUNT, o_pos, o_d, stride_kt, stride_vt, n_groups * D, n_k, scale,
                D, BLOCK_N, CURRENT, False, EXACT,
            )  # fmt: skip
        i_n -= look
    # nothing to add to what is left, but the order of those who wait is kept
    while i_n > 0:
        i_n -= 1
        while tl.atomic_add(COUNT + i_n, 0, sem="acquire") < i_turn:
            pass
        tl.atomic_add(COUNT + i_n, 1, sem="release")
    tl.store(DQ + p_rows, (b_dq * scale).to(DQ.dtype.element_ty), mask=m_rows)


def tiles(head_dim: int, dtype: torch.dtype, backward: bool) -> dict[str, int]:
    """Tile sizes and launch options, for sm_80 and later.

    Forward and backward walk the same tiles and look after every LOOK of them whether any stick is left, so that the
    gradient is that of the function that was computed. Between looks the loop is pipelined.
    """
    block_d = max(16, triton.next_power_of_2(head_dim))
    if dtype == torch.float32:
        size, warps = (32, 8 if backward else 4) if block_d <= 128 else (16, 4)
        return {"BLOCK_D": block_d, "BLOCK_M": size, "BLOCK_N": size, "LOOK": 2, "num_warps": warps, "num_stages": 1}
    block_m, block_n, warps = (64, 64, 4) if block_d <= 64 else (64, 32, 4) if block_d == 128 else (32, 32, 8)
    stages = 1 if backward else 3
    return {
        "BLOCK_D": block_d, "BLOCK_M": block_m, "BLOCK_N": block_n, "LOOK": 16, "num_warps": warps,
        "num_stages": stages,
    }  # fmt: skip


def _cumulative_blocks(cu_seqlens: Tensor, size: int) -> Tensor:
    """Tiles of `size` rows before each packed sequence, (N + 1,) int32; computed on the device, without a wait."""
    blocks = (cu_seqlens.diff() + size - 1) // size
    return torch.nn.functional.pad(blocks.cumsum(0), (1, 0)).to(torch.int32)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, scale: float, attend_current: bool, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, T, H, D), remainder (B, T, H) float32, and what rounding took off the output (empty in float32)."""
    q, k, v = _rows(q), _rows(k), _rows(v)
    batch, n_queries, heads, dim = q.shape
    exact = q.dtype == torch.float32
    options = tiles(dim, q.dtype, backward=False)
    out = torch.empty((batch, n_queries, heads, dim), dtype=q.dtype, device=q.device)
    residual = out.new_empty(0) if exact else torch.empty_like(out)
    remainder = torch.empty((batch, n_queries, heads), dtype=torch.float32, device=q.device)
    n_blocks, blocks = triton.cdiv(n_queries, options["BLOCK_M"]), None
    if cu_seqlens is not None:
        blocks = _cumulative_blocks(cu_seqlens, options["BLOCK_M"])
        n_blocks += len(cu_seqlens) - 1
    forward_kernel[(n_blocks * batch * heads,)](
        q, k, v, out, residual, remainder, cu_seqlens, blocks,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        batch, heads, n_queries, k.shape[1], n_blocks, 0 if cu_seqlens is None else len(cu_seqlens) - 1,
        scale * LOG2_E, math.log2(epsilon) if epsilon > 0 else -math.inf,
        GROUP=heads // k.shape[2], D=dim, CURRENT=int(attend_current), VARLEN=cu_seqlens is not None,
        EXACT=exact, **options,
    )  # fmt: skip
    return out, remainder, residual


def backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, remainder: Tensor, residual: Tensor, dout: Tensor, dremainder: Tensor,
    cu_seqlens: Tensor | None, scale: float, attend_current: bool, epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, in their dtypes."""
    q, k, v = _rows(q), _rows(k), _rows(v)
    batch, n_queries, heads, dim = q.shape
    n_keys, groups = k.shape[1:3]
    options = tiles(dim, q.dtype, backward=True)
    dq = torch.empty((batch, n_queries, heads, dim), dtype=q.dtype, device=q.device)
    dk = torch.zeros((batch, n_keys, groups, dim), dtype=torch.float32, device=q.device)
    dv = torch.zeros_like(dk)
    n_blocks, blocks = triton.cdiv(n_queries, options["BLOCK_M"]), None
    n_key_blocks, key_blocks = triton.cdiv(n_keys, options["BLOCK_N"]), None
    n_sequences = 0
    if cu_seqlens is not None:
        n_sequences = len(cu_seqlens) - 1
        blocks = _cumulative_blocks(cu_seqlens, options["BLOCK_M"])
        key_blocks = _cumulative_blocks(cu_seqlens, options["BLOCK_N"])
        n_blocks += n_sequences
        n_key_blocks += n_sequences
    # one counter for each key tile, then the ticket
    counters = torch.zeros(batch * groups * n_key_blocks + 1, dtype=torch.int32, device=q.device)
    backward_kernel[(n_blocks * batch * heads,)](
        q, k, v, out, residual, remainder, dout.contiguous(), dremainder.contiguous(), dq, dk, dv,
        counters, counters[-1:], cu_seqlens, blocks, key_blocks,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        batch, heads, n_queries, n_keys, n_blocks, n_key_blocks, n_sequences,
        scale, math.log2(epsilon) if epsilon > 0 else -math.inf,
        GROUP=heads // groups, D=dim, CURRENT=int(attend_current), VARLEN=cu_seqlens is not None,
        EXACT=q.dtype == torch.float32, **options,
    )  # fmt: skip
    return dq, dk.to(k.dtype), dv.to(v.dtype)
