"""The table of few-shot scores, in each of its forms."""

import io
import math
from typing import Any

import pandas as pd
import pytest
from rich.console import Console
from rich.table import Table

from sbeval.errors import InputError
from sbeval.tables import few_shot as scores
from sbeval.tasks import few_shot

COMMON: dict[str, Any] = {
    "model": "25m",
    "options": "",
    "params": 25_000_000,
    "train_len": 2048,
    "train_tokens": 10**8,
    "eval_len": 2048,
    "corpus": "books",
    "preset": "paper",
    "seed": 0,
    "part": "",
    "filter": "",
    "shots": 0,
    "chance": 0.25,
    "n": 100,
    "stderr": 0.05,
}


def row(attention: str, task: str, metric: str, value: float, **others: Any) -> dict[str, Any]:
    return COMMON | {"attention": attention, "task": task, "metric": metric, "value": value} | others


def results(*more: dict[str, Any]) -> pd.DataFrame:
    rows = [
        *(
            row(name, "arc_easy", metric, value)
            for name, value in (("rope", 0.3), ("stick_breaking", 0.4))
            for metric in ("acc", "acc_norm")
        ),
        row("rope", "arc_easy", "acc_norm", 0.9, part="one_of_its_parts"),
        row("rope", "copa", "acc", 0.5, chance=0.5, stderr=0.1),
        row("stick_breaking", "copa", "acc", 0.7, chance=0.5, stderr=0.1),
        row("rope", "wikitext", "word_perplexity", 80.0, chance=None, stderr=None),
        row("rope", "wikitext", "bits_per_byte", 1.0, chance=None, stderr=None),
        row("rope", "gsm8k", "exact_match", 0.02, chance=None, shots=5, filter="flexible-extract"),
        row("rope", "gsm8k", "exact_match", 0.01, chance=None, shots=5, filter="strict-match"),
        *more,
    ]
    return pd.DataFrame(rows)


def by_name(found: scores.Scores) -> dict[str, dict[str, scores.Cell | None]]:
    return {name: dict(zip(found.headings, cells, strict=True)) for name, cells in found.rows}


def pair(cell: scores.Cell | None) -> tuple[float, float | None]:
    assert cell is not None
    return cell.value, cell.half


def test_a_benchmark_has_one_score() -> None:
    found = scores.table(results())
    assert found.headings == [
        "arc_easy (0) acc_norm",
        "copa (0) acc",
        "wikitext (0) word_perplexity",
        "gsm8k (5) exact_match",
        "mean above chance",
    ]
    rope = by_name(found)["25m rope"]
    assert pair(rope["gsm8k (5) exact_match"]) == pytest.approx((2.0, 9.92), abs=0.01)
    assert pair(rope["wikitext (0) word_perplexity"]) == pytest.approx((80.0, None))
    chance = by_name(found)["chance"]
    assert chance["copa (0) acc"] == scores.Cell(50.0) and chance["wikitext (0) word_perplexity"] is None


def test_the_mean_is_of_the_benchmarks_above_guessing_or_absent() -> None:
    exact = [row(name, "lambada", "acc", 0.06, chance=None, stderr=0.01) for name in ("rope", "stick_breaking")]
    mean = "mean above chance"
    found = by_name(scores.table(results(*exact)))
    # 0.35 of arc_easy is above 0.25 by its interval; 0.6 of copa, with its error of 0.1, and 0.02 of gsm8k are not
    assert pair(found["25m rope"][mean]) == pytest.approx((18.0, 197.2 * (0.05**2 + 0.01**2) ** 0.5 / 2), rel=1e-3)
    assert found["chance"][mean] == scores.Cell(12.5)
    # of lambada the other has no score
    lacking = by_name(scores.table(results(*exact[:1])))
    assert lacking["25m stick_breaking"][mean] is None and lacking["25m rope"][mean] is not None
    noisy = by_name(scores.table(results().replace({"stderr": {0.05: 0.06}})))
    assert noisy["25m rope"][mean] is None


def test_the_mean_is_as_sure_as_seeds_agree_over_all_benchmarks() -> None:
    """One seed is better by 0.1 on each of four benchmarks: so is its mean, and the interval is that of one of them."""
    names = ("arc_easy", "piqa", "sciq", "winogrande")
    rows = [row("rope", name, "acc", 0.6 + 0.1 * seed, seed=seed, stderr=None) for name in names for seed in range(2)]
    found = by_name(scores.table(pd.DataFrame(rows)))["25m rope"]
    # 12.706: Student's t with one degree of freedom
    half = 100 * 12.706 * 0.1 / 2
    assert pair(found["piqa (0) acc"]) == pair(found[scores.MEAN]) == pytest.approx((65.0, half), rel=1e-3)
    # a third seed that has one of them is none of the mean
    more = pd.DataFrame([*rows, row("rope", "piqa", "acc", 0.9, seed=2, stderr=None)])
    found = by_name(scores.table(more))["25m rope"]
    assert pair(found[scores.MEAN]) == pytest.approx((65.0, half), rel=1e-3)


