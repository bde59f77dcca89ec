"""Heads that lie further apart than 32 bits count, as where they are outermost: offsets have 64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sbeval.kernels import fire, stick_breaking

GPU = torch.cuda.is_available()
PLACE = torch.device("cuda" if GPU else "cpu")
APART, ROWS, HEADS, DIM = 2**30, 70, 3, 16


def apart(*drawn: Tensor) -> list[Tensor]:
    """Return the tensors with APART elements from head to head, of which nothing but their own rows is ever touched."""
    one = ROWS * DIM
    storage = torch.UntypedStorage(2 * ((HEADS - 1) * APART + len(drawn) * one), device=PLACE)
    found = []
    for index, x in enumerate(drawn):
        view = torch.empty(0, dtype=x.dtype, device=PLACE).set_(storage, index * one, x.shape, (one, DIM, APART, 1))
        found.append(view.copy_(x))
    return found


def through_stick_breaking(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return stick_breaking.attention(q, k, v, backend="triton")


def through_fire(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    hidden = torch.linspace(-1.0, 1.0, 8, device=PLACE)
    weights = (
        torch.tensor(0.1, device=PLACE),
        torch.tensor(1.0, device=PLACE),
        hidden,
        hidden,
        hidden.expand(HEADS, 8),
    )
    return (fire.attention(q, k, v, weights, backend="triton"),)


@pytest.mark.parametrize("attention", [through_stick_breaking, through_fire])
def test_outputs_and_gradients_are_those_of_heads_that_are_near(
    attention: Callable[..., tuple[Tensor, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not GPU:
        # interpreted, which `attention` would refuse
        for module in (stick_breaking, fire):
            monkeypatch.setattr(module, "pick_backend", lambda *_: "triton")
    near = torch.randn(3, 1, ROWS, HEADS, DIM, generator=torch.Generator().manual_seed(0)).to(PLACE, torch.float16)
    results = []
    for inputs in (near.unbind(), apart(*near)):
        inputs = [x.requires_grad_() for x in inputs]
        out = attention(*inputs)
        results.append([*out, *torch.autograd.grad([x.float().square().sum() for x in out], inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
