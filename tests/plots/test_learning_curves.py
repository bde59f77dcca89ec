"""Learning curves: held-out losses by tokens, and gaps of their means to RoPE's."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes

from sbeval.errors import NothingToDraw
from sbeval.plots import learning_curves
from sbeval.tables import curves
from sbeval.tables.results import Results

COMMON: dict[str, Any] = {
    "task": "books", "model": "25m", "corpus": "books", "tokenizer": "bpe:8192", "preset": "figure5", "dtype": "x",
    "train_len": 2048, "eval_len": 65536, "metric": "perplexity", "options": "", "train_tokens": 8000,
}  # fmt: skip
# from 1000 tokens a step; the last step has the training loss alone
STEPS = (2, 4, 6)
# of the first seed, a method each
LOSSES = {"rope": (6.0, 5.0, 4.0), "stick_breaking": (7.0, 5.5, 4.25)}


def cell(folder: Path, attention: str, losses: tuple[float, ...] = (), **common: Any) -> pd.DataFrame:
    """Write the curves of a cell and return its rows, one for each context length."""
    row = COMMON | {"attention": attention, "seed": 0} | common
    row["cell"] = "-".join(str(row[name]) for name in ("attention", "options", "seed", "train_len", "eval_len"))
    training = [(step, 8.0 - step / 10) for step in range(1, 9)]
    held_out = list(zip(STEPS, losses, strict=True)) if losses else []
    curves.write(Results(folder), row["cell"], {"loss": training, learning_curves.METRIC: held_out})
    return pd.DataFrame([row | {"context_length": length} for length in (1024, 2048)])


def table(folder: Path, seeds: tuple[int, ...] = (0, 1)) -> pd.DataFrame:
    return pd.concat(
        cell(folder, name, tuple(loss + seed * (1 + place) / 4 for loss in losses), seed=seed)
        for place, (name, losses) in enumerate(LOSSES.items())
        for seed in seeds
    )


def line(axis: Axes, label: str) -> tuple[list[float], list[float]]:
    (found,) = [line for line in axis.get_lines() if line.get_label() == label]
    x, y = (np.asarray(data, dtype=float).tolist() for data in (found.get_xdata(), found.get_ydata()))
    return x, y


def test_losses_by_tokens_and_gaps_to_rope_below(tmp_path: Path) -> None:
    rows = learning_curves.gather(table(tmp_path), tmp_path)
    assert learning_curves.has_rows(rows)
    figure = learning_curves.draw(rows)
    above, below = figure.axes
    assert line(above, "RoPE") == ([2000, 4000, 6000], [6.125, 5.125, 4.125])
    assert line(above, "stick-breaking") == ([2000, 4000, 6000], [7.25, 5.75, 4.5])
    # 7.0 and 7.5 less 6.0 and 6.25; then 5.5 and 6.0 less 5.0 and 5.25
    assert line(below, "stick-breaking")[1] == pytest.approx([1.125, 0.625, 0.375])
    assert "RoPE" not in [one.get_label() for one in below.get_lines()]
    # seeds of two methods are no pairs: the 97.5 % quantile of Student's t with two degrees of freedom, times the
    # pooled deviation of 0.25 and 0.5, over two seeds each
    band = np.asarray(below.collections[0].get_paths()[0].vertices)[:, 1]
    sd = math.sqrt((0.25**2 + 0.5**2) / 2 / 2)
    assert band.max() == pytest.approx(1.125 + 4.303 * sd * math.sqrt(1 / 2 + 1 / 2), rel=1e-3)
    assert (above.get_xlabel(), below.get_xlabel()) == ("", "training tokens")
    assert above.get_xlim() == below.get_xlim() and below.get_xscale() == "log"
    figure.draw_without_rendering()
    assert [text.get_text() for text in below.get_xticklabels() if text.get_text()][-2:] == ["2 k", "5 k"]
    assert figure.get_supxlabel() == "Means of up to 2 seeds; bands: 95 % interval over seeds."


def test_seeds_measured_at_other_steps_are_drawn_at_the_same_tokens(tmp_path: Path) -> None:
    other = cell(tmp_path, "rope", seed=1)
    held_out = {"loss": [(8, 7.0)], learning_curves.METRIC: [(3, 6.0), (5, 5.0)]}
    curves.write(Results(tmp_path), other["cell"].iloc[0], held_out)
    rows = pd.concat([table(tmp_path, (0,)), other])
    above, below = learning_curves.draw(learning_curves.gather(rows, tmp_path)).axes
    # nothing where seed 1 was not measured: seed 0 alone would be a step
    at, loss = line(above, "RoPE")
    tokens, first = np.log([2000, 3000, 4000, 5000, 6000]), LOSSES["rope"]
    between = np.interp(tokens[1:-1], tokens[::2], first), np.interp(tokens[1:-1], tokens[1:-1:2], (6.0, 5.0))
    assert at == [3000, 4000, 5000] and loss == pytest.approx(np.mean(between, axis=0).tolist())
    assert loss[0] == pytest.approx((6.0 - math.log2(1.5) + 6.0) / 2)
    own = line(above, "stick-breaking")[1]
    assert own == pytest.approx(np.interp(tokens, tokens[::2], LOSSES["stick_breaking"]).tolist())
    assert line(below, "stick-breaking")[1] == pytest.approx((np.array(own[1:-1]) - loss).tolist())


def test_the_page_has_the_same_numbers(tmp_path: Path) -> None:
    chart = learning_curves.chart(learning_curves.gather(table(tmp_path, (0,)), tmp_path))
    loss, gap = chart.groups[0].panels
    assert (loss.title, gap.title, chart.note) == ("held-out loss", "gap to RoPE", "One seed.")
    rows = loss.rows()
    assert rows.loc[rows["method"] == "RoPE", learning_curves.LOSS].tolist() == [6.0, 5.0, 4.0]
    assert gap.rows()[learning_curves.GAP].tolist() == [1.0, 0.5, 0.25]


@pytest.mark.parametrize(
    ("tokens", "labels"),
    [
        ([2.5e6, 6.2e8], ["5 M", "10 M", "20 M", "50 M", "100 M", "200 M", "500 M"]),
        ([2.5e5, 6.2e8], ["300 k", "1 M", "3 M", "10 M", "30 M", "100 M", "300 M"]),
        ([6e7, 2.4e8], ["100 M", "200 M"]),
        ([6e7, 9e7], ["60 M", "90 M"]),
        ([2e3, 1e9], ["10 k", "100 k", "1 M", "10 M", "100 M", "1 G"]),
    ],
)
def test_tokens_of_the_page_are_labelled_by_round_numbers(
    tmp_path: Path, tokens: list[float], labels: list[str]
) -> None:
    rows = learning_curves.gather(table(tmp_path, (0,)), tmp_path)
    rows = rows[rows["step"] < 6].assign(x=[*tokens, *tokens])
    axis = learning_curves.chart(rows).groups[0].panels[0].plotly()["layout"]["xaxis"]
    assert axis["type"] == "log" and axis["ticktext"] == labels and len(axis["tickvals"]) == len(labels)


def test_a_seed_that_rope_does_not_have_counts(tmp_path: Path) -> None:
    more = cell(tmp_path, "stick_breaking", (8.0, 6.5, 5.25), seed=7)
    rows = learning_curves.gather(pd.concat([table(tmp_path, (0,)), more]), tmp_path)
    figure = learning_curves.draw(rows)
    assert line(figure.axes[1], "stick-breaking")[1] == [1.5, 1.0, 0.75]
    # no method has three, nor one in a setting
    other = cell(tmp_path, "rope", (7.0, 5.0, 4.0), seed=1, train_len=4096)
    rows = learning_curves.gather(pd.concat([table(tmp_path, (0,)), more, other]), tmp_path)
    figure = learning_curves.draw(rows)
    assert str(figure.get_supxlabel()).startswith("Means of up to 2 seeds")


def test_one_training_is_drawn_once(tmp_path: Path) -> None:
    """Scaling at evaluation and another length of evaluation leave the model as it is."""
    again = [
        cell(tmp_path, "rope", LOSSES["rope"], options="scaling=ntk,factor=2.0"),
        cell(tmp_path, "stick_breaking", LOSSES["stick_breaking"], eval_len=8192),
    ]
    rows = learning_curves.gather(pd.concat([*again, table(tmp_path, (0,))]), tmp_path)
    assert set(rows["options"]) == {""} and len(rows) == 6
    assert len(learning_curves.draw(rows).axes) == 2


def test_of_branches_of_one_training_the_longest_is_drawn(tmp_path: Path) -> None:
    rows = [table(tmp_path)]
    for name, losses in LOSSES.items():
        wsd: dict[str, Any] = {"schedule": "wsd", "lr": 1e-3, "train_len": 512}
        rows += [cell(tmp_path, name, (*losses[:2], 0.0), train_tokens=6000, eval_len=1, **wsd)]
        rows += [cell(tmp_path, name, losses, train_tokens=8000, eval_len=2, **wsd)]
    found = learning_curves.gather(pd.concat(rows).assign(schedule=lambda each: each["schedule"].fillna("")), tmp_path)
    assert set(found["train_tokens"]) == {8000} and found["cell"].nunique() == 4 + 2


def test_the_longest_branch_of_one_method_leaves_another_its_own(tmp_path: Path) -> None:
    wsd: dict[str, Any] = {"schedule": "wsd", "lr": 1e-3, "train_len": 512}
    rows = [
        cell(tmp_path, name, losses, train_tokens=tokens, **wsd)
        for (name, losses), tokens in zip(LOSSES.items(), (8000, 6000), strict=True)
    ]
    found = learning_curves.gather(pd.concat(rows), tmp_path)
    assert found.groupby("attention")["train_tokens"].unique().map(list).to_dict() == dict(
        zip(LOSSES, ([8000], [6000]), strict=True)
    )


def test_a_branch_that_ends_where_another_seed_does_is_beside_it(tmp_path: Path) -> None:
    wsd: dict[str, Any] = {"schedule": "wsd", "lr": 1e-3, "train_len": 512}
    rows = [
        cell(tmp_path, name, (*losses[:2], tokens / 1e3), train_tokens=tokens, seed=seed, eval_len=tokens, **wsd)
        for seed, tokens in ((0, 4000), (0, 6000), (0, 8000), (1, 6000))
        for name, losses in LOSSES.items()
    ]
    found = learning_curves.gather(pd.concat(rows), tmp_path)
    assert found.groupby("train_tokens")["cell"].nunique().to_dict() == {6000: 4, 8000: 2}


def test_settings_have_panels_of_their_own_and_gaps_where_there_is_rope(tmp_path: Path) -> None:
    longer = [cell(tmp_path, name, (6.0, 5.5, 5.0), train_len=4096) for name in ("nope", "alibi")]
    figure = learning_curves.draw(learning_curves.gather(pd.concat([table(tmp_path), *longer]), tmp_path))
    assert [axis.get_ylabel()[:4] for axis in figure.axes] == ["held", "loss", "held"]
    assert [axis.get_xlabel() for axis in figure.axes] == ["", "training tokens", "training tokens"]
    assert line(figure.axes[2], "NoPE")[1] == [6.0, 5.5, 5.0]


def test_models_without_held_out_losses_have_no_such_figure(tmp_path: Path) -> None:
    alone = cell(tmp_path, "rope", LOSSES["rope"])
    assert not learning_curves.has_rows(learning_curves.gather(alone, tmp_path))
    none = learning_curves.gather(cell(tmp_path, "nope"), tmp_path)
    assert not learning_curves.has_rows(none)
    with pytest.raises(NothingToDraw, match="no held-out losses during training"):
        learning_curves.draw(none)
    # a table whose curves are not there
    assert not learning_curves.has_rows(learning_curves.gather(alone, tmp_path / "elsewhere"))
