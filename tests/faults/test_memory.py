"""Test out-of-memory handling: smaller batches with the same numbers, or a failed cell, after which others run.

Without a GPU the model says that it has run out, as CUDA does, when it is given more than so many sequences.
"""

import contextlib
import dataclasses
import io
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from sbeval.cli import main
from sbeval.data.corpus import Split
from sbeval.data.dataloader import Batches
from sbeval.data.tokenizer import Bytes
from sbeval.evaluation import perplexity
from sbeval.evaluation.response_cache import Answers
from sbeval.evaluation.ruler_prompts import Prompt
from sbeval.evaluation.ruler_scores import Answered, evaluate
from sbeval.models.config import ModelConfig
from sbeval.models.decoder import Decoder
from sbeval.runtime.progress import Progress
from sbeval.tables import table
from sbeval.tasks import drawn
from sbeval.training.config import TrainConfig
from sbeval.training.held_out import Rows
from sbeval.training.stepper import Stepper
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


SPLIT = Split(
    corpus="any",
    role="train",
    tokens=(np.arange(4001) * 7 % 61).astype(np.uint16),
    offsets=np.array([0, 4001]),
    documents=("one",),
)


def run(
    model: ModelConfig = MODEL, place: torch.device = CPU, held_out: Any = None, **changes: Any
) -> tuple[Trained, str]:
    options: dict[str, Any] = {"steps": 6, "batch": 8, "length": 16, "lr": 0.01} | changes
    config = TrainConfig(**options)
    batches = Batches(SPLIT, config.length, config.batch, 0, "stream")
    trainer = Trainer(model, config, batches, None, place, held_out=held_out)
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
    assert f"continuing with {fewer.rows}," in lines[-1] and f"--micro-batch-tokens {fewer.rows * 16}" in lines[-1]
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
        how = perplexity.Execution(place=CPU, dtype="float32", batch=8)
        losses = perplexity.measure(model, windows, np.ones_like, how)
        return losses.losses, perplexity.rolling(model, documents, [""] * 4, how, window=10, prefix=[0]).losses

    whole = measured()
    assert capsys.readouterr().out == ""
    fits(monkeypatch, 3)
    fewer = measured()
    assert (
        "out of memory at 8 at a time: continuing with 4\nout of memory at 4 at a time: continuing with 2\n"
        in capsys.readouterr().out
    )
    for a, b in zip(fewer, whole, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    fits(monkeypatch, 0)
    with pytest.raises(torch.OutOfMemoryError, match="nothing smaller"):
        measured()


def limited_to(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Make a model run out of memory above a number of rows, whether it reads or continues them."""
    fits(monkeypatch, rows)
    begin = Decoder.begin

    def limited(self: Decoder, prompts: Sequence[Sequence[int]], room: int) -> Any:
        if len(prompts) > rows:
            raise torch.OutOfMemoryError
        return begin(self, prompts, room)

    monkeypatch.setattr(Decoder, "begin", limited)


class Bar:
    """A display that keeps its lines."""

    said: ClassVar[list[str]] = []

    def __init__(self, total: int, completed: int) -> None: ...

    def advance(self, steps: int, /) -> None: ...

    def close(self) -> None: ...

    def say(self, line: str, /) -> None:
        self.said.append(line)


def test_needle_goes_on_with_fewer_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Decoder(dataclasses.replace(MODEL, vocab_size=257)).eval()
    texts = [np.frombuffer(f"what is {number}".encode(), np.uint8).astype(np.uint16) for number in range(9)]
    prompts = [Prompt(tokens=text, answer=text[-1:], references=("1",), depth=None) for text in texts]

    def asked(answers: Answers) -> tuple[list[Answered], list[str]]:
        how: dict[str, Any] = {"rule": "all", "new_tokens": 4, "device": CPU, "dtype": "float32", "batch": 8}
        Bar.said.clear()
        return evaluate(model, prompts, Bytes(), answers, begin=Bar, **how), list(Bar.said)

    had = Answers()
    whole, said = asked(had)
    assert said == [] and len(whole) == 9
    limited_to(monkeypatch, 3)
    fewer, said = asked(Answers())
    assert said == [
        "out of memory at 8 at a time: continuing with 4",
        "out of memory at 4 at a time: continuing with 2",
    ]
    for a, b in zip(fewer, whole, strict=True):
        assert (a.completion, a.greedy) == (b.completion, b.greedy)
        assert a.log_probability == pytest.approx(b.log_probability, rel=1e-5)
    # answers that were had are kept
    limited_to(monkeypatch, 0)
    with pytest.raises(torch.OutOfMemoryError, match="nothing smaller"):
        asked(Answers())
    assert asked(had)[0] == whole


def test_few_shot_goes_on_with_fewer_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    instance = pytest.importorskip("lm_eval.api.instance").Instance
    from sbeval.evaluation.lm_eval_model import Adapter, PlainText

    torch.manual_seed(0)
    model = Decoder(dataclasses.replace(MODEL, vocab_size=257)).eval()
    pairs = [instance("loglikelihood", {}, (f"{number} is", " x" * (1 + number % 3)), number) for number in range(20)]
    stops = {"until": ["z"], "max_gen_toks": 4}
    open_ends = [instance("generate_until", {}, (f"{number} is", stops), number) for number in range(20)]

    def asked() -> tuple[Any, Any, int]:
        text = PlainText(Bytes())
        adapter = Adapter(model, text, length=32, place=CPU, dtype="float32", batch_tokens=256, begin=Bar)
        return adapter.loglikelihood(pairs), adapter.generate_until(open_ends), adapter.batch_tokens

    Bar.said.clear()
    scores, texts, tokens = asked()
    assert Bar.said == [] and tokens == 256
    limited_to(monkeypatch, 5)
    fewer, same, tokens = asked()
    # each is halved once or twice, not at every batch
    assert tokens == 4 * 16 and len(Bar.said) == 4
    assert same == texts and [greedy for _, greedy in fewer] == [greedy for _, greedy in scores]
    assert [score for score, _ in fewer] == pytest.approx([score for score, _ in scores], rel=1e-5)
    limited_to(monkeypatch, 0)
    with pytest.raises(torch.OutOfMemoryError, match="nothing smaller"):
        asked()


def test_validation_goes_on_with_fewer_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory can end there first: on a GPU validation has shapes of its own."""
    held_out = Batches(SPLIT, 16, 8, 1, "stream")[0]
    options: dict[str, Any] = {"held_out": held_out, "look_every": 3}
    whole, _ = run(**options)
    measure, calls = Stepper._mean_loss, 0

    def limited(self: Stepper, batch: Any) -> float:
        nonlocal calls
        calls += 1
        if self.rows > 2:
            raise torch.OutOfMemoryError
        return measure(self, batch)

    monkeypatch.setattr(Stepper, "_mean_loss", limited)
    fewer, said = run(**options)
    assert fewer.rows == 2 and said.count("out of memory") == 2 and calls == 4
    assert_close(fewer, whole)
    assert [step for step, _ in fewer.state.held_out] == [3, 6]
    for (_, a), (_, b) in zip(fewer.state.held_out, whole.state.held_out, strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_validation_on_generated_examples_goes_on_with_fewer_rows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = Decoder(MODEL)
    tokens = torch.randint(64, (300, 8))
    examples = Rows(tokens, torch.where(tokens % 2 == 0, tokens, -100), None)
    whole = drawn.predict(model, examples, "float32")
    assert whole.shape == (300, 8)
    fits(monkeypatch, 100)
    assert torch.equal(drawn.predict(model, examples, "float32"), whole) and model.training
    assert capsys.readouterr().out.count("out of memory") == 2


def command(*arguments: object) -> tuple[object, str]:
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["sbeval", *map(str, arguments)])
        patch.setattr("sbeval.sweep.study.draw_figures", lambda *_, **__: [])
        patch.setattr("sbeval.runtime.device.measured_flops", lambda *_: 1e10)
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            main.main()
    return ended.value.code, said.getvalue()


RECALL = (
    *"mqrar --device cpu --vocab-size 32 --seq-len 16 --kv-pairs 2 --width 16 --batch 4 --steps 20".split(),
    *"--test-rows 12 --attention rope".split(),
)


def test_the_run_file_says_how_many_fitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Stepper._accumulate

    def limited(self: Stepper, *arguments: Any) -> Tensor:
        if self.rows > 2:
            raise torch.OutOfMemoryError
        return forward(self, *arguments)

    monkeypatch.setattr(Stepper, "_accumulate", limited)
    code, said = command(*RECALL, "--results-dir", tmp_path)
    assert code == 0 and "out of memory at 4 sequences of 16 tokens at a time: continuing with 2" in said
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
    assert code == 1 and "nothing smaller is left to try; recorded as failed, continuing with the next" in said
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
    accumulate = Stepper._accumulate

    def failing(self: Stepper, *arguments: Any) -> Tensor:
        if self.model.config.attention == "rope":
            return torch.tensor(math.nan)
        return accumulate(self, *arguments)

    monkeypatch.setattr(Stepper, "_accumulate", failing)
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
    assert lines[0] == "train rope seed 0: the loss is nan at step 2; continuing with the next"
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
