"""Training of text models: its grid, its size in steps, and what decides whether two are the same."""

import dataclasses
from pathlib import Path

import pytest

from sbeval.errors import InputError
from sbeval.models import decoder as model
from sbeval.sweep.graph import steps
from sbeval.tasks import length_gen, text_training
from sbeval.tasks.length_gen import Config, cells
from sbeval.training.checkpoint import State


@pytest.mark.parametrize(
    ("changes", "batch", "steps", "micro"),
    [
        ({}, 2, 6, None),
        ({"micro_batch_tokens": 8}, 2, 6, 1),
        ({"micro_batch_tokens": 4}, 2, 6, 1),
        ({"micro_batch_tokens": 4096}, 2, 6, 2),
        ({"batch_tokens": 9}, 1, 12, None),
        ({"train_tokens": 1}, 2, 1, None),
        ({"train_tokens": 95}, 2, 5, None),
    ],
)
def test_amounts_of_tokens_become_sequences_and_steps(
    changes: dict[str, int], batch: int, steps: int, micro: int | None
) -> None:
    config = Config(train_len=8, train_tokens=96, batch_tokens=16)
    training = cells(dataclasses.replace(config, **changes))[0].training()  # type: ignore[arg-type]
    assert (training.batch, training.steps, training.micro_batch) == (batch, steps, micro)


@pytest.mark.parametrize(("tokens", "padded"), [(257, 257), (8192, 8192), (50257, 50304)])
def test_large_vocabularies_are_padded_for_the_tensor_cores(tokens: int, padded: int) -> None:
    assert cells(Config())[0].model(tokens).vocab_size == padded


def test_the_nanogpt_baseline_learns_from_the_same_tokens_in_the_same_order() -> None:
    ours, theirs = (cells(length_gen.PRESETS[name])[0] for name in ("recipe", "nanogpt"))
    assert dataclasses.replace(ours.training(), lr=6e-4) == theirs.training()
    shape = theirs.model(8192)
    assert (shape.mlp, shape.positions, shape.hidden, shape.init_std) == ("gelu", 2048, 4 * shape.width, 0.02)
    sizes = [model.Decoder(cell.model(8192)).n_parameters() for cell in (ours, theirs)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.1)


def test_a_model_is_of_one_method_and_seed_or_of_a_checkpoint() -> None:
    config = Config(attention=("rope", "nope", "rope:theta=10000"), seeds=(1, 0, 1))
    grid = text_training.models(config)
    # the default of an option is no option
    assert [(one.attention, one.seeds) for one in grid] == [
        (("rope",), (1,)),
        (("nope",), (1,)),
        (("rope",), (0,)),
        (("nope",), (0,)),
    ]
    # a given model may be of any length
    longer = dataclasses.replace(config, eval_len=4096, train_len=4096)
    with pytest.raises(
        InputError, match="--batch-tokens 2048 is less than .* --train-len 4096; give --batch-tokens 4096"
    ):
        text_training.models(longer)
    (given,) = text_training.models(dataclasses.replace(longer, checkpoint="some/model", tokenizer="bytes"))
    assert (given.attention, given.seeds, given.tokenizer) == (("",), (0,), "some/model")
    with pytest.raises(InputError, match="unknown attention 'ropes'"):
        text_training.models(Config(attention=("ropes",)))


def test_models_that_differ_in_evaluation_alone_share_a_training() -> None:
    one = Config(attention=("rope",), seeds=(0,), train_len=64, eval_len=64)
    for other in (
        dataclasses.replace(one, eval_len=4096, documents=3),
        dataclasses.replace(one, attention=("rope:scaling=ntk,factor=4",)),
    ):
        assert text_training.training_options(one) == text_training.training_options(other)
        assert cells(one)[0].training_step == cells(other)[0].training_step
    for other in (dataclasses.replace(one, lr=1e-4), dataclasses.replace(one, attention=("rope:theta=500000",))):
        assert cells(one)[0].training_step != cells(other)[0].training_step


def test_the_bound_that_ended_a_training_is_named() -> None:
    def state(steps: int) -> State:
        return State(losses=[1.0] * steps)

    step = cells(Config(attention=("rope",), seeds=(0,)))[0].training_step
    whole = step.schedule()
    assert step.ended_by(state(whole.steps), whole) == "train_tokens"
    assert step.ended_by(state(whole.steps - 1), whole) == "patience"
    fewer = dataclasses.replace(whole, steps=whole.steps - 1)
    assert step.ended_by(state(fewer.steps), fewer) == "max_epochs"


def test_the_cost_of_a_training_ends_with_the_text(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a" * 640)
    unbounded = Config(train_len=8, train_tokens=6400, batch_tokens=16, corpus=str(tmp_path), max_epochs=None)

    def flops(config: Config) -> float:
        return sum(step.flops for step in steps(cells(config)) if isinstance(step, text_training.Training))

    whole = flops(unbounded)
    assert flops(dataclasses.replace(unbounded, max_epochs=10)) == whole
    assert flops(dataclasses.replace(unbounded, max_epochs=2.5)) == whole / 4
    # a text of unknown size bounds nothing, unless it is cut
    hub = dataclasses.replace(unbounded, corpus="hf:some/text", max_epochs=2.5)
    assert flops(hub) == whole and flops(dataclasses.replace(hub, corpus_tokens=640)) == whole / 4
    # the decays at 2400 and 4800 tokens end where the text does
    branches = dataclasses.replace(unbounded, schedule="wsd", branches=(800, 2000, 4000))
    bounded = dataclasses.replace(branches, max_epochs=2.5)
    assert flops(bounded) == flops(dataclasses.replace(branches, branches=(800, 1600 * 5 // 6))) < flops(branches)


def test_the_title_of_a_branch_says_what_may_end_it() -> None:
    config = Config(attention=("rope",), schedule="wsd", branches=(4000,))
    titles = [cells(dataclasses.replace(config, max_epochs=most))[0].training_step.title for most in (None, 4.0)]
    assert titles == ["train rope seed 0 4800 tokens", "train rope seed 0 at most 4800 tokens"]
