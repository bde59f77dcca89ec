"""Seeds that find a difference: against published power, simulation, and the committed results."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from typer.testing import CliRunner

from sbeval.cli.main import app
from sbeval.errors import InputError
from sbeval.tables import power, table, values
from sbeval.tables.power import plan, probability, seeds
from sbeval.tables.power_options import PUBLISHED, Config
from sbeval.tables.results import Results
from sbeval.tables.statistics import Spread

RESULTS = Path(__file__).parents[3] / "results"
KNOWN = Spread(0.014, math.inf)


def test_the_difference_that_the_paper_reports_takes_nine_seeds() -> None:
    assert pytest.approx(0.020, abs=5e-4) == PUBLISHED
    assert seeds(0.02, KNOWN, 0.0, 0.8, 0.05) == 9 and seeds(0.03, KNOWN, 0.0, 0.8, 0.05) == 5
    # the deviation of the committed results is smaller, and an estimate
    found = plan(Config(results_dir=RESULTS))
    assert found.rows == [["0.02", "", "8"], ["0.03", "", "5"], ["0.05", "", "3"]]
    assert "0.0119 nats, 12 degrees of freedom" in found.notes[0] and "documents are not counted" in found.notes[1]


def test_power_is_that_of_the_t_test() -> None:
    # 17 a group for an effect of one standard deviation: power 0.807 (Cohen 1988, table 2.3.5)
    assert probability(17, 1.0, Spread(1.0, math.inf), 0.0, 0.05) == pytest.approx(0.807, abs=2e-3)
    assert seeds(1.0, Spread(1.0, math.inf), 0.0, 0.8, 0.05) == 17


def test_an_estimated_deviation_costs_seeds() -> None:
    """Against experiments whose true deviation is drawn as the estimate allows."""
    generator = np.random.default_rng(0)
    true = 0.014 * np.sqrt(8 / generator.chisquare(8, 4000))
    groups = generator.normal(0, true[:, None, None], (4000, 2, 9)) + np.array([0.02, 0.0])[:, None]
    found = np.mean(stats.ttest_ind(groups[:, 0], groups[:, 1], axis=1).pvalue < 0.05)
    assert probability(9, 0.02, Spread(0.014, 8), 0.0, 0.05) == pytest.approx(found, abs=0.02)
    assert probability(9, 0.02, Spread(0.014, 8), 0.0, 0.05) < probability(9, 0.02, KNOWN, 0.0, 0.05)


@pytest.mark.parametrize("freedom", [1, 2, 8, math.inf])
def test_a_difference_that_is_easily_found(freedom: float) -> None:
    """Where some or all of the deviations that the estimate allows are far smaller than the difference."""
    spread, generator = Spread(0.02, freedom), np.random.default_rng(0)
    chances = 1.0 if math.isinf(freedom) else generator.chisquare(freedom, 200_000) / freedom
    for count, difference in ((2, 0.1), (3, 0.1), (5, 0.05), (10, 0.3)):
        quantile, deviations = stats.t.ppf(0.975, 2 * count - 2), 0.02 * np.sqrt(2 / count / chances)
        draws = generator.standard_normal(200_000) + difference / deviations
        found = np.abs(draws / np.sqrt(generator.chisquare(2 * count - 2, 200_000) / (2 * count - 2))) > quantile
        assert probability(count, difference, spread, 0.0, 0.05) == pytest.approx(found.mean(), abs=0.01)
    assert seeds(0.1, Spread(0.02, 1), 0.0, 0.8, 0.05) == 6
    # deviations that are 0
    assert seeds(0.1, Spread(0.0, freedom), 0.0, 0.8, 0.05) == 2


def test_documents_bound_what_seeds_can_find() -> None:
    few = plan(Config(results_dir=RESULTS, seed_sd=0.014, document_sd=0.03, differences=(0.02,), documents=(16, 64)))
    assert [row[2] for row in few.rows] == ["no number", "13"]
    many = plan(Config(results_dir=RESULTS, seed_sd=0.014, document_sd=0.03, differences=(0.02,), documents=(10**6,)))
    assert [row[2] for row in many.rows] == ["9"]


def test_deviations_come_from_the_results(tmp_path: Path) -> None:
    """Two methods with two seeds each, whose documents differ by a pattern of their own."""
    committed = table.read(RESULTS / "length_gen.csv")
    same = (committed["context_length"] == 2048) & (committed["train_len"] == 2048)
    same &= committed["metric"].eq("perplexity") & committed["attention"].isin(["rope", "alibi"])
    rows = committed[same & (committed["options"] == "")]
    results = Results(tmp_path)
    table.write(results.table("length_gen"), rows)
    found = plan(Config(results_dir=tmp_path, differences=(0.03,)))
    assert "2 degrees of freedom" in found.notes[0] and "not counted" in found.notes[1]
    gap = {"rope": 0.03, "alibi": -0.03}
    losses = pd.concat(
        pd.DataFrame(
            {
                "cell": cell,
                "metric": metric,
                "unit_id": [f"{number}" for number in range(16)],
                "value": [
                    2048.0 * (1 if metric == "tokens" else 3.7 + number / 10 + gap[name] * (-1) ** number)
                    for number in range(16)
                ],
                "context_length": 2048,
            }
        )
        for cell, name in rows[["cell", "attention"]].drop_duplicates().itertuples(index=False, name=None)
        for metric in ("nll_sum", "tokens")
    )
    over = power._over_documents(rows, lambda cells: losses[losses["cell"].isin(set(cells))])
    # differences of ±0.06 over 16 documents
    assert over == pytest.approx(0.06 * math.sqrt(16 / 15))
    assert values.read(results, rows["cell"]).empty


def test_seeds_of_another_recipe_are_not_those_of_a_setting(tmp_path: Path) -> None:
    """The same seeds at another learning rate, which is worse by far for one of them."""
    committed = table.read(RESULTS / "length_gen.csv")
    same = (committed["context_length"] == 2048) & (committed["train_len"] == 2048) & (committed["options"] == "")
    rows = committed[same & (committed["metric"] == "perplexity") & committed["attention"].isin(["rope", "alibi"])]
    found = []
    for folder, more in (("one", []), ("both", [rows.assign(cell=rows["cell"] + "x", preset="other")])):
        for other in more:
            other["value"] *= 1 + rows["seed"]
        results = Results(tmp_path / folder)
        for part in (rows, *more):
            table.write(results.table("length_gen"), part)
        found.append(power.measured(Config(results_dir=tmp_path / folder)).seeds)
    assert found[0] == found[1]


def test_scores_of_a_benchmark_vary_over_items(tmp_path: Path) -> None:
    """Two methods with two seeds each; a third of the items tells them apart."""
    results = Results(tmp_path)
    committed = table.read(RESULTS / "few_shot.csv")
    one = committed[(committed["metric"] == "acc") & (committed["part"] == "")].iloc[:1]
    right = {"rope": [1.0, 0.0, 0.0] * 40, "alibi": [1.0, 0.0, 1.0] * 40}
    rows = []
    for name, each in right.items():
        for seed in (0, 1):
            flipped = [1 - each[0], *each[1:]] if seed else each
            share = float(np.mean(flipped))
            error = math.sqrt(share * (1 - share) / 119)
            cell = f"{name}-{seed}"
            given = {"attention": name, "options": "", "seed": seed, "cell": cell, "task": "copa", "params": 10}
            rows.append(one.assign(**given, value=share, stderr=error, n=120))
            units = [f"{number}" for number in range(120)]
            frame = pd.DataFrame({"metric": "acc", "unit_id": units, "value": flipped, "part": "", "filter": ""})
            values.write(results, cell, frame)
    table.write(results.table("few_shot"), pd.concat(rows))
    found = plan(Config(results_dir=tmp_path, benchmark="copa", differences=(0.05,)))
    assert found.headings == ["difference (copa)", "items", "seeds a method"]
    assert [row[1] for row in found.rows] == ["120", "480"]
    # seeds at 1/3 and a 120th less, 2/3 likewise
    assert f"seeds vary by {math.sqrt(0.5) / 120:.4f} score, 2 degrees of freedom" in found.notes[0]
    gap = np.array(([0.0, 0.0, 1.0] * 40), dtype=float)
    assert f"over items by {gap.std(ddof=1):.4f} score" in found.notes[1]
    # without values: as if answers were independent
    for path in (tmp_path / "values").iterdir():
        path.unlink()
    alone = plan(Config(results_dir=tmp_path, benchmark="copa", differences=(0.05,)))
    assert "over items by 0.66" in alone.notes[1]
    with pytest.raises(InputError, match="unknown benchmark 'copper'; did you mean 'copa'"):
        plan(Config(results_dir=tmp_path, benchmark="copper"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"power": 1.0}, "--power must be between 0 and 1; got 1"),
        ({"differences": (0.0,)}, "--difference must be above 0 and finite; got 0"),
        ({"differences": (math.nan,)}, "--difference must be above 0 and finite; got nan"),
        ({"seed_sd": -1.0}, "--seed-sd must be 0 or more and finite; got -1"),
        ({"document_sd": math.nan}, "--document-sd must be 0 or more and finite; got nan"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Config(**options)


def test_the_command_as_typed() -> None:
    shown = CliRunner().invoke(app, ["power", "--results-dir", str(RESULTS)])
    assert shown.exit_code == 0, shown.exception
    # the paper's difference is the first
    assert re.search(r"0\.02\b.*\b8\b", shown.stdout), shown.stdout


def test_a_table_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    lines = (RESULTS / "length_gen.csv").read_text().splitlines()
    (tmp_path / "length_gen.csv").write_text("\n".join([lines[0], lines[1].replace(",0,", ",x,", 1)]) + "\n")
    with pytest.raises(InputError, match=r"length_gen.csv:2: 'x' in column 'seed' is not a whole number"):
        plan(Config(results_dir=tmp_path))


def test_without_results_the_deviation_must_be_given(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"length_gen.csv is not there to say how much seeds vary: give --seed-sd"):
        plan(Config(results_dir=tmp_path))
    given = ["power", "--results-dir", str(tmp_path), "--seed-sd", "0.014", "--difference", "0.02"]
    shown = CliRunner().invoke(app, given)
    assert shown.exit_code == 0 and "0.02" in shown.stdout and " 9" in shown.stdout
