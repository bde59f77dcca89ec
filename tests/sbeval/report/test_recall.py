"""Claims on recall are decided by made-up tables as their rules say, and left open where rows do not suffice."""

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest

from sbeval.errors import InputError
from sbeval.report import recall
from sbeval.report.judge import AGREES, DISAGREES, UNDECIDED, Evidence
from sbeval.tables.published import SOLVED_STEPS, SOLVED_TOKENS
from sbeval.tasks import mqrar

Tables = Callable[..., pd.DataFrame]
STICK, ROPE = "stick_breaking", "rope"
NONE = Evidence({})
Solved = dict[tuple[str, int], list[float]]


def cells(
    frame: Tables, solved: Solved, *, rate: float = 1e-3, steps: int = SOLVED_STEPS, **common: Any
) -> pd.DataFrame:
    """Accuracies of the seeds of each method and number of pairs, as `sbeval mqrar` writes them."""
    specs = {name: mqrar.cells(mqrar.Config(attention=(name,)))[0].attention for name, _ in solved}
    rows: list[dict[str, Any]] = []
    for (name, pairs), accuracies in solved.items():
        for seed, accuracy in enumerate(accuracies):
            of = {"attention": name, "options": specs[name].partition(":")[2], "kv_pairs": pairs, "seed": seed}
            of |= {"lr": rate, "cell": f"{name} {pairs} {seed} {rate}"}
            # how training ended is in two of the rows
            rows.append(of | {"metric": "accuracy", "value": accuracy, "split": "all", "status": ""})
            rows.append(of | {"metric": "steps", "value": steps})
            rows.append(of | {"metric": "solved", "value": float(accuracy >= 0.99)})
    sizes = {"vocab_size": 8192, "seq_len": 768, "width": 256, "layers": 2, "heads": 1, "status": "budget"}
    return frame(rows, **sizes | {"train_tokens": SOLVED_TOKENS} | common)


AS_CLAIMED: Solved = {(STICK, 192): [1.0, 1.0], (ROPE, 128): [1.0, 1.0], (ROPE, 192): [0.5, 0.5]}


@pytest.mark.parametrize(
    ("solved", "more", "verdict"),
    [
        (AS_CLAIMED, {}, AGREES),
        (AS_CLAIMED | {(STICK, 192): [0.9, 0.9]}, {}, DISAGREES),
        (AS_CLAIMED | {(ROPE, 192): [1.0, 1.0]}, {"train_tokens": 1, "steps": 9}, DISAGREES),
        # one seed of two says neither
        (AS_CLAIMED | {(ROPE, 192): [1.0, 0.5]}, {}, UNDECIDED),
        # what fails earlier than the paper's runs may be learned yet: in tokens, in steps, on a plateau
        (AS_CLAIMED, {"train_tokens": SOLVED_TOKENS - 1}, UNDECIDED),
        (AS_CLAIMED, {"steps": SOLVED_STEPS - 1}, UNDECIDED),
        (AS_CLAIMED, {"status": "plateau"}, UNDECIDED),
        ({(STICK, 192): [1.0], (ROPE, 192): [0.5]}, {}, UNDECIDED),
    ],
)
def test_recall(solved: Solved, more: dict[str, Any], verdict: str, frame: Tables) -> None:
    assert recall.recall(cells(frame, solved, **more), NONE).verdict == verdict


def test_a_seed_that_failed_solves_nothing(frame: Tables) -> None:
    table = cells(frame, AS_CLAIMED)
    second = (table["attention"] == STICK) & (table["seed"] == 1)
    failed = table[second & (table["metric"] == "solved")].assign(value=0.0, status="diverged")
    judged = recall.recall(pd.concat([table[~second], failed]), NONE)
    assert judged.verdict == UNDECIDED
    assert "Stick-breaking solves none; at 192 pairs, the only number tried, its accuracy is 1.000" in judged.found
    assert ", and 1 of 2 seeds solve them. " in judged.found
    runs = "192 pairs solved by 1 of 2 seeds at learning rate 0.001, 1 failed, after 25,000 steps."
    assert judged.basis.startswith(f"Stick-breaking: {runs}")
    judged = recall.recall(pd.concat([table[table["attention"] != STICK], failed]), NONE)
    assert judged.verdict == UNDECIDED
    assert "Stick-breaking solves none; at 192 pairs, the only number tried, every run failed. " in judged.found
    assert "192 pairs not solved by the only seed at learning rate 0.001, 1 failed. " in judged.basis


