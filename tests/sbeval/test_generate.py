"""Greedy continuations are those of whole forward passes, for every method, whatever shares the batch."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from sbeval import registry
from sbeval.errors import InputError
from sbeval.generate import generate
from sbeval.models.config import ModelConfig
from sbeval.models.decoder import Decoder
from sbeval.pretrained.hub_model import HubModel

CPU = torch.device("cpu")
VOCABULARY = 50
SCALED = [
    f"rope:scaling={name},factor=4,train_len=8,theta=100" for name in ("linear", "ntk", "dynamic_ntk", "yarn", "llama3")
]
SPECS = [
    *sorted(registry.ATTENTION),
    *SCALED,
    "forgetting:rotary=true",
    "fire:threshold=4",
    "sliding_window:window=5",
    "sliding_window:window=5,rotary=false",
    "stick_breaking:remainder=none",
    "stick_breaking:remainder=bias",
    "stick_breaking:attend_current=true",
    "stick_breaking:logit_bias=-1,logit_scale=2,epsilon=0",
    "stick_breaking:key_shift=true",
    "rope:key_shift=true",
]


def build(attention: str, **changes: Any) -> Decoder:
    """A decoder in double precision, none of whose parameters is at a value that hides it."""
    torch.manual_seed(0)
    if "dynamic_ntk" in attention:
        # each token changes the hidden states of all before it: only of the first layer's keys can a cache keep up
        changes["layers"] = 1
    shape = {"vocab_size": VOCABULARY, "width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "hidden": 40} | changes
    model = Decoder(ModelConfig(attention=attention, **shape)).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def draw(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


PROMPTS = draw(7, 1, 12, 3, 12, 20, 2, 9)


@torch.inference_mode()
def recomputed(model: Decoder, prompt: Sequence[int], new_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(new_tokens):
        tokens.append(int(model.logits(model(torch.tensor([tokens])))[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("attention", SPECS)
def test_continuations_are_those_of_whole_passes(attention: str) -> None:
    model = build(attention)
    together = generate(model, PROMPTS, 6, CPU)
    assert together == [recomputed(model, prompt, 6) for prompt in PROMPTS]
    assert together == generate(model, PROMPTS, 6, CPU, batch=1)
    assert together == generate(model, PROMPTS[::-1], 6, CPU, batch=3)[::-1]
    assert len({tuple(row) for row in together}) > 4, "prompts count"


@pytest.mark.parametrize("attention", SPECS)
def test_hidden_states_are_those_of_whole_passes(attention: str) -> None:
    model = build(attention)
    prompts, more = PROMPTS[:4], torch.tensor(draw(5, 5, 5, 5))

    def whole(step: int) -> Tensor:
        rows = [torch.tensor([[*prompt, *new[:step].tolist()]]) for prompt, new in zip(prompts, more, strict=True)]
        return torch.stack([model(row)[0, -1] for row in rows])

    with torch.inference_mode():
        hidden, cache = model.begin(prompts, 5)
        torch.testing.assert_close(hidden, whole(0), rtol=1e-6, atol=1e-6)
        for step in range(5):
            hidden = model.extend(more[:, step : step + 1], cache)[:, 0]
            torch.testing.assert_close(hidden, whole(step + 1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("attention", [*sorted(registry.ATTENTION), "nope:key_shift=true"])
def test_rows_change_places(attention: str) -> None:
    model, order = build(attention), torch.tensor([2, 0, 0])
    with torch.inference_mode():
        _, cache = model.begin(PROMPTS[:3], 2)
        model.extend(torch.tensor([[1], [2], [3]]), cache)
        cache.reorder(order)
        moved = model.extend(torch.tensor([[4], [4], [4]]), cache)
        _, cache = model.begin([PROMPTS[row] for row in order.tolist()], 2)
        model.extend(torch.tensor([[3], [1], [1]]), cache)
        torch.testing.assert_close(moved, model.extend(torch.tensor([[4], [4], [4]]), cache))


def test_multipliers_gelu_and_learned_positions() -> None:
    changes = {"m_emb": 3.0, "m_residual": 0.5, "m_width": 4.0, "attention_multiplier": 0.1, "mlp": "gelu"}
    model = build("nope", positions=25, **changes)
    assert generate(model, PROMPTS, 6, CPU) == [recomputed(model, prompt, 6) for prompt in PROMPTS]
    with pytest.raises(InputError, match="a prompt of 20 tokens and 6 more exceed the model's 25 positions"):
        generate(model, PROMPTS, 7, CPU)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("attention", sorted(registry.ATTENTION))
def test_any_dtype(attention: str, dtype: str) -> None:
    model = build(attention).float()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=dtype != "float32"):
        _, cache = model.begin(PROMPTS, 1)
        found = model.extend(torch.full((len(PROMPTS), 1), 5), cache)[:, 0]
        wanted = torch.stack([model(torch.tensor([[*prompt, 5]]))[0, -1] for prompt in PROMPTS])
    tolerance = 1e-4 if dtype == "float32" else 0.1
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    assert [len(row) for row in generate(model, PROMPTS, 3, CPU, dtype=dtype)] == [3] * len(PROMPTS)


def test_a_row_ends_where_stop_says_and_keeps_that_token() -> None:
    model = build("stick_breaking")
    whole = generate(model, PROMPTS, 6, CPU)
    last = whole[0][2]
    stopped = generate(model, PROMPTS, 6, CPU, stop=lambda tokens: tokens[-1] == last)
    assert stopped == [row[: row.index(last) + 1] if last in row else row for row in whole]
    assert stopped[0][-1] == last and any(len(row) == 6 for row in stopped)
    lengths: list[int] = []

    def second(tokens: Sequence[int]) -> bool:
        lengths.append(len(tokens))
        return len(tokens) == 2

    generate(model, PROMPTS[:2], 6, CPU, stop=second)
    assert lengths == [1, 1, 2, 2], "no step after the last row has ended"


def test_nothing_asked_for() -> None:
    model = build("nope")
    assert generate(model, PROMPTS, 0, CPU) == [[] for _ in PROMPTS]
    assert generate(model, [], 5, CPU) == []
    with pytest.raises(InputError, match="a prompt has no tokens"):
        generate(model, [[1], []], 5, CPU)
    with pytest.raises(InputError, match="at least 1; got 5 and 0"):
        generate(model, PROMPTS, 5, CPU, batch=0)


@pytest.mark.parametrize("attention", sorted(registry.ATTENTION))
def test_what_no_row_sees_is_not_read(attention: str) -> None:
    """Slots before a row's start do not count, whatever they hold."""
    model = build(attention)
    found = []
    for rubbish in (0.0, 3.0):
        with torch.inference_mode():
            _, cache = model.begin(PROMPTS[:2], 1)
            for layer in cache.layers:
                for kept in layer._tensors:
                    kept[1, : cache.rows.starts[1]] = -rubbish
            found.append(model.extend(torch.tensor([[1], [2]]), cache))
    torch.testing.assert_close(*found)


def test_models_of_transformers() -> None:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    whole: Any = transformers.LlamaForCausalLM(config)
    whole.double().eval()
    found = generate(HubModel(whole), PROMPTS, 6, CPU)
    for prompt, tokens in zip(PROMPTS, found, strict=True):
        text = torch.tensor([[*prompt, *tokens]])
        with torch.inference_mode():
            logits = whole(input_ids=text, use_cache=False).logits[0, len(prompt) - 1 : -1]
        assert tokens == logits.argmax(-1).tolist()
    assert found == generate(HubModel(whole), PROMPTS, 6, CPU, batch=1)
