"""An exported model is the same model to transformers: logits, loss, generation in any batch, tokens, lm-eval."""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from sbeval import hf, registry
from sbeval.cli import main
from sbeval.data import tokenizer
from sbeval.errors import InputError
from sbeval.generate import generate
from sbeval.models.config import ModelConfig
from sbeval.models.decoder import Decoder
from sbeval.pretrained import load
from sbeval.training import checkpoint

CPU = torch.device("cpu")
EOS = 256
TEXTS = ["the cat", "a", "a dog saw the mat and é", "<|x|>\n\n  two"]
SHAPE = ModelConfig(vocab_size=257, width=32, layers=2, heads=4, kv_heads=2, hidden=40, m_emb=2, m_width=2)


def decoder(**changes: Any) -> Decoder:
    """A decoder none of whose parameters is at a value that hides it."""
    torch.manual_seed(0)
    model = Decoder(dataclasses.replace(SHAPE, **changes))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def wrapped(**changes: Any) -> Any:
    ours = decoder(**changes)
    model: Any = hf.SbevalForCausalLM(hf.SbevalConfig.of(ours.config, eos_token_id=EOS, pad_token_id=EOS))
    model.decoder.load_state_dict(ours.state_dict())
    return model.eval()


def padded(prompts: Sequence[Sequence[int]], side: str = "left") -> dict[str, Tensor]:
    longest = max(map(len, prompts))
    gaps = [[EOS] * (longest - len(prompt)) for prompt in prompts]
    rows = [[*gap, *row] if side == "left" else [*row, *gap] for gap, row in zip(gaps, prompts, strict=True)]
    marks = [[0] * len(gap) + [1] * (longest - len(gap)) for gap in gaps]
    return {
        "input_ids": torch.tensor(rows),
        "attention_mask": torch.tensor(marks if side == "left" else [mark[::-1] for mark in marks]),
    }


PROMPTS = [list(text.encode()) for text in TEXTS]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "checkpoint"
    checkpoint.save(folder, decoder(tied=True), checkpoint.State(finished=True), training={"length": 16})
    return folder


@pytest.fixture(scope="module")
def exported(saved: Path) -> Path:
    out = saved.parent / "exported"
    hf.export(saved, out, tokenizer.Bytes())
    return out


