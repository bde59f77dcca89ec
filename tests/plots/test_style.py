"""The look and the legend entry of each method, whatever else a figure has."""

import pandas as pd
from matplotlib.figure import Figure

from sbeval.kernels import sliding_window
from sbeval.models import config
from sbeval.plots import style
from sbeval.report import maturity


def test_options_that_all_of_a_method_share_are_not_repeated() -> None:
    labels = {
        pair: look.label
        for pair, look in style.looks_of(
            [("stick_breaking", "logit_scale=1.5"), ("stick_breaking", "logit_scale=1.5,logit_bias=-3.0")]
        ).items()
    }
    assert labels["stick_breaking", "logit_scale=1.5"] == "stick-breaking"
    assert labels["stick_breaking", "logit_scale=1.5,logit_bias=-3.0"] == "stick-breaking (logit offset −3)"
    (alone,) = style.looks_of([("stick_breaking", "logit_scale=1.5")]).values()
    assert alone.label == "stick-breaking (logit scale 1.5)"
    # without one that has these alone, or with no other, they tell something
    for options in (["scaling=ntk,factor=2.0", "scaling=ntk,factor=4.0"], ["theta=500.0"]):
        looks = style.looks_of(("rope", each) for each in options)
        words = [each.replace("=", " ").replace(".0", "").replace(",", ", ") for each in options]
        assert [look.label for look in looks.values()] == [f"RoPE ({each})" for each in words]


def test_a_window_is_named_with_its_width_and_an_offset_in_words() -> None:
    assert style.WINDOW == sliding_window.Options().window == maturity.WINDOW
    methods = [("sliding_window", options) for options in ("", "window=256", "window=1024,rotary=false")]
    methods += [("stick_breaking", f"remainder=none{more}") for more in (",logit_bias=-1.5", ",logit_bias=spread")]
    assert [look.label for look in style.looks_of(methods).values()] == [
        "stick-breaking (no remainder, logit offset −1.5)",
        "stick-breaking (no remainder, logit offsets spread)",
        "sliding window of 512",
        "sliding window of 1024 (no rotary)",
        "sliding window of 256",
    ]


def test_a_setting_looks_the_same_in_every_figure() -> None:
    base, none = ("stick_breaking", ""), ("stick_breaking", "remainder=none")
    alone, beside = style.looks_of([none])[none], style.looks_of([base, none, ("rope", ""), ("other", "")])
    assert (alone.colour, alone.marker, alone.dashes) == (beside[none].colour, beside[none].marker, beside[none].dashes)
    assert beside[base] == style.looks_of([base])[base] and beside[base].colour != alone.colour
    looks = style.looks_of([(name, "") for name in style.NAMES] + list(style.VARIANTS))
    assert len({(look.colour, look.marker) for look in looks.values()}) == len(looks)
    # those that share a position are in no figure together
    assert [len(set(style.VARIANTS.values())), len(style.VARIANTS)] == [16, 18]
    # with the scale of recall, too
    bias = style.looks_of([("stick_breaking", "logit_bias=-3.0")])["stick_breaking", "logit_bias=-3.0"]
    scaled = ("stick_breaking", "logit_scale=1.5,logit_bias=-3.0")
    assert style.looks_of([("stick_breaking", "logit_scale=1.5"), scaled])[scaled].colour == bias.colour


def test_a_model_with_learned_positions_is_not_called_one_without() -> None:
    table = pd.DataFrame({"attention": ["nope", "nope", "rope"], "model": ["nanogpt-60m", "60m", "nanogpt-60m"]})
    assert style.named(table)["attention"].tolist() == ["learned", "nope", "rope"]
    assert style.looks_of([("learned", "")])["learned", ""].label == "learned positions"
    with_learned = {name for name, size in config.SIZES.items() if size.get("positions")}
    assert set(style.LEARNED) == with_learned


def test_as_many_methods_as_there_are_colours_differ_in_theirs() -> None:
    methods = [("rope", ""), ("alibi", ""), *(("stick_breaking", f"logit_bias={bias}.0") for bias in range(-14, -6))]
    looks = style.looks_of(methods)
    assert len({look.colour for look in looks.values()}) == len(style.COLOURS) == len(methods)
    assert looks["rope", ""] == style.looks_of([("rope", "")])["rope", ""]


def test_a_setting_of_your_own_has_words_and_a_colour_wherever_it_is() -> None:
    own = [("stick_breaking", f"gate_heads={count},gated=true") for count in (1, 2, 4)]
    labels = [look.label for look in style.looks_of([("stick_breaking", ""), *own]).values()]
    assert labels == ["stick-breaking", *(f"stick-breaking (gate heads {count}, gated)" for count in (1, 2, 4))]
    assert style.looks_of([("tempered", "temperature=2.0")])["tempered", "temperature=2.0"].label == (
        "tempered (temperature 2)"
    )
    # the same look whichever others are there, as long as these leave its colour
    last = own[-1]
    few, many = (style.looks_of(methods)[last] for methods in (own[1:], [*own, ("rope", ""), ("stick_breaking", "")]))
    assert (few.colour, few.marker, few.dashes) == (many.colour, many.marker, many.dashes)
    # a look of its own that is not the method's, unless it is its only form
    base = style.looks_of([("stick_breaking", "")])["stick_breaking", ""]
    assert few.colour != base.colour and style.looks_of([last, ("rope", "")])[last].colour == base.colour


def test_labels_of_counts_are_plain_numbers() -> None:
    figure = Figure()
    axis = figure.subplots()
    axis.plot([4e6, 1e8], [1, 2])
    style.counts(axis)
    figure.draw_without_rendering()
    labels = [text.get_text() for text in axis.get_xticklabels()]
    assert {"5 M", "10 M", "50 M", "100 M"} <= set(labels) and not any("$" in label for label in labels)
