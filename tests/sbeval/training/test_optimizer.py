"""Which optimizer has which parameters, what Muon does to a matrix, and that a run with it goes on exactly."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from sbeval.errors import InputError
from sbeval.models.config import ModelConfig
from sbeval.models.decoder import Decoder
from sbeval.training import checkpoint
from sbeval.training.checkpoint import State
from sbeval.training.config import TrainConfig
from sbeval.training.optimizer import optimizer_for, set_rate, state_names

SHAPE = ModelConfig(vocab_size=20, width=16, layers=1, heads=2, hidden=24, attention="stick_breaking:remainder=bias")
MATRICES = {f"blocks.0.{name}.weight" for name in ("attention.qkv", "attention.out", "mlp.up", "mlp.down")}


def build(lr: float = 0.1, weight_decay: float = 0.0) -> tuple[Decoder, torch.optim.Optimizer]:
    model = Decoder(SHAPE)
    config = TrainConfig(steps=3, batch=2, length=6, lr=lr, weight_decay=weight_decay, optimizer="muon")
    return model, optimizer_for(model, config)


def step(model: Decoder, optimizer: torch.optim.Optimizer, number: int) -> None:
    tokens = torch.arange(number, number + 12).view(2, 6)
    model.loss(tokens, tokens).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_muon_has_the_matrices_of_the_blocks() -> None:
    model, optimizer = build()
    step(model, optimizer, 0)
    names = state_names(optimizer)
    found = {name for name, parameter in model.named_parameters() if names[parameter] == ("momentum_buffer",)}
    assert found == MATRICES
    for parameter in model.parameters():
        assert set(optimizer.state[parameter]) == set(names[parameter])
        assert parameter.grad is None


def test_an_update_has_singular_values_of_one_and_the_size_of_adamw() -> None:
    torch.manual_seed(0)
    model, optimizer = build(lr=0.01)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    step(model, optimizer, 0)
    for name in MATRICES:
        change = (before[name] - model.get_parameter(name).detach()).double()
        # five iterations that take all singular values to about one
        values = torch.linalg.svdvals(change / (0.01 * 0.2 * math.sqrt(max(change.shape))))
        assert values.max() < 1.3 and values.median() > 0.6, name


def test_the_learning_rate_and_weight_decay_reach_both() -> None:
    model, optimizer = build(weight_decay=0.5)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        group["lr"] = 0.02
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        decays = parameter.ndim == 2 and not name.endswith("bias")
        torch.testing.assert_close(parameter.detach(), before[name] * (1 - 0.02 * 0.5 * decays))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_recorded_optimizer_does_the_same_with_rates_that_are_tensors(name: str) -> None:
    """But for the last bit of the rate, and for products in bfloat16."""
    config = TrainConfig(steps=3, batch=2, length=6, lr=0.1, weight_decay=0.5, optimizer=name)

    def changes(recorded: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = Decoder(dataclasses.replace(SHAPE, layers=2, m_width=4.0))
        before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
        optimizer = optimizer_for(model, config, recorded=recorded)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert all(isinstance(rate, torch.Tensor) == recorded for rate in rates)
        for group in optimizer.param_groups:
            # only a GPU has it
            group["capturable"] = False
        for number, rate in enumerate((0.01, 0.02, 0.005)):
            set_rate(optimizer, rate)
            step(model, optimizer, number)
        if recorded:
            assert all(group["lr"] is rate for group, rate in zip(optimizer.param_groups, rates, strict=True))
        return {key: parameter.detach() - before[key] for key, parameter in model.named_parameters()}

    wanted = changes(recorded=False)
    for key, found in changes(recorded=True).items():
        tolerance = 0.02 if name == "muon" else 1e-5
        assert (found - wanted[key]).norm() < tolerance * wanted[key].norm(), key


def test_a_run_with_muon_goes_on_to_the_same_end(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, optimizer = build()
    for number in range(3):
        step(model, optimizer, number)
    checkpoint.save(tmp_path / "run", model, State(losses=[1.0]), optimizer)
    other, again = build()
    checkpoint.restore(tmp_path / "run", other, again)
    for number in range(3, 6):
        step(model, optimizer, number)
        step(other, again, number)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'moun'.*muon"):
        TrainConfig(steps=1, batch=1, length=8, lr=0.1, optimizer="moun")
    model, optimizer = build()
    step(model, optimizer, 0)
    checkpoint.save(tmp_path / "run", model, State(losses=[1.0]), optimizer)
    adamw = optimizer_for(model, TrainConfig(steps=3, batch=2, length=6, lr=0.1))
    with pytest.raises(InputError, match="does not fit its model: step of blocks.0.attention.qkv.weight has none"):
        checkpoint.restore(tmp_path / "run", model, adamw)