def test_a_failure_is_one_of_all_rates(frame: Tables) -> None:
    low = cells(frame, AS_CLAIMED)
    # solved in 1000 steps at another rate, where the first takes all of its steps
    fast = cells(frame, AS_CLAIMED | {(ROPE, 192): [0.999, 0.995]}, rate=3e-3, steps=1000)
    judged = recall.recall(pd.concat([low, fast]), NONE)
    assert judged.verdict == DISAGREES
    assert "RoPE solves 192 pairs, the most tried, with accuracy 0.9" in judged.found
    assert (
        "RoPE: 192 pairs solved by 2 of 2 seeds at learning rate 0.003 (of 2 tried), after 1,000 steps" in judged.basis
    )
    # not solved at another rate either, but that was stopped early
    early = cells(frame, {(ROPE, 192): [0.4, 0.4], (STICK, 192): [0.4, 0.4]}, rate=3e-3, status="plateau")
    judged = recall.recall(pd.concat([low, early]), NONE)
    assert judged.verdict == UNDECIDED and judged.reason.endswith("RoPE with 192 pairs")
    # of rates that solve nothing, the accuracy is that of the best
    low = cells(frame, {(ROPE, 192): [0.2], (STICK, 192): [0.4]})
    high = cells(frame, {(ROPE, 192): [0.6], (STICK, 192): [0.4]}, rate=3e-3)
    assert "RoPE solves none; at 192 pairs, the only number tried, its accuracy is 0.600" in (
        recall.recall(pd.concat([low, high]), NONE).found
    )


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([25000, 25000, 25000], "25,000"),
        ([25000, 30000, 25000], "25,000 and 30,000"),
        ([30000, 25000, 27000], "25,000 to 30,000"),
        ([30000, 26000, 25000, 27000], "25,000 to 30,000"),
    ],
)
def test_steps_of_seeds_are_said_in_short(frame: Tables, steps: list[int], words: str) -> None:
    table = cells(frame, AS_CLAIMED | {(STICK, 192): [1.0] * len(steps)})
    mine = (table["attention"] == STICK) & (table["metric"] == "steps")
    table.loc[mine, "value"] = table.loc[mine, "seed"].map(dict(enumerate(steps)))
    seeds = f"solved by {len(steps)} of {len(steps)} seeds at learning rate 0.001"
    basis = recall.recall(table, NONE).basis
    assert basis.startswith(f"Stick-breaking: 192 pairs {seeds}, after {words} steps. ")


def test_what_recall_lacks_is_said(frame: Tables) -> None:
    some: Solved = {(STICK, 192): [1.0], (ROPE, 192): [0.5]}
    judged = recall.recall(cells(frame, some), NONE)
    assert judged.reason == (
        "not measured, or ended before the paper's 25,000 steps and 4.9 G tokens: RoPE with 128 pairs"
    )
    judged = recall.recall(cells(frame, some, vocab_size=1024), NONE)
    assert judged.verdict == UNDECIDED and "the paper's vocabulary of 8192 in 768 tokens" in judged.reason
    assert judged.found == (
        "Stick-breaking solves 192 pairs, the only number tried, with accuracy 1.000 [0.963, 1.000]. RoPE solves none; "
        "at 192 pairs, the only number tried, its accuracy is 0.500 [0.404, 0.596]."
    )
    assert judged.basis == (
        "Stick-breaking: 192 pairs solved by the only seed at learning rate 0.001, after 25,000 steps. RoPE: 192 pairs "
        "not solved by the only seed at learning rate 0.001, after 25,000 steps. Vocabulary of 1024, 768 tokens."
    )


