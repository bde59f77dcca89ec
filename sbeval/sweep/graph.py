"""The dependency graph of a sweep: a step that several cells need runs once, before them.

    train rope seed 0 ---+--- length_gen rope seed 0
                         +--- few_shot rope seed 0 copa
                         +--- fine-tune rope seed 0 ---+--- needle rope seed 0 vt
                                                       +--- needle rope seed 0 cwe

A step that only one cell needs runs as part of that cell.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from sbeval.sweep.cell import Step


def steps(cells: Sequence[Step]) -> list[Step]:
    """Return the cells and their dependencies, without duplicates, in topological order."""
    return list(dict.fromkeys(step for cell in cells for step in (*cell.needs, cell)))


class Graph:
    """Steps that wait for their dependencies."""

    def __init__(self) -> None:
        self._after: dict[Step, list[Step]] = {}

    def add(self, cells: Sequence[Step]) -> list[Step]:
        """Add cells and return the steps that are ready."""
        count = Counter(need for cell in cells for need in cell.needs)
        own, ready = set(cells), dict[Step, None]()
        for cell in cells:
            # a dependency that is itself a cell of this sweep runs as a cell
            path = [*(need for need in cell.needs if count[need] > 1 or need in own), cell]
            ready.setdefault(path[0])
            for first, second in pairwise(path):
                after = self._after.setdefault(first, [])
                if second not in after:
                    after.append(second)
        return list(ready)

    def done(self, step: Step) -> list[Step]:
        """Mark a step as done and return the steps that are now ready."""
        return self._after.pop(step, [])

    def lost(self, step: Step) -> list[Step]:
        """Mark a step as failed and return all steps that depend on it."""
        return [lost for after in self._after.pop(step, []) for lost in (after, *self.lost(after))]
