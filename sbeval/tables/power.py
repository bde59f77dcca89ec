"""How many seeds and documents find a given difference of two methods in ln perplexity, by a two-sided t test.

The difference of two means over n seeds and m documents has the variance 2 s²/n + d²/m: s is the standard deviation of
seeds, d that of the difference over documents, which are the same for both methods. Both come from results; s is then
an estimate, and power is its mean over the values of s that the estimate allows (O'Hagan et al. 2005, "assurance").

The score of a benchmark is the same with items for documents. Where their values are not stored, d is that of answers
that do not correlate, which is larger.
"""

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import special, stats

from sbeval.errors import InputError, choose
from sbeval.tables import documents, few_shot, intervals, pooling, selection, statistics, table, values
from sbeval.tables.pairs import Stored
from sbeval.tables.power_options import Config
from sbeval.tables.results import Results
from sbeval.tables.statistics import Scale, Spread

# of length_gen
COLUMNS = ("attention", "options", "seed", "metric", "value", "stderr", "context_length", *selection.LENGTH_GEN.columns)
# points at which the distribution of an estimated standard deviation is averaged
POINTS = 200
# seeds that no one trains
MOST = 1000
# a difference of so many standard deviations is found whatever the level
CERTAIN = 1e4


@dataclass(frozen=True, slots=True)
class Noise:
    """Deviations, in nats/token or in a score: of seeds, and of a difference over documents or items (None: not known);
    their number."""

    seeds: Spread
    documents: float | None
    count: int


@dataclass(frozen=True, slots=True)
class Plan:
    """A table of seeds a method by difference and number of documents, and what it rests on."""

    headings: list[str]
    rows: list[list[str]]
    notes: list[str]


def plan(config: Config) -> Plan:
    """Return the seeds a method that find each difference, for each number of documents."""
    noise = measured(config)
    known = noise.documents is not None
    counts = config.documents or ((noise.count, 4 * noise.count) if known else (0,))
    rows = []
    for difference in config.to_find:
        for count in counts:
            over = (noise.documents or 0.0) ** 2 / count if known and count else 0.0
            found = seeds(difference, noise.seeds, over, config.power, config.alpha)
            rows.append([f"{difference:g}", f"{count}" if known else "", f"{found}" if found else "no number"])
    freedom = f", {noise.seeds.freedom} degrees of freedom" if noise.seeds.freedom < MOST else ""
    unit, of = ("score", "items") if config.benchmark else ("nats", "documents")
    notes = [f"Power {config.power:g} at level {config.alpha:g}; seeds vary by {noise.seeds.sd:.4f} {unit}{freedom}."]
    if known:
        notes.append(f"The difference of two methods varies over {of} by {noise.documents:.4f} {unit}.")
    else:
        notes.append(f"No values of {of} are stored for two methods: {of} are not counted (--document-sd).")
    return Plan([f"difference ({config.benchmark or 'nats/token'})", of, "seeds a method"], rows, notes)


def seeds(difference: float, spread: Spread, of_documents: float, power: float, alpha: float) -> int | None:
    """Return the fewest seeds of each of two methods that find a difference; None where no number does.

    of_documents: the variance of the difference over documents. An `alpha`-level test never finds what documents hide.
    """
    low, high = 2, 4
    while probability(high, difference, spread, of_documents, alpha) < power:
        low, high = high, 2 * high
        if low > MOST:
            return None
    while low < high:
        middle = (low + high) // 2
        if probability(middle, difference, spread, of_documents, alpha) < power:
            low = middle + 1
        else:
            high = middle
    return low


def probability(count: int, difference: float, spread: Spread, of_documents: float, alpha: float) -> float:
    """Return the probability that `count` seeds of each method find a difference: the power, or its mean over s."""
    freedom = 2 * (count - 1)
    quantile = float(special.stdtrit(freedom, 1 - alpha / 2))
    share = (np.arange(POINTS) + 0.5) / POINTS
    # an infinite number of degrees of freedom is a deviation that is known
    known = math.isinf(spread.freedom)
    squares = spread.sd**2 if known else spread.sd**2 * spread.freedom / special.chdtri(spread.freedom, share)
    deviations = np.sqrt(2 * np.asarray(squares) / count + of_documents)
    centers = difference / np.maximum(deviations, difference / CERTAIN)
    # the other tail mirrored: nct.cdf is NaN far below the center
    return float(np.mean(stats.nct.sf(quantile, freedom, centers) + stats.nct.sf(quantile, freedom, -centers)))


