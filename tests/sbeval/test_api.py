"""The Python interface, and the notebook that shows it."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

import sbeval
from sbeval.errors import InputError
from sbeval.kernels import rope, stick_breaking
from sbeval.models.config import ModelConfig
from sbeval.models.decoder import Decoder

ROOT = Path(__file__).parents[2]


def test_importing_the_package_imports_no_libraries() -> None:
    code = "import sys, sbeval; print(sorted({'torch', 'pandas', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
    assert sorted(sbeval.__all__) == sorted(name for name in sbeval.__all__ if callable(getattr(sbeval, name)))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        getattr(sbeval, "nothing")  # noqa: B009


def test_attention_is_that_of_each_methods_module() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 9, 2, 8) for _ in range(3))
    torch.testing.assert_close(sbeval.attention(q, k, v, method="rope"), rope.attention(q, k, v))
    out, _ = stick_breaking.attention(q, k, v, scale=0.3)
    torch.testing.assert_close(sbeval.attention(q, k, v, method="stick_breaking:remainder=none", scale=0.3), out)
    with pytest.raises(InputError, match=r"'rope:key_shift=true' has options of a whole block \(key_shift\)"):
        sbeval.attention(q, k, v, method="rope:key_shift=true")
    with pytest.raises(InputError, match="attention 'forgetting' has weights of its own"):
        sbeval.attention(q, k, v, method="forgetting")


def test_attention_of_an_own_method_is_checked_as_in_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.randn(2, 9, heads, 8) for heads in (4, 2, 2))
    monkeypatch.setattr(rope.Mixer, "forward", lambda self, q, k, v, x, cu_seqlens=None, cache=None: v)
    said = r"attention 'rope:theta=9' must return \(B, T, H, D\) = \(2, 9, 4, 8\); got \(2, 9, 2, 8\)"
    with pytest.raises(RuntimeError, match=said):
        sbeval.attention(q, k, v, method="rope:theta=9")
    with pytest.raises(InputError, match="q must have four dimensions"):
        sbeval.attention(q[0], k, v)


class Uniform(torch.nn.Module):
    """A model that knows nothing: its loss is log 16 at every position."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*tokens.shape, 16)


def test_evaluate_measures_any_module() -> None:
    tokens = torch.randint(16, (3, 33))
    table = sbeval.evaluate(Uniform(), tokens, train_len=8, name="uniform")
    assert set(table["metric"]) == {"loss", "perplexity", "loss_last_k"}
    assert np.allclose(table.loc[table["metric"] == "loss", "value"], math.log(16))
    perplexity = table[table["metric"] == "perplexity"]
    assert np.allclose(perplexity["value"], 16) and list(perplexity["context_length"]) == [1, 2, 4, 8, 16, 32]
    # a list of arrays is the same
    again = sbeval.evaluate(Uniform(), [row.numpy() for row in tokens], train_len=8, name="uniform", batch=2)
    pd.testing.assert_frame_equal(table, again)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_evaluate_refuses_a_model_that_sees_later_tokens(dtype: str) -> None:
    class Next(torch.nn.Module):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot(tokens.roll(-1, 1), 16).float()

    tokens = torch.randint(16, (3, 33))
    with pytest.raises(InputError, match="model 'next' attends to later tokens"):
        sbeval.evaluate(Next(), tokens, train_len=8, name="next", dtype=dtype)


