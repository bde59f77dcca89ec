"""Test that shared models train once, the order of steps, and which steps fail with a dependency."""

import dataclasses
from collections.abc import Sequence

import pytest

from sbeval.sweep import graph
from sbeval.sweep.cell import Cell, Step
from sbeval.sweep.graph import Graph
from sbeval.tasks import attention_map, length_gen, mqrar, needle

LENGTHS = dataclasses.replace(length_gen.PRESETS["quick"], attention=("rope", "alibi"))


def order(cells: Sequence[Step]) -> list[list[str]]:
    """Return the titles of the steps that are ready first, then of those ready after these, ..."""
    found = Graph()
    begin, waves = found.add(cells), list[list[str]]()
    while begin:
        waves.append([step.title for step in begin])
        begin = [new for step in begin for new in found.done(step)]
    return waves


def test_a_training_that_one_cell_needs_is_its_own() -> None:
    assert order(length_gen.cells(LENGTHS)) == [["rope seed 0", "alibi seed 0"]]


def test_a_training_that_several_need_comes_before_them() -> None:
    scaled = dataclasses.replace(LENGTHS, attention=("rope", "rope:scaling=ntk,factor=4", "alibi"))
    assert order(length_gen.cells(scaled)) == [
        ["train rope seed 0", "alibi seed 0"],
        ["rope seed 0", "rope:scaling=ntk,factor=4.0 seed 0"],
    ]


def test_families_share_a_training_and_fine_tuning_comes_after_it() -> None:
    asked = length_gen.preset(needle.Config, "quick", tasks=("vt", "cwe"), finetune=4096)
    cells: list[Step] = [*length_gen.cells(LENGTHS), *needle.cells(asked)]
    assert order(cells) == [
        ["train rope seed 0", "alibi seed 0", "train stick_breaking seed 0"],
        ["rope seed 0", "fine-tune rope seed 0 lr 0.001", "fine-tune stick_breaking seed 0 lr 0.001"],
        [f"{name} seed 0 fine-tuned {task}" for name in ("rope", "stick_breaking") for task in ("vt", "cwe")],
    ]
    # another training is another model
    assert order([*length_gen.cells(dataclasses.replace(LENGTHS, lr=1e-3)), *needle.cells(asked)])[0] == [
        "rope seed 0",
        "alibi seed 0",
        "train stick_breaking seed 0",
        "train rope seed 0",
    ]


def test_attention_map_looks_into_the_models_of_mqrar_where_they_are_the_same() -> None:
    config = attention_map.PRESETS["quick"]
    recall = config.recall("rope", 0)
    looks = attention_map.cells(config)
    assert order([*looks, recall]) == [[looks[0].title, recall.title], [looks[1].title]]
    assert order([*looks, *mqrar.cells(mqrar.PRESETS["quick"])])[1:] == []


def test_what_cells_share_costs_once() -> None:
    asked = length_gen.preset(needle.Config, "quick", tasks=("vt", "cwe"), finetune=4096, attention=("rope",))
    cells = needle.cells(asked)
    steps = graph.steps(cells)
    assert [isinstance(step, Cell) for step in steps] == [False, False, True, True]
    training, tuning = steps[:2]
    assert training.flops / tuning.flops == pytest.approx(asked.train_tokens / 4096)
    alone = length_gen.cells(dataclasses.replace(LENGTHS, attention=("rope",)))
    assert graph.steps([*cells, *alone]) == [*steps, *alone]


def test_a_failure_takes_with_it_all_that_needs_it_and_no_more() -> None:
    asked = length_gen.preset(needle.Config, "quick", tasks=("vt", "cwe"), finetune=4096)
    cells: list[Step] = [*length_gen.cells(LENGTHS), *needle.cells(asked)]
    found = Graph()
    begin = {step.title: step for step in found.add(cells)}
    lost = [step.title for step in found.lost(begin["train rope seed 0"])]
    assert lost == [
        "rope seed 0",
        "fine-tune rope seed 0 lr 0.001",
        "rope seed 0 fine-tuned vt",
        "rope seed 0 fine-tuned cwe",
    ]
    assert found.done(begin["train rope seed 0"]) == []
    assert [step.title for step in found.done(begin["train stick_breaking seed 0"])] == [
        "fine-tune stick_breaking seed 0 lr 0.001"
    ]
