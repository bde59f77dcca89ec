"""Devices and dtypes by name; names that will not do, in one line."""

import time
from collections.abc import Iterator

import pytest
import torch

from sbeval import device
from sbeval.errors import InputError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(params=[0, 2], ids=["no GPU", "two GPUs"])
def gpus(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """PyTorch sees so many GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: request.param)
    yield request.param


def test_the_default_is_the_gpu_if_there_is_one(gpus: int) -> None:
    assert device.pick(None) == (CUDA if gpus else CPU)
    assert device.pick("cpu") == CPU


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:1"])
def test_a_gpu_by_name(name: str, gpus: int) -> None:
    if gpus:
        assert device.pick(name) == torch.device(name)
    else:
        with pytest.raises(InputError, match=f"--device {name}: PyTorch .* sees no GPU here; leave --device out"):
            device.pick(name)


def test_a_gpu_too_many(gpus: int) -> None:
    with pytest.raises(InputError, match="GPUs 0 to 1" if gpus else "sees no GPU"):
        device.pick("cuda:2")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu", "unknown device 'gpu'; did you mean 'cpu'? known: cpu, cuda"),
        ("mps", "unknown device 'mps'; known: cpu, cuda"),
        ("", "unknown device ''; known: cpu, cuda"),
        ("CUDA:0", "unknown device 'CUDA'; known: cpu, cuda"),
        ("cuda:first", "unknown device 'cuda:first'; a device is cpu, cuda or cuda:0, cuda:1, ..."),
        ("cuda:-1", "unknown device 'cuda:-1'; a device is"),
        ("cuda:0:1", "unknown device 'cuda:0:1'; a device is"),
        ("cpu:", "unknown device 'cpu:'; a device is"),
        ("cuda:²", "unknown device 'cuda:²'; a device is"),
    ],
)
def test_devices_that_are_unknown(name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(InputError) as caught:
        device.pick(name)
    assert message in str(caught.value)


def test_dtypes_by_name() -> None:
    assert device.pick_dtype(None, CPU) == "float32"
    assert device.pick_dtype(None, CUDA) == "bfloat16"
    assert device.pick_dtype("float16", CPU) == "float16"
    for name, hint in (("bf16", "did you mean 'bfloat16'"), ("float64", "known: bfloat16, float16, float32")):
        with pytest.raises(InputError, match=f"unknown dtype '{name}'.*{hint}"):
            device.pick_dtype(name, CPU)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_autocast_runs_products_in_the_dtype(dtype: str) -> None:
    a = torch.ones(4, 4)
    with device.autocast(CPU, dtype):
        assert (a @ a).dtype == device.DTYPES[dtype]
    assert (a @ a).dtype == torch.float32


def test_the_cpu_is_described_with_its_threads() -> None:
    assert device.describe(CPU) == f"cpu ({torch.get_num_threads()} threads)"


@pytest.mark.parametrize(
    ("name", "tera"), [("NVIDIA H200", 989), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA GeForce GTX 1080", None)]
)
def test_peaks_are_the_datasheets(name: str, tera: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert device.peak_flops(CUDA) == (None if tera is None else tera * 1e12)
    assert device.describe(CUDA) == name
    assert device.peak_flops(CPU) is None


def test_speed_is_measured_on_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 2.0, 10.0, 11.0, 20.0, 24.0, 30.0, 31.5, 40.0, 43.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    # the fastest of five, which took 1 s
    assert device.measured_flops(CPU, "float32") == 2 * 512**3
