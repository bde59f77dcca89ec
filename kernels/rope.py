"""RoPE: causal softmax attention over queries and keys rotated by their position (Su et al., arXiv 2104.09864, eq. 34).

    o_i = sum_{j <= i} a_ij v_j        a_ij = softmax_j(scale * (R_i q_i) . (R_j k_j))

R_p rotates the plane of the dimensions m and m + D/2 by the angle p * w_m, w_m = theta^(-2m/D), m = 0 .. D/2 - 1.

    B, T, S, H, G, D    batch, queries, keys, query heads, key-value heads (G divides H), head size (even)
    q: (B, T, H, D)     k, v: (B, S, G, D)     the queries are the last T of the S positions
    cu_seqlens: int32 (N + 1,), bounds of N sequences packed into one row; then B = 1 and S = T
    p: the position in its sequence, from 0; k is unrotated, also from a cache

Departures: the paper pairs the dimensions 2m and 2m + 1; here m pairs with m + D/2, as in GPT-NeoX and Llama, which is
the same up to an order of dimensions that the projections learn. Rotation is in float32 (float64 for float64 inputs),
its angles in float64, so that late positions are rotated as exactly as early ones.

`scaling` changes w at evaluation, for sequences longer than the L = `train_len` tokens of training; F is `factor`:

    linear         w_m / F (position interpolation, Chen et al., arXiv 2306.15595)
    ntk            theta * F^(D / (D - 2)) for theta: the slowest plane rotates F times slower, the fastest as before
                   (called "NTK-aware" in Peng et al., arXiv 2309.00071, section 3.1)
    dynamic_ntk    the same with F l / L - F + 1 for F in a sequence of l > L tokens, unscaled up to L, as in
                   transformers; l is the length of the whole sequence for all its tokens; with a cache keys are
                   rotated anew at each token, but hidden states of older tokens are not computed anew
    yarn           w_m / F for planes of less than beta_slow periods in L tokens, w_m for those of more than beta_fast,
                   a linear ramp between; q and k grow by 1 + ln(F) / 10 each (arXiv 2309.00071, section 3.2 to 3.4)
    llama3         w_m / F for planes of less than low_freq periods in L tokens, w_m for those of more than high_freq,
                   interpolated between (Llama 3.1's own rule, as in transformers)
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sbeval.errors import InputError, choose
from sbeval.kernels import check, softmax
from sbeval.models.kv_cache import Layer, through

SCALINGS = ("none", "linear", "ntk", "dynamic_ntk", "yarn", "llama3")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """theta: the base of the geometric frequencies; the slowest plane rotates by about 1 / theta per position.

    The others are for evaluation alone: see the module. train_len: in tokens, for the scalings that need it.
    """

    theta: float = 10000.0
    scaling: str = "none"
    factor: float = 1.0
    train_len: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    low_freq: float = 1.0
    high_freq: float = 4.0

    def __post_init__(self) -> None:
        if not 0 < self.theta < math.inf:
            raise InputError(f"theta must be positive and finite; it is {self.theta}")
        choose("scaling", self.scaling, SCALINGS)
        if not 1 <= self.factor < math.inf:
            raise InputError(f"factor must be at least 1 and finite; it is {self.factor}")
        if self.scaling == "none" and (self.factor != 1 or self.train_len):
            raise InputError(f"factor and train_len need a scaling: {', '.join(SCALINGS[1:])}")
        if self.train_len < 0:
            raise InputError(f"train_len must not be negative; it is {self.train_len}")
        if self.scaling in ("dynamic_ntk", "yarn", "llama3") and not self.train_len:
            raise InputError(f"scaling {self.scaling!r} needs train_len, the length that the model was trained at")
        for low, high in (("beta_slow", "beta_fast"), ("low_freq", "high_freq")):
            if not 0 < getattr(self, low) < getattr(self, high) < math.inf:
                given = f"they are {getattr(self, low)} and {getattr(self, high)}"
                raise InputError(f"{low} must be positive and less than {high}, which must be finite; {given}")


DEFAULT = Options()


def trained_as(options: Options) -> Options:
    """Return the options that a model was trained with: scaling is for evaluation, and has no weights."""
    return Options(theta=options.theta)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    cu_seqlens: Tensor | None = None,
    options: Options = DEFAULT,
) -> Tensor:
    """Compute the equation densely, in the dtype of q; returns (B, T, H, D)."""
    s, half = k.shape[1], q.shape[3] // 2
    lengths = torch.tensor([s]) if cu_seqlens is None else cu_seqlens.diff()
    angles = torch.cat(
        [torch.arange(n)[:, None] * frequencies(2 * half, options, torch.tensor(n)) for n in lengths.tolist()]
    ).to(q)
    rotation = torch.polar(torch.full_like(angles, attention_factor(options)), angles)[:, None]

    def rotated(x: Tensor) -> Tensor:
        y = torch.complex(x[..., :half], x[..., half:]) * rotation[s - x.shape[1] :]
        return torch.cat((y.real, y.imag), dim=-1)

    return softmax.reference(rotated(q), rotated(k), v, scale=scale, cu_seqlens=cu_seqlens)


def frequencies(head_dim: int, options: Options = DEFAULT, length: Tensor | None = None) -> Tensor:
    """Return w, the angle per position of each plane, float64 (..., head_dim / 2), from about 1 downwards.

    length: integers (...), tokens of the sequences, on the device of the result; `dynamic_ntk` needs it.
    """
    device = None if length is None else length.device
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim
    theta, factor, scaling = options.theta, options.factor, options.scaling
    if scaling == "dynamic_ntk":
        assert length is not None
        stretch = (factor * length.double() / options.train_len - (factor - 1)).clamp(min=1.0)
        return (theta * stretch[..., None] ** _ntk_power(head_dim)) ** -exponents
    if scaling == "ntk":
        theta = theta * factor ** _ntk_power(head_dim)
    w = theta**-exponents
    if scaling == "linear":
        return w / factor
    if scaling == "yarn":
        share = _yarn_share(head_dim, options, device)
    elif scaling == "llama3":
        periods = options.train_len * w / (2 * math.pi)
        share = ((periods - options.low_freq) / (options.high_freq - options.low_freq)).clamp(0, 1)
    else:
        return w
    return w * share + w / factor * (1 - share)


def _ntk_power(head_dim: int) -> float:
    if head_dim < 4:
        raise InputError(f"NTK scaling needs heads of size 4 or more; they have {head_dim}")
    return head_dim / (head_dim - 2)


def _yarn_share(head_dim: int, options: Options, device: torch.device | None) -> Tensor:
    """Return the share of each plane's frequency that is not scaled, (head_dim / 2,), from 1 for the fastest to 0."""

    def plane(periods: float) -> float:
        # the index of the plane with this many periods in train_len tokens
        return head_dim * math.log(options.train_len / (2 * math.pi * periods)) / (2 * math.log(options.theta))

    low, high = max(math.floor(plane(options.beta_fast)), 0), min(math.ceil(plane(options.beta_slow)), head_dim - 1)
    planes = torch.arange(head_dim // 2, dtype=torch.float64, device=device)
    # 0.001 as in the authors' code, if both ends are one plane
    return 1 - ((planes - low) / (high - low if high != low else 0.001)).clamp(0, 1)


def check_size(size: int) -> None:
    """Raise InputError unless heads of this size can be rotated."""
    if size % 2:
        raise InputError(
            f"RoPE rotates pairs of dimensions and needs heads of an even size; width / heads, or head_dim, is {size}: "
            "give a width that is a multiple of twice the heads"
        )


def attention_factor(options: Options) -> float:
    """Return the factor of queries and keys."""
    return 1 + 0.1 * math.log(options.factor) if options.scaling == "yarn" else 1.0


# a custom operator: a compiler would move the float64 work into the loops over all elements of q and k
@torch.library.custom_op("sbeval::rope_tables", mutates_args=())
def _tables(angles: Tensor, size: float, exact: bool) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of float64 angles, times `size`, as float32 unless `exact`."""
    cos, sin = (size * f(angles) for f in (torch.cos, torch.sin))
    return (cos, sin) if exact else (cos.float(), sin.float())


@_tables.register_fake
def _(angles: Tensor, size: float, exact: bool) -> tuple[Tensor, Tensor]:
    table = torch.empty_like(angles, dtype=torch.float64 if exact else torch.float32)
    return table, torch.empty_like(table)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x, (B, T, H, D), by angles with these cosines and sines, each (T, D / 2) or (B, T, D / 2)."""
    cos, sin = cos[..., None, :], sin[..., None, :]
    a, b = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def rotated(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor | None,
    options: Options = DEFAULT,
    *,
    starts: Tensor | None = None,
    past: int = 0,
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their positions; q are the last T of the S positions of k.

    starts: int32 (B,), the slot of position 0 in each row of a cache; k begins at slot `past`.
    """
    t, s, size = q.shape[1], k.shape[1], q.shape[3]
    check_size(size)
    positions = torch.arange(s, device=q.device)
    length = torch.full((1,), s, device=q.device)
    if cu_seqlens is not None:
        end = torch.searchsorted(cu_seqlens, positions, right=True)
        length = cu_seqlens[end] - cu_seqlens[end - 1]
        positions = positions - cu_seqlens[end - 1]
    elif starts is not None:
        positions = positions + past - starts[:, None]
        length = s + past - starts[:, None]
    angles = positions[..., None] * frequencies(size, options, length)
    cos, sin = _tables(angles, attention_factor(options), q.dtype == torch.float64)
    return rotate(q, cos[..., s - t :, :], sin[..., s - t :, :]), rotate(k, cos, sin)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    longest: int | None = None,
    starts: Tensor | None = None,
    backend: str | None = None,
    options: Options = DEFAULT,
) -> Tensor:
    """Compute the equation in linear memory; returns (B, T, H, D). See `softmax.attention` for arguments and errors."""
    check.inputs(q, k, v, cu_seqlens)
    q, k = rotated(q, k, cu_seqlens, options, starts=starts)
    return softmax.attention(
        q, k, v, scale=scale, cu_seqlens=cu_seqlens, longest=longest, starts=starts, backend=backend
    )


def backend_name(device_type: str) -> str:
    """Name the default backend on a device of this type, `cpu` or `cuda`."""
    return softmax.backend_name(device_type)


class Mixer(nn.Module):
    """RoPE as the model uses it: see `registry.Method`."""

    # of softmax.BACKENDS, for who compares them
    backend: str | None = None

    def __init__(self, options: Options, *, heads: int, kv_heads: int, head_dim: int, width: int, scale: float) -> None:
        super().__init__()
        check_size(head_dim)
        self.scale = scale
        self.options = options
        # of the row with its padding: see sbeval.evaluation.perplexity.Predictor
        self.by_length = options.scaling == "dynamic_ntk"

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        x: Tensor,
        cu_seqlens: Tensor | None = None,
        cache: Layer | None = None,
        longest: int | None = None,
    ) -> Tensor:
        if cache is None or self.options.scaling == "dynamic_ntk":
            # every token changes the rotation of all keys
            starts, (k, v) = through(cache, k, v)
            q, k = rotated(q, k, cu_seqlens, self.options, starts=starts)
        else:
            q, k = rotated(q, k, cu_seqlens, self.options, starts=cache.starts, past=cache.past)
            starts, (k, v) = through(cache, k, v)
        return softmax.attention(
            q,
            k,
            v,
            scale=self.scale,
            cu_seqlens=cu_seqlens,
            longest=longest,
            starts=starts,
            backend=self.backend,
        )
