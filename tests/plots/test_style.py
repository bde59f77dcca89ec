"""Axes of figures."""

from matplotlib.figure import Figure

from sbeval.plots import style


def test_labels_of_counts_are_plain_numbers() -> None:
    figure = Figure()
    axis = figure.subplots()
    axis.plot([4e6, 1e8], [1, 2])
    style.counts(axis)
    figure.draw_without_rendering()
    labels = [text.get_text() for text in axis.get_xticklabels()]
    assert {"5 M", "10 M", "50 M", "100 M"} <= set(labels) and not any("$" in label for label in labels)
