"""Diagnostics against brute force, and of models whose retrieval is known."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sbeval import registry
from sbeval.data.corpus import Split
from sbeval.evaluation import diagnostics
from sbeval.evaluation.diagnostics import Probes, Reading, Size
from sbeval.kernels import forgetting
from sbeval.models.attention_weights import attention_weights, mixer_inputs
from sbeval.models.config import ModelConfig, flops_per_token, named
from sbeval.models.decoder import Decoder

CPU = torch.device("cpu")
VOCABULARY, EOS = 3000, 2999


def text(*lengths: int, tokens: Any = None) -> Split:
    """Documents of random tokens, or of one token."""
    offsets = np.concatenate([[0], np.cumsum(np.array(lengths) + 1)]).astype(np.int64)
    drawn = np.random.default_rng(1).integers(0, EOS, offsets[-1]) if tokens is None else np.full(offsets[-1], tokens)
    return Split(
        corpus="x", role="test", tokens=drawn.astype(np.uint16), offsets=offsets, documents=tuple(map(str, lengths))
    )


def probes(size: Size, of: Split | None = None, **options: Any) -> Probes:
    return diagnostics.probes(of or text(900, 5000, 700), VOCABULARY, EOS, size, 512, **options)


def by(readings: list[Reading], metric: str) -> dict[int | None, Reading]:
    return {reading.distance: reading for reading in readings if reading.metric == metric}


class Induction:
    """Predicts the token behind the last occurrence of the current one, and all tokens alike where there is none."""

    by_length = False

    def __call__(self, tokens: Tensor) -> Tensor:
        same = (tokens[:, :, None] == tokens[:, None]).tril(-1)
        last = torch.where(same, torch.arange(tokens.shape[1]), -1).amax(-1)
        following = tokens.gather(1, (last + 1).clamp(min=0))
        return torch.where(last >= 0, following, -1)

    def logits(self, hidden: Tensor) -> Tensor:
        return 12.0 * torch.nn.functional.one_hot(hidden + 1, VOCABULARY + 1)[..., 1:]


class Uniform(Induction):
    def logits(self, hidden: Tensor) -> Tensor:
        return torch.zeros(*hidden.shape, VOCABULARY)


def test_an_induction_model_saves_all_that_a_random_token_costs() -> None:
    found = diagnostics.measure(Induction(), probes(Size(256)), CPU, "float32")
    assert list(by(found, "copy_gain")) == [64, 256] and list(by(found, "passage_gain")) == [128, 256]
    for reading in (*by(found, "copy_gain").values(), *by(found, "passage_gain").values()):
        # less what tokens that occur twice by chance cost
        assert reading.value == pytest.approx(math.log(VOCABULARY), rel=0.15)
        assert reading.unit == "nats/token" and reading.stderr is not None and reading.n > 3


def test_a_model_that_does_not_read_saves_nothing() -> None:
    found = diagnostics.measure(Uniform(), probes(Size(256)), CPU, "float32")
    assert {reading.value for reading in found} == {0.0}
    assert {reading.metric for reading in found} == {"copy_gain", "passage_gain", "in_context_score"}


def test_gains_are_differences_of_losses_by_hand() -> None:
    torch.manual_seed(0)
    shape = ModelConfig(vocab_size=VOCABULARY, width=32, layers=1, heads=2, hidden=32, attention="rope", init_std=0.3)
    model, given = Decoder(shape).eval(), probes(Size(128))
    found = diagnostics.measure(model, given, CPU, "float32")

    def losses(rows: Any) -> Tensor:
        tokens = torch.from_numpy(rows)
        with torch.no_grad():
            chances = model.logits(model(tokens[:, :-1])).double().log_softmax(-1)
        return -chances.gather(2, tokens[:, 1:, None])[..., 0]

    each = losses(given.copies[64])
    assert by(found, "copy_gain")[64].value == pytest.approx((each[:, :63] - each[:, 64:]).mean().item(), abs=1e-5)
    rows = given.passages[128]
    half = len(rows) // 2
    # the same ends and fillers; only the passage at the start differs
    assert (rows[:half, 64:] == rows[half:, 64:]).all() and (rows[:half, :64] == rows[:half, -64:]).all()
    assert (rows[half:, :64] != rows[half:, -64:]).any(1).all()
    each = losses(rows)[:, -63:].mean(1)
    assert by(found, "passage_gain")[128].value == pytest.approx((each[half:] - each[:half]).mean().item(), abs=1e-5)
    assert given.context is not None
    each = losses(given.context)
    late, early = each[:, 491:508], each[:, 41:58]
    assert by(found, "in_context_score")[None].value == pytest.approx((late.mean() - early.mean()).item(), abs=1e-5)


def test_random_rows_have_all_tokens_but_the_separator() -> None:
    given = diagnostics.probes(text(900), 5, 2, Size(64), 512)
    assert set(np.unique(given.copies[64])) == {0, 1, 3, 4}
    assert (given.copies[64][:, :64] == given.copies[64][:, 64:]).all()


def test_probes_are_the_same_for_every_model_and_absent_where_documents_are_short() -> None:
    once, again = probes(Size(256)), probes(Size(256))
    assert all((once.copies[n] == again.copies[n]).all() for n in once.copies)
    few = probes(Size(4096), text(300, 5000))
    assert list(few.passages) == [128, 256, 512, 1024, 2048] and list(few.copies) == [64, 256, 1024, 4096]
    none = probes(Size(64), text(60))
    assert none.passages == {} and none.context is None and none.reach is None
    far = probes(Size(1024), above=256)
    assert (list(far.copies), list(far.passages)) == ([1024], [512, 1024])
    assert far.context is None and far.reach is None and far.prefix is None


# heads


def brute(weights: Tensor, keys: int, own: bool) -> Tensor:
    """Sums by a walk over queries and keys: prefix matching, weight beyond `keys`, mean distance; (3, B, H)."""
    (batch, heads, length), half = weights.shape[:3], weights.shape[-1] // 2
    out = torch.zeros(3, batch, heads, dtype=torch.float64)
    for b, h in np.ndindex(batch, heads):
        matched = [weights[b, h, query, query - half + 1] for query in range(half, length - 1)]
        out[0, b, h] = sum(matched) / len(matched)
        for query in range(half, length):
            near = [weights[b, h, query, query - gap] for gap in range(0 if own else 1, keys + 1)]
            out[1, b, h] += (1 - sum(near)) / half
            out[2, b, h] += sum(weights[b, h, query, key] * (query - key) for key in range(query + 1)) / half
    return out


@pytest.mark.parametrize("own", [True, False])
def test_metrics_of_heads_are_those_of_a_walk(own: bool) -> None:
    torch.manual_seed(0)
    weights = torch.rand(2, 3, 12, 12, dtype=torch.float64).tril()
    weights /= weights.sum(-1, keepdim=True)
    wanted = brute(weights, 4, own)
    torch.testing.assert_close(diagnostics.prefix_matching(weights), wanted[0])
    torch.testing.assert_close(diagnostics.weight_beyond(weights, 4, own=own), wanted[1])
    torch.testing.assert_close(diagnostics.mean_distance(weights), wanted[2])


def test_an_induction_head_matches_all_prefixes() -> None:
    n = 8
    weights = torch.zeros(1, 2, 2 * n, 2 * n)
    weights[:, 0].diagonal(1 - n, -2, -1)[:] = 1
    # a head that looks at the token before
    weights[:, 1].diagonal(-1, -2, -1)[:] = 1
    torch.testing.assert_close(diagnostics.prefix_matching(weights), torch.tensor([[1.0, 0.0]]))
    torch.testing.assert_close(diagnostics.mean_distance(weights), torch.tensor([[n - 1.0, 1.0]]))
    torch.testing.assert_close(diagnostics.weight_beyond(weights, 3, own=True), torch.tensor([[1.0, 0.0]]))


@pytest.mark.parametrize("remainder", ["none", "value", "bias"])
def test_reach_of_stick_breaking_is_the_stick_that_is_left(remainder: str) -> None:
    """Logits of 0 break half of the stick at every key."""
    shape = ModelConfig(
        vocab_size=8, width=32, layers=1, heads=2, hidden=32, attention=f"stick_breaking:remainder={remainder}"
    )
    model: Any = Decoder(shape).eval()
    with torch.no_grad():
        model.blocks[0].attention.qkv.weight[:32] = 0
    given = Probes(copies={}, passages={}, reach=np.arange(64)[None] % 8)
    found = [
        reading for reading in diagnostics.heads(model, given, CPU, "float32") if reading.metric == "weight_beyond"
    ]
    assert [(reading.layer, reading.head, reading.distance) for reading in found] == [(1, 1, 16), (1, 2, 16)]
    assert all(reading.value == pytest.approx(2.0**-16, abs=2e-7) for reading in found)


def test_reach_of_an_even_softmax() -> None:
    shape = ModelConfig(vocab_size=8, width=32, layers=1, heads=2, hidden=32, attention="nope")
    model: Any = Decoder(shape).eval()
    with torch.no_grad():
        model.blocks[0].attention.qkv.weight[:32] = 0
    given = Probes(copies={}, passages={}, reach=np.arange(64)[None] % 8)
    found = {
        (reading.metric, reading.head): reading.value for reading in diagnostics.heads(model, given, CPU, "float32")
    }
    queries = np.arange(32, 64)
    assert found["mean_distance", 1] == pytest.approx((queries / 2).mean(), rel=1e-4)
    assert found["weight_beyond", 2] == pytest.approx((1 - 17 / (queries + 1)).mean(), rel=1e-4)


def test_half_life_of_a_gate() -> None:
    mixer = forgetting.Mixer(forgetting.Options(), heads=2, kv_heads=2, head_dim=4, width=8, scale=1.0)
    nn.init.zeros_(mixer.gate.weight)
    with torch.no_grad():
        # a half at every token, and a half after ten
        mixer.gate.bias[:] = torch.tensor([0.0, math.log(2**-0.1 / (1 - 2**-0.1))])
    life = diagnostics.half_life(mixer, torch.randn(3, 5, 8))
    torch.testing.assert_close(life, torch.tensor([[1.0, 10.0]]).expand(3, 2))
    assert diagnostics.half_life(nn.Identity(), torch.randn(3, 5, 8)) is None


@pytest.mark.parametrize("attention", sorted(registry.ATTENTION))
def test_heads_of_every_method_are_read(attention: str) -> None:
    torch.manual_seed(0)
    shape = ModelConfig(vocab_size=VOCABULARY, width=32, layers=2, heads=2, hidden=32, attention=attention)
    model, given = Decoder(shape).eval(), probes(Size(64))
    found = diagnostics.heads(model, dataclasses.replace(given, reach=given.copies[64][:2]), CPU, "float32")
    expected = {"prefix_matching", "weight_beyond", "mean_distance"}
    assert {reading.metric for reading in found} == expected | (
        {"gate_half_life"} if attention == "forgetting" else set()
    )
    assert {(reading.layer, reading.head) for reading in found} == {(1, 1), (1, 2), (2, 1), (2, 2)}
    weights = attention_weights(model, torch.from_numpy(given.copies[64][:4]))
    wanted = diagnostics.prefix_matching(weights[1])[:, 0].mean().item()
    (reading,) = [one for one in found if (one.metric, one.layer, one.head) == ("prefix_matching", 2, 1)]
    assert reading.value == pytest.approx(wanted, rel=1e-5) and (reading.distance, reading.n) == (64, 4)


def test_heads_are_read_from_fewer_rows_where_memory_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """It can end there, in the middle of a training."""
    torch.manual_seed(0)
    shape = ModelConfig(vocab_size=VOCABULARY, width=32, layers=2, heads=2, hidden=32, attention="forgetting")
    model, given = Decoder(shape).eval(), probes(Size(64))
    given = dataclasses.replace(given, reach=given.copies[64][:5])
    said: list[str] = []
    whole = diagnostics.heads(model, given, CPU, "float32", said.append)
    read = mixer_inputs

    def limited(decoder: Decoder, tokens: torch.Tensor, dtype: str) -> Any:
        if len(tokens) > 2:
            raise torch.OutOfMemoryError
        return read(decoder, tokens, dtype)

    assert not said
    monkeypatch.setattr(diagnostics, "mixer_inputs", limited)
    fewer = diagnostics.heads(model, given, CPU, "float32", said.append)
    assert said and all(line.startswith("out of memory at ") for line in said)
    for one, other in zip(fewer, whole, strict=True):
        assert dataclasses.replace(one, value=0.0, stderr=None) == dataclasses.replace(other, value=0.0, stderr=None)
        assert (one.value, one.stderr) == pytest.approx((other.value, other.stderr), rel=1e-5)


# cost


@pytest.mark.parametrize(
    ("size", "length", "tokens"),
    [("quick", 256, 10**5), ("quick", 256, 10**7), ("25m", 2048, 10**8), ("125m", 2048, 10**9), ("350m", 2048, 10**10)],
)
def test_a_plan_is_within_its_share(size: str, length: int, tokens: int) -> None:
    shape = named(size, vocab_size=8192, attention="stick_breaking")
    times, planned = diagnostics.plan(shape, length, tokens, 20)
    training = 3 * flops_per_token(shape, length) * tokens
    assert 1 <= times <= 20 and planned.longest >= 128
    assert times == 1 or times * planned.flops(shape, length) <= diagnostics.SHARE * training
    # more training, more to see
    assert diagnostics.plan(shape, length, 100 * tokens, 20)[1].longest >= planned.longest
