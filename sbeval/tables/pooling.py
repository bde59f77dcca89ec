"""The standard deviation over seeds, pooled over the methods of a setting, as each has few.

A method whose seeds vary more than the others' by Cochran's test (ISO 5725-2, 5 %) keeps its own, along a curve at all
points if at one.
"""

import math
from collections.abc import Iterable, Mapping, Set

from scipy import special

from sbeval.tables.rows import Method
from sbeval.tables.statistics import UNKNOWN, Sample, Spread

# a method's seeds vary more than the others' at this level of Cochran's test
OUTLYING = 0.05
# a model that is evaluated in another way, without training, is not another sample of seeds
SAME_WEIGHTS = "scaling="


def spreads(samples: Mapping[Method, Sample], apart: Set[Method] | None = None) -> dict[Method, Spread]:
    """Return the standard deviation over seeds that each method's interval takes: pooled, or its own (`outlying`).

    A method with one seed takes the pooled one. apart: the methods that keep their own, where other points decide too.
    """
    apart = outlying([samples]) if apart is None else apart
    own, common = _own(samples), pooled(samples, apart)
    return {of: own[of] if of in apart and of in own else common for of in samples}


def pooled(samples: Mapping[Method, Sample], apart: Set[Method] | None = None) -> Spread:
    """Return the standard deviation over seeds, pooled over the methods of a setting that do not keep their own."""
    apart = outlying([samples]) if apart is None else apart
    return _pooled(one for of, one in _own(samples).items() if of not in apart and SAME_WEIGHTS not in of[1])


def outlying(points: Iterable[Mapping[Method, Sample]]) -> Set[Method]:
    """Return the methods whose seeds vary more than the others' at some point of a curve; these keep their own
    standard deviation at all of its points.

    Each point is tested alone, and they share the level: many points find no more by chance than one does.
    """
    points = list(points)
    return {of for samples in points for of in _outlying(_own(samples), OUTLYING / len(points))}


def _outlying(own: Mapping[Method, Spread], level: float) -> Set[Method]:
    """Return the methods that vary more at one point; those with SAME_WEIGHTS are tested, but never pooled."""
    pool = {of: one for of, one in own.items() if SAME_WEIGHTS not in of[1]}
    while (widest := _widest(pool, level)) is not None:
        del pool[widest]
    common = _pooled(pool.values())
    same = {
        of
        for of, one in own.items()
        if SAME_WEIGHTS in of[1] and common.freedom and _excess(one, common) >= level / (len(pool) + 1)
    }
    return own.keys() - pool.keys() - same


def _own(samples: Mapping[Method, Sample]) -> dict[Method, Spread]:
    return {of: one.own for of, one in samples.items() if one.seeds > 1}


def _widest(pool: Mapping[Method, Spread], level: float) -> Method | None:
    """Return the method with the largest standard deviation if Cochran's test rejects it, with unequal numbers too."""
    if len(pool) < 2:
        return None
    widest = max(pool, key=lambda of: pool[of].sd)
    rest = _pooled(spread for of, spread in pool.items() if of != widest)
    return widest if _excess(pool[widest], rest) < level / len(pool) else None


def _excess(one: Spread, rest: Spread) -> float:
    """Return the p value of `one` being wider than `rest`, by an F test."""
    if rest.sd == 0:
        return 1.0 if one.sd == 0 else 0.0
    return float(special.fdtrc(one.freedom, rest.freedom, (one.sd / rest.sd) ** 2))


def _pooled(parts: Iterable[Spread]) -> Spread:
    parts = list(parts)
    freedom = sum(part.freedom for part in parts)
    squares = sum(part.freedom * part.sd**2 for part in parts)
    return Spread(math.sqrt(squares / freedom), freedom) if freedom else UNKNOWN
