"""The skipping figure adds up what all layers take, and tells skipping from visiting all keys."""

import numpy as np
import pandas as pd
import pytest

from sbeval.errors import InputError
from sbeval.plots import skipping


def table(far: float = 2.0) -> pd.DataFrame:
    rows = []
    for attention, backend, epsilon, ms in (
        ("stick_breaking", "triton", 0.0, 3.0),
        ("stick_breaking", "triton", 1e-7, 1.0),
        ("softmax", "cudnn", 0.0, far),
    ):
        for step, batch in (("forward", 1), ("forward_backward", 1), ("decode", 1), ("decode", 32)):
            for keys in (2048, 16384):
                for layer in range(4):
                    common = {
                        "model": "m",
                        "params": 25_000_000,
                        "attention": attention,
                        "backend": backend,
                        "step": step,
                        "batch": batch,
                        "keys": keys,
                        "layer": layer,
                        "epsilon": epsilon,
                        "device": "a GPU",
                    }
                    rows.append(common | {"metric": "time", "value": ms * layer})
                    rows.append(common | {"metric": "reach", "value": 1e6})
    return pd.DataFrame(rows)


def test_times_of_all_layers() -> None:
    figure = skipping.draw(table())
    assert [axis.get_xlabel() for axis in figure.axes] == ["tokens"] * 2 + ["keys in the cache"] * 2
    for axis in figure.axes:
        drawn = [np.asarray(line.get_ydata()).tolist() for line in axis.lines]
        assert sorted(drawn) == [[6.0, 6.0], [12.0, 12.0], [18.0, 18.0]]
        assert axis.get_yscale() == "linear" and axis.get_ylim()[0] == 0
    labels = {text.get_text() for text in figure.legends[0].get_texts()}
    assert labels == {"stick-breaking (skipping)", "stick-breaking", "softmax (cudnn)"}


def test_times_far_apart_are_drawn_logarithmically() -> None:
    assert skipping.draw(table(far=20.0)).axes[0].get_yscale() == "log"


def test_the_page_has_the_same_numbers() -> None:
    (group,) = skipping.chart(table()).groups
    assert group.title == "All layers of a model of 25 M parameters"
    whole = ["a whole sequence", "a whole sequence, with backward"]
    assert [panel.title for panel in group.panels] == [*whole, "decoding, batch 1", "decoding, batch 32"]
    rows = group.panels[0].rows()
    assert rows[rows["method"] == "stick-breaking (skipping)"]["forward (ms)"].tolist() == [6.0, 6.0]


def test_nothing_to_draw_is_said() -> None:
    with pytest.raises(InputError, match="no rows with the metric time"):
        skipping.draw(table().query("metric == 'reach'"))


def test_several_models_have_letters_which_the_note_explains() -> None:
    both = pd.concat([table(), table().assign(model="n")])
    assert [group.title for group in skipping.chart(both).groups] == [
        f"All layers of model {letter} of 25 M parameters" for letter in "AB"
    ]
    assert "Models by digest: A m, B n." in skipping.chart(both).note
