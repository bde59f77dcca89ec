"""Out-of-memory handling: halve the batch and retry."""

import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def enough(work: Callable[[], None]) -> bool:
    """Run `work`; return False if it ran out of memory, after releasing its tensors."""
    try:
        work()
        return True
    except torch.OutOfMemoryError:
        pass
    # only now has the traceback released the tensors
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return False


def in_parts(
    items: Sequence[Item], size: int, work: Callable[[Sequence[Item]], None], say: Callable[[str], None]
) -> int:
    """Pass all items to `work` in order, `size` at a time; when out of memory, continue with half as many.

    Return how many at a time fitted. Raise torch.OutOfMemoryError if a single item does not fit.
    """
    start = 0
    while start < len(items):
        part = items[start : start + size]
        if enough(functools.partial(work, part)):
            start += len(part)
        elif len(part) == 1:
            raise torch.OutOfMemoryError("out of memory with a single item: nothing smaller is left to try")
        else:
            size = len(part) // 2
            say(f"out of memory at {len(part)} at a time: continuing with {size}")
    return size


def fitting(size: int, work: Callable[[int], Result], say: Callable[[str], None]) -> tuple[int, Result]:
    """Return the largest of `size`, half of it, and so on, for which `work` fits into memory, and its result.

    Raise torch.OutOfMemoryError if 1 does not fit.
    """
    results: list[Result] = []
    while not enough(lambda tried=size: results.append(work(tried))):  # type: ignore[misc]
        if size == 1:
            raise torch.OutOfMemoryError("out of memory at 1: nothing smaller is left to try")
        say(f"out of memory at {size} at a time: continuing with {size // 2}")
        size //= 2
    return size, results[0]
