"""Canaries: models too young to rank are named, with the reason."""

from collections.abc import Callable

import pandas as pd
import pytest

from sbeval.report import maturity

Tables = Callable[..., pd.DataFrame]


def faults(table: pd.DataFrame) -> str:
    return maturity.fault(table[table["attention"] == "rope"], table)


@pytest.mark.parametrize(
    ("window", "nope", "wanted"),
    [
        (13.4, 14.0, ""),
        (13.0, 14.0, "too young to rank: a sliding window is ahead of RoPE by 0.008 nats"),
        (13.0999, 14.0, "too young to rank: a sliding window is level with RoPE"),
        (13.4, 15.0, "too young to rank: NoPE is behind RoPE by 0.14 nats, more than 0.1"),
        (13.0, 15.0, "a sliding window is ahead of RoPE by 0.008 nats and NoPE is behind RoPE by 0.14 nats"),
    ],
)
def test_canaries(window: float, nope: float, wanted: str, perplexities: Tables) -> None:
    table = perplexities({"rope": {2048: [13.1]}, "sliding_window": {2048: [window]}, "nope": {2048: [nope]}})
    assert wanted in faults(table) and (wanted or not faults(table))


def test_without_canaries_maturity_is_unknown(perplexities: Tables) -> None:
    table = perplexities({"rope": {2048: [13.1]}}, canaries=False)
    assert faults(table) == "maturity unknown: sliding_window and nope not trained in this setting"
    # a setting without RoPE at all, such as needles' own
    other = table.assign(corpus="another")
    assert "not evaluated in this setting" in maturity.fault(other, table)
    assert "not evaluated in this setting" in maturity.fault(table, None)


def test_few_tokens_a_parameter(perplexities: Tables) -> None:
    table = perplexities({"rope": {2048: [13.1]}}, train_tokens=4 * 10**9)
    assert faults(table) == "trained on 4.0 tokens a parameter, fewer than 5"
    assert faults(table.assign(train_tokens=5 * 10**9)) == ""


def test_the_window_is_one_that_cannot_see_the_training_length(perplexities: Tables) -> None:
    table = perplexities({"rope": {2048: [13.1]}, "sliding_window": {2048: [13.0]}})
    assert "ahead" in faults(table)
    # nearly the whole training length: no canary
    long = table.assign(options=table["options"].mask(table["attention"] == "sliding_window", "window=1024"))
    assert faults(long) == "maturity unknown: sliding_window not trained in this setting"
    short = table.assign(options=table["options"].mask(table["attention"] == "sliding_window", "window=256"))
    assert "ahead" in faults(short)


def test_a_table_without_recipes_has_the_faults_of_each(perplexities: Tables) -> None:
    grown, young = (
        perplexities({"rope": {2048: [13.1]}, "nope": {2048: [nope]}}, lr=lr)
        for lr, nope in ((1e-3, 13.6), (2e-3, 15.0))
    )
    table = pd.concat([grown, young])
    rows = grown[grown["attention"] == "rope"]
    assert maturity.fault(rows, table) == ""
    assert "NoPE is behind RoPE by 0.14" in maturity.fault(rows.drop(columns="lr"), table)


def test_a_model_that_overfits_is_no_canary(perplexities: Tables) -> None:
    """The second seed of RoPE, which does, would be behind the window."""
    table = perplexities({"rope": {2048: [13.1, 15.0]}})
    assert "ahead" in faults(table)
    second = (table["attention"] == "rope") & (table["seed"] == 1)
    assert faults(table.assign(status=second.map({True: "overfit", False: ""}))) == ""


def test_canaries_have_intervals_over_seeds(perplexities: Tables) -> None:
    table = perplexities({"rope": {2048: [13.1, 13.3]}}, epochs=1.5)
    (one,) = maturity.canaries(table)
    assert one.window is not None and one.window.low < one.window.mean < one.window.high
    assert one.epochs == 1.5 and one.tokens == 10**10 and one.faults() == []
    assert maturity.canaries(table.assign(metric="loss")) == []
