"""The gap by training tokens: laws that are known are found, and intervals cover as often as they say."""

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from sbeval.errors import InputError
from sbeval.tables import tokens
from sbeval.tables.tokens import fit, ladders

TOKENS = np.array([60e6, 120e6, 240e6, 480e6, 960e6])
COMMON: dict[str, Any] = {
    "task": "books", "model": "25m", "corpus": "books", "tokenizer": "bpe:8192", "preset": "figure5", "dtype": "x",
    "train_len": 2048, "eval_len": 65536, "context_length": 2048, "metric": "perplexity", "options": "", "lr": 2e-3,
}  # fmt: skip


def law(limit: float, amplitude: float, exponent: float) -> Any:
    return limit + amplitude * (TOKENS / TOKENS[0]) ** -exponent


def table(gap: Any, seeds: int = 1, noise: float = 0.0, seed: int = 0) -> pd.DataFrame:
    """Losses of RoPE and of a method that differs by `gap`; a seed's errors are alike at all token counts."""
    generator = np.random.default_rng(seed)
    rows = []
    for method, less in (("rope", 0.0), ("stick_breaking", gap)):
        for number in range(seeds):
            own = noise * (generator.standard_normal() + generator.standard_normal(len(TOKENS))) / math.sqrt(2)
            losses = 3 + (TOKENS / 1e8) ** -0.2 + less + own
            rows += [
                COMMON | {"attention": method, "seed": number, "train_tokens": int(count), "value": math.exp(loss)}
                for count, loss in zip(TOKENS, losses, strict=True)
            ]
    return pd.DataFrame(rows)


def one(rows: pd.DataFrame) -> Any:
    (ladder,) = ladders(rows)
    return ladder


@pytest.mark.parametrize("truth", [(-0.05, 0.3, 1.0), (0.02, 0.1, 0.5), (0.01, -0.2, 1.5)])
def test_a_law_that_is_there_is_found(truth: tuple[float, float, float]) -> None:
    (found,) = fit(TOKENS, law(*truth)[None])
    assert found == pytest.approx(truth, rel=1e-6)
    ladder = one(table(law(*truth)))
    assert (ladder.law.limit.value, ladder.law.amplitude, ladder.law.exponent.value) == pytest.approx(truth, rel=1e-6)
    assert ladder.law.at(TOKENS) == pytest.approx(law(*truth)) and ladder.law.tells_limit
    assert [gap.value for gap in ladder.gaps] == pytest.approx(law(*truth))
    # one seed of each has no interval
    assert ladder.seeds == [(1, 1)] * 5 and math.isnan(ladder.law.limit.low) and math.isnan(ladder.gaps[0].high)


@pytest.mark.parametrize("sign", [1, -1])
def test_where_a_gap_closes(sign: int) -> None:
    """Of a method that passes RoPE, and of one that falls behind."""
    ladder = one(table(sign * law(-0.05, 0.3, 1.0)))
    # 0.3 / 0.05 = 6 times the fewest tokens
    assert ladder.law.crossing.value == pytest.approx(6 * 60e6) and ladder.law.crosses() == "3.6e+08"
    assert ladder.law.at(np.array([ladder.law.crossing.value])) == pytest.approx([0.0], abs=1e-9)
    never = one(table(sign * law(0.05, 0.3, 1.0)))
    assert never.law.crossing.value == math.inf
    assert never.law.crosses() == f"nowhere, {'behind' if sign > 0 else 'ahead'} throughout"
    # with seeds it has an interval, which is open where some fits never get there
    sure = one(table(sign * law(-0.05, 0.3, 1.0), seeds=3, noise=0.002))
    assert 2.5e8 < sure.law.crossing.low < 3.6e8 < sure.law.crossing.high < 6e8
    unsure = one(table(sign * law(-0.005, 0.3, 1.0), seeds=3, noise=0.02))
    assert unsure.law.crossing.low < 3.6e9 < unsure.law.crossing.high == math.inf and unsure.law.crosses().endswith(
        ", never]"
    )
    sure = one(table(sign * law(0.05, 0.3, 1.0), seeds=3, noise=0.002))
    assert sure.law.crosses() == f"nowhere, {'behind' if sign > 0 else 'ahead'} throughout"


