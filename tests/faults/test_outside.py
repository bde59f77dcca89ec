"""Test that downloaded files are data: no code in them runs unless the user allows it."""

import ast
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sbeval.data import tokenizer
from sbeval.errors import InputError
from sbeval.evaluation import ruler_prompts
from sbeval.pretrained import load
from sbeval.tables import provenance

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
# what reads them
PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({marker!r}).touch()

class OwnConfig(LlamaConfig):
    model_type = "own-code"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def with_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose folder has code that leaves a trace when run."""
    transformers: Any = pytest.importorskip("transformers")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "model"
    shape = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(shape).save_pretrained(folder)
    (folder / "code.py").write_text(CODE.format(marker=str(tmp_path / "mark")))
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "code.OwnConfig", "AutoModelForCausalLM": "code.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own-code", "auto_map": auto}))
    return folder


def test_code_of_a_model_runs_only_when_asked(with_code: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="comes with code of its own, which is not run; --trust-remote-code runs it"):
        load.load(str(with_code), CPU, "float32")
    with pytest.raises(InputError):
        tokenizer.load(str(with_code), cache_dir=tmp_path)
    assert not (tmp_path / "mark").exists()
    found = load.load(str(with_code), CPU, "float32", trust_remote_code=True)
    assert (tmp_path / "mark").exists() and found.vocab_size == 32


def test_weights_that_are_pickled_are_not_read(with_code: Path) -> None:
    config = json.loads((with_code / "config.json").read_text())
    del config["auto_map"]
    (with_code / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    assert load.load(str(with_code), CPU, "float32").options == "llama"
    (with_code / "model.safetensors").unlink()
    torch.save({}, with_code / "pytorch_model.bin")
    with pytest.raises(InputError, match="no causal language model"):
        load.load(str(with_code), CPU, "float32")


def test_prompts_in_the_cache_that_are_pickled_or_cut_short_are_named(tmp_path: Path) -> None:
    path = tmp_path / "prompts.npz"
    for content in (b"", b"PK\3\4 cut", pickle.dumps([1])):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"prompts\.npz can't be read: .*; remove it to write the prompts again"):
            ruler_prompts._read(path)
    with path.open("wb") as file:
        np.savez(file, tokens=np.array([{}], dtype=object))
    with pytest.raises(InputError, match="can't be read"):
        ruler_prompts._read(path)


def test_run_files_of_something_else_are_named(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text("[" * 100_000)
    with pytest.raises(InputError, match="cannot read the run file"):
        provenance.read_run(path)
    assert not load.is_own(str(path.parent))


def test_nothing_in_the_source_reads_pickles_or_runs_text() -> None:
    """By name, in every module; a sharded model's own index, which torch.distributed pickles, is read in fsdp.py, and
    pool.py pickles what it sends to the workers that it started."""
    found = []
    for path in [file for folder in ("sbeval", "kernels", "tasks", "plots") for file in (ROOT / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                if path.name != "pool.py" and {alias.name for alias in node.names} & PICKLES:
                    found.append((path.name, node.lineno))
            elif isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                trusts = called.endswith("from_pretrained") and "trust_remote_code" not in options
                builds = called.startswith("yaml.") and options.get("Loader", "yaml.BaseLoader") != "yaml.BaseLoader"
                builds |= called in ("yaml.load", "yaml.compose") and "Loader" not in options
                pickled = called in ("eval", "exec", "torch.load") or options.get("allow_pickle") == "True"
                if pickled or trusts or builds:
                    found.append((path.name, node.lineno))
    assert found == []
