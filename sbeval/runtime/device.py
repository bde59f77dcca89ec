"""Devices: selection, dtypes and speed."""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from sbeval import config
from sbeval.errors import InputError, choose

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in config.DTYPES}
# dense bfloat16 matrix products, TFLOP/s, from the vendor's datasheets
PEAK_TFLOPS = {"A100": 312, "H100": 989, "H200": 989, "H800": 989, "L40S": 362, "B200": 2250}
# number of timings whose median is taken, and the minimum seconds of one
TIMINGS, TIMING_S = 9, 0.01


def pick(name: str | None) -> torch.device:
    """Select the device `name` (`cpu`, `cuda`, `cuda:1`) and return it; None: the GPU if there is one."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, colon, index = name.partition(":")
    choose("device", kind, ("cpu", "cuda"))
    if colon and not (index.isascii() and index.isdigit()):
        raise InputError(f"unknown device {name!r}; a device is cpu, cuda or cuda:0, cuda:1, ...")
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"--device {name}: PyTorch {torch.__version__} sees no GPU here; leave --device out to run on cpu"
        )
    if kind == "cuda" and index and int(index) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: this machine has GPUs 0 to {torch.cuda.device_count() - 1}")
    device = torch.device(name)
    use(device)
    return device


def pick_dtype(name: str | None, device: torch.device) -> str:
    """Return the dtype of matrix products: `name`, by default bfloat16 on a GPU and float32 on a CPU."""
    if name is None:
        return "bfloat16" if device.type == "cuda" else "float32"
    return choose("dtype", name, DTYPES)


def use(device: torch.device) -> None:
    """Make an indexed GPU the current device, on which Triton launches regardless of where the tensors are."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def spread(device: torch.device) -> list[str]:
    """Return the GPUs for worker processes, as named in CUDA_VISIBLE_DEVICES: all visible ones for `cuda`.

    Empty for an indexed GPU (`cuda:1`), which is meant alone, and for a CPU.
    """
    if device != torch.device("cuda"):
        return []
    visible, count = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count()
    names = [str(index) for index in range(count)] if visible is None else visible.split(",")
    # CUDA ignores names from the first unknown one on
    return [name.strip() for name in names[:count]]


def describe(device: torch.device) -> str:
    """Return the name of the device in result tables."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.get_num_threads()} threads)"


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """Return a context in which matrix products run in `dtype`."""
    return torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32")


def peak_flops(device: torch.device) -> float | None:
    """Return the datasheet FLOP/s of dense bfloat16 products; None if unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tera * 1e12 for key, tera in PEAK_TFLOPS.items() if key in name), None)


def measured_flops(device: torch.device, dtype: str) -> float:
    """Measure the FLOP/s of a matrix product of medium size in a fraction of a second, for cost estimates.

    The median of several short timings. On a CPU it is the CPU time of one thread, times the number of threads: on a
    busy machine threads wait for each other, and the wall time of a product is many times the time that it needs.
    """
    size = 4096 if device.type == "cuda" else 512
    a = torch.randn(size, size, device=device, dtype=DTYPES[dtype])
    with _clock(device) as (clock, threads):
        return threads * 2 * size**3 / statistics.median(_timing(a, clock) for _ in range(TIMINGS))


def _timing(a: torch.Tensor, clock: Callable[[], float]) -> float:
    """Return the seconds of a product, averaged over as many as the resolution of the clock requires."""
    start, passed, count = clock(), 0.0, 0
    while passed < TIMING_S:
        (a @ a)[0, 0].item()
        passed, count = clock() - start, count + 1
    return passed / count


@contextmanager
def _clock(device: torch.device) -> Iterator[tuple[Callable[[], float], int]]:
    """Yield a clock in seconds, and the number of threads that its time is to be multiplied by."""
    if device.type == "cuda":
        yield time.perf_counter, 1
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield time.thread_time, threads
    finally:
        torch.set_num_threads(threads)
