"""The language against its rule, read from the left; its chances, and errors by distance."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sbeval.models.decoder import IGNORE
from sbeval.tasks.flip_flop import Config
from sbeval.tasks.flip_flop_data import READ, SKIP, WRITE, Examples, batches, errors, generate

TINY = Config(
    attention=("rope", "stick_breaking"),
    seeds=(0,),
    lrs=(1e-3, 1e-2),
    seq_len=16,
    batch=4,
    steps=4,
    check_every=2,
    test_rows=30,
    width=8,
)


@settings(max_examples=40, deadline=None)
@given(half=st.integers(2, 40), p=st.floats(0, 1), seed=st.integers(0, 2**40))
def test_every_read_is_the_bit_last_written(half: int, p: float, seed: int) -> None:
    examples = generate(2 * half, p, seed, torch.arange(4))
    for row, targets, distance in zip(
        examples.tokens.tolist(), examples.targets.tolist(), examples.distance.tolist(), strict=True
    ):
        assert row[0] == WRITE and row[-2] == READ and len(row) == 2 * half
        memory, since = None, 0
        for i in range(0, len(row), 2):
            instruction, bit = row[i], row[i + 1]
            assert instruction in (WRITE, READ, SKIP) and bit in (0, 1)
            since += 1
            if instruction == WRITE:
                memory, since = bit, 0
            wanted = memory if instruction == READ else IGNORE
            assert [targets[i], targets[i + 1]] == [wanted, IGNORE]
            assert [distance[i], distance[i + 1]] == [since if instruction == READ else 0, 0]
            assert instruction != READ or bit == memory


def test_chances_are_those_of_the_language() -> None:
    for p in (0.8, 0.98, 0.1):
        examples = generate(64, p, 1, torch.arange(4000))
        inner, bits = examples.tokens[:, 2:-2:2], examples.tokens[:, 1::2]
        for token, chance in ((SKIP, p), (WRITE, (1 - p) / 2), (READ, (1 - p) / 2)):
            share = (inner == token).double().mean()
            assert abs(share - chance) < 5 * (chance * (1 - chance) / inner.numel()) ** 0.5
        free = bits[examples.tokens[:, 0::2] != READ].double()
        assert abs(free.mean() - 0.5) < 2.5 / len(free) ** 0.5


def test_a_row_is_the_same_beside_whichever_others() -> None:
    every = generate(32, 0.5, 7, torch.arange(20))
    some = generate(32, 0.5, 7, torch.tensor([3, 11]))
    assert torch.equal(every.tokens[[3, 11]], some.tokens) and torch.equal(every.targets[[3, 11]], some.targets)
    assert not torch.equal(every.tokens, generate(32, 0.5, 8, torch.arange(20)).tokens)
    drawn = batches(TINY.seq_len, TINY.p_ignore, TINY.seeds[0], TINY.batch, torch.device("cpu"))
    assert torch.equal(drawn[2].tokens, drawn[2].tokens) and not torch.equal(drawn[2].tokens, drawn[3].tokens)


def test_error_rates_of_an_oracle_and_of_its_opposite() -> None:
    examples = generate(64, 0.5, 7, torch.arange(20))
    scored = examples.targets != IGNORE
    for correct, rate in ((scored, 0.0), (torch.zeros_like(scored), 1.0)):
        found = list(errors(examples, correct))
        assert all(estimate.value == rate for estimate, _ in found)
        assert found[0][1] == {"reads": int(scored.sum())}
    # octaves of distance have every read once
    assert sum(factors["reads"] for _, factors in found[1:]) == found[0][1]["reads"]


def test_errors_by_distance() -> None:
    targets = torch.full((1, 8), IGNORE)
    targets[0, [2, 6]] = 1
    distance = torch.tensor([[0, 0, 1, 0, 0, 0, 3, 0]])
    right = torch.zeros(1, 8, dtype=torch.bool)
    right[0, 2] = True
    found = [(e.value, f) for e, f in errors(Examples(torch.zeros(1, 8), targets, distance), right)]
    assert found == [
        (0.5, {"reads": 2}),
        (0.0, {"reads": 1, "distance_start": 1, "distance_end": 2}),
        (1.0, {"reads": 1, "distance_start": 2, "distance_end": 4}),
    ]
