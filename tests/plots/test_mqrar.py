from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sbeval.errors import InputError
from sbeval.plots import mqrar

COMMON: dict[str, Any] = {
    "task": "mqrar",
    "model": "two_layers",
    "options": "",
    "train_len": 64,
    "eval_len": 64,
    "seed": 0,
    "preset": "quick",
    "dtype": "float32",
    "stderr": 0.01,
    "seq_len": 64,
    "vocab_size": 65,
    "width": 32,
    "layers": 2,
    "heads": 1,
    "lr": 1e-3,
}


def note(figure: Figure) -> str:
    """What stands below the panels, in one line."""
    return figure.get_supxlabel().replace("\n", " ")


def title(figure: Figure) -> str:
    """What stands above the first panel, in one line."""
    return figure.axes[0].texts[0].get_text().replace("\n", " ")


def cell(attention: str, kv_pairs: int, score: float, validation: float | None = None, **common: Any) -> pd.DataFrame:
    same = COMMON | {"attention": attention, "kv_pairs": kv_pairs, "metric": "accuracy"} | common
    rows = [
        same | {"split": split, "value": score * part} for split, part in (("all", 1), ("fresh", 0.9), ("stale", 0.5))
    ]
    if validation is not None:
        rows.append(same | {"metric": "validation_accuracy", "split": "all", "value": validation})
        # accuracy by finer kinds of query has no split; neither does it choose nor is it drawn
        rows += [
            same | {"metric": metric, "split": "", "value": 1 - score} for metric in ("accuracy", "validation_accuracy")
        ]
    return pd.DataFrame(rows)


def table(*cells: pd.DataFrame) -> pd.DataFrame:
    return pd.concat(cells, ignore_index=True)


def lines(axis: Axes) -> dict[str, list[Line2D]]:
    found: dict[str, list[Line2D]] = {}
    for line in axis.get_lines():
        if not str(line.get_label()).startswith("_"):
            found.setdefault(str(line.get_label()), []).append(line)
    return found


def xs(line: Line2D) -> list[float]:
    return [float(value) for value in np.asarray(line.get_xdata())]


def ys(line: Line2D) -> list[float]:
    return [float(value) for value in np.asarray(line.get_ydata())]


