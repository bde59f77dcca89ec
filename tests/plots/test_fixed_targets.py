from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from sbeval.errors import InputError
from sbeval.plots import fixed_targets, legend
from sbeval.tables import values
from sbeval.tables.results import Results

STICK = ("stick_breaking", "")
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
    "n": 4,
    "metric": "loss_fixed_targets",
    "targets": 128,
}


def rows_of(attention: str, losses: dict[int, float], **changes: Any) -> list[dict[str, Any]]:
    return [
        COMMON | {"attention": attention, "context_length": length, "value": loss} | changes
        for length, loss in losses.items()
    ]


ROPE, STICKS = (
    rows_of("rope", {128: 2.0, 256: 1.9, 512: 3.5}),
    rows_of("stick_breaking", {128: 2.1, 256: 2.0, 512: 1.95}),
)


def test_lines_are_losses_by_context(tmp_path: Path) -> None:
    # losses of other tokens at the same context lengths are left out
    others = rows_of("rope", {128: 7.0}, metric="loss_last_k", targets=pd.NA)
    table = fixed_targets.gather(pd.DataFrame([*ROPE, *STICKS, *others]), tmp_path)
    axis, change = fixed_targets.draw(table).axes
    lines = {str(line.get_label()): line for line in axis.get_lines()}
    np.testing.assert_allclose(np.asarray(lines["stick-breaking"].get_xdata()), [128, 256, 512])
    np.testing.assert_allclose(np.asarray(lines["stick-breaking"].get_ydata()), [2.1, 2.0, 1.95])
    np.testing.assert_allclose(np.asarray(lines["RoPE"].get_ydata()), [2.0, 1.9, 3.5])
    # half a nat above the best last value, so that a method that diverges flattens no other
    assert axis.get_ylim()[1] == pytest.approx(2.45)
    lines = {str(line.get_label()): line for line in change.get_lines()}
    np.testing.assert_allclose(np.asarray(lines["stick-breaking"].get_xdata()), [256, 512])
    np.testing.assert_allclose(np.asarray(lines["stick-breaking"].get_ydata()), [0, -0.05])


def test_changes_are_paired_by_document(tmp_path: Path) -> None:
    # documents differ by nats, and each by 0.01 to 0.03 with more context
    of = {256: [1.0, 2.0, 4.0], 512: [0.99, 1.98, 3.97]}
    cell = "length_gen-stick_breaking-seed-0-0123456789"
    parts = [
        pd.DataFrame({"metric": name, "unit_id": list("abc"), "value": each, "context_length": length, "targets": 128})
        for length, losses in of.items()
        for name, each in (("nll_sum", [128 * loss for loss in losses]), ("tokens", [128.0] * 3))
    ]
    values.write(Results(tmp_path), cell, pd.concat(parts, ignore_index=True))
    means = {length: float(np.mean(losses)) for length, losses in of.items()}
    rows = fixed_targets.gather(pd.DataFrame(rows_of("stick_breaking", means, cell=cell)), tmp_path)
    assert rows["paired"].tolist() == pytest.approx([0, 0.01 / 3**0.5])
    change = fixed_targets.draw(rows).axes[1]
    (line,) = (line for line in change.get_lines() if line.get_label() == "stick-breaking")
    np.testing.assert_allclose(np.asarray(line.get_ydata()), [0, -0.02])


def test_the_change_with_another_document_s_text_is_a_thin_line(tmp_path: Path) -> None:
    both = [row | {"cell": row["attention"]} for row in (*ROPE, *STICKS)]
    other = rows_of("stick_breaking", {512: 1.99}, metric="loss_fixed_targets_unrelated", cell="stick_breaking")
    figure = fixed_targets.draw(fixed_targets.gather(pd.DataFrame([*both, *other]), tmp_path))
    losses, change = figure.axes
    colour = legend.looks(pd.DataFrame(STICKS))[STICK].colour
    thick, thin = (line for line in change.get_lines() if line.get_color() == colour)
    assert thin.get_linewidth() < thick.get_linewidth()
    np.testing.assert_allclose(np.asarray(thin.get_ydata()), [0, -0.01])
    np.testing.assert_allclose(np.asarray(thick.get_ydata()), [0, -0.05])
    # losses stay those after the document's own text
    plain = fixed_targets.draw(fixed_targets.gather(pd.DataFrame(both), tmp_path))
    assert len(losses.get_lines()) == len(plain.axes[0].get_lines())
    assert len(change.get_lines()) == len(plain.axes[1].get_lines()) + 1
    for of, said in ((figure, True), (plain, False)):
        assert any("another document's text" in text.get_text() for text in of.texts) == said


def test_a_seed_without_another_document_s_text_does_not_part_the_lines(tmp_path: Path) -> None:
    """The second seed alone was given it, by which the loss is 0.04 more."""
    seeds = rows_of("stick_breaking", {256: 2.0, 512: 2.25}, cell="0")
    seeds += rows_of("stick_breaking", {256: 2.0, 512: 1.95}, cell="1", seed=1)
    other = rows_of("stick_breaking", {512: 1.99}, metric="loss_fixed_targets_unrelated", cell="1", seed=1)
    change = fixed_targets.draw(fixed_targets.gather(pd.DataFrame([*seeds, *other]), tmp_path)).axes[1]
    thick, thin = (np.asarray(line.get_ydata()) for line in change.get_lines()[:2])
    np.testing.assert_allclose(thick, [0, 0.1])
    np.testing.assert_allclose(thin - thick, [0, 0.04])


def test_other_targets_have_panels_of_their_own(tmp_path: Path) -> None:
    fewer = [row | {"targets": 64, "value": row["value"] - 0.5} for row in STICKS]
    table = fixed_targets.gather(pd.DataFrame([*STICKS, *fewer]), tmp_path)
    lines = [axis.get_lines()[0] for axis in fixed_targets.draw(table).axes[::2]]
    levels = [np.asarray(line.get_ydata(), dtype=float).tolist() for line in lines]
    assert levels == [pytest.approx([1.6, 1.5, 1.45]), pytest.approx([2.1, 2.0, 1.95])]


def test_the_page_says_how_many_tokens(tmp_path: Path) -> None:
    chart = fixed_targets.chart(fixed_targets.gather(pd.DataFrame([*ROPE, *STICKS]), tmp_path))
    assert "the last 128 tokens of long windows" in chart.sentence
    assert [panel.title for panel in chart.groups[0].panels] == ["the same tokens", "past the training length"]


def test_a_table_without_fixed_targets() -> None:
    table = pd.DataFrame(rows_of("rope", {128: 7.0}, metric="loss_last_k"))
    assert not fixed_targets.has_rows(table) and fixed_targets.has_rows(pd.DataFrame(ROPE))
    with pytest.raises(InputError, match="no rows with metric 'loss_fixed_targets' to draw: --fixed-targets"):
        fixed_targets.draw(table)
    with pytest.raises(InputError, match="rows with metric 'loss_fixed_targets' have no column 'targets'"):
        fixed_targets.draw(fixed_targets.gather(pd.DataFrame(ROPE).drop(columns="targets"), Path()))
