"""Stick-breaking attention inside a Llama of transformers is the kernel on its rotated queries and keys."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from sbeval import hf_attention
from sbeval.errors import InputError
from sbeval.kernels import stick_breaking


def llama(implementation: str) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()


def test_output_is_the_reference_with_the_remainder_on_the_own_value() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 7, 8, dtype=torch.float64) for heads in (4, 2, 2))
    out, weights = hf_attention.forward(torch.nn.Identity(), q, k, v, None, scaling=0.3)
    wanted, rest = stick_breaking.reference(*(x.transpose(1, 2) for x in (q, k, v)), scale=0.3)
    own = v.transpose(1, 2).repeat_interleave(2, 2)
    torch.testing.assert_close(out, wanted + rest[..., None] * own)
    assert weights is None


def test_a_llama_runs_trains_and_differs_from_softmax() -> None:
    model, tokens = llama("stick_breaking"), torch.randint(50, (2, 12))
    logits: Tensor = model(tokens).logits
    assert not torch.allclose(logits, llama("sdpa")(tokens).logits)
    model(tokens, labels=tokens).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_cached_decoding_equals_the_whole_pass_and_padding_changes_nothing() -> None:
    model, tokens = llama("stick_breaking"), torch.randint(1, 50, (1, 9))
    with torch.inference_mode():
        wanted = model(tokens).logits
        past = model(tokens[:, :5], use_cache=True).past_key_values
        torch.testing.assert_close(model(tokens[:, 5:], past_key_values=past).logits, wanted[:, 5:])
        for side, slots in (("left", slice(3, None)), ("right", slice(0, 9))):
            pad = (3, 0) if side == "left" else (0, 3)
            rows = torch.cat([torch.nn.functional.pad(tokens, pad), torch.randint(1, 50, (1, 12))])
            mask = torch.ones_like(rows)
            mask[0] = torch.nn.functional.pad(torch.ones(9, dtype=torch.int64), pad)
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            logits = model(rows, attention_mask=mask, position_ids=positions).logits
            torch.testing.assert_close(logits[:1, slots], wanted)
        both = model.generate(
            torch.nn.functional.pad(tokens, (3, 0)),
            max_new_tokens=5,
            do_sample=False,
            pad_token_id=0,
            attention_mask=torch.nn.functional.pad(torch.ones_like(tokens), (3, 0)),
        )
        alone = model.generate(tokens, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert both[0, 12:].tolist() == alone[0, 9:].tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": 8}, "has no sliding_window"),
        ({"dropout": 0.1}, "has no dropout of weights"),
        ({"attention_mask": torch.tensor([[1, 0, 1]])}, "never within a row"),
        ({"attention_mask": torch.ones(1, 1, 3, 3)}, r"takes a mask of \(B, 3\) keys"),
    ],
)
def test_what_it_lacks_is_an_error(changes: dict[str, Any], message: str) -> None:
    q = torch.randn(1, 2, 3, 8)
    with pytest.raises(InputError, match=message):
        hf_attention.forward(
            torch.nn.Identity(), **{"query": q, "key": q, "value": q, "attention_mask": None} | changes
        )
