"""Where the targets are, against one pass from the left; how much weight falls on them, against sums one by one."""

import dataclasses
from pathlib import Path

import pandas as pd
import pytest
import torch
from rich.console import Console

from sbeval.data.recall import Recall
from sbeval.errors import InputError
from sbeval.models.attention_weights import attention_weights
from sbeval.models.config import ModelConfig
from sbeval.models.decoder import Decoder
from sbeval.runtime.progress import Progress
from sbeval.sweep import scheduler
from sbeval.sweep.context import RunContext
from sbeval.tables import table
from sbeval.tasks import attention_map, attention_shares
from sbeval.tasks.recall_data import generate
from sbeval.training import checkpoint

TASK = Recall(vocab_size=33, seq_len=32, kv_pairs=8)
TINY = attention_map.Config(
    attention=("rope", "stick_breaking"),
    vocab_size=33,
    seq_len=32,
    kv_pairs=8,
    width=16,
    heads=2,
    batch=4,
    steps=3,
    test_rows=40,
)


def test_a_language_model_is_refused(tmp_path: Path) -> None:
    model = Decoder(ModelConfig(vocab_size=33, width=16, layers=1, heads=2, hidden=16))
    checkpoint.save(
        tmp_path / "text", model, checkpoint.State(finished=True), training={"length": 32, "tokenizer": "d"}
    )
    with pytest.raises(InputError, match="a language model; give one of sbeval mqrar or attention-map"):
        attention_map.cells(dataclasses.replace(TINY, checkpoint=(str(tmp_path / "text"),)))


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


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    context = RunContext(results_dir=folder, device=torch.device("cpu"))
    assert scheduler.run(attention_map.cells(TINY), context, preset="quick", console=Console(quiet=True))
    return folder


def test_cells_leave_rows_and_a_summary(results: Path) -> None:
    rows = table.read(results / "attention_map.csv", table.columns(attention_map.Row))
    assert set(rows["attention"]) == {"rope", "stick_breaking"}
    assert set(rows["metric"]) == {"accuracy", "share", "token", "weight"}
    assert len(rows[rows["metric"] == "share"]) == 2 * 2 * 2 * 4
    console = Console(width=160)
    with console.capture() as shown:
        console.print(attention_map.summary(rows))
    share = rows[(rows["metric"] == "share") & (rows["target"] == "latest") & (rows["attention"] == "rope")]
    best = share.sort_values("value").iloc[-1]
    starred = [line for line in shown.get().splitlines() if "*" in line and "rope" in line]
    assert len(starred) == 1 and f"*{best['head']}" in starred[0] and f"{best['value']:.3f}" in starred[0]


def test_a_checkpoint_is_looked_into_as_the_trained_model_was(results: Path) -> None:
    rows = table.read(results / "attention_map.csv")
    folder = next(folder for folder in (results / "checkpoints").iterdir() if '"rope"' in _config(folder))
    config = attention_map.Config(checkpoint=(str(folder),), seq_len=32, kv_pairs=8, test_rows=40)
    (cell,) = attention_map.cells(config)
    outcome = cell.run(RunContext(results_dir=results, device=torch.device("cpu")), Progress(Console(quiet=True)))
    assert outcome.identity.attention == "rope" and outcome.identity.train_len == 32
    found = pd.DataFrame([{"metric": row.metric, "value": row.value} for row in outcome.rows])
    mine = rows[rows["attention"] == "rope"]
    for metric in ("share", "accuracy", "weight", "token"):
        ours, theirs = (sorted(part.loc[part["metric"] == metric, "value"]) for part in (found, mine))
        assert ours == pytest.approx(theirs, abs=1e-6)
    # other weights may come to the same path
    progress = Progress(Console(quiet=True))
    assert outcome.corpus_digest == cell.source(progress) != ""
    other = dataclasses.replace(cell, config=dataclasses.replace(config, checkpoint=(str(_other(folder)),)))
    assert other.source(progress) != cell.source(progress)


def _other(folder: Path) -> Path:
    return next(other for other in folder.parent.iterdir() if other != folder and other.name[0] != ".")


def _config(folder: Path) -> str:
    return (folder / "config.json").read_text()


def test_what_cannot_be_looked_into_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a checkpoint folder"):
        attention_map.cells(attention_map.Config(checkpoint=(str(tmp_path),)))
    with pytest.raises(InputError, match="--example"):
        attention_map.Config(example=-1)
    with pytest.raises(InputError, match="kv_pairs"):
        attention_map.Config(kv_pairs=17)
    with pytest.raises(InputError, match="did you mean 'rope'"):
        attention_map.cells(attention_map.Config(attention=("ropee",)))
    for config in attention_map.PRESETS.values():
        assert len(attention_map.cells(config)) == 2
