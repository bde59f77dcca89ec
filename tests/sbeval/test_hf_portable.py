"""The module that `sbeval export --code` copies computes what sbeval computes, where sbeval is not installed."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sbeval import hf, hf_card, registry
from sbeval.data import tokenizer
from sbeval.errors import InputError
from sbeval.models.config import ModelConfig
from sbeval.models.decoder import Decoder
from sbeval.training import checkpoint

portable = pytest.importorskip("sbeval.hf_portable")
PLAIN: dict[str, Any] = {"vocab_size": 64, "width": 32, "layers": 2, "heads": 4, "hidden": 48}
SPECS = (
    "stick_breaking",
    "stick_breaking:remainder=none,attend_current=true,logit_scale=1.5",
    "stick_breaking:remainder=bias,logit_bias=spread",
    "rope:theta=500000.0,qkv_bias=true",
    "nope:head_norm=true",
    "alibi",
    "fire",
    "sliding_window:window=5",
    "sliding_window:window=7,rotary=false",
    "forgetting",
    "forgetting:rotary=true",
    "stick_breaking:key_shift=true",
    "rope:key_shift=true",
    "forgetting:key_shift=true",
)
SHAPES: dict[str, dict[str, Any]] = {
    "grouped": {"kv_heads": 2, "tied": True},
    "author": {"norm": "layer", "qkv_bias": True, "out_bias": True, "mlp_bias": True, "mlp": "gelu"},
    "other": {"mlp": "gelu", "positions": 160, "m_emb": 2.0, "m_residual": 0.5, "m_width": 3.0, "head_dim": 10},
}


def pair(spec: str, **shape: Any) -> tuple[Decoder, Any]:
    """A decoder with random weights, biases included, and the same in the portable module."""
    torch.manual_seed(0)
    config = ModelConfig(attention=spec, **PLAIN | shape)
    decoder = Decoder(config).eval()
    with torch.no_grad():
        for name, weight in decoder.named_parameters():
            if name.endswith(("bias", "b1", "key_shift.weight")):
                weight.normal_(std=0.3)
    settings = hf.SbevalConfig.of(config).to_dict()
    model = portable.SbevalForCausalLM(portable.SbevalConfig(**settings)).eval()
    model.decoder.load_state_dict(decoder.state_dict())
    return decoder, model


def logits(decoder: Decoder, tokens: Tensor) -> Tensor:
    return decoder.logits(decoder(tokens))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spec", SPECS)
@torch.inference_mode()
def test_logits_are_those_of_the_decoder(spec: str, shape: str) -> None:
    decoder, model = pair(spec, **SHAPES[shape])
    # more than the rows of a part
    tokens = torch.randint(64, (2, portable.ROWS + 13))
    torch.testing.assert_close(model(tokens).logits, logits(decoder, tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec", SPECS)
@torch.inference_mode()
def test_padding_and_a_cache_change_nothing(spec: str) -> None:
    decoder, model = pair(spec, **SHAPES["grouped"])
    tokens = torch.randint(64, (1, 12))
    wanted = logits(decoder, tokens)
    for left, right in ((4, 0), (0, 4)):
        padded = torch.nn.functional.pad(tokens, (left, right)).expand(2, -1).clone()
        mask = torch.nn.functional.pad(torch.ones_like(tokens), (left, right)).expand(2, -1).clone()
        # a longer row beside it
        mask[1], padded[1] = 1, torch.randint(64, (16,))
        found = model(padded, attention_mask=mask).logits
        torch.testing.assert_close(found[:1, left : left + 12], wanted, rtol=1e-4, atol=1e-5)
        assert found.isfinite().all()
    # prompts of unequal length, then one token at a time, and two
    mask = torch.tensor([[0, 0, 0, 0] + [1] * 5, [1] * 9])
    both = torch.cat([torch.nn.functional.pad(tokens, (4, 0)), torch.randint(64, (1, 16))])
    out = model(both[:, :9], attention_mask=mask, use_cache=True)
    steps = [out.logits]
    for start, end in ((9, 10), (10, 11), (11, 13), (13, 16)):
        mask = torch.cat([mask, torch.ones(2, end - start, dtype=mask.dtype)], 1)
        out = model(both[:, start:end], attention_mask=mask, past_key_values=out.past_key_values, use_cache=True)
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1)[:1, 4:], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec", SPECS)
@torch.inference_mode()
def test_bfloat16_is_as_exact_as_the_decoder(spec: str) -> None:
    decoder, model = pair(spec)
    tokens = torch.randint(64, (1, 100))
    exact = logits(decoder, tokens)
    theirs = (model.bfloat16()(tokens).logits.float() - exact).norm() / exact.norm()
    assert theirs < 0.05


def test_gradients_are_those_of_the_decoder() -> None:
    decoder, model = pair("stick_breaking")
    tokens = torch.randint(64, (2, 20))
    model(tokens, labels=tokens).loss.backward()
    (decoder.loss(tokens[:, :-1], tokens[:, 1:]) / (2 * 19)).backward()
    wanted = dict(decoder.named_parameters())
    for name, weight in model.decoder.named_parameters():
        torch.testing.assert_close(weight.grad, wanted[name].grad, rtol=1e-3, atol=1e-5)


def test_a_table_of_positions_has_an_end() -> None:
    _, model = pair("nope", positions=8)
    with pytest.raises(ValueError, match="9 tokens exceed 8 positions"):
        model(torch.randint(64, (1, 9)))


def test_folders_load_and_generate_without_sbeval(tmp_path: Path) -> None:
    specs = ("stick_breaking", "forgetting")
    for spec in specs:
        torch.manual_seed(0)
        decoder = Decoder(ModelConfig(attention=spec, **PLAIN | {"vocab_size": 257, "tied": True}))
        checkpoint.save(tmp_path / "saved" / spec, decoder, checkpoint.State(finished=True), training={"length": 16})
        hf.export(tmp_path / "saved" / spec, tmp_path / spec, tokenizer.Bytes(), code=True)
    code = f"""
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
for spec in {specs}:
    folder = f"{tmp_path}/{{spec}}"
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert not any(name.startswith("sbeval.") for name in sys.modules)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    given = tokenizer(["Hi", "stick-breaking"], return_tensors="pt", padding=True)
    for beams in (1, 2):
        out = model.generate(**given, max_new_tokens=8, do_sample=False, num_beams=beams)
        print(out[0].tolist())
