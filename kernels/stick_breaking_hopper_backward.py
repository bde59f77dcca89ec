"""Backward of stick-breaking attention in Gluon for Hopper, in one pass; `stick_breaking.py` has the mathematics.

A program has 128 keys, 64 for each of two warpgroups, which keep dk and dv of theirs in registers and walk over the
tiles of 64 queries that see them: five products a tile, no saved states. Gradients of logits come as in
`stick_breaking_triton.py`, from the newest keys on.

- What a query brings along (the stick left, the sum of g) goes from the newer warpgroup to the older through shared
  memory, and from a program to the one of the next older keys through global memory: each number in one word with how
  many programs it comes from, so that who waits for it needs no fence. Programs draw tickets, the newest keys first, so
  that one which waits, waits for one that runs; one head after another, so that programs at work use the same queries
  at nearly the same time, and find them and dq in the L2.
- dq is added up in float32, from the newest keys to the oldest by a counter: same inputs, same bits. A warpgroup makes
  half of its columns from the logits' gradients of both, two steps behind, so that neither waits for the other.
- Products are begun before what they are made under: those of queries and keys at the end of the step before, dq under
  the exponentials, those of the output's gradients and values under the scan, dk under the next step.
- Three more warps, so that no warpgroup waits for memory: one brings queries and the output's gradients by TMA, one
  fetches what newer programs left, one adds to dq by TMA.
- A query tile's walk ends where forward stopped: older programs neither touch it nor wait for it.
- The longest programs are those of the oldest keys, which come last. So that no multiprocessor is long without one at
  the end, the last heads come in ranges of queries, the newest and longest range first: the programs of a range have
  fewer tiles, and add dk and dv to what those of the ranges before left of the same keys. Where the queries of one
  head are too many for the L2, those of all heads come so.
"""

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sbeval.kernels.stick_breaking_hopper import (
    REGISTERS,
    _columns,
    _cumulative,
    _cut,
    _exp2,
    _find_sequence,
    _from_neighbour,
    _from_other_pair,
    _get,
    _processors,
    _put,
    _quads,
    _reciprocal,
    _rows,
)
from sbeval.kernels.stick_breaking_triton import _locate

LOG2_E = math.log2(math.e)
RESOLUTION = gl.constexpr(2.0**-24)
TILE = gl.constexpr(64)
# beta, at most 1, in float16: what is over 2e-9 keeps 11 bits
BETA_SCALE = gl.constexpr(2.0**15)
# steps whose query tile is remembered
WORDS = gl.constexpr(8)
# of the queries of heads that come in ranges: with 5 these are 5/15, 4/15 .. 1/15 of the tiles
RANGES = gl.constexpr(5)


@gluon.jit
def _pack(older, newer, DTYPE: gl.constexpr):
    """Two numbers rounded to 16 bits in one word, the first in the lower half."""
    if DTYPE == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [older, newer], dtype=gl.int32, is_pure=True, pack=1
        )
    else:
        return gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [older, newer], dtype=gl.int32, is_pure=True, pack=1
        )


@gluon.jit
def _halves(x, DTYPE: gl.constexpr):
    return x.to(gl.int16).to(DTYPE, bitcast=True), (x >> 16).to(gl.int16).to(DTYPE, bitcast=True)


@gluon.jit
def _slot(s, N: gl.constexpr):
    """s % N; from a remainder the compiler makes addresses that it carries from step to step, in registers."""
    if N & (N - 1):
        return s % N
    else:
        return s & (N - 1)


