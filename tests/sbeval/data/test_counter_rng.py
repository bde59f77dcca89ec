import itertools
import math

import numpy as np
import numpy.typing as npt
import pytest
import torch

from sbeval.data import counter_rng

ROWS = torch.arange(4000)


GOLDEN_BITS = [
    0xE23D9B5F1505B355,
    0xD136BFAF84609710,
    0x4D853C6F22EE96E0,
    0x034109F866212DC2,
    0x1B58F950020AE82D,
    0xB87F31612A3A0BF2,
]
GOLDEN_CHOICE = [[0, 1, 4, 7], [0, 6, 7, 8], [0, 1, 3, 7]]
GOLDEN_ORDER = [2, 1, 4, 5, 7, 3, 0, 6]


def unsigned(x: torch.Tensor) -> list[int]:
    return [value & counter_rng.WORD for value in x.tolist()]


def test_numbers_are_those_of_splitmix64() -> None:
    # the generator's first outputs from state 0, as published with it
    first = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC, 0x1B39896A51A8749B]
    states = torch.tensor([(i + 1) * counter_rng.GOLDEN & counter_rng.WORD for i in range(5)], dtype=torch.uint64)
    assert unsigned(counter_rng._mix(states.view(torch.int64))) == first
    assert [counter_rng._mix_word((i + 1) * counter_rng.GOLDEN & counter_rng.WORD) for i in range(5)] == first


def test_frozen_values() -> None:
    """Data of every finished run hang on these: they must not change."""
    x = counter_rng.bits(counter_rng.key(7, 2, 11), torch.tensor([0, 5]), 3)
    assert unsigned(x[0]) + unsigned(x[1]) == GOLDEN_BITS
    assert counter_rng.below(x, 1000).flatten().tolist() == [value * 1000 >> 64 for value in GOLDEN_BITS]
    assert counter_rng.uniform(x).flatten().tolist() == [(value >> 11) / 2**53 for value in GOLDEN_BITS]
    weights = tuple(1 / j for j in range(1, 13))
    taken = counter_rng.chosen(counter_rng.bits(counter_rng.key(0, 0), torch.arange(3), 12), weights, 4)
    assert [row.nonzero().flatten().tolist() for row in taken] == GOLDEN_CHOICE
    assert counter_rng.shuffled(counter_rng.key(3, 1), 8, torch.device("cpu")).tolist() == GOLDEN_ORDER


def test_a_number_depends_on_its_place_alone() -> None:
    start = counter_rng.key(1, 2, 3)
    all_rows = counter_rng.bits(start, torch.arange(10), 8)
    assert torch.equal(counter_rng.bits(start, torch.tensor([7, 2]), 3, first=4), all_rows[[7, 2], 4:7])
    # a step on the device, as in a captured graph
    on_device = counter_rng.key(1, 2, torch.tensor(3))
    assert torch.equal(counter_rng.bits(on_device, torch.arange(10), 8), all_rows)


def test_seeds_streams_steps_rows_and_positions_differ() -> None:
    keys = [counter_rng.key(seed, stream, step) for seed, stream, step in itertools.product(range(20), repeat=3)]
    assert len(set(keys)) == 8000
    x = torch.cat([counter_rng.bits(counter_rng.key(0, 0, step), torch.arange(50), 50) for step in range(20)])
    assert len(x.unique()) == x.numel()


