import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sbeval.errors import InputError
from sbeval.plots import length_gen, style

COMMON: dict[str, Any] = {
    "task": "language",
    "model": "small",
    "options": "",
    "train_len": 256,
    "eval_len": 1024,
    "seed": 0,
    "corpus": "books",
    "tokenizer": "bytes",
    "preset": "quick",
    "train_tokens": 10**6,
    "dtype": "float32",
    "stderr": 0.1,
}
BINS = ((1, 2), (2, 9), (9, 33), (33, 257), (257, 513), (513, 1025))


def cell(attention: str, losses: tuple[float, ...] = (9, 6, 4, 3, 3.5, 4), **common: Any) -> list[dict[str, Any]]:
    same = COMMON | {"attention": attention} | common
    loss = [
        same | {"metric": "loss", "value": value, "position_start": start, "position_end": end}
        for value, (start, end) in zip(losses, BINS, strict=True)
    ]
    perplexity = [
        same | {"metric": "perplexity", "value": math.exp(losses[-1]) + length / 256, "context_length": length}
        for length in (256, 512, 1024)
    ]
    return [*loss, *perplexity, same | {"metric": "bits_per_byte", "value": 1.0, "context_length": 256}]


def table(*cells: list[dict[str, Any]]) -> pd.DataFrame:
    frame = pd.DataFrame([row for rows in cells for row in rows])
    factors = ["position_start", "position_end", "context_length"]
    return frame.astype({name: "Int64" for name in factors})


def lines(axis: Axes) -> dict[str, Line2D]:
    return {str(line.get_label()): line for line in axis.get_lines() if not str(line.get_label()).startswith("_")}


def band(axis: Axes) -> tuple[float, float]:
    heights = np.asarray(axis.collections[0].get_paths()[0].vertices)[:, 1]
    return float(heights.min()), float(heights.max())