def measured(config: Config) -> Noise:
    """Return the deviations that are given, and for others those of the setting with the most seeds.

    Raise InputError where neither says how much seeds vary.
    """
    found = None
    results = Results(config.results_dir)
    path = results.table("few_shot" if config.benchmark else "length_gen")
    if (config.seed_sd is None or config.document_sd is None) and path.exists():
        found = _of_benchmark(results, config.benchmark) if config.benchmark else _of_results(path, config.results_dir)
    spread = found.seeds if found else statistics.UNKNOWN
    if config.seed_sd is not None:
        spread = Spread(config.seed_sd, math.inf)
    if spread.freedom == 0:
        lacks = "has no method with two seeds" if path.exists() else "is not there"
        raise InputError(f"{path} {lacks} to say how much seeds vary: give --seed-sd")
    over = config.document_sd if config.document_sd is not None else found.documents if found else None
    return Noise(spread, over, found.count if found else 16)


def _of_results(path: Path, results_dir: Path) -> Noise | None:
    rows = selection.at_training_length(table.read(path, required=COLUMNS))
    setting = selection.length_gen_setting(rows).columns
    settings = rows.groupby(setting, dropna=False)
    read = functools.partial(values.read, Results(results_dir))
    return _of_most_seeds(settings, Scale.LOG, lambda part: _over_documents(part, read))


def _of_most_seeds(
    settings: Iterable[tuple[Any, pd.DataFrame]], scale: Scale, over: Callable[[pd.DataFrame], float | None]
) -> Noise | None:
    """Return the noise of the setting with the most seeds; `over`: returns that over its documents or items."""
    found = [(part, intervals.samples(part, scale)) for _, part in settings]
    if not found:
        return None
    part, samples = max(found, key=lambda one: pooling.pooled(one[1]).freedom)
    return Noise(pooling.pooled(samples), over(part), min(sample.units for sample in samples.values()))


def _over_documents(rows: pd.DataFrame, read: Callable[[Iterable[str]], pd.DataFrame]) -> float | None:
    """Return the standard deviation over documents of the difference of two methods, of the mean over their seeds."""
    stored = read(rows["cell"])
    context = int(rows["context_length"].iloc[0])
    sums, tokens = (documents.sums(stored, name, context_length=context) for name in ("nll_sum", "tokens"))
    if sums.empty:
        return None
    losses = sums / tokens
    methods = rows.drop_duplicates("cell").set_index("cell")[["attention", "options"]].agg(":".join, axis=1)
    return _of_differences(losses.groupby(methods.reindex(losses.index)).mean().dropna(axis=1))


def _of_differences(means: pd.DataFrame) -> float | None:
    """Return the standard deviation over units (across) of the difference of two methods (down)."""
    if len(means) < 2 or means.shape[1] < 2:
        return None
    # the variance of a difference of two is twice that within the methods of a unit
    apart = means - means.mean()
    apart = apart.sub(apart.mean(axis=1), axis=0)
    freedom = (len(means) - 1) * (means.shape[1] - 1)
    return math.sqrt(2 * float((apart.to_numpy() ** 2).sum()) / freedom)


def _of_benchmark(results: Results, benchmark: str) -> Noise | None:
    rows = few_shot.headline(table.read(results.table("few_shot"), required=few_shot.COLUMNS))
    names = sorted(set(rows["task"]))
    rows = rows[rows["task"] == choose("benchmark", benchmark, names)]
    stored = Stored(functools.partial(values.read, results))
    settings = rows.groupby([*few_shot.ALIKE, "benchmark"], dropna=False)
    return _of_most_seeds(settings, Scale.LINEAR, lambda part: _over_items(part, stored))


def _over_items(rows: pd.DataFrame, stored: Stored) -> float | None:
    """Return the standard deviation over items of the difference of two methods; without values, as if independent."""
    units = [stored.behind(part) for _, part in rows.groupby(["attention", "options"])]
    known = [one for one in units if one is not None and units[0] is not None and one.like(units[0])]
    if len(known) < 2:
        return math.sqrt(2 * float((rows["stderr"] ** 2 * rows["n"]).mean())) if rows["stderr"].notna().all() else None
    return _of_differences(pd.DataFrame([one.sums.mean(0) for one in known]))
