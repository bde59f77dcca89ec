"""Models are told apart by their weights, tokenizers and code, and say what they can't read."""

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sbeval import registry
from sbeval.data import sources, tokenizer
from sbeval.errors import InputError
from sbeval.kernels import nope
from sbeval.models.config import ModelConfig
from sbeval.models.decoder import Decoder
from sbeval.pretrained import load
from sbeval.training import checkpoint

CPU = torch.device("cpu")


def test_our_own_have_one_or_not(tmp_path: Path) -> None:
    shape = ModelConfig(vocab_size=50, width=16, layers=1, heads=2, hidden=16, attention="nope", positions=32)
    for size in (32, 0):
        model = Decoder(dataclasses.replace(shape, positions=size))
        checkpoint.save(tmp_path / str(size), model, checkpoint.State(finished=True), training={"length": 16})
        assert load.load(str(tmp_path / str(size)), CPU, "float32").positions == (size or None)


def test_our_own_of_an_own_method_that_sees_later_tokens_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ahead(nope.Mixer):
        def forward(self, q: Any, k: Any, v: Any, *others: Any) -> Any:
            return v.mean(1, keepdim=True).expand_as(q)

    module = SimpleNamespace(Options=nope.Options, Mixer=Ahead, backend_name=nope.backend_name)
    monkeypatch.setitem(registry.ATTENTION, "ahead", "elsewhere.ahead")
    monkeypatch.setitem(sys.modules, "elsewhere.ahead", module)
    shape = ModelConfig(vocab_size=50, width=16, layers=1, heads=2, hidden=16, attention="ahead")
    checkpoint.save(tmp_path, Decoder(shape), checkpoint.State(finished=True), training={"length": 16})
    with pytest.raises(InputError, match="attention 'ahead': the output at position 0 changes with the tokens from"):
        load.load(str(tmp_path), CPU, "float32")


def test_weights_are_not_mapped_from_their_file(odd_models: Any, tmp_path: Path) -> None:
    """A file that is cut while it is mapped would end the process with SIGBUS."""
    shape = ModelConfig(vocab_size=50, width=16, layers=1, heads=2, hidden=16, tied=True)
    checkpoint.save(tmp_path / "own", Decoder(shape), checkpoint.State(finished=True))
    loaded = [load.load(str(tmp_path / "own"), CPU, "float32")]
    loaded += [
        load.load(str(odd_models.write(tmp_path / str(tied), tie_word_embeddings=tied)), CPU, "float32")
        for tied in (True, False)
    ]
    assert len(loaded) == 3 and str(tmp_path) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("file", ["tokenizer.json", "added_tokens.json", "spiece.model", "modeling_own.py", "own/a.py"])
def test_a_digest_is_of_weights_tokenizer_and_code(file: str, odd_models: Any, tmp_path: Path) -> None:
    folder = odd_models.write(tmp_path / "model")
    plain = load.digest(str(folder))
    (folder / "README.md").write_text("about it")
    assert load.digest(str(folder)) == plain
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text("{}")
    first = load.digest(str(folder))
    (folder / file).write_text("{ }")
    assert len({plain, first, load.digest(str(folder))}) == 3


def test_a_digest_is_of_code_in_another_repository(
    odd_models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = odd_models.write(tmp_path / "model")
    told = {"AutoModelForCausalLM": "someone/code--modeling_own.Own", "AutoConfig": "someone/code--modeling_own.Config"}
    odd_models.changed(folder, lambda tensors: tensors, auto_map=told)
    commits = ["1" * 40]

    class Hub:
        @staticmethod
        def hf_hub_download(name: str, file: str) -> str:
            # a model of the hub, and its code
            return str(folder / file if file == "config.json" else tmp_path / commits[-1] / file)

    monkeypatch.setattr(load, "_hub", lambda: Hub)
    found = {(load.digest(str(folder)), load.digest("someone/model"))}
    commits.append("2" * 40)
    found.add((load.digest(str(folder)), load.digest("someone/model")))
    assert len({each for pair in found for each in pair}) == 4


def test_a_folder_without_a_model_is_an_error(odd_models: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{tmp_path} holds no model: it has no config.json"):
        load.located(str(tmp_path))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(InputError, match="model.safetensors is a file: give the folder of a checkpoint"):
        load.located(str(tmp_path / "model.safetensors"))
    folder = str(odd_models.write(tmp_path / "model"))
    assert load.located(folder) == folder and load.located("someone/model") == "someone/model"


def test_a_name_that_no_disk_takes_is_no_folder(tmp_path: Path) -> None:
    long = "9" * 5000
    assert load.name(long) == long and not load.is_own(long) and sources.size(long) is None
    with pytest.raises(InputError, match="unknown corpus '999"):
        sources.source(long, "text")
    with pytest.raises(InputError, match="unknown tokenizer '/999"):
        tokenizer.load(f"/{long}", cache_dir=tmp_path)
