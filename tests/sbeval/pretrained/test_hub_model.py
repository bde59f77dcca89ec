"""Models of transformers in two steps predict and continue as transformers' own do, and say what they can't read."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sbeval.errors import InputError
from sbeval.evaluation import perplexity
from sbeval.generate import generate
from sbeval.pretrained import hub_model, load
from sbeval.pretrained.hub_model import HubModel

transformers: Any = pytest.importorskip("transformers")

CPU = torch.device("cpu")
# tied, random models repeat what they read
NONE = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "tie_word_embeddings": False}
SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    **NONE,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
GPT2 = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, **NONE}
CONFIGS: dict[str, dict[str, Any]] = {
    # two names of caches
    "Mamba": {"vocab_size": 50, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, **NONE},
    "GPT2": GPT2,
    # its cache does not tell how many tokens it has read
    "Bamba": {**SMALL, **MAMBA, "attn_layer_indices": [1]},
    # a cache that is right for one row alone, none, and one that stays in the model
    "Rwkv": {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, **NONE},
    "OpenAIGPT": GPT2,
    "RecurrentGemma": {**SMALL, "num_hidden_layers": 3, "attention_window_size": 16},
}


def build(name: str, **changes: Any) -> Any:
    """A random model of that name whose logits differ much."""
    config = getattr(transformers, f"{name}Config")(**{**CONFIGS.get(name, SMALL), **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        # a bias would say the same everywhere
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.4)
    return model.double().eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_continuations_are_those_of_transformers(name: str) -> None:
    model = build(name)
    # there generate() takes a prompt of one token for a further one of the last prompt
    short = 2 if name == "RecurrentGemma" else 1
    prompts = [torch.randint(50, (length,)) for length in (12, short, 12, short)]
    found = generate(HubModel(model), [prompt.tolist() for prompt in prompts], 9, CPU)
    how = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    for prompt, tokens in zip(prompts, found, strict=True):
        wanted = model.generate(prompt[None], attention_mask=torch.ones_like(prompt[None]), **how)
        assert [*prompt.tolist(), *tokens] == wanted[0].tolist()
    assert len({tuple(row) for row in found}) == 4 and len(set(found[0])) > 1, "prompts and places count"


# logits


def test_logits_of_bfloat16_are_the_models_own() -> None:
    # which keeps its hidden states in float32
    found, wanted = both(build("Mamba").bfloat16(), 10.0)
    torch.testing.assert_close(found.float(), wanted)


def both(model: Any, size: float) -> tuple[Tensor, Tensor]:
    """Logits in two steps and the model's own, where the largest of the head is about `size`."""
    tokens = torch.arange(20, 40)[None]
    with torch.inference_mode():
        hidden = model.base_model(tokens).last_hidden_state.to(model.dtype)
        largest = model.get_output_embeddings()(hidden).abs().max()
        model.get_output_embeddings().weight *= size / largest
        hub = HubModel(model)
        return hub.logits(hub(tokens)), model(tokens).logits


@pytest.mark.parametrize("size", [0.01, 1000.0])
@pytest.mark.parametrize(
    "name, changes",
    [
        ("Gemma2", {"head_dim": 8, "final_logit_softcapping": 5.0}),
        ("Gemma2", {"head_dim": 8, "final_logit_softcapping": None}),
        ("RecurrentGemma", {"logits_soft_cap": 5.0}),
        ("Granite", {"logits_scaling": 4.0}),
        ("Llama", {}),
    ],
)
def test_logits_are_the_models_own(name: str, changes: dict[str, Any], size: float) -> None:
    found, wanted = both(build(name, **changes), size)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)
    if changes.get("final_logit_softcapping"):
        assert wanted.abs().max() == pytest.approx(min(size, 5), rel=1e-3), "the cap counts, or does not"


@pytest.mark.parametrize("size", [0.01, 1000.0])
def test_other_changes_of_logits_are_an_error(size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("Gemma2", head_dim=8, final_logit_softcapping=5.0)
    monkeypatch.setattr(hub_model, "CAPS", ())
    with pytest.raises(
        InputError, match="Gemma2ForCausalLM is not supported: it changes its head's logits by more than a factor"
    ):
        both(model, size)


def test_a_model_without_a_head_is_an_error() -> None:
    model = build("Llama")
    with pytest.raises(InputError, match="LlamaModel is not supported: it has no separate body and head"):
        HubModel(model.model)


# positions


def positions(folder: Path, model: Any) -> int | None:
    model.float().save_pretrained(folder)
    found = load.load(str(folder), CPU, "float32")
    found.check_length(32, "it")
    if found.positions is None:
        found.check_length(1 << 20, "it")
        with torch.inference_mode():
            assert found.model(torch.randint(2, 50, (1, 40))).shape[1] == 40
    else:
        with pytest.raises(InputError, match="the model of it has a table of 32 positions and can't read 33 tokens"):
            found.check_length(33, "it")
        with torch.inference_mode(), pytest.raises((IndexError, RuntimeError)):
            found.model(torch.randint(2, 50, (1, 33)))
    return found.positions


OPT = {"ffn_dim": 40, "word_embed_proj_dim": 32}


@pytest.mark.parametrize(
    "name, changes",
    [
        ("GPT2", {}),
        ("OPT", OPT),
        ("GPTJ", {**GPT2, "rotary_dim": 4}),
        ("Mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 32}),
    ],
)
def test_a_table_of_positions_has_an_end(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    assert positions(tmp_path, build(name, **changes)) == 32


@pytest.mark.parametrize("name", ["Llama", "Bloom", "Mamba"])
def test_others_have_none(name: str, tmp_path: Path) -> None:
    assert positions(tmp_path, build(name)) is None


# requests and batches


@pytest.fixture(scope="module")
def scaled(odd_models: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models whose RoPE depends on the length of what they read, past 64 tokens."""
    folder = tmp_path_factory.mktemp("scaled")
    return {"longrope": odd_models.longrope(folder / "l"), "dynamic": odd_models.dynamic(folder / "d")}


def rows(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, 320, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("name", ["longrope", "dynamic"])
def test_numbers_depend_on_no_other_row_and_no_earlier_one(name: str, scaled: dict[str, Path]) -> None:
    texts = rows(20, 62, 90, 33, 200, 70, 62)
    wanted = []
    for text in texts:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(scaled[name])
        with torch.inference_mode():
            chances = theirs(torch.tensor([text])).logits[0, -1].log_softmax(-1)
        wanted.append(float(chances[7]))
    model: Any = load.load(str(scaled[name]), CPU, "float32").model
    asked = [(index, [7]) for index in range(len(texts))]
    # padded to 208, all would be read with the factors of long texts
    together = perplexity.endings(model, texts, asked, place=CPU, dtype="float32", width=208)
    alone = [perplexity.endings(model, [text], [(0, [7])], place=CPU, dtype="float32")[0] for text in texts]
    for found in (together, alone):
        assert [score for score, _ in found] == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("name", ["longrope", "dynamic"])
def test_generation_past_the_switch_is_that_of_transformers(name: str, scaled: dict[str, Path]) -> None:
    prompts = rows(60, 60, 64, 65, 30)
    model: Any = load.load(str(scaled[name]), CPU, "float32").model
    # asked before: dynamic RoPE keeps the factors of the longest text
    perplexity.endings(model, rows(200), [(0, [7])], place=CPU, dtype="float32")
    found = generate(model, prompts, 12, CPU)
    for prompt, tokens in zip(prompts, found, strict=True):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(scaled[name])
        wanted = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=12,
            min_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        assert [*prompt, *tokens] == wanted[0].tolist()
