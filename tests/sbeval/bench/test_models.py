"""Which models are timed, how often and by which kernels; times need a GPU."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from sbeval.bench import models, timing
from sbeval.bench.models import Peer, Speeds
from sbeval.errors import InputError
from sbeval.kernels import rope, stick_breaking
from sbeval.models.decoder import Decoder

CPU = torch.device("cpu")


def test_plain_softmax_runs_once_for_each_kernel() -> None:
    found = models.peers(("stick_breaking:remainder=none", "rope", "alibi"))
    assert found == [
        Peer("stick_breaking:remainder=none", None),
        Peer("rope", "cudnn"),
        Peer("rope", "flash"),
        Peer("alibi", None),
    ]
    assert [peer.backend(torch.device("cuda")) for peer in found] == ["triton", "cudnn", "flash", "flex"]


def test_rows_name_the_kernel_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []

    def pick(q: torch.Tensor, *_: object) -> str:
        shapes.append((q.shape, q.dtype))
        return "triton-hopper"

    monkeypatch.setattr(stick_breaking, "pick_backend", pick)
    monkeypatch.setattr(timing, "needs_gpu", lambda _: None)
    monkeypatch.setattr(models, "_run", lambda *_: Speeds(9.0, 2.0, None, 2))
    problem = models.Problem(size="quick", head_dim=40, length=16, batch=2)
    peers = [Peer("stick_breaking:epsilon=0", None), Peer("rope", "flash")]
    models.measure([problem], peers, 1, CPU, "bfloat16", tmp_path)
    assert shapes == [((2, 16, 4, 40), torch.bfloat16)]
    rows = pd.read_csv(tmp_path / "model.csv", keep_default_na=False)
    found = {tuple(row) for row in rows[["attention", "options", "backend"]].to_numpy()}
    assert found == {("stick_breaking", "epsilon=0", "triton-hopper"), ("rope", "", "flash")}


def test_runs_are_shuffled_and_none_is_missing() -> None:
    found = models.peers(("stick_breaking", "rope"))
    order = models.ordered(found, 5)
    assert sorted(map(str, order)) == sorted(map(str, found * 5)) and order != found * 5
    assert order == models.ordered(found, 5)


def test_heads_are_of_the_size_that_is_asked_for() -> None:
    narrow, wide = models.problems(("350m",), (64, 128), length=4096, batch=4)
    assert (narrow.shape("rope").heads, wide.shape("rope").heads) == (16, 8)
    assert (narrow.shape("rope").d_head, wide.shape("rope").d_head) == (64, 128)
    with pytest.raises(InputError, match="heads of 100 do not divide the width of 350m, 1024"):
        models.problems(("350m",), (100,), length=4096, batch=4)[0].shape("rope")
    with pytest.raises(InputError, match="unknown model size '350'"):
        models.problems(("350",), (64,), length=4096, batch=4)[0].shape("rope")


def test_a_kernel_is_chosen_in_every_layer() -> None:
    problem = models.Problem(size="quick", head_dim=40, length=16, batch=1)
    with torch.device("meta"):
        model = Decoder(problem.shape("rope"))
    mixers = [module for module in model.modules() if isinstance(module, rope.Mixer)]
    for kernel in ("cudnn", None):
        models.choose_kernel(model, kernel)
        assert [mixer.backend for mixer in mixers] == [kernel] * 4


def test_a_kernel_that_is_chosen_is_asked_for() -> None:
    problem = models.Problem(size="quick", head_dim=40, length=16, batch=1)
    model = Decoder(problem.shape("rope"))
    models.choose_kernel(model, "cudnn")
    with pytest.raises(InputError, match="backend 'cudnn' needs a GPU"):
        model(torch.zeros(1, 16, dtype=torch.int64))


def test_rows_are_means_over_the_runs() -> None:
    problem = models.Problem(size="quick", head_dim=40, length=16, batch=2)
    rows = models.summary(problem, problem.shape("rope"), [Speeds(90.0, 200.0, 0.25, 2), Speeds(110.0, 200.0, 0.35, 2)])
    values = {(row.step, row.metric): row for row in rows}
    train = values["train", "throughput"]
    assert (train.value, train.n, train.head_dim) == (100.0, 2, 40)
    assert train.stderr == pytest.approx(10.0)
    assert values["train", "mfu"].value == pytest.approx(0.3)
    (once,) = (row for row in models.summary(problem, problem.shape("rope"), [Speeds(90.0, 2.0, None, 2)])[:1])
    assert (once.value, once.stderr, once.n) == (90.0, None, 1)


def test_an_evaluation_that_did_not_fit_has_the_batch_that_did() -> None:
    problem = models.Problem(size="quick", head_dim=40, length=16, batch=4)
    rows = models.summary(problem, problem.shape("rope"), [Speeds(9.0, 2.0, None, 4), Speeds(9.0, 2.0, None, 2)])
    assert [(row.step, row.batch) for row in rows] == [("train", 4), ("evaluate", 2), ("evaluate", 2)]


def test_a_model_that_does_not_fit_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(problem: models.Problem, peer: Peer, *_: object) -> Speeds:
        if peer.attention == "rope":
            raise torch.OutOfMemoryError("out of memory at 1 sequences of 16 tokens at a time")
        return Speeds(9.0, 2.0, None, 4)

    kept: list[str] = []
    monkeypatch.setattr(models, "_run", run)
    monkeypatch.setattr(timing, "needs_gpu", lambda _: None)
    monkeypatch.setattr(models, "keep", lambda attention, *_, **__: kept.append(attention))
    peers = [Peer("rope", "flash"), Peer("alibi", None)]
    problem = models.Problem(size="quick", head_dim=40, length=16, batch=4)
    assert models.measure([problem], peers, 2, CPU, "float32", tmp_path).row_count == 1
    assert kept == ["alibi"]
    assert capsys.readouterr().err.count("not measured: quick rope flash, out of memory at 1 sequences") == 2


def test_it_needs_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="benchmarks need a GPU"):
        models.measure([], [], 1, CPU, "float32", tmp_path)
