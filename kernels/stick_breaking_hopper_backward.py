"""Backward of stick-breaking attention in Gluon for Hopper, in one pass; `stick_breaking.py` has the mathematics.

A program has 128 keys, 64 for each of two warpgroups, which keep dk and dv of theirs in registers and walk over the
tiles of 64 queries that see them: five products a tile, no saved states. Gradients of logits come as in
`stick_breaking_triton.py`, from the newest keys on.

- What a query brings along (the stick left, the sum of g) goes from the newer warpgroup to the older through shared
  memory, and from a program to the one of the next older keys through global memory: each number in one word with how
  many programs it comes from, so that who waits for it needs no fence. `stick_breaking_hopper_order.py` says which
  program does what, and when.
- dq is added up in float32, from the newest keys to the oldest by a counter: same inputs, same bits. A warpgroup makes
  half of its columns from the logits' gradients of both, two steps behind, so that neither waits for the other.
- Products are begun before what they are made under: those of queries and keys at the end of the step before, dq under
  the exponentials, those of the output's gradients and values under the scan, dk under the next step.
- Three more warps, so that no warpgroup waits for memory: `stick_breaking_hopper_movers.py`.
- A query tile's walk ends where forward stopped: older programs neither touch it nor wait for it.
"""

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sbeval.kernels.stick_breaking_hopper import (
    REGISTERS,
    _columns,
    _cut,
    _exp2,
    _find_sequence,
    _get,
    _processors,
    _quads,
    _query_tiles,
    _reciprocal,
    _rows,
)
from sbeval.kernels.stick_breaking_hopper_gradients import (
    _gradients,
    _halves,
    _join_rows,
    _join_vector,
    _regroup,
    _scan_product,
    _split_rows,
    _split_vector,
    _weights,
)
from sbeval.kernels.stick_breaking_hopper_movers import TILE, WORDS, _add_dq, _fetch, _phase, _produce, _slot
from sbeval.kernels.stick_breaking_hopper_order import (
    RANGES,
    _deal,
    _leave,
    _publish_all,
    _wait_for,
    programs_of,
    shares_of,
)
from sbeval.kernels.stick_breaking_triton import _locate

LOG2_E = math.log2(math.e)


@builtin
def _meet(_semantic=None):
    """Let the warps of a warpgroup begin what follows together."""
    return _semantic.debug_barrier()


