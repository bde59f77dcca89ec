"""Decoding of stick-breaking attention: keys in chunks, interpreted where there is no GPU."""

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from sbeval.kernels import stick_breaking_decode
from sbeval.kernels.stick_breaking import reference

GPU = torch.cuda.is_available()
PLACE = torch.device("cuda" if GPU else "cpu")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few keys at first, so that there are several launches."""
    torch.manual_seed(0)
    monkeypatch.setattr(stick_breaking_decode, "NEWEST", 64)


def draw(queries: int, keys: int, heads: int, groups: int, dim: int = 32, batch: int = 1) -> tuple[Tensor, ...]:
    shapes = ((queries, heads), (keys, groups), (keys, groups))
    return tuple(torch.randn(batch, n, h, dim, dtype=torch.float32, device=PLACE) for n, h in shapes)


def decode(
    q: Tensor, k: Tensor, v: Tensor, epsilon: float, bias: Tensor | None = None, current: bool = False
) -> tuple[Tensor, Tensor]:
    return stick_breaking_decode.decode(q, k, v, bias, None, None, q.shape[3] ** -0.5, current, epsilon)


@pytest.mark.parametrize("epsilon", [0.0, 2.0**-24])
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "groups", "dim", "current"),
    [
        (1, 1, 2, 2, 32, False),
        (1, 1, 2, 2, 32, True),
        (1, 400, 4, 4, 16, False),
        (1, 321, 12, 3, 20, True),
        # more rows than a tile has
        (5, 330, 8, 2, 32, False),
        (9, 130, 4, 1, 16, True),
    ],
)
def test_chunks_make_the_whole(
    queries: int, keys: int, heads: int, groups: int, dim: int, current: bool, epsilon: float
) -> None:
    """Sticks last: half of them are left after a hundred keys or more, so that all chunks count."""
    q, k, v = draw(queries, keys, heads, groups, dim, batch=2)
    bias = torch.linspace(-7, -4, heads, device=PLACE)
    out, rest = decode(q, k, v, epsilon, bias, current)
    wanted, wanted_rest = reference(*(x.double() for x in (q, k, v)), bias=bias.double(), attend_current=current)
    assert float((out - wanted).norm()) <= 1e-5 * float(wanted.norm())
    assert float((rest - wanted_rest).abs().max()) <= 1e-5


def test_launches_that_return_at_once_change_no_bit(monkeypatch: Any) -> None:
    """The same chunks, walked or not where the stick is used up: before, at and after the ends of launches."""
    q, k, v = draw(1, 700, 4, 2)
    # sticks that are used up early, late and never
    bias = torch.tensor([0.0, -2.0, -3.5, -8.0], device=PLACE)
    known = decode(q, k, v, 2.0**-24, bias)
    monkeypatch.setattr(stick_breaking_decode, "_stick_left", _whole_stick)
    unknown = decode(q, k, v, 2.0**-24, bias)
    assert all(torch.equal(a, b) for a, b in zip(known, unknown, strict=True))


@triton.jit
def _whole_stick(LEFT, n_chunks):  # type: ignore[no-untyped-def]
    return tl.full([], 1.0, tl.float32)


def test_a_used_up_stick_leaves_older_keys_unread() -> None:
    """What the oldest keys hold is not read: it would be seen."""
    q, k, v = draw(1, 1400, 4, 2)
    wanted, wanted_rest = reference(*(x.double() for x in (q, k, v)))
    k[:, :300] = v[:, :300] = torch.nan
    out, rest = decode(q, k, v, 2.0**-24)
    assert float((out - wanted).norm()) <= 1e-5 * float(wanted.norm())
    assert float((rest - wanted_rest).abs().max()) <= 2.0**-24


def test_heads_of_a_long_cache_are_further_apart_than_32_bits_count() -> None:
    """As in a cache of 64 M keys a head, of which nothing but the first is ever in memory."""
    apart, dim = 2**30, 16
    q, k, _ = (x.half() for x in draw(1, 70, 3, 3, dim))
    far = torch.empty(2 * apart + 70 * dim, dtype=k.dtype, device=PLACE).as_strided(k.shape, (0, dim, apart, 1))
    far.copy_(k)
    for near, other in zip(decode(q, k, k, 0.0), decode(q, far, far, 0.0), strict=True):
        assert torch.equal(near, other)


def test_a_remainder_below_all_numbers_is_none_that_is_missing() -> None:
    """Four hundred keys that take nearly all: what they leave is no float32, and later chunks know that it is there."""
    q, k, v = draw(1, 400, 2, 2)
    out, rest = decode(q, k, v, 0.0, torch.full((2,), 20.0, device=PLACE))
    wanted, _ = reference(*(x.double() for x in (q, k, v)), bias=torch.full((2,), 20.0, device=PLACE).double())
    assert float((out - wanted).norm()) <= 1e-5 * float(wanted.norm())
    assert float(rest.max()) < 1e-30


@pytest.mark.parametrize("n_programs", [1, 3, 8, 96, 100, 256, 263, 264, 265, 5000])
def test_splits_keep_the_device_busy(n_programs: int) -> None:
    splits = stick_breaking_decode._splits(n_programs, 264)
    waves = n_programs * splits / 264
    assert waves / -(-waves // 1) >= 0.75
    assert splits * n_programs <= max(n_programs, 4 * 264)