def labels(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def xs(line: Line2D) -> list[float]:
    return [float(value) for value in np.asarray(line.get_xdata())]


def ys(line: Line2D) -> list[float]:
    return [float(value) for value in np.asarray(line.get_ydata())]


def test_the_panels_show_the_rows() -> None:
    figure = length_gen.draw(table(cell("stick_breaking"), cell("rope", (9, 6, 4, 3, 5, 7))))
    left, right = figure.axes
    assert labels(figure) == ["stick-breaking", "RoPE"] == list(lines(left)) == list(lines(right))
    rope = lines(left)["RoPE"]
    # bins that end within the first sixteenth of the training length stay out
    assert ys(rope) == [4, 3, 5, 7]
    np.testing.assert_allclose(xs(rope), np.sqrt([9 * 32, 33 * 256, 257 * 512, 513 * 1024]))
    assert xs(lines(right)["RoPE"]) == [256, 512, 1024]
    np.testing.assert_allclose(ys(lines(right)["RoPE"]), math.exp(7) + np.array([1, 2, 4]))
    assert (left.get_xlabel(), left.get_ylabel()) == ("position in the document (tokens)", "loss (nats per token)")
    assert (right.get_xlabel(), right.get_ylabel()) == ("context length (tokens)", "perplexity (per token)")
    assert left.get_title(loc="left") == "Small model, trained at length 256, books"


def test_axes_are_in_powers_of_two_and_mark_the_training_length() -> None:
    figure = length_gen.draw(table(cell("rope")))
    figure.draw_without_rendering()
    left, right = figure.axes
    for axis in (left, right):
        assert axis.get_xscale() == "log"
        assert any(xs(line) == [256, 256] for line in axis.get_lines())
        assert [text.get_text() for text in axis.texts] == ["training length 256"]
    assert [tick.get_text() for tick in left.get_xticklabels()] == ["32", "64", "128", "256", "512", "1024"]
    assert [tick.get_text() for tick in right.get_xticklabels()] == ["256", "512", "1024"]
    low, high = left.get_xlim()
    assert low < 17 and high > 1024


def test_every_point_of_a_short_line_has_a_marker() -> None:
    figure = length_gen.draw(table(cell("rope"), cell("nope"), cell("alibi")))
    for axis in figure.axes:
        assert {line.get_markevery() for line in lines(axis).values()} == {(0, 1)}


def test_long_ranges_thin_the_labels_around_the_training_length() -> None:
    axis = Figure().subplots()
    style.octaves(axis, 1, 2**20, 2048)
    ticks = list(axis.xaxis.get_major_locator().tick_values(1, 2**20))
    assert 2048 in ticks and 4 <= len(ticks) <= 8
    assert {ticks[index + 1] / ticks[index] for index in range(len(ticks) - 1)} == {8}


@pytest.mark.parametrize(("last", "scale"), [(4.5, "linear"), (9.0, "log")])
def test_perplexities_far_apart_are_drawn_logarithmically(last: float, scale: str) -> None:
    figure = length_gen.draw(table(cell("alibi"), cell("rope", (9, 6, 4, 3, 3.5, last))))
    assert figure.axes[1].get_yscale() == scale


def test_seeds_are_averaged_with_a_band_from_lowest_to_highest() -> None:
    cells = [cell("rope", (9, 6, 4, 3, 3.5, 4.0 + seed), seed=seed) for seed in (0, 1, 5)]
    figure = length_gen.draw(table(*cells))
    left = figure.axes[0]
    assert ys(lines(left)["RoPE"])[-1] == 6.0
    assert band(left) == (3.0, 9.0)
    assert figure.get_supxlabel() == "Mean of 3 seeds; bands: lowest to highest seed."


def test_one_seed_has_the_interval_over_documents() -> None:
    figure = length_gen.draw(table(cell("rope", stderr=0.5)))
    assert band(figure.axes[0]) == pytest.approx((3 - 0.98, 4 + 0.98))
    assert figure.get_supxlabel() == "One seed; bands: 95 % interval over documents."
    without = length_gen.draw(table(cell("rope", stderr=math.nan)))
    assert band(without.axes[0]) == (3.0, 4.0)
    assert without.get_supxlabel() == "One seed."


def test_the_note_covers_mixed_numbers_of_seeds() -> None:
    figure = length_gen.draw(table(cell("rope"), cell("rope", seed=1), cell("alibi")))
    expected = "Mean of up to 2 seeds; bands: lowest to highest seed; for one seed, 95 % interval over documents."
    assert figure.get_supxlabel() == expected


def test_settings_are_never_mixed_in_a_panel() -> None:
    settings: list[dict[str, Any]] = [
        {},
        {"train_len": 512},
        {"model": "large"},
        {"corpus": "code"},
        {"train_tokens": 2 * 10**6},
        {"eval_len": 2048},
    ]
    figure = length_gen.draw(table(*(cell("rope", **setting) for setting in settings), cell("nope")))
    titles = [axis.get_title(loc="left") for axis in figure.axes[::2]]
    assert len(titles) == len(set(titles)) == len(settings)
    assert "Small model, trained at length 512, books, evaluated to 1024 tokens, 1,000,000 training tokens" in titles
    for axis in figure.axes:
        for line in lines(axis).values():
            assert len(xs(line)) == len(set(xs(line)))
    # both methods keep their entry, though five panels lack one of them
    assert labels(figure) == ["RoPE", "NoPE"]


def test_a_method_looks_the_same_in_every_figure() -> None:
    few = style.looks(table(cell("alibi"), cell("rope")))
    many = style.looks(table(*(cell(name) for name in [*style.NAMES, "new_kind", "another"])))
    assert list(many)[: len(style.NAMES)] == [(name, "") for name in style.NAMES]
    assert few["alibi", ""] == many["alibi", ""] and few["rope", ""] == many["rope", ""]
    assert many["new_kind", ""].label == "new kind"
    for part in ("colour", "marker"):
        assert len({getattr(look, part) for look in many.values()}) == len(many)


def test_options_are_methods_of_their_own() -> None:
    looks = style.looks(table(cell("rope", options="theta=10"), cell("rope"), cell("rope", options="theta=20")))
    assert [look.label for look in looks.values()] == ["RoPE", "RoPE (theta=10)", "RoPE (theta=20)"]
    assert len({look.colour for look in looks.values()}) == 3
    alone = style.looks(table(cell("rope", options="theta=10")))
    assert alone["rope", "theta=10"].colour == looks["rope", ""].colour


def test_nothing_to_draw_and_unusable_factors_are_said() -> None:
    rows = table(cell("rope"))
    with pytest.raises(InputError, match="no rows with metric 'loss' or 'perplexity'"):
        length_gen.draw(rows[rows["metric"] == "bits_per_byte"])
    with pytest.raises(InputError, match="column 'position_end' holds ''"):
        length_gen.draw(rows.assign(position_end=None))


def test_one_kind_of_rows_alone_is_drawn() -> None:
    rows = table(cell("rope"))
    left, right = length_gen.draw(rows[rows["metric"] == "loss"]).axes
    assert left.axison and not right.axison and "RoPE" in lines(left)


def test_drawing_leaves_the_table_alone() -> None:
    rows = table(cell("rope"), cell("nope"))
    before = rows.copy()
    length_gen.draw(rows)
    pd.testing.assert_frame_equal(rows, before)
