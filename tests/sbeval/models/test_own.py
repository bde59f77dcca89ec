"""Own methods are checked on random tokens: each fault is named, and no method of this package has one."""

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sbeval import registry
from sbeval.errors import InputError
from sbeval.kernels import nope
from sbeval.models import own
from sbeval.models.config import ModelConfig
from sbeval.models.decoder import Attention
from sbeval.models.kv_cache import Layer, through

CPU = torch.device("cpu")
SPECS = (
    *registry.ATTENTION,
    "rope:key_shift=true,head_norm=true",
    "rope:scaling=dynamic_ntk,factor=4,train_len=3",
    "stick_breaking:remainder=none",
)


def config(attention: str, **more: Any) -> ModelConfig:
    return ModelConfig(vocab_size=99, width=32, layers=3, heads=4, kv_heads=2, hidden=7, attention=attention, **more)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("spec", SPECS)
def test_methods_of_this_package_have_no_fault(spec: str, dtype: str) -> None:
    state = torch.get_rng_state()
    assert own._check(config(spec), CPU, dtype) is None
    assert torch.equal(torch.get_rng_state(), state)
    # nor do they raise, as others may
    attention, x = Attention(config(spec)).eval(), torch.randn(1, own.LENGTH, 32)
    with torch.no_grad():
        for check in (own._check_rows, own._check_packed, own._check_cache):
            check(attention, x, spec, own.LEAK)


def mean(v: Tensor, seen: Tensor) -> Tensor:
    """The mean over the positions (T, S) that each sees."""
    v = v.repeat_interleave(2, 2)
    return torch.einsum("ts,bshd->bthd", seen / seen.sum(-1, keepdim=True), v)


def sequences(length: int, bounds: Tensor | None) -> Tensor:
    places = torch.arange(length)
    part = torch.zeros_like(places) if bounds is None else torch.bucketize(places, bounds[1:], right=True)
    return (part[:, None] == part).float()


def causal(length: int, bounds: Tensor | None, ahead: int = 0) -> Tensor:
    return torch.ones(length, length).tril(ahead) * sequences(length, bounds)


class Own(nn.Module):
    """Means of the values that `seen` names; with a cache, of a row's slots."""

    def __init__(self, seen: Callable[[int, Tensor | None], Tensor]) -> None:
        super().__init__()
        self.seen = seen

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, cu_seqlens: Tensor | None = None, cache: Layer | None = None
    ) -> Tensor:
        starts, (v,) = through(cache, v)
        if starts is not None:
            shown = (torch.arange(v.shape[1]) >= starts[:, None]).float()
            v = torch.einsum("bs,bshd->bhd", shown / shown.sum(-1, keepdim=True), v)[:, None]
            return v.repeat_interleave(2, 2)
        return mean(v, self.seen(v.shape[1], cu_seqlens))


class Forgetful(Own):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, cu_seqlens: Any = None, cache: Any = None) -> Tensor:
        return super().forward(q, k, v, x, cu_seqlens)


class Hidden(Own):
    """Looks ahead by a weight that begins at 0."""

    def __init__(self, seen: Any) -> None:
        super().__init__(seen)
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, cu_seqlens: Any = None, cache: Any = None) -> Tensor:
        return super().forward(q, k, v, x, cu_seqlens, cache) + self.weight * v.sum((1, 2, 3), keepdim=True)


class Flat(Own):
    """Takes the rows of a batch for one."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, cu_seqlens: Any = None, cache: Any = None) -> Tensor:
        if cache is not None:
            return super().forward(q, k, v, x, cu_seqlens, cache)
        return super().forward(q, k, v.flatten(0, 1)[None], x, cu_seqlens).view_as(q)


class Refusing(Own):
    """Takes neither packed rows nor a cache."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, cu_seqlens: Any = None, cache: Any = None) -> Tensor:
        assert cu_seqlens is None and cache is None
        return super().forward(q, k, v, x)


def method(monkeypatch: pytest.MonkeyPatch, mixer: nn.Module) -> None:
    """Register a method `own` with this mixer."""
    module = SimpleNamespace(Options=nope.Options, Mixer=lambda options, **_: mixer, backend_name=nope.backend_name)
    monkeypatch.setitem(registry.ATTENTION, "own", "elsewhere.own")
    monkeypatch.setitem(sys.modules, "elsewhere.own", module)
    own._check.cache_clear()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("mixer", "said"),
    [
        (
            Own(lambda length, bounds: causal(length, bounds, ahead=1)),
            "the output at position 0 changes with the tokens from position 1 on, so it is not causal",
        ),
        # at the bounds of blocks alone
        (
            Own(lambda length, bounds: causal(length, bounds) + ahead_of_blocks(length)),
            "the output at position 63 changes with the tokens from position 64 on, so it is not causal",
        ),
        # in packed rows alone
        (
            Own(lambda length, bounds: causal(length, bounds) if bounds is None else sequences(length, bounds)),
            "in a packed row the output at position 0 changes with the tokens from position 3 on, so it is not causal",
        ),
        (
            Own(lambda length, _: causal(length, None)),
            "in a packed row (cu_seqlens) the output of a sequence changes with another one",
        ),
        (
            Forgetful(causal),
            "after a prompt of 5 tokens, the output at position 5 is not that of the whole row: use `cache` as "
            "sbeval.registry.Method states, or raise NotImplementedError for one",
        ),
        (
            Hidden(causal),
            "the output at position 0 changes with the tokens from position 1 on, so it is not causal",
        ),
        (Flat(causal), "the output of a row changes with other rows of its batch"),
    ],
)
def test_what_is_wrong_with_a_method_is_named(
    mixer: nn.Module, said: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method(monkeypatch, mixer)
    with pytest.raises(InputError) as raised:
        own.check(config("own"), CPU, dtype)
    assert str(raised.value) == f"attention 'own': {said}"


def ahead_of_blocks(length: int) -> Tensor:
    seen = torch.zeros(length, length)
    for first in range(64, length, 64):
        seen[first - 1, first] = 1
    return seen


@pytest.mark.parametrize("mixer", [Own(causal), Refusing(causal)])
def test_a_method_may_refuse_what_it_does_not_take(mixer: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    method(monkeypatch, mixer)
    assert own.check(config("own"), CPU, "float32") is None


def test_a_method_that_raises_is_not_checked_and_one_of_ours_is_not_either(monkeypatch: pytest.MonkeyPatch) -> None:
    class Narrow(nn.Module):
        def forward(
            self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, cu_seqlens: Any = None, cache: Any = None
        ) -> Tensor:
            raise RuntimeError("at most 100 tokens\nand more")

    method(monkeypatch, Narrow())
    assert own.check(config("own"), CPU, "float32") == (
        "attention 'own' is not checked for later tokens: random rows of 256 tokens raise RuntimeError: at most 100 "
        "tokens and more"
    )
    monkeypatch.setattr(own, "_check", None)
    assert own.check(config("rope"), CPU, "float32") is None
