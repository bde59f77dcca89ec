"""Rows that figures and verdicts use: the rate that validation chooses, and tasks that all methods have."""

from typing import Any

import pandas as pd
import pytest

from sbeval.errors import InputError
from sbeval.tables import mqrar, selection

RECALL: dict[str, Any] = {
    "task": "mqrar",
    "model": "2x64",
    "attention": "rope",
    "options": "",
    "train_len": 64,
    "eval_len": 64,
    "seed": 0,
    "preset": "quick",
    "dtype": "float32",
    "kv_pairs": 8,
    "vocab_size": 128,
    "seq_len": 64,
    "width": 64,
    "layers": 2,
    "heads": 1,
    "split": "all",
}


def rate(lr: float, validation: float | None, test: float, steps: int = 100, **changes: Any) -> list[dict[str, Any]]:
    values = {"validation_accuracy": validation, "accuracy": test, "steps": steps}
    same = RECALL | {"lr": lr} | changes
    return [same | {"metric": name, "value": value} for name, value in values.items() if value is not None]


def test_the_rate_with_the_best_validation_accuracy_is_kept_for_each_setting() -> None:
    rows = [*rate(1e-3, 0.9, 0.1), *rate(1e-2, 0.5, 0.8)]
    rows += [*rate(1e-3, 0.2, 0.2, kv_pairs=16), *rate(1e-2, 0.6, 0.7, kv_pairs=16)]
    kept = selection.recall_accuracy(pd.DataFrame(rows))
    assert kept[["kv_pairs", "lr", "value"]].to_numpy().tolist() == [[8, 1e-3, 0.1], [16, 1e-2, 0.7]]
    assert set(kept["metric"]) == {"accuracy"} and set(kept["optimizer"]) == {"adamw"}


def test_rates_are_ranked_by_shared_seeds_then_steps_then_size() -> None:
    # the second seed, at the best rate alone, does not count
    rows = [*rate(1e-3, 0.9, 0), *rate(1e-3, 0.1, 0, seed=1), *rate(1e-2, 0.8, 0)]
    assert selection.ranked_rates(pd.DataFrame(rows)) == [1e-3, 1e-2]
    rows = [*rate(3e-3, 0.9, 0, 100), *rate(1e-3, 0.9, 0, 200), *rate(2e-3, 0.9, 0, 100)]
    assert selection.ranked_rates(pd.DataFrame(rows)) == [2e-3, 3e-3, 1e-3]
    assert selection.ranked_rates(pd.DataFrame(rate(1e-3, None, 0.5))) is None


def test_a_seed_that_failed_counts_against_its_rate() -> None:
    rows = [*rate(1e-3, 1.0, 1, 900, solved=1), *rate(1e-3, 1.0, 1, 900, seed=1), *rate(1e-2, 1.0, 1, 100)]
    ends = [RECALL | {"metric": "solved", "lr": lr, "seed": seed} for lr in (1e-3, 1e-2) for seed in (0, 1)]
    rows += [end | {"value": float(at < 3)} for at, end in enumerate(ends)]
    assert selection.ranked_rates(pd.DataFrame(rows)) == [1e-3, 1e-2]
    # a rate at which all failed has no rank
    every = [row for row in rows if row["lr"] == 1e-3 or row["metric"] == "solved"]
    assert selection.ranked_rates(pd.DataFrame(every)) == [1e-3]


def test_cells_say_how_their_training_ended() -> None:
    """As `sbeval mqrar` writes them: how it ended is in the rows of `solved` and `steps` alone."""
    rows = [row | {"cell": "a", "status": ""} for row in rate(1e-3, 0.5, 0.5, 900)]
    rows += [RECALL | {"metric": "solved", "value": 0.0, "lr": 1e-3, "cell": "a", "status": "plateau", "split": ""}]
    rows += [RECALL | {"metric": "solved", "value": 0.0, "lr": 1e-3, "cell": "b", "status": "diverged", "split": ""}]
    cells = selection.recall_cells(pd.DataFrame(rows))
    assert cells[["cell", "status", "solved"]].to_numpy().tolist() == [
        ["a", "plateau", False],
        ["b", "diverged", False],
    ]
    assert cells["value"].isna().tolist() == [False, True]
    # a table from before
    old = pd.DataFrame(rows[:3]).drop(columns="status")
    assert selection.recall_cells(old)[["status", "solved"]].to_numpy().tolist() == [["", False]]
    assert selection.recall_cells(old.assign(status=""))["status"].tolist() == [""]


def test_rates_are_ranked_by_steps_of_seeds_that_all_have() -> None:
    seeds = [(1e-3, 0, 900, True), (1e-3, 1, 1100, True), (1e-3, 2, 4500, False), (5e-4, 0, 1000, True)]
    cells = pd.DataFrame(seeds, columns=["lr", "seed", "steps", "solved"])
    # the failure of a further seed, which the other rate was not run with, does not make way for that rate
    assert selection.by_steps(cells) == [1e-3, 5e-4]
    # none of the seeds that all have is solved: those that are decide
    assert selection.by_steps(cells[1:].assign(solved=[True, False, False])) == [1e-3, 5e-4]


