"""Stick-breaking attention (Tan, Yang, Courville, Panda, Shen, ICLR 2025, arXiv 2410.17980, section 2).

Query i breaks a stick: walking back from itself, key j takes the share beta_ij of what nearer keys left over.

    z_ij = scale q_i . k_j + bias        beta_ij = sigmoid(z_ij)
    A_ij = beta_ij prod_{j < l < i} (1 - beta_il)
    o_i = sum_j A_ij v_j          rem_i = prod_l (1 - beta_il) = 1 - sum_j A_ij

Gradients, with g_ij = A_ij (do_i . v_j):

    dz_ij = g_ij - beta_ij (rem_i drem_i + sum_{l <= j} g_il)

Shapes: q (B, T, H, D); k, v (B, S, G, D), head h of the queries reading head h // (H / G) of the keys; the queries are
the last T of the S positions. Keys before the query only (j < i), or j <= i with `attend_current`.

Departures from the paper: the stick of a whole query tile can be called used up once less than `epsilon` of it is left;
older tiles, which could add at most epsilon max|v|, are then not visited, in backward neither. `bias`, one number for
each head, is not in the paper: without it every beta is near 1/2 at initialisation, and a key at distance t finds 2^-t
of the stick; at -3, it finds 0.95^t.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sbeval.errors import InputError, choose
from sbeval.kernels import check, hopper
from sbeval.models.kv_cache import Layer, through

# rows and columns of the tiles of the portable path
TILE = 128
BACKENDS = ("torch", "triton", "triton-hopper")
REMAINDERS = ("none", "value", "bias")
SPREAD = "spread"


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    attend_current: bool = False,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, dense, in the dtype of its inputs: output (B, T, H, D) and remainder (B, T, H)."""
    group, offset = q.shape[2] // k.shape[2], k.shape[1] - q.shape[1]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    z = torch.einsum("bthd,bshd->bhts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        z = z + bias[:, None, None]
    i, j = torch.arange(q.shape[1], device=q.device)[:, None] + offset, torch.arange(k.shape[1], device=q.device)
    allowed = j <= i if attend_current else j < i
    if cu_seqlens is not None:
        sequence = torch.bucketize(j, cu_seqlens[1:], right=True)
        allowed = allowed & (sequence[:, None] == sequence)
    log_rest = F.logsigmoid(-z).masked_fill(~allowed, 0)
    from_here = log_rest.flip(-1).cumsum(-1).flip(-1)
    later = F.pad(from_here[..., 1:], (0, 1))
    weights = (F.logsigmoid(z) + later).exp().masked_fill(~allowed, 0)
    out = torch.einsum("bhts,bshd->bthd", weights, v)
    return out, log_rest.sum(-1).exp().transpose(1, 2)


@dataclass(slots=True)
class _Tile:
    """One tile of the portable path, for the heads that still hold some of their stick."""

    heads: Tensor | slice
    keys: slice
    k: Tensor  # (heads, keys, D)
    v: Tensor
    beta: Tensor  # (heads, rows, keys)
    before: Tensor  # stick left before each key, (heads, rows, keys)
    after: Tensor  # stick left after the tile, (heads, rows, 1)


