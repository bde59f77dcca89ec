"""Counter-based random numbers: a function of (seed, stream, step, row, position), on any device.

    key(seed, stream, step) -> one number for each row -> SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) along the row

Without a state to advance, a batch needs neither the batches before it nor a loop over its rows. All is arithmetic on
64-bit integers, which wraps alike on CPU and GPU: both give the same numbers. Logarithms differ in their last bit
between libraries, and one bit decides which of two slots is drawn. So `chosen` takes them from a table made on the CPU,
by integer interpolation that is exact to 2e-8.
"""

import functools
import math
from typing import overload

import torch
from torch import Tensor

GOLDEN, MIX_1, MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
WORD = (1 << 64) - 1
# logarithms are in units of 2^-LOG_BITS; their table has 2^TABLE_BITS intervals from 1 to 2
LOG_BITS, TABLE_BITS = 40, 12
# weights are 2^-WEIGHT_RANGE to 2^WEIGHT_RANGE; the index of an item takes the INDEX_BITS below its logarithm
WEIGHT_RANGE, INDEX_BITS = 128, 14


@overload
def key(seed: int, stream: int, step: int = 0) -> int: ...
@overload
def key(seed: int, stream: int, step: Tensor) -> Tensor: ...
def key(seed: int, stream: int, step: int | Tensor = 0) -> int | Tensor:
    """Return the key of one step's draw, from which its rows start. Streams are independent draws from one seed.

    seed, stream: integers from 0. step: integer from 0, or a scalar int64 tensor; a tensor gives a tensor.
    """
    start = _mix_word((_mix_word((seed + GOLDEN) & WORD) + (stream + 1) * GOLDEN) & WORD)
    if isinstance(step, int):
        return _mix_word((start + (step + 1) * GOLDEN) & WORD)
    return _mix((step + 1) * _signed(GOLDEN) + _signed(start))


def bits(start: int | Tensor, rows: Tensor, count: int, first: int = 0) -> Tensor:
    """Return 64 random bits at positions first ... first + count - 1 of each row: (R, count) int64.

    start: a `key`. rows: (R,) int64, indices of rows, on the device of the result; a row's bits do not depend on the
    other rows.
    """
    begin = _signed(start) if isinstance(start, int) else start
    states = _mix((rows + 1) * _signed(GOLDEN) + begin)
    positions = torch.arange(first + 1, first + count + 1, device=rows.device) * _signed(GOLDEN)
    return _mix(states[:, None] + positions)


def below(x: Tensor, n: int) -> Tensor:
    """Return uniform integers 0 ... n - 1 from 64 random bits; n < 2^31. The bias is below n / 2^64."""
    assert 0 < n < 1 << 31, n
    # floor(x n / 2^64) in halves, since the product exceeds 64 bits
    low = _shift((x & 0xFFFFFFFF) * n, 32)
    return low.add_(_shift(x, 32).mul_(n)) >> 32


def uniform(x: Tensor) -> Tensor:
    """Return uniform multiples of 2^-53 in [0, 1) from 64 random bits, float64 and exact."""
    return _shift(x, 11).double().mul_(2.0**-53)


def shuffled(start: int, count: int, device: torch.device) -> Tensor:
    """Return a random permutation of 0 ... count - 1, int64; equal bits, which hardly occur, keep their order."""
    return bits(start, torch.zeros(1, dtype=torch.int64, device=device), count)[0].sort(stable=True).indices


def chosen(x: Tensor, weights: tuple[float, ...], count: int) -> Tensor:
    """Draw `count` of n weighted items one after another without replacement; return a mask, (R, n) bool.

    x: (R, n), 64 random bits for each item. Draws the items with the smallest E / weight, E exponential (Efraimidis and
    Spirakis 2006), by comparing integers: log2 E - log2 weight, with the item's index in the low bits to break ties.
    """
    n = x.shape[1]
    assert 0 < count <= n == len(weights) < 1 << INDEX_BITS, (count, n, len(weights))
    if count == n:
        return torch.ones_like(x, dtype=torch.bool)
    # log2 u of odd multiples of 2^-53, which are never 1; the clamp is for those that round to 0
    exponential = ((53 << LOG_BITS) - _log2(_shift(x, 11) | 1)).clamp_(min=1)
    race = _log2(exponential) - _log_weights(weights, x.device)
    race = (race << INDEX_BITS) | torch.arange(n, device=x.device)
    return race <= race.kthvalue(count, dim=1, keepdim=True).values


@functools.lru_cache(maxsize=64)
def _log_weights(weights: tuple[float, ...], device: torch.device) -> Tensor:
    logs = [math.log2(weight) for weight in weights]
    assert max(map(abs, logs)) <= WEIGHT_RANGE, "weights differ by too much"
    return torch.tensor([round(math.ldexp(log, LOG_BITS)) for log in logs], device=device)


@functools.lru_cache(maxsize=8)
def _log_table(device: torch.device) -> Tensor:
    size = 1 << TABLE_BITS
    return torch.tensor([round(math.ldexp(math.log2(1 + i / size), LOG_BITS)) for i in range(size + 1)], device=device)


def _log2(x: Tensor) -> Tensor:
    """Return log2 of integers 1 ... 2^53, in units of 2^-LOG_BITS, interpolated in the table and rounded down."""
    mantissa, exponent = torch.frexp(x.double())
    # both exact: 2^52 <= whole < 2^53
    whole = (mantissa * 2.0**53).long()
    table = _log_table(x.device)
    index = (whole >> (52 - TABLE_BITS)) & ((1 << TABLE_BITS) - 1)
    low = table[index]
    # 32 bits of the rest, so that the product fits
    rest = (whole >> (20 - TABLE_BITS)) & 0xFFFFFFFF
    return ((exponent.long() - 1) << LOG_BITS) + low + ((table[index + 1] - low) * rest >> 32)


def _signed(word: int) -> int:
    """Return the int64 of the same 64 bits."""
    return word - (1 << 64) if word >> 63 else word


def _shift(x: Tensor, by: int) -> Tensor:
    """Shift right and fill with zeros; torch's >> fills with the sign."""
    return (x >> by).bitwise_and_((1 << (64 - by)) - 1)


def _mix(x: Tensor) -> Tensor:
    """Apply SplitMix64's output function to int64 states, in place."""
    for by, factor in ((30, MIX_1), (27, MIX_2)):
        x = x.bitwise_xor_(_shift(x, by)).mul_(_signed(factor))
    return x.bitwise_xor_(_shift(x, 31))


def _mix_word(x: int) -> int:
    """Apply SplitMix64's output function to one number."""
    for by, factor in ((30, MIX_1), (27, MIX_2)):
        x = (x ^ x >> by) * factor & WORD
    return x ^ x >> 31
