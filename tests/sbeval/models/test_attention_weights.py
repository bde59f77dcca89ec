"""Weights read off the mixers, against the formulas written out and against the references."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sbeval import registry
from sbeval.kernels import alibi, stick_breaking
from sbeval.models.attention_weights import attention_weights, mixed_weights
from sbeval.models.config import ModelConfig, parse_attention
from sbeval.models.decoder import Decoder

HEADS, SIZE, LENGTH = 4, 8, 21


def inputs(kv_heads: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, x = torch.randn(2, LENGTH, HEADS, SIZE), torch.randn(2, LENGTH, HEADS * SIZE)
    k, v = torch.randn(2, 2, LENGTH, kv_heads, SIZE)
    return q.double(), k.double(), v.double(), x.double()


def mixer(spec: str, kv_heads: int = 2) -> torch.nn.Module:
    name, options = parse_attention(spec)
    return (
        registry.method(name)
        .Mixer(options, heads=HEADS, kv_heads=kv_heads, head_dim=SIZE, width=HEADS * SIZE, scale=0.7)
        .double()
    )


def logits(q: Tensor, k: Tensor) -> Tensor:
    return 0.7 * torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(HEADS // k.shape[2], 2))


def sticks(z: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and remainder, by a walk over the keys of each query."""
    weights, remainder = torch.zeros_like(z), torch.ones_like(z[..., 0])
    for i in range(z.shape[-1]):
        for j in reversed(range(i)):
            beta = z[..., i, j].sigmoid()
            weights[..., i, j] = remainder[..., i] * beta
            remainder[..., i] *= 1 - beta
    return weights, remainder


def test_softmax_with_and_without_a_penalty() -> None:
    q, k, v, x = inputs()
    causal = torch.ones(LENGTH, LENGTH).tril().bool()
    z = logits(q, k).masked_fill(~causal, -torch.inf)
    found = mixed_weights(mixer("nope"), q, k, v, x)
    torch.testing.assert_close(found, z.softmax(-1).float())
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    penalised = z - alibi.slopes(HEADS)[:, None, None] * distance
    torch.testing.assert_close(mixed_weights(mixer("alibi"), q, k, v, x), penalised.softmax(-1).float())


@pytest.mark.parametrize("remainder", ["none", "value", "bias"])
def test_stick_breaking(remainder: str) -> None:
    q, k, v, x = inputs()
    module = mixer(f"stick_breaking:remainder={remainder}")
    if remainder == "bias":
        torch.nn.init.normal_(module.get_parameter("bias"))
    weights, left = sticks(logits(q, k))
    if remainder == "value":
        weights = weights + torch.diag_embed(left)
    with torch.no_grad():
        found = mixed_weights(module, q, k, v, x)
    torch.testing.assert_close(found, weights.float())
    expected = torch.ones_like(left) if remainder == "value" else 1 - left
    torch.testing.assert_close(found.sum(-1), expected.float())


def test_the_weights_of_a_logit_bias() -> None:
    q, k, v, x = inputs()
    weights, _ = sticks(logits(q, k) - 3)
    with torch.no_grad():
        found = mixed_weights(mixer("stick_breaking:remainder=none,logit_bias=-3"), q, k, v, x)
    torch.testing.assert_close(found, weights.float())
    assert isinstance(mixer("stick_breaking"), stick_breaking.Mixer)


@pytest.mark.parametrize("name", sorted(registry.ATTENTION))
def test_weights_of_every_method_give_back_its_output(name: str) -> None:
    q, k, v, x = inputs()
    module = mixer(name)
    with torch.no_grad():
        weights = mixed_weights(module, q, k, v, x).double()
        out = module(q, k, v, x)
    values = v.repeat_interleave(HEADS // v.shape[2], 2)
    torch.testing.assert_close(torch.einsum("bhts,bshd->bthd", weights, values), out, atol=1e-5, rtol=1e-5)
    assert (weights >= 0).all() and not weights.triu(1).any()
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


def test_a_compiled_model_has_the_same_weights() -> None:
    torch.manual_seed(1)
    model = Decoder(ModelConfig(vocab_size=16, width=24, layers=1, heads=3, hidden=32, attention="nope")).eval()
    tokens = torch.randint(16, (2, 11))
    wanted = attention_weights(model, tokens)
    model.compile(backend="eager")
    with torch.no_grad():
        model(tokens)
    torch.testing.assert_close(attention_weights(model, tokens), wanted)


def test_the_weights_of_a_model_are_those_of_its_layers() -> None:
    torch.manual_seed(1)
    config = ModelConfig(vocab_size=16, width=24, layers=2, heads=3, hidden=32, attention="stick_breaking")
    model = Decoder(config).eval()
    tokens = torch.randint(16, (2, 11))
    found = attention_weights(model, tokens)
    assert found.shape == (2, 2, 3, 11, 11) and found.dtype == torch.float32
    # the first layer by hand, and no hook stays behind
    block: Any = model.blocks[0]
    with torch.no_grad():
        q, k, _ = block.attention.qkv(block.norm_1(model.embedding(tokens))).unflatten(-1, (-1, 8)).split(3, 2)
    weights, left = sticks(torch.einsum("bthd,bshd->bhts", q, k) * 8**-0.5)
    torch.testing.assert_close(found[0], weights + torch.diag_embed(left))
    assert not any(module._forward_pre_hooks for module in model.modules())