def chi_square(counts: npt.NDArray[np.float64], expected: npt.NDArray[np.float64]) -> float:
    """Standard deviations by which chi-square misses its mean."""
    freedom = len(counts) - 1
    return float(((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("n", [2, 3, 100, 511])
def test_integers_are_even(n: int) -> None:
    x = counter_rng.below(counter_rng.bits(counter_rng.key(0, n), ROWS, 50), n)
    counts = torch.bincount(x.flatten(), minlength=n).double().numpy()
    assert abs(chi_square(counts, np.full(n, x.numel() / n))) < 5


def test_neighbours_are_independent() -> None:
    """Pairs of positions, of rows, of steps, of streams and of seeds fill a square evenly."""
    streams = [
        counter_rng.bits(counter_rng.key(*key), ROWS, 50) for key in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0))
    ]
    x = streams[0]
    pairs = [(x[:, 1:], x[:, :-1]), (x[1:], x[:-1]), *((x, other) for other in streams[1:])]
    for one, other in pairs:
        cells = counter_rng.below(one, 16) * 16 + counter_rng.below(other, 16)
        counts = torch.bincount(cells.flatten(), minlength=256).double().numpy()
        assert abs(chi_square(counts, np.full(256, cells.numel() / 256))) < 5


def test_every_bit_is_fair() -> None:
    x = counter_rng.bits(counter_rng.key(4, 0), ROWS, 50).flatten()
    ones = np.array([float(((x >> bit) & 1).sum()) for bit in range(64)])
    assert np.all(np.abs(ones - len(x) / 2) < 5 * math.sqrt(len(x)) / 2)


def test_edges_of_the_word() -> None:
    x = torch.tensor([0, 2**63 - 1, -(2**63), -1])  # 0, below the middle, the middle, the largest
    assert counter_rng.below(x, 1000).tolist() == [0, 499, 500, 999]
    assert counter_rng.below(x, 2**31 - 1).tolist() == [
        (value & counter_rng.WORD) * (2**31 - 1) >> 64 for value in x.tolist()
    ]
    assert counter_rng.uniform(x).tolist() == [0.0, 0.5 - 2**-53, 0.5, 1 - 2**-53]
    # the extremes of the exponential have logarithms too
    assert counter_rng.chosen(x[None], (1.0, 1.0, 1.0, 1.0), 1).tolist() == [[False, False, False, True]]


def test_logarithm() -> None:
    x = torch.cat([torch.arange(1, 5000), 2 ** torch.arange(53), (1 << 53) - torch.arange(100)])
    exact = np.log2(x.double().numpy())
    assert np.abs(counter_rng._log2(x).double().numpy() / 2**counter_rng.LOG_BITS - exact).max() < 2e-8


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (1.0, 0.5, 0.25, 3.0, 2.0), (1e-9, 1.0, 1e9, 1e9)])
def test_choice_without_replacement_has_the_exact_law(weights: tuple[float, ...]) -> None:
    rows = torch.arange(20000)
    found = counter_rng.chosen(counter_rng.bits(counter_rng.key(9, 0), rows, len(weights)), weights, 2)
    assert (found.sum(1) == 2).all()
    total = sum(weights)
    for i, j in itertools.combinations(range(len(weights)), 2):
        a, b = weights[i] / total, weights[j] / total
        exact = a * b / (1 - a) + a * b / (1 - b)
        share = float((found[:, i] & found[:, j]).double().mean())
        assert abs(share - exact) <= 5 * math.sqrt(exact * (1 - exact) / len(rows)) + 1e-12


def test_order_is_a_permutation_of_its_own() -> None:
    orders = [counter_rng.shuffled(counter_rng.key(0, 0, epoch), 50, torch.device("cpu")) for epoch in range(2)]
    assert [sorted(order.tolist()) for order in orders] == [list(range(50))] * 2
    assert not torch.equal(*orders)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_same_on_a_gpu() -> None:
    weights = tuple((j + 1) ** -0.99 for j in range(288))
    x = {
        name: counter_rng.bits(counter_rng.key(3, 4, 5), torch.arange(2000, device=name), 288)
        for name in ("cpu", "cuda")
    }
    for function in (lambda b: b, lambda b: counter_rng.below(b, 4095), counter_rng.uniform):
        assert torch.equal(function(x["cpu"]), function(x["cuda"]).cpu())
    assert torch.equal(counter_rng.chosen(x["cpu"], weights, 96), counter_rng.chosen(x["cuda"], weights, 96).cpu())
