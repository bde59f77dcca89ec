"""Ids of cells: another for any change of an option, the same when a method is added."""

import dataclasses
from typing import Any

import pytest

from sbeval.sweep.cell import cell_id
from sbeval.tasks import length_gen


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", 1e-4),
        ("train_len", 128),
        ("corpus", "books"),
        ("dtype", "bfloat16"),
        ("seeds", (3,)),
        ("packing", "documents"),
    ],
)
def test_any_change_of_a_config_is_another_cell(name: str, value: Any) -> None:
    config = length_gen.Config(attention=("rope",))
    first, again = (length_gen.cells(config)[0] for _ in range(2))
    other = length_gen.cells(dataclasses.replace(config, **{name: value}))[0]
    assert cell_id(first) == cell_id(again) != cell_id(other)
    assert cell_id(first).startswith("length_gen-rope-seed-0-")


def test_another_method_leaves_finished_cells_their_names() -> None:
    one = length_gen.cells(length_gen.Config(attention=("rope",)))
    two = length_gen.cells(length_gen.Config(attention=("stick_breaking", "rope"), seeds=(1, 0)))
    assert {cell_id(cell) for cell in one} <= {cell_id(cell) for cell in two}
