"""Cells of text models: what they need, what their rows record of the model, and stored answers."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from sbeval.runtime.progress import Progress
from sbeval.sweep.context import RunContext
from sbeval.tasks import length_gen, needle
from sbeval.tasks.length_gen import Config
from sbeval.tasks.length_gen_rows import Row
from sbeval.tasks.text_cell import Subject, outcome

CONFIG = Config(attention=("rope",), seeds=(3,), train_len=64, eval_len=64)
(CELL,) = length_gen.cells(CONFIG)
ORIGIN: dict[str, Any] = {"corpus": "books", "corpus_digest": "12ab", "tokenizer": "bytes"}


def subject(**changes: Any) -> Subject:
    same = {"model": None, "name": "25m", "attention": "rope", "options": "", "params": 9, "train_len": 64}
    return Subject(**(same | {"backend": "torch"} | changes))


def test_a_cell_needs_the_training_of_its_model_unless_it_is_given() -> None:
    assert CELL.needs == (CELL.training_step,) and CELL.model_title == "rope seed 3"
    (given,) = length_gen.cells(dataclasses.replace(CONFIG, checkpoint="out/checkpoints/some model/"))
    assert given.needs == () and given.model_title == "out-checkpoints-some-model"


def test_cells_of_several_families_need_the_same_training() -> None:
    options = {field.name: getattr(CONFIG, field.name) for field in dataclasses.fields(Config)}
    config = needle.Config(**(options | {"finetune": 4096, "tasks": ("vt", "cwe")}))
    training, tuning = needle.cells(config)[0].needs
    assert training == CELL.training_step and tuning.title == "fine-tune rope seed 3 lr 0.001"
    assert needle.cells(config)[1].needs == (training, tuning)


def test_rows_record_the_model_and_how_it_was_trained() -> None:
    rows = [Row(metric="loss", unit="nats/token", value=1.0, n=4)]
    trained = subject(train_tokens=300, unique_tokens=200, status="overfit", measured={"ended_by": "patience"})
    result = outcome(
        trained, rows, family="length_gen", task="books", eval_len=128, seed=3, measured={"more": 1}, **ORIGIN
    )
    assert (result.identity.model, result.identity.params, result.identity.eval_len) == ("25m", 9, 128)
    assert [(row.value, row.status) for row in result.rows] == [(1.0, "overfit")]  # type: ignore[attr-defined]
    assert (result.epochs, result.train_tokens) == (1.5, 300)
    assert result.measured == {"more": 1, "ended_by": "patience"}


def test_a_given_model_has_no_epochs() -> None:
    result = outcome(subject(), [], family="length_gen", task="books", eval_len=128, seed=0, **ORIGIN)
    assert result.epochs is None and result.train_tokens == 0 and result.tokens_per_s is None


def test_stored_answers_are_of_a_model_and_family_and_cleared_by_force(tmp_path: Path) -> None:
    context = RunContext(results_dir=tmp_path, device=torch.device("cpu"))
    forced = dataclasses.replace(context, force=True)

    def stored(digest: str, context: RunContext, *, keep: bool = False) -> bool:
        with Progress() as progress, CELL.answers(digest, context, progress) as answers:
            if keep:
                answers.keep({b"key": 1})
            return bool(answers.find([b"key"]))

    assert stored("digest", context, keep=True) and stored("digest", context)
    assert not stored("other", context)
    (one, other) = sorted(path.name for path in (tmp_path / "answers").iterdir())
    assert one.startswith("length_gen-") and other.endswith(".sqlite")
    assert not stored("digest", forced) and stored("digest", forced, keep=True)
    # once in a run, whichever cell comes next
    assert stored("digest", forced)


def test_the_cost_of_a_given_model_is_two_flops_a_parameter(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(4000))
    (given,) = length_gen.cells(dataclasses.replace(CONFIG, checkpoint=str(tmp_path)))
    # in half precision, as others' are
    assert given.flops_per_token(64) == given.flops_per_token(4096) == 2 * 4000 / 2
    # ours by the products of its shape, of which attention's grow with the context
    assert CELL.flops_per_token(128) > CELL.flops_per_token(64)
