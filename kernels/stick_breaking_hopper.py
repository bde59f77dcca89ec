"""Forward of stick-breaking attention in Gluon for Hopper; `stick_breaking.py` has the mathematics and is the way in.

One program a multiprocessor: a warp that fetches by TMA, and warpgroups of 64 queries each that share what it brings.
The stick is broken as in `stick_breaking_triton.py`, a thread's quarter of a tile's keys in a row; a tensor map of five
dimensions lays keys and values down in that order, key 16 q + 2 i + r of a tile in row 8 i + 2 q + r.

- A program draws tiles of queries from a counter, the longest first. The next tile's queries and keys are on their way
  while the last one's output is written, which TMA reads from shared memory under the next tile's first weights.
- A warpgroup computes weights while its last product of weights and values, and the other warpgroups' products, keep
  the tensor cores busy.
- A warpgroup stops when its own stick is used up. From then on it takes tiles only to give them back; once all have
  stopped, the producer ends the walk with an empty tile.

A stage of the ring in shared memory has a tile's keys and the values of the tile before: one barrier says that it is
full and one that it is free. All parties count the stages that go through (`slot`), and wait for each of them, needed
or not: a barrier tells an odd phase from an even one, no more, so that who lets one pass may take the next for it.

Variable grammar: i_ index, o_ offsets, p_ pointers, m_ masks, n_ counts.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

LOG2_E = math.log2(math.e)
# queries of a warpgroup, and keys of a tile
TILE = gl.constexpr(64)
# numbers by which the producer says what a tile of queries is
WORDS = gl.constexpr(8)


@gluon.jit
def _exp2(x):
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _reciprocal(x):
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _from_neighbour(x):
    """(M, 4): the value of quarter q ^ 1, which another thread has."""
    return gl.inline_asm_elementwise(
        "shfl.sync.bfly.b32 $0, $1, 1, 0x1f, 0xffffffff;", "=r,r", [x], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def _from_other_pair(x):
    """(M, 4): the value of quarter q ^ 2."""
    return gl.inline_asm_elementwise(
        "shfl.sync.bfly.b32 $0, $1, 2, 0x1f, 0xffffffff;", "=r,r", [x], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def _quads(x):
    """(M, N) in thread order to four (M, 4, N / 16): oldest to newest of each four keys in a row."""
    M: gl.constexpr = x.shape[0]
    N: gl.constexpr = x.shape[1]
    x = x.reshape([M, N // 8, 4, 2]).permute(0, 2, 1, 3).reshape([M, 4, N // 16, 2, 2])
    even, odd = gl.split(x)
    x0, x2 = gl.split(even)
    x1, x3 = gl.split(odd)
    return x0, x1, x2, x3


@gluon.jit
def _columns(x0, x1, x2, x3):
    """The inverse of _quads."""
    M: gl.constexpr = x0.shape[0]
    N: gl.constexpr = x0.shape[2] * 16
    x = gl.join(gl.join(x0, x2), gl.join(x1, x3)).reshape([M, 4, N // 8, 2])
    return x.permute(0, 2, 1, 3).reshape([M, N])


@gluon.jit
def _newer_quarters(x, left):
    """x (M, 4), oldest quarter first: the stick `left` (M, 4) after all newer quarters, and after all four."""
    i_q = gl.arange(0, 4, layout=gl.SliceLayout(0, x.type.layout))[None, :]
    near = _from_neighbour(x)
    pair = x * near
    far = _from_other_pair(pair)
    newer = left * gl.where(i_q % 2 == 0, near, 1.0) * gl.where(i_q < 2, far, 1.0)
    return newer, left * (pair * far)


@gluon.jit
def _weights(b_products, left, scale, shift, m_tile, MASKED: gl.constexpr):
    """Weights (64, 64) of a tile and the stick after it.

    With p_k = u_0 .. u_k and q_k = t_k p_(k-1) of four keys in a row, the oldest first, key k gets q_k s, where s is
    the stick that all four leave.
    """
    M: gl.constexpr = b_products.shape[0]
    b_logit = gl.minimum(b_products * scale + shift, 30.0)
    if MASKED:
        b_logit = gl.where(m_tile, b_logit, float("-inf"))
    q0, t1, t2, t3 = _quads(_exp2(b_logit))
    p = 1.0 + q0
    q1 = t1 * p
    p += q1
    q2 = t2 * p
    p += q2
    q3 = t3 * p
    rest = _reciprocal(p + q3)
    # from the newest group of a quarter to its oldest
    even, odd = gl.split(rest.reshape([M, 4, 2, 2]))
    r0, r2 = gl.split(even)
    r1, r3 = gl.split(odd)
    r2 = r2 * r3
    r1 = r1 * r2
    r0 = r0 * r1
    newer, left = _newer_quarters(gl.convert_layout(r0, left.type.layout, assert_trivial=True), left)
    newer = gl.convert_layout(newer, r0.type.layout, assert_trivial=True)
    s = gl.join(gl.join(r0 * newer, r2 * newer), gl.join(r1 * newer, r3 * newer)).reshape([M, 4, 4])
    s = gl.convert_layout(s, q0.type.layout, assert_trivial=True)
    return _columns(q0 * s, q1 * s, q2 * s, q3 * s), left


@gluon.jit
def _is_used_up(left, epsilon):
    return gl.max(gl.max(left, 1), 0) <= epsilon


@gluon.jit
def _put(word, value, WARPS: gl.constexpr):
    """Write a number to one word of shared memory."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    word.store(gl.full([1], value, gl.int32, layout=LAYOUT))


