"""From logits to weights and back to their gradients, in the registers of a warpgroup: backward for Hopper.

A thread has two rows of a tile of 64 x 64, and of each four groups of four keys; (M, 4, 4) are rows, quarters of the
keys, a thread each, and the groups of a quarter.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from sbeval.kernels.stick_breaking_hopper import _from_neighbour, _from_other_pair

RESOLUTION = gl.constexpr(2.0**-24)
# beta, at most 1, in float16: what is over 2e-9 keeps 11 bits
BETA_SCALE = gl.constexpr(2.0**15)


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
