"""The decoder: sizes, the forward pass written out by hand, causality, packing, losses, and specs of attention."""

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sbeval import registry
from sbeval.errors import InputError
from sbeval.kernels import softmax
from sbeval.models.config import ModelConfig, named
from sbeval.models.decoder import IGNORE, Decoder

METHODS = sorted(registry.ATTENTION)
VOCABULARY = 50


def shape(**changes: Any) -> ModelConfig:
    fields: dict[str, Any] = {"vocab_size": VOCABULARY, "width": 32, "layers": 2, "heads": 4, "hidden": 40}
    return ModelConfig(**(fields | changes))


def build(seed: int = 0, **changes: Any) -> Decoder:
    """A decoder in double precision, none of whose parameters is at a value that hides it."""
    torch.manual_seed(seed)
    model = Decoder(shape(**changes)).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def draw(*size: int, seed: int = 1) -> Tensor:
    return torch.randint(VOCABULARY, size, generator=torch.Generator().manual_seed(seed))


def by_hand(model: Decoder, tokens: Tensor) -> Tensor:
    """Logits (T, V) of one sequence (T,) by a `nope` decoder, a head at a time."""
    config, weights = model.config, dict(model.named_parameters())
    query, key = config.heads * config.d_head, (config.heads + config.n_kv_heads) * config.d_head
    scale = 1 / math.sqrt(config.d_head) if config.attention_multiplier is None else config.attention_multiplier
    later = torch.ones(len(tokens), len(tokens)).triu(1).bool()

    def normed(x: Tensor, name: str) -> Tensor:
        if config.norm == "layer":
            x = x - x.mean(1, keepdim=True)
            x = x / (x.square().mean(1, keepdim=True) + config.norm_eps).sqrt()
            return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]
        return x / (x.square().mean(1, keepdim=True) + config.norm_eps).sqrt() * weights[f"{name}.weight"]

    def head(x: Tensor, index: int) -> Tensor:
        return x[:, index * config.d_head : (index + 1) * config.d_head]

    x = config.m_emb * weights["embedding.weight"][tokens]
    if config.positions:
        x = x + weights["positions.weight"][: len(tokens)]
    for layer in range(config.layers):
        name = f"blocks.{layer}"
        qkv = normed(x, f"{name}.norm_1") @ weights[f"{name}.attention.qkv.weight"].T
        if config.qkv_bias:
            qkv = qkv + weights[f"{name}.attention.qkv.bias"]
        q, k, v = qkv[:, :query], qkv[:, query:key], qkv[:, key:]
        if config.key_shift:
            share = torch.sigmoid(weights[f"{name}.attention.key_shift.weight"]).repeat_interleave(config.d_head)
            earlier = torch.cat([torch.zeros_like(k[:1]), k[:-1]])
            k = share * k + (1 - share) * earlier
        outputs = []
        for index in range(config.heads):
            group = index // (config.heads // config.n_kv_heads)
            logits = scale * head(q, index) @ head(k, group).T
            mixed = logits.masked_fill(later, -math.inf).softmax(1) @ head(v, group)
            if config.head_norm:
                mixed = mixed - mixed.mean(1, keepdim=True)
                mixed = mixed / (mixed.square().mean(1, keepdim=True) + 1e-5).sqrt()
                gain, shift = (weights[f"{name}.attention.norm.{part}"][None] for part in ("weight", "bias"))
                mixed = mixed * head(gain, index) + head(shift, index)
            outputs.append(mixed)
        mixed = torch.cat(outputs, 1) @ weights[f"{name}.attention.out.weight"].T
        x = x + config.m_residual * (mixed + weights.get(f"{name}.attention.out.bias", 0.0))
        up = normed(x, f"{name}.norm_2") @ weights[f"{name}.mlp.up.weight"].T + weights.get(f"{name}.mlp.up.bias", 0.0)
        if config.mlp == "gelu":
            inner = up * 0.5 * (1 + torch.erf(up / math.sqrt(2)))
        else:
            up, gate = up[:, : config.hidden], up[:, config.hidden :]
            inner = up * gate / (1 + torch.exp(-gate))
        down = inner @ weights[f"{name}.mlp.down.weight"].T + weights.get(f"{name}.mlp.down.bias", 0.0)
        x = x + config.m_residual * down
    last = weights["embedding.weight" if config.tied else "head.weight"]
    return normed(x, "norm") @ last.T / config.m_width


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mlp": "gelu"},
        {"kv_heads": 2, "head_dim": 12},
        {"heads": 3, "head_dim": 10, "kv_heads": 1},
        {"tied": True, "positions": 16},
        {"m_emb": 3.0},
        {"m_residual": 0.22},
        {"m_width": 4.0},
        {"attention_multiplier": 0.05},
        {"m_emb": 12.0, "m_residual": 0.22, "m_width": 6.0, "attention_multiplier": 0.1, "tied": True},
        {"norm_eps": 0.1},
        {"attention": "nope:qkv_bias=true", "kv_heads": 2},
        {"attention": "nope:head_norm=true", "head_dim": 12},
        {"attention": "nope:qkv_bias=true,head_norm=true"},
        {"attention": "nope:key_shift=true", "kv_heads": 2},
        {"norm": "layer", "norm_eps": 0.1},
        # the author's block in recall tasks
        {"norm": "layer", "qkv_bias": True, "out_bias": True, "mlp_bias": True, "mlp": "gelu", "positions": 16},
    ],
    ids=str,
)
def test_forward_is_the_one_written_out(changes: dict[str, Any]) -> None:
    model = build(**{"attention": "nope"} | changes)
    tokens = draw(3, 16)
    found = model.logits(model(tokens))
    assert found.shape == (3, 16, VOCABULARY)
    torch.testing.assert_close(found, torch.stack([by_hand(model, row) for row in tokens]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_grouped_heads_are_heads_that_share(method: str) -> None:
    grouped = build(attention=method, kv_heads=2)
    full = build(attention=method)
    weights = grouped.state_dict()
    for name, weight in weights.items():
        if name.endswith("qkv.weight"):
            q, k, v = weight.unflatten(0, (-1, 8)).split((4, 2, 2))
            weights[name] = torch.cat([q, k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)]).flatten(0, 1)
    full.load_state_dict(weights)
    tokens = draw(2, 20)
    torch.testing.assert_close(grouped(tokens), full(tokens))
    assert grouped.n_parameters() == full.n_parameters() - 2 * 2 * (2 * 8) * 32


@pytest.mark.parametrize("method", METHODS)
def test_every_earlier_token_counts_and_no_later_one(method: str) -> None:
    model = build(attention=method, kv_heads=2)
    seen: list[Tensor] = []
    model.embedding.register_forward_hook(lambda *call: seen.append(call[2]))
    hidden = model(draw(2, 20))
    for position in (0, 1, 11, 19):
        direction = torch.randn(32, dtype=torch.float64)
        (gradient,) = torch.autograd.grad(hidden[0, position] @ direction, seen[0], retain_graph=True)
        sizes = gradient.abs().amax(-1)
        assert bool((sizes[0, : position + 1] > 0).all())
        assert float(sizes[0, position + 1 :].sum()) == 0.0
        assert float(sizes[1].sum()) == 0.0, "another row of the batch"


@pytest.mark.parametrize("method", [*METHODS, "rope:key_shift=true", "stick_breaking:key_shift=true"])
def test_packed_sequences_do_not_see_each_other(method: str) -> None:
    model = build(attention=method, kv_heads=2)
    tokens, targets = draw(2, 12), draw(2, 12, seed=2)
    bounds = [0, 5, 6, 12, 19, 24]
    packed = model(tokens, torch.tensor(bounds, dtype=torch.int32))
    assert packed.shape == (2, 12, 32)
    parts = [slice(*pair) for pair in zip(bounds, bounds[1:], strict=False)]
    alone = [model(tokens.flatten()[None, part])[0] for part in parts]
    torch.testing.assert_close(packed.flatten(0, 1), torch.cat(alone))
    assert not torch.allclose(packed, model(tokens))
    parameters = list(model.parameters())
    found = torch.autograd.grad(model.loss(tokens, targets, torch.tensor(bounds, dtype=torch.int32)), parameters)
    losses = [model.loss(tokens.flatten()[None, part], targets.flatten()[None, part]) for part in parts]
    wanted = torch.autograd.grad(sum(losses, torch.zeros(())), parameters)
    # the loss is float32
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["rope", "nope", "rope:scaling=dynamic_ntk,train_len=4"])
def test_softmax_is_told_the_longest_sequence_that_a_row_or_the_prompts_can_have(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int | None] = []
    attend = softmax.attention

    def spy(*tensors: Tensor, longest: int | None = None, **options: Any) -> Tensor:
        told.append(longest)
        return attend(*tensors, longest=longest, **options)

    monkeypatch.setattr(softmax, "attention", spy)
    model = build(attention=method)
    model(draw(2, 12), torch.tensor([0, 5, 12, 24], dtype=torch.int32))
    assert told == [12] * 2
    with torch.inference_mode():
        model.begin([[1, 2, 3], [4, 5, 6, 7, 8]], room=1)
    assert told[2:] == [5] * 2