@gluon.jit
def _get(word, WARPS: gl.constexpr):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    return gl.sum(word.load(LAYOUT), 0)


@gluon.jit
def _cut(x):
    """Nothing; but the compiler moves no arithmetic over a loop, which it can't know never to turn."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred p;
        C: setp.ne.s32 p, $1, 0x7fffffff;
        @p bra E;
        nanosleep.u32 64;
        bra C;
        E: mov.u32 $0, 0;
        }""",
        "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _find_sequence(i_block, BLOCKS, n_sequences):
    """Index of the packed sequence whose tiles include tile i_block; BLOCKS counts tiles cumulatively."""
    low = 0
    high = n_sequences
    while high - low > 1:
        middle = (low + high) // 2
        before = gl.load(BLOCKS + middle)
        low = gl.where(before <= i_block, middle, low)
        high = gl.where(before <= i_block, high, middle)
    return low


@gluon.jit
def _find_tile(ticket, n_blocks, PLAN, counts, NWG: gl.constexpr, VARLEN: gl.constexpr):
    """What a ticket is for: a head, and of a tile of queries its first row within its sequence (before it, where the
    sequence does not fill its first tile), the sequence's first row and length, and how many tiles of 64 stand before.
    """
    n_bh, _, n_queries, _, _, _ = counts
    i_bh = ticket % n_bh
    i_tile = n_blocks - 1 - ticket // n_bh
    start = 0
    n_q = n_queries
    stop_block = 0
    # the last tile ends with the sequence
    row = ((n_queries + TILE - 1) // TILE - (n_blocks - i_tile) * NWG) * TILE
    if VARLEN:
        p_tile = PLAN + 4 + i_tile * 4
        start = gl.load(p_tile)
        n_q = gl.load(p_tile + 1)
        row = gl.load(p_tile + 2)
        stop_block = gl.load(p_tile + 3)
    return i_bh, row, start, n_q, stop_block


@gluon.jit
def _has_stopped(stop, first_slot, slot, STAGES: gl.constexpr):
    """Whether a warpgroup stopped within this walk, at a slot that the producer has seen it give back.

    What it writes of a later stop may come while the producer's threads read: they would see different numbers, but
    here none of them makes a difference.
    """
    return gl.where((stop >= first_slot) & (stop + STAGES <= slot), 1, 0)


@gluon.jit
def _copy(desc, bufs, full, stage, first, col, wanted, D: gl.constexpr):
    """Half of what a stage waits for: keys or values, or word that they are not needed."""
    mbarrier.expect(full.index(stage), TILE * D * 2, pred=wanted)
    tma.async_copy_global_to_shared(desc, [first, 0, 0, 0, col], full.index(stage), bufs.index(stage), pred=wanted)
    mbarrier.arrive(full.index(stage), count=1, pred=wanted == 0)


@gluon.jit
def _produce(
    ring, descriptors, PLAN, n_blocks, counts, GROUP: gl.constexpr, D: gl.constexpr, NWG: gl.constexpr,
    STAGES: gl.constexpr, QUEUE: gl.constexpr, VARLEN: gl.constexpr, SKIP: gl.constexpr,
):  # fmt: skip
    q_bufs, r_bufs, k_bufs, v_bufs, words, stopped, cut, q_full, q_empty, full, empty = ring
    q_desc, k_desc, v_desc = descriptors
    n_bh, n_heads, n_queries, n_keys, n_key_rows, n_stops = counts
    if VARLEN:
        n_blocks = gl.load(PLAN + 1)
    n_items = n_blocks * n_bh
    n_past = (n_keys - n_queries) // TILE
    slot = 0
    item = 0
    ticket = gl.program_id(0)
    while ticket < n_items:
        i_bh, row, start, n_q, stop_block = _find_tile(ticket, n_blocks, PLAN, counts, NWG, VARLEN)
        i_b = i_bh // n_heads
        i_h = i_bh % n_heads
        n_tiles = n_past + row // TILE + NWG
        place = item % QUEUE
        mbarrier.wait(q_empty.index(place), ((item // QUEUE) & 1) ^ 1)
        _put(words.index(place * WORDS), i_b, 1)
        _put(words.index(place * WORDS + 1), i_h, 1)
        _put(words.index(place * WORDS + 2), row, 1)
        _put(words.index(place * WORDS + 3), start, 1)
        _put(words.index(place * WORDS + 4), n_q, 1)
        _put(words.index(place * WORDS + 5), i_bh * n_stops + stop_block, 1)
        _put(words.index(place * WORDS + 6), slot, 1)
        mbarrier.expect(q_full.index(place), NWG * TILE * D * 2)
        for w in gl.static_range(NWG):
            tma.async_copy_global_to_shared(
                q_desc, [i_b, gl.maximum(start + row + TILE * w, 0), i_h, 0], q_full.index(place),
                q_bufs.index(place * NWG + w),
            )  # fmt: skip
        col = i_h // GROUP * D
        i = 0
        first_slot = slot
        wanted = True
        while (i <= n_tiles) & wanted:
            stage = slot % STAGES
            mbarrier.wait(empty.index(stage), ((slot // STAGES) & 1) ^ 1)
            if SKIP:
                ended = 0
                for w in gl.static_range(NWG):
                    ended += _has_stopped(_get(stopped.index(w), 1), first_slot, slot, STAGES)
                wanted = ended < NWG
                if ended == NWG:
                    _put(cut.index(0), slot, 1)
            # the newest tile may reach past the last row of all: a window that ends there
            first = i_b * n_keys + start + (n_tiles - 1 - i) * TILE
            _copy(k_desc, k_bufs, full, stage, gl.minimum(first, n_key_rows - TILE), col, wanted & (i < n_tiles), D)
            _copy(v_desc, v_bufs, full, stage, gl.minimum(first + TILE, n_key_rows - TILE), col, wanted & (i > 0), D)
            # while the ring is full, so that nobody waits for the answer
            if i == 1:
                ticket = gl.num_programs(0) + gl.atomic_add(PLAN, 1, sem="relaxed")
            slot += 1
            i += 1
        item += 1
    place = item % QUEUE
    mbarrier.wait(q_empty.index(place), ((item // QUEUE) & 1) ^ 1)
    _put(words.index(place * WORDS), -1, 1)
    mbarrier.arrive(q_full.index(place), count=1)


@gluon.jit
def _products(q_buf, q, k_buf, D: gl.constexpr, Q_REGS: gl.constexpr):
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    zeros = gl.zeros([TILE, TILE], gl.float32, S_LAYOUT)
    k = k_buf.reshape([TILE, D]).permute((1, 0))
    if Q_REGS:
        return warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
    else:
        return warpgroup_mma(q_buf.reshape([TILE, D]), k, zeros, use_acc=False, is_async=True)


@gluon.jit
def _consume(
    ring, tensors, sizes,
    WG: gl.constexpr, D: gl.constexpr, NWG: gl.constexpr, STAGES: gl.constexpr, QUEUE: gl.constexpr,
    CURRENT: gl.constexpr, VARLEN: gl.constexpr, SKIP: gl.constexpr, LOOK: gl.constexpr, Q_REGS: gl.constexpr,
):  # fmt: skip
    """One warpgroup: 64 queries of each tile, in turn the oldest and the newest, which have more keys to walk."""
    q_bufs, r_bufs, k_bufs, v_bufs, words, stopped, cut, q_full, q_empty, full, empty = ring
    BIAS, OUT, RESIDUAL, REMAINDER, STOP, out_desc, residual_desc = tensors
    n_heads, n_queries, n_keys, n_key_rows, scale, epsilon = sizes
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_LAYOUT, k_width=2)
    Q_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=S_LAYOUT, k_width=2)
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    dummy, dummy1, dummy2, dummy3 = _quads(gl.zeros([TILE, TILE], gl.float32, S_LAYOUT))
    QUARTERS: gl.constexpr = gl.SliceLayout(2, dummy.type.layout)
    DTYPE: gl.constexpr = k_bufs.dtype
    n_past = (n_keys - n_queries) // TILE
    slot = 0
    item = 0
    mbarrier.wait(q_full.index(0), 0)
    i_b = _get(words.index(0), 4)
    while i_b >= 0:
        place = item % QUEUE
        part = (item + WG) % NWG
        row = _get(words.index(place * WORDS + 2), 4) + part * TILE
        start = _get(words.index(place * WORDS + 3), 4)
        n_q = _get(words.index(place * WORDS + 4), 4)
        n_tiles = n_past + row // TILE + NWG - part
        shift = 0.0
        if BIAS is not None:
            shift = gl.load(BIAS + _get(words.index(place * WORDS + 1), 4)) * 1.4426950408889634
        q_buf = q_bufs.index(place * NWG + part)
        q = 0
        if Q_REGS:
            q = q_buf.reshape([TILE, D]).load(Q_LAYOUT)
        # 0, which the compiler does not know: or it keeps what comes of it in registers during the walk
        zero = slot >> 30
        o_left = gl.arange(0, TILE, layout=gl.SliceLayout(1, QUARTERS)) + zero
        # rows past the end have no stick, so that they keep nobody at work
        left = gl.where((row + o_left < n_q)[:, None], gl.full([TILE, 4], 1.0, gl.float32, QUARTERS), 0.0)

        # tiles newer than these queries are for the other warpgroups; before the first row there are no queries
        newer = gl.where(row < 0, 0, NWG - 1 - part)
        for _ in range(newer):
            mbarrier.wait(full.index(slot % STAGES), (slot // STAGES) & 1)
            mbarrier.arrive(empty.index(slot % STAGES), count=1)
            slot += 1
        # the tile of the diagonal; where it reaches past the last row of all, the window began `early`
        stage = slot % STAGES
        mbarrier.wait(full.index(stage), (slot // STAGES) & 1)
        ahead = _products(q_buf, q, k_bufs.index(stage), D, Q_REGS)
        products = warpgroup_mma_wait(num_outstanding=0, deps=(ahead,))
        mbarrier.arrive(empty.index(stage), count=1)
        early = gl.maximum(i_b * n_keys + start + (n_tiles - newer) * TILE - n_key_rows, 0)
        o_m = gl.arange(0, TILE, layout=gl.SliceLayout(1, S_LAYOUT)) + zero
        o_c = gl.arange(0, TILE, layout=gl.SliceLayout(0, S_LAYOUT)) + zero
        o_n = o_c % 8 // 2 * 16 + o_c // 8 * 2 + o_c % 2
        m_diagonal = (o_n[None, :] < o_m[:, None] + (CURRENT + early)) & (o_n >= early)[None, :]
        acc = gl.zeros([TILE, D], gl.float32, O_LAYOUT)
        weights, left = _weights(products, left, scale, shift, m_diagonal, True)
        p = gl.convert_layout(weights.to(DTYPE), P_LAYOUT)
        slot += 1
        # the last tile's output has been read
        tma.store_wait(0)
        mbarrier.arrive(q_empty.index((item + QUEUE - 1) % QUEUE), count=1, pred=item > 0)
        # the stage whose keys these queries do not need, but its values
        end = slot + gl.where(row < 0, 0, n_tiles - 1 - newer)
        look = slot + LOOK
        mbarrier.wait(full.index(slot % STAGES), (slot // STAGES) & 1)
        while slot < end:
            stage = slot % STAGES
            # this tile's products, then weights and values of the one before, which go on under this tile's weights
            ahead = _products(q_buf, q, k_bufs.index(stage), D, Q_REGS)
            ahead_acc = warpgroup_mma(p, v_bufs.index(stage).reshape([TILE, D]), acc, is_async=True)
            products = warpgroup_mma_wait(num_outstanding=1, deps=(ahead,))
            weights, left = _weights(products, left, scale, shift, m_diagonal, False)
            p_next = gl.convert_layout(weights.to(DTYPE), P_LAYOUT)
            slot += 1
            # a loop in the machine code, over which the wait that follows can't be moved up
            mbarrier.wait(full.index(slot % STAGES), (slot // STAGES) & 1)
            acc, p = warpgroup_mma_wait(num_outstanding=0, deps=(ahead_acc, p_next))
            mbarrier.arrive(empty.index(stage), count=1)
            if SKIP:
                if slot == look:
                    look += LOOK
                    end = gl.where(_is_used_up(left, epsilon), slot, end)
        acc = warpgroup_mma(p, v_bufs.index(slot % STAGES).reshape([TILE, D]), acc, is_async=True)
        acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
        mbarrier.arrive(empty.index(slot % STAGES), count=1)
        slot += 1

        # where this is: read again, so that no register kept it during the walk
        i_b = _get(words.index(place * WORDS), 4)
        i_h = _get(words.index(place * WORDS + 1), 4)
        part = (item + WG) % NWG
        row = _get(words.index(place * WORDS + 2), 4) + part * TILE
        start = _get(words.index(place * WORDS + 3), 4)
        n_q = gl.where(row < 0, row, _get(words.index(place * WORDS + 4), 4))
        stop_block = _get(words.index(place * WORDS + 5), 4)
        n_tiles = n_past + row // TILE + NWG - part
        i = slot - 1 - _get(words.index(place * WORDS + 6), 4)
        if SKIP:
            if i < n_tiles:
                _put(stopped.index(WG), slot, 4)
        first = (i_b * n_queries + start + row).to(gl.int64) * n_heads + i_h
        # through shared memory that held the queries
        r_buf = r_bufs.index(WG)
        zero = slot >> 30
        o_left = gl.arange(0, TILE, layout=gl.SliceLayout(1, QUARTERS)) + zero
        out = acc.to(DTYPE)
        q_buf.reshape([TILE, D]).store(out)
        if RESIDUAL is not None:
            r_buf.reshape([TILE, D]).store((acc - out.to(gl.float32)).to(DTYPE))
        fence_async_shared()
        whole = row >= 0
        if VARLEN:
            whole = whole & (row + TILE <= n_q)
        if whole:
            tma.async_copy_shared_to_global(out_desc, [i_b, start + row, i_h, 0], q_buf)
            if RESIDUAL is not None:
                tma.async_copy_shared_to_global(residual_desc, [i_b, start + row, i_h, 0], r_buf)
        elif VARLEN:
            # rows past the end are another sequence's
            o_row = gl.arange(0, TILE, layout=gl.SliceLayout(1, ROWS)) + zero
            o_out = o_row[:, None] * (n_heads * D) + gl.arange(0, D, layout=gl.SliceLayout(0, ROWS))[None, :]
            m_out = (row + o_row < n_q)[:, None]
            gl.store(OUT + first * D + o_out, q_buf.reshape([TILE, D]).load(ROWS), mask=m_out)
            if RESIDUAL is not None:
                gl.store(RESIDUAL + first * D + o_out, r_buf.reshape([TILE, D]).load(ROWS), mask=m_out)
        gl.store(REMAINDER + first + o_left * n_heads, gl.max(left, 1), mask=row + o_left < n_q)
        if row < n_q:
            gl.store(STOP + stop_block + row // TILE, (n_tiles - i) * TILE)

        # what the others still walk over
        more = i < n_tiles
        while more:
            stage = slot % STAGES
            mbarrier.wait(full.index(stage), (slot // STAGES) & 1)
            i += 1
            more = i < n_tiles
            if SKIP:
                more = more & (_get(cut.index(0), 4) != slot)
            mbarrier.arrive(empty.index(stage), count=1)
            slot += 1
        item += 1
        mbarrier.wait(q_full.index(item % QUEUE), (item // QUEUE) & 1)
        i_b = _get(words.index(item % QUEUE * WORDS), 4)
    tma.store_wait(0)


@triton.jit(do_not_specialize=["n_sequences"])
def plan_kernel(CU_SEQLENS, PLAN, n_sequences, NWG: tl.constexpr):
    """Where the tiles of packed sequences lie, one program a sequence.

    PLAN: 0 and the number of tiles, from word 4 on four words a tile: the sequence's first row and length, the tile's
    first row within it (the last tile ends with the sequence, the first may begin before it), and how many tiles of
    64 rows stand before the sequence.
    """
    i_s = tl.program_id(0)
    n_before = 0
    stop_block = 0
    for first in range(0, i_s, 128):
        o_s = first + tl.arange(0, 128)
        m_s = o_s < i_s
        length = tl.load(CU_SEQLENS + o_s + 1, mask=m_s, other=0) - tl.load(CU_SEQLENS + o_s, mask=m_s, other=0)
        b_whole = (length + 63) // 64
        stop_block += tl.sum(b_whole, 0)
        n_before += tl.sum((b_whole + NWG - 1) // NWG, 0)
    start = tl.load(CU_SEQLENS + i_s)
    n_q = tl.load(CU_SEQLENS + i_s + 1) - start
    whole = (n_q + 63) // 64
    n_tiles = (whole + NWG - 1) // NWG
    if i_s == n_sequences - 1:
        tl.store(PLAN, 0)
        tl.store(PLAN + 1, n_before + n_tiles)
    for first in range(0, n_tiles, 32):
        o_tile = first + tl.arange(0, 32)
        m_tile = o_tile < n_tiles
        p_tile = PLAN + 4 + (n_before + o_tile) * 4
        tl.store(p_tile, start, mask=m_tile)
        tl.store(p_tile + 1, n_q, mask=m_tile)
        tl.store(p_tile + 2, (whole - (n_tiles - o_tile) * NWG) * 64, mask=m_tile)
        tl.store(p_tile + 3, stop_block, mask=m_tile)


# lengths and how many sequences are packed change from batch to batch: none is worth a compilation of its own
@gluon.jit(do_not_specialize=["n_batch", "n_heads", "n_queries", "n_keys", "n_blocks", "n_stops"])
def forward_kernel(
    q_desc, k_desc, v_desc, out_desc, residual_desc, BIAS, OUT, RESIDUAL, REMAINDER, STOP, PLAN,
    n_batch, n_heads, n_queries, n_keys, n_blocks, n_stops, scale, epsilon,
    GROUP: gl.constexpr, D: gl.constexpr, NWG: gl.constexpr, STAGES: gl.constexpr, QUEUE: gl.constexpr,
    CURRENT: gl.constexpr, VARLEN: gl.constexpr, SKIP: gl.constexpr, LOOK: gl.constexpr, Q_REGS: gl.constexpr,
):  # fmt: skip
    """A program a multiprocessor; a tile of queries is 64 NWG queries of one head.

    OUT, RESIDUAL: (B, T, H, D) contiguous; REMAINDER: (B, T, H) float32; STOP: (B, H, tiles of 64) int32, the oldest
    key visited. PLAN: 0, from which programs draw; with packed sequences what plan_kernel writes.
    """
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    q_bufs = gl.allocate_shared_memory(q_desc.dtype, [QUEUE * NWG, 1, TILE, 1, D], q_desc.layout)
    r_bufs = gl.allocate_shared_memory(q_desc.dtype, [NWG, 1, TILE, 1, D], q_desc.layout)
    k_bufs = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 8, 4, 2, D], k_desc.layout)
    v_bufs = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, 8, 4, 2, D], v_desc.layout)
    words = gl.allocate_shared_memory(gl.int32, [QUEUE * WORDS, 1], FLAT)
    stopped = gl.allocate_shared_memory(gl.int32, [NWG, 1], FLAT)
    cut = gl.allocate_shared_memory(gl.int32, [1, 1], FLAT)
    q_full = gl.allocate_shared_memory(gl.int64, [QUEUE, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [QUEUE, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(QUEUE):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=NWG)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=2)
        mbarrier.init(empty.index(i), count=NWG)
    for w in gl.static_range(NWG):
        _put(stopped.index(w), -1, 4)
    _put(cut.index(0), -1, 4)
    ring = (q_bufs, r_bufs, k_bufs, v_bufs, words, stopped, cut, q_full, q_empty, full, empty)
    tensors = (BIAS, OUT, RESIDUAL, REMAINDER, STOP, out_desc, residual_desc)
    sizes = (n_heads, n_queries, n_keys, n_batch * n_keys, scale, epsilon)
    descriptors = (q_desc, k_desc, v_desc)
    counts = (n_batch * n_heads, n_heads, n_queries, n_keys, n_batch * n_keys, n_stops)
    if NWG == 2:
        gl.warp_specialize([
            (_consume, (ring, tensors, sizes, 0, D, NWG, STAGES, QUEUE, CURRENT, VARLEN, SKIP, LOOK, Q_REGS)),
            (_consume, (ring, tensors, sizes, 1, D, NWG, STAGES, QUEUE, CURRENT, VARLEN, SKIP, LOOK, Q_REGS)),
            (_produce, (ring, descriptors, PLAN, n_blocks, counts, GROUP, D, NWG, STAGES, QUEUE, VARLEN, SKIP)),
        ], [4, 1], [240, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume, (ring, tensors, sizes, 0, D, NWG, STAGES, QUEUE, CURRENT, VARLEN, SKIP, LOOK, Q_REGS)),
            (_consume, (ring, tensors, sizes, 1, D, NWG, STAGES, QUEUE, CURRENT, VARLEN, SKIP, LOOK, Q_REGS)),
            (_consume, (ring, tensors, sizes, 2, D, NWG, STAGES, QUEUE, CURRENT, VARLEN, SKIP, LOOK, Q_REGS)),
            (_produce, (ring, descriptors, PLAN, n_blocks, counts, GROUP, D, NWG, STAGES, QUEUE, VARLEN, SKIP)),
        ], [4, 4, 1], [160, 160, 24])  # fmt: skip


# by head size: warpgroups, stages of keys and values, tiles of queries in shared memory, and whether a warpgroup keeps
# its queries in registers
CONFIGS = {
    128: {"NWG": 2, "STAGES": 4, "QUEUE": 2, "Q_REGS": True},
    64: {"NWG": 3, "STAGES": 6, "QUEUE": 2, "Q_REGS": True},
}
# tiles between two looks whether any stick is left
LOOK = 16
# registers a thread at the start, by warpgroups: with the producer's they share the 65536 of a multiprocessor
REGISTERS = {2: 168, 3: 128}


def _rows(x: Tensor) -> Tensor:
    """As a tensor map of rows can hold it: heads next to each other, rows of all batches at one distance."""
    _, length, _, dim = x.shape
    regular = x.stride(3) == 1 and x.stride(2) == dim and (x.shape[0] == 1 or x.stride(0) == length * x.stride(1))
    if regular and x.stride(1) % 8 == 0 and x.data_ptr() % 16 == 0:
        return x
    # `contiguous` leaves rows where they are that lie next to each other, but begin anywhere
    return x.clone(memory_format=torch.contiguous_format)


def _query_tiles(x: Tensor) -> TensorDescriptor:
    """Queries, or what has their shape, in tiles of 64 of a head."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 64, 1, x.shape[3]], layout)


def _descriptor(x: Tensor) -> TensorDescriptor:
    """Keys or values, in tiles whose rows are in thread order; a tile begins at any row."""
    batch, length, groups, dim = x.shape
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=5)
    row = x.stride(1)
    shape = [batch * length - 63, 8, 4, 2, groups * dim]
    return TensorDescriptor(x, shape, [row, 2 * row, 16 * row, row, 1], [1, 8, 4, 2, dim], layout)


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def stop_shape(q: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int, int]:
    """Shape of what `forward` says of where it stopped: a number for each 64 queries."""
    return q.shape[0], q.shape[2], triton.cdiv(q.shape[1], 64) + (0 if cu_seqlens is None else cu_seqlens.shape[0] - 1)


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None, scale: float, attend_current: bool,
    epsilon: float, differentiable: bool = True, config: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Output (B, T, H, D), remainder (B, T, H) float32, what rounding took off the output (empty where no gradient is
    wanted), and the oldest key that each 64 queries visited (B, H, tiles)."""
    batch, n_queries, heads, dim = q.shape
    n_keys, groups = k.shape[1:3]
    config = CONFIGS[dim] if config is None else config
    q, k, v = _rows(q), _rows(k), _rows(v)
    out = torch.empty((batch, n_queries, heads, dim), dtype=q.dtype, device=q.device)
    residual = torch.empty_like(out) if differentiable else None
    remainder = torch.empty((batch, n_queries, heads), dtype=torch.float32, device=q.device)
    stop = torch.empty(stop_shape(q, cu_seqlens), dtype=torch.int32, device=q.device)
    size = 64 * config["NWG"]
    n_blocks = triton.cdiv(n_queries, size)
    if cu_seqlens is None:
        plan = torch.zeros(1, dtype=torch.int32, device=q.device)
    else:
        n_sequences = len(cu_seqlens) - 1
        n_blocks += n_sequences
        plan = torch.empty(4 * (n_blocks + 1), dtype=torch.int32, device=q.device)
        plan_kernel[(n_sequences,)](cu_seqlens, plan, n_sequences, NWG=config["NWG"], num_warps=1)
    forward_kernel[(min(_processors(q.device), n_blocks * batch * heads),)](
        _query_tiles(q), _descriptor(k), _descriptor(v), _query_tiles(out),
        None if residual is None else _query_tiles(residual), bias, out, residual, remainder, stop, plan, batch, heads,
        n_queries, n_keys, n_blocks, stop.shape[2], scale * LOG2_E, epsilon,
        GROUP=heads // groups, D=dim, CURRENT=int(attend_current), VARLEN=cu_seqlens is not None, SKIP=epsilon > 0,
        LOOK=LOOK, **config, num_warps=4, maxnreg=REGISTERS[config["NWG"]],
    )  # fmt: skip
    return out, remainder, out.new_empty(0) if residual is None else residual, stop
