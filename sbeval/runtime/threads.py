"""Threads on the CPU: as many as train fastest on this machine, as busy as it is.

The threads of a product wait for the slowest of them. On a machine of two cores that others keep busy, training with
two threads was 3 to 6 times slower than with one; on an idle one two are faster.

Sums depend on the number of threads in their last bits. So that a run that was stopped gives the same numbers when it
goes on, the number that was chosen is kept in the results folder until the run is complete.
"""

import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from sbeval.config import AUTO
from sbeval.errors import InputError, reading
from sbeval.runtime.files import prepare, replacing

# timings of each number of threads, of which the median counts, by turns
TIMINGS = 7
# tokens, width and inner width of the block that is timed: those of the smallest model of text
BLOCK = (1024, 160, 432)


@contextmanager
def used(wanted: str, device: torch.device, kept: Path, workers: int | None = None) -> Iterator[None]:
    """Set the threads of this process and, by the environment, of the workers, which share them.

    wanted: a number, or AUTO: that in the file `kept`, which an interrupted run has left, else the fastest. AUTO leaves
    the threads as they are on a GPU, or where OMP_NUM_THREADS has a number.
    """
    if wanted != AUTO:
        _set(_number(wanted))
        yield
        return
    if device.type != "cpu" or os.environ.get("OMP_NUM_THREADS"):
        yield
        return
    if kept.exists():
        with reading(kept):
            count = max(1, int(kept.read_text(encoding="ascii")))
    else:
        workers = workers or 1
        count = workers * fastest(torch.get_num_threads() // workers)
        prepare(kept.parent)
        with replacing(kept) as temporary:
            temporary.write_text(f"{count}\n", encoding="ascii")
    _set(count)
    yield
    # not after an error: the same command goes on
    kept.unlink(missing_ok=True)


def fastest(most: int) -> int:
    """Return the number of threads, up to `most`, with which a block trains fastest now; of equal ones the fewer."""
    counts = [1 << power for power in range(max(1, most).bit_length())]
    counts += [most] if most > counts[-1] else []
    if len(counts) == 1:
        return 1
    tokens, width, hidden = BLOCK
    block = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
    x = torch.randn(tokens, width)
    before = torch.get_num_threads()
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    try:
        for _ in range(TIMINGS):
            for count in counts:
                torch.set_num_threads(count)
                seconds[count].append(_seconds(block, x))
    finally:
        torch.set_num_threads(before)
    # the first of each starts threads
    return min(counts, key=lambda count: statistics.median(seconds[count][1:]))


def _seconds(block: nn.Module, x: Tensor) -> float:
    start = time.perf_counter()
    block(x).sum().backward()
    return time.perf_counter() - start


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise InputError(f"--threads must be {AUTO}, or a number of at least 1; got {text}")
    return int(text)


def _set(count: int) -> None:
    os.environ["OMP_NUM_THREADS"] = str(count)
    torch.set_num_threads(count)
