"""Training: accumulation, what AdamW is told, and runs that are stopped and go on as if nothing had been."""

import contextlib
import dataclasses
import functools
import io
import json
import math
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from sbeval.data.dataloader import Batch, WeightedBatch
from sbeval.errors import InputError
from sbeval.models.config import ModelConfig, named
from sbeval.models.decoder import IGNORE, Decoder
from sbeval.runtime.progress import Progress
from sbeval.training import checkpoint
from sbeval.training.checkpoint import State
from sbeval.training.config import TrainConfig
from sbeval.training.optimizer import optimizer_for
from sbeval.training.schedule import learning_rate
from sbeval.training.stepper import Stepper
from sbeval.training.trainer import Batches, DivergedError, Trained, Trainer

VOCABULARY = 31
CPU = torch.device("cpu")
MODEL = ModelConfig(vocab_size=VOCABULARY, width=16, layers=2, heads=2, hidden=24, init_std=0.2)
# looks at the loss after 4, 8, ... steps, and asks whether to stop after 8 and 16
RUN: dict[str, Any] = {
    "steps": 18,
    "batch": 4,
    "length": 8,
    "lr": 0.01,
    "warmup": 3,
    "log_every": 4,
    "check_every": 8,
}


@dataclass(frozen=True)
class Data:
    """Batches of 4 rows of 8; some rows have many targets and one has none. No token is 0."""

    packed: bool = False

    def __getitem__(self, step: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        tokens, targets = torch.randint(1, VOCABULARY, (2, 4, 8), generator=generator)
        targets[0, :6] = targets[2] = targets[3, -1] = IGNORE
        bounds = torch.tensor([0, 3, 8, 16, 16, 20, 21, 24, 32], dtype=torch.int32)
        return Batch(tokens=tokens, targets=targets, cu_seqlens=bounds if self.packed else None)


@dataclass(frozen=True)
class Calls:
    """The same batches; `act` is called when the one of step `at` is asked for."""

    at: int
    act: Callable[[], object]

    def __getitem__(self, step: int) -> Batch:
        if step == self.at:
            self.act()
        return Data()[step]


class Untouched:
    """No batches: nothing is left to train."""

    def __getitem__(self, step: int) -> Batch:
        raise AssertionError(f"step {step} is trained again")


def trainer(
    folder: Path | None = None,
    batches: Batches | None = None,
    model: ModelConfig = MODEL,
    held_out: Batch | None = None,
    after: Path | None = None,
    trunk: bool = False,
    **changes: Any,
) -> Trainer:
    config = TrainConfig(**(RUN | changes))
    return Trainer(model, config, batches or Data(), folder, CPU, held_out=held_out, after=after, trunk=trunk)


def run(ready: Trainer, **options: Any) -> Trained:
    with Progress(Console(file=io.StringIO())) as progress:
        return ready.run(progress.add("train", total=ready.config.steps), **options)


def train(
    folder: Path | None = None, batches: Batches | None = None, model: ModelConfig = MODEL, **changes: Any
) -> Trained:
    return run(trainer(folder, batches, model, **changes), stop=score)


def score(model: Decoder, state: State) -> bool:
    """Look at the model, and never stop."""
    state.scores.append((state.step, model.head.weight.detach().norm().item()))
    return False


@functools.cache
def unbroken() -> Trained:
    return train()


def weights(trained: Trained) -> list[Tensor]:
    return [x.detach() for x in trained.model.parameters()]


def assert_same_bits(found: Trained, wanted: Trained) -> None:
    assert found.state.losses == wanted.state.losses
    assert found.state.scores == wanted.state.scores
    assert found.state.held_out == wanted.state.held_out
    assert all(torch.equal(a, b) for a, b in zip(weights(found), weights(wanted), strict=True))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_accumulated_batches_are_one_batch(micro_batch: int, packed: bool) -> None:
    # a large eps, so that rounding in a gradient near 0 does not become a step
    whole = train(batches=Data(packed), eps=1e-3)
    parts = train(batches=Data(packed), eps=1e-3, micro_batch=micro_batch)
    assert parts.state.losses == pytest.approx(whole.state.losses, rel=1e-5)
    for a, b in zip(weights(parts), weights(whole), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    if packed:
        assert whole.state.losses != pytest.approx(train(eps=1e-3).state.losses, rel=1e-4)


@dataclass(frozen=True)
class Weighted:
    """The same batches with weights of targets: equal ones if `even`, else of the first half of a row alone."""

    even: bool

    def __getitem__(self, step: int) -> WeightedBatch:
        batch = Data()[step]
        weights = torch.ones(4, 8) if self.even else (torch.arange(8) < 4).float().expand(4, 8)
        weights = weights * (batch.targets != IGNORE)
        return WeightedBatch(
            tokens=batch.tokens, targets=batch.targets, cu_seqlens=None, weights=weights / weights.sum()
        )


@pytest.mark.parametrize("micro_batch", [None, 1, 3])
def test_weights_weigh_the_losses_of_targets(micro_batch: int | None) -> None:
    plain = train(eps=1e-3)
    even = train(batches=Weighted(even=True), eps=1e-3, micro_batch=micro_batch)
    assert even.state.losses == pytest.approx(plain.state.losses, rel=1e-5)
    for a, b in zip(weights(even), weights(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    # the first loss is of the same model
    batch, ready = Weighted(even=False)[0], trainer()
    half = batch.targets.masked_fill(torch.arange(8) >= 4, IGNORE)
    wanted = ready.model.loss(batch.tokens, half).item() / int((half != IGNORE).sum())
    uneven = train(batches=Weighted(even=False), micro_batch=micro_batch)
    assert uneven.state.losses[0] == pytest.approx(wanted, rel=1e-5)


def test_losses_are_means_over_scored_tokens() -> None:
    batch, ready = Data()[0], trainer(sparse=True)
    total = ready.model.loss(batch.tokens, batch.targets).item()
    rows: list[int] = []
    ready.model.head.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].numel() // 16))
    found = run(ready).state.losses
    assert found[0] == pytest.approx(total / 17, rel=1e-6)
    assert found == pytest.approx(unbroken().state.losses, rel=1e-3)
    assert set(rows) == {17}, "the head runs at scored positions only"


def test_training_learns() -> None:
    class Same:
        def __getitem__(self, step: int) -> Batch:
            return Data()[0]

    losses = train(batches=Same(), steps=60, lr=0.02).state.losses
    assert losses[-1] < 0.1 * losses[0]


def test_half_precision_keeps_weights_whole() -> None:
    found = train(dtype="bfloat16")
    assert all(x.dtype == torch.float32 for x in weights(found))
    assert found.state.losses == pytest.approx(unbroken().state.losses, rel=0.05)
    assert found.state.losses != pytest.approx(unbroken().state.losses, rel=1e-5)


# 0: none are
@pytest.mark.parametrize("clip", [1e-2, 1e3, 0.0])
def test_gradients_are_clipped_to_a_norm(clip: float) -> None:
    ready, batch = trainer(steps=1, clip=clip), Data()[0]
    loss = ready.model.loss(batch.tokens, batch.targets) / 17
    gradients = torch.autograd.grad(loss, list(ready.model.parameters()))
    norm = math.sqrt(sum(x.square().sum().item() for x in gradients))
    assert 1e-2 < norm < 1e3
    run(ready)
    # Adam's first moment is 1 - beta_1 of the first gradient
    moments = [state["exp_avg"] for state in ready.stepper.optimizer.state.values()]
    kept = math.sqrt(sum(x.square().sum().item() for x in moments)) / (1 - ready.config.beta_1)
    assert kept == pytest.approx(min(clip or math.inf, norm), rel=1e-4)


def told(model: ModelConfig, **changes: Any) -> dict[str, dict[str, Any]]:
    """What the optimizer is told of each parameter."""
    decoder = Decoder(model)
    optimizer = optimizer_for(decoder, TrainConfig(**RUN, weight_decay=0.3, **changes))
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    return {name: groups[id(parameter)] for name, parameter in decoder.named_parameters()}


def test_weight_decay_is_for_matrices() -> None:
    model = ModelConfig(
        vocab_size=9, width=16, layers=1, heads=2, hidden=24, positions=4, attention="stick_breaking:remainder=bias"
    )
    groups = told(model)
    spared = {name for name, group in groups.items() if group["weight_decay"] == 0}
    block = "blocks.0"
    assert spared == {
        f"{block}.norm_1.weight",
        f"{block}.norm_2.weight",
        "norm.weight",
        f"{block}.attention.mixer.bias",
    }
    assert {group["weight_decay"] for group in groups.values()} == {0.0, 0.3}
    assert len(groups) == 11
    everything = told(dataclasses.replace(model, norm="layer", out_bias=True), decay_all=True)
    assert {group["weight_decay"] for group in everything.values()} == {0.3} and len(everything) == 15


def test_what_is_never_used_decays_by_the_schedule() -> None:
    ready = trainer(weight_decay=0.3)
    before = ready.model.embedding.weight[0].detach().clone()
    # token 0 is in no batch
    after = run(ready).model.embedding.weight[0].detach()
    kept = math.prod(1 - 0.3 * learning_rate(ready.config, step) for step in range(18))
    torch.testing.assert_close(after, before * kept)
    assert kept < 0.98


def test_m_width_divides_the_learning_rate_of_matrices_in_blocks() -> None:
    shape = ModelConfig(vocab_size=9, width=16, layers=1, heads=2, hidden=24, init_std=0.2, m_width=4.0)
    ready = trainer(model=shape, batches=Small(), steps=1, warmup=0, weight_decay=0.0, clip=1e9, eps=1e-30)
    before = {name: x.detach().clone() for name, x in ready.model.named_parameters()}
    run(ready)
    for name, parameter in ready.model.named_parameters():
        # Adam's first step is the learning rate in every coordinate that has a gradient
        step = (parameter.detach() - before[name]).abs().max().item()
        inside = name.startswith("blocks.") and parameter.ndim == 2
        assert step == pytest.approx(0.01 / 4 if inside else 0.01, rel=1e-3), name


class Small:
    """Batches for a vocabulary of 9."""

    def __getitem__(self, step: int) -> Batch:
        batch = Data()[step]
        targets = batch.targets.where(batch.targets == IGNORE, batch.targets % 9)
        return Batch(tokens=batch.tokens % 9, targets=targets, cu_seqlens=None)


def test_same_seed_same_bits() -> None:
    assert_same_bits(train(), unbroken())
    other = train(seed=1)
    assert not set(other.state.losses) & set(unbroken().state.losses)


def test_stop_is_asked_at_multiples_and_obeyed(tmp_path: Path) -> None:
    asked, logged = [], []

    def stop(model: Decoder, state: State) -> bool:
        asked.append(state.step)
        state.scores.append((state.step, 0.5))
        return state.step == 16

    def log(step: int, numbers: dict[str, float]) -> None:
        logged.append(step)
        assert numbers["loss"] == unbroken().state.losses[step - 1]
        assert numbers["lr"] == learning_rate(TrainConfig(**RUN), step - 1)
        assert numbers["tokens_per_second"] > 0

    found = run(trainer(tmp_path / "run"), stop=stop, log=log)
    assert asked == [8, 16]
    assert logged == [4, 8, 12, 16]
    assert found.state.losses == unbroken().state.losses[:16]
    assert found.state.finished
    assert checkpoint.load_state(tmp_path / "run") == found.state
    assert found.state.scores == [(8, 0.5), (16, 0.5)]


def test_stop_is_asked_at_the_end(tmp_path: Path) -> None:
    asked: list[int] = []

    def stop(model: Decoder, state: State) -> bool:
        asked.append(state.step)
        return False

    found = run(trainer(tmp_path / "run"), stop=stop)
    assert asked == [8, 16, 18]
    assert found.state.finished and checkpoint.load_state(tmp_path / "run") == found.state


def test_the_last_look_is_at_the_last_step() -> None:
    logged: list[int] = []
    run(trainer(check_every=0), log=lambda step, _: logged.append(step))
    assert logged == [4, 8, 12, 16, 18]
    assert run(trainer(check_every=0), stop=score).state.scores == []


def test_looks_are_at_multiples_of_either() -> None:
    logged: list[int] = []
    run(trainer(log_every=5, check_every=4), stop=score, log=lambda step, _: logged.append(step))
    assert logged == [4, 5, 8, 10, 12, 15, 16, 18]


# trainings that share a trunk


TRUNK: dict[str, Any] = {"schedule": "wsd", "decay": 1 / 3, "check_every": 0}


def branched(folder: Path, **changes: Any) -> Trained:
    """Train 6 steps, 6 more from there, and then the 6 of the decay of a training of 18."""
    plain = TRUNK | changes | {"schedule": "constant"}
    run(trainer(folder / "6", steps=6, trunk=True, **plain))
    run(trainer(folder / "12", Calls(5, pytest.fail), steps=12, trunk=True, after=folder / "6", **plain))
    return run(trainer(folder / "18", Calls(11, pytest.fail), after=folder / "12", **(TRUNK | changes)))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_branch_is_the_training_straight_through(optimizer: str, dropout: float, tmp_path: Path) -> None:
    model = dataclasses.replace(MODEL, dropout=dropout)
    found = branched(tmp_path, model=model, optimizer=optimizer)
    assert_same_bits(found, run(trainer(model=model, optimizer=optimizer, **TRUNK)))
    # another branch of the same trunk, of 9 steps, decays sooner
    short = run(trainer(after=tmp_path / "6", model=model, optimizer=optimizer, **(TRUNK | {"steps": 9})))
    assert_same_bits(short, run(trainer(model=model, optimizer=optimizer, **(TRUNK | {"steps": 9}))))
    # what others continue from keeps the state of its optimizer, and what is evaluated does not
    kept = {folder.name for folder in tmp_path.iterdir() if (folder / "optimizer.safetensors").exists()}
    assert kept == {"6", "12"}


@pytest.mark.parametrize("at", [3, 8, 14])
def test_trunks_and_branches_that_are_interrupted_go_on(at: int, tmp_path: Path) -> None:
    plain = TRUNK | {"schedule": "constant", "trunk": True}
    parts: list[dict[str, Any]] = [
        {"folder": tmp_path / "6", "steps": 6, **plain},
        {"folder": tmp_path / "12", "steps": 12, "after": tmp_path / "6", **plain},
        {"folder": tmp_path / "18", "after": tmp_path / "12", **TRUNK},
    ]
    for part in parts[: at // 6]:
        run(trainer(**part))
    with pytest.raises(KeyboardInterrupt):
        run(trainer(batches=Calls(at, interrupt), **parts[at // 6]))
    for part in parts:
        found = run(trainer(batches=Calls(at, pytest.fail), **part))
    assert_same_bits(found, run(trainer(**TRUNK)))


# held-out text

HELD_OUT = Data()[99]


@functools.cache
def looked_at() -> Trained:
    return run(trainer(held_out=HELD_OUT, look_every=5), stop=score)


def test_held_out_text_is_looked_at_at_multiples_and_at_the_end() -> None:
    found = looked_at()
    assert [step for step, _ in found.state.held_out] == [5, 10, 15, 18]
    # to look changes nothing
    assert found.state.losses == unbroken().state.losses and found.state.scores == unbroken().state.scores
    assert all(torch.equal(a, b) for a, b in zip(weights(found), weights(unbroken()), strict=True))
    assert run(trainer(look_every=5)).state.held_out == run(trainer(held_out=HELD_OUT)).state.held_out == []


@pytest.mark.parametrize("packed", [False, True])
def test_the_held_out_loss_is_the_mean_over_scored_tokens(packed: bool) -> None:
    batch = Data(packed)[99]
    found = run(trainer(held_out=batch, look_every=18, micro_batch=3))
    with torch.inference_mode():
        total = found.model.loss(batch.tokens, batch.targets, batch.cu_seqlens)
    ((_, loss),) = found.state.held_out
    assert loss == pytest.approx(total.item() / 17, rel=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_nothing_is_dropped_from_held_out_text(dropout: float) -> None:
    model = dataclasses.replace(MODEL, dropout=dropout)
    found = run(trainer(model=model, held_out=HELD_OUT, look_every=9))
    with torch.inference_mode():
        total = found.model.eval().loss(HELD_OUT.tokens, HELD_OUT.targets)
    assert found.state.held_out[-1][1] == pytest.approx(total.item() / 17, rel=1e-5)
    # and as much as ever from what is trained on
    assert found.state.losses == train(model=model).state.losses


@pytest.mark.parametrize("at", range(18))
def test_a_run_interrupted_at_any_step_looks_at_the_same_text(at: int, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(trainer(tmp_path / "run", Calls(at, interrupt), held_out=HELD_OUT, look_every=5), stop=score)
    again = trainer(tmp_path / "run", Calls(at, pytest.fail), held_out=HELD_OUT, look_every=5)
    assert_same_bits(run(again, stop=score), looked_at())


def test_a_run_interrupted_at_every_step_looks_at_the_same_text(tmp_path: Path) -> None:
    for at in range(18):
        with pytest.raises(KeyboardInterrupt):
            run(trainer(tmp_path / "run", Calls(at, interrupt), held_out=HELD_OUT, look_every=5), stop=score)
    assert_same_bits(run(trainer(tmp_path / "run", Untouched(), held_out=HELD_OUT, look_every=5)), looked_at())


# compiling warns of what torch does inside itself
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("micro_batch", [None, 3])
def test_a_look_compiles_nothing(micro_batch: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, but that what is compiled runs as it is: a look has the shapes and the modes of training."""
    # slow to import
    from torch._dynamo.testing import CompileCounter

    frames = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=frames))
    ready = trainer(
        held_out=Batch(tokens=HELD_OUT.tokens[:3], targets=HELD_OUT.targets[:3], cu_seqlens=None),
        look_every=6,
        micro_batch=micro_batch,
    )
    ready.stepper.compiles = True
    ready.stepper.loss.compile_parts(in_place=False)  # type: ignore[operator]  # it is a Loss
    counted: list[tuple[int, int]] = []
    ours = ready.stepper.mean_loss

    def look(batch: Any) -> float:
        before, loss = int(frames.frame_count), ours(batch)
        counted.append((before, int(frames.frame_count)))
        return loss

    monkeypatch.setattr(ready.stepper, "mean_loss", look)
    try:
        found = run(ready)
    finally:
        torch.compiler.reset()
    assert len(counted) == 3 and counted[0][0] > 0 and all(before == after for before, after in counted), counted
    assert found.state.losses == pytest.approx(unbroken().state.losses, rel=1e-4)


@pytest.mark.filterwarnings("default")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_look_costs_less_than_half_a_step_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(steps=12, batch=16, length=2048, lr=1e-3, dtype="bfloat16", look_every=1, log_every=1)
    spent: list[float] = []

    mean_loss = Stepper.mean_loss

    def timed(self: Stepper, batch: Any) -> float:
        start = time.perf_counter()
        # it waits for what it gives
        loss = mean_loss(self, batch)
        spent.append(time.perf_counter() - start)
        return loss

    monkeypatch.setattr(Stepper, "mean_loss", timed)

    class Windows:
        def __getitem__(self, step: int) -> Batch:
            rows = torch.randint(0, 8192, (16, 2049), generator=torch.Generator().manual_seed(step))
            return Batch(tokens=rows[:, :-1].contiguous(), targets=rows[:, 1:].contiguous(), cu_seqlens=None)

    shape = named("25m", vocab_size=8192, attention="rope")
    found = run(Trainer(shape, config, Windows(), None, torch.device("cuda"), held_out=Windows()[99]))
    assert found.tokens_per_second is not None
    step = config.batch * config.length / found.tokens_per_second
    assert statistics.median(spent) < 0.5 * step, (spent, step)


def rising(monkeypatch: pytest.MonkeyPatch, *losses: float) -> None:
    """Looks at held-out text find these losses, one after another."""
    left = list(losses)
    monkeypatch.setattr(Stepper, "mean_loss", lambda self, batch: left.pop(0))


@pytest.mark.parametrize(("patience", "steps"), [(0, 18), (1, 6), (2, 12), (4, 16), (6, 18)])
def test_patience_ends_training(patience: int, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = [3.0, 2.0, 2.1, 1.5, 1.6, 1.5, 1.9, 1.7, 1.6]
    rising(monkeypatch, *losses)
    found = run(trainer(tmp_path / "run", held_out=HELD_OUT, look_every=2, patience=patience))
    assert found.state.step == steps and found.state.finished
    assert found.state.held_out == [(2 * (place + 1), loss) for place, loss in enumerate(losses[: steps // 2])]
    # it has ended, and does not go on
    again = run(trainer(tmp_path / "run", Untouched(), held_out=HELD_OUT, look_every=2, patience=patience))
    assert again.state == found.state


def test_a_held_out_loss_that_is_no_number_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    rising(monkeypatch, 3.0, math.nan)
    with pytest.raises(DivergedError, match="the held-out loss is nan at step 8"):
        run(trainer(held_out=HELD_OUT, look_every=4))


def test_held_out_loss_is_logged_and_shown_where_it_was_measured() -> None:
    logged: dict[int, dict[str, float]] = {}
    console = Console(file=io.StringIO(), width=200)
    with Progress(console) as progress:
        ready = trainer(held_out=HELD_OUT, look_every=8)
        found = ready.run(task := progress.add("train", total=18), log=lambda step, now: logged.update({step: now}))
        task.close()
    looks = {step: now["held_out_loss"] for step, now in logged.items() if "held_out_loss" in now}
    assert list(looks.items()) == found.state.held_out and set(logged) > set(looks) == {8, 16, 18}
    assert f"held-out {looks[18]:.3f}, " in console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO


def test_what_was_trained_before_there_was_held_out_text_goes_on(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", Calls(11, interrupt))
    path = tmp_path / "run" / "config.json"
    saved = json.loads(path.read_text())
    del saved["state"]["held_out"], saved["digest"]
    path.write_text(json.dumps(saved))
    found = run(trainer(tmp_path / "run", held_out=HELD_OUT, look_every=5))
    assert [step for step, _ in found.state.held_out] == [15, 18]


def test_speed_is_that_of_the_process_that_trained(tmp_path: Path) -> None:
    first = train(tmp_path / "run")
    assert first.tokens_per_second is not None and first.tokens_per_second > 0
    assert first.state.seconds > 0
    assert first.mfu is None, "no CPU has a datasheet here"


def test_finished_runs_are_not_trained_again(tmp_path: Path) -> None:
    first = train(tmp_path / "run")
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    again = train(tmp_path / "run", Untouched())
    assert_same_bits(again, first)
    assert again.state == first.state
    assert again.tokens_per_second == first.tokens_per_second is not None
    assert not again.model.training
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()} == files


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


# after steps 7 and 15, counted from 0, `stop` is due
@pytest.mark.parametrize("at", range(18))
def test_a_run_interrupted_at_any_step_goes_on(at: int, tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", Calls(at, interrupt))
    assert signal.getsignal(signal.SIGINT) is handler
    # the step in hand was done
    assert checkpoint.load_state(tmp_path / "run").losses == unbroken().state.losses[: at + 1]
    assert_same_bits(train(tmp_path / "run", Calls(at, pytest.fail)), unbroken())


def test_a_run_interrupted_at_every_step_goes_on(tmp_path: Path) -> None:
    for at in range(18):
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "run", Calls(at, interrupt))
    assert_same_bits(train(tmp_path / "run", Untouched()), unbroken())


def test_an_interrupt_outside_a_step_is_kept(tmp_path: Path) -> None:
    """While the model is looked at, or saved for the last time."""

    def stop(model: Decoder, state: State) -> bool:
        interrupt()
        return score(model, state)

    with pytest.raises(KeyboardInterrupt):
        run(trainer(tmp_path / "run"), stop=stop)
    state = checkpoint.load_state(tmp_path / "run")
    assert state.losses == unbroken().state.losses[:8]
    assert_same_bits(train(tmp_path / "run"), unbroken())
    with pytest.raises(KeyboardInterrupt):
        run(trainer(tmp_path / "other", check_every=18), stop=stop)
    assert checkpoint.load_state(tmp_path / "other").losses == unbroken().state.losses


def test_a_run_interrupted_before_its_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = threading.Event()
    asked.set()
    monkeypatch.setattr("sbeval.runtime.signals.deferred", lambda: contextlib.nullcontext(asked))
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run")
    monkeypatch.undo()
    assert_same_bits(train(tmp_path / "run"), unbroken())


@pytest.mark.parametrize("checkpoint_seconds", [0.0, 1e9])
def test_periodic_checkpoints(checkpoint_seconds: float, tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("the machine is gone")

    with pytest.raises(RuntimeError, match="the machine is gone"):
        train(tmp_path / "run", Calls(10, fail), checkpoint_seconds=checkpoint_seconds)
    if checkpoint_seconds:
        assert checkpoint.find(tmp_path / "run") is None
    else:
        assert checkpoint.load_state(tmp_path / "run").losses == unbroken().state.losses[:8]
    assert_same_bits(train(tmp_path / "run"), unbroken())


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train(checkpoint_seconds=0.0)
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    ready = trainer(tmp_path / "run", checkpoint_seconds=0.0)
    ready.batches = Calls(10, lambda: ready.model.norm.weight.data.fill_(math.nan))
    with pytest.raises(DivergedError, match="the loss is nan at step 12"):
        run(ready)
    # and does not get into a checkpoint
    assert checkpoint.load_state(tmp_path / "run").losses == unbroken().state.losses[:8]
    assert all(bool(x.isfinite().all()) for x in checkpoint.load_model(tmp_path / "run").parameters())


def test_a_run_whose_checkpoint_is_broken_says_so(tmp_path: Path) -> None:
    train(tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="model.safetensors can't be read: .* remove its folder to train again"):
        train(tmp_path / "run")


@pytest.mark.parametrize(
    ("sent", "saved"), [(signal.SIGINT, 10), (signal.SIGTERM, 10), (signal.SIGKILL, 8)], ids=lambda x: str(x)
)
def test_a_process_that_is_ended_goes_on(sent: signal.Signals, saved: int, tmp_path: Path) -> None:
    """Ended in the tenth step; SIGKILL leaves the checkpoint of the last look."""
    folder = tmp_path / "run"
    seconds = "0" if sent == signal.SIGKILL else "1e9"
    process = subprocess.Popen(
        [sys.executable, __file__, str(folder), "9", seconds],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "in step 9\n"
    process.send_signal(sent)
    _, errors = process.communicate("go on\n", timeout=60)
    if sent == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode != 0
        assert errors.splitlines()[-1] == "KeyboardInterrupt"
    assert checkpoint.load_state(folder).losses == unbroken().state.losses[:saved]
    assert not checkpoint.load_state(folder).finished
    assert_same_bits(train(folder), unbroken())


def _wait(step: int) -> None:
    print(f"in step {step}", flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    # what the test above ends: a run that waits in a step
    train(
        Path(sys.argv[1]),
        Calls(int(sys.argv[2]), lambda: _wait(int(sys.argv[2]))),
        checkpoint_seconds=float(sys.argv[3]),
    )
