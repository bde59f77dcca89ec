"""The kernel figures show what the table says of whole sequences, and nothing else."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.lines import Line2D

from sbeval.errors import InputError
from sbeval.plots import kernel, kernel_error


def table() -> pd.DataFrame:
    rows = []
    for backend, attention, speed in (("triton", "stick_breaking", 300.0), ("flash", "softmax", 200.0)):
        for step in ("forward", "forward_backward"):
            for length in (4096, 16384):
                for kv_heads, sequences, epsilon in ((12, 1, 0.0), (3, 1, 0.0), (12, 7, 0.0), (12, 1, 1e-7)):
                    odd = (kv_heads, sequences, epsilon) != (12, 1, 0.0)
                    for metric, value in (("throughput", speed + length / 1024), ("relative_error", 0.002)):
                        rows.append(
                            {
                                "attention": attention,
                                "backend": backend,
                                "metric": metric,
                                "value": 9e9 if odd else value,
                                "step": step,
                                "batch": 1,
                                "queries": length,
                                "keys": length,
                                "heads": 12,
                                "kv_heads": kv_heads,
                                "head_dim": 64,
                                "sequences": sequences,
                                "epsilon": epsilon,
                                "device": "a GPU",
                            }
                        )
    return pd.DataFrame(rows)


def data(line: Line2D) -> tuple[list[float], list[float]]:
    x, y = (np.asarray(values, dtype=float).tolist() for values in (line.get_xdata(), line.get_ydata()))
    return x, y


def test_a_step_that_was_not_timed_leaves_its_panel_empty() -> None:
    rows = table()
    left, right = kernel.draw(rows[rows["step"] == "forward_backward"]).axes
    assert all(len(data(line)[0]) == (axis is right) * 2 for axis in (left, right) for line in axis.lines)


def test_throughput_by_length() -> None:
    figure = kernel.draw(table())
    left, right = figure.axes
    for axis in (left, right):
        lines = {str(line.get_label()): line for line in axis.lines}
        assert set(lines) == {"stick-breaking", "softmax (flash)"}
        assert data(lines["stick-breaking"]) == ([4096.0, 16384.0], [304.0, 316.0])
        assert axis.get_ylim()[0] == 0 < 316 < axis.get_ylim()[1]


def test_head_sizes_of_several_devices_name_theirs() -> None:
    wide = table().assign(head_dim=128)
    for device, titles in (
        ("a GPU", ["Heads of size 64", "Heads of size 128"]),
        ("another", ["Heads of size 64, a GPU", "Heads of size 128, another"]),
    ):
        both = pd.concat([table(), wide.assign(device=device)])
        assert [group.title for group in kernel.chart(both).groups] == titles
        assert [text.get_text() for axis in kernel.draw(both).axes for text in axis.texts] == titles


def test_a_faster_device_does_not_hide_another() -> None:
    few = table().query("backend == 'flash'").assign(device="another")
    both = pd.concat([table(), few.assign(value=few["value"].where(few["metric"] != "throughput", 1e3))])
    names = {"stick-breaking", "softmax", "softmax (another)"}
    figure = kernel.draw(both)
    lines = {str(line.get_label()): line for line in figure.axes[0].lines}
    assert set(lines) == names and figure.axes[0].texts[0].get_text() == "Heads of size 64, a GPU"
    assert data(lines["softmax"])[1] == [204.0, 216.0]
    assert data(lines["softmax (another)"])[1] == [1e3, 1e3]
    points = [data(line) for line in kernel_error.draw(both).axes[0].lines]
    assert sorted(points) == [([216.0], [0.002]), ([316.0], [0.002]), ([1e3], [0.002])]


def test_error_by_throughput_at_the_longest() -> None:
    figure = kernel_error.draw(table())
    points = [data(line) for line in figure.axes[0].lines]
    assert sorted(points) == [([216.0], [0.002]), ([316.0], [0.002])]


def test_a_table_without_whole_sequences_says_so() -> None:
    packed = table().query("sequences == 7")
    with pytest.raises(InputError, match="no rows with the metric throughput of whole sequences"):
        kernel.draw(packed)
    with pytest.raises(InputError, match="no rows with the metrics throughput and relative_error"):
        kernel_error.draw(packed)
