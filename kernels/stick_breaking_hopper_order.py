"""Who does what in backward for Hopper, and how programs wait for each other.

Programs draw tickets, the newest keys first, so that one which waits, waits for one that runs; one head after another,
so that programs at work use the same queries at nearly the same time, and find them and dq in the L2.

The longest programs are those of the oldest keys, which come last. So that no multiprocessor is long without one at the
end, the last heads come in ranges of queries, the newest and longest range first: the programs of a range have fewer
tiles, and add dk and dv to what those of the ranges before left of the same keys. Where the queries of one head are too
many for the L2, those of all heads come so.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# of the queries of heads that come in ranges: with 5 these are 5/15, 4/15 .. 1/15 of the tiles
RANGES = gl.constexpr(5)
# bytes of queries, their gradients and dq that stay in an L2 of 50 MB from one program to the next
CACHED = 32 << 20


def shares_of(n_bg: int, n_blocks: int, n_bytes: int, processors: int, together: int) -> tuple[int, int, int, int]:
    """`shares` of _deal for heads of so many bytes."""
    if n_bytes > CACHED:
        return 0, n_bg, 1, 1
    # all processors have programs of the last heads when the others end
    n_cut = min(n_bg, triton.cdiv(processors, n_blocks))
    return n_bg - n_cut, n_cut, max(1, min(together, CACHED // n_bytes)), n_cut


def programs_of(n_tiles: int, n_past: int) -> list[int]:
    """How many programs each range of a head has; see _edge and _n_programs."""
    n = RANGES.value
    edges = [n_tiles * (n - i) * (n + 1 - i) // (n * (n + 1)) for i in range(n)]
    return [(edge + n_past + 1) // 2 if edge else 0 for edge in edges]


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