def test_accuracy_by_pairs_with_the_chance_level() -> None:
    scores = {4: 1.0, 8: 0.75, 16: 0.5}
    figure = mqrar.draw(
        table(*(cell(name, pairs, scores[pairs]) for name in ("rope", "stick_breaking") for pairs in scores))
    )
    (left,) = figure.axes
    legend = ["stick-breaking", "RoPE", "chance, 1/33"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == legend
    (rope,) = lines(left)["RoPE"]
    assert xs(rope) == [4, 8, 16] and ys(rope) == [1.0, 0.75, 0.5]
    # 65 tokens: 32 keys (with the unused 0) and 33 values
    (chance,) = lines(left)["chance, 1/33"]
    assert ys(chance) == [1 / 33, 1 / 33] and chance.get_linestyle() == ":"
    figure.draw_without_rendering()
    assert [tick.get_text() for tick in left.get_xticklabels()] == ["4", "8", "16"]
    assert (left.get_xlabel(), left.get_ylabel()) == ("key-value pairs", "accuracy")
    assert left.get_ylim() == (-0.03, 1.03)
    assert title(figure) == "Two_layers model, vocabulary of 65, sequences of 64 tokens"
    assert note(figure) == "One seed; bars: 95 % interval over sequences."


def test_the_page_has_fresh_and_stale_queries() -> None:
    (group,) = mqrar.chart(table(*(cell(name, pairs, 0.8) for name in ("rope", "nope") for pairs in (4, 8)))).groups
    means = {panel.title: panel.rows()["accuracy"].tolist() for panel in group.panels}
    assert list(means) == ["all queries", "fresh: the key's first value", "stale: the key had another"]
    for mean, values in zip((0.8, 0.72, 0.4), means.values(), strict=True):
        assert values == pytest.approx([mean] * 4)


def test_a_panel_for_each_size_of_model() -> None:
    sizes = [(64, "2x64"), (512, "2x512"), (128, "2x128"), (256, "2x256")]
    cells = [
        cell(name, pairs, width / 1024, width=width, model=model)
        for name in ("rope", "nope")
        for pairs in (4, 8)
        for width, model in sizes
    ]
    figure = mqrar.draw(table(*cells))
    # by width, three in a row
    assert [axis.axison for axis in figure.axes] == [True] * 4 + [False] * 2
    shown = figure.axes[:4]
    assert [axis.texts[-1].get_text() for axis in shown] == [f"2x{width} model" for width in (64, 128, 256, 512)]
    assert title(figure) == "Vocabulary of 65, sequences of 64 tokens"
    for axis, width in zip(shown, (64, 128, 256, 512), strict=True):
        assert ys(lines(axis)["RoPE"][0]) == ys(lines(axis)["NoPE"][0]) == [width / 1024] * 2
    assert [axis.get_ylabel() for axis in shown] == ["accuracy", "", "", "accuracy"]
    assert list(mqrar.figures(table(*cells))) == [""]


def test_a_single_number_of_pairs_keeps_methods_apart() -> None:
    left = mqrar.draw(table(*(cell(name, 8, 1.0) for name in ("rope", "nope", "alibi")))).axes[0]
    places = [xs(lines(left)[name][0])[0] for name in ("RoPE", "ALiBi", "NoPE")]
    assert len(set(places)) == 3 and places[1] == 8
    low, high = left.get_xlim()
    assert low < min(places) and max(places) < high


def test_bars_over_seeds_stay_within_what_an_accuracy_can_be() -> None:
    cells = [cell("rope", 4, score, seed=seed) for seed, score in enumerate((0.2, 0.4, 0.9))]
    left = mqrar.draw(table(*cells, cell("nope", 4, 1.0, stderr=0.5))).axes[0]
    assert ys(lines(left)["RoPE"][0]) == pytest.approx([0.5])
    bars = [item for item in left.collections if isinstance(item, LineCollection)]
    rope, nope = (np.asarray(bar.get_paths()[0].vertices)[:, 1] for bar in bars)
    assert 0 <= rope[0] < 0.2 and 0.9 < rope[1] <= 1
    # without a number of sequences, a share of 1 has no interval
    assert nope.tolist() == [1.0, 1.0]
    (dots,) = [item for item in left.collections if not isinstance(item, LineCollection)]
    np.testing.assert_allclose(np.asarray(dots.get_offsets())[:, 1], [0.2, 0.4, 0.9])


def test_the_best_rate_by_validation_is_drawn_for_each_number_of_pairs() -> None:
    figure = mqrar.draw(
        table(
            # the better test score has the worse validation score
            *(cell("rope", 4, 0.3, 0.9, lr=1e-3, seed=seed) for seed in (0, 1)),
            *(cell("rope", 4, 0.8, 0.2 + seed / 2, lr=1e-2, seed=seed) for seed in (0, 1)),
            cell("rope", 8, 0.1, 0.4, lr=1e-3),
            cell("rope", 8, 0.2, 0.5, lr=1e-2),
        )
    )
    (rope,) = lines(figure.axes[0])["RoPE"]
    assert ys(rope) == [0.3, 0.2]


def test_several_rates_without_validation_are_refused() -> None:
    with pytest.raises(
        InputError, match="rope with 4 key-value pairs has the learning rates 0.001, 0.01 and no validation"
    ):
        mqrar.draw(table(cell("rope", 4, 0.3, lr=1e-3), cell("rope", 4, 0.8, lr=1e-2)))


def test_settings_have_figures_of_their_own() -> None:
    first = [cell("rope", pairs, 0.3) for pairs in (4, 8)]
    larger, wider = cell("rope", 4, 0.4, vocab_size=1024), cell("rope", 4, 0.5, width=64, heads=2)
    drawn = mqrar.figures(table(*first, larger, wider))
    assert list(drawn) == ["", "-vocabulary-of-1024"]
    small, large = drawn.values()
    assert title(small) == "Vocabulary of 65, sequences of 64 tokens"
    assert title(large) == "Two_layers model, vocabulary of 1024, sequences of 64 tokens"
    # sizes are panels of one figure
    assert [ys(lines(axis)["RoPE"][0]) for axis in small.axes] == [[0.3, 0.3], [0.5]]
    assert [ys(lines(axis)["RoPE"][0]) for axis in large.axes] == [[0.4]]
    assert "chance, 1/512" in lines(large.axes[0]) and "chance, 1/512" not in lines(small.axes[0])
    assert all("Other settings have figures of their own." in note(figure) for figure in (small, large))
    assert "Other" not in note(mqrar.figures(table(*first))[""])
    assert len(mqrar.chart(table(*first, larger, wider)).groups) == 3


@pytest.mark.parametrize(
    "other", [{"vocab_size": 1024}, {"optimizer": "muon"}, {"max_steps": 12000}, {"patience": 100}]
)
def test_not_even_other_numbers_of_pairs_mix_budgets_or_vocabularies(other: dict[str, Any]) -> None:
    usual: dict[str, Any] = {"optimizer": "adamw", "max_steps": 6000, "patience": 3000}
    rows = table(cell("rope", 4, 0.3, **usual), cell("rope", 8, 0.3, **usual), cell("rope", 16, 0.4, **usual | other))
    drawn = list(mqrar.figures(rows).values())
    assert [[xs(lines(axis)["RoPE"][0]) for axis in figure.axes] for figure in drawn] == [[[4, 8]], [[16]]]


def test_sequences_that_grow_with_the_pairs_share_a_panel() -> None:
    figure = mqrar.draw(table(*(cell("rope", pairs, 0.5, seq_len=8 * pairs, eval_len=8 * pairs) for pairs in (4, 8))))
    assert len(figure.axes) == 1
    assert title(figure) == "Two_layers model, vocabulary of 65"


def test_nothing_to_draw_is_said() -> None:
    rows = table(cell("rope", 4, 0.3))
    with pytest.raises(InputError, match="no rows with metric 'accuracy' and split 'all'"):
        mqrar.draw(rows[rows["split"] == "fresh"])
    with pytest.raises(InputError, match="no rows with metric 'accuracy' and split 'all'"):
        mqrar.draw(rows.iloc[:0])
    with pytest.raises(InputError, match="column 'kv_pairs' holds 'many'"):
        mqrar.draw(rows.assign(kv_pairs="many"))


def test_rates_are_compared_at_the_seeds_that_all_have() -> None:
    figure = mqrar.draw(
        table(
            # further seeds, run at the best rate alone, can be worse than the first
            *(cell("rope", 4, 0.3, score, lr=1e-3, seed=seed) for seed, score in enumerate((0.9, 0.1, 0.1))),
            cell("rope", 4, 0.8, 0.8, lr=1e-2),
        )
    )
    assert ys(lines(figure.axes[0])["RoPE"][0]) == pytest.approx([0.3])


def test_of_equal_rates_the_one_with_the_fewest_steps_is_drawn() -> None:
    rates = [(1e-3, 0.3, 200), (2e-3, 0.5, 100), (3e-3, 0.7, 100)]
    steps = [
        COMMON | {"attention": "rope", "kv_pairs": 4, "metric": "steps", "value": n, "lr": lr} for lr, _, n in rates
    ]
    cells = [cell("rope", 4, score, 1.0, lr=lr) for lr, score, _ in rates]
    figure = mqrar.draw(table(*cells, pd.DataFrame(steps)))
    assert ys(lines(figure.axes[0])["RoPE"][0]) == [0.5]


def test_what_came_later_tells_settings_apart() -> None:
    fillers = [cell("rope", 4, score, filler=filler) for filler, score in (("any", 0.3), ("value", 0.4))]
    drawn = mqrar.figures(table(*fillers))
    assert [ys(lines(figure.axes[0])["RoPE"][0]) for figure in drawn.values()] == [[0.3], [0.4]]
    assert list(drawn) == ["", "-filler-value"] and title(drawn[""]).endswith(", filler: any")


def test_rows_from_before_there_was_a_choice_of_optimizer_are_adamws() -> None:
    before = [cell("rope", 4, 0.3), cell("rope", 8, 0.2, optimizer="")]
    later = [cell("rope", 4, 0.9, optimizer="muon"), cell("rope", 16, 0.1, optimizer="adamw")]
    adamw, muon = mqrar.figures(table(*before, *later)).values()
    assert ys(lines(adamw.axes[0])["RoPE"][0]) == [0.3, 0.2, 0.1] and ys(lines(muon.axes[0])["RoPE"][0]) == [0.9]
    assert title(adamw).endswith(", trained with adamw") and title(muon).endswith(", trained with muon")


def test_older_values_are_drawn_by_their_age() -> None:
    ages = [cell("rope", 4, 1 / n, n_back=n, heads=2) for n in (1, 2, 4)]
    pairs = [cell("rope", pairs, 0.9) for pairs in (4, 8, 16, 32)]
    # a table has an empty cell where the column came later
    drawn = mqrar.figures(table(*pairs, *ages))
    assert list(drawn) == ["", "-n-back"]
    by_pairs, by_age = (figure.axes[0] for figure in drawn.values())
    assert (xs(lines(by_pairs)["RoPE"][0]), by_pairs.get_xlabel()) == ([4, 8, 16, 32], "key-value pairs")
    (rope,) = lines(by_age)["RoPE"]
    assert (xs(rope), ys(rope)) == ([1, 2, 4], [1.0, 0.5, 0.25])
    assert by_age.get_xlabel() == "n, where the n-th last value is asked for"
    assert "4 key-value pairs" in title(drawn["-n-back"])


def test_a_title_says_how_models_were_trained_where_less_would_tell_panels_apart() -> None:
    paths = [cell("rope", 4, 0.9, preset="h200", optimizer="muon", patience=3000)]
    paths += [cell("rope", 4, 0.3, preset="logit_bias", optimizer="adamw", patience=1000)]
    titles = [title(figure).split("tokens, ")[1] for figure in mqrar.figures(table(*paths)).values()]
    assert titles == ["trained with muon, patience 3000", "trained with adamw, patience 1000"]


def test_how_training_ended_is_said_where_the_table_has_it() -> None:
    ended = {"a": "solved", "b": "plateau", "c": "plateau"}
    scores = [cell("rope", 4 + at, 0.9, cell=name) for at, name in enumerate(ended)]
    ends = [
        COMMON | {"attention": "rope", "metric": "solved", "cell": name, "status": how, "value": 0.0, "kv_pairs": 4}
        for name, how in ended.items()
    ]
    figure = mqrar.draw(table(*scores, pd.DataFrame(ends)))
    assert note(figure).endswith(" Training ended: 1 solved, 2 without progress.")
    assert mqrar.chart(table(*scores, pd.DataFrame(ends))).note.endswith("2 without progress.")
    assert "Training" not in note(mqrar.draw(table(*scores)))