def _walk(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, rows: slice, attend_current: bool, epsilon: float
) -> Iterator[_Tile]:
    """Walk the queries `rows` towards the past, a tile of keys at a time, until every stick is used up.

    q: (heads, T, D), scaled; k, v: (key heads, S, D), newest key first, so that scans run forward; bias: (heads,). A
    product of 1 - beta may underflow to 0: a weight so small is 0 in the same dtype, so no logarithm is needed.
    """
    n_keys, offset = k.shape[1], k.shape[1] - q.shape[1] + int(attend_current)
    key_head = torch.arange(q.shape[0], device=q.device) // (q.shape[0] // k.shape[0])
    position = torch.arange(rows.start, rows.stop, device=q.device)[:, None] + offset
    heads: Tensor | slice = slice(None)
    left = q.new_ones(q.shape[0], rows.stop - rows.start, 1)
    for start in range(n_keys - (rows.stop - 1 + offset), n_keys, TILE):
        keys = slice(start, min(start + TILE, n_keys))
        k_tile, v_tile = k[key_head[heads], keys], v[key_head[heads], keys]
        z = q[heads, rows] @ k_tile.transpose(1, 2)
        if bias is not None:
            z += bias[heads, None, None]
        beta, rest = z.sigmoid(), z.neg_().sigmoid_()
        if n_keys - keys.start > rows.start + offset:
            outside = (n_keys - 1 - torch.arange(keys.start, keys.stop, device=q.device)) >= position
            beta.masked_fill_(outside, 0)
            rest.masked_fill_(outside, 1)
        stick = rest.cumprod(-1).mul_(left)
        after = stick[..., -1:]
        yield _Tile(heads, keys, k_tile, v_tile, beta, torch.cat([left, stick[..., :-1]], -1), after)
        alive = after.amax((1, 2)) > epsilon
        if not alive.any():
            return
        left = after
        if not alive.all():
            left = after[alive]
            heads = torch.arange(q.shape[0], device=q.device)[heads][alive]


def _flat(x: Tensor) -> Tensor:
    """(B, T, H, D) to (B H, T, D), in the dtype that the portable path computes in."""
    dtype = x.dtype if x.dtype == torch.float64 else torch.float32
    return x.to(dtype).transpose(1, 2).flatten(0, 1).contiguous()


def _row_tiles(length: int) -> Iterator[slice]:
    return (slice(row, min(row + TILE, length)) for row in range(0, length, TILE))


