"""The cost of a sweep: FLOPs of its steps, and the time that they take on a device, as least and most."""

from collections.abc import Iterable, Mapping, Sequence

import torch

from sbeval.runtime import device
from sbeval.sweep.cell import Step, TrainingStep
from sbeval.sweep.context import RunContext
from sbeval.sweep.executor import Executor
from sbeval.sweep.graph import steps

# throughput of a model relative to a large matrix product, least and most: on a GPU that of the models in results/
EFFICIENCY = {"cpu": (0.2, 0.5), "cuda": (0.12, 0.4)}
# models no wider than this keep a GPU waiting
NARROW, NARROW_EFFICIENCY = 256, (0.006, 0.15)
# from which on an estimate comes with advice
YEAR_S = 365 * 86400
IMPRACTICAL_S = 60 * 86400
# least and most
Span = tuple[float, float]


def speeds(parts: Sequence[Step], place: torch.device) -> dict[str, float]:
    """Measure the FLOP/s of a matrix product in each dtype of the steps."""
    return {dtype: device.measured_flops(place, dtype) for dtype in {step.dtype for step in parts}}


def seconds(parts: Sequence[Step], speeds: Mapping[str, float], place: torch.device) -> list[Span]:
    """Estimate the seconds that one process takes for each step, least and most."""
    found = []
    for step in parts:
        ideal = step.flops / speeds[step.dtype]
        low, high = _efficiency(step, place)
        found.append((ideal / high, ideal / low))
    return found


def _efficiency(step: Step, place: torch.device) -> Span:
    narrow = place.type == "cuda" and step.leaves is not None and step.leaves.width <= NARROW
    return NARROW_EFFICIENCY if narrow else EFFICIENCY[place.type]


def total(spans: Iterable[Span]) -> Span:
    """Return the sum of times that are known as least and most."""
    each = list(spans)
    return sum(low for low, _ in each), sum(high for _, high in each)


def untrained(parts: Sequence[Step], context: RunContext) -> list[Step]:
    """Return the steps without trainings whose finished checkpoint is there, unless the context forces them."""
    if context.force:
        return list(parts)
    return [step for step in parts if not (isinstance(step, TrainingStep) and step.trained(context))]


def at_once(executor: Executor, context: RunContext) -> int:
    """Return the number of GPUs on which the workers run cells; 1 on a CPU, whose cores they share."""
    return max(1, min(executor.workers or 1, len(device.spread(context.device))))


def describe(cells: Sequence[Step], context: RunContext, at_once: int = 1) -> str:
    """Describe the cost of the cells: FLOPs and a rough time; shared dependencies count once.

    at_once: number of GPUs that run cells in parallel.
    """
    if not cells:
        return "nothing to run"
    every = steps(cells)
    parts = untrained(every, context)
    what = "model{} to train" if all(isinstance(step, TrainingStep) for step in cells) else "cell{} to run"
    count = f"{len(cells)} {what.format('s' * (len(cells) > 1))}"
    if not any(step.flops for step in every):
        # the size of a model on the hub is unknown before its download
        return f"{count}, at a cost that is not known yet"
    at_once = min(at_once, len(cells)) * context.world.size
    low, high = total(seconds(parts, speeds(parts, context.device), context.device))
    low, high = low / at_once, high / at_once
    devices = f"{at_once} x " if at_once > 1 else ""
    where = f"{devices}{device.describe(context.device)}"
    trained = len(every) - len(parts)
    without = f" without {trained} model{'s' if trained > 1 else ''} trained already" if trained else ""
    cost = f"{count}, {sum(step.flops for step in parts):.1e} FLOPs{without}: "
    if low > IMPRACTICAL_S:
        return f"{cost}not practical on {where}, {span(low, high)}; a smaller --preset or more devices would do"
    return f"{cost}roughly {span(low, high)} on {where}"


def span(low_s: float, high_s: float) -> str:
    """Format a duration that is known as least and most: `3 to 12 min`."""
    low, high = in_words(low_s), in_words(high_s)
    if low == high:
        return low
    return f"{low.split()[0] if low.split()[1] == high.split()[1] else low} to {high}"


def in_words(time_s: float) -> str:
    """Format a duration."""
    if time_s < 90:
        return f"{max(1, round(time_s))} s"
    if time_s < 5400:
        return f"{round(time_s / 60)} min"
    if time_s < 172800:
        return f"{time_s / 3600:.1f} h"
    return f"{time_s / 86400:.0f} days" if time_s < 2 * YEAR_S else f"{time_s / YEAR_S:,.0f} years"
