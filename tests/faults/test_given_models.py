"""Commands with models of others: numbers depend on the model and its items alone, and what it cannot take is said.

The models are tiny, the same everywhere; numbers of theirs were computed apart, with transformers.
"""

import contextlib
import io
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from sbeval.cli import main
from sbeval.evaluation import lm_eval_tasks
from sbeval.tables import table

pytest.importorskip("lm_eval")
pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("home", "fresh")
CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class MineConfig(LlamaConfig):
    model_type = "mine"

class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * {scale}
        return out
"""


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    # relative imports of code that was loaded from there
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "modules")])
    lm_eval_tasks.load.cache_clear()


def run(*arguments: object) -> tuple[Any, str]:
    """Return the exit code and all that is said."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["sbeval", *map(str, arguments)])
        patch.setattr("sbeval.runtime.device.measured_flops", lambda *_: 1e10)
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            main.main()
    return ended.value.code, said.getvalue()


def few_shot(model: Path, items: Path, task: str, results: Path, *more: object) -> tuple[Any, str]:
    lm_eval_tasks.load.cache_clear()
    options = ("--device", "cpu", "--model", model, "--data-dir", items, "--task", task, "--results-dir", results)
    return run("few-shot", *options, *more)


def value(results: Path, metric: str, n: int) -> float:
    rows = table.read(results / "few_shot.csv")
    return float(rows.loc[(rows["metric"] == metric) & (rows["n"] == n), "value"].item())


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.parent


def sentences(words: list[str]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return six texts of 20 words and two of 90, each with the word that follows."""
    draw = random.Random(1)
    # what other items take
    for _ in range(12):
        for count in (8, 3, 3, 3, 3):
            draw.choices(words, k=count)
        draw.randrange(4)
    for count in (20, 60, 150, 150):
        draw.choices(words, k=count)
    found = [
        {"context": " ".join(draw.choices(words, k=count)), "target": draw.choice(words)}
        for count in [20] * 6 + [90] * 2
    ]
    return found[:6], found[6:]


def test_a_perplexity_does_not_depend_on_what_stood_beside_or_before(odd_models: Any, tmp_path: Path) -> None:
    """All rows are short enough for the short factors of the RoPE, whatever was read beside them or asked before."""
    model = odd_models.longrope(tmp_path / "longrope")
    short, long = sentences(odd_models.WORDS)
    one = write(tmp_path / "short" / "lambada_openai_test.jsonl", short)
    both = write(tmp_path / "both" / "lambada_openai_test.jsonl", short + long)
    assert few_shot(model, one, "lambada_openai", tmp_path / "alone")[0] == 0
    for items in (both, one):
        assert few_shot(model, items, "lambada_openai", tmp_path / "after")[0] == 0
    for results in (tmp_path / "alone", tmp_path / "after"):
        assert value(results, "perplexity", 6) == pytest.approx(46003.354, rel=1e-6)


def test_a_model_whose_own_code_changed_is_asked_again(odd_models: Any, tmp_path: Path) -> None:
    model = odd_models.write(tmp_path / "mine")
    auto = {"AutoConfig": "modeling_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    odd_models.changed(model, lambda x: x, model_type="mine", architectures=["MineForCausalLM"], auto_map=auto)
    items = write(tmp_path / "items" / "wikitext2_test_docs.jsonl", [{"text": "the cat sat on the old tree " * 8}])
    found = []
    for scale in (1.0, 0.1, 1.0):
        (model / "modeling_mine.py").write_text(CODE.format(scale=scale))
        code, said = few_shot(model, items, "wikitext", tmp_path / "results", "--trust-remote-code")
        assert code == 0 and "finished already" not in said, said
        found.append(value(tmp_path / "results", "word_perplexity", 1))
    assert found[0] == found[2] and found[1] < found[0] / 2


def test_a_perplexity_alone_ends_well_and_the_figure_that_is_left_out_is_said(odd_models: Any, tmp_path: Path) -> None:
    model = odd_models.write(tmp_path / "plain")
    items = write(tmp_path / "items" / "wikitext2_test_docs.jsonl", [{"text": "the cat sat on the old tree " * 8}] * 2)
    code, said = few_shot(model, items, "wikitext", tmp_path / "results")
    assert (
        code == 0 and "few_shot: left out, there are no scores in percent to draw" in said and "Traceback" not in said
    ), said
    assert value(tmp_path / "results", "word_perplexity", 2) > 1


@pytest.mark.parametrize("length", ["-5", "0"])
def test_a_given_model_reads_at_least_a_token(length: str, odd_models: Any, tmp_path: Path) -> None:
    model = odd_models.write(tmp_path / "plain")
    items = write(tmp_path / "items" / "wikitext2_test_docs.jsonl", [{"text": "the cat sat "}])
    code, said = few_shot(model, items, "wikitext", tmp_path / "results", "--eval-len", length)
    assert code == 2 and said.splitlines()[-1].startswith("sbeval: ") and "at least 1" in said.splitlines()[-1], said
    assert not (tmp_path / "results" / "few_shot.csv").exists()