def test_perplexities_are_averaged_as_logarithms() -> None:
    values = [10.0, 11.0, 12.1, 13.31]
    rows = [row("rope", "wikitext", "word_perplexity", of, seed=seed, stderr=None) for seed, of in enumerate(values)]
    found = by_name(scores.table(pd.DataFrame(rows)))["25m rope"]["wikitext (0) word_perplexity"]
    step = math.log(1.1)
    half = 3.182 * step * math.sqrt(5 / 3 / 4)
    mean = math.exp(math.log(10) + 1.5 * step)
    assert pair(found) == pytest.approx((mean, mean * math.sinh(half)), rel=1e-3)


def test_models_of_another_text_are_others() -> None:
    found = by_name(scores.table(results(row("rope", "arc_easy", "acc_norm", 0.9, corpus="plays", n=200))))
    one, other = (
        f"25m rope (100 M tokens of 2048, evaluated to 2048, {name}, preset paper)" for name in ("books", "plays")
    )
    assert pair(found[one]["arc_easy (0) acc_norm"])[0] == 30.0
    assert pair(found[other]["arc_easy (0) acc_norm"])[0] == 90.0


def test_models_of_nearly_as_many_tokens_are_told_apart() -> None:
    counts = {307_200: 0.2, 409_600: 0.3, 100_000_000: 0.4}
    table = pd.DataFrame(
        [row("rope", "copa", "acc", value, train_tokens=count, chance=None) for count, value in counts.items()]
    )
    found = [name for name, _ in scores.table(table).rows]
    said = ("307,200", "409,600", "100 M")
    assert found == [*(f"25m rope ({count} tokens of 2048, evaluated to 2048)" for count in said), "chance"]


def test_a_csv_has_a_line_for_each_model_whatever_its_name() -> None:
    cells: list[scores.Cell | None] = [scores.Cell(1.0), None]
    text = scores.comma_separated(scores.Scores(["a", "b"], [("rope", cells), ("rope", cells)]))
    assert text.splitlines() == ["model,a,a ±,b,b ±", "rope,1.0,,,", "rope,1.0,,,"]


def test_differences_are_taken_item_by_item_where_items_are_stored() -> None:
    """Ten items: both answer five, stick-breaking two more, and its right answers of 4 bytes cost 2 or 1 bits less."""
    right = {"rope": [1.0] * 5 + [0.0] * 5, "stick_breaking": [1.0] * 7 + [0.0] * 3, "alibi": [0.0] * 10}
    cost = {"rope": [4.0, 8.0] * 5, "stick_breaking": [2.0, 7.0] * 5, "alibi": [4.0] * 10}
    rows = []
    for name in right:
        same: dict[str, Any] = {"family": "few_shot", "cell": name, "n": 10, "stderr": 0.16}
        rows.append(row(name, "copa", "acc", sum(right[name]) / 10, **same))
        bits = sum(cost[name]) / 40
        rows.append(row(name, "copa", "gold_bits_per_byte", bits, **same | {"chance": None, "stderr": 0.1}))
    items = pd.concat(
        pd.DataFrame({"cell": name, "metric": metric, "unit_id": list("0123456789"), "value": each, "part": ""})
        for name in ("rope", "stick_breaking")
        for metric, each in (
            ("acc", right[name]),
            ("log_probability", [-math.log(2) * bits for bits in cost[name]]),
            ("answer_bytes", 4.0),
        )
    )
    table = pd.DataFrame(rows)
    found = scores.table(table, lambda cells: items[items["cell"].isin(list(cells))])
    assert [name for name, _ in found.rows][3:] == ["25m stick_breaking less rope", "chance"]
    less = by_name(found)["25m stick_breaking less rope"]
    # a deviation of 0.42 over ten items; Student's t with nine degrees of freedom is 2.262
    error = math.sqrt((2 * 0.8**2 + 8 * 0.2**2) / 9 / 10)
    assert pair(less["copa (0) acc"]) == pytest.approx((20.0, 100 * 2.262 * error), rel=1e-3)
    gold = less["copa (0) gold bits/byte"]
    assert gold is not None and gold.text() == "-0.375 ± 0.094"
    assert "| 25m stick_breaking less rope | +20.0 ± 30.2 |" in scores.markdown(found)
    # unpaired: 2.262 times the root of two errors of 0.16
    assert 100 * 2.262 * error < 100 * 2.262 * 0.16 * math.sqrt(2)
    assert len(scores.table(table).rows) == 4


