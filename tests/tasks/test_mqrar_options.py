"""Options of mqrar: mistakes, and the columns in which rows record them."""

import math
from typing import Any

import pytest

from sbeval.errors import InputError
from sbeval.tables.mqrar import Row
from sbeval.tasks import mqrar
from sbeval.tasks.mqrar_options import PRESETS, Config, factors
from sbeval.training.schedule import learning_rate


@pytest.mark.parametrize("name", PRESETS)
def test_rows_record_the_options_of_their_cell(name: str) -> None:
    for cell in mqrar.cells(PRESETS[name])[:3]:
        values = factors(cell.config)
        row = Row(metric="accuracy", unit="1", value=1.0, n=1, **values)
        task = cell.task
        assert (row.kv_pairs, row.vocab_size, row.seq_len) == (task.kv_pairs, task.vocab_size, task.seq_len)
        assert (row.lr, row.width, row.key_pool) == (cell.config.lrs[0], cell.config.widths[0], task.keys)
        # no factor is left at a default that means that it was not recorded
        assert {name for name, value in values.items() if value is None} <= {"init_std", "warmup"}


@pytest.mark.parametrize(
    ("option", "other"),
    [
        ({"slot_power": 1.0}, "slot_power"),
        ({"filler": "any"}, "filler"),
        ({"distinct": ("keys",)}, "distinct"),
        ({"key_pool": 9}, "key_pool"),
        ({"score_prefix": False}, "score_prefix"),
        ({"positions": True}, "positions"),
        ({"dropout": 0.1}, "dropout"),
        ({"stored_rows": 640}, "stored_rows"),
        ({"batch": 32}, "batch"),
        ({"steps": 10}, "max_steps"),
        ({"optimizer": "muon"}, "optimizer"),
        ({"schedule": "constant"}, "schedule"),
        ({"weight_decay": 0.0}, "weight_decay"),
        ({"init_std": 0.02}, "init_std"),
        ({"stop_accuracy": 0.9}, "stop_accuracy"),
        ({"patience": 300}, "patience"),
        ({"norm": "layer"}, "norm"),
        ({"biases": True}, "biases"),
        ({"beta_2": 0.999}, "beta_2"),
        ({"decay_all": True}, "decayed"),
        ({"warmup": 0}, "warmup"),
        ({"clip": 0.0}, "clip"),
        ({"final_lr": 0.0}, "final_lr"),
    ],
)
def test_an_option_changes_its_column_alone(option: dict[str, Any], other: str) -> None:
    before, after = factors(Config()), factors(Config(**option))
    assert {name for name, value in after.items() if value != before[name]} == {other}


def test_a_schedule_by_epoch_is_named_so() -> None:
    assert factors(Config(stored_rows=640, lr_by_epoch=True))["schedule"] == "cosine by epoch"
    assert factors(Config(stored_rows=640))["schedule"] == "cosine"


def test_the_preset_author_is_the_public_code() -> None:
    """The block, the optimizer and the schedule, as its files have them (torch's AdamW and CosineAnnealingLR)."""
    cell = mqrar.cells(PRESETS["author"])[0]
    model, training = cell.model(), cell.training()
    assert (model.norm, model.qkv_bias, model.out_bias, model.mlp_bias) == ("layer", True, True, True)
    assert (model.init_std, model.positions, model.tied, model.mlp) == (0.02, 768, True, "gelu")
    betas = (training.beta_1, training.beta_2)
    assert (betas, training.weight_decay, training.decay_all, training.clip) == ((0.9, 0.999), 0.1, True, 0.0)
    begins = {learning_rate(training, step): step for step in reversed(range(training.steps))}
    wanted = [training.lr * (1 + math.cos(math.pi * epoch / 64)) / 2 for epoch in range(64)]
    assert sorted(begins, reverse=True) == pytest.approx(wanted)
    # an epoch begins with the first step that begins in it
    assert sorted(begins.values()) == [-(-epoch * 100_000 // 256) for epoch in range(64)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lrs": ()}, "lrs is empty"),
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"patience": -1}, "patience must be at least 0; got -1"),
        ({"stop_accuracy": float("nan")}, "stop_accuracy must be at least 0; got nan"),
        ({"stored_rows": 9, "batch": 64}, "stored_rows must be 0 or at least the batch 64; got 9"),
        ({"lr_by_epoch": True}, "--lr-by-epoch needs --stored-rows"),
        ({"warmup": -1}, "warmup must be at least 0, or left out; got -1"),
        ({"norm": "rsm"}, "unknown norm 'rsm'; did you mean 'rms'"),
        ({"widths": (63,), "heads": 2}, "width 63 is not a multiple of 2 heads"),
        ({"kv_pairs": (4, 17)}, "kv_pairs must be 1 to 16 at seq_len 64"),
    ],
)
def test_mistakes_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Config(**options)
