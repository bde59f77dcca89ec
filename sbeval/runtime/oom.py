"""Where a device's memory ends: fewer at a time, and a line that says how many."""

import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

Item = TypeVar("Item")


def enough(work: Callable[[], None]) -> bool:
    """Do the work; False when memory ran out, and what the work held is given back."""
    try:
        work()
        return True
    except torch.OutOfMemoryError:
        pass
    # after the error, whose frames held what there was
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return False


def in_parts(
    items: Sequence[Item], size: int, work: Callable[[Sequence[Item]], None], say: Callable[[str], None]
) -> None:
    """Give `work` all items in their order, `size` at a time; where memory runs out, half as many from there on.

    torch.OutOfMemoryError when a single one does not fit.
    """
    start = 0
    while start < len(items):
        part = items[start : start + size]
        if enough(functools.partial(work, part)):
            start += len(part)
        elif len(part) == 1:
            raise torch.OutOfMemoryError("out of memory at one at a time: nothing smaller is left to try")
        else:
            size = len(part) // 2
            say(f"out of memory at {len(part)} at a time: going on with {size}")