def test_the_test_score_does_not_choose() -> None:
    rows = pd.DataFrame([*rate(1e-3, None, 0.5), *rate(1e-2, None, 0.9)])
    with pytest.raises(InputError, match=r"rope with 8 key-value pairs has the learning rates 0\.001, 0\.01 and"):
        selection.recall_accuracy(rows)
    assert len(selection.recall_accuracy(rows[rows["lr"] == 1e-3])) == 1
    # a setting whose cells all failed has nothing to choose, and takes nothing from the others
    lost = [RECALL | {"kv_pairs": 16, "metric": "solved", "lr": lr, "value": 0.0} for lr in (1e-3, 1e-2)]
    assert selection.recall_accuracy(pd.DataFrame([*rate(1e-3, 0.9, 0.7), *lost]))["kv_pairs"].tolist() == [8]


def test_settings_have_the_columns_that_a_table_has() -> None:
    old = pd.DataFrame(rate(1e-3, 0.5, 0.5))
    assert selection.recall_setting(old) == selection.MQRAR
    new = selection.recall_setting(old.assign(optimizer="muon", patience=3000))
    assert new.others == (*selection.MQRAR.others, "optimizer", "patience")
    # every option of the task or the training that rows record tells settings apart
    assert set(selection.MQRAR_LATER) < {entry for entry in mqrar.Row.__dataclass_fields__}
    assert "n_back" not in selection.MQRAR_LATER and selection.MQRAR_LATER[0] == "optimizer"


def test_recall_from_before_an_option_is_of_the_same_setting() -> None:
    """A table to which rows with further columns were added has blanks in the older ones."""
    new = {"optimizer": "adamw", "norm": "rms", "biases": "false", "beta_2": 0.95, "clip": 1.0, "warmup": None}
    rows = pd.DataFrame([*rate(1e-3, 0.5, 0.6), *(row | new for row in rate(2e-3, 0.9, 0.8))])
    kept = selection.recall_accuracy(rows)
    assert kept["lr"].tolist() == [2e-3] and kept["norm"].tolist() == ["rms"]
    other = pd.DataFrame([*rate(1e-3, 0.5, 0.6), *(row | new | {"norm": "layer"} for row in rate(2e-3, 0.9, 0.8))])
    assert sorted(selection.recall_accuracy(other)["lr"]) == [1e-3, 2e-3]


def test_what_is_beside_rows_has_their_model_length_corpus_and_preset() -> None:
    names = ["model", "train_len", "corpus", "preset", "attention"]
    rows = [
        ("25m", 2048, "books", "h200", "rope"),
        ("25m", 2048, "python", "small", "rope"),
        ("s", 64, None, "quick", "rope"),
    ]
    table = pd.DataFrame(
        [*rows, ("25m", 2048, "python", "small", "alibi"), ("25m", 4096, "python", "small", "rope")], columns=names
    )
    assert list(selection.beside(table, table.iloc[[1]]).index) == [1, 3]
    # synthetic data has no corpus
    assert list(selection.beside(table, table.iloc[[0, 2]]).index) == [0, 2]
    assert selection.beside(table, table[:0]).empty


def test_a_blank_recipe_is_no_difference() -> None:
    rows = pd.DataFrame({"optimizer": ["", "adamw"], "lr": [None, 2e-3], "schedule": ["cosine", "wsd"]})
    assert selection.recipe_columns(rows) == ["schedule"]


def flips(lr: float, **errors: float) -> list[dict[str, Any]]:
    same = RECALL | {"p_train": 0.8, "lr": lr, "metric": "error_rate", "distance_start": None}
    return [same | {"test": test, "value": value} for test, value in errors.items()]


def test_flip_flop_is_at_the_rate_with_the_lowest_validation_error() -> None:
    rows = [*flips(1e-3, validation=0.2, sparse=0.1), *flips(1e-2, validation=0.1, sparse=0.4, dense=0.0)]
    rows.append(rows[-1] | {"distance_start": 4})
    best = selection.flip_flop_errors(pd.DataFrame(rows))
    assert best[["test", "value"]].to_numpy().tolist() == [["sparse", 0.4], ["dense", 0.0]]
    # a further seed, at the best rate alone, may be a worse one
    more = [row | {"seed": 1} for row in flips(1e-2, validation=0.5, sparse=0.6)]
    assert set(selection.flip_flop_errors(pd.DataFrame([*rows, *more]))["lr"]) == {1e-2}
    # the test does not choose, but a single rate is no choice
    both = pd.DataFrame([*flips(1e-3, sparse=0.1), *flips(1e-2, sparse=0.4)])
    with pytest.raises(InputError, match=r"rope has the learning rates 0.001, 0.01 and no error rate"):
        selection.flip_flop_errors(both)
    assert selection.flip_flop_errors(both[both["lr"] == 1e-2])["value"].tolist() == [0.4]
    with pytest.raises(InputError, match="no rows with metric 'error_rate' of a test"):
        selection.flip_flop_errors(pd.DataFrame(flips(1e-3, validation=0.2)))