def test_seeds_are_averaged_and_the_larger_run_counts() -> None:
    more = [
        row("rope", "arc_easy", "acc_norm", 0.5, seed=1),
        row("rope", "arc_easy", "acc_norm", 0.0, n=20),
        row("rope", "arc_easy", "acc_norm", 0.9, eval_len=256),
    ]
    found = by_name(scores.table(results(*more)))
    longer = found["25m rope (100 M tokens of 2048, evaluated to 2048)"]
    # seeds at 0.3 and 0.5, and items with an error of 0.05
    assert pair(longer["arc_easy (0) acc_norm"]) == pytest.approx((40.0, 127.4), abs=0.1)
    assert found["25m rope (100 M tokens of 2048, evaluated to 256)"]["arc_easy (0) acc_norm"] is not None


def test_markdown_latex_and_csv() -> None:
    small = results()
    small = small[small["task"].isin(["arc_easy", "copa"])]
    assert scores.render(small, "markdown") == "\n".join(
        [
            "|  | arc_easy (0) acc_norm | copa (0) acc | mean above chance |",
            "| --- | --- | --- | --- |",
            "| 25m rope | 30.0 ± 9.9 | 50.0 ± 19.8 | 30.0 ± 9.9 |",
            "| 25m stick_breaking | 40.0 ± 9.9 | 70.0 ± 19.8 | 40.0 ± 9.9 |",
            "| chance | 25.0 | 50.0 | 25.0 |",
        ]
    )
    latex = scores.render(small, "latex")
    assert isinstance(latex, str) and r"25m stick\_breaking & 40.0 $\pm$ 9.9 & 70.0 $\pm$ 19.8" in latex
    assert latex.startswith(r"\begin{tabular}{lrrr}") and latex.count(r"\\") == 4
    plain = scores.render(small, "csv")
    assert isinstance(plain, str)
    read = pd.read_csv(io.StringIO(plain), index_col="model").T
    assert read.loc["copa (0) acc ±", "25m rope"] == pytest.approx(19.84, abs=0.01)
    assert read["chance"].notna().tolist() == [True, False] * 3


def test_in_a_terminal_models_stand_side_by_side() -> None:
    shown = scores.render(results(), "terminal")
    assert isinstance(shown, Table)
    out = io.StringIO()
    Console(file=out, width=120).print(shown)
    assert "25m stick_breaking" in out.getvalue() and "70.0 ± 19.8" in out.getvalue()


def test_what_cannot_be_shown_is_an_error() -> None:
    with pytest.raises(InputError, match="no score of a whole benchmark"):
        scores.table(results().query("part != ''"))
    with pytest.raises(InputError, match="unknown format 'html'"):
        scores.render(results(), "html")


def test_a_model_that_overfits_is_marked_in_every_form() -> None:
    rows = results().assign(status="")
    rows.loc[rows["attention"] == "rope", "status"] = "overfit"
    assert [name for name, _ in scores.table(rows).rows] == ["25m rope (overfit)", "25m stick_breaking", "chance"]
    assert "| 25m rope (overfit) |" in str(scores.render(rows, "markdown"))
    assert "above its lowest): rope." in str(few_shot.summary(rows).caption)
    assert few_shot.summary(results()).caption is None


def test_right_answers_stand_beside_scores() -> None:
    more = [
        row("rope", "copa", "gold_bits_per_byte", 1.25, chance=None, stderr=0.01),
        row("rope", "copa", "gold_bits_per_byte", 9.0, chance=None, n=20),
        row("stick_breaking", "copa", "gold_bits_per_byte", 1.2, chance=None, stderr=0.01),
        row("rope", "copa", "gold_bits_per_byte", 9.0, part="one_of_its_parts"),
    ]
    found = by_name(scores.table(results(*more)))
    plain = by_name(scores.table(results()))
    for name, cells in found.items():
        cell = cells.pop("copa (0) gold bits/byte")
        assert cells == plain[name]
        if name == "chance":
            assert cell is None
        else:
            assert cell is not None and cell.value == (1.25 if "rope" in name else 1.2)
            assert cell.half == pytest.approx(0.0196, rel=0.03) and cell.text().startswith("1.2")
            assert len(cell.text()) == len("1.250 ± 0.020")
