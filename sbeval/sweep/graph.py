"""The order of a sweep's steps: what several cells need is done once, before them.

    train rope seed 0 ---+--- length_gen rope seed 0
                         +--- few_shot rope seed 0 copa
                         +--- fine-tune rope seed 0 ---+--- needle rope seed 0 vt
                                                       +--- needle rope seed 0 cwe

What one cell alone needs it does itself, as part of its run.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from sbeval.sweep.cell import Step


def steps(cells: Sequence[Step]) -> list[Step]:
    """The cells and all that they need, each once, in an order in which they can be done."""
    return list(dict.fromkeys(step for cell in cells for step in (*cell.needs, cell)))


class Graph:
    """Cells, and what they share, that wait for others."""

    def __init__(self) -> None:
        self._after: dict[Step, list[Step]] = {}

    def add(self, cells: Sequence[Step]) -> list[Step]:
        """Take cells in, and return the steps that can begin."""
        count = Counter(need for cell in cells for need in cell.needs)
        own, begin = set(cells), dict[Step, None]()
        for cell in cells:
            # what is a cell here is run as that
            path = [*(need for need in cell.needs if count[need] > 1 or need in own), cell]
            begin.setdefault(path[0])
            for first, second in pairwise(path):
                after = self._after.setdefault(first, [])
                if second not in after:
                    after.append(second)
        return list(begin)

    def done(self, step: Step) -> list[Step]:
        """The steps that can begin when this one is done."""
        return self._after.pop(step, [])

    def lost(self, step: Step) -> list[Step]:
        """All steps that cannot begin any more because this one failed."""
        return [lost for after in self._after.pop(step, []) for lost in (after, *self.lost(after))]
