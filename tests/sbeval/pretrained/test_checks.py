"""A model whose numbers would be another model's is not loaded, and one line says why."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sbeval.errors import InputError
from sbeval.pretrained import load

CPU = torch.device("cpu")
Tensors = dict[str, Tensor]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def read(folder: Path, dtype: str = "float32") -> load.Pretrained:
    return load.load(str(folder), CPU, dtype)


def without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: x for name, x in tensors.items() if name not in names}


@pytest.mark.parametrize(
    "change, settings, message",
    [
        (without(HEAD), {}, f"lack {HEAD}: random numbers"),
        (without("model.layers.1.mlp.up_proj.weight", HEAD), {}, f"lack {HEAD} and 1 more tensors"),
        (without(HEAD, EMBEDDING), {"tie_word_embeddings": True}, f"lack {HEAD} and 1 more"),
        (lambda x: x | {HEAD: x[HEAD][1:].clone()}, {}, rf"{HEAD} of model .* shape \(319, 32\), .* \(320, 32\)"),
        (lambda x: x | {"model.more": x[HEAD].clone()}, {}, "have model.more, which its config has no place for"),
        (lambda x: x, {"num_hidden_layers": 1}, r"have model.layers.1.input_layernorm.weight and 8 more"),
        (lambda x: x | {HEAD: x[HEAD].to(torch.int8)}, {}, f"{HEAD} of model .* is I8, .* no quantization_config"),
        (lambda x: x | {HEAD: x[HEAD].to(torch.float8_e4m3fn)}, {}, f"{HEAD} of model .* is F8_E4M3"),
        (lambda x: x, {"tie_word_embeddings": True}, "ties its head to its embedding, and its files have two"),
    ],
)
def test_tensors_that_do_not_fit_are_an_error(
    change: Callable[[Tensors], Tensors], settings: dict[str, Any], message: str, odd_models: Any, tmp_path: Path
) -> None:
    folder = odd_models.write(tmp_path / "model")
    read(folder)
    odd_models.changed(folder, change, **settings)
    with pytest.raises(InputError, match=message):
        read(folder)


def test_tied_heads_and_short_dtypes_are_read(odd_models: Any, tmp_path: Path) -> None:
    folder = odd_models.write(tmp_path / "tied", tie_word_embeddings=True)
    model: Any = read(folder).model
    assert torch.equal(model.head.weight, model.body.embed_tokens.weight)
    odd_models.changed(folder, lambda x: {name: y.bfloat16() for name, y in x.items()})
    found: Any = read(folder).model
    torch.testing.assert_close(found.head.weight, model.head.weight.bfloat16().float())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_models_that_see_later_tokens_are_an_error(dtype: str, odd_models: Any, tmp_path: Path) -> None:
    more = {"head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8, "use_bidirectional_attention": True}
    ahead = odd_models.write(tmp_path / "ahead", "Gemma3Text", **more)
    with pytest.raises(InputError, match="ahead' attends to later tokens, so its losses are none of prediction"):
        read(ahead, dtype)
    read(odd_models.write(tmp_path / "causal", "Gemma3Text", **more | {"use_bidirectional_attention": False}), dtype)


def test_weak_attention_to_later_tokens_is_an_error(odd_models: Any, tmp_path: Path) -> None:
    shape: dict[str, Any] = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "initializer_range": 0.02}
    shape["max_position_embeddings"] = ...
    with pytest.raises(InputError, match="attends to later tokens"):
        read(odd_models.write(tmp_path / "xlnet", "XLNet", **shape))


def test_experts_are_no_later_tokens(odd_models: Any, tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        read(odd_models.write(tmp_path / "mixtral", "Mixtral"), dtype)


def test_an_adapter_beside_the_weights_is_an_error(
    odd_models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = odd_models.write(tmp_path / "model")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"}))
    with pytest.raises(InputError, match="has an adapter .* which is not applied: merge it into the weights"):
        read(folder)

    class Hub:
        @staticmethod
        def hf_hub_download(name: str, file: str) -> str:
            return str(folder / file)

    monkeypatch.setattr(load, "_hub", lambda: Hub)
    with pytest.raises(InputError, match="'someone/model' has an adapter"):
        load.load("someone/model", CPU, "float32")
