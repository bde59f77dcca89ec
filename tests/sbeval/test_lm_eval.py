"""lm-eval's command line evaluates a checkpoint by the name `sbeval`, with the numbers of the adapter."""

import json
import sys
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.config.evaluate_config import EvaluatorConfig

from sbeval import lm_eval
from sbeval.data.tokenizer import Bytes
from sbeval.errors import InputError
from sbeval.evaluation.lm_eval_model import Adapter, PlainText
from sbeval.models.config import ModelConfig
from sbeval.models.decoder import Decoder
from sbeval.training import checkpoint

TASK = """
task: two_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {items}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: [" yes", " no"]
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "checkpoint"
    torch.manual_seed(0)
    decoder = Decoder(ModelConfig(vocab_size=257, width=16, layers=1, heads=2, hidden=16))
    checkpoint.save(folder, decoder, checkpoint.State(finished=True), training={"length": 32})
    return folder


def test_the_name_is_found_and_its_numbers_are_the_adapters(saved: Path) -> None:
    lm_eval.register()
    lm_eval.register()
    model = get_model("sbeval").create_from_arg_string(f"checkpoint={saved},dtype=float32", {"device": "cpu"})
    assert get_model("hf").__name__ == "HFLM" and model.length == 32
    decoder = checkpoint.load_model(saved).eval()
    own = Adapter(
        decoder, PlainText(Bytes()), length=32, place=torch.device("cpu"), dtype="float32", batch_tokens=1 << 13
    )
    asked = [Instance("loglikelihood", {}, ("Is it?", answer), 0) for answer in (" yes", " no")]
    assert model.loglikelihood(asked) == own.loglikelihood(asked)
    with pytest.raises(InputError, match="'bpe:300' is trained on a corpus and none is given"):
        lm_eval.CheckpointLM(str(saved), tokenizer="bpe:300", device="cpu")


def test_without_a_gpu_lm_evals_default_device_is_the_cpu(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lm_eval.DEFAULT_DEVICE == EvaluatorConfig().device
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert lm_eval.CheckpointLM(str(saved), device="cuda:0").place == torch.device("cpu")
    assert "no GPU for lm-eval's default device cuda:0: on cpu" in capsys.readouterr().err
    # one that is not the default is asked for
    with pytest.raises(InputError, match="--device cuda:1"):
        lm_eval.CheckpointLM(str(saved), device="cuda:1")


def test_the_command_writes_lm_evals_own_results(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "items.jsonl").write_text("".join(json.dumps({"question": f"Is it {x}?"}) + "\n" for x in range(4)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "two_words.yaml").write_text(TASK.format(items=tmp_path / "items.jsonl"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    arguments = ["run", "--model", "sbeval", "--model_args", f"checkpoint={saved}", "--device", "cpu"]
    arguments += ["--tasks", "two_words", "--include_path", str(tmp_path / "tasks"), "--output_path", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments])
    lm_eval.main()
    (found,) = tmp_path.rglob("results_*.json")
    assert 0 <= json.loads(found.read_text())["results"]["two_words"]["acc,none"] <= 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("checkpoint={saved},lenght=32", "unknown key 'lenght' of --model_args; did you mean 'length'?"),
        ("tokenizer=bytes", "--model sbeval needs a folder: --model_args checkpoint=FOLDER"),
        ("checkpoint={saved},length=long", "length must be a whole number of 1 or more; got long"),
        ("checkpoint={saved},length=0", "length must be a whole number of 1 or more; got 0"),
        ("checkpoint={saved},batch_size=0", "batch_size must be a whole number of 1 or more; got 0"),
    ],
)
def test_a_mistake_in_the_models_options_is_one_line_and_exit_code_2(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: str, message: str
) -> None:
    def evaluate() -> None:
        get_model("sbeval").create_from_arg_string(given.format(saved=saved), {"device": "cpu"})

    lm_eval.register()
    monkeypatch.setattr(lm_eval, "cli_evaluate", evaluate)
    with pytest.raises(SystemExit) as ended:
        lm_eval.main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"sbeval: {message}")
