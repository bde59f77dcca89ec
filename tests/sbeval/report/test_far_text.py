"""Whether distant text is used is answered by made-up losses as the rule says."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pandas as pd
import pytest

from sbeval.report import far_text
from sbeval.report.judge import NO, UNDECIDED, YES, Evidence, Judged
from sbeval.tables import documents
from sbeval.tables.rows import STICK

Tables = Callable[..., pd.DataFrame]

SPREAD = ("stick_breaking", "remainder=none,logit_bias=spread")


def losses(frame: Tables, change: float, seeds: int = 3, noise: float = 0.0005, **common: Any) -> pd.DataFrame:
    """Losses of the same 512 tokens with 2048, 4096 and 16384 tokens of context; nothing changes up to 4096."""
    rows = [
        {
            "attention": "stick_breaking",
            "options": SPREAD[1],
            "context_length": context,
            "seed": seed,
            "value": 3.0 + (change + noise * (seed - 1)) * share,
            "cell": f"spread-{seed}",
        }
        for context, share in ((2048, 0.0), (4096, 0.0), (16384, 1.0))
        for seed in range(seeds)
    ]
    return frame(rows, **{"metric": "loss_fixed_targets", "targets": 512} | common)


def judged(table: pd.DataFrame, values: documents.Values = documents.nothing, **others: Any) -> Judged:
    return far_text.gains(SPREAD, table, Evidence({"length_gen": table}, values=values, **others))


@pytest.mark.parametrize(
    ("change", "noise", "verdict"),
    [(-0.01, 0.0005, YES), (-0.0012, 0.0003, YES), (0.0, 0.0005, NO), (0.01, 0.0005, NO), (-0.001, 0.003, UNDECIDED)],
)
def test_by_the_interval_over_seeds(frame: Tables, change: float, noise: float, verdict: str) -> None:
    found = judged(losses(frame, change, noise=noise))
    assert found.verdict == verdict and "95 % over 3 seeds" in found.basis and "over" not in found.found
    assert "with 16384 instead of 4096 tokens of context" in found.found
    # the sign of zero is that of rounding
    assert f"{abs(change):.3f} [" in found.found


def test_one_seed_is_said(frame: Tables) -> None:
    found = judged(losses(frame, -0.01, seeds=1))
    assert (found.verdict, found.reason) == (UNDECIDED, "one seed") and "0.010" in found.found


def test_models_on_the_most_tokens_answer(frame: Tables) -> None:
    young, grown = losses(frame, 0.01, train_tokens=10**8), losses(frame, -0.01, train_tokens=10**9)
    assert judged(pd.concat([young, grown])).verdict == YES
    assert judged(pd.concat([young, grown[grown["context_length"] < 16384]])).verdict == NO
    # one seed decides nothing
    found = judged(pd.concat([young, grown[grown["seed"] == 0]]))
    assert found.verdict == NO and "100 M training tokens" in found.basis
    # nor do two of which one was not given the text
    found = judged(pd.concat([young, grown[(grown["seed"] == 0) | (grown["context_length"] < 16384)]]))
    assert found.verdict == NO and "100 M training tokens" in found.basis


def test_without_such_losses(frame: Tables) -> None:
    short = losses(frame, -0.01).query("context_length < 16384")
    for table in (short, short.assign(metric="loss"), losses(frame, -0.01).assign(options="")):
        found = judged(table)
        assert (found.verdict, found.measured) == (UNDECIDED, False) and "--fixed-targets 512" in found.reason
    plain = far_text.gains(STICK, losses(frame, -0.01).assign(options=""), Evidence({}))
    assert plain.verdict == YES


def test_more_text_of_another_document_must_help_less(frame: Tables) -> None:
    own = losses(frame, -0.01)
    for change, verdict in ((0.0, YES), (-0.01, NO), (-0.03, NO)):
        other = losses(frame, change, noise=0.0008, metric="loss_fixed_targets_unrelated").query(
            "context_length > 2048"
        )
        found = judged(pd.concat([own, other.query("context_length > 2048")]))
        assert found.verdict == verdict and "relative to another document's text" in found.found
    # of one of three seeds: the others count for the first interval alone, and one seed does not say yes
    one = losses(frame, 0.0, metric="loss_fixed_targets_unrelated").query("seed == 1")
    found = judged(pd.concat([own, one]))
    assert "and −0.010 relative to another document's text" in found.found
    assert "Change: 95 % over 3 seeds; relative to another document's text: 95 % over 1 seed, " in found.basis
    assert (found.verdict, found.reason) == (UNDECIDED, "one seed with the other text")
    assert judged(pd.concat([losses(frame, 0.0), one])).verdict == NO


def test_other_targets_are_another_setting(frame: Tables) -> None:
    """The same models, evaluated once more on fewer targets, whose losses are another level."""
    own = losses(frame, -0.01)
    fewer = own.assign(targets=256, value=own["value"] - 0.5, cell=own["cell"] + "-256")
    for table in (pd.concat([own, fewer]), pd.concat([fewer, own])):
        assert judged(table) == judged(own)


def test_documents_are_paired(frame: Tables) -> None:
    """Documents differ a hundred times as much as each gains."""

    def stored(cells: Iterable[str]) -> pd.DataFrame:
        levels = 3 + np.arange(16) / 10
        rows = [
            {
                "cell": cell,
                "unit_id": str(at),
                "context_length": context,
                "targets": 512,
                "metric": metric,
                "value": value,
            }
            for cell in set(cells)
            for at, level in enumerate(levels)
            for context in (4096, 16384)
            for metric, value in (
                ("tokens", 512.0),
                ("nll_sum", 512 * (level - (0.01 + at % 2 / 500) * (context > 4096))),
            )
        ]
        return pd.DataFrame(rows).assign(targets=512, eval_corpus="")

    found = judged(losses(frame, -0.011), values=stored)
    assert found.verdict == YES and "16 documents in pairs" in found.basis and "−0.011" in found.found
    # of two seeds alone: the change is that of all three
    some = judged(losses(frame, -0.011), values=lambda cells: stored(set(cells) - {"spread-1"}))
    assert "in pairs" not in some.basis and "over 3 seeds" in some.basis