def _each_head(bias: Tensor | None, batch: int, like: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(like.dtype).repeat(batch)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, attend_current: bool, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Output (B, T, H, D) and remainder (B, T, H) of one dense problem, in the dtype it computes in."""
    queries, keys, values = _flat(q) * scale, _flat(k).flip(1), _flat(v).flip(1)
    out, remainder = torch.zeros_like(queries), queries.new_ones(queries.shape[:2])
    shift = _each_head(bias, q.shape[0], queries)
    for rows in _row_tiles(queries.shape[1]):
        for tile in _walk(queries, keys, values, shift, rows, attend_current, epsilon):
            out[tile.heads, rows] += (tile.beta * tile.before) @ tile.v
            remainder[tile.heads, rows] = tile.after[..., 0]
    return out.unflatten(0, (q.shape[0], -1)).transpose(1, 2), remainder.unflatten(0, (q.shape[0], -1)).transpose(1, 2)


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    remainder: Tensor,
    dout: Tensor,
    dremainder: Tensor,
    *,
    bias: Tensor | None,
    scale: float,
    attend_current: bool,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and bias (H,), walking the same tiles; sum_{l <= j} g_il = do_i . o_i - sum_{l > j} g_il."""
    queries, keys, values, douts = _flat(q) * scale, _flat(k).flip(1), _flat(v).flip(1), _flat(dout)
    dq, dk = torch.zeros_like(queries), queries.new_zeros(queries.shape[0], *keys.shape[1:])
    dv, dbias = torch.zeros_like(dk), queries.new_zeros(queries.shape[0])
    shift = _each_head(bias, q.shape[0], queries)
    delta = (_flat(out) * douts).sum(-1, keepdim=True)
    from_remainder = (remainder * dremainder).transpose(1, 2).flatten(0, 1)[..., None].to(delta.dtype)
    # a stick this short is rounding noise beside the whole one
    resolution = torch.finfo(delta.dtype).eps / 2
    for rows in _row_tiles(queries.shape[1]):
        later = torch.zeros_like(delta[:, rows])
        for tile in _walk(queries, keys, values, shift, rows, attend_current, epsilon):
            here = tile.heads
            weights = tile.beta * tile.before
            g = weights * (douts[here, rows] @ tile.v.transpose(1, 2))
            from_here = g.cumsum(-1).add_(later[here])
            older = (delta[here, rows] - from_here).add_(g).mul_(tile.before > resolution)
            dz = g - tile.beta * older.add_(from_remainder[here, rows])
            later[here] = from_here[..., -1:]
            dbias[here] += dz.sum((1, 2))
            dq[here, rows] += dz @ tile.k
            dk[here, tile.keys] += dz.transpose(1, 2) @ queries[here, rows]
            dv[here, tile.keys] += weights.transpose(1, 2) @ douts[here, rows]
    dq, dk, dv = (x.unflatten(0, (q.shape[0], -1)).transpose(1, 2) for x in (dq * scale, dk.flip(1), dv.flip(1)))
    dk, dv = (x.unflatten(2, (k.shape[2], -1)).sum(3) for x in (dk, dv))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dbias.unflatten(0, (q.shape[0], -1)).sum(0)


def _sequences(cu_seqlens: Tensor | None) -> list[slice]:
    if cu_seqlens is None:
        return [slice(None)]
    bounds = cu_seqlens.tolist()
    return [slice(*pair) for pair in zip(bounds, bounds[1:], strict=False) if pair[1] > pair[0]]


@torch.library.custom_op("sbeval::stick_breaking", mutates_args=())
def _operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    attend_current: bool,
    epsilon: float,
    backend: str,
    differentiable: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, remainder, and for the gradient what rounding took off a 16-bit output (empty otherwise, and where no
    gradient is wanted) and where each query tile stopped (empty on the portable path)."""
    if backend == "triton-hopper":
        from sbeval.kernels import stick_breaking_hopper

        with torch.cuda.device_of(q):
            return stick_breaking_hopper.forward(
                q, k, v, bias, cu_seqlens, scale, attend_current, epsilon, differentiable
            )
    if backend == "triton":
        from sbeval.kernels import stick_breaking_triton

        with torch.cuda.device_of(q):
            return stick_breaking_triton.forward(
                q, k, v, bias, cu_seqlens, scale, attend_current, epsilon, differentiable
            )
    parts = [
        _forward(q[:, part], k[:, part], v[:, part], bias, scale, attend_current, epsilon)
        for part in _sequences(cu_seqlens)
    ]
    exact, remainder = (torch.cat(tensors, 1) for tensors in zip(*parts, strict=True))
    out = exact.to(q.dtype).contiguous()
    absent = q.dtype == exact.dtype or not differentiable
    residual = q.new_empty(0) if absent else (exact - out).to(q.dtype).contiguous()
    return out, remainder.contiguous(), residual, torch.empty(0, dtype=torch.int32, device=q.device)


@_operator.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    attend_current: bool,
    epsilon: float,
    backend: str,
    differentiable: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    wide = q.dtype if q.dtype == torch.float64 else torch.float32
    residual = q.new_empty(0) if q.dtype == wide or not differentiable else torch.empty_like(out)
    stop = torch.empty(0, dtype=torch.int32, device=q.device)
    if backend == "triton":
        from sbeval.kernels import stick_breaking_triton

        stop = stop.new_empty(stick_breaking_triton.stop_shape(q, cu_seqlens))
    elif backend == "triton-hopper":
        from sbeval.kernels import stick_breaking_hopper

        stop = stop.new_empty(stick_breaking_hopper.stop_shape(q, cu_seqlens))
    return out, torch.empty(q.shape[:3], dtype=wide, device=q.device), residual, stop


@torch.library.custom_op("sbeval::stick_breaking_backward", mutates_args=())
def _backward_operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    remainder: Tensor,
    residual: Tensor,
    stop: Tensor,
    dout: Tensor,
    dremainder: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    attend_current: bool,
    epsilon: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and bias (empty without one)."""
    if backend == "triton-hopper":
        from sbeval.kernels import stick_breaking_hopper_backward

        return stick_breaking_hopper_backward.backward(
            q, k, v, bias, out, remainder, residual, stop, dout, dremainder, cu_seqlens, scale, attend_current, epsilon
        )
    if backend == "triton":
        from sbeval.kernels import stick_breaking_triton

        return stick_breaking_triton.backward(
            q, k, v, bias, out, remainder, residual, stop, dout, dremainder, cu_seqlens, scale, attend_current
        )
    if residual.numel():
        out = out.float() + residual.float()
    tensors = (q, k, v, out, remainder, dout, dremainder)
    options: dict[str, Any] = {"scale": scale, "attend_current": attend_current, "epsilon": epsilon}
    parts = [_backward(*[x[:, part] for x in tensors], bias=bias, **options) for part in _sequences(cu_seqlens)]
    *parts_of, parts_of_bias = zip(*parts, strict=True)
    dq, dk, dv = (torch.cat(gradients, 1).contiguous() for gradients in parts_of)
    dbias = torch.stack(parts_of_bias).sum(0)
    return dq, dk, dv, dbias.new_empty(0) if bias is None else dbias.to(bias.dtype)


@_backward_operator.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    remainder: Tensor,
    residual: Tensor,
    stop: Tensor,
    dout: Tensor,
    dremainder: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    attend_current: bool,
    epsilon: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    return dq, dk, dv, remainder.new_empty(0) if bias is None else torch.empty_like(bias)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    q, k, v, bias, cu_seqlens, *ctx.options, differentiable = inputs
    assert differentiable, "what rounding took off the output was not kept"
    # or autograd makes a gradient of zeros for what rounding took off
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, bias, *output, cu_seqlens)