def test_evaluate_runs_a_decoder_as_its_logits_and_leaves_its_mode() -> None:
    torch.manual_seed(0)
    decoder = Decoder(ModelConfig(vocab_size=16, width=8, layers=1, heads=1, hidden=16, dropout=0.5)).train()

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = decoder

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return decoder.logits(decoder(tokens))

    tokens = torch.randint(16, (2, 17))
    ours = sbeval.evaluate(decoder, tokens, train_len=4)
    assert decoder.training
    np.testing.assert_allclose(ours["value"], sbeval.evaluate(Logits(), tokens, train_len=4)["value"], rtol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "message"), [([], "got nothing"), ([[1]], r"got \(1,\)"), ([[1, 2], [1, 2, 3]], r"\(2,\), \(3,\)")]
)
def test_evaluate_names_what_is_wrong_with_tokens(tokens: list[list[int]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        sbeval.evaluate(Uniform(), tokens, train_len=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_len": 8.5}, "train_len must be an integer of at least 1; got 8.5"),
        ({"batch": 0}, "batch must be an integer of at least 1; got 0"),
        ({"dtype": "float23"}, "unknown dtype 'float23'; did you mean 'float32'"),
        ({"tokens": [[0.5, 1.5, 2.5]]}, "tokens must be integers; got float64"),
        ({"tokens": ["text"]}, "tokens must be integers; got <U4"),
    ],
)
def test_evaluate_names_an_option_that_will_not_do(options: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"tokens": torch.zeros(2, 9, dtype=torch.long), "train_len": np.int64(4), **options}
    with pytest.raises(InputError, match=message):
        sbeval.evaluate(torch.nn.Embedding(5, 5), **given)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is a device")
def test_evaluate_says_that_there_is_no_gpu() -> None:
    with pytest.raises(InputError, match="sees no GPU here"):
        sbeval.evaluate(torch.nn.Embedding(5, 5), torch.zeros(2, 9, dtype=torch.long), train_len=4, device="cuda")


def test_values_and_curves_may_be_those_of_one_cell() -> None:
    results = sbeval.load_results(ROOT / "results" / "quick")
    cell = results["mqrar"]["cell"].iloc[0]
    for read in (results.curves, results.unit_values):
        assert len(read(cell)) and read(cell).equals(read([cell]))


def test_draw_names_a_column_that_is_not_there() -> None:
    table = sbeval.load_results(ROOT / "results" / "quick")["length_gen"]
    for options, message in (
        (
            {"figure": "mqrar"},
            "the table for figure 'mqrar', which is drawn from mqrar, has no column 'kv_pairs'; it has",
        ),
        ({"axes": Figure().subplots(), "x": "nothing"}, "the table has no column 'nothing'; it has: family, "),
    ):
        with pytest.raises(InputError, match=message):
            sbeval.draw(table[table["metric"] == "loss"], **options)
    with pytest.raises(InputError, match="the table has no column 'family'"):
        sbeval.draw(table[["attention", "options", "metric", "value"]])


def test_evaluate_names_a_module_that_gives_no_logits() -> None:
    with pytest.raises(InputError, match=r"must map tokens \(1, 2\) to logits .* got \(1, 2\)"):
        sbeval.evaluate(torch.nn.Identity(), [[1, 2, 3]], train_len=8)


def test_results_are_their_tables() -> None:
    results = sbeval.load_results(ROOT / "results" / "quick")
    assert {"length_gen", "mqrar"} <= set(results) and len(results) == len(list(results))
    cells = results["mqrar"]["cell"]
    assert results.run_file(cells.iloc[0])["config"]
    losses = results.curves(cells)
    assert set(losses["cell"]) == set(cells) and {"loss", "validation_accuracy"} <= set(losses["metric"])
    assert list(results.unit_values(cells).columns)[:4] == ["cell", "metric", "unit_id", "value"]
    with pytest.raises(KeyError, match="no table 'nothing'; it has: .*length_gen"):
        results["nothing"]
    with pytest.raises(InputError, match="no results folder nowhere"):
        sbeval.load_results("nowhere")


@pytest.mark.parametrize("family", ["length_gen", "mqrar"])
def test_draw_draws_a_figure_or_a_panel(family: str) -> None:
    table = sbeval.load_results(ROOT / "results" / "quick")[family]
    assert isinstance(sbeval.draw(table), Figure)
    axes = Figure().subplots()
    assert sbeval.draw(table, axes=axes) is axes
    methods = table.groupby(["attention", "options"]).ngroups
    assert len(axes.get_lines()) == methods > 0
    assert all(np.size(line.get_xdata()) for line in axes.get_lines())


@pytest.mark.parametrize(
    ("folder", "family", "figure"),
    [("which-stick-breaking", "length_gen", "fixed_targets"), ("quick", "mqrar", "recall_curves")],
)
def test_a_figure_of_files_beside_the_table_needs_its_folder(folder: str, family: str, figure: str) -> None:
    where = ROOT / "results" / folder
    table = sbeval.load_results(where)[family]
    with pytest.raises(InputError, match=f"figure '{figure}' is also drawn from files .*: give its results_dir"):
        sbeval.draw(table, figure=figure)
    lines = [line for axes in sbeval.draw(table, figure=figure, results_dir=where).axes for line in axes.get_lines()]
    assert {"stick_breaking", "rope"} <= set(table["attention"]) and "RoPE" in {line.get_label() for line in lines}


def needles() -> pd.DataFrame:
    """Scores of ALiBi in two tasks, and of RoPE in one of them, by length; half of them in greedy decoding."""
    same = {
        "family": "needle", "model": "25m", "options": "", "params": 25_000_000, "train_len": 2048, "seed": 0,
        "stderr": 0.02, "n": 100, "depth_start": math.nan, "depth_end": math.nan, "finetune_tokens": 10**8,
        "ended": "solved", "cell": "one", "preset": "h200", "corpus": "books", "tokenizer": "bpe:8192",
        "train_tokens": 10**8, "dtype": "bfloat16",
    }  # fmt: skip
    scores = {("alibi", "niah_single_1"): 1.0, ("alibi", "vt"): 0.6, ("rope", "vt"): 0.8}
    return pd.DataFrame(
        same | {"attention": name, "task": task, "length": length, "metric": metric, "value": part * score / length}
        for (name, task), score in scores.items()
        for length in (1024, 2048)
        for metric, part in (("score", 1024), ("greedy", 512))
    )


def test_tasks_of_needles_without_a_length_in_common_have_no_mean() -> None:
    table = needles()
    with pytest.raises(InputError, match="no length at which a method has all tasks"):
        sbeval.draw(table[(table["task"] == "vt") == (table["length"] == 1024)], axes=Figure().subplots())


def test_a_panel_of_needles_is_of_what_is_said() -> None:
    axes = sbeval.draw(needles(), axes=Figure().subplots())
    # of a method that has not all tasks there is no mean
    (line,) = axes.get_lines()
    assert line.get_label() == "ALiBi"
    np.testing.assert_allclose(np.asarray(line.get_ydata(), dtype=float), [0.8, 0.4])
    assert isinstance(sbeval.draw(needles()), Figure)


def test_draw_refuses_what_has_no_one_x_or_metric() -> None:
    table = sbeval.load_results(ROOT / "results" / "quick")["length_gen"]
    axes = Figure().subplots()
    with pytest.raises(InputError, match="a panel has rows of one metric; the table has bits_per_byte, loss"):
        sbeval.draw(table, x="context_length", axes=axes)
    with pytest.raises(InputError, match="give the column of the x axis"):
        sbeval.draw(table.assign(family="flip_flop"), axes=axes)
    with pytest.raises(InputError, match="no rows"):
        sbeval.draw(table[:0])


def test_a_study_may_be_a_mapping_with_pythons_types() -> None:
    from sbeval.sweep import study_file

    document = study_file.given({"mqrar": {"kv_pairs": (8, 16), "lrs": [1e-3], "seeds": [0]}})
    (part,) = study_file.parts(document, lambda dtype: "float32")
    assert part.config.kv_pairs == (8, 16) and part.config.lrs == (1e-3,)
    with pytest.raises(InputError, match="numbers, text and lists; got "):
        study_file.given({"mqrar": {"kv_pairs": object()}})


def test_a_quiet_run_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    study = {"flip_flop": {"attention": ["rope"], "steps": 2, "seq_len": 32, "test_rows": 4}}
    assert len(sbeval.run(study, results_dir=tmp_path, device="cpu", quiet=True)["flip_flop"])
    assert capfd.readouterr() == ("", "")


def test_the_notebook_runs(tmp_path: Path) -> None:
    """In a Jupyter kernel, from anywhere; the outputs that are committed are of the same kinds."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(ROOT / "docs" / "tour.ipynb", 4)
    committed = [[output["output_type"] for output in cell.get("outputs", ())] for cell in notebook.cells]
    options = {"timeout": 300, "kernel_name": "python3", "resources": {"metadata": {"path": str(tmp_path)}}}
    nbclient.NotebookClient(notebook, **options).execute()
    outputs = [list(cell.get("outputs", ())) for cell in notebook.cells]
    assert [[output["output_type"] for output in each] for each in outputs] == committed
    texts = "".join(output.get("text", "") for each in outputs for output in each if output.get("name") != "stderr")
    assert "torch.Size([1, 128, 4, 16])" in texts and "stick_breaking" in texts
    # the last cell shows a figure
    assert any("image/png" in output.get("data", {}) for output in outputs[-1])
