"""Positions of the targets, against one pass from the left; the weight on them, against sums one by one."""

import pytest
import torch

from sbeval.data.recall import Recall
from sbeval.errors import InputError
from sbeval.models.attention_weights import attention_weights
from sbeval.models.config import ModelConfig
from sbeval.models.decoder import Decoder
from sbeval.tasks import attention_shares
from sbeval.tasks.recall_data import generate

TASK = Recall(vocab_size=33, seq_len=32, kv_pairs=8)


def by_hand(row: list[int], half: int) -> dict[int, list[int]]:
    """Positions of all values of the key asked for, by position of the query; the last is the latest."""
    values: dict[int, list[int]] = {}
    found = {}
    for i, token in enumerate(row):
        if token < half and values.get(token):
            found[i] = list(values[token])
        if i and row[i - 1] < half:
            values.setdefault(row[i - 1], []).append(i)
    return found


def test_targets_are_the_values_of_the_key_asked_for() -> None:
    examples = generate(TASK, 3, torch.arange(30))
    latest, stale = attention_shares.targets(examples, TASK)
    for row, is_latest, is_stale in zip(examples.tokens.tolist(), latest, stale, strict=True):
        wanted = by_hand(row, TASK.half)
        assert is_latest.nonzero().tolist() == [[i, places[-1]] for i, places in wanted.items()]
        assert is_stale.nonzero().tolist() == [[i, j] for i, places in wanted.items() for j in places[:-1]]
    assert stale.any()


def test_the_example_is_the_first_that_fits() -> None:
    examples = generate(TASK, 3, torch.arange(200))
    fits = [any(len(places) > 2 for places in by_hand(row, TASK.half).values()) for row in examples.tokens.tolist()]
    first = fits.index(True)
    assert attention_shares.chosen(examples, 0) == first
    assert attention_shares.chosen(examples, first + 1) == fits.index(True, first + 1)
    with pytest.raises(InputError, match="--example"):
        attention_shares.chosen(examples, 200)


@pytest.mark.parametrize("attention", ["rope", "stick_breaking:remainder=none"])
def test_shares_are_sums_of_weights(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # several parts
    monkeypatch.setattr(attention_shares, "CHUNK", 4 * 2 * 2 * 32 * 32)
    torch.manual_seed(0)
    model = Decoder(ModelConfig(vocab_size=33, width=24, layers=2, heads=2, hidden=24, attention=attention)).eval()
    examples = generate(TASK, 3, torch.arange(10))
    rows = {(r["layer"], r["head"], r["target"]): r for r in attention_shares.shares(model, examples, TASK)}
    assert len(rows) == 2 * 2 * len(attention_shares.TARGETS)
    weights = attention_weights(model, examples.tokens)
    for layer, head in ((1, 1), (1, 2), (2, 1), (2, 2)):
        found: dict[str, list[float]] = {target: [] for target in attention_shares.TARGETS}
        for row, tokens in enumerate(examples.tokens.tolist()):
            for query, places in by_hand(tokens, TASK.half).items():
                line = weights[layer - 1, row, head - 1, query]
                if len(places) > 1:
                    found["latest"].append(float(line[places[-1]]))
                    found["stale"].append(float(line[places[:-1]].sum()))
                    found["own"].append(float(line[query]))
                    found["other"].append(float(line.sum() - line[places].sum() - line[query]))
        for target, values in found.items():
            assert rows[layer, head, target]["value"] == pytest.approx(sum(values) / len(values), abs=1e-5)
    total = sum(rows[2, 1, target]["value"] for target in attention_shares.TARGETS)
    assert (total == pytest.approx(1)) == (attention == "rope")


def test_shares_go_on_with_fewer_examples_where_memory_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Decoder(ModelConfig(vocab_size=33, width=24, layers=2, heads=2, hidden=24)).eval()
    examples = generate(TASK, 3, torch.arange(10))
    said: list[str] = []
    whole = list(attention_shares.shares(model, examples, TASK, said.append))
    assert not said

    def limited(decoder: Decoder, tokens: torch.Tensor) -> torch.Tensor:
        if len(tokens) > 3:
            raise torch.OutOfMemoryError
        return attention_weights(decoder, tokens)

    monkeypatch.setattr(attention_shares, "attention_weights", limited)
    assert list(attention_shares.shares(model, examples, TASK, said.append)) == [
        row | {"value": pytest.approx(row["value"]), "stderr": pytest.approx(row["stderr"])} for row in whole
    ]
    assert said == [f"out of memory at {n} at a time: continuing with {n // 2}" for n in (10, 5)]


def test_the_rows_of_an_example_are_its_weights() -> None:
    torch.manual_seed(0)
    model = Decoder(ModelConfig(vocab_size=33, width=24, layers=1, heads=2, hidden=24)).eval()
    tokens = generate(TASK, 3, torch.arange(1)).tokens[0]
    rows = list(attention_shares.example_rows(model, tokens, TASK))
    assert [row["value"] for row in rows if row["metric"] == "token"] == tokens.tolist()
    dense = torch.zeros(1, 2, 32, 32)
    marks: dict[str, set[tuple[int, int]]] = {"latest": set(), "stale": set(), "": set()}
    for row in rows:
        if row["metric"] == "weight":
            dense[row["layer"] - 1, row["head"] - 1, row["query"], row["key"]] = row["value"]
            marks[row["target"]].add((row["query"], row["key"]))
    assert (dense - attention_weights(model, tokens[None])[:, 0]).abs().max() < attention_shares.LEAST
    wanted = by_hand(tokens.tolist(), TASK.half)
    assert marks["latest"] == {(i, places[-1]) for i, places in wanted.items()}
    assert marks["stale"] == {(i, j) for i, places in wanted.items() for j in places[:-1]}
