"""The task against its rules, written a second time as one pass from the left."""

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor

from sbeval.data import recall
from sbeval.data.recall import Recall
from sbeval.errors import InputError
from sbeval.models.decoder import IGNORE
from sbeval.runtime.progress import Progress
from sbeval.sweep import scheduler
from sbeval.sweep.cell import cell_id
from sbeval.sweep.context import RunContext
from sbeval.tables import table
from sbeval.tables.mqrar import LEGEND
from sbeval.tasks import mqrar, recall_data
from sbeval.tasks.recall_data import Examples, generate
from sbeval.tasks.synthetic import TEST_SEED, VALIDATION_SEED

RESULTS = Path(__file__).parents[2] / "results" / "mqrar.csv"


def batches_of(cell: mqrar.Cell) -> recall_data.Batches:
    config = cell.config
    return recall_data.Batches(cell.task, config.seeds[0], config.batch, config.stored_rows, torch.device("cpu"))


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


def test_training_never_draws_the_same_batch_twice() -> None:
    cell = mqrar.cells(mqrar.PRESETS["quick"])[0]
    fresh = batches_of(cell)
    assert torch.equal(fresh[5].tokens, fresh[5].tokens)
    assert not torch.equal(fresh[5].tokens, fresh[6].tokens)
    # several steps are drawn together
    again = batches_of(cell)
    for step in (40, 3, 17, 16, 5):
        drawn = generate(cell.task, again.seed, again.rows(step))
        for name in ("tokens", "targets", "stale", "distance"):
            assert torch.equal(getattr(again[step], name), getattr(drawn, name)), (step, name)


def test_sweeps_over_pairs_share_compiled_code() -> None:
    cells = mqrar.cells(mqrar.PRESETS["h200"])
    capacities = {cell.task.kv_pairs: cell.training().capacity for cell in cells}
    assert all((capacities[pairs] or 0) >= Recall(vocab_size=1024, kv_pairs=pairs).scored(64) for pairs in capacities)
    assert len(set(capacities.values())) == 2