def test_the_most_pairs_that_are_solved_and_that_were_tried_are_told(frame: Tables) -> None:
    rows = cells(frame, {(STICK, 192): [1.0], (ROPE, 64): [1.0], (ROPE, 128): [1.0], (ROPE, 192): [0.5]})
    judged = recall.recall(rows, NONE)
    assert "RoPE solves 128 pairs, with accuracy 1.000 [" in judged.found and "64" not in judged.found
    assert "; at 192 pairs, the most tried, its accuracy is 0.500 [" in judged.found
    assert "RoPE: 128 pairs solved by the only seed" in judged.basis and "; 192 pairs not solved by " in judged.basis


def maps(
    frame: Tables, stick: float, rope: float, *, accuracy: float = 1.0, seeds: int = 3, stderr: float = 0.01
) -> pd.DataFrame:
    """Weights of two heads on stale values: the first looks elsewhere, the second at the latest value."""
    rows = []
    for seed in range(seeds):
        for name, options, stale, right in (
            (STICK, "logit_scale=1.5", stick, accuracy),
            (ROPE, "", rope, min(accuracy, 1.0)),
        ):
            of: dict[str, Any] = {"attention": name, "options": options, "seed": seed, "cell": f"{name}-{seed}"}
            rows.append(of | {"metric": "accuracy", "split": "stale", "value": right})
            for head, shares in enumerate(((0.1, 0.9), (0.6, stale + 0.001 * seed)), 1):
                for target, value in zip(("latest", "stale"), shares, strict=True):
                    where = {"metric": "share", "layer": 1, "head": head, "target": target, "split": "stale"}
                    rows.append(of | where | {"value": value, "stderr": stderr})
    return frame(rows, vocab_size=65, seq_len=64, kv_pairs=16, model="2x100")


@pytest.mark.parametrize(
    ("stick", "rope", "stderr", "verdict"),
    [(0.1, 0.3, 0.01, AGREES), (0.3, 0.1, 0.01, DISAGREES), (0.1, 0.3, 0.2, UNDECIDED), (0.1, 0.105, 0.0, UNDECIDED)],
)
def test_distraction(stick: float, rope: float, stderr: float, verdict: str, frame: Tables) -> None:
    judged = recall.distraction(maps(frame, stick, rope, stderr=stderr), NONE)
    assert judged.verdict == verdict
    sign = "−" if stick < rope else "+"
    assert f"stick-breaking {stick + 0.001:.3f}, RoPE {rope + 0.001:.3f}; difference {sign}" in judged.found
    assert judged.basis.startswith("Difference: 95 % over 3 seeds each, 100 sequences; one-sided p ")
    assert "; accuracies: stick-breaking 1.000, RoPE 1.000; 16 key-value pairs; models of 2x100 " in judged.basis


def test_models_that_have_not_learned_it_say_nothing_of_distraction(frame: Tables) -> None:
    with pytest.raises(InputError, match="no model answers 0.95 of the queries with stale values"):
        recall.distraction(maps(frame, 0.1, 0.3, accuracy=0.9), NONE)


def test_distraction_needs_three_seeds_and_equal_accuracy(frame: Tables) -> None:
    few = recall.distraction(maps(frame, 0.1, 0.3, seeds=2), NONE)
    assert few.verdict == UNDECIDED and few.reason == "2 seeds of a method, fewer than 3"
    table = maps(frame, 0.1, 0.3)
    right = (table["metric"] == "accuracy") & (table["attention"] == ROPE)
    unequal = recall.distraction(table.assign(value=table["value"].mask(right, 0.98)), NONE)
    assert unequal.verdict == UNDECIDED and "accuracies differ by 0.020, more than 0.01" in unequal.reason
