"""Attention maps: rows and summary of trained models and of checkpoints."""

import dataclasses
from pathlib import Path

import pandas as pd
import pytest
import torch
from rich.console import Console

from sbeval.errors import InputError
from sbeval.models.config import ModelConfig
from sbeval.models.decoder import Decoder
from sbeval.runtime.progress import Progress
from sbeval.sweep import scheduler
from sbeval.sweep.context import RunContext
from sbeval.tables import table
from sbeval.tasks import attention_map
from sbeval.training import checkpoint

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
