"""Test out-of-memory handling: smaller batches with the same numbers, or a failed cell, after which others run.

Without a GPU the model says that it has run out, as CUDA does, when it is given more than so many sequences.
"""

import contextlib
import io
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from sbeval.cli import main
from sbeval.data.corpus import Split
from sbeval.data.dataloader import Batches
from sbeval.evaluation import perplexity
from sbeval.models.config import ModelConfig
from sbeval.models.decoder import Decoder
from sbeval.runtime.progress import Progress
from sbeval.tables import table
from sbeval.training import trainer as train
from sbeval.training.config import TrainConfig
from sbeval.training.trainer import Trained, Trainer

CPU = torch.device("cpu")
MODEL = ModelConfig(vocab_size=64, width=16, layers=2, heads=2, hidden=24)
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU whose memory ends")


def fits(monkeypatch: pytest.MonkeyPatch, rows: int, calls: float = math.inf) -> None:
    """Make a model run out of memory above a number of rows, or at the given call only."""
    forward, count = Decoder.forward, 0

    def limited(self: Decoder, tokens: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        nonlocal count
        count += 1
        if (len(tokens) > rows and calls == math.inf) or count == calls:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
        return forward(self, tokens, cu_seqlens)

    monkeypatch.setattr(Decoder, "forward", limited)


def run(model: ModelConfig = MODEL, place: torch.device = CPU, **changes: Any) -> tuple[Trained, str]:
    tokens = (np.arange(4001) * 7 % 61).astype(np.uint16)
    split = Split(corpus="any", role="train", tokens=tokens, offsets=np.array([0, 4001]), documents=("one",))
    options: dict[str, Any] = {"steps": 6, "batch": 8, "length": 16, "lr": 0.01} | changes
    config = TrainConfig(**options)
    trainer = Trainer(model, config, Batches(split, config.length, config.batch, 0, "stream"), None, place)
    said = Console(file=io.StringIO(), width=200)
    with Progress(said) as progress:
        trained = trainer.run(progress.add("train", total=6))
    assert isinstance(said.file, io.StringIO)
    return trained, said.file.getvalue()


def assert_close(found: Trained, wanted: Trained) -> None:
    assert found.state.losses == pytest.approx(wanted.state.losses, rel=1e-5)
    for a, b in zip(found.model.parameters(), wanted.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("limit", [1, 3, 5])
def test_training_goes_on_with_fewer_sequences_at_a_time(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, said = run()
    assert whole.rows == 8 and "memory" not in said
    fits(monkeypatch, limit)
    fewer, said = run()
    assert fewer.rows == {1: 1, 3: 2, 5: 4}[limit]
    lines = [line for line in said.splitlines() if line.startswith("out of memory at ")]
    assert len(lines) == int(math.log2(8 // fewer.rows))
    assert f"going on with {fewer.rows}," in lines[-1] and f"--micro-batch-tokens {fewer.rows * 16}" in lines[-1]
    assert_close(fewer, whole)


def test_what_a_broken_step_had_added_up_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = run(micro_batch=4)
    # the second half of the second step
    fits(monkeypatch, 8, calls=4)
    broken, said = run(micro_batch=4)
    assert broken.rows == 2 and said.count("out of memory") == 1
    assert_close(broken, whole)


def test_a_run_that_fewer_would_change_says_what_may_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    fits(monkeypatch, 3)
    with pytest.raises(torch.OutOfMemoryError, match="at 8 sequences .* would drop others: give a batch of 4 or less"):
        run(ModelConfig(vocab_size=64, width=16, layers=2, heads=2, hidden=24, dropout=0.1))
    fits(monkeypatch, 0)
    with pytest.raises(torch.OutOfMemoryError, match="at 1 sequences of 16 tokens at a time: nothing smaller is left"):
        run()


def test_evaluation_goes_on_with_fewer_windows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = Decoder(MODEL).eval()
    windows = [(index, np.arange(index, index + 21) % 64) for index in range(9)]
    documents = [np.arange(size) % 64 for size in (50, 7, 81, 20)]

    def measured() -> tuple[Any, Any]:
        how: dict[str, Any] = {"place": CPU, "dtype": "float32", "batch": 8}
        losses = perplexity.measure(model, windows, np.ones_like, **how)
        return losses.losses, perplexity.rolling(model, documents, [""] * 4, window=10, prefix=[0], **how).losses

    whole = measured()
    assert capsys.readouterr().out == ""
    fits(monkeypatch, 3)
    fewer = measured()
    assert (
        "out of memory at 8 at a time: going on with 4\nout of memory at 4 at a time: going on with 2\n"
        in capsys.readouterr().out
    )
    for a, b in zip(fewer, whole, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    fits(monkeypatch, 0)
    with pytest.raises(torch.OutOfMemoryError, match="nothing smaller"):
        measured()


def command(*arguments: object) -> tuple[object, str]:
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["sbeval", *map(str, arguments)])
        patch.setattr("sbeval.report.figures.draw_figures", lambda *_: [])
        patch.setattr("sbeval.runtime.device.measured_flops", lambda *_: 1e10)
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            main.main()
    return ended.value.code, said.getvalue()


RECALL = (
    *"mqrar --device cpu --vocab-size 32 --seq-len 16 --kv-pairs 2 --width 16 --batch 4 --steps 20".split(),
    *"--test-rows 12 --attention rope".split(),
)


def test_the_run_file_says_how_many_fitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Trainer._accumulate

    def limited(self: Trainer, *arguments: Any) -> Tensor:
        if self.rows > 2:
            raise torch.OutOfMemoryError
        return forward(self, *arguments)

    monkeypatch.setattr(Trainer, "_accumulate", limited)
    code, said = command(*RECALL, "--results-dir", tmp_path)
    assert code == 0 and "out of memory at 4 sequences of 16 tokens at a time: going on with 2" in said
    (path,) = (tmp_path / "runs").iterdir()
    assert json.loads(path.read_text())["measured"]["sequences_at_a_time"] == 2


def test_a_cell_that_does_not_fit_is_recorded_and_the_sweep_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Decoder.forward

    def limited(self: Decoder, tokens: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        if self.config.width > 16:
            raise torch.OutOfMemoryError
        return forward(self, tokens, cu_seqlens)

    monkeypatch.setattr(Decoder, "forward", limited)
    code, said = command(*RECALL, "--width", "24", "--results-dir", tmp_path)
    assert code == 1 and "nothing smaller is left to try; recorded as failed, going on with the next" in said
    rows = table.read(tmp_path / "mqrar.csv")
    assert set(rows.loc[rows["metric"] == "accuracy", "width"]) == {16}
    assert set(rows.loc[rows["status"] == "failed", "width"]) == {24}


def test_a_model_that_cannot_be_trained_is_one_line_and_the_next_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    texts = tmp_path / "texts"
    texts.mkdir()
    for role in ("train", "test"):
        (texts / f"{role}.txt").write_text("some words, and others; " * 50)
    accumulate = Trainer._accumulate

    def failing(self: Trainer, *arguments: Any) -> Tensor:
        if self.model.config.attention == "rope":
            return torch.tensor(math.nan)
        return accumulate(self, *arguments)

    monkeypatch.setattr(train.Trainer, "_accumulate", failing)
    code, said = command(
        *"train --device cpu --train-len 16 --train-tokens 64 --batch-tokens 32 --attention rope".split(),
        *"--attention alibi".split(),
        "--corpus",
        texts,
        "--results-dir",
        tmp_path / "results",
    )
    lines = [line for line in said.splitlines() if " seed 0: " in line and " %" not in line]
    assert code == 1 and "Traceback" not in said
    assert lines[0] == "train rope seed 0: the loss is nan at step 2; going on with the next"
    assert lines[1].startswith(f"train alibi seed 0: {tmp_path}")


@pytest.fixture
def small_gpu() -> Iterator[torch.device]:
    """A GPU limited to two gigabytes for this process."""
    place = torch.device("cuda", 0)
    torch.cuda.set_per_process_memory_fraction((2 << 30) / torch.cuda.get_device_properties(place).total_memory)
    yield place
    torch.cuda.set_per_process_memory_fraction(1.0)


@CUDA
@pytest.mark.filterwarnings("default")  # compiling warns of what torch does inside itself
@pytest.mark.parametrize("replays", [False, True])
def test_a_gpu_whose_memory_ends_goes_on(replays: bool, small_gpu: torch.device) -> None:
    """With and without CUDA graphs; with rows that do not fit, against rows that do."""
    shape = ModelConfig(vocab_size=1024, width=256, layers=4, heads=4, hidden=512, attention="rope")
    options: dict[str, Any] = {"batch": 256, "length": 256, "dtype": "bfloat16", "sparse": replays, "steps": 4}
    if replays:
        options["capacity"] = 256 * 256
    wanted, said = run(shape, small_gpu, micro_batch=16, **options)
    assert "out of memory" not in said
    found, said = run(shape, small_gpu, **options)
    assert "out of memory at 256 sequences" in said and 1 <= found.rows < 256
    assert found.state.losses == pytest.approx(wanted.state.losses, rel=2e-3)
