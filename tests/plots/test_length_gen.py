import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sbeval.errors import InputError
from sbeval.plots import legend, length_gen, loss_by_position, style

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
LENGTHS = (128, 256, 512, 1024)


def note(figure: Figure) -> str:
    """What stands below the panels, in one line."""
    return figure.get_supxlabel().replace("\n", " ")


def cell(attention: str, values: tuple[float, ...] = (45, 44, 46, 50), **common: Any) -> list[dict[str, Any]]:
    same = COMMON | {"attention": attention, "metric": "perplexity"} | common
    return [
        *(same | {"value": value, "context_length": length} for value, length in zip(values, LENGTHS, strict=True)),
        # over windows of whole documents, of no context length
        same | {"value": 1e6},
        same | {"metric": "bits_per_byte", "value": 1.0, "context_length": 256},
    ]


def table(*cells: list[dict[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame([row for rows in cells for row in rows]).astype({"context_length": "Int64"})


def lines(axis: Axes) -> dict[str, Line2D]:
    return {str(line.get_label()): line for line in axis.get_lines() if not str(line.get_label()).startswith("_")}


def band(axis: Axes) -> tuple[float, float]:
    heights = np.asarray(axis.collections[0].get_paths()[0].vertices)[:, 1]
    return float(heights.min()), float(heights.max())


def labels(figure: Figure) -> list[str]:
    """The one legend of all panels, without the training length, which ends it."""
    (legend,) = figure.legends
    assert not any(axis.get_legend() for axis in figure.axes)
    *methods, mark = [text.get_text() for text in legend.get_texts()]
    assert mark == "training length"
    return methods


def heads(figure: Figure) -> list[str]:
    """The names of columns: the last text of a panel."""
    return [axis.texts[-1].get_text() for axis in figure.axes if axis.axison]


def xs(line: Line2D) -> list[float]:
    return [float(value) for value in np.asarray(line.get_xdata())]


def ys(line: Line2D) -> list[float]:
    return [float(value) for value in np.asarray(line.get_ydata())]


def test_few_methods_have_one_panel() -> None:
    figure = length_gen.draw(table(cell("rope", (45, 44, 60, 90)), cell("stick_breaking")))
    (axis,) = figure.axes
    assert labels(figure) == ["stick-breaking", "RoPE"] == list(lines(axis))
    assert xs(lines(axis)["RoPE"]) == [128, 256, 512, 1024] and ys(lines(axis)["RoPE"]) == pytest.approx(
        [45, 44, 60, 90]
    )
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("context length (tokens)", "perplexity (per token)")
    assert axis.texts[0].get_text().replace("\n", " ") == "Small model, trained at length 256, books"
    # the title takes two lines here, and the legend stands above both
    figure.draw_without_rendering()
    assert "\n" in axis.texts[0].get_text() and len(axis.texts) == 1
    assert figure.legends[0].get_window_extent().y0 > axis.texts[0].get_window_extent().y1


def test_schemes_factors_and_windows_have_a_column_and_training_lengths_a_row() -> None:
    specs = [("sliding_window", "window=1024"), ("sliding_window", ""), ("sliding_window", "rotary=false,window=64")]
    specs += [("rope", f"scaling=ntk,factor={factor}.0") for factor in (16, 2)]
    specs += [("rope", "scaling=yarn,factor=4.0,train_len=256"), ("rope", ""), ("stick_breaking", ""), ("fire", "")]
    everything = [
        cell(name, options=options, train_len=length, seed=seed)
        for name, options in specs
        for length in (256, 512)
        for seed in (0, 1)
    ]
    figure = length_gen.draw(table(*everything))
    assert len(figure.axes) == 6
    assert heads(figure) == ["attention schemes", "RoPE scaled at evaluation", "sliding windows"] * 2
    schemes, scaled = ["stick-breaking", "RoPE", "FIRE"], ["NTK, f = 2", "NTK, f = 16", "YaRN, f = 4"]
    windows = ["sliding window of 64, rotary=false", "sliding window of 512", "sliding window of 1024"]
    assert labels(figure) == [*schemes, *scaled, *windows]
    for row, length in ((figure.axes[:3], 256), (figure.axes[3:], 512)):
        assert list(lines(row[0])) == schemes
        assert list(lines(row[1])) == ["stick-breaking", "RoPE", *scaled]
        assert list(lines(row[2])) == ["stick-breaking", "RoPE", *windows]
        for axis in row:
            looks = [(line.get_color(), line.get_marker()) for line in lines(axis).values()]
            assert len({colour for colour, _ in looks}) == len({marker for _, marker in looks}) == len(looks)
            assert any(xs(line) == [length, length] for line in axis.get_lines())
            assert lines(axis)["RoPE"].get_color() == lines(row[0])["RoPE"].get_color()
            assert axis.get_ylim() == row[0].get_ylim()
    # one legend tells all methods apart
    colours = {label: line.get_color() for axis in figure.axes for label, line in lines(axis).items()}
    assert len(set(colours.values())) == len(colours) == 9
    figure.draw_without_rendering()
    places = [axis.get_position() for axis in figure.axes[:3]]
    gaps = [right.x0 - left.x1 for left, right in zip(places, places[1:], strict=False)]
    assert gaps[0] == pytest.approx(gaps[1], abs=1e-3)
    assert len({round(place.width, 3) for place in places}) == 1


def test_a_training_length_without_a_column_leaves_its_panel_empty() -> None:
    rope = [cell("rope"), cell("rope", train_len=512)]
    figure = length_gen.draw(table(*rope, cell("sliding_window")))
    assert [axis.axison for axis in figure.axes] == [True, True, True, False]
    # the lowest panel of a column names x
    assert [bool(axis.get_xlabel()) for axis in figure.axes] == [False, True, True, False]
    assert heads(figure) == ["attention schemes", "sliding windows", "attention schemes"]
    assert labels(length_gen.draw(table(cell("sliding_window")))) == ["sliding window of 512"]


def test_many_settings_are_abreast_under_what_they_share() -> None:
    counts = [10**6, 2 * 10**6, 4 * 10**6, 8 * 10**6]
    figure = length_gen.draw(table(*(cell(name, train_tokens=count) for count in counts for name in ("rope", "alibi"))))
    shown = [axis for axis in figure.axes if axis.axison]
    assert len(figure.axes) == 6 and len(shown) == 4
    title, *rests = [text.get_text() for axis in shown for text in axis.texts]
    assert title == "Small model, trained at length 256, books"
    assert rests == [f"{count} M training tokens" for count in (1, 2, 4, 8)]
    # axes are named at the left and at the bottom of what is drawn
    assert [bool(axis.get_ylabel()) for axis in shown] == [True, False, False, True]
    assert [bool(axis.get_xlabel()) for axis in shown] == [False, True, True, True]


def test_the_default_window_is_that_of_the_method() -> None:
    from sbeval.kernels import sliding_window

    assert legend.WINDOW == sliding_window.Options().window


def test_axes_are_in_powers_of_two_and_mark_the_training_length() -> None:
    figure = length_gen.draw(table(cell("rope")))
    figure.draw_without_rendering()
    (axis,) = figure.axes
    assert axis.get_xscale() == "log"
    assert any(xs(line) == [256, 256] for line in axis.get_lines())
    assert figure.legends[0].get_texts()[-1].get_text() == "training length"
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["128", "256", "512", "1024"]
    low, high = axis.get_xlim()
    assert low < 128 and high > 1024


def test_every_point_of_a_short_line_has_a_marker() -> None:
    (axis,) = length_gen.draw(table(cell("rope"), cell("nope"), cell("alibi"))).axes
    assert {line.get_markevery() for line in lines(axis).values()} == {(0, 1)}


def test_long_ranges_thin_the_labels_around_the_training_length() -> None:
    axis = Figure().subplots()
    style.octaves(axis, 1, 2**20, 2048)
    ticks = list(axis.xaxis.get_major_locator().tick_values(1, 2**20))
    assert 2048 in ticks and 4 <= len(ticks) <= 8
    assert {ticks[index + 1] / ticks[index] for index in range(len(ticks) - 1)} == {8}


@pytest.mark.parametrize(("last", "scale"), [(100, "linear"), (9000, "log")])
def test_perplexities_far_apart_are_drawn_logarithmically(last: float, scale: str) -> None:
    figure = length_gen.draw(table(cell("alibi"), cell("rope", (45, 44, 46, last))))
    assert figure.axes[0].get_yscale() == scale


def test_a_method_that_is_lost_leaves_the_panel_and_is_named() -> None:
    last = 50.0
    figure = length_gen.draw(table(cell("alibi"), cell("rope", (45, 44, 46, 599)), cell("nope", (45, 44, 46, 9000))))
    assert figure.axes[0].get_ylim()[1] == pytest.approx(12 * last)
    assert note(figure).endswith("NoPE leaves the panels.")
    both = length_gen.draw(table(cell("alibi"), cell("rope", (45, 44, 46, 700)), cell("nope", (45, 44, 46, 9000))))
    assert note(both).endswith("RoPE, NoPE leave the panels.")
    inside = length_gen.draw(table(cell("alibi"), cell("rope", (45, 44, 46, 390), stderr=1.0)))
    assert inside.axes[0].get_ylim()[1] > 390 and "leave" not in note(inside)


def test_seeds_are_averaged_as_logarithms_with_an_interval_and_drawn_as_dots() -> None:
    cells = [cell("rope", (40, 40, 40, 40 * 1.1**seed), seed=seed) for seed in (0, 1, 2)]
    figure = length_gen.draw(table(*cells))
    (axis,) = figure.axes
    assert ys(lines(axis)["RoPE"])[-1] == pytest.approx(40 * 1.1)
    # 4.303: the 97.5 % quantile of Student's t with two degrees of freedom
    assert band(axis) == pytest.approx((40 * 1.1 ** (1 - 4.3027 / 3**0.5), 40 * 1.1 ** (1 + 4.3027 / 3**0.5)), rel=1e-2)
    assert note(figure) == "Means of 3 seeds; bands: 95 % interval over seeds and documents; dots: seeds."
    dots = np.asarray(axis.collections[1].get_offsets())
    assert sorted(dots[:, 1])[-3:] == pytest.approx([40, 40 * 1.1, 40 * 1.1**2]) and len(dots) == 12


def test_a_wide_band_of_a_method_that_is_lost_does_not_stretch_the_panel() -> None:
    lost = [cell("nope", (45, 44, 46, value), seed=seed) for seed, value in enumerate((500.0, 90000.0))]
    good = [cell("rope", (45, 44, 46, 45.1 + seed), seed=seed) for seed in (0, 1)]
    (axis,) = length_gen.draw(table(*good, *lost)).axes
    assert axis.get_ylim()[0] > 30
    # nor does it fill the panel: it ends before the first point at which it leaves
    bands = [item for item in axis.collections if isinstance(item, PolyCollection)]
    ends = [float(np.asarray(each.get_paths()[0].vertices)[:, 0].max()) for each in bands]
    assert ends == [1024, 512] and ys(lines(axis)["NoPE"])[-1] > axis.get_ylim()[1]
    (panel,) = length_gen.chart(table(*good, *lost)).groups[0].panels
    assert panel.plotly()["layout"]["yaxis"]["range"][0] > 1.4


def test_one_seed_has_the_interval_over_documents() -> None:
    figure = length_gen.draw(table(cell("rope", stderr=0.5, n=16)))
    # 2.131: the 97.5 % quantile of Student's t for 16 documents
    low, high = (value * math.exp(sign * 2.131 * 0.5 / value) for value, sign in ((44, -1), (50, 1)))
    assert band(figure.axes[0]) == pytest.approx((low, high), rel=1e-3)
    assert note(figure) == "One seed; bands: 95 % interval over documents."
    without = length_gen.draw(table(cell("rope", stderr=math.nan)))
    assert band(without.axes[0]) == pytest.approx((44, 50))
    assert note(without) == "One seed."


def test_the_note_covers_mixed_numbers_of_seeds() -> None:
    figure = length_gen.draw(table(cell("rope"), cell("rope", seed=1), cell("alibi")))
    expected = "Means of 1 to 2 seeds; bands: 95 % interval over seeds and documents; dots: seeds."
    assert note(figure) == expected


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
    titles = [axis.texts[0].get_text().replace("\n", " ") for axis in figure.axes]
    assert len(titles) == len(set(titles)) == len(settings)
    assert "Small model, trained at length 512, books, evaluated to 1024 tokens, 1 M training tokens" in titles
    for axis in figure.axes:
        for line in lines(axis).values():
            assert len(xs(line)) == len(set(xs(line)))
    # both methods keep their entry, though five panels lack one of them
    assert labels(figure) == ["RoPE", "NoPE"]


def test_a_method_looks_the_same_in_every_figure() -> None:
    few = legend.looks(table(cell("alibi"), cell("rope")))
    many = legend.looks(table(*(cell(name) for name in [*legend.NAMES, "new_kind", "another"])))
    assert list(many)[: len(legend.NAMES)] == [(name, "") for name in legend.NAMES]
    assert few["alibi", ""] == many["alibi", ""] and few["rope", ""] == many["rope", ""]
    assert many["new_kind", ""].label == "new kind"
    for part in ("colour", "marker"):
        assert len({getattr(look, part) for look in many.values()}) == len(many)


def test_options_are_methods_of_their_own() -> None:
    looks = legend.looks(table(cell("rope", options="theta=10"), cell("rope"), cell("rope", options="theta=20")))
    assert [look.label for look in looks.values()] == ["RoPE", "RoPE (theta 10)", "RoPE (theta 20)"]
    assert len({look.colour for look in looks.values()}) == 3
    alone = legend.looks(table(cell("rope", options="theta=10")))
    assert alone["rope", "theta=10"].colour == looks["rope", ""].colour


def test_nothing_to_draw_is_said() -> None:
    rows = table(cell("rope"))
    with pytest.raises(InputError, match="no rows with metric 'perplexity' and a context length"):
        length_gen.draw(rows[rows["metric"] == "bits_per_byte"])


def test_drawing_leaves_the_table_alone() -> None:
    rows = table(cell("rope"), cell("nope"))
    before = rows.copy()
    length_gen.draw(rows)
    pd.testing.assert_frame_equal(rows, before)


def test_the_note_names_models_that_overfit_and_those_of_many_epochs() -> None:
    rows = table(
        cell("rope", status="overfit", epochs=39.0),
        cell("rope", options="scaling=ntk,factor=2.0", epochs=3.0),
        cell("stick_breaking", epochs=4.5),
    )
    said = (
        "Overfit (held-out loss ended over 0.05 nats/token above its lowest): RoPE. "
        "Trained for more than 4 epochs of the text: RoPE 39, stick-breaking 4.5."
    )
    assert said in note(length_gen.draw(rows)) and said in length_gen.chart(rows).note
    losses = rows.assign(metric="loss", position_start=1, position_end=257)
    assert said in note(loss_by_position.draw(losses)) and said in loss_by_position.chart(losses).note
    assert "verfit" not in note(length_gen.draw(table(cell("rope"))))
