"""The look and the legend entry of each method, whatever else a figure has."""

from pathlib import Path

import pandas as pd
import pytest

from sbeval.kernels import sliding_window
from sbeval.models import config
from sbeval.plots import legend
from sbeval.report import maturity
from sbeval.tables.table import read

RESULTS = Path(__file__).parents[2] / "results"


def test_options_that_all_of_a_method_share_are_not_repeated() -> None:
    labels = {
        pair: look.label
        for pair, look in legend.looks_of(
            [("stick_breaking", "logit_scale=1.5"), ("stick_breaking", "logit_scale=1.5,logit_bias=-3.0")]
        ).items()
    }
    assert labels["stick_breaking", "logit_scale=1.5"] == "stick-breaking"
    assert labels["stick_breaking", "logit_scale=1.5,logit_bias=-3.0"] == "stick-breaking (logit offset −3)"
    (alone,) = legend.looks_of([("stick_breaking", "logit_scale=1.5")]).values()
    assert alone.label == "stick-breaking (logit scale 1.5)"
    # without one that has these alone, or with no other, they tell something
    for options in (["scaling=ntk,factor=2.0", "scaling=ntk,factor=4.0"], ["theta=500.0"]):
        looks = legend.looks_of(("rope", each) for each in options)
        words = [each.replace("=", " ").replace(".0", "").replace(",", ", ") for each in options]
        assert [look.label for look in looks.values()] == [f"RoPE ({each})" for each in words]


def test_a_window_is_named_with_its_width_and_an_offset_in_words() -> None:
    assert legend.WINDOW == sliding_window.Options().window == maturity.WINDOW
    methods = [("sliding_window", options) for options in ("", "window=256", "window=1024,rotary=false")]
    methods += [("stick_breaking", f"remainder=none{more}") for more in (",logit_bias=-1.5", ",logit_bias=spread")]
    assert [look.label for look in legend.looks_of(methods).values()] == [
        "stick-breaking (no remainder, logit offset −1.5)",
        "stick-breaking (no remainder, logit offsets spread)",
        "sliding window of 512",
        "sliding window of 1024 (no rotary)",
        "sliding window of 256",
    ]
    looks = legend.looks_of(("stick_breaking", options) for options in ("", "epsilon=0", "epsilon=0.001"))
    assert [look.label for look in looks.values()] == [
        "stick-breaking",
        "stick-breaking (nothing skipped)",
        "stick-breaking (epsilon=0.001)",
    ]


def test_a_setting_looks_the_same_in_every_figure() -> None:
    base, none = ("stick_breaking", ""), ("stick_breaking", "remainder=none")
    alone, beside = legend.looks_of([none])[none], legend.looks_of([base, none, ("rope", ""), ("other", "")])
    assert (alone.colour, alone.marker, alone.dashes) == (beside[none].colour, beside[none].marker, beside[none].dashes)
    assert beside[base] == legend.looks_of([base])[base] and beside[base].colour != alone.colour
    looks = legend.looks_of([(name, "") for name in legend.NAMES] + list(legend.VARIANTS))
    assert len({(look.colour, look.marker) for look in looks.values()}) == len(looks)
    # those that share a position are in no figure together
    assert [len(set(legend.VARIANTS.values())), len(legend.VARIANTS)] == [18, 23]
    # with the scale of recall, too
    bias = legend.looks_of([("stick_breaking", "logit_bias=-3.0")])["stick_breaking", "logit_bias=-3.0"]
    scaled = ("stick_breaking", "logit_scale=1.5,logit_bias=-3.0")
    assert legend.looks_of([("stick_breaking", "logit_scale=1.5"), scaled])[scaled].colour == bias.colour


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("*.csv")), ids=lambda path: str(path.relative_to(RESULTS)))
def test_methods_of_the_committed_results_have_colours_of_their_own(path: Path) -> None:
    looks = legend.looks(read(path))
    if len(looks) <= len(legend.COLOURS):
        assert len({look.colour for look in looks.values()}) == len(looks)


def test_a_kernel_looks_the_same_in_every_figure() -> None:
    ours = ("stick_breaking", "")
    few, many = (
        legend.looks_of([ours, *(("softmax", kernel) for kernel in kernels)])
        for kernels in (("cudnn", "flash"), ("cudnn", "flash", "flex"))
    )
    for kernel in ("cudnn", "flash"):
        look = few["softmax", kernel]
        assert look == many["softmax", kernel]
        # beside a form of ours, which would have had the look before
        beside = legend.looks_of([ours, ("stick_breaking", "skipping"), ("softmax", kernel), ("softmax", "flex")])
        assert beside["softmax", kernel] == look
        of_model = legend.looks_of([ours, ("rope", "cudnn"), ("rope", "flash")])["rope", kernel]
        assert (of_model.colour, of_model.marker) == (look.colour, look.marker)


def test_a_model_with_learned_positions_is_not_called_one_without() -> None:
    table = pd.DataFrame({"attention": ["nope", "nope", "rope"], "model": ["nanogpt-60m", "60m", "nanogpt-60m"]})
    assert legend.named(table)["attention"].tolist() == ["learned", "nope", "rope"]
    assert legend.looks_of([("learned", "")])["learned", ""].label == "learned positions"
    with_learned = {name for name, size in config.SIZES.items() if size.get("positions")}
    assert set(legend.LEARNED) == with_learned


def test_as_many_methods_as_there_are_colours_differ_in_theirs() -> None:
    methods = [("rope", ""), ("alibi", ""), *(("stick_breaking", f"logit_bias={bias}.0") for bias in range(-14, -6))]
    looks = legend.looks_of(methods)
    assert len({look.colour for look in looks.values()}) == len(legend.COLOURS) == len(methods)
    assert looks["rope", ""] == legend.looks_of([("rope", "")])["rope", ""]


def test_a_setting_of_your_own_has_words_and_a_colour_wherever_it_is() -> None:
    own = [("stick_breaking", f"gate_heads={count},gated=true") for count in (1, 2, 4)]
    labels = [look.label for look in legend.looks_of([("stick_breaking", ""), *own]).values()]
    assert labels == ["stick-breaking", *(f"stick-breaking (gate heads {count}, gated)" for count in (1, 2, 4))]
    assert legend.looks_of([("tempered", "temperature=2.0")])["tempered", "temperature=2.0"].label == (
        "tempered (temperature 2)"
    )
    # the same look whichever others are there, as long as these leave its colour
    last = own[-1]
    few, many = (legend.looks_of(methods)[last] for methods in (own[1:], [*own, ("rope", ""), ("stick_breaking", "")]))
    assert (few.colour, few.marker, few.dashes) == (many.colour, many.marker, many.dashes)
    # a look of its own that is not the method's, unless it is its only form
    base = legend.looks_of([("stick_breaking", "")])["stick_breaking", ""]
    assert few.colour != base.colour and legend.looks_of([last, ("rope", "")])[last].colour == base.colour


def test_a_method_without_a_name_here_looks_like_no_setting() -> None:
    own = [("stick_breaking", f"theta={value}.0") for value in range(500, 540)]
    for setting in own:
        looks = legend.looks_of([("stick_breaking", ""), setting, ("rope", ""), ("tempered", "")])
        assert len({look.colour for look in looks.values()}) == 4, setting