def weights_of(method: str, q: Tensor, k: Tensor) -> Tensor:
    """What each query (1, T, H, D) takes of each key, (H, T, T): the output for values that are unit vectors."""
    heads, size = q.shape[2:]
    # some methods have weights of their own: the same in every call
    torch.manual_seed(1)
    mixer = registry.method(method).Mixer(
        registry.method(method).Options(), heads=heads, kv_heads=heads, head_dim=size, width=size, scale=0.3
    )
    values = torch.eye(size, dtype=q.dtype)[: q.shape[1], None].expand(-1, heads, -1)[None]
    out: Tensor = mixer(q, k, values, q[:, :, 0]).detach()
    return out[0].transpose(0, 1)[..., : q.shape[1]]


@pytest.mark.parametrize("method", METHODS)
def test_relative_methods_know_distances_alone(method: str) -> None:
    torch.manual_seed(0)
    q, k, before_q, before_k = torch.randn(4, 1, 12, 2, 32, dtype=torch.float64)
    first = weights_of(method, q, k)
    later = weights_of(method, torch.cat([before_q, q], 1), torch.cat([before_k, k], 1))[:, 12:, 12:]
    # what is in front takes its share of a softmax; how the others share the rest stays
    row, key = torch.tril_indices(12, 12, -1)
    assert float(first[:, row, key].min()) > 0
    ratio = (first / first[..., :1])[:, row, key], (later / later[..., :1])[:, row, key]
    torch.testing.assert_close(*ratio, rtol=1e-9, atol=0)