@gluon.jit
def _phase(s, N: gl.constexpr):
    """Parity of how often the slot has been used before."""
    return (s // N) & 1


@gluon.jit
def _wait_for(p_count, wanted):
    """0, once the counter at p_count has reached `wanted`."""
    return gl.inline_asm_elementwise(
        """{
        .reg .pred p;
        .reg .u32 v;
        W: ld.acquire.gpu.global.u32 v, [$1];
        setp.lt.s32 p, v, $2;
        @p bra W;
        mov.b64 $0, 0;
        }""",
        "=l,l,r", [p_count, wanted], dtype=gl.int64, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _find(p_first, p_second, count):
    """The numbers in the lower halves of two words of 64 bits, once both upper halves have `count`."""
    return gl.inline_asm_elementwise(
        """{
        .reg .pred p, q;
        .reg .b64 x, y;
        .reg .b32 m, n;
        W: ld.relaxed.gpu.global.b64 x, [$2];
        ld.relaxed.gpu.global.b64 y, [$3];
        mov.b64 {$0, m}, x;
        mov.b64 {$1, n}, y;
        setp.ne.s32 p, m, $4;
        setp.ne.s32 q, n, $4;
        or.pred p, p, q;
        @p bra W;
        }""",
        "=&r,=&r,l,l,r", [p_first, p_second, count], dtype=(gl.float32, gl.float32), is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _leave(WORDS_64, o_word, value, count, i_q):
    """Write a number and, in the same word, how many programs it comes from; of four threads that have it, one does."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred p;
        .reg .b64 a, x;
        mad.wide.s32 a, $2, 8, $1;
        mov.b64 x, {$3, $4};
        setp.eq.s32 p, $5, 0;
        @p st.relaxed.gpu.global.b64 [a], x;
        mov.u32 $0, 0;
        }""",
        "=r,l,r,r,r,r", [WORDS_64, o_word, value.to(gl.int32, bitcast=True), count, i_q],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _publish(p_count):
    """Add 1 to a counter, so that who sees it sees what this warp wrote before, and what it saw."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred p;
        .reg .u32 t;
        mov.u32 t, %laneid;
        setp.eq.u32 p, t, 0;
        bar.warp.sync 0xffffffff;
        fence.acq_rel.gpu;
        @p red.relaxed.gpu.global.add.u32 [$1], 1;
        mov.u32 $0, t;
        }""",
        "=r,l", [p_count], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _publish_all(p_count):
    """Add 4 to a counter: 1 for each warp of a warpgroup."""
    _publish(p_count)


@builtin
def _add_to_global(descriptor, corner, buffer, _semantic=None):
    """Add a tile of shared memory to global memory, in the background; Gluon's copies have no such form."""
    corner = _semantic._convert_to_ir_values(corner, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, descriptor.handle, corner, buffer.handle)


@gluon.jit
def _wait_for_additions(s):
    """Until what this warp adds has arrived; `tma.store_wait` waits until it has been read only."""
    gl.inline_asm_elementwise(
        "cp.async.bulk.wait_group 0; mov.u32 $0, $1;", "=r,r", [s], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _groups(x):
    """(M, 4, 4) to four (M, 4), oldest first."""
    M: gl.constexpr = x.shape[0]
    even, odd = gl.split(x.reshape([M, 4, 2, 2]))
    x0, x2 = gl.split(even)
    x1, x3 = gl.split(odd)
    return x0, x1, x2, x3


@gluon.jit
def _scan_product(x, LAYOUT: gl.constexpr):
    """x (M, 4, 4): products of this and all newer groups of a quarter; of all newer quarters, and of all, (M, 4)."""
    x0, x1, x2, x3 = _groups(x)
    x2 = x2 * x3
    x1 = x1 * x2
    x0 = x0 * x1
    part = gl.convert_layout(x0, LAYOUT, assert_trivial=True)
    i_q = gl.arange(0, 4, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    near = _from_neighbour(part)
    pair = part * near
    far = _from_other_pair(pair)
    newer = gl.where(i_q % 2 == 0, near, 1.0) * gl.where(i_q < 2, far, 1.0)
    return x0, x1, x2, x3, newer, pair * far


@gluon.jit
def _scan_sum(x, LAYOUT: gl.constexpr):
    x0, x1, x2, x3 = _groups(x)
    x2 = x2 + x3
    x1 = x1 + x2
    x0 = x0 + x1
    part = gl.convert_layout(x0, LAYOUT, assert_trivial=True)
    i_q = gl.arange(0, 4, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    near = _from_neighbour(part)
    pair = part + near
    far = _from_other_pair(pair)
    newer = gl.where(i_q % 2 == 0, near, 0.0) + gl.where(i_q < 2, far, 0.0)
    return x0, x1, x2, x3, newer, pair + far


@gluon.jit
def _regroup(x0, x1, x2, x3, like):
    M: gl.constexpr = x0.shape[0]
    x = gl.join(gl.join(x0, x2), gl.join(x1, x3)).reshape([M, 4, 4])
    return gl.convert_layout(x, like.type.layout, assert_trivial=True)


@gluon.jit
def _split_rows(x):
    """(64, 4, G): the first and the second row of each thread, (32, 4, G) each."""
    G: gl.constexpr = x.shape[2]
    a, b = gl.split(x.reshape([4, 2, 8, 4, G]).permute(0, 2, 3, 4, 1))
    return a.reshape([32, 4, G]), b.reshape([32, 4, G])


@gluon.jit
def _join_rows(a, b, like):
    G: gl.constexpr = a.shape[2]
    x = gl.join(a.reshape([4, 8, 4, G]), b.reshape([4, 8, 4, G])).permute(0, 4, 1, 2, 3).reshape([64, 4, G])
    return gl.convert_layout(x, like.type.layout, assert_trivial=True)


@gluon.jit
def _weights(t0, t1, t2, t3, u0, w3, st, DTYPE: gl.constexpr):
    """Weights, rounded, and 2^15 beta in float16 (beta is kept for long, and registers are few), two in a word.

    p_k = u_0 .. u_k, q_k = t_k p_(k-1); weight q_k s, beta_k = q_k / p_k.
    """
    q1 = t1 * u0
    p1 = u0 + q1
    q2 = t2 * p1
    q3 = t3 * (p1 + q2)
    w3 *= BETA_SCALE
    w2 = w3 + t3 * w3
    w1 = w2 + t2 * w2
    older, newer = _pack(t0 * st, q1 * st, DTYPE), _pack(q2 * st, q3 * st, DTYPE)
    return older, newer, _pack(t0 * (w1 + t1 * w1), q1 * w1, gl.float16), _pack(q2 * w2, q3 * w3, gl.float16)


@gluon.jit
def _split_vector(x, like):
    """(64, 4): the first and the second row of each thread, (32, 4) each."""
    a, b = gl.split(x.reshape([4, 2, 8, 4]).permute(0, 2, 3, 1))
    LAYOUT: gl.constexpr = gl.SliceLayout(2, like.type.layout)
    a = gl.convert_layout(a.reshape([32, 4]), LAYOUT, assert_trivial=True)
    return a, gl.convert_layout(b.reshape([32, 4]), LAYOUT, assert_trivial=True)


@gluon.jit
def _join_vector(a, b, like):
    x = gl.join(a.reshape([4, 8, 4]), b.reshape([4, 8, 4])).permute(0, 3, 1, 2).reshape([64, 4])
    return gl.convert_layout(x, like.type.layout, assert_trivial=True)


@gluon.jit
def _gradients(h01, h23, d0, d1, d2, d3, b01, b23, st, delta, drem, later, DTYPE: gl.constexpr):
    """Gradients of the logits, rounded, two in a word; the sum of g with these keys. delta has drem in it.

    The weights are rounded as in forward, so that the sum of g is do . o, not that and the rounding errors of all.
    """
    LAYOUT: gl.constexpr = gl.SliceLayout(2, st.type.layout)
    h0, h1 = _halves(h01, DTYPE)
    h2, h3 = _halves(h23, DTYPE)
    b0, b1 = _halves(b01, gl.float16)
    b2, b3 = _halves(b23, gl.float16)
    e0 = h0.to(gl.float32) * d0
    g1 = h1.to(gl.float32) * d1
    g2 = h2.to(gl.float32) * d2
    g3 = h3.to(gl.float32) * d3
    x0, x1, x2, x3, newer, whole = _scan_sum((e0 + g1) + (g2 + g3), LAYOUT)
    newer = gl.convert_layout(newer + later, x0.type.layout, assert_trivial=True)
    since = _regroup(x0 + newer, x1 + newer, x2 + newer, x3 + newer, st)
    # beta has a factor, and this its inverse
    older = gl.where(st > RESOLUTION, delta[:, :, None] - since, drem[:, :, None]) * (1.0 / BETA_SCALE)
    older += e0 * (1.0 / BETA_SCALE)
    z0 = e0 - b0.to(gl.float32) * older
    older += g1 * (1.0 / BETA_SCALE)
    z1 = g1 - b1.to(gl.float32) * older
    older += g2 * (1.0 / BETA_SCALE)
    z2 = g2 - b2.to(gl.float32) * older
    older += g3 * (1.0 / BETA_SCALE)
    z3 = g3 - b3.to(gl.float32) * older
    return _pack(z0, z1, DTYPE), _pack(z2, z3, DTYPE), later + whole, (z0 + z1) + (z2 + z3)


@gluon.jit
def _edge(n_tiles, i):
    """Where the i-th range of query tiles ends."""
    return n_tiles * ((RANGES - i) * (RANGES + 1 - i)) // (RANGES * (RANGES + 1))


@gluon.jit
def _n_programs(end, n_past):
    """How many programs have queries before tile `end`."""
    return gl.where(end > 0, (end + n_past + 1) // 2, 0)


@gluon.jit
def _deal(ticket, shares, n_blocks, n_tiles, n_past):
    """The head, key tile and query tiles of a program; which range that is, and where it leaves dk and dv.

    shares: heads that come whole, those that come in ranges, and how many at a time of the former and the latter.
    """
    n_whole, n_cut, together, cut_together = shares
    i_cut = ticket - n_whole * n_blocks
    is_cut = i_cut >= 0
    n_programs = n_blocks
    for i in gl.static_range(1, RANGES):
        n_programs += gl.where(is_cut, _n_programs(_edge(n_tiles, i), n_past), 0)
    together = gl.where(is_cut, cut_together, together)
    ticket = gl.where(is_cut, i_cut, ticket)
    turn = ticket // (together * n_programs)
    first = turn * together
    ticket -= first * n_programs
    members = gl.minimum(together, gl.where(is_cut, n_cut, n_whole) - first)
    i_member = ticket % members
    ticket = ticket // members
    i_range = 0 * ticket
    begin = gl.where(is_cut, _edge(n_tiles, 1), 0)
    end = n_tiles
    for i in gl.static_range(1, RANGES):
        is_later = ticket >= _n_programs(end, n_past)
        ticket -= gl.where(is_later, _n_programs(end, n_past), 0)
        i_range += gl.where(is_later, 1, 0)
        end = gl.where(is_later, begin, end)
        begin = gl.where(is_later, _edge(n_tiles, i + 1), begin)
    i_n = _n_programs(end, n_past) - 1 - ticket
    # where all ranges of these keys leave dk and dv, or -1; how often others have been there before
    n_shared = _n_programs(_edge(n_tiles, 1), n_past)
    i_place = gl.where(is_cut & (i_n < n_shared), i_member * n_shared + i_n, -1)
    n_before = i_range
    for i in gl.static_range(RANGES):
        n_before += gl.where(i_n < _n_programs(_edge(n_tiles, i), n_past), turn, 0)
    is_last = i_n >= _n_programs(begin, n_past)
    return gl.where(is_cut, n_whole, 0) + first + i_member, i_n, begin, end, i_range, i_place, n_before, is_last


@gluon.jit
def _next_tile(p_stop, i_m, n_tiles, last_key):
    """The first query tile from i_m on whose walk came to keys up to last_key; n_tiles if there is none."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    o_tile = gl.arange(0, 64, layout=LAYOUT)
    found = n_tiles
    while (i_m < n_tiles) & (found == n_tiles):
        stop = gl.load(p_stop + i_m + o_tile, mask=i_m + o_tile < n_tiles, other=0x7FFFFFFF)
        found = gl.min(gl.where(stop <= last_key, i_m + o_tile, n_tiles), 0)
        i_m += 64
    return found


@gluon.jit
def _announce(words, said, empty, s, i_tile, i_m, stop, STAGES: gl.constexpr):
    """Wait until a stage is free, and say which query tile comes (none: i_m = -1)."""
    mbarrier.wait(empty.index(_slot(s, STAGES)), _phase(s, STAGES) ^ 1)
    _put(words.index((s & (WORDS - 1)) * 3), i_tile, 1)
    _put(words.index((s & (WORDS - 1)) * 3 + 1), i_m, 1)
    _put(words.index((s & (WORDS - 1)) * 3 + 2), stop, 1)
    mbarrier.arrive(said.index(_slot(s, STAGES)), count=1)


@gluon.jit
def _produce(
    bufs, bars, descs, STOP, place, sizes, GROUP: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    SKIP: gl.constexpr,
):  # fmt: skip
    """A warp that brings queries and their gradients."""
    q_bufs, do_bufs, words = bufs
    q_full, do_full, empty, said = bars
    q_desc, do_desc = descs
    i_b, i_g, i_n, start, base, begin, end, n_past = place
    n_heads, n_tiles_of_row = sizes
    s = 0
    for member in range(GROUP):
        i_h = i_g * GROUP + member
        i_row = (i_b * n_heads + i_h) * n_tiles_of_row + base
        i_m = gl.maximum(2 * i_n - n_past, begin)
        if SKIP:
            i_m = _next_tile(STOP + i_row, i_m, end, 128 * i_n + 127)
        while i_m < end:
            stage = _slot(s, STAGES)
            stop = 0
            if SKIP:
                stop = gl.load(STOP + i_row + i_m)
            _announce(words, said, empty, s, i_row + i_m, i_m, stop, STAGES)
            row = start + i_m * TILE
            mbarrier.expect(q_full.index(stage), TILE * D * 2)
            tma.async_copy_global_to_shared(q_desc, [i_b, row, i_h, 0], q_full.index(stage), q_bufs.index(stage))
            mbarrier.expect(do_full.index(stage), TILE * D * 2)
            tma.async_copy_global_to_shared(do_desc, [i_b, row, i_h, 0], do_full.index(stage), do_bufs.index(stage))
            s += 1
            i_m += 1
            if SKIP:
                i_m = _next_tile(STOP + i_row, i_m, end, 128 * i_n + 127)
    _announce(words, said, empty, s, 0, -1, 0, STAGES)
    mbarrier.arrive(q_full.index(_slot(s, STAGES)), count=1)


@gluon.jit
def _fetch(words, st_bufs, bars, tensors, i_n, n_past, STAGES: gl.constexpr):
    """A warp that waits for what the program of the next newer keys leaves, and fetches it."""
    said, st_full, later_in = bars
    STATE, DELTA = tensors
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    o_m = gl.arange(0, TILE, layout=LAYOUT)
    o_half = gl.arange(0, TILE // 2, layout=LAYOUT)
    s = 0
    mbarrier.wait(said.index(0), 0)
    i_m = _get(words.index(1), 1)
    while i_m >= 0:
        stage = _slot(s, STAGES)
        i_tile = _get(words.index((s & (WORDS - 1)) * 3), 1)
        p_state = STATE + i_tile.to(gl.int64) * (2 * TILE)
        p_delta = DELTA + i_tile.to(gl.int64) * (2 * TILE)
        delta = gl.load(p_delta + o_m)
        drem = gl.load(p_delta + (TILE + o_m))
        newer = (i_m + n_past) // 2 - i_n + o_half * 0
        first, second = _find(p_state + o_half, p_state + (TILE // 2 + o_half), newer)
        st_bufs.index(stage * 4).slice(0, TILE // 2).store(first)
        st_bufs.index(stage * 4).slice(TILE // 2, TILE // 2).store(second)
        st_bufs.index(stage * 4 + 2).store(delta)
        st_bufs.index(stage * 4 + 3).store(drem)
        mbarrier.arrive(st_full.index(stage), count=1)
        first, second = _find(p_state + (TILE + o_half), p_state + (TILE + TILE // 2 + o_half), newer)
        st_bufs.index(stage * 4 + 1).slice(0, TILE // 2).store(first)
        st_bufs.index(stage * 4 + 1).slice(TILE // 2, TILE // 2).store(second)
        mbarrier.arrive(later_in.index(stage), count=1)
        s += 1
        mbarrier.wait(said.index(_slot(s, STAGES)), _phase(s, STAGES))
        i_m = _get(words.index((s & (WORDS - 1)) * 3 + 1), 1)


@gluon.jit
def _add_dq(words, dq_bufs, bars, dq_desc, DQ_COUNT, first_tile, i_n, n_past, D: gl.constexpr):
    """A warp that adds to dq, after the programs of newer keys; that of the newest writes it."""
    dq_full, dq_free = bars
    NDQ: gl.constexpr = dq_bufs.shape[0] // 2
    s = 0
    mbarrier.wait(dq_full.index(0), 0)
    i_m = _get(words.index(1), 1)
    while i_m >= 0:
        i_tile = _get(words.index((s & (WORDS - 1)) * 3), 1)
        newer = (i_m + n_past) // 2 - i_n
        _wait_for(DQ_COUNT + i_tile, newer)
        for half in gl.static_range(2):
            corner = [((i_tile - first_tile) * 2 + half) * D, 0]
            if newer == 0:
                tma.async_copy_shared_to_global(dq_desc, corner, dq_bufs.index(_slot(s, NDQ) * 2 + half))
            else:
                _add_to_global(dq_desc, corner, dq_bufs.index(_slot(s, NDQ) * 2 + half))
        tma.store_wait(0)
        mbarrier.arrive(dq_free.index(_slot(s, NDQ)), count=1)
        _wait_for_additions(s)
        _publish(DQ_COUNT + i_tile)
        s += 1
        mbarrier.wait(dq_full.index(_slot(s, NDQ)), _phase(s, NDQ))
        i_m = _get(words.index((s & (WORDS - 1)) * 3 + 1), 1)


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
        kd_bufs.index(WG * 2).store(k0)
        kd_bufs.index(WG * 2 + 1).store(k1)
    k_bufs.index(WG).store(k)
    v_bufs.index(WG).store(v)
    fence_async_shared()


@gluon.jit
def _add_ranges(dk, dv, part, WG: gl.constexpr, LAYOUT: gl.constexpr):
    """dk and dv with those of the ranges before, which this leaves to the next."""
    PARTS, p_count, i_range, i_place, n_before, is_last = part
    D: gl.constexpr = dk.shape[1]
    o_row = gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
    o_part = o_row[:, None] * D + gl.arange(0, D, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    i_part = i_place * 2 + WG
    p_count += i_part
    # also where there is nothing to add: another head may have been here, and must have read what it left
    p_dk = PARTS + i_part.to(gl.int64) * (2 * 64 * D) + _wait_for(p_count, 4 * n_before)
    p_dv = p_dk + 64 * D
    if i_range > 0:
        dk += gl.load(p_dk + o_part)
        dv += gl.load(p_dv + o_part)
    if not is_last:
        gl.store(p_dk + o_part, dk)
        gl.store(p_dv + o_part, dv)
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
            dk, dv = _add_ranges(dk, dv, part, WG, O_LAYOUT)
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
# bytes of queries, their gradients and dq that stay in an L2 of 50 MB from one program to the next
CACHED = 32 << 20


def _shares(n_bg: int, n_blocks: int, n_bytes: int, processors: int, together: int) -> tuple[int, int, int, int]:
    """`shares` of _deal for heads of so many bytes."""
    if n_bytes > CACHED:
        return 0, n_bg, 1, 1
    # all processors have programs of the last heads when the others end
    n_cut = min(n_bg, triton.cdiv(processors, n_blocks))
    return n_bg - n_cut, n_cut, max(1, min(together, CACHED // n_bytes)), n_cut


def _programs(n_tiles: int, n_past: int) -> list[int]:
    """How many programs each range of a head has; see _edge and _n_programs."""
    n = RANGES.value
    edges = [n_tiles * (n - i) * (n + 1 - i) // (n * (n + 1)) for i in range(n)]
    return [(edge + n_past + 1) // 2 if edge else 0 for edge in edges]


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
        lengths, by_length = cu_seqlens.diff().sort()
        blocks = torch.nn.functional.pad(((lengths + 127) // 128).cumsum(0, dtype=torch.int32), (1, 0))
        tiles = _cumulative(cu_seqlens, 64)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    descs = [TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 64, 1, dim], layout) for x in (q, dout)]
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
    ranges, parts, n_shared = _programs(n_tiles, (n_keys - n_queries) // 64), None, 0
    if cu_seqlens is None:
        *_, at_a_time = _shares(n_part, n_blocks, n_tiles * 512 * dim, processors, together)
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
            shares = _shares(n_these, n_blocks, n_tiles * 512 * dim, processors, together)
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
