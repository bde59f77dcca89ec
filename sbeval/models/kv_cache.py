"""The key-value cache: each new token costs one step.

Prompts are read packed, without padding. Their keys are stored right-aligned: row b fills the slots starts[b] ...
length - 1, so that all rows take their next token at the same slot. Slots before a row's start are zero and not seen.

    prompts   a b c, d e        packed   a b c d e        slots   a b c _        starts   0
              lengths 3, 2               cu_seqlens 0 3 5         0 d e _                 1
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


class Rows:
    """Slots of the rows of a batch: `length` in use, 0 until the prompts are read, of `capacity`."""

    def __init__(self, lengths: Sequence[int], room: int, device: torch.device) -> None:
        longest, counts = max(lengths), torch.tensor(lengths)
        self.length, self.longest, self.capacity = 0, longest, longest + room
        self.starts = (longest - counts).int().to(device)
        self.cu_seqlens = F.pad(counts.cumsum(0), (1, 0)).int().to(device)
        # of each packed token: its position in its row, and its slot in the flattened (B, capacity) slots
        positions = torch.cat([torch.arange(count) for count in lengths])
        first = torch.arange(len(lengths)) * self.capacity + longest - counts
        self.positions = positions.to(device)[None]
        self.slots = (positions + first.repeat_interleave(counts)).to(device)

    def next_positions(self) -> Tensor:
        """Return the positions (B, 1), each in its row, of the next tokens."""
        return self.length - self.starts[:, None]


class Layer:
    """The cache of one layer, which its mixer fills and reads."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._tensors: list[Tensor] = []
        self._last: Tensor | None = None

    @property
    def past(self) -> int:
        """Return the number of slots filled before the new tokens."""
        return self._rows.length

    @property
    def starts(self) -> Tensor | None:
        """Return the first slot of each row, int32 (B,); None while the prompts are read, which are packed."""
        return self._rows.starts if self._rows.length else None

    def add(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Store tensors of new tokens, such as keys and values, and return those of all tokens.

        Prompts, (1, N, ...), are returned as given. After them takes (B, 1, ...) and returns (B, S, ...), the new
        token's last.
        """
        rows = self._rows
        if not rows.length:
            self._tensors = [self._aligned(x) for x in new]
            return new
        for stored, x in zip(self._tensors, new, strict=True):
            stored[:, rows.length] = x[:, 0]
        return tuple(stored[:, : rows.length + 1] for stored in self._tensors)

    def last(self, new: Tensor) -> Tensor | None:
        """Return what the last call was given for each row's last token, (B, 1, ...), and keep that of `new`.

        new: of prompts (1, N, ...), where there is no last call, or of the next token of each row, (B, 1, ...).
        """
        before = self._last
        self._last = new if self._rows.length else new[0, self._rows.cu_seqlens[1:].long() - 1][:, None]
        return before

    def _aligned(self, packed: Tensor) -> Tensor:
        size = len(self._rows.starts), self._rows.capacity
        # unseen slots must be finite: they are multiplied by weights of 0
        slots = packed.new_zeros(size[0] * size[1], *packed.shape[2:])
        slots[self._rows.slots] = packed[0]
        return slots.view(*size, *packed.shape[2:])

    def grow(self, room: int) -> None:
        """Add `room` slots to each row."""
        self._tensors = [torch.cat([x, x.new_zeros(len(x), room, *x.shape[2:])], 1) for x in self._tensors]

    def reorder(self, order: Tensor) -> None:
        """Replace row b by row order[b]."""
        self._tensors = [stored[order] for stored in self._tensors]
        self._last = None if self._last is None else self._last[order]


def through(layer: Layer | None, *new: Tensor) -> tuple[Tensor | None, tuple[Tensor, ...]]:
    """Return the first slots of the rows and the result of `add`; without a cache None and `new`."""
    return (None, new) if layer is None else (layer.starts, layer.add(*new))


class Cache:
    """The cache of all layers for prompts of these lengths, with room for `room` further tokens in each row."""

    def __init__(self, lengths: Sequence[int], *, room: int, layers: int, device: torch.device) -> None:
        assert lengths and min(lengths) > 0
        self.rows = Rows(lengths, room, device)
        self.layers = [Layer(self.rows) for _ in range(layers)]

    def advance(self) -> None:
        """Count the tokens that all layers have just added."""
        rows = self.rows
        rows.length = rows.length + 1 if rows.length else rows.longest
        assert rows.length <= rows.capacity

    def grow(self, room: int) -> None:
        """Make room for `room` more tokens in each row."""
        self.rows.capacity += room
        for layer in self.layers:
            layer.grow(room)

    def reorder(self, order: Tensor) -> None:
        """Replace row b by row order[b], as beam search needs."""
        self.rows.starts = self.rows.starts[order]
        for layer in self.layers:
            layer.reorder(order)