def _differentiate(ctx: Any, dout: Tensor | None, dremainder: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    q, k, v, bias, out, remainder, residual, stop, cu_seqlens = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    dremainder = torch.zeros_like(remainder) if dremainder is None else dremainder
    *gradients, dbias = _backward_operator(
        q, k, v, bias, out, remainder, residual, stop, dout, dremainder, cu_seqlens, *ctx.options
    )
    return *gradients, None if bias is None else dbias, None, None, None, None, None, None


_operator.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op("sbeval::stick_breaking_decode", mutates_args=())
def _decode_operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    scale: float,
    attend_current: bool,
    epsilon: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Output and remainder of the queries that end at `lengths` of keys from `starts` on, row by row; no gradient."""
    if backend != "torch":
        from sbeval.kernels import stick_breaking_decode

        with torch.cuda.device_of(q):
            return stick_breaking_decode.decode(q, k, v, bias, starts, lengths, scale, attend_current, epsilon)
    out, remainder = q.new_zeros(q.shape), torch.ones(q.shape[:3], device=q.device, dtype=_flat(q).dtype)
    first = [0] * len(q) if starts is None else starts.tolist()
    end = [k.shape[1]] * len(q) if lengths is None else lengths.tolist()
    for i, (a, b) in enumerate(zip(first, end, strict=True)):
        if n := min(q.shape[1], b - a):
            row = q[i : i + 1, -n:], k[i : i + 1, a:b], v[i : i + 1, a:b]
            part, rest = _forward(*row, bias, scale, attend_current, epsilon)
            out[i, -n:], remainder[i, -n:] = part[0].to(q.dtype), rest[0]
    return out, remainder


@_decode_operator.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    scale: float,
    attend_current: bool,
    epsilon: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    wide = q.dtype if q.dtype == torch.float64 else torch.float32
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty(q.shape[:3], dtype=wide)


def _check_epsilon(epsilon: float) -> None:
    if not 0 <= epsilon < 1:
        raise InputError(f"epsilon is a share of the stick, at least 0 and less than 1; got {epsilon}")


# multiplications of queries and keys, masked ones included, below which launching `triton-hopper` from Python (0.1 ms,
# in which its tensor maps are made) takes longer than its kernel saves
LAUNCHED = 1.5e10


def pick_backend(q: Tensor, k: Tensor, backend: str | None, decodes: bool = False) -> str:
    """What will run for inputs like these, by default the fastest: `triton-hopper` where it can, nothing is decoded and
    there is work enough, `triton` on a GPU in 16 or 32 bits, otherwise `torch`. InputError where the one that was asked
    for can't."""
    supported = q.is_cuda and q.dtype in (torch.float16, torch.bfloat16, torch.float32)
    if backend is None:
        if not supported:
            return "torch"
        work = q.shape[0] * q.shape[1] * k.shape[1] * q.shape[2] * q.shape[3]
        return "triton" if decodes or work < LAUNCHED or _hopper_obstacle(q, k) else "triton-hopper"
    choose("backend of stick_breaking", backend, BACKENDS)
    if backend == "triton" and not supported:
        raise InputError(f"backend 'triton' needs float16, bfloat16 or float32 on a GPU; q is {q.dtype} on {q.device}")
    if backend == "triton-hopper" and (obstacle := _hopper_obstacle(q, k)):
        raise InputError(f"backend 'triton-hopper' can't run: {obstacle}")
    return backend


def _hopper_obstacle(q: Tensor, k: Tensor) -> str:
    """Why `triton-hopper` can't run for inputs like these, in words; empty where it can."""
    return hopper.obstacle(q.device) or hopper.inputs_obstacle(q, k)


def backend_name(device_type: str) -> str:
    """What runs on a `cpu` or `cuda` device; `triton` stands for `triton-hopper` too, which depends on the inputs."""
    return "triton" if device_type == "cuda" else "torch"


def _check_bias(q: Tensor, bias: Tensor | None) -> None:
    if bias is None:
        return
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    if bias.shape != q.shape[2:3] or bias.dtype != wide or bias.device != q.device:
        raise InputError(
            f"bias must be {wide} of shape {tuple(q.shape[2:3])} (one number a head) on {q.device}; it is {bias.dtype} "
            f"of shape {tuple(bias.shape)} on {bias.device}"
        )


# queries up to which keys are split over the device rather than queries
FEW = 64


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    attend_current: bool = False,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
    epsilon: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Stick-breaking attention: output (B, T, H, D) like q, and remainder (B, T, H) in float32, float64 for float64.

    cu_seqlens: int32 (N + 1,), cumulative lengths of N sequences packed into one row (B = 1, S = T); some may be empty.
    From a GPU its values are not read before kernels are launched, which read and write by them: they must be right.
    scale: multiplies q . k, 1 / sqrt(D) by default. bias: (H,) float32, float64 for float64, added to the logits of
    each head; it has a gradient. epsilon: the stick below which older tiles are skipped; 0 visits all; by default half
    the spacing of numbers at 1 in the dtype that sums (2^-24, float64 2^-53), which changes the output by less than
    rounding does. backend: `triton` (GPU), `torch` (anywhere), `triton-hopper` (faster: Hopper GPUs, 16 bits, heads of
    64 or 128) or None: the fastest that can run. Memory is linear in T.

    starts, lengths: int32 (B,), for a cache of keys: row b sees the keys starts[b] <= j < lengths[b], and its queries
    are the last T of those (where they are fewer, the first queries see nothing: output 0, remainder 1). No gradient.

    Raises ValueError that names the argument for shapes, dtypes, devices or lengths it can't serve.
    """
    check.inputs(q, k, v, cu_seqlens)
    _check_bias(q, bias)
    check.bounds(q, cu_seqlens, k.shape[1], starts=starts, lengths=lengths)
    if epsilon is None:
        epsilon = torch.finfo(torch.float64 if q.dtype == torch.float64 else torch.float32).eps / 2
    _check_epsilon(epsilon)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    bounded = starts is not None or lengths is not None
    if bounded and backend == "triton-hopper":
        raise InputError("backend 'triton-hopper' has no kernel for starts and lengths: 'triton' has")
    # few queries are decoded, by the portable kernels
    decodes = backend != "triton-hopper" and q.shape[1] <= min(FEW, k.shape[1] - 1)
    backend = pick_backend(q, k, backend, bounded or decodes)
    differentiable = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, bias))
    if bounded and differentiable:
        raise InputError("starts and lengths are for decoding, which has no gradient: use torch.no_grad, or cu_seqlens")
    if bounded or (decodes and backend != "torch" and not differentiable):
        found = _decode_operator(q, k, v, bias, starts, lengths, scale, attend_current, epsilon, backend)
        return cast(tuple[Tensor, Tensor], found)
    out, remainder, _, _ = _operator(q, k, v, bias, cu_seqlens, scale, attend_current, epsilon, backend, differentiable)
    return out, remainder


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of the model. remainder: by what the remainder is multiplied and added to the output: nothing (`none`),
    the token's own `value` or a vector learned for each head (`bias`). logit_scale: multiplies the model's logit scale.

    logit_bias: logit offset, the initial value of a parameter of each head that is added to its logits; default: none.
    Adam moves it by at most the sum of the learning rates, 0.9 in 800 steps of a cosine from 2e-3: it is in effect
    fixed. `spread`: from beta = 1/2 to 1/1024 over the heads, geometrically, the same in every layer.
    """

    remainder: str = "value"
    attend_current: bool = False
    logit_scale: float = 1.0
    epsilon: float | None = None
    logit_bias: float | str | None = None

    def __post_init__(self) -> None:
        choose("remainder", self.remainder, REMAINDERS)
        if isinstance(self.logit_bias, str) and self.logit_bias != SPREAD:
            raise InputError(f"logit_bias must be a number or {SPREAD!r}; got {self.logit_bias!r}")
        for name in ("logit_scale", "logit_bias"):
            if isinstance(number := getattr(self, name), int | float) and not math.isfinite(number):
                raise InputError(f"{name} must be a finite number; got {number}")
        if self.epsilon is not None:
            _check_epsilon(self.epsilon)


def initial_bias(start: float | str, heads: int) -> Tensor:
    """Return the initial logit offset of each head (H,): the same number, or with `spread` logits of 2^-1 ... 2^-10."""
    if not isinstance(start, str):
        return torch.full((heads,), start)
    if heads < 2:
        raise InputError(f"logit_bias={start} is spread over heads, and the model has one: give a number")
    # sigmoid(-log(2^e - 1)) = 2^-e
    return -torch.expm1(torch.linspace(1, 10, heads, dtype=torch.float64) * math.log(2)).log().float()


class Mixer(nn.Module):
    """Stick-breaking attention as the model holds it; see `sbeval.registry.Method`."""

    def __init__(self, options: Options, *, heads: int, kv_heads: int, head_dim: int, width: int, scale: float) -> None:
        super().__init__()
        self.options = options
        self.scale = scale * options.logit_scale
        self.group = heads // kv_heads
        if options.remainder == "bias":
            self.bias = nn.Parameter(torch.zeros(heads, head_dim))
        start = options.logit_bias
        self.logit_bias = None if start is None else nn.Parameter(initial_bias(start, heads))

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, cu_seqlens: Tensor | None = None, cache: Layer | None = None
    ) -> Tensor:
        starts, (k, v) = through(cache, k, v)
        out, remainder = attention(
            q,
            k,
            v,
            scale=self.scale,
            attend_current=self.options.attend_current,
            cu_seqlens=cu_seqlens,
            starts=starts,
            bias=self.logit_bias,
            epsilon=self.options.epsilon,
        )
        if self.options.remainder == "none":
            return out
        own = self.options.remainder == "value"
        rest = v[:, -q.shape[1] :].repeat_interleave(self.group, 2) if own else self.bias
        return torch.addcmul(out, remainder[..., None].to(out.dtype), rest.to(out.dtype))
