"""Examples against the rules of the task, written a second time as one pass from the left."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sbeval.data import recall
from sbeval.data.recall import Recall
from sbeval.models.decoder import IGNORE
from sbeval.tables import values
from sbeval.tasks import recall_data
from sbeval.tasks.recall_data import Examples, generate


def draw(task: Recall, rows: int, seed: int = 0) -> Examples:
    return generate(task, seed, torch.arange(rows))


@st.composite
def tasks(pick: st.DrawFn) -> Recall:
    pairs = pick(st.integers(1, 12))
    length = 2 * pick(st.integers(2 * pairs, 2 * pairs + 20))
    vocab = pick(st.integers(length + 1, 4 * length))
    task = Recall(
        vocab_size=vocab,
        seq_len=length,
        kv_pairs=pairs,
        filler=pick(st.sampled_from(recall.FILLERS)),
        distinct=tuple(pick(st.sets(st.sampled_from(recall.DISTINCT)))),
        key_pool=pick(st.none() | st.integers(pairs, vocab // 2 - 1)),
        score_prefix=pick(st.booleans()),
    )
    return dataclasses.replace(task, n_back=pick(st.integers(1, min(3, task.most_values))))


def by_hand(task: Recall, row: list[int]) -> tuple[list[int], list[int], list[int]]:
    """Labels, stale values and distances of one row, by rule 5."""
    values: dict[int, list[tuple[int, int]]] = {}
    labels, stale, distance = [], [], []
    for i, token in enumerate(row):
        mine = values.get(token, [])
        known = len(mine) >= task.n_back and (task.score_prefix or i >= 2 * task.kv_pairs)
        answer, where = mine[-task.n_back] if known else (IGNORE, i)
        labels.append(answer)
        stale.append(len(mine) - 1 if known else 0)
        distance.append(i - where)
        if i and 0 < row[i - 1] < task.vocab_size // 2 <= token:
            values.setdefault(row[i - 1], []).append((token, i))
    return labels, stale, distance


@settings(max_examples=120, deadline=None)
@given(task=tasks(), seed=st.integers(0, 2**40))
def test_examples_follow_the_rules(task: Recall, seed: int) -> None:
    examples = draw(task, 4, seed)
    half = task.vocab_size // 2
    for row, targets, stale, distance in zip(
        examples.tokens.tolist(),
        examples.targets.tolist(),
        examples.stale.tolist(),
        examples.distance.tolist(),
        strict=True,
    ):
        assert len(row) == task.seq_len
        prefix, rest = row[: 2 * task.kv_pairs], row[2 * task.kv_pairs :]
        keys, values = prefix[::2], prefix[1::2]
        assert all(0 < key <= task.keys < half for key in keys)
        assert all(half <= value < task.vocab_size for value in values)
        assert "keys" not in task.distinct or len(set(keys)) == task.kv_pairs
        assert "values" not in task.distinct or len(set(values)) == task.kv_pairs
        if task.filler == "any":
            assert all(0 < token < task.vocab_size for token in rest)
        else:
            fillers = [0] if task.filler == "padding" else range(half, task.vocab_size)
            queries = [token for token in rest[::2] if 0 < token < half]
            assert all(token in fillers for token in rest[1::2])
            assert all(token in fillers for token in rest[::2] if not 0 < token < half)
            assert len(queries) == task.kv_pairs and set(queries) <= set(keys)
            assert "queries" not in task.distinct or sorted(queries) == sorted(keys)
        assert (targets, stale, distance) == by_hand(task, row)
    assert int((examples.targets != IGNORE).sum()) <= task.scored(4)


def test_the_example_of_the_docstring() -> None:
    task = Recall(vocab_size=16, seq_len=14, kv_pairs=2)
    # keys 1 and 2, values from 8 on
    row = [1, 10, 2, 8, 11, 9, 1, 11, 10, 10, 1, 8, 2, 9]
    found = recall_data.label(task, torch.tensor([row]))
    scored = {i: label for i, label in enumerate(found.targets[0].tolist()) if label != IGNORE}
    assert scored == {6: 10, 10: 11, 12: 8}
    assert [found.stale[0, i].item() for i in scored] == [0, 1, 0]
    assert [found.distance[0, i].item() for i in scored] == [5, 3, 9]


def test_slots_follow_the_power_law() -> None:
    task, rows = Recall(vocab_size=200, seq_len=48, kv_pairs=6), 20000
    examples = draw(task, rows)
    taken = (examples.tokens[:, 12::2] < 100).double().mean(0).numpy()
    random = np.random.default_rng(0)
    weights = np.arange(1, 19) ** (0.01 - 1)
    chosen = np.zeros(18)
    for _ in range(rows):
        chosen[random.choice(18, 6, replace=False, p=weights / weights.sum())] += 1
    expected = chosen / rows
    # both sides are means over rows: five standard errors of their difference
    assert np.all(np.abs(taken - expected) < 5 * np.sqrt(2 * expected * (1 - expected) / rows))


def inclusion(weights: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.float64]:
    """Probability that each is among `count` draws without replacement, summed over all orders of drawing."""
    chance = np.zeros(len(weights))
    for order in itertools.permutations(range(len(weights)), count):
        left, probability = weights.sum(), 1.0
        for index in order:
            probability *= weights[index] / left
            left -= weights[index]
        chance[list(order)] += probability
    return chance


@pytest.mark.parametrize("power", [0.01, 1.0, 2.5, -1.0])
def test_slots_have_the_exact_chances_of_their_law(power: float) -> None:
    task, rows = Recall(vocab_size=64, seq_len=20, kv_pairs=3, slot_power=power), 20000
    taken = (draw(task, rows).tokens[:, 6::2] < 32).double().mean(0).numpy()
    exact = inclusion(np.arange(1.0, 8.0) ** (power - 1), 3)
    assert np.all(np.abs(taken - exact) < 5 * np.sqrt(exact * (1 - exact) / rows))


def test_keys_and_values_are_drawn_evenly_and_with_replacement() -> None:
    tokens = draw(Recall(vocab_size=33, seq_len=32, kv_pairs=8), 4000).tokens
    for drawn, low, high in ((tokens[:, 0:16:2], 1, 16), (tokens[:, 1::2], 16, 33)):
        counts = torch.bincount(drawn.flatten(), minlength=33)[low:high].double()
        expected = drawn.numel() / (high - low)
        assert counts.sum() == drawn.numel()
        assert ((counts - expected).abs() < 5 * expected**0.5).all()
    # eight keys of fifteen are seldom all different
    different = np.mean([len(set(row)) == 8 for row in tokens[:, 0:16:2].tolist()])
    exact = float(np.prod([(15 - i) / 15 for i in range(8)]))
    assert abs(different - exact) < 5 * (exact * (1 - exact) / 4000) ** 0.5


@pytest.mark.parametrize(("pairs", "scored"), [(32, 32), (64, 64), (128, 130), (192, 196)])
def test_facts_of_the_papers_sizes(pairs: int, scored: int) -> None:
    examples = draw(Recall(kv_pairs=pairs), 400)
    where = examples.targets != IGNORE
    counts = where.sum(1).double()
    assert abs(float(counts.mean()) - scored) < 0.6 + 4 * float(counts.std()) / 20
    assert 0.35 < float((examples.stale[where] > 0).double().mean()) < 0.40


def test_same_seed_same_bytes() -> None:
    task = Recall(vocab_size=100, seq_len=64, kv_pairs=8)
    assert torch.equal(draw(task, 5, 3).tokens, draw(task, 5, 3).tokens)
    assert not torch.equal(draw(task, 5, 3).tokens, draw(task, 5, 4).tokens)


def test_accuracy_of_an_oracle_and_of_a_wrong_answer() -> None:
    examples = draw(Recall(vocab_size=40, seq_len=32, kv_pairs=6), 200)
    scored = examples.targets != IGNORE
    for correct, wanted in ((scored, 1.0), (torch.zeros_like(scored), 0.0)):
        found = {str(factors): estimate for estimate, factors in recall_data.accuracies(examples, correct)}
        assert all(estimate.value == wanted for estimate in found.values())
    assert {"{'split': 'all'}", "{'split': 'fresh'}", "{'split': 'stale'}"} <= set(found)


def test_splits_add_up_and_errors_are_over_examples() -> None:
    examples = draw(Recall(vocab_size=40, seq_len=32, kv_pairs=6), 300)
    scored = examples.targets != IGNORE
    correct = scored & (torch.rand(scored.shape, generator=torch.Generator().manual_seed(1)) < 0.7)
    found = list(recall_data.accuracies(examples, correct))
    overall = found[0][0]
    assert overall.value == pytest.approx(int(correct.sum()) / int(scored.sum()), rel=1e-12)
    assert overall.n == 300
    # jackknife over examples
    right, count = correct.sum(1).double(), scored.sum(1).double()
    left_out = (right.sum() - right) / (count.sum() - count)
    jackknife = float(((left_out - left_out.mean()) ** 2).sum() * 299 / 300) ** 0.5
    assert overall.stderr == pytest.approx(jackknife, rel=0.02)
    by_distance = [estimate.value for estimate, factors in found if "distance_start" in factors]
    assert len(by_distance) >= 4


def test_each_accuracy_is_over_its_own_positions() -> None:
    examples = draw(Recall(vocab_size=40, seq_len=32, kv_pairs=8), 300)
    scored = examples.targets != IGNORE
    correct = scored & ((torch.arange(300)[:, None] % 2 == 0) | (examples.stale == 1))
    stale, distance = examples.stale, examples.distance
    masks: dict[tuple[str, object], Tensor] = {
        ("split", "all"): scored,
        ("split", "fresh"): scored & (stale == 0),
        ("split", "stale"): stale > 0,
        **{("stale_values", n): scored & (stale == n) for n in range(int(stale.max()) + 1)},
        **{("distance_start", 2**i): (distance >= 2**i) & (distance < 2 ** (i + 1)) for i in range(5)},
    }
    seen = set()
    for accuracy, factors in recall_data.accuracies(examples, correct):
        name = next(iter(factors))
        where = masks[name, factors[name]]
        assert accuracy.value == pytest.approx(int((correct & where).sum()) / int(where.sum()), rel=1e-12)
        # an example without such a position tells nothing
        assert accuracy.n == int(where.any(1).sum())
        seen.add((name, factors[name]))
    assert seen == {name for name, where in masks.items() if where.any()}


def test_values_are_the_counts_behind_the_rows() -> None:
    examples = draw(Recall(vocab_size=40, seq_len=32, kv_pairs=6), 50)
    scored = examples.targets != IGNORE
    correct = scored & (torch.rand(scored.shape, generator=torch.Generator().manual_seed(1)) < 0.7)
    found = values.counted(recall_data.counts(examples, correct), "correct", "scored", by_example=True)
    for accuracy, factors in recall_data.accuracies(examples, correct):
        mine = found[np.logical_and.reduce([(found[name] == value).fillna(False) for name, value in factors.items()])]
        sums = mine.groupby("metric")["value"].sum()
        assert sums["correct"] / sums["scored"] == pytest.approx(accuracy.value)
    each = found[(found["split"] == "all") & (found["metric"] == "correct")]
    assert each["value"].tolist() == correct.sum(1).tolist() and each["unit_id"].tolist() == list(map(str, range(50)))
    assert str(found["distance_start"].dtype) == "Int64"


@pytest.mark.parametrize(
    ("distinct", "filler"), [((), "value"), (("keys",), "value"), (("keys", "queries"), "value"), ((), "padding")]
)
def test_the_oldest_value_that_can_be_asked_for_is_asked_for(distinct: tuple[str, ...], filler: str) -> None:
    sizes: dict[str, Any] = {"vocab_size": 64, "seq_len": 8, "kv_pairs": 2, "filler": filler, "distinct": distinct}
    keys = 2 if "keys" in distinct else 1
    task = Recall(key_pool=keys, n_back=Recall(**sizes).most_values, **sizes)
    assert (draw(task, 500).targets != IGNORE).any()


def test_the_extremes_of_the_slot_law_can_be_drawn() -> None:
    for power in (-10, 10):
        task = Recall(seq_len=768, kv_pairs=192, slot_power=power)
        assert (draw(task, 2).tokens[:, 384::2] < 4096).sum(1).tolist() == [192, 192]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("filler", recall.FILLERS)
def test_the_same_examples_on_a_gpu(filler: str) -> None:
    task = Recall(kv_pairs=96, filler=filler, distinct=("queries",))
    here, there = (generate(task, 3, torch.arange(64, device=name)) for name in ("cpu", "cuda"))
    for name in ("tokens", "targets", "stale", "distance"):
        assert torch.equal(getattr(here, name), getattr(there, name).cpu())