@pytest.fixture(scope="module")
def loaded(exported: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(exported)


# what export writes


def test_logits_are_ours_bit_for_bit(loaded: Any, saved: Path) -> None:
    ours, tokens = checkpoint.load_model(saved).eval(), torch.randint(257, (3, 40))
    assert type(loaded) is hf.SbevalForCausalLM and not loaded.training and loaded.config.train_len == 16
    with torch.inference_mode():
        wanted = ours.logits(ours(tokens))
        assert torch.equal(loaded(tokens).logits, wanted)
        assert torch.equal(loaded(tokens, torch.ones_like(tokens)).logits, wanted)
        assert torch.equal(loaded(tokens, return_dict=False)[0], wanted)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_one_and_others_two(tied: bool, tmp_path: Path) -> None:
    model = wrapped(tied=tied)
    model.save_pretrained(tmp_path)
    names = safetensors.torch.load_file(tmp_path / "model.safetensors").keys()
    assert "decoder.embedding.weight" in names and ("decoder.head.weight" in names) is not tied
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (again.decoder.head.weight is again.decoder.embedding.weight) is tied
    assert again.decoder.config == model.decoder.config
    assert torch.equal(again.decoder.head.weight, model.decoder.head.weight)
    assert again.num_parameters() == model.decoder.n_parameters()


def test_missing_weights_are_an_error(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    del weights["decoder.blocks.1.mlp.up.weight"]
    safetensors.torch.save_file(weights, file, {"format": "pt"})
    with pytest.raises(InputError, match="lack weights of a Linear"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def test_a_byte_is_a_token(exported: Path) -> None:
    found, ours = AutoTokenizer.from_pretrained(exported), tokenizer.Bytes()
    for text in (*TEXTS, "", "naïve 日本\x00\x7f\xad"):
        tokens = found(text).input_ids
        assert tokens == ours.encode(text).tolist() and found.decode(tokens) == text
    assert found.decode(list(range(256))) == ours.decode(range(256))
    assert found.eos_token_id == found.pad_token_id == ours.eos and found.padding_side == "left"
    assert found("<|endoftext|>").input_ids == [EOS]


def test_a_trained_tokenizer_comes_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / "cache"))
    for role in ("train", "test"):
        (tmp_path / f"{role}.txt").write_text("the cat sat on a mat and saw no dog near it; " * 9)
    ours = hf.tokenizer_of("bpe:280", str(tmp_path), "text")
    assert ours is not None
    checkpoint.save(tmp_path / "checkpoint", decoder(vocab_size=280), checkpoint.State())
    hf.export(tmp_path / "checkpoint", tmp_path / "out", ours)
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in TEXTS:
        assert found(text).input_ids == ours.encode(text).tolist() and found.decode(found(text).input_ids) == text
    # what we read back ourselves
    assert (
        tokenizer.load(str(tmp_path / "out"), cache_dir=tmp_path).encode("a cat").tolist() == found("a cat").input_ids
    )


def test_a_folder_that_holds_something_is_left_alone(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(InputError, match="exists and is not empty"):
        hf.export(saved, tmp_path, None)
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]
    (tmp_path / "empty").mkdir()
    hf.export(saved, tmp_path / "empty", None)
    assert {path.name for path in tmp_path.iterdir()} == {"notes", "empty"}
    assert not list((tmp_path / "empty").glob("tokenizer*"))


def test_tokenizers_that_do_not_fit_are_errors(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not hold its tokenizer: give the --tokenizer"):
        hf.tokenizer_of(None, None, "text")
    with pytest.raises(InputError, match="'bpe:300' is trained on a corpus: give that --corpus"):
        hf.tokenizer_of("bpe:300", None, "text")
    checkpoint.save(tmp_path / "other", decoder(vocab_size=300), checkpoint.State())
    with pytest.raises(InputError, match="'bytes' has 257 tokens and the model of .* 300"):
        hf.export(tmp_path / "other", tmp_path / "out", tokenizer.Bytes())
    checkpoint.save(tmp_path / "knows", decoder(), checkpoint.State(), training={"tokenizer": "another"})
    with pytest.raises(InputError, match="was trained with another tokenizer than 'bytes'"):
        hf.export(tmp_path / "knows", tmp_path / "out", tokenizer.Bytes())
    assert hf.tokenizer_of("none", None, "text") is None and not (tmp_path / "out").exists()


def test_a_vocabulary_that_training_padded_is_that_of_its_tokenizer(tmp_path: Path) -> None:
    ours = tokenizer.Bytes()
    ours.vocab_size = 1030
    checkpoint.save(tmp_path / "padded", decoder(vocab_size=1088), checkpoint.State())
    hf.export(tmp_path / "padded", tmp_path / "out", ours)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == 1088
    checkpoint.save(tmp_path / "other", decoder(vocab_size=1152), checkpoint.State())
    with pytest.raises(InputError, match="'bytes' has 1030 tokens and the model of .* 1152"):
        hf.export(tmp_path / "other", tmp_path / "out2", ours)


def test_the_command(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "below" / "out"
    main.export(saved, out, tokenizer="bytes")
    assert capsys.readouterr().out.strip().replace("\n", "").endswith(str(out))
    assert (out / "tokenizer.json").exists() and [path.name for path in out.parent.iterdir()] == ["out"]


# generation


@pytest.mark.parametrize("attention", sorted(registry.ATTENTION))
def test_generation_is_ours_alone_and_among_others(attention: str) -> None:
    model = wrapped(attention=attention)
    found = model.generate(**padded(PROMPTS), max_new_tokens=6, do_sample=False, eos_token_id=None)
    new = found[:, max(map(len, PROMPTS)) :].tolist()
    assert new == generate(model.decoder, PROMPTS, 6, CPU) and len({tuple(row) for row in new}) > 2
    for prompt, tokens in zip(PROMPTS, new, strict=True):
        alone = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None)
        assert alone.tolist() == [[*prompt, *tokens]]
    recomputed = model.generate(
        **padded(PROMPTS), max_new_tokens=6, do_sample=False, eos_token_id=None, use_cache=False
    )
    assert torch.equal(found, recomputed)


def test_beams_are_those_of_whole_passes() -> None:
    model = wrapped()
    how: dict[str, Any] = {"max_new_tokens": 7, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    cached = model.generate(**padded(PROMPTS), **how)
    assert torch.equal(cached, model.generate(**padded(PROMPTS), **how, use_cache=False))
    assert not torch.equal(cached, model.generate(**padded(PROMPTS), **{**how, "num_beams": 1})), "beams count"


def test_samples_follow_the_seed() -> None:
    model, found = wrapped(), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(model.generate(**padded(PROMPTS), max_new_tokens=5, do_sample=True, top_k=20))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_a_cache_goes_on_token_by_token_and_several_at_a_time() -> None:
    model = wrapped(positions=40)
    tokens = torch.randint(257, (2, 20))
    with torch.inference_mode():
        wanted = model(tokens).logits
        first = model(tokens[:, :7], use_cache=True)
        past = first.past_key_values
        rest = [model(part, past_key_values=past).logits for part in tokens[:, 7:].split([1, 5, 7], 1)]
    torch.testing.assert_close(torch.cat([first.logits, *rest], 1), wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="41 tokens exceed the model's 40 positions"), torch.inference_mode():
        model(torch.randint(257, (2, 21)), past_key_values=past)


def test_generation_goes_on_from_the_cache_that_it_returned() -> None:
    model, batch = wrapped(), padded(PROMPTS)
    how: dict[str, Any] = {"do_sample": False, "eos_token_id": None}
    wanted = model.generate(**batch, max_new_tokens=9, **how)
    first = model.generate(**batch, max_new_tokens=4, return_dict_in_generate=True, **how)
    mask = torch.cat([batch["attention_mask"], torch.ones(len(PROMPTS), 4, dtype=torch.long)], 1)
    past = first.past_key_values
    found = model.generate(first.sequences, attention_mask=mask, past_key_values=past, max_new_tokens=5, **how)
    assert torch.equal(found, wanted)
    # a further turn
    tokens = torch.cat([found, torch.randint(EOS, (len(PROMPTS), 3))], 1)
    mask = torch.cat([mask, torch.ones(len(PROMPTS), 8, dtype=torch.long)], 1)
    again = model.generate(tokens, attention_mask=mask, past_key_values=past, max_new_tokens=5, **how)
    assert torch.equal(again, model.generate(tokens, attention_mask=mask, max_new_tokens=5, **how))


def test_caches_that_do_not_fit_are_errors() -> None:
    model = wrapped()
    with pytest.raises(InputError, match="got a DynamicCache"):
        model(torch.tensor([[1]]), past_key_values=DynamicCache())
    past = model(torch.tensor([[1, 2, 3]]), use_cache=True).past_key_values
    with pytest.raises(InputError, match="past_key_values has 1 rows and input_ids 2"):
        model(torch.tensor([[1], [2]]), past_key_values=past)
    with pytest.raises(InputError, match="has 3 tokens of each row: input_ids has none after them"):
        model.generate(torch.tensor([[1]]), past_key_values=past, max_new_tokens=1)


def test_assisted_generation_is_an_error() -> None:
    model = wrapped()
    for how in ({"assistant_model": wrapped()}, {"prompt_lookup_num_tokens": 2}):
        with pytest.raises(ValueError, match="assisted generation is not supported with .* SbevalForCausalLM"):
            model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=4, do_sample=False, **how)


# arguments


@torch.inference_mode()
def test_positions_are_those_that_tokens_have_anyway() -> None:
    model, tokens = wrapped(), torch.randint(EOS, (2, 9))
    wanted, places = model(tokens).logits, torch.arange(9)[None]
    for given in (places, places.expand(2, 9)):
        assert torch.equal(model(tokens, position_ids=given).logits, wanted)
    batch = padded(PROMPTS)
    counted = batch["attention_mask"].cumsum(1) - 1
    assert torch.equal(model(**batch, position_ids=counted).logits, model(**batch).logits)
    past = model(**batch, use_cache=True).past_key_values
    model(torch.ones(len(PROMPTS), 2).long(), past_key_values=past, position_ids=counted[:, -1:] + torch.tensor([1, 2]))
    for given in (places + 1, places[:, :4], places.expand(2, 9).flip(1)):
        with pytest.raises(InputError, match="position_ids must count each row's tokens from 0"):
            model(tokens, position_ids=given)
    with pytest.raises(InputError, match="position_ids must count"):
        model(torch.ones(len(PROMPTS), 1).long(), past_key_values=past, position_ids=counted[:, -1:] + 1)


def test_what_is_not_supported_is_one_error() -> None:
    model, tokens = wrapped(), torch.tensor([[1, 2, 3]])
    assert model(tokens, output_hidden_states=False, output_attentions=None).logits.shape == (1, 3, 257)
    said = "inputs_embeds, output_attentions and output_hidden_states are not supported"
    for given in ({"output_hidden_states": True}, {"output_attentions": True}, {"inputs_embeds": torch.ones(1, 3, 32)}):
        with pytest.raises(ValueError, match=said):
            model(tokens, **given)
        with pytest.raises(ValueError, match=said):
            model.generate(tokens, **given, max_new_tokens=2, return_dict_in_generate=True)
    with pytest.raises(ValueError, match="needs input_ids"):
        model()


# padding and loss


@pytest.mark.parametrize("positions", [0, 30])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_logits(side: str, positions: int) -> None:
    model, batch = wrapped(positions=positions), padded(PROMPTS, side)
    with torch.inference_mode():
        found = model(**batch).logits[batch["attention_mask"].bool()]
        alone = torch.cat([model(torch.tensor([prompt])).logits[0] for prompt in PROMPTS])
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)


def test_padding_in_the_wrong_place_is_an_error() -> None:
    model = wrapped()
    with pytest.raises(InputError, match="padding must be on the left"):
        model.generate(**padded(PROMPTS, "right"), max_new_tokens=1)
    tokens = torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(InputError, match="never within a row"):
        model(tokens, torch.tensor([[1, 0, 1]]))
    with pytest.raises(InputError, match="a row has no tokens"):
        model(tokens, torch.zeros(1, 3))


def test_loss_is_of_the_next_token_and_trains() -> None:
    model = wrapped().train()
    tokens = torch.randint(257, (3, 12))
    labels = tokens.clone()
    labels[:, :5] = -100
    found = model(tokens, labels=labels)
    targets = torch.cat([labels[:, 1:], torch.full((3, 1), -100)], 1)
    torch.testing.assert_close(found.loss, model.decoder.loss(tokens, targets) / (targets != -100).sum())
    found.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_bfloat16(exported: Path, loaded: Any) -> None:
    half: Any = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    with torch.inference_mode():
        found, wanted = half(**padded(PROMPTS)).logits, loaded(**padded(PROMPTS)).logits
    assert found.dtype == torch.bfloat16
    assert (found - wanted).abs().mean() < 0.05 * wanted.abs().mean()
    assert half.generate(**padded(PROMPTS), max_new_tokens=3, do_sample=False).shape[0] == len(PROMPTS)


# who else reads it


def test_our_own_commands_take_it(exported: Path, saved: Path) -> None:
    found, ours = load.load(str(exported), CPU, "float32"), load.load(str(saved), CPU, "float32")
    assert dataclasses.replace(found, model=ours.model, name=ours.name) == ours
    tokens = torch.randint(257, (1, 9))
    assert torch.equal(found.model(tokens), ours.model(tokens))


def test_lm_eval_takes_it(exported: Path, loaded: Any) -> None:
    theirs = HFLM(pretrained=loaded, tokenizer=AutoTokenizer.from_pretrained(exported), batch_size=3, device="cpu")
    asked = [Instance("loglikelihood", {}, (text, " sat"), index) for index, text in enumerate(TEXTS)]
    for (found, _), text in zip(theirs.loglikelihood(asked, disable_tqdm=True), TEXTS, strict=True):
        tokens = torch.tensor([list((text + " sat").encode())])
        with torch.inference_mode():
            chances = loaded.decoder.logits(loaded.decoder(tokens)).log_softmax(-1)[0, :-1]
        assert found == pytest.approx(float(chances.gather(1, tokens[0, 1:, None])[-4:].sum()), rel=1e-4)
    options = {"until": ["\n\n"], "max_gen_toks": 4, "do_sample": False}
    asked = [Instance("generate_until", {}, (text, options), index) for index, text in enumerate(TEXTS)]
    assert len(theirs.generate_until(asked, disable_tqdm=True)) == len(TEXTS)