def needles(task: str, value: float, **changes: Any) -> dict[str, Any]:
    same = {name: "" for name in selection.NEEDLE_SAME}
    numbers = {
        "train_len": 512,
        "length": 1024,
        "finetune_tokens": 0,
        "train_tokens": 9,
        "seed": 0,
        "depth_start": None,
    }
    row = {"attention": "rope", "metric": "score", "cell": "a", "n": 10, "stderr": 0.1, "task": task, "value": value}
    return same | numbers | row | {"depth_start": None} | changes


def test_a_run_with_more_samples_replaces_one_with_fewer() -> None:
    rows = [needles("vt", 0.1), needles("vt", 0.9, cell="b", n=500), needles("cwe", 0.2)]
    kept = selection.needle_scores(pd.DataFrame([*rows, needles("vt", 0.0, depth_start=10)]))
    assert sorted(kept["value"]) == [0.2, 0.9]
    with pytest.raises(InputError, match="no rows with metric 'score' or 'greedy'"):
        selection.needle_scores(pd.DataFrame([needles("vt", 0.0, depth_start=10)]))


@pytest.mark.parametrize(("tokens", "solved"), [(9, False), (0, True)])
def test_a_task_too_long_for_the_training_length_is_not_solved_by_being_left_out(tokens: int, solved: bool) -> None:
    """As qa_2, which is not fine-tuned on, and does not fit 2048 tokens."""
    same: dict[str, Any] = {"train_len": 1024, "finetune_tokens": tokens}
    taught = needles("vt", 0.4, length=2048, ended="solved" if tokens else "", **same)
    found = selection.needle_scores(pd.DataFrame([taught, needles("qa_2", 0.1, length=2048, ended="", **same)]))
    assert found.set_index("task")["solved"].to_dict() == {"vt": True, "qa_2": solved}


def test_means_compare_like_with_like() -> None:
    rows = pd.DataFrame(
        [needles("vt", 0.2), needles("cwe", 0.6), needles("vt", 0.5, attention="alibi")]
        + [needles("vt", 0.4, length=2048)]
    )
    assert set(selection.shared_tasks(rows)["task"]) == {"vt"}
    apart = pd.DataFrame([needles("vt", 0.2), needles("cwe", 0.6, attention="alibi")])
    assert selection.shared_tasks(apart).equals(apart)
    means = selection.mean_over_tasks(rows[rows["attention"] == "rope"])
    # at 2048 a task is missing
    assert means[["length", "value"]].to_numpy().tolist() == [[1024, 0.4]]
    assert means["stderr"].iloc[0] == pytest.approx((2 * 0.1**2) ** 0.5 / 2)


def test_perplexity_by_context_leaves_windows_of_documents_out() -> None:
    same = {"metric": "perplexity", "value": 9.0}
    table = pd.DataFrame([same | {"context_length": 64}, same | {"context_length": None, "window": 64}])
    assert selection.by_context(table)["x"].tolist() == [64]
    with pytest.raises(InputError, match="a context length to draw"):
        selection.by_context(table[1:])


def test_dense_kernels_are_whole_sequences_with_every_key() -> None:
    whole = {"heads": 8, "kv_heads": 8, "queries": 64, "keys": 64, "sequences": 1, "epsilon": None, "metric": "time"}
    changes: list[dict[str, Any]] = [
        {},
        {"backend": "cudnn"},
        {"kv_heads": 2},
        {"queries": 1},
        {"sequences": 4},
        {"epsilon": 1e-7},
        {"metric": "relative_error"},
    ]
    common = whole | {"backend": "triton", "device": "a card", "head_dim": 64}
    table = pd.DataFrame([common | change for change in changes])
    assert selection.dense_kernels(table, "time")["options"].tolist() == ["", "cudnn"]


def test_the_default_kernel_needs_no_name() -> None:
    """Where the Hopper kernels were timed they are the default: not on another card, nor at other head sizes."""
    whole = {"heads": 8, "kv_heads": 8, "queries": 64, "keys": 64, "sequences": 1, "epsilon": None, "metric": "time"}
    at = [("a card", 64), ("a card", 256), ("another", 64)]
    rows = [{"backend": "triton", "device": device, "head_dim": dim} for device, dim in at]
    rows += [{"backend": "triton-hopper", "device": "a card", "head_dim": 64}]
    table = pd.DataFrame([whole | row for row in rows])
    assert selection.dense_kernels(table, "time")["options"].tolist() == ["triton", "", "", ""]