def test_intervals_cover_as_often_as_they_say() -> None:
    """3 seeds each, 4 degrees of freedom: gaps by Student's t; the limit is not linear in them and covered roughly."""
    truth = (-0.02, 0.2, 0.8)
    crossing = TOKENS[0] * 10 ** (1 / 0.8)
    covered = np.zeros(4)
    for seed in range(200):
        ladder = one(table(law(*truth), seeds=3, noise=0.01, seed=seed))
        inside = [gap.low <= exact <= gap.high for gap, exact in zip(ladder.gaps, law(*truth), strict=True)]
        covered[:3] += [inside[0], inside[-1], ladder.law.limit.low <= truth[0] <= ladder.law.limit.high]
        covered[3] += ladder.law.crossing.low <= crossing <= ladder.law.crossing.high
        assert ladder.over() == "3 and 3"
    assert (covered[:2] / 200 >= 0.91).all() and (covered[:2] / 200 <= 0.99).all(), covered / 200
    assert (covered[2:] / 200 >= 0.88).all(), covered / 200


def test_seeds_that_stopped_early_count_where_they_are() -> None:
    whole = table(law(0.02, 0.2, 0.8), seeds=3, noise=0.01)
    late = whole["train_tokens"] > 5e8
    ladder = one(whole[~(late & (whole["seed"] > 0))])
    assert ladder.seeds == [(3, 3)] * 4 + [(1, 1)] and ladder.over() == "3 and 3 to 4.8e+08, 1 and 1 to 9.6e+08"
    every = one(whole)
    assert [gap.value for gap in ladder.gaps[:4]] == pytest.approx([gap.value for gap in every.gaps[:4]])
    first = one(whole[whole["seed"] == 0])
    assert ladder.gaps[4].value == pytest.approx(first.gaps[4].value)
    # that of one seed each, by the errors of three: as at the count before, times the root of three
    before, last = (gap.high - gap.low for gap in ladder.gaps[3:])
    assert last == pytest.approx(math.sqrt(3) * before)
    # nor is the first count needed
    early = whole["train_tokens"] == whole["train_tokens"].min()
    ladder = one(whole[~(early & (whole["seed"] > 0))])
    assert ladder.over() == "1 and 1 to 6e+07, 3 and 3 to 9.6e+08"
    # in the middle too
    middle = whole["train_tokens"].between(1e8, 3e8)
    assert one(whole[~(middle & (whole["seed"] > 0))]).over("", "{:.0f}".format) == (
        "3 and 3 to 60000000, 1 and 1 to 240000000, 3 and 3 to 960000000"
    )
    of_one, of_three = (gap.high - gap.low for gap in ladder.gaps[:2])
    assert of_one == pytest.approx(math.sqrt(3) * of_three)
    # a method that has one seed adds nothing to the errors; others are drawn
    alone = whole[(whole["attention"] == "rope") & (whole["seed"] == 0)].assign(attention="nope", value=50.0)
    (_, same) = ladders(pd.concat([alone, whole]))
    assert [gap.low for gap in same.gaps] == pytest.approx([gap.low for gap in every.gaps], abs=0.005)


def test_intervals_cover_where_seeds_stopped_early() -> None:
    exact = law(-0.02, 0.2, 0.8)
    covered = np.zeros(3)
    for seed in range(200):
        rows = table(exact, seeds=3, noise=0.01, seed=seed)
        # three counts are not fitted, which takes the time
        rows = rows[(rows["train_tokens"] > 1e8) & (rows["train_tokens"] < 9e8)]
        ladder = one(rows[(rows["seed"] == 0) | (rows["train_tokens"] < 3e8)])
        covered += [gap.low <= each <= gap.high for gap, each in zip(ladder.gaps, exact[1:4], strict=True)]
    assert (covered / 200 >= 0.91).all() and (covered / 200 <= 0.99).all(), covered / 200


