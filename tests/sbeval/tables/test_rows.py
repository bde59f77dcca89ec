"""Columns: labels for titles, and those that published tables may lack."""

from dataclasses import dataclass

import pytest

from sbeval import registry
from sbeval.config import LATER
from sbeval.tables import mqrar
from sbeval.tables.rows import Identity, Measurement, Provenance, column, labels, later


@dataclass(frozen=True, slots=True, kw_only=True)
class Row(Measurement):
    depth: int = column("{} deep")
    width: int | None = column("{} wide", LATER, default=None)
    plain: str = ""


def test_a_column_is_a_field_with_a_label() -> None:
    row = Row(metric="m", unit="1", value=1.0, n=1, depth=3)
    assert (row.depth, row.width, row.plain) == (3, None, "")
    assert labels(Row) == {"depth": "{} deep", "width": "{} wide"} and later(Row) == {"width"}
    with pytest.raises(TypeError, match="depth"):
        Row(metric="m", unit="1", value=1.0, n=1)


def test_labels_take_one_value() -> None:
    every = labels(Identity, Provenance, mqrar.Row)
    assert every["layers"].format(2) == "2 layers" and every["train_tokens"].format("4 M") == "4 M training tokens"
    for label in every.values():
        assert label.count("{") == label.count("}") == 1, label


@pytest.mark.parametrize("name", registry.TASKS)
def test_columns_of_one_name_have_one_label(name: str) -> None:
    cell = registry.task(name).cells(registry.task(name).presets["quick"])[0]
    shared = labels(Identity, Provenance, mqrar.Row)
    assert all(shared.get(column, label) == label for column, label in labels(cell.row).items())
