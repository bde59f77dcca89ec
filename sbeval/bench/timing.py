"""How long a step takes on a GPU."""

import time
from collections.abc import Callable

import torch

from sbeval.errors import InputError

# steps that are queued while the device waits: no more than its queue holds
QUEUED = 16
# cycles of a multiprocessor in a second, at most
CYCLES = 3e9


def needs_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise InputError(f"benchmarks need a GPU; this device is {device.type}")


def timed(step: Callable[[], object], *, decodes: bool = False) -> dict[str, float]:
    """Return the median time that a step takes on the device in ms, `time`, and its quantiles, over a tenth of a second
    and at least ten steps, each with an empty L2 cache. How long Python takes to launch a step is left out for all
    contenders: the device waits while steps are queued for it, and decoding runs from a captured CUDA graph."""
    from triton.runtime import driver

    run = captured(step) if decodes else step
    cache = driver.active.get_empty_cache_for_benchmark()
    run()
    torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    launched = time.perf_counter() - began
    torch.cuda.synchronize()
    repeats = min(max(round(0.1 / (time.perf_counter() - began)), 10), 400)
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for i in range(0, repeats, QUEUED):
        torch.cuda._sleep(round(launched * QUEUED * CYCLES))
        for start, end in marks[i : i + QUEUED]:
            cache.zero_()
            start.record()
            run()
            end.record()
    torch.cuda.synchronize()
    times = torch.tensor([start.elapsed_time(end) for start, end in marks], dtype=torch.float64)
    low, middle, high = times.quantile(times.new_tensor([0.2, 0.5, 0.8])).tolist()
    return {"time": middle, "time_q20": low, "time_q80": high}


def captured(step: Callable[[], object]) -> Callable[[], object]:
    with torch.no_grad():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
    return graph.replay
