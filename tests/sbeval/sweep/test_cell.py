"""Ids of cells: another for any change of an option, the same when a method is added."""

import dataclasses
from pathlib import Path
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


def test_the_id_of_a_cell_is_the_name_of_a_file_whatever_its_model_is_called(tmp_path: Path) -> None:
    config = length_gen.Config(corpus="books")
    ids = set()
    for spec in ("m" * 200, "m" * 250, "\u65e5" * 80, "/home/ann/models/one", "/home/bob/models/one"):
        (cell,) = length_gen.cells(dataclasses.replace(config, checkpoint=spec))
        name = cell_id(cell)
        # with what a temporary file adds to it
        (tmp_path / f".{name}.json.{'0' * 32}.tmp").touch()
        assert "ann" not in name and "bob" not in name
        ids.add(name)
    assert len(ids) == 5
