"""Test the report on memory, packages and folders, and that it lists every preset."""

import dataclasses
import shutil
import sys
from pathlib import Path

import pytest
import torch

from sbeval import doctor, registry
from sbeval.cli import main
from sbeval.models.config import ModelConfig
from sbeval.models.decoder import Decoder
from sbeval.training.config import TrainConfig

CPU = torch.device("cpu")
SHAPE = ModelConfig(vocab_size=1000, width=64, layers=2, heads=4, kv_heads=2, hidden=96)
TRAINING = TrainConfig(steps=1, batch=32, length=128, lr=0.1)


def test_memory_of_training_has_its_parts() -> None:
    parameters = Decoder(SHAPE).n_parameters()
    assert doctor.training_bytes(SHAPE, 0, "float32", 0) == 16 * parameters
    assert doctor.training_bytes(SHAPE, 0, "bfloat16", 0) == 18 * parameters
    logits = doctor.training_bytes(SHAPE, 0, "bfloat16", 7) - 18 * parameters
    assert logits == 7 * 1000 * (2 + 4 + 4)
    # a residual stream of 64, twice and with its norms; 12 heads of 16; an MLP of 96, three times
    tokens = doctor.training_bytes(SHAPE, 5, "float32", 0) - 16 * parameters
    assert tokens == 5 * 2 * 4 * (4 * 64 + 12 * 16 + 3 * 96)
    assert doctor.evaluation_bytes(SHAPE, 0, "float32") == 4 * parameters


def test_the_estimate_is_near_what_a_backward_pass_keeps() -> None:
    """Count the tensors that autograd saves, each storage once."""
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    model = Decoder(SHAPE)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    tokens = torch.randint(1000, (4, 128))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model.loss(tokens, tokens)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found = sum(size for place, size in kept.items() if place not in weights)
    estimated = doctor.training_bytes(SHAPE, 512, "float32", 512) - 16 * model.n_parameters()
    assert 0.5 < found / estimated < 1.5


def test_what_fits() -> None:
    def said(free: int, option: str, shape: ModelConfig = SHAPE) -> str:
        return doctor.verdict(shape, TRAINING, 128, free, option)

    whole, half = (doctor.training_bytes(SHAPE, tokens, "float32", tokens) for tokens in (32 * 128, 16 * 128))
    assert said(whole, "--micro-batch-tokens") == "fits"
    assert said(whole - 1, "--micro-batch-tokens") == "needs --micro-batch-tokens 2048"
    assert said(half, "") == "fits 16 of 32 rows at a time"
    # other rows at a time would drop others
    assert said(half, "", dataclasses.replace(SHAPE, dropout=0.1)) == "too large"
    assert said(16 * Decoder(SHAPE).n_parameters(), "--micro-batch-tokens") == "too large"
    assert said(1000, "") == "too large"


def test_packages_are_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sound.py").write_text("")
    (tmp_path / "cracked.py").write_text("import a_part_that_is_missing")
    (tmp_path / "violent.py").write_text("import os; os._exit(3)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor._package("sound", "sound", "use") == ("sound", "yes", "use")
    assert doctor._package("absent_module", "absent", "use") == ("absent", "no", "use")
    assert "broken: ModuleNotFoundError: No module named 'a_part_that" in doctor._package("cracked", "", "")[1]
    assert doctor._package("violent", "", "")[1] == "broken: import exits with code 3"
    assert doctor._package("rich", "rich", "")[1][0].isdigit()


def test_folders(tmp_path: Path) -> None:
    rows = list(doctor._folders(tmp_path / "not" / "yet"))
    assert rows[1][:2] == ("results", str(tmp_path / "not" / "yet"))
    assert float(rows[1][2]) == pytest.approx(shutil.disk_usage(tmp_path).free / doctor.GIB, abs=1)


def test_memory_of_this_machine() -> None:
    free, total = doctor.memory(CPU)
    assert 0 < free <= total


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    monkeypatch.setattr(doctor, "PACKAGES", (("rich", "rich", "this table"),))
    monkeypatch.setattr("sbeval.runtime.device.measured_flops", lambda *_: 1e12)
    monkeypatch.setattr(sys, "argv", ["sbeval", "doctor", "--device", "cpu"])
    with pytest.raises(SystemExit) as ended:
        main.main()
    return ended.value.code, capsys.readouterr().out


def test_the_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "memory", lambda _: (64 * doctor.GIB, 80 * doctor.GIB))
    code, out = run(monkeypatch, capsys)
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    for method in registry.ATTENTION:
        assert [method, "torch", "yes"] in lines
    assert "triton-hopper  no: backend 'triton-hopper' can't run: it needs a GPU, and this device is cpu" in out
    for family in registry.TASKS:
        for preset in registry.task(family).presets:
            (line,) = [line for line in lines if line[:2] == [family.replace("_", "-"), preset]]
            assert line[3] == "M" and float(line[4]) > 0 and {"fits", "needs", "too"} & set(line)
    assert ["length-gen", "quick", "1.3", "M"] in [line[:4] for line in lines]
    assert "64.0 of 80.0 GiB free" in out and ["cpu"] in [line[:1] for line in lines]


def test_nothing_can_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "memory", lambda _: (1 << 20, doctor.GIB))
    monkeypatch.setattr(registry, "TASKS", {"length_gen": registry.TASKS["length_gen"]})
    code, out = run(monkeypatch, capsys)
    assert code == 1 and "too large" in out and "fits" not in out


def test_a_method_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no such kernel\nmore about it")

    monkeypatch.setattr("sbeval.kernels.rope.Mixer.forward", fail)
    runs = {name: said for name, _, said in doctor._methods(CPU)}
    assert runs["rope"] == "no: no such kernel" and runs["stick_breaking"] == "yes"


def test_broken_modules_of_others_are_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "broken_for_doctor.py").write_text("1 / 0")
    for names in ("ATTENTION", "TASKS"):
        monkeypatch.setattr(registry, names, {"broken": "broken_for_doctor"})
    assert list(doctor._methods(CPU)) == [("broken", "", "no: ZeroDivisionError: division by zero")]
    ((name, *_, said, _),) = doctor._presets(CPU, doctor.GIB)
    assert name == "broken" and said.startswith("sbeval.tasks: 'broken' cannot be imported")


def test_a_kernel_that_does_not_compile_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Triton raises then is not a RuntimeError."""
    errors = pytest.importorskip("triton.errors")

    def fail(*_: object, **__: object) -> None:
        raise errors.TritonError("unsupported layout\nmore about it")

    monkeypatch.setattr("sbeval.kernels.stick_breaking.attention", fail)
    monkeypatch.setattr("sbeval.kernels.rope.Mixer.forward", fail)
    assert doctor._hopper(CPU)[2] == "no: unsupported layout"
    assert {name: said for name, _, said in doctor._methods(CPU)}["rope"] == "no: unsupported layout"
