"""Parts that do not fit into memory are halved until they do."""

from collections.abc import Callable, Sequence

import pytest
import torch

from sbeval.runtime import oom


def limited(limit: int, taken: list[int]) -> Callable[[Sequence[int]], None]:
    """Return work that runs out of memory at more than `limit` items at a time."""

    def work(part: Sequence[int]) -> None:
        if len(part) > limit:
            raise torch.OutOfMemoryError
        taken.extend(part)

    return work


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 100])
def test_parts_are_all_items_once(limit: int) -> None:
    taken: list[int] = []
    oom.in_parts(range(23), 16, limited(limit, taken), lambda _: None)
    assert taken == list(range(23))


def test_each_halving_is_said_and_lasts() -> None:
    lines: list[str] = []
    oom.in_parts(range(40), 16, limited(5, []), lines.append)
    assert lines == [
        "out of memory at 16 at a time: continuing with 8",
        "out of memory at 8 at a time: continuing with 4",
    ]


def test_a_single_item_that_does_not_fit_ends_it() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="with a single item"):
        oom.in_parts(range(3), 2, limited(0, []), lambda _: None)


@pytest.mark.parametrize(("limit", "fits"), [(1, 1), (3, 3), (5, 3), (12, 12), (100, 12)])
def test_the_largest_half_that_fits_is_taken(limit: int, fits: int) -> None:
    lines: list[str] = []

    def work(size: int) -> str:
        limited(limit, [])(range(size))
        return f"done at {size}"

    assert oom.fitting(12, work, lines.append) == (fits, f"done at {fits}")
    assert len(lines) == {12: 0, 3: 2, 1: 3}[fits]


def test_one_that_does_not_fit_ends_it() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="nothing smaller is left"):
        oom.fitting(4, lambda size: limited(0, [])(range(size)), lambda _: None)


def test_only_a_lack_of_memory_is_tried_again() -> None:
    def work() -> None:
        raise RuntimeError("another error")

    assert oom.enough(lambda: None) and not oom.enough(lambda: limited(0, [])([1]))
    with pytest.raises(RuntimeError, match="another error"):
        oom.enough(work)
