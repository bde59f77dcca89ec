"""Options of needle: what is evaluated without the files of questions, and mistakes."""

import dataclasses
from typing import Any

import pytest

from sbeval.errors import InputError
from sbeval.sweep.cell import cell_id
from sbeval.tasks import needle
from sbeval.tasks.needle import Config, cells
from sbeval.tasks.needle_options import TUNING

TINY: dict[str, Any] = {"width": 16, "layers": 1, "heads": 2, "hidden": 32, "tied": True}


@pytest.mark.parametrize(
    ("tasks", "squad", "hotpot", "unused"),
    [
        (("niah_single_1",), "f", None, [("squad", "qa_1")]),
        (("vt", "qa_1"), "f", "f", [("hotpot", "qa_2")]),
        (("qa_1",), "f", None, []),
        ((), "f", "f", []),
    ],
)
def test_a_file_that_no_task_asks_for_is_said(
    tasks: tuple[str, ...], squad: str, hotpot: str | None, unused: list[tuple[str, str]], config: Config
) -> None:
    assert needle.FAMILY.notes(dataclasses.replace(config, tasks=tasks, squad=squad, hotpot=hotpot)) == [
        f"--{option} is not used: {task} is not among the tasks; give --task {task} too" for option, task in unused
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tasks": ("niah_single_4",)}, "unknown needle task 'niah_single_4'; did you mean 'niah_single_"),
        ({"tasks": ("qa_1",)}, "qa_1 is not run without its questions: give --squad PATH"),
        ({"lengths": (511,)}, "--length must be 512 to 131072 tokens; got 511"),
        ({"lengths": (1024, 131073)}, "got 131073"),
        ({"samples": 0}, "--samples must be at least 1; got 0"),
        ({"finetune": 9, "finetune_tasks": ("qa_2",)}, "qa_2 cannot be fine-tuned on"),
        ({"finetune": 9, "tasks": ("qa_1",), "squad": "x"}, "--finetune needs a task other than qa"),
        ({"finetune_lrs": (1e-3, 0.0)}, "--finetune-lr must be above 0 and finite; got 0.0"),
        ({"finetune_needles": 41}, "--finetune-needles must be 1 to 40; got 41"),
        ({"finetune_rest": -0.1}, "--finetune-rest must be at least 0"),
        ({"finetune_prompts": 0}, "--finetune-prompts must be at least 1; got 0"),
        ({"finetune_batch_tokens": 0}, "--finetune-batch-tokens must be at least 1; got 0"),
        (
            {"finetune": 9, "finetune_batch_tokens": 7, "train_len": 8},
            "--finetune-batch-tokens 7 is less than a sequence of --train-len 8; give --finetune-batch-tokens 8",
        ),
    ],
)
def test_mistakes_are_errors(config: Config, change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        cells(dataclasses.replace(config, **change))


def test_a_model_of_others_is_not_fine_tuned(config: Config) -> None:
    given = dataclasses.replace(config, finetune=9, checkpoint="some/model")
    assert [cell.config.finetune for cell in cells(given)] == [0]
    assert needle.FAMILY.notes(given) == ["some/model is not fine-tuned: only checkpoint folders of ours are"]


def test_options_of_fine_tuning_that_change_nothing_are_no_part_of_an_id(config: Config) -> None:
    def ids(**options: Any) -> list[str]:
        return [cell_id(cell) for cell in cells(dataclasses.replace(config, **options))]

    assert ids() == ids(finetune_lrs=(1.0, 2.0), finetune_rest=0.5)
    # one rate is the default
    assert ids(finetune=9) == ids(finetune=9, finetune_lrs=(1e-3, 1e-3)) != ids()
    changes: list[dict[str, Any]] = [
        {},
        {"finetune_lrs": (1e-2,)},
        {"finetune_lrs": (1e-3, 1e-2)},
        {"finetune_batch_tokens": 32},
        {"finetune_needles": 4},
        {"finetune_rest": 0.5},
        {"finetune_prompts": 7},
    ]
    assert {name for change in changes for name in change} == set(TUNING)
    assert len({str(ids(finetune=9, **change)) for change in changes}) == len(changes)