"""
    printed = without_sbeval(code, tmp_path)
    given = hf.fast_tokenizer(tokenizer.Bytes())(["Hi", "stick-breaking"], return_tensors="pt", padding=True)
    wanted = []
    for spec in specs:
        ours: Any = hf.SbevalForCausalLM.from_pretrained(tmp_path / spec)
        for beams in (1, 2):
            wanted.append(ours.generate(**given, max_new_tokens=8, do_sample=False, num_beams=beams)[0].tolist())
    assert printed == [str(row) for row in wanted]


def without_sbeval(code: str, folder: Path) -> list[str]:
    """Run code in a Python in which sbeval cannot be imported, and return the lines that it prints."""
    env = {**os.environ, "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    code = f"import sys\nsys.modules['sbeval'] = None\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=folder)
    assert not done.returncode, done.stderr
    return done.stdout.splitlines()


def test_lm_eval_loads_the_folder_without_sbeval(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    torch.manual_seed(0)
    decoder = Decoder(ModelConfig(**PLAIN | {"vocab_size": 257}))
    checkpoint.save(tmp_path / "saved", decoder, checkpoint.State(finished=True), training={"length": 16})
    hf.export(tmp_path / "saved", tmp_path / "model", tokenizer.Bytes(), code=True)
    code = f"""
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
lm = HFLM(pretrained={str(tmp_path / "model")!r}, trust_remote_code=True, device="cpu", dtype="float32")
ask = Instance("loglikelihood", {{}}, ("ab", "cd"), 0)
print(lm.loglikelihood([ask])[0][0])
"""
    tokens = torch.tensor([list(b"abcd")])
    with torch.inference_mode():
        chances = logits(decoder.eval(), tokens).log_softmax(-1)[0]
    wanted = chances[1, tokens[0, 2]] + chances[2, tokens[0, 3]]
    assert float(without_sbeval(code, tmp_path)[-1]) == pytest.approx(wanted.item(), rel=1e-4)


@pytest.mark.parametrize("spec", ["rope:scaling=ntk,factor=2", "sbeval_example.tempered"])
def test_what_the_module_does_not_compute_is_refused(spec: str) -> None:
    with pytest.raises(InputError, match="--code has no"):
        hf_card.check_portable(spec)
    hf_card.check_portable("rope:theta=500000.0")


def test_the_module_reads_every_field_of_a_model_and_every_option_of_its_methods() -> None:
    """Weights of one that it does not read would be left out when a folder is loaded, and numbers be others."""
    text = hf_card.PORTABLE.read_text(encoding="utf-8")

    def unread(kind: Any) -> set[str]:
        return {field.name for field in dataclasses.fields(kind) if f'"{field.name}"' not in text}

    # the config of transformers has the first two; initial weights are replaced
    assert unread(ModelConfig) == {"vocab_size", "tied", "init_std"}
    for name in hf_card.METHODS:
        options = unread(registry.method(name).Options)
        # what is skipped is below rounding; options of scaling are refused
        assert options == {"stick_breaking": {"epsilon"}}.get(name, set()) or (name == "rope" and "scaling" in options)


def test_the_module_imports_nothing_of_sbeval() -> None:
    text = hf_card.PORTABLE.read_text(encoding="utf-8")
    assert "from sbeval" not in text and "import sbeval" not in text
