"""An exported folder has a model card, loads in other tools by its own code if asked for, and can be pushed."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from sbeval import hf, hf_card
from sbeval.data import tokenizer
from sbeval.errors import InputError
from sbeval.models.config import ModelConfig
from sbeval.models.decoder import Decoder
from sbeval.training import checkpoint

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "checkpoint"
    torch.manual_seed(0)
    decoder = Decoder(ModelConfig(vocab_size=257, width=16, layers=1, heads=2, hidden=16))
    checkpoint.save(folder, decoder, checkpoint.State(finished=True), training={"length": 16})
    return folder


def test_the_card_says_what_the_model_is_and_how_it_loads(saved: Path, tmp_path: Path) -> None:
    hf.export(saved, tmp_path / "plain", tokenizer.Bytes())
    hf.export(saved, tmp_path / "coded", None, code=True)
    plain, coded = ((tmp_path / name / "README.md").read_text() for name in ("plain", "coded"))
    assert plain.startswith("---\nlibrary_name: transformers\n") and "| attention | `stick_breaking` |" in plain
    assert "16 tokens" in plain and "`bytes`" in plain and "import sbeval.hf" in plain
    assert "trust_remote_code=True" in coded and "import sbeval.hf" not in coded and "AutoTokenizer" not in coded
    assert not (tmp_path / "plain" / f"{hf_card.MODULE}.py").exists()


def test_the_card_of_an_own_method_names_its_module(tmp_path: Path) -> None:
    shape = ModelConfig(vocab_size=257, width=16, layers=1, heads=2, hidden=16, attention="sbeval.kernels.nope")
    hf_card.write_card(tmp_path, shape, train_len=16, tokenizer="bytes", code=False)
    card = (tmp_path / "README.md").read_text()
    assert "With `pip install 'sbeval[hf]'`, and the package of the method, `sbeval.kernels.nope`:" in card


def test_other_tools_load_the_folder_by_its_code(saved: Path, tmp_path: Path) -> None:
    hf.export(saved, tmp_path / "model", tokenizer.Bytes(), code=True)
    tokens = [[72, 105, 33]]
    code = f"""
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "model")!r}, trust_remote_code=True)
print(model(torch.tensor({tokens})).logits.double().sum().item())
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert not done.returncode, done.stderr
    ours = checkpoint.load_model(saved).eval()
    with torch.inference_mode():
        wanted = ours.logits(ours(torch.tensor(tokens))).double().sum().item()
    assert float(done.stdout) == pytest.approx(wanted, rel=1e-6)


class Hub:
    """A stand-in for the hub's client."""

    pushed: list[tuple[str, list[str]]] = []

    def create_repo(self, repository: str, *, private: bool, exist_ok: bool) -> str:
        assert private and exist_ok
        if "/" not in repository:
            raise huggingface_hub.errors.HFValidationError("no such name")
        return f"https://huggingface.co/{repository}"

    def upload_folder(self, *, repo_id: str, folder_path: Path, **more: Any) -> None:
        self.pushed.append((repo_id, sorted(path.name for path in folder_path.iterdir())))


def test_push_makes_a_private_repository_of_the_folder(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    hf.export(saved, tmp_path / "model", None)
    assert hf_card.push(tmp_path / "model", "someone/name") == "https://huggingface.co/someone/name"
    ((repository, names),) = Hub.pushed
    assert repository == "someone/name" and {"README.md", "config.json", "model.safetensors"} <= set(names)
    with pytest.raises(InputError, match="cannot push .* to x: no such name"):
        hf_card.push(tmp_path / "model", "x")
