"""Means with standard errors."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value from n independent units (documents, sequences) and its standard error, None for a single unit."""

    value: float
    stderr: float | None
    n: int


def mean(values: Floats) -> Estimate:
    """Mean of one value a unit, (n,)."""
    n = len(values)
    return Estimate(float(values.mean()), float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else None, n)


def ratio(numerators: Floats, denominators: Floats) -> Estimate:
    """Sum of numerators over sum of denominators, (n,) each; the standard error is that of the linearised ratio.

    Units with denominator 0 tell nothing and do not count.
    """
    counted = denominators > 0
    numerators, denominators = numerators[counted], denominators[counted]
    value = float(numerators.sum() / denominators.sum())
    return Estimate(value, mean((numerators - value * denominators) / denominators.mean()).stderr, len(numerators))