def test_training_validation_and_test_draw_apart() -> None:
    def batches(seed: int, attention: str) -> recall_data.Batches:
        (cell,) = mqrar.cells(mqrar.Config(attention=(attention,), seeds=(seed,)))
        return batches_of(cell)

    task = batches(0, "rope").task
    held_out = [recall_data.held_out(task, seed, 64, torch.device("cpu")) for seed in (TEST_SEED, VALIDATION_SEED)]
    apart = [batches(0, "rope")[0], batches(1, "rope")[0], *held_out]
    for one, other in itertools.combinations(apart, 2):
        assert one.tokens.shape == other.tokens.shape and not torch.equal(one.tokens, other.tokens)
    # all methods learn from the same examples
    assert torch.equal(batches(0, "alibi")[0].tokens, apart[0].tokens)


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


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"seq_len": 63, "vocab_size": 128}, "seq_len must be even and at least 4; got 63"),
        ({"seq_len": 64, "vocab_size": 128, "kv_pairs": 17}, "kv_pairs must be 1 to 16 at seq_len 64"),
        ({"seq_len": 64, "vocab_size": 64, "kv_pairs": 4}, "vocab_size must be above seq_len 64; got 64"),
        ({"slot_power": 11}, "slot_power must be -10 to 10; got 11"),
        ({"filler": "values"}, "unknown filler 'values'; did you mean 'value'"),
        ({"distinct": ("kees",)}, "unknown --distinct 'kees'; did you mean 'keys'"),
        ({"key_pool": 4096}, "key_pool must be 1 to 4095 (the keys); got 4096"),
        ({"key_pool": 31, "distinct": ("keys",)}, "32 distinct keys cannot be drawn from key_pool 31"),
        ({"n_back": 0}, "n_back must be at least 1; got 0"),
        # all pairs and all queries but the last could be of one key
        ({"kv_pairs": 4, "n_back": 8}, "n_back must be at most 7, the values that a key can have; got 8"),
        ({"kv_pairs": 4, "n_back": 5, "distinct": ("keys",)}, "n_back must be at most 4,"),
        ({"kv_pairs": 4, "n_back": 2, "distinct": ("keys", "queries")}, "n_back must be at most 1,"),
        ({"kv_pairs": 4, "n_back": 5, "filler": "padding"}, "n_back must be at most 4,"),
    ],
)
def test_impossible_sizes(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        Recall(**sizes)


@pytest.mark.parametrize(
    ("distinct", "filler"), [((), "value"), (("keys",), "value"), (("keys", "queries"), "value"), ((), "padding")]
)
def test_the_oldest_value_that_can_be_asked_for_is_asked_for(distinct: tuple[str, ...], filler: str) -> None:
    sizes: dict[str, Any] = {"vocab_size": 64, "seq_len": 8, "kv_pairs": 2, "filler": filler, "distinct": distinct}
    keys = 2 if "keys" in distinct else 1
    task = Recall(key_pool=keys, n_back=Recall(**sizes).most_values, **sizes)
    assert (draw(task, 500).targets != IGNORE).any()


def test_a_batch_without_labels_teaches_nothing(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"kv_pairs": (2,), "widths": (16,), "vocab_size": 64, "seq_len": 8, "test_rows": 200}
    (cell,) = mqrar.cells(mqrar.Config(attention=("rope",), n_back=(3,), batch=1, steps=3, **sizes))
    with Progress() as progress:
        outcome = cell.run(RunContext(results_dir=tmp_path, device=torch.device("cpu")), progress)
    assert outcome.curves["loss"] == [(1, 0.0), (2, 0.0), (3, 0.0)]


def test_the_extremes_of_the_slot_law_can_be_drawn() -> None:
    for power in (-10, 10):
        task = Recall(seq_len=768, kv_pairs=192, slot_power=power)
        assert (draw(task, 2).tokens[:, 384::2] < 4096).sum(1).tolist() == [192, 192]


def test_training_ends_when_validation_says_so(tmp_path: Path) -> None:
    config = mqrar.Config(
        attention=("rope",),
        kv_pairs=(2,),
        widths=(16,),
        vocab_size=32,
        seq_len=16,
        batch=2,
        steps=9,
        check_every=3,
        test_rows=12,
        stop_accuracy=0.0,
    )
    context = RunContext(results_dir=tmp_path, device=torch.device("cpu"))
    with Progress() as progress:
        stopped, never = (
            mqrar.cells(dataclasses.replace(config, stop_accuracy=accuracy))[0].run(context, progress)
            for accuracy in (0.0, 2.0)
        )
    assert (stopped.train_tokens, never.train_tokens) == (3 * 2 * 16, 9 * 2 * 16)
    assert stopped.curves["loss"] == never.curves["loss"][:3]
    ends = [row.status for outcome in (stopped, never) for row in outcome.rows if isinstance(row, mqrar.Row)]
    assert {end for end in ends if end} == {"solved", "budget"}
    found = {(row.metric, row.split): row for row in stopped.rows if isinstance(row, mqrar.Row)}
    assert (found["accuracy", "all"].n, found["validation_accuracy", "all"].n) == (12, 4)


def test_the_optimizer_makes_another_cell_and_its_rows_say_so(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"kv_pairs": (2,), "widths": (16,), "vocab_size": 32, "seq_len": 16, "test_rows": 12}
    context = RunContext(results_dir=tmp_path, device=torch.device("cpu"))
    losses = {}
    for optimizer in ("adamw", "muon"):
        (cell,) = mqrar.cells(
            mqrar.Config(attention=("rope",), batch=2, steps=3, optimizer=optimizer, init_std=0.5, **sizes)
        )
        with Progress() as progress:
            outcome = cell.run(context, progress)
        assert {row.optimizer for row in outcome.rows if isinstance(row, mqrar.Row)} == {optimizer}
        losses[cell_id(cell)] = [loss for _, loss in outcome.curves["loss"]]
    # the first loss is before any update
    adamw, muon = (np.asarray(found) for found in losses.values())
    assert adamw[0] == muon[0] and (adamw[1:] != muon[1:]).all()


def test_grid_of_cells() -> None:
    config = mqrar.Config(
        attention=("rope", "rope:theta=10000", "stick_breaking:remainder=none"), seeds=(0, 1), kv_pairs=(4, 8)
    )
    cells = mqrar.cells(config)
    names = [spec for spec in ("rope", "stick_breaking:remainder=none,logit_scale=1.5") for _ in (4, 8)]
    assert [cell.attention for cell in cells] == names * 2
    assert len(cells) == len(set(cells)) == 8


def test_a_stored_set_is_seen_once_an_epoch_in_another_order() -> None:
    (cell,) = mqrar.cells(mqrar.Config(attention=("rope",), batch=4, stored_rows=10))
    batches = batches_of(cell)
    seen = torch.cat([batches.rows(step) for step in range(5)])
    first, second = seen[:10].tolist(), seen[10:].tolist()
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert torch.equal(batches[2].tokens, generate(cell.task, batches.seed, batches.rows(2)).tokens)


def test_how_training_stands() -> None:
    config = mqrar.Config(stop_accuracy=0.9, patience=300)

    def ends(*scores: float) -> str:
        return mqrar.status(config, [(100 * (i + 1), score) for i, score in enumerate(scores)])

    assert ends() == ends(0.0, 0.004) == ends(0.1, 0.1, 0.102) == "budget"
    assert ends(0.1, 0.95) == ends(0.9, 0.0, 0.0, 0.0, 0.9) == "solved"
    assert ends(0.1, 0.1, 0.1, 0.104) == ends(0.0, 0.0, 0.0) == "plateau"
    # progress in small steps counts once it adds up
    assert ends(0.1, 0.104, 0.107, 0.11) == "budget"
    assert mqrar.status(dataclasses.replace(config, patience=0), [(10**6, 0.1)]) == "budget"


def found(rate: float, validation: float, steps: int, test: float, seed: int = 0) -> list[dict[str, object]]:
    same = {
        "attention": "rope",
        "options": "",
        "seed": seed,
        "kv_pairs": 8,
        "width": 64,
        "n_back": 1,
        "lr": rate,
        "vocab_size": 128,
        "split": "all",
    }
    values = {"validation_accuracy": validation, "steps": steps, "accuracy": test}
    return [same | {"metric": metric, "value": value} for metric, value in values.items()]


def test_further_seeds_run_at_the_rate_that_validation_chooses() -> None:
    config = mqrar.Config(attention=("rope", "nope"), lrs=(1e-3, 2e-3, 3e-3), seeds=(0, 1, 2))
    first = mqrar.cells(config)
    assert {(cell.config.lrs[0], cell.config.seeds[0]) for cell in first} == {(rate, 0) for rate in config.lrs}
    assert len(mqrar.more(config, None)) == 4
    # the middle one validates best and tests worst; nope diverged everywhere and has no accuracy
    results = pd.DataFrame(found(1e-3, 0.5, 100, 0.9) + found(2e-3, 0.7, 100, 0.1) + found(3e-3, 0.7, 200, 0.9))
    then = [(cell.attention, cell.config.lrs, cell.config.seeds) for cell in mqrar.more(config, results)]
    assert then == [("rope", (2e-3,), (1,)), ("rope", (2e-3,), (2,))]
    one_rate = dataclasses.replace(config, lrs=(1e-3,))
    assert len(mqrar.cells(one_rate)) == 6 and mqrar.more(one_rate, results) == []


def test_a_cell_that_diverges_has_a_row_that_says_so(tmp_path: Path) -> None:
    config = mqrar.Config(
        attention=("rope",),
        kv_pairs=(2,),
        widths=(16,),
        vocab_size=32,
        seq_len=16,
        batch=2,
        steps=20,
        lrs=(1e30,),
        test_rows=12,
    )
    (cell,) = mqrar.cells(config)
    context = RunContext(results_dir=tmp_path, device=torch.device("cpu"))
    assert not scheduler.run([cell], context, preset="quick", console=Console(quiet=True))
    rows = table.read(tmp_path / "mqrar.csv")
    assert rows[["metric", "value", "status"]].to_numpy().tolist() == [["solved", 0.0, "diverged"]]
    assert "the loss is nan" in (tmp_path / "runs" / f"{cell_id(cell)}.json").read_text()
    assert mqrar.FAMILY.summary(rows).row_count == 1 and mqrar.FAMILY.summary(rows).caption == LEGEND
    # such a cell is tried again
    assert scheduler.unfinished([cell], tmp_path) == [cell]


def test_the_table_says_what_would_decide_a_cell_that_is_not_solved() -> None:
    rows = table.read(RESULTS)
    cell = rows[(rows["metric"] == "solved") & (rows["status"] == "solved")]["cell"].iloc[0]
    assert mqrar.FAMILY.summary(rows[rows["cell"] == cell]).caption == LEGEND
    for ended in ("budget", "plateau"):
        other = rows[(rows["metric"] == "solved") & (rows["status"] == ended)]["cell"].iloc[0]
        assert "--steps" in str(mqrar.FAMILY.summary(rows[rows["cell"].isin([cell, other])]).caption)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("filler", recall.FILLERS)
def test_the_same_examples_on_a_gpu(filler: str) -> None:
    task = Recall(kv_pairs=96, filler=filler, distinct=("queries",))
    here, there = (generate(task, 3, torch.arange(64, device=name)) for name in ("cpu", "cuda"))
    for name in ("tokens", "targets", "stale", "distance"):
        assert torch.equal(getattr(here, name), getattr(there, name).cpu())
