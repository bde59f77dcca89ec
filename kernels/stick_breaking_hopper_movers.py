"""The warps of backward for Hopper that move data, so that no warpgroup waits for memory.

One brings queries and the output's gradients by TMA and says which tile comes, one fetches what newer programs left,
one adds to dq by TMA.
"""

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from sbeval.kernels.stick_breaking_hopper import _get, _put
from sbeval.kernels.stick_breaking_hopper_order import _find, _publish, _wait_for

TILE = gl.constexpr(64)
# steps whose query tile is remembered
WORDS = gl.constexpr(8)


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