def test_intervals_cover_where_the_seeds_of_the_baseline_vary_more() -> None:
    """By ten times as much as those of four methods: pooled with them, they would seem to vary by less than half."""
    exact = law(-0.02, 0.2, 0.8)[:2]
    covered = np.zeros(2)
    for seed in range(100):
        tables = [table(law(-0.02, 0.2, 0.8), 3, noise, 5 * seed + k) for k, noise in enumerate([0.1] + 4 * [0.01])]
        quiet = [rows[rows["attention"] != "rope"].assign(options=f"{k}") for k, rows in enumerate(tables[1:])]
        rows = pd.concat([tables[0][tables[0]["attention"] == "rope"], *quiet])
        ladder = ladders(rows[rows["train_tokens"] < 2e8])[0]
        covered += [gap.low <= each <= gap.high for gap, each in zip(ladder.gaps, exact, strict=True)]
    assert (covered >= 89).all(), covered


def test_models_evaluated_once_more_are_no_further_seeds() -> None:
    """RoPE with its weights scaled in three ways: intervals are as wide as without these."""
    rows = table(law(-0.02, 0.2, 0.8), 2, 0.05)
    rope = rows[rows["attention"] == "rope"]
    again = [rope.assign(options=f"scaling=ntk,factor={factor}") for factor in (2.0, 4.0, 8.0)]
    found = {ladder.method: ladder.gaps for ladder in ladders(pd.concat([rows, *again]))}
    assert found["stick_breaking", ""] == one(rows).gaps


def test_settings_stand_apart_and_few_token_counts_are_not_fitted() -> None:
    rows = table(law(0.02, 0.2, 0.8))
    both = pd.concat([rows, rows.assign(lr=1e-3)])
    assert [ladder.setting for ladder in ladders(both)] == [
        f"25m model, trained at length 2048, books, learning rate {rate}" for rate in ("0.001", "0.002")
    ]
    shorter = pd.concat([rows, rows.assign(eval_len=16384)])
    assert [ladder.setting.split(", ")[-1] for ladder in ladders(shorter)] == [
        f"evaluated to {length} tokens" for length in (16384, 65536)
    ]
    few = rows[rows["train_tokens"] < 4e8]
    ladder = one(few)
    assert ladder.law is None and [gap.value for gap in ladder.gaps] == pytest.approx(law(0.02, 0.2, 0.8)[:3])
    assert ladders(few[few["train_tokens"] < 1e8]) == []
    with pytest.raises(InputError, match="no method has 4 or more counts of training tokens in common with RoPE"):
        tokens.frame(few)


def test_the_table_has_every_number() -> None:
    rows = table(law(-0.05, 0.3, 1.0), seeds=2, noise=1e-4)
    ladder = one(rows)
    text = tokens.render(rows, "markdown")
    assert isinstance(text, str) and text.splitlines()[0].startswith("| setting | method | seeds | tokens |")
    assert ladder.law.limit.text() in text and "| 2 and 2 | 6e+07 to 9.6e+08 |" in text and "3.6e+08" in text
    console = Console(width=250, record=True)
    console.print(tokens.render(rows))
    assert ladder.gaps[-1].text() in console.export_text()
    # beside a fit, gaps at fewer counts
    early = rows[(rows["attention"] != "rope") & (rows["train_tokens"] < 4e8)].assign(attention="alibi")
    alibi, _ = tokens.frame(pd.concat([early, rows])).to_dict("records")
    assert (alibi["method"], alibi["tokens"], alibi["limit"], alibi["is 0 at"]) == ("alibi", "6e+07 to 2.4e+08", "", "")
    assert tokens.render(rows, "csv").count("\n") == 1  # type: ignore[union-attr]  # it is text
    with pytest.raises(InputError, match="unknown format 'latex'"):
        tokens.render(rows, "latex")