def test_methods_differ() -> None:
    tokens = draw(1, 20)
    # a window wider than the sequence is none
    specs = ["sliding_window:window=8" if method == "sliding_window" else method for method in METHODS]
    outputs = [build(attention=spec)(tokens) for spec in specs]
    for index, output in enumerate(outputs):
        assert all((output - other).abs().max() > 1e-3 for other in outputs[:index])


def test_learned_positions_tell_equal_tokens_apart() -> None:
    tokens = torch.full((1, 10), 7)
    plain = build(attention="nope")(tokens)
    torch.testing.assert_close(plain, plain[:, :1].expand_as(plain))
    learned = build(attention="nope", positions=10)(tokens)
    assert bool(((learned - learned[:, :1])[:, 1:].abs().amax(-1) > 1e-3).all())


def test_more_tokens_than_positions() -> None:
    model = build(attention="nope", positions=10)
    with pytest.raises(InputError, match="11 tokens exceed the model's 10 positions"):
        model(draw(1, 11))


def test_tied_embeddings_are_one() -> None:
    tied, free = Decoder(shape(tied=True)), Decoder(shape())
    assert tied.head.weight is tied.embedding.weight
    assert free.head.weight.data_ptr() != free.embedding.weight.data_ptr()
    assert free.n_parameters() - tied.n_parameters() == VOCABULARY * 32
    tied.loss(draw(1, 5), draw(1, 5, seed=2)).backward()
    assert tied.embedding.weight.grad is not None
    # the head has a gradient for every token, the embedding for those it saw
    assert bool((tied.embedding.weight.grad.abs().amax(1) > 0).all())


@pytest.mark.parametrize(("init_std", "std"), [(0.1, 0.1), (None, 192**-0.5)])
def test_initial_weights_have_the_stated_spread(init_std: float | None, std: float) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 400, "width": 192, "layers": 3, "hidden": 256, "positions": 64}
    model = Decoder(shape(init_std=init_std, m_width=4.0, **sizes))
    for name, parameter in model.named_parameters():
        if name.startswith(("embedding", "positions")):
            wanted = std
        elif "norm" in name:
            assert bool((parameter == 1).all())
            continue
        else:
            wanted = std / 2 / (math.sqrt(6) if name.endswith(("out.weight", "down.weight")) else 1)
        assert parameter.std().item() == pytest.approx(wanted, rel=0.03), name
        assert abs(parameter.mean().item()) < wanted / 20, name


@pytest.mark.parametrize("packed", [False, True])
def test_losses_are_summed_cross_entropies(packed: bool) -> None:
    model = build(m_width=2.0)
    tokens, targets = draw(2, 12), draw(2, 12, seed=2)
    targets[0, :7] = targets[1, -1] = IGNORE
    cu_seqlens = torch.tensor([0, 5, 12, 20, 24], dtype=torch.int32) if packed else None
    logits = model.logits(model(tokens, cu_seqlens))
    wanted = torch.zeros((), dtype=torch.float64)
    for row, target in zip(logits.flatten(0, 1), targets.flatten().tolist(), strict=True):
        if target != IGNORE:
            wanted = wanted + row.exp().sum().log() - row[target]
    parameters = list(model.parameters())
    right = torch.autograd.grad(wanted, parameters)
    scored = int((targets != IGNORE).sum())
    sparse = [model.sparse_loss(tokens, targets, cu_seqlens, capacity) for capacity in (None, scored, scored + 3)]
    assert model.sparse_loss(tokens, targets, cu_seqlens, scored - 1).isnan()
    for loss in (model.loss(tokens, targets, cu_seqlens), *sparse):
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
        for found, exact in zip(torch.autograd.grad(loss, parameters), right, strict=True):
            torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)


