"""Devices and dtypes by name; names that will not do, in one line."""

import contextlib
import itertools
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sbeval.errors import InputError
from sbeval.kernels import stick_breaking
from sbeval.runtime import device

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(params=[0, 2], ids=["no GPU", "two GPUs"])
def gpus(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """PyTorch sees so many GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: request.param)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
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


@pytest.mark.parametrize(("name", "current"), [("cuda:1", [torch.device("cuda:1")]), ("cuda", []), ("cpu", [])])
def test_a_gpu_by_number_is_the_current_one(
    name: str, current: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton would launch on the first one, with pointers of another."""
    used: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    device.pick(name)
    assert used == current


@pytest.mark.parametrize(
    ("name", "visible", "count", "found"),
    [
        ("cuda", None, 4, ["0", "1", "2", "3"]),
        ("cuda", "6,2", 2, ["6", "2"]),
        ("cuda", "GPU-8f2a, GPU-11c0", 2, ["GPU-8f2a", "GPU-11c0"]),
        # CUDA ends at the name that it does not know
        ("cuda", "1,9,0", 1, ["1"]),
        ("cuda", "3", 1, ["3"]),
        ("cuda:1", None, 4, []),
        ("cuda:0", "6,2", 2, []),
        ("cpu", None, 4, []),
    ],
)
def test_gpus_that_processes_share_out(
    name: str, visible: str | None, count: int, found: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert device.spread(torch.device(name)) == found


@pytest.mark.parametrize("clock", ["thread_time", "perf_counter"])
def test_speed_is_the_median_of_timings(clock: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds of single products: the first compiles, some are disturbed, one is too good to be true."""
    seconds = [90.0, 2.0, 2.0, 40.0, 2.0, 0.1, 2.0, 40.0, 2.0]
    assert len(seconds) == device.TIMINGS
    # each timing begins at the end of the one before
    ticks = [
        tick for end, passed in zip(itertools.accumulate(seconds), seconds, strict=True) for tick in (end - passed, end)
    ]
    if clock == "perf_counter":
        monkeypatch.setattr(device, "_clock", lambda _: contextlib.nullcontext((time.perf_counter, 1)))
    monkeypatch.setattr(time, clock, iter(ticks).__next__)
    threads = torch.get_num_threads() if clock == "thread_time" else 1
    assert device.measured_flops(CPU, "float32") == pytest.approx(threads * 2 * 512**3 / 2)


def test_short_products_are_timed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "thread_time", itertools.count(0, 0.004).__next__)
    # of a clock that moves in steps of 4 ms, three products in 12 ms
    assert device.measured_flops(CPU, "float32") == pytest.approx(torch.get_num_threads() * 2 * 512**3 / 0.004)


def test_a_measurement_leaves_the_threads_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    before, during = torch.get_num_threads(), set[int]()
    timed = device._timing

    def note(*arguments: Any) -> float:
        during.add(torch.get_num_threads())
        return timed(*arguments)

    monkeypatch.setattr(device, "_timing", note)
    torch.set_num_threads(2)
    try:
        device.measured_flops(CPU, "float32")
        assert during == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs several GPUs")
def test_a_kernel_runs_on_the_gpu_in_use() -> None:
    drawn = torch.randn(3, 1, 256, 2, 64, generator=torch.Generator().manual_seed(0))
    found = []
    try:
        for name in ("cuda:0", "cuda:1"):
            q, k, v = drawn.to(device.pick(name), torch.bfloat16)
            found.append(stick_breaking.attention(q, k, v)[0].cpu())
    finally:
        torch.cuda.set_device(0)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
