"""What a model keeps of the tokens that it has read, so that each further token costs one step.

Prompts are read packed, without padding. Their keys are kept right-aligned: row b fills the slots starts[b] ...
length - 1, so that all rows take their next token at one slot, and none sees what lies before its start, which is zero.

    prompts   a b c, d e        packed   a b c d e        slots   a b c _        starts   0
              lengths 3, 2               cu_seqlens 0 3 5         0 d e _                 1
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


class Rows:
    """Where the rows of a batch stand. `length` is of slots in use, 0 until the prompts are read; of `capacity`."""

    def __init__(self, lengths: Sequence[int], room: int, device: torch.device) -> None:
        longest, counts = max(lengths), torch.tensor(lengths)
        self.length, self.longest, self.capacity = 0, longest, longest + room
        self.starts = (longest - counts).int().to(device)
        self.cu_seqlens = F.pad(counts.cumsum(0), (1, 0)).int().to(device)
        # of each packed token: its position in its row, and its slot in the flattened (B, capacity) slots
        places = torch.cat([torch.arange(count) for count in lengths])
        first = torch.arange(len(lengths)) * self.capacity + longest - counts
        self.places = places.to(device)[None]
        self.slots = (places + first.repeat_interleave(counts)).to(device)

    def next_places(self) -> Tensor:
        """Positions (B, 1), each in its row, of the tokens that come next."""
        return self.length - self.starts[:, None]


class Layer:
    """The part of a cache that one layer's mixer fills and reads."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._kept: list[Tensor] = []

    @property
    def past(self) -> int:
        """Slots that are filled before what comes now."""
        return self._rows.length

    @property
    def starts(self) -> Tensor | None:
        """First slot of each row, int32 (B,); None while the prompts are read, which come packed."""
        return self._rows.starts if self._rows.length else None

    def add(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Keep what there is to keep of new tokens, and return that of all.

        Of prompts, (1, N, ...), it returns what it is given. After them it takes (B, 1, ...) and returns (B, S, ...),
        the new token's last.
        """
        rows = self._rows
        if not rows.length:
            self._kept = [self._aligned(x) for x in new]
            return new
        for kept, x in zip(self._kept, new, strict=True):
            kept[:, rows.length] = x[:, 0]
        return tuple(kept[:, : rows.length + 1] for kept in self._kept)

    def _aligned(self, packed: Tensor) -> Tensor:
        size = len(self._rows.starts), self._rows.capacity
        # what no row sees must be finite: it is multiplied by weights of 0
        slots = packed.new_zeros(size[0] * size[1], *packed.shape[2:])
        slots[self._rows.slots] = packed[0]
        return slots.view(*size, *packed.shape[2:])

    def grow(self, room: int) -> None:
        """Add `room` slots to each row."""
        self._kept = [torch.cat([x, x.new_zeros(len(x), room, *x.shape[2:])], 1) for x in self._kept]

    def reorder(self, order: Tensor) -> None:
        """Put row order[b] where row b is."""
        self._kept = [kept[order] for kept in self._kept]


def through(layer: Layer | None, *new: Tensor) -> tuple[Tensor | None, tuple[Tensor, ...]]:
    """The first slots of the rows and what `add` returns; without a cache None, and what is given."""
    return (None, new) if layer is None else (layer.starts, layer.add(*new))


class Cache:
    """What all layers keep of prompts of these lengths, with room for so many further tokens in each row."""

    def __init__(self, lengths: Sequence[int], *, room: int, layers: int, device: torch.device) -> None:
        assert lengths and min(lengths) > 0
        self.rows = Rows(lengths, room, device)
        self.layers = [Layer(self.rows) for _ in range(layers)]

    def advance(self) -> None:
        """All layers have added their part of what came last."""
        rows = self.rows
        rows.length = rows.length + 1 if rows.length else rows.longest
        assert rows.length <= rows.capacity

    def grow(self, room: int) -> None:
        """Make room for so many more tokens in each row."""
        self.rows.capacity += room
        for layer in self.layers:
            layer.grow(room)

    def reorder(self, order: Tensor) -> None:
        """Put row order[b] where row b is, as beam search asks."""
        self.rows.starts = self.rows.starts[order]
        for layer in self.layers:
            layer.reorder(order)
