"""Packed prompts fill slots from the right, new tokens follow them, and rows change places with all they hold."""

import pytest
import torch
from torch import Tensor

from sbeval.models.kv_cache import Cache, through

CPU = torch.device("cpu")
LENGTHS = [3, 1, 2]
# the token at position i of row b is 10 b + i + 1
PACKED = torch.tensor([1, 2, 3, 11, 21, 22])[None, :, None].double()


def filled(room: int = 2) -> tuple[Cache, Tensor]:
    cache = Cache(LENGTHS, room=room, layers=2, device=CPU)
    for layer in cache.layers:
        (given,) = layer.add(PACKED)
        # prompts attend to themselves, packed
        assert given is PACKED and layer.starts is None and layer.past == 0
    cache.advance()
    return cache, torch.tensor([4, 12, 23])[:, None, None].double()


def test_prompts_are_aligned_at_the_right_and_the_slots_before_are_zero() -> None:
    cache, new = filled()
    assert cache.rows.cu_seqlens.tolist() == [0, 3, 4, 6] and cache.rows.positions.tolist() == [[0, 1, 2, 0, 0, 1]]
    assert cache.layers[0].past == 3 and cache.rows.next_positions().tolist() == [[3], [1], [2]]
    starts, (rows,) = through(cache.layers[0], new)
    assert starts is not None and starts.tolist() == [0, 2, 1]
    assert rows[..., 0].tolist() == [[1, 2, 3, 4], [0, 0, 11, 12], [0, 21, 22, 23]]


def test_rows_that_change_places_take_their_starts_along() -> None:
    cache, new = filled()
    cache.reorder(torch.tensor([2, 2, 0]))
    (rows,) = cache.layers[1].add(new)
    assert rows[..., 0].tolist() == [[0, 21, 22, 4], [0, 21, 22, 12], [1, 2, 3, 23]]
    assert cache.layers[1].starts is not None and cache.layers[1].starts.tolist() == [1, 1, 0]


def test_room_is_counted_and_can_be_added() -> None:
    cache, new = filled(room=1)
    for layer in cache.layers:
        layer.add(new)
    cache.advance()
    with pytest.raises(AssertionError):
        cache.advance()
    cache, _ = filled(room=0)
    cache.grow(1)
    (rows,) = cache.layers[0].add(new)
    cache.advance()
    assert rows.shape == (3, 4, 1) and cache.rows.capacity == cache.rows.length == 4


def test_the_last_of_each_row_is_kept_and_changes_places_with_it() -> None:
    cache = Cache(LENGTHS, room=2, layers=1, device=CPU)
    (layer,) = cache.layers
    assert layer.last(PACKED) is None
    cache.advance()
    cache.reorder(torch.tensor([2, 1, 0]))
    new = torch.tensor([23, 12, 4])[:, None, None].double()
    last = layer.last(new)
    assert last is not None and last.flatten().tolist() == [22, 11, 3]
    assert layer.last(new) is new


def test_without_a_cache_tensors_pass_through() -> None:
    starts, (given,) = through(None, PACKED)
    assert starts is None and given is PACKED