@gluon.jit
def _give_dq(dq, dq_bufs, bars, t, WG: gl.constexpr):
    """Half of the columns of step t to the warp that adds them."""
    dq_full, dq_free = bars
    D: gl.constexpr = 2 * dq.shape[1]
    # as threads hold it: four numbers in a row, of two rows and two columns, and threads next to each other
    dq = dq.reshape([4, 2, 8, D // 16, 4, 2]).permute(3, 0, 2, 4, 1, 5).reshape([D, 32])
    NDQ: gl.constexpr = dq_bufs.shape[0] // 2
    buf = _slot(t, NDQ)
    mbarrier.wait(dq_free.index(buf), _phase(t, NDQ) ^ 1)
    dq_bufs.index(buf * 2 + WG).store(dq)
    fence_async_shared()
    mbarrier.arrive(dq_full.index(buf), count=1)


@gluon.jit
def _product_dq(ds_bufs, k_bufs, kd_bufs, buf, same, WG: gl.constexpr, D: gl.constexpr):
    DQ_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D // 2, 16]
    )
    dq = gl.zeros([64, D // 2], gl.float32, DQ_LAYOUT)
    if D == 128:
        # half of the columns are a block of their own in shared memory
        k0 = k_bufs.index(same).slice(WG * 64, 64, dim=1)
        k1 = k_bufs.index(1 + same).slice(WG * 64, 64, dim=1)
    else:
        k0 = kd_bufs.index(WG * 2 + same)
        k1 = kd_bufs.index(WG * 2 + 1 + same)
    dq = warpgroup_mma(ds_bufs.index(buf * 2), k0, dq, use_acc=False, is_async=True)
    return warpgroup_mma(ds_bufs.index(buf * 2 + 1), k1, dq, is_async=True)


@gluon.jit
def _load_keys(P, first, n_rows, stride, COLUMNS: gl.constexpr):
    """64 rows in thread order; rows from n_rows on are 0."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // COLUMNS, COLUMNS // 8], [4, 1], [1, 0])
    o_d = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT))
    o_key = gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
    o_key = first + o_key % 8 // 2 * 16 + o_key // 8 * 2 + o_key % 2
    p_rows = P + (o_key.to(gl.int64) * stride)[:, None] + o_d[None, :]
    return gl.load(p_rows, mask=(o_key < n_rows)[:, None], other=0.0)


@gluon.jit
def _bring_keys(tensors, bufs, first, n_rows, WG: gl.constexpr, D: gl.constexpr):
    """Keys and values of a warpgroup, all on their way before one is waited for."""
    p_k, p_v, stride_kt, stride_vt = tensors
    k_bufs, v_bufs, kd_bufs = bufs
    k = _load_keys(p_k, first + WG * 64, n_rows, stride_kt, D)
    v = _load_keys(p_v, first + WG * 64, n_rows, stride_vt, D)
    if D == 64:
        k0 = _load_keys(p_k + WG * 32, first, n_rows, stride_kt, 32)
        k1 = _load_keys(p_k + WG * 32, first + 64, n_rows, stride_kt, 32)
    k_bufs.index(WG).store(k)
    v_bufs.index(WG).store(v)
    if D == 64:
        kd_bufs.index(WG * 2).store(k0)
        kd_bufs.index(WG * 2 + 1).store(k1)
    fence_async_shared()


@gluon.jit
def _flat(x):
    """(64, D) as threads hold it: four numbers in a row, of two rows and two columns, then the next thread."""
    D: gl.constexpr = x.shape[1]
    return x.reshape([4, 2, 8, D // 8, 4, 2]).permute(3, 0, 2, 4, 1, 5).reshape([64 * D])


@gluon.jit
def _add_flat(x, part):
    D: gl.constexpr = x.shape[1]
    part = part.reshape([D // 8, 4, 8, 4, 2, 2]).permute(1, 4, 2, 0, 3, 5).reshape([64, D])
    return x + gl.convert_layout(part, x.type.layout, assert_trivial=True)


@gluon.jit
def _add_ranges(dk, dv, part, WG: gl.constexpr):
    """dk and dv with those of the ranges before, which this leaves to the next."""
    PARTS, p_count, i_range, i_place, n_before, is_last = part
    D: gl.constexpr = dk.shape[1]
    o_part = gl.arange(0, 64 * D, layout=_flat(dk).type.layout)
    i_part = i_place * 2 + WG
    p_count += i_part
    # also where there is nothing to add: another head may have been here, and must have read what it left
    p_dk = PARTS + i_part.to(gl.int64) * (2 * 64 * D) + _wait_for(p_count, 4 * n_before)
    p_dv = p_dk + 64 * D
    if i_range > 0:
        dk = _add_flat(dk, gl.load(p_dk + o_part))
        dv = _add_flat(dv, gl.load(p_dv + o_part))
    if not is_last:
        gl.store(p_dk + o_part, _flat(dk))
        gl.store(p_dv + o_part, _flat(dv))
    _publish_all(p_count)
    return dk, dv


@gluon.jit
def _consume(
    bufs, bars, tensors, place, part, o_out, stride_t, scale,
    WG: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, NB: gl.constexpr, CURRENT: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    q_bufs, do_bufs, st_bufs, words, k_bufs, v_bufs, kd_bufs, p_bufs, ds_bufs, dq_bufs, carry = bufs
    q_full, do_full, st_full, later_in, empty, left_full, later_full, ds_full, ds_free, dq_bars = bars
    STATE, BIAS, DBIAS, DK, DV, p_k, p_v, stride_kt, stride_vt = tensors
    i_n, i_program, n_programs, n_past, n_k, n_tiles_of_row, n_heads = place
    DTYPE: gl.constexpr = q_bufs.dtype
    NDQ: gl.constexpr = dq_bufs.shape[0] // 2
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    zeros = gl.zeros([64, 64], gl.float32, S_LAYOUT)
    dummy, dummy1, dummy2, dummy3 = _quads(zeros)
    ROWS: gl.constexpr = gl.SliceLayout(2, dummy.type.layout)
    ROW: gl.constexpr = gl.SliceLayout(1, ROWS)
    i_q = gl.arange(0, 4, layout=gl.SliceLayout(0, ROWS))[None, :]
    dbias = _split_rows(dummy)[0]
    _bring_keys((p_k, p_v, stride_kt, stride_vt), (k_bufs, v_bufs, kd_bufs), i_n * 128, n_k, WG, D)
    dk = warpgroup_mma_init(gl.zeros([64, D], gl.float32, O_LAYOUT))
    dv = warpgroup_mma_init(gl.zeros([64, D], gl.float32, O_LAYOUT))
    s = 0
    mbarrier.wait(q_full.index(0), 0)
    i_m = _get(words.index(1), 4)
    ahead = warpgroup_mma(
        q_bufs.index(0).reshape([64, D]), k_bufs.index(WG).permute((1, 0)), zeros, use_acc=False, is_async=True
    )
    products = warpgroup_mma_wait(num_outstanding=0, deps=(ahead,))
    while i_m >= 0:
        stage = _slot(s, STAGES)
        phase = _phase(s, STAGES)
        # 0, which the compiler does not know: or it keeps all addresses of shared memory in registers
        same = s >> 30
        i_tile = _get(words.index((s & (WORDS - 1)) * 3), 4)
        stop = _get(words.index((s & (WORDS - 1)) * 3 + 2), 4)
        k_buf = k_bufs.index(WG + same)
        v_buf = v_bufs.index(WG + same)
        p_buf = p_bufs.index(WG + same)
        q_buf = q_bufs.index(stage).reshape([64, D])
        do_buf = do_bufs.index(stage).reshape([64, D])
        # dq of two steps before, under which the stick is broken
        back = _slot(s + NB - 2, NB)
        mbarrier.wait(ds_full.index(back), _phase(s + NB - 2, NB) ^ 1, pred=s >= 2)
        if D == 64:
            # a form without it was a tenth slower; at D = 128 it makes no difference
            _meet()
        dq = _product_dq(ds_bufs, k_bufs, kd_bufs, back, same, WG, D)
        shift = 0.0
        if BIAS is not None:
            shift = gl.load(BIAS + i_tile // n_tiles_of_row % n_heads) * 1.4426950408889634
        # the older half of the keys may be past where these queries stopped
        if WG == 0:
            shift = gl.where(stop > i_n * 128, float("-inf"), shift)
        b_logit = gl.minimum(products * scale + shift, 30.0)
        if i_m + n_past <= i_n * 2 + WG:
            o_m = gl.arange(0, 64, layout=gl.SliceLayout(1, S_LAYOUT)) + same
            o_c = gl.arange(0, 64, layout=gl.SliceLayout(0, S_LAYOUT)) + same
            o_n = o_c % 8 // 2 * 16 + o_c // 8 * 2 + o_c % 2 + i_n * 128 + WG * 64
            b_logit = gl.where(o_n[None, :] < (o_m + (i_m + n_past) * 64)[:, None] + CURRENT, b_logit, float("-inf"))
        t0, t1, t2, t3 = _quads(_exp2(b_logit))
        u0 = 1.0 + t0
        u01 = u0 + t1 * u0
        u2 = 1.0 + t2
        w3 = _reciprocal(u01 * (u2 + t3 * u2))
        # the gradients of the weights take the registers of dq
        _cut(s)
        dq, dk_done, dv_done = warpgroup_mma_wait(num_outstanding=0, deps=(dq, dk, dv))
        mbarrier.arrive(ds_free.index(back), count=1, pred=s >= 2)
        mbarrier.arrive(empty.index(_slot(s + STAGES - 1, STAGES)), count=1, pred=s >= 1)
        if s >= 2:
            _give_dq(dq, dq_bufs, dq_bars, s - 2, WG)
        mbarrier.wait(do_full.index(stage), phase)
        dweights = warpgroup_mma(do_buf, v_buf.permute((1, 0)), zeros, use_acc=False, is_async=True)
        r0, r1, r2, r3, newer, whole = _scan_product(w3, ROWS)
        mbarrier.wait(st_full.index(stage), phase)
        if WG == 0:
            mbarrier.wait(left_full.index(s & 1), _phase(s, 2))
            left = carry.index((s & 1) * 2).load(ROWS)
        else:
            left = st_bufs.index(stage * 4).load(ROW)[:, None] + i_q * 0.0
        newer = gl.convert_layout(newer * left, r0.type.layout, assert_trivial=True)
        left = left * whole
        # hand on as soon as it is known
        if WG == 1:
            carry.index((s & 1) * 2).store(left)
            mbarrier.arrive(left_full.index(s & 1), count=1)
        else:
            o_word = gl.arange(0, 64, layout=ROW)[:, None] + (i_q * 0 + i_tile * (2 * TILE))
            _leave(STATE, o_word, left, i_q * 0 + ((i_m + n_past) // 2 - i_n + 1), i_q)
        st = _regroup(r0 * newer, r1 * newer, r2 * newer, r3 * newer, t0)
        # what follows would be done ahead of the scan and take registers: a loop in the machine code is in between
        _cut(s)
        # the two rows of a thread after each other, for the same reason
        t0a, t0b = _split_rows(t0)
        t1a, t1b = _split_rows(t1)
        t2a, t2b = _split_rows(t2)
        t3a, t3b = _split_rows(t3)
        u0a, u0b = _split_rows(u0)
        w3a, w3b = _split_rows(w3)
        sta, stb = _split_rows(st)
        h01a, h23a, b01a, b23a = _weights(t0a, t1a, t2a, t3a, u0a, w3a, sta, DTYPE)
        _cut(s)
        h01b, h23b, b01b, b23b = _weights(t0b, t1b, t2b, t3b, u0b, w3b, stb, DTYPE)
        _cut(s)
        h0, h1 = _halves(_join_rows(h01a, h01b, st), DTYPE)
        h2, h3 = _halves(_join_rows(h23a, h23b, st), DTYPE)
        p_buf.store(_columns(h0, h1, h2, h3))
        fence_async_shared()
        dv = warpgroup_mma(p_buf.permute((1, 0)), do_buf, dv_done, is_async=True)
        dweights = warpgroup_mma_wait(num_outstanding=1, deps=(dweights,))
        d0, d1, d2, d3 = _quads(dweights)
        d0a, d0b = _split_rows(d0)
        d1a, d1b = _split_rows(d1)
        d2a, d2b = _split_rows(d2)
        d3a, d3b = _split_rows(d3)
        if WG == 0:
            mbarrier.wait(later_full.index(s & 1), _phase(s, 2))
            later = carry.index((s & 1) * 2 + 1).load(ROWS)
        else:
            mbarrier.wait(later_in.index(stage), phase)
            later = st_bufs.index(stage * 4 + 1).load(ROW)[:, None] + i_q * 0.0
        delta = st_bufs.index(stage * 4 + 2).load(ROW)[:, None] + i_q * 0.0
        drem = st_bufs.index(stage * 4 + 3).load(ROW)[:, None] + i_q * 0.0
        delta_a, delta_b = _split_vector(delta, sta)
        drem_a, drem_b = _split_vector(drem, sta)
        later_a, later_b = _split_vector(later, sta)
        z01a, z23a, later_a, sum_a = _gradients(
            h01a, h23a, d0a, d1a, d2a, d3a, b01a, b23a, sta, delta_a, drem_a, later_a, DTYPE
        )
        _cut(s)
        z01b, z23b, later_b, sum_b = _gradients(
            h01b, h23b, d0b, d1b, d2b, d3b, b01b, b23b, stb, delta_b, drem_b, later_b, DTYPE
        )
        later = _join_vector(later_a, later_b, left)
        if BIAS is not None:
            dbias += sum_a + sum_b
        if WG == 1:
            carry.index((s & 1) * 2 + 1).store(later)
            mbarrier.arrive(later_full.index(s & 1), count=1)
        else:
            o_word = gl.arange(0, 64, layout=ROW)[:, None] + (i_q * 0 + (i_tile * 2 + 1) * TILE)
            _leave(STATE, o_word, later, i_q * 0 + ((i_m + n_past) // 2 - i_n + 1), i_q)
        z0, z1 = _halves(_join_rows(z01a, z01b, st), DTYPE)
        z2, z3 = _halves(_join_rows(z23a, z23b, st), DTYPE)
        buf = _slot(s, NB)
        mbarrier.wait(ds_free.index(buf), _phase(s, NB) ^ 1)
        ds_bufs.index(buf * 2 + WG).store(_columns(z0, z1, z2, z3))
        fence_async_shared()
        mbarrier.arrive(ds_full.index(buf), count=1)
        s += 1
        # the next step's products; after the last step those of no queries
        mbarrier.wait(q_full.index(_slot(s, STAGES)), _phase(s, STAGES))
        i_m = _get(words.index((s & (WORDS - 1)) * 3 + 1), 4)
        ahead = warpgroup_mma(
            q_bufs.index(_slot(s, STAGES)).reshape([64, D]), k_buf.permute((1, 0)), zeros, use_acc=False, is_async=True
        )
        dk = warpgroup_mma(ds_bufs.index(buf * 2 + WG).permute((1, 0)), q_buf, dk_done, is_async=True)
        products = warpgroup_mma_wait(num_outstanding=1, deps=(ahead,))
        if BIAS is not None:
            # the next head, or the end
            i_bh = i_tile // n_tiles_of_row
            if (i_m < 0) | (_get(words.index((s & (WORDS - 1)) * 3), 4) // n_tiles_of_row != i_bh):
                total = gl.sum(gl.sum(gl.sum(dbias, 2), 1), 0)
                gl.store(DBIAS + (i_bh * n_programs + i_program) * 2 + WG, total)
                dbias = dbias * 0.0

    dk, dv = warpgroup_mma_wait(num_outstanding=0, deps=(dk, dv))
    mbarrier.arrive(empty.index(_slot(s + STAGES - 1, STAGES)), count=1, pred=s >= 1)
    if part[0] is not None:
        if part[3] >= 0:
            dk, dv = _add_ranges(dk, dv, part, WG)
    # through shared memory that only this warpgroup still uses, to write whole lines
    COLUMNS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, COLUMNS))
    o_key = gl.arange(0, 64, layout=gl.SliceLayout(1, COLUMNS))
    o_key = o_key % 8 // 2 * 16 + o_key // 8 * 2 + o_key % 2 + WG * 64
    o_tile = o_key[:, None] * stride_t + o_d[None, :]
    m_tile = (o_key + i_n * 128 < n_k)[:, None] & (o_d < D)[None, :]
    v_buf = v_bufs.index(WG)
    if part[5]:
        v_buf.store(dv.to(DTYPE))
        gl.store(DV + o_out + o_tile, v_buf.load(COLUMNS), mask=m_tile)
        v_buf.store((dk * (scale * 0.6931471805599453)).to(DTYPE))
        gl.store(DK + o_out + o_tile, v_buf.load(COLUMNS), mask=m_tile)
    # of the last two steps, where there were as many
    for _ in gl.static_range(2):
        back = _slot(s + NB - 2, NB)
        if s >= 2:
            mbarrier.wait(ds_full.index(back), _phase(s + NB - 2, NB) ^ 1)
            dq = _product_dq(ds_bufs, k_bufs, kd_bufs, back, s >> 30, WG, D)
            dq = warpgroup_mma_wait(num_outstanding=0, deps=(dq,))
            _give_dq(dq, dq_bufs, dq_bars, s - 2, WG)
        s += 1
    # word that there are no more
    s -= 2
    dq_full, dq_free = dq_bars
    mbarrier.wait(dq_free.index(_slot(s, NDQ)), _phase(s, NDQ) ^ 1)
    mbarrier.arrive(dq_full.index(_slot(s, NDQ)), count=1)


@gluon.jit(
    do_not_specialize=[
        "first_bg", "n_whole", "n_cut", "together", "cut_together", "n_heads", "n_queries", "n_keys", "n_blocks",
        "n_tiles_of_row", "n_sequences",
    ]
)  # fmt: skip
def backward_kernel(
    q_desc, do_desc, dq_desc, K, V, BIAS, DBIAS, DK, DV, STATE, DELTA, DQ_COUNT, TICKET, PARTS, STOP,
    CU_SEQLENS, BLOCKS, BY_LENGTH, TILES, stride_kb, stride_kt, stride_vb, stride_vt, first_bg, n_whole, n_cut,
    together, cut_together, n_heads, n_queries, n_keys, n_blocks, n_tiles_of_row, n_sequences, scale,
    GROUP: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, NB: gl.constexpr, NDQ: gl.constexpr,
    CURRENT: gl.constexpr, VARLEN: gl.constexpr, SKIP: gl.constexpr,
):  # fmt: skip
    """128 keys of one key-value head a program, the newest first.

    K, V: heads next to each other; DK, DV: (B, S, G, D) contiguous; STATE: (B H tiles, 2, 64) int64 and DELTA float32,
    see prepare_kernel; dq_desc: of (H tiles, 2, D, 32) float32 of these heads; DQ_COUNT: (B H tiles) int32, zeros;
    TICKET: 0, and from 4 on 0 for each 64 keys that heads which come in ranges share; PARTS: (these, 2, 64, D) float32;
    STOP: as in forward; DBIAS: (B H, RANGES, key tiles of a head, 2) float32, zeros. TILES counts query tiles of 64 of
    packed sequences cumulatively, BLOCKS key tiles of 128, of the shortest sequence first (BY_LENGTH: which it is).
    Packed sequences come whole.
    """
    ticket = gl.atomic_add(TICKET, 1)
    n_past = (n_keys - n_queries) // TILE
    # key tiles of packed sequences are counted through
    n_tiles = 2 * n_blocks if VARLEN else n_tiles_of_row
    shares = (n_whole, n_cut, together, cut_together)
    i_bg, i_n, begin, end, i_range, i_place, n_before, is_last = _deal(ticket, shares, n_blocks, n_tiles, n_past)
    i_bg += first_bg
    i_b = i_bg // (n_heads // GROUP)
    i_g = i_bg % (n_heads // GROUP)
    start = i_n * 0
    base = start
    n_q = n_queries
    if VARLEN:
        i_n += gl.load(BLOCKS + n_sequences) - n_blocks
    i_program = i_range * n_blocks + i_n
    if i_n >= 0:
        if VARLEN:
            i_sorted = _find_sequence(i_n, BLOCKS, n_sequences)
            i_n -= gl.load(BLOCKS + i_sorted)
            i_s = gl.load(BY_LENGTH + i_sorted)
            start = gl.load(CU_SEQLENS + i_s)
            n_q = gl.load(CU_SEQLENS + i_s + 1) - start
            base = gl.load(TILES + i_s)
            end = (n_q + TILE - 1) // TILE
        n_k = n_q + n_past * TILE
        DTYPE: gl.constexpr = q_desc.dtype
        FULL: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
        HALF: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2)
        FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
        FLAT2: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0])
        q_bufs = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 64, 1, D], q_desc.layout)
        do_bufs = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 64, 1, D], do_desc.layout)
        k_bufs = gl.allocate_shared_memory(DTYPE, [2, 64, D], FULL)
        v_bufs = gl.allocate_shared_memory(DTYPE, [2, 64, D], FULL)
        p_bufs = gl.allocate_shared_memory(DTYPE, [2, 64, 64], FULL)
        ds_bufs = gl.allocate_shared_memory(DTYPE, [NB * 2, 64, 64], FULL)
        st_bufs = gl.allocate_shared_memory(gl.float32, [STAGES * 4, 64], FLAT)
        dq_bufs = gl.allocate_shared_memory(gl.float32, [NDQ * 2, D, 32], dq_desc.layout)
        # from the newer warpgroup to the older: the stick left and the sum of g
        carry = gl.allocate_shared_memory(gl.float32, [4, 64, 4], FLAT2)
        words = gl.allocate_shared_memory(gl.int32, [WORDS * 3, 1], FLAT)
        said = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        later_in = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        st_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        left_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        later_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        dq_full = gl.allocate_shared_memory(gl.int64, [NDQ, 1], mbarrier.MBarrierLayout())
        dq_free = gl.allocate_shared_memory(gl.int64, [NDQ, 1], mbarrier.MBarrierLayout())
        ds_full = gl.allocate_shared_memory(gl.int64, [NB, 1], mbarrier.MBarrierLayout())
        ds_free = gl.allocate_shared_memory(gl.int64, [NB, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(2):
            mbarrier.init(left_full.index(i), count=1)
            mbarrier.init(later_full.index(i), count=1)
        for i in gl.static_range(NDQ):
            mbarrier.init(dq_full.index(i), count=2)
            mbarrier.init(dq_free.index(i), count=1)
        for i in gl.static_range(NB):
            mbarrier.init(ds_full.index(i), count=2)
            mbarrier.init(ds_free.index(i), count=2)
        for i in gl.static_range(STAGES):
            mbarrier.init(said.index(i), count=1)
            mbarrier.init(q_full.index(i), count=1)
            mbarrier.init(do_full.index(i), count=1)
            mbarrier.init(st_full.index(i), count=1)
            mbarrier.init(later_in.index(i), count=1)
            mbarrier.init(empty.index(i), count=2)
        p_k = K + i_b.to(gl.int64) * stride_kb + start.to(gl.int64) * stride_kt + i_g * D
        p_v = V + i_b.to(gl.int64) * stride_vb + start.to(gl.int64) * stride_vt + i_g * D
        if D == 64:
            # half of the columns, keys of either warpgroup
            kd_bufs = gl.allocate_shared_memory(DTYPE, [4, 64, 32], HALF)
        else:
            kd_bufs = k_bufs
        o_out = ((i_b * n_keys + start + i_n * 128).to(gl.int64) * (n_heads // GROUP) + i_g) * D
        stride_t = n_heads // GROUP * D
        bufs = (q_bufs, do_bufs, st_bufs, words, k_bufs, v_bufs, kd_bufs, p_bufs, ds_bufs, dq_bufs, carry)
        dq_bars = (dq_full, dq_free)
        bars = (
            q_full, do_full, st_full, later_in, empty, left_full, later_full, ds_full, ds_free, dq_bars
        )  # fmt: skip
        tensors = (STATE, BIAS, DBIAS, DK, DV, p_k, p_v, stride_kt, stride_vt)
        place = (i_n, i_program, RANGES * n_blocks, n_past, n_k, n_tiles_of_row, n_heads)
        p_place = (i_b, i_g, i_n, start, base, begin, end, n_past)
        part = (PARTS, TICKET + 4, i_range, i_place, n_before, is_last)
        gl.warp_specialize([
            (_consume, (bufs, bars, tensors, place, part, o_out, stride_t, scale, 0, D, STAGES, NB, CURRENT, GROUP)),
            (_consume, (bufs, bars, tensors, place, part, o_out, stride_t, scale, 1, D, STAGES, NB, CURRENT, GROUP)),
            (_produce, ((q_bufs, do_bufs, words), (q_full, do_full, empty, said), (q_desc, do_desc), STOP, p_place,
                        (n_heads, n_tiles_of_row), GROUP, D, STAGES, SKIP)),
            (_fetch, (words, st_bufs, (said, st_full, later_in), (STATE, DELTA), i_n, n_past, STAGES)),
            (_add_dq, (words, dq_bufs, dq_bars, dq_desc, DQ_COUNT, first_bg * GROUP * n_tiles_of_row, i_n, n_past, D)),
        ], [4, 1, 1, 1], [240, 24, 24, 24])  # fmt: skip


@triton.jit(do_not_specialize=["n_queries", "n_sequences"])
def prepare_kernel(
    OUT, RESIDUAL, DO, REMAINDER, DREMAINDER, STATE, DELTA, CU_SEQLENS, TILES, n_heads, n_queries, n_sequences,
    D: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Before the walk: a whole stick (none past the end) and no sum of g, both of no program (upper half of the word);
    delta with the remainder's part, that alone."""
    i_tile = tl.program_id(0)
    i_bh = tl.program_id(1)
    i_m, _, start, n_q, _ = _locate(i_tile, TILES, CU_SEQLENS, n_queries, n_queries, n_sequences, VARLEN)
    if i_m < 0:
        return
    o_m = tl.arange(0, 64)
    o_d = tl.arange(0, D)
    m_m = i_m * 64 + o_m < n_q
    rows = ((i_bh // n_heads).to(tl.int64) * n_queries + start + i_m * 64 + o_m) * n_heads + i_bh % n_heads
    p_rows = rows[:, None] * D + o_d[None, :]
    b_o = tl.load(OUT + p_rows, mask=m_m[:, None], other=0.0).to(tl.float32)
    b_o += tl.load(RESIDUAL + p_rows, mask=m_m[:, None], other=0.0).to(tl.float32)
    b_do = tl.load(DO + p_rows, mask=m_m[:, None], other=0.0).to(tl.float32)
    b_drem = tl.load(REMAINDER + rows, mask=m_m, other=0.0) * tl.load(DREMAINDER + rows, mask=m_m, other=0.0)
    o_row = (i_bh.to(tl.int64) * tl.num_programs(0) + i_tile) * 128 + o_m
    # 1 and 0 as bits
    tl.store(STATE + o_row, tl.where(m_m, 0x3F800000, 0).to(tl.int64))
    tl.store(STATE + o_row + 64, tl.zeros([64], tl.int64))
    tl.store(DELTA + o_row, tl.sum(b_o * b_do, 1) + b_drem)
    tl.store(DELTA + o_row + 64, b_drem)


@triton.jit(do_not_specialize=["first_bh", "n_queries", "n_sequences"])
def finish_kernel(
    DQ32, DQ, first_bh, CU_SEQLENS, TILES, n_heads, n_queries, n_sequences, scale, D: tl.constexpr, VARLEN: tl.constexpr
):
    """DQ (B, T, H, D) from tiles of 64 queries of the heads from first_bh on."""
    i_tile = tl.program_id(0)
    i_bh = first_bh + tl.program_id(1)
    i_m, _, start, n_q, _ = _locate(i_tile, TILES, CU_SEQLENS, n_queries, n_queries, n_sequences, VARLEN)
    if i_m < 0:
        return
    r = tl.arange(0, 64)[:, None]
    c = tl.arange(0, D)[None, :]
    # as _give_dq has laid it down
    x = tl.load(DQ32 + (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + i_tile) * (64 * D) + tl.arange(0, 64 * D))
    x = x.reshape(2, D // 16, 4, 8, 4, 2, 2).permute(2, 5, 3, 0, 1, 4, 6).reshape(64, D)
    row = (i_bh // n_heads).to(tl.int64) * n_queries + start + i_m * 64 + r
    m_row = (i_m * 64 + r < n_q) & (c < D)
    tl.store(DQ + (row * n_heads + i_bh % n_heads) * D + c, (x * scale).to(DQ.dtype.element_ty), mask=m_row)


# by head size: stages of queries and their gradients, buffers of the logits' gradients and of dq, and how many whole
# heads are dealt with at a time, where the L2 has room for them
CONFIGS: dict[int, dict[str, Any]] = {
    128: {"STAGES": 2, "NB": 2, "NDQ": 1, "TOGETHER": 2},
    64: {"STAGES": 2, "NB": 2, "NDQ": 1, "TOGETHER": 1},
}


# programs a multiprocessor from which on heads come in two parts
LONG = 32


def _cumulative(lengths: Tensor, size: int) -> Tensor:
    """(N + 1,) how many tiles of `size` rows stand before each of N sequences, and in all."""
    return torch.nn.functional.pad(((lengths + size - 1) // size).cumsum(0, dtype=torch.int32), (1, 0))


def backward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, remainder: Tensor, residual: Tensor,
    stop: Tensor, dout: Tensor, dremainder: Tensor, cu_seqlens: Tensor | None, scale: float, attend_current: bool,
    epsilon: float, config: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, in their dtypes, and of the bias (empty without one)."""
    q, k, v = _rows(q), _rows(k), _rows(v)
    dout, dremainder = dout.contiguous(), dremainder.contiguous()
    if dout.data_ptr() % 16:
        # a tensor map begins at a multiple
        dout = dout.clone()
    batch, n_queries, heads, dim = q.shape
    n_keys, groups = k.shape[1:3]
    config = dict(CONFIGS[dim] if config is None else config)
    together, processors = config.pop("TOGETHER"), _processors(q.device)
    n_blocks, n_tiles, n_sequences = triton.cdiv(n_keys, 128), triton.cdiv(n_queries, 64), 0
    blocks, by_length, tiles = None, None, None
    if cu_seqlens is not None:
        n_sequences = len(cu_seqlens) - 1
        n_blocks, n_tiles = n_blocks + n_sequences, n_tiles + n_sequences
        # the longest first, so that what the last programs have to do is short
        lengths = cu_seqlens.diff()
        shortest_first, by_length = lengths.sort()
        blocks, tiles = _cumulative(shortest_first, 128), _cumulative(lengths, 64)
    descs = [_query_tiles(q), _query_tiles(dout)]
    n_all = batch * heads * n_tiles
    n_bg = batch * groups
    # the heads in two parts, where each keeps all processors at work for long: half of the memory for dq in float32
    n_part = (n_bg + 1) // 2 if n_bg * n_blocks >= LONG * processors else n_bg
    empty = functools.partial(torch.empty, dtype=torch.float32, device=q.device)
    delta, dq32 = empty(n_all * 128), empty((n_part * (heads // groups) * n_tiles * 2 * dim, 32))
    columns = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)
    descs.append(TensorDescriptor(dq32, list(dq32.shape), [32, 1], [dim, 32], columns))
    state = torch.empty(n_all * 128, dtype=torch.int64, device=q.device)
    dq_count = torch.zeros(n_all, dtype=torch.int32, device=q.device)
    ranges, parts, n_shared = programs_of(n_tiles, (n_keys - n_queries) // 64), None, 0
    if cu_seqlens is None:
        *_, at_a_time = shares_of(n_part, n_blocks, n_tiles * 512 * dim, processors, together)
        n_shared = at_a_time * ranges[1] * 2
        parts = empty(n_shared * 2 * 64 * dim)
    tickets = torch.zeros((2, 4 + triton.cdiv(n_shared, 4) * 4), dtype=torch.int32, device=q.device)
    dq = torch.empty((batch, n_queries, heads, dim), dtype=q.dtype, device=q.device)
    dk, dv = (torch.empty((batch, n_keys, groups, dim), dtype=q.dtype, device=q.device) for _ in range(2))
    dbias = None if bias is None else empty((batch, heads, RANGES.value, n_blocks, 2)).zero_()
    packing = (cu_seqlens, tiles, heads, n_queries, n_sequences)
    prepare_kernel[(n_tiles, batch * heads)](
        out,
        residual,
        dout,
        remainder,
        dremainder,
        state,
        delta,
        *packing,
        D=dim,
        VARLEN=cu_seqlens is not None,
        num_warps=4,
    )
    for first, ticket in zip(range(0, n_bg, n_part), tickets, strict=False):
        n_these = min(n_part, n_bg - first)
        shares = n_these, 0, together, 1
        if cu_seqlens is None:
            shares = shares_of(n_these, n_blocks, n_tiles * 512 * dim, processors, together)
        backward_kernel[(shares[0] * n_blocks + shares[1] * sum(ranges),)](
            *descs, k, v, bias, dbias, dk, dv, state, delta, dq_count, ticket, parts, stop, cu_seqlens, blocks,
            by_length, tiles, k.stride(0), k.stride(1), v.stride(0), v.stride(1), first, *shares, heads, n_queries,
            n_keys, n_blocks, n_tiles, n_sequences, scale * LOG2_E, GROUP=heads // groups, D=dim,
            CURRENT=int(attend_current), VARLEN=cu_seqlens is not None, SKIP=epsilon > 0, **config, num_warps=4,
            maxnreg=REGISTERS[2],
        )  # fmt: skip
        finish_kernel[(n_tiles, n_these * (heads // groups))](
            dq32, dq, first * (heads // groups), *packing, scale, D=dim, VARLEN=cu_seqlens is not None, num_warps=4
        )
    return dq, dk, dv, remainder.new_empty(0) if dbias is None else dbias.sum((0, 2, 3, 4))
