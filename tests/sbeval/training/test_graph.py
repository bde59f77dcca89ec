"""A step that a GPU replays is the one that it would launch, bit for bit; when it is recorded, and when not."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sbeval.config import IGNORE
from sbeval.kernels import rope
from sbeval.models.config import ModelConfig
from sbeval.runtime import progress
from sbeval.tasks.generated import Examples
from sbeval.training import stepper as module
from sbeval.training.config import TrainConfig
from sbeval.training.graph import WARM_UP, Graph, refused, waits
from sbeval.training.loss import forget
from sbeval.training.stepper import Stepper
from sbeval.training.trainer import Trained, Trainer

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CPU = torch.device("cpu")
BATCH, LENGTH = 4, 32


class Distinct:
    """Batches of tokens that are all different: sums of gradients by token then have one term, in no order."""

    def __init__(self, place: torch.device) -> None:
        self.place = place

    def __getitem__(self, step: int) -> Examples:
        order = torch.randperm(BATCH * LENGTH, generator=torch.Generator().manual_seed(step)).view(BATCH, LENGTH)
        targets = order.roll(1, 1)
        targets[:, : LENGTH // 2] = IGNORE
        return Examples(tokens=order.to(self.place), targets=targets.to(self.place))


def trainer(place: torch.device, attention: str = "rope", dropout: float = 0.0, **changes: Any) -> Trainer:
    shape = ModelConfig(
        vocab_size=BATCH * LENGTH, width=64, layers=2, heads=1, hidden=128, attention=attention, mlp="gelu", tied=True,
        dropout=dropout,
    )  # fmt: skip
    options: dict[str, Any] = {
        "steps": 12,
        "batch": BATCH,
        "length": LENGTH,
        "lr": 3e-3,
        "sparse": True,
        "log_every": 4,
    }
    config = TrainConfig(**options | {"capacity": BATCH * LENGTH // 2} | changes)
    return Trainer(shape, config, Distinct(place), None, place)


def run(ready: Trainer) -> Trained:
    with progress.Progress() as shown:
        return ready.run(shown.add("train", total=ready.config.steps))


def assert_same(found: Trained, wanted: Trained) -> None:
    assert found.state.losses == wanted.state.losses
    for (name, mine), theirs in zip(found.model.named_parameters(), wanted.model.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


class StandIn:
    """A graph that runs the step at each call, as a CPU has none."""

    made: list["StandIn"]
    errors: list[RuntimeError]

    def __init__(self, step: Callable[[Tensor, Tensor], Tensor], *others: Any) -> None:
        if self.errors:
            raise self.errors.pop()
        self.step, self.calls = step, 0
        self.made.append(self)

    def __call__(self, tokens: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        return self.step(tokens, targets)


@pytest.fixture
def replaying(monkeypatch: pytest.MonkeyPatch) -> Trainer:
    ready = trainer(CPU)
    stepper = ready.stepper
    stepper.replays, stepper.stream = True, object()  # type: ignore[assignment]  # a stand-in's
    monkeypatch.setattr(StandIn, "made", [], raising=False)
    monkeypatch.setattr(StandIn, "errors", [], raising=False)
    monkeypatch.setattr(module, "Graph", StandIn)
    monkeypatch.setattr(module, "waits", lambda: contextlib.nullcontext([]))
    monkeypatch.setattr(Stepper, "on_stream", lambda self: contextlib.nullcontext())
    return ready


def test_a_step_is_recorded_once_it_has_run(replaying: Trainer) -> None:
    assert_same(run(replaying), run(trainer(CPU)))
    assert [graph.calls for graph in StandIn.made] == [12 - WARM_UP]


def test_recording_that_runs_out_of_memory_starts_again_with_fewer_rows(replaying: Trainer) -> None:
    StandIn.errors.append(torch.OutOfMemoryError("no memory to record"))
    found = run(replaying)
    assert found.rows == BATCH // 2
    # not replayed: the steps before it failed, and as many that compile the code for fewer rows
    assert [graph.calls for graph in StandIn.made] == [12 - 2 * WARM_UP]
    assert found.state.losses == pytest.approx(run(trainer(CPU)).state.losses, rel=1e-4)


def test_waits_are_listed_and_other_warnings_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[int | str] = [0]

    def switch(mode: int | str) -> None:
        modes.append(mode)
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)

    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", switch)
    with pytest.warns(UserWarning, match="of another kind") as others, waits() as waited:
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
        warnings.warn("of another kind", stacklevel=1)
    assert len(waited) == 2 and all(one.startswith(f"{__file__}:") for one in waited) and len(others) == 1
    with pytest.raises(ValueError, match="of the step"), waits():
        raise ValueError("of the step")
    assert modes == [0, "warn", 0, "warn", 0]


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (RuntimeError("CUDA error: operation not permitted when stream is capturing"), True),
        (RuntimeError("Triton Error [CUDA]: operation failed due to a previous error during capture"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (torch.OutOfMemoryError("CUDA out of memory while capturing"), False),
    ],
)
def test_errors_of_recording_are_known(error: RuntimeError, wanted: bool) -> None:
    assert refused(error) == wanted


class Generator:
    """As far as a recording looks at it."""

    state = "recorded"

    def clone_state(self) -> str:
        return "clone of " + self.state

    def graphsafe_set_state(self, state: str) -> None:
        self.state = state


@pytest.mark.parametrize(
    ("error", "state"), [("during CUDA graph capture", "clone of recorded"), ("of the step", "recorded")]
)
def test_a_refused_recording_leaves_random_numbers_to_draw(
    error: str, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(tokens: Tensor, targets: Tensor) -> Tensor:
        raise RuntimeError(error)

    generator = Generator()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", lambda made, stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "default_generators", (None, generator))
    stream: Any = SimpleNamespace(device=torch.device("cuda", 1))
    with pytest.raises(RuntimeError, match=error):
        Graph(step, torch.zeros(1), torch.zeros(1), stream)
    assert generator.state == state


def test_a_step_that_waits_for_the_gpu_is_launched(
    replaying: Trainer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "waits", lambda: contextlib.nullcontext(["method.py:7", "method.py:7"]))
    assert_same(run(replaying), run(trainer(CPU)))
    assert not StandIn.made
    said = capsys.readouterr().err
    assert said.count("cannot be recorded") == 1 and "it waits for the GPU at method.py:7." in said


def test_compiling_for_fewer_rows_is_no_wait_of_a_step(
    replaying: Trainer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stepper = replaying.stepper
    waited, accumulate = iter([["compiler.py:7"], []]), stepper._accumulate

    def out_of_memory(*batch: Any) -> Tensor:
        if stepper.launched == WARM_UP - 1 and stepper.rows == BATCH:
            raise torch.OutOfMemoryError("no memory for so many")
        return accumulate(*batch)

    monkeypatch.setattr(module, "waits", lambda: contextlib.nullcontext(next(waited)))
    monkeypatch.setattr(stepper, "_accumulate", out_of_memory)
    # two steps before, one that runs out, and the rest of the warm-up
    run(replaying)
    assert [graph.calls for graph in StandIn.made] == [12 - 2 - WARM_UP]
    assert "cannot be recorded" not in capsys.readouterr().err


def test_a_step_that_cannot_be_recorded_is_launched(
    replaying: Trainer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = Stepper._record

    def spoilt(self: Stepper, tokens: Tensor, targets: Tensor) -> bool:
        # as recording leaves them
        for parameter in self.model.parameters():
            parameter.grad = torch.full_like(parameter, torch.nan)
        return record(self, tokens, targets)

    monkeypatch.setattr(Stepper, "_record", spoilt)
    StandIn.errors.append(RuntimeError("CUDA error: operation not permitted when stream is capturing\nSearch for it"))
    assert_same(run(replaying), run(trainer(CPU)))
    assert not StandIn.made
    said = capsys.readouterr().err
    assert said.count("operation not permitted when stream is capturing. Steps") == 1 and "Search" not in said


def test_other_errors_of_recording_are_errors(replaying: Trainer) -> None:
    StandIn.errors.append(RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run(replaying)


def test_packed_sequences_are_not_replayed(replaying: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Examples, "cu_seqlens", torch.arange(BATCH + 1, dtype=torch.int32) * LENGTH, raising=False)
    run(replaying)
    assert not StandIn.made


def test_on_a_cpu_nothing_is_recorded() -> None:
    ready = trainer(CPU)
    stepper = ready.stepper
    assert not stepper.replays and stepper.stream is None
    assert all(isinstance(group["lr"], float) for group in stepper.optimizer.param_groups)
    run(ready)
    assert stepper.graph is None


# compiling warns of what torch does inside itself
@CUDA
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("attention", "optimizer", "dropout", "dtype"),
    [
        ("rope", "adamw", 0.0, "float32"),
        ("stick_breaking", "muon", 0.1, "bfloat16"),
        ("rope:key_shift=true,qkv_bias=true", "muon", 0.1, "bfloat16"),
        ("rope:key_shift=true", "muon", 0.0, "bfloat16"),
        ("nope", "muon", 0.0, "bfloat16"),
        ("fire", "muon", 0.0, "bfloat16"),
        ("sliding_window:window=8", "muon", 0.0, "bfloat16"),
        ("alibi", "adamw", 0.0, "bfloat16"),
        ("forgetting", "muon", 0.0, "bfloat16"),
    ],
)
def test_a_replayed_run_is_the_launched_one(
    attention: str, optimizer: str, dropout: float, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = torch.device("cuda", 0)
    options: dict[str, Any] = {"attention": attention, "dropout": dropout, "dtype": dtype, "optimizer": optimizer}
    replayed = trainer(place, **options)
    found = run(replayed)
    assert replayed.stepper.graph is not None
    with monkeypatch.context() as patch:
        patch.setattr(module, "WARM_UP", 1 << 30)
        launched = trainer(place, **options)
        wanted = run(launched)
        assert launched.stepper.graph is None
    assert_same(found, wanted)
    assert len(set(found.state.losses)) == 12


def _item(q: Tensor) -> None:
    assert q.flatten()[0].item() < 1e9


def _synchronize(q: Tensor) -> None:
    torch.cuda.synchronize()


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """No compiled code of other tests, which a method in another form could take for its own."""
    forget()
    yield
    forget()


@CUDA
@pytest.mark.filterwarnings("default")
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    ("wait", "reason"), [(_item, "it waits for the GPU at"), (_synchronize, "not permitted when stream is capturing")]
)
def test_a_method_that_waits_is_launched(
    wait: Callable[[Tensor], None], reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = torch.device("cuda", 0)
    forward = rope.Mixer.forward

    def waiting(self: rope.Mixer, q: Tensor, *others: Any) -> Tensor:
        wait(q)
        return forward(self, q, *others)

    with monkeypatch.context() as patch:
        patch.setattr(rope.Mixer, "forward", waiting)
        tried = trainer(place, dropout=0.1)
        found = run(tried)
        assert tried.stepper.graph is None and capsys.readouterr().err.count(reason) == 1
        patch.setattr(module, "WARM_UP", 1 << 30)
        assert_same(found, run(trainer(place, dropout=0.1)))
    forget()
    # what waits is gone, and the next model's steps are recorded again
    after = trainer(place, dropout=0.1)
    run(after)
    assert after.stepper.graph is not None
