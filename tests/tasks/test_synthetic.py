"""Cells that train on generated examples record their model, trained or failed."""

from pathlib import Path

import torch

from sbeval.models.decoder import Decoder
from sbeval.sweep.context import RunContext
from sbeval.tables.mqrar import Row
from sbeval.tasks import mqrar
from sbeval.tasks.mqrar_options import Config, factors
from sbeval.tasks.synthetic import TEST_SEED, TRAIN_SEED, VALIDATION_SEED
from sbeval.training.checkpoint import State
from sbeval.training.trainer import Trained

(CELL,) = mqrar.cells(Config(attention=("rope:theta=500",), widths=(16,), steps=7, batch=4, seeds=(5,)))
ROW = Row(metric="accuracy", unit="1", value=1.0, n=1, **factors(CELL.config))


def test_a_trained_model_is_recorded_with_its_scores(tmp_path: Path) -> None:
    context = RunContext(results_dir=tmp_path, device=torch.device("cpu"))
    state = State(losses=[3.0, 2.0, 1.0], scores=[(2, 0.5)], seconds=1.0)
    decoder = Decoder(CELL.model())
    result = CELL.outcome([ROW], context, "validation", Trained(decoder, state, 80.0, None, 4))
    identity = result.identity
    assert (identity.model, identity.attention, identity.options, identity.seed) == ("2x16", "rope", "theta=500.0", 5)
    assert identity.params == decoder.n_parameters() and identity.train_len == identity.eval_len == 64
    assert result.train_tokens == 3 * 4 * 64 and result.tokens_per_s == 80.0
    assert result.curves["validation"] == [(2, 0.5)] and result.measured["train_seconds"] == 1.0
    assert CELL.leaves == CELL.model() and list(result.rows) == [ROW]


def test_a_failed_one_is_recorded_without_training(tmp_path: Path) -> None:
    context = RunContext(results_dir=tmp_path, device=torch.device("cpu"))
    result = CELL.outcome([ROW], context, "validation")
    assert result.train_tokens == 0 and result.tokens_per_s is None and result.measured == {}


def test_seeds_of_tests_are_far_from_those_of_training() -> None:
    for seed in (0, 1, (1 << 31) - 1):
        assert len({TRAIN_SEED + seed, VALIDATION_SEED, TEST_SEED}) == 3 and TRAIN_SEED + seed > VALIDATION_SEED
