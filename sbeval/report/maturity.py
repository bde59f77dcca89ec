"""Maturity: whether models have seen enough text for a ranking of their methods to last.

Early in training methods are ranked by how soon they become local, and gaps close later. Two canaries tell: in grown
models a sliding window, which cannot see far, is behind RoPE (Lin et al. 2025, arXiv 2503.02130, by 0.026 nats), and a
model without positions is close behind it (Barbero et al. 2024, arXiv 2410.06205: by 0.06 to 0.09 nats).
"""

from dataclasses import dataclass

import pandas as pd

from sbeval.errors import InputError
from sbeval.tables import epochs, intervals, selection
from sbeval.tables.rows import ROPE, Method
from sbeval.tables.statistics import Interval, Scale

# training tokens a parameter, fewer of which rank nothing
ENOUGH = 5.0
# nats/token by which a grown model without positions is behind RoPE at most
BEHIND = 0.1
# columns that identify a setting in all tables of text models
SETTING = ["model", "train_len", "corpus", "tokenizer", "train_tokens"]
# default of sliding_window, which the table leaves out
WINDOW = 512


@dataclass(frozen=True, slots=True)
class Canaries:
    """Models of one setting: parameters of RoPE's, and differences to it in ln perplexity at the training length.

    window: of a sliding window shorter than the training length. nope: of a model without positions. None: not trained.
    """

    setting: dict[str, str]
    params: int
    epochs: float | None
    window: Interval | None
    nope: Interval | None

    @property
    def tokens(self) -> int:
        return int(self.setting["train_tokens"])

    def faults(self) -> list[str]:
        """Return why these models are too young to rank; empty when they are not."""
        faults = []
        if (share := self.tokens / max(self.params, 1)) < ENOUGH:
            faults.append(f"trained on {share:.1f} tokens a parameter, fewer than {ENOUGH:g}")
        if missing := [name for name, one in (("sliding_window", self.window), ("nope", self.nope)) if one is None]:
            faults.append(f"maturity unknown: {' and '.join(missing)} not trained in this setting")
        signs = []
        if self.window is not None and self.window.mean < 0:
            lead = f"{-self.window.mean:.3f}"
            ahead = f"ahead of RoPE by {lead} nats" if float(lead) else "level with RoPE"
            signs.append(f"a sliding window is {ahead}")
        if self.nope is not None and self.nope.mean > BEHIND:
            signs.append(f"NoPE is behind RoPE by {self.nope.mean:.2f} nats, more than {BEHIND:g}")
        return [*faults, *([f"too young to rank: {' and '.join(signs)}"] if signs else [])]


def canaries(table: pd.DataFrame) -> list[Canaries]:
    """Return the canaries of each setting of `length_gen` that has RoPE, of models that do not overfit; empty without
    perplexities by context."""
    try:
        rows = selection.by_context(table[~epochs.overfit(table)])
    except InputError:
        return []
    rows = rows[rows["x"] == rows["train_len"]]
    found = []
    names = [*SETTING, *(name for name in selection.RECIPE if name in rows)]
    for _, part in rows.groupby(names, dropna=False):
        if ROPE in (samples := intervals.samples(part, Scale.LOG)):
            differences = intervals.differences(samples, ROPE, Scale.LOG, same_units=True)
            plain = intervals.method(part, ROPE)
            read = pd.to_numeric(plain["epochs"]).max() if "epochs" in plain else None
            found.append(
                Canaries(
                    setting={name: _plain(plain[name].iloc[0]) for name in names},
                    params=int(plain["params"].max()),
                    epochs=None if read is None or pd.isna(read) else float(read),
                    window=_window(differences, int(part["train_len"].iloc[0])),
                    nope=differences.get(("nope", "")),
                )
            )
    return found


def table(length_gen: pd.DataFrame) -> pd.DataFrame:
    """Return the canaries of each setting of `length_gen` in words, for pages."""
    lines = []
    for one in canaries(length_gen):
        differences = ["" if each is None else each.text("{:+.3f}".format) for each in (one.window, one.nope)]
        read = "" if one.epochs is None else f"{one.epochs:.2f}"
        tokens = f"{one.tokens / max(one.params, 1):.1f}"
        verdict = "; ".join(one.faults()) or "old enough"
        lines.append([*(one.setting[name] for name in SETTING), tokens, read, *differences, verdict])
    headings = ["tokens a parameter", "epochs", "sliding window minus RoPE", "NoPE minus RoPE", "verdict"]
    return pd.DataFrame(lines, columns=[*SETTING, *headings])


def _window(differences: dict[Method, Interval], train_len: int) -> Interval | None:
    """Return the difference of the longest window that does not reach over the training length."""
    windows = {}
    for (name, options), difference in differences.items():
        if name == "sliding_window" and (not options or options.startswith("window=")):
            windows[int(options.removeprefix("window=") or WINDOW)] = difference
    shorter = [length for length in windows if 2 * length < train_len]
    return windows[max(shorter)] if shorter else None


def fault(rows: pd.DataFrame, table: pd.DataFrame | None) -> str:
    """Return why the models of these rows, of any table of text models, are too young; empty when they are not.

    table: `length_gen`, which has the canaries. Where several recipes may be that of these rows, whose table does not
    say it, the faults of each count.
    """
    found = [
        one.faults()
        for one in (canaries(table) if table is not None else ())
        if all(_plain(rows[name].iloc[0]) == value for name, value in one.setting.items() if name in rows)
    ]
    if found:
        return "; ".join(dict.fromkeys(fault for faults in found for fault in faults))
    few = [f"trained on {short(rows):.1f} tokens a parameter, fewer than {ENOUGH:g}"] if short(rows) else []
    return "; ".join([*few, "maturity unknown: sliding_window, nope and rope not evaluated in this setting"])


def _plain(value: object) -> str:
    """Write a cell of a setting; tables of one family may lack a number that is blank in another's."""
    return "" if value is None or value != value else str(value)


def short(rows: pd.DataFrame) -> float:
    """Return the training tokens a parameter if they are too few, else 0."""
    share = float(rows["train_tokens"].max()) / max(float(rows["params"].max()), 1.0)
    return share if share < ENOUGH else 0.0
