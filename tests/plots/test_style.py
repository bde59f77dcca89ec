"""Axes and titles of figures."""

import pandas as pd
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


def test_titles_have_three_digits_of_tokens_or_all_where_two_would_be_the_same() -> None:
    counts = [614_400, 239_992_832, 999_600_000, 15 * 10**9, 104_857_600, 104_900_000]
    table = pd.DataFrame({"train_tokens": counts, "finetune_tokens": 150_011_904.0, "model": "25m"})
    titles = [title for title, _ in style.panels(table, ("finetune_tokens",), ("train_tokens",))]
    assert titles == [
        f"150 M tokens of fine-tuning, {count} training tokens"
        for count in ("614,400", "104,857,600", "104,900,000", "240 M", "1 B", "15 B")
    ]
