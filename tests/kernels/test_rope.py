import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from sbeval.errors import InputError
from sbeval.kernels import rope, softmax


def rotated(x: Tensor, positions: Tensor, theta: float = 10000.0) -> Tensor:
    angles = positions[:, None] * rope.frequencies(x.shape[-1], rope.Options(theta=theta))
    dtype = torch.promote_types(x.dtype, torch.float32)
    return rope.rotate(x, angles.cos().to(dtype), angles.sin().to(dtype))


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_rotation_is_llamas(theta: float) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    q, k = torch.randn(2, 300, 4, 32), torch.randn(2, 300, 2, 32)
    positions = torch.arange(300)
    cos, sin = LlamaRotaryEmbedding(config)(q, positions[None])
    expected = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    for ours, theirs in zip((q, k), expected, strict=True):
        torch.testing.assert_close(rotated(ours, positions, theta), theirs.transpose(1, 2), atol=1e-4, rtol=0)


def test_late_positions_are_exact() -> None:
    # one-hot inputs read off cos and sin; angles in float32 would be wrong by 4e-3 here
    size, position = 64, 65536
    x = torch.zeros(1, 1, 1, size)
    x[..., : size // 2] = 1
    turned = rotated(x, torch.tensor([position])).flatten().double()
    for m in range(size // 2):
        angle = position * 10000.0 ** (-2 * m / size)
        assert abs(turned[m] - math.cos(angle)) < 1e-7
        assert abs(turned[size // 2 + m] - math.sin(angle)) < 1e-7


def test_late_queries_are_as_exact_as_early_ones() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 1, 1, 16), torch.randn(1, 65537, 1, 16), torch.randn(1, 65537, 1, 16)
    exact = rope.reference(q.double(), k.double(), v.double(), scale=1.0)
    assert (rope.attention(q, k, v, scale=1.0) - exact).norm() <= 5e-5 * exact.norm()


def test_rotation_stays_exact_under_autocast_and_rounds_once() -> None:
    torch.manual_seed(0)
    x, positions = torch.randn(1, 50, 2, 32, dtype=torch.bfloat16), torch.arange(65500, 65550)
    exact = rotated(x.double(), positions)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        turned = rotated(x, positions)
        wide = rotated(x.float(), positions)
    assert wide.dtype == torch.float32
    torch.testing.assert_close(wide.double(), exact, atol=1e-6, rtol=0)
    assert torch.equal(turned, exact.bfloat16())


def test_shift_invariance() -> None:
    torch.manual_seed(0)
    x, y = (torch.randn(1, 30, 2, 32, dtype=torch.float64) for _ in range(2))
    positions = torch.arange(30)
    products = torch.einsum("bthd,bshd->bhts", rotated(x, positions), rotated(y, positions))
    shifted = torch.einsum("bthd,bshd->bhts", rotated(x, positions + 1000), rotated(y, positions + 1000))
    torch.testing.assert_close(shifted, products)
    # and it does depend on distance
    assert not torch.allclose(torch.einsum("bthd,bshd->bhts", x, y), products)


def test_queries_and_keys_turn_by_absolute_position() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 30, 4, 16, dtype=torch.float64) for _ in range(3))
    positions = torch.arange(30)
    expected = softmax.attention(rotated(q, positions, 100.0), rotated(k, positions, 100.0), v)
    torch.testing.assert_close(rope.attention(q, k, v, options=rope.Options(theta=100.0)), expected)
    torch.testing.assert_close(rope.attention(q[:, 21:], k, v, options=rope.Options(theta=100.0)), expected[:, 21:])
    assert not torch.allclose(rope.attention(q, k, v), expected)


def test_mixer_takes_theta() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 30, 4, 16) for _ in range(3))
    mixer = rope.Mixer(rope.Options(theta=100.0), heads=4, kv_heads=4, head_dim=16, width=64, scale=0.2)
    expected = rope.attention(q, k, v, scale=0.2, options=rope.Options(theta=100.0))
    torch.testing.assert_close(mixer(q, k, v, torch.empty(2, 30, 64)), expected, atol=0, rtol=0)


def test_odd_heads_and_bad_theta_are_refused() -> None:
    x = torch.ones(1, 3, 2, 15)
    with pytest.raises(InputError, match="even size; .* is 15"):
        rope.attention(x, x, x)
    with pytest.raises(InputError, match=r"theta must be positive and finite; it is -1\.0"):
        rope.Options(theta=-1.0)


@pytest.mark.parametrize("factor", [1.5, 4.0, 8.0])
@pytest.mark.parametrize("kind", ["linear", "dynamic_ntk", "yarn", "llama3"])
def test_scaled_frequencies_are_those_of_transformers(kind: str, factor: float) -> None:
    parameters = {
        "rope_type": kind.replace("dynamic_ntk", "dynamic"),
        "rope_theta": 10000.0,
        "factor": factor,
        "original_max_position_embeddings": 2048,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    config = LlamaConfig(hidden_size=128, num_attention_heads=2, max_position_embeddings=2048)
    config.rope_parameters = parameters
    options = rope.Options(scaling=kind, factor=factor, train_len=2048)
    for length in (1000, 2048, 9000):
        expected, size = ROPE_INIT_FUNCTIONS[str(parameters["rope_type"])](config, seq_len=length)
        ours = rope.frequencies(64, options, torch.tensor(length))
        torch.testing.assert_close(ours.float(), expected, rtol=1e-5, atol=0)
        assert rope.attention_factor(options) == pytest.approx(size)


def test_ntk_changes_the_base_and_scaling_is_no_part_of_training() -> None:
    options = rope.Options(scaling="ntk", factor=8.0)
    w = rope.frequencies(64, options)
    assert w[0] == 1 and float(w[-1]) == pytest.approx(float(rope.frequencies(64)[-1]) / 8)
    assert rope.trained_as(options) == rope.Options()
    with pytest.raises(InputError, match="scaling 'yarn' needs train_len"):
        rope.Options(scaling="yarn", factor=4.0)


def test_a_compiler_makes_one_table_for_all_layers_and_none_for_the_gradient() -> None:
    graphs: list[list[str]] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return make_boxed_func(graph.forward)

    def layers(x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = rope.attention(x, x, x)
        return x

    x = torch.randn(1, 9, 2, 8, requires_grad=True)
    # as inductor does
    backend = aot_autograd(fw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
    compiled = torch.compile(layers, backend=backend)
    torch.testing.assert_close(compiled(x), layers(x))
    compiled(x).sum().backward()
    forward, backward = graphs
    assert forward.count("sbeval.rope_tables.default") == 1
    assert "sbeval.rope_tables.default" not in backward
    assert not {"aten.cos.default", "aten.sin.default"} & {*forward, *backward}