def test_no_targets_no_loss() -> None:
    model, nothing = build(), torch.full((1, 6), IGNORE)
    assert model.loss(draw(1, 6), nothing).item() == 0.0
    assert model.sparse_loss(draw(1, 6), nothing).item() == 0.0
    assert model.sparse_loss(draw(1, 6), nothing, capacity=2).item() == 0.0


def test_dropout_is_for_training_alone() -> None:
    model, tokens = build(dropout=0.5), draw(2, 6)
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_weights_follow_the_seed() -> None:
    def weights(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return Decoder(shape()).state_dict()

    assert all(torch.equal(a, b) for a, b in zip(weights(3).values(), weights(3).values(), strict=True))
    assert not torch.equal(weights(3)["head.weight"], weights(4)["head.weight"])


def test_options_reach_the_method() -> None:
    tokens = draw(1, 20)
    assert not torch.allclose(build(attention="rope")(tokens), build(attention="rope:theta=100")(tokens))
    assert torch.equal(build(attention="rope")(tokens), build(attention="rope:theta=10000")(tokens))


@pytest.mark.parametrize(
    "spec",
    ["stick_breaking:qkv_bias=true,head_norm=true,logit_bias=spread,remainder=bias", "rope", "alibi:key_shift=true"],
)
def test_options_of_the_block_start_at_no_effect_on_means(spec: str) -> None:
    """Biases and shifts are 0 and gains 1 before training, and each has a gradient."""
    torch.manual_seed(0)
    model = Decoder(shape(attention=spec))
    model.loss(draw(2, 12), draw(2, 12, seed=2)).backward()
    for name, parameter in model.named_parameters():
        if name.endswith(("qkv.bias", "attention.norm.bias", "mixer.bias", "key_shift.weight")):
            assert bool((parameter == 0).all()), name
        if name.endswith("norm.weight"):
            assert bool((parameter == 1).all()), name
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_an_empty_sequence_has_no_first_key() -> None:
    model, tokens = build(attention="rope:key_shift=true", layers=1), draw(1, 9)
    found = model(tokens, torch.tensor([0, 0, 4, 4, 9, 9], dtype=torch.int32))
    torch.testing.assert_close(found, model(tokens, torch.tensor([0, 4, 9], dtype=torch.int32)))


@pytest.mark.parametrize(
    "spec",
    [
        "stick_breaking:remainder=bias,head_norm=true",
        "stick_breaking:remainder=none,qkv_bias=true,logit_bias=spread",
        "rope:qkv_bias=true,head_norm=true",
        "rope:key_shift=true",
    ],
)
def test_blocks_with_these_options_compile_whole(spec: str) -> None:
    model, x = build(attention=spec), torch.randn(2, 20, 32, dtype=torch.float64)
    block = model.blocks[0]
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    found, wanted = (
        torch.autograd.grad(run(x, None).square().sum(), list(block.parameters())) for run in (compiled, block)
    )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


# compiling warns of what torch does inside itself
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("attention", ["stick_breaking", "rope"])
def test_blocks_share_what_is_compiled_and_evaluation_does_without(
    attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = torch._dynamo.utils.counters
    torch.compiler.reset()
    counts.clear()
    torch.manual_seed(0)
    model = Decoder(named("quick", vocab_size=257, attention=attention))
    tokens = torch.randint(257, (2, 40))
    plain = model(tokens)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
        model.compile_blocks()
    assert torch.allclose(model(tokens), plain, atol=1e-6)
    assert counts["stats"]["unique_graphs"] == 1 < len(model.blocks)
    model.eval()(tokens[:, :33])
    assert counts["stats"]["unique_graphs"] == 1
    assert len(list(model.parameters())) == len(model.state_dict()) - 1


@pytest.mark.parametrize(
    ("result", "found"),
    [(lambda q: q.transpose(1, 2), r"got \(1, 4, 5, 8\)"), (lambda q: (q, q), "got a tuple")],
)
def test_a_mixer_that_returns_another_shape_is_named(result: Callable[[Tensor], Any], found: str) -> None:
    model = build(attention="nope")
    model.blocks[0].get_submodule("attention").mixer.forward = lambda q, *_, **__: result(q)  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match=rf"attention 'nope' must return \(B, T, H, D\) = \(1, 5, 4, 8\); {found}"):
        model(draw(1, 5))
