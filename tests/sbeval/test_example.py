"""A package with a method, a task and a figure is installed beside sbeval, which finds them, in other processes too."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from sbeval import registry
from sbeval.errors import InputError
from sbeval.kernels import softmax
from sbeval.models.config import parse_attention

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "tests" / "example"
PACKAGE = EXAMPLE / "sbeval_example"
# a quarter of a second of training
STEPS = ("--steps", "20", "--device", "cpu")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which pip installed the example, without a network."""
    source, target = (tmp_path_factory.mktemp(name) for name in ("source", "target"))
    shutil.copytree(EXAMPLE, source, dirs_exist_ok=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", target, source], check=True)
    return target


def run(installed: Path | str, *arguments: object) -> str:
    """Run the command line with the installed example and return what it prints."""
    paths = os.pathsep.join([str(installed), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "sbeval", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": paths, "COLUMNS": "100"},
        cwd=str(installed).split(os.pathsep)[0],
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stderr
    return done.stdout


def test_a_method_is_its_equation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    module = __import__("sbeval_example.tempered", fromlist=["reference"])
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 9, 2, 4, dtype=torch.float64) for _ in range(3))
    expected = module.reference(q, k, v, scale=0.5, temperature=2.0)
    torch.testing.assert_close(module.attention(q, k, v, scale=0.5, temperature=2.0), expected)
    torch.testing.assert_close(softmax.reference(q, k, v, scale=0.25), expected)
    name, options = parse_attention("sbeval_example.tempered:temperature=2")
    mixer = registry.method(name).Mixer(options, heads=2, kv_heads=2, head_dim=4, width=8, scale=0.5)
    torch.testing.assert_close(mixer(q, k, v, q.flatten(2)), expected)


def test_a_study_trains_in_workers_and_leaves_rows_figures_and_a_page(installed: Path, tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    study = tmp_path / "study.yaml"
    methods = '["tempered:temperature=2", sbeval_example.tempered]'
    study.write_text(f"first_token: {{attention: {methods}, steps: 20, check_every: 10}}")
    results = tmp_path / "results"
    command = ("run", study, "--device", "cpu", "--workers", 2, "--results-dir", results)
    assert "first_token: accuracy" in run(installed, *command)
    table = pd.read_csv(results / "first_token.csv", keep_default_na=False)
    assert set(zip(table["attention"], table["options"], table["seq_len"], strict=True)) == {
        ("tempered", "temperature=2.0", 32),
        ("sbeval_example.tempered", "", 32),
    }
    assert len(list((results / "runs").iterdir())) == 2 and (results / "figures" / "first_token.png").exists()
    run(installed, "plot", "first-token", "--format", "html", "--results-dir", results)
    assert "repeating the first token" in (results / "figures" / "first_token.html").read_text()


OWN = """
from dataclasses import dataclass
from sbeval.config import TASK, option
from sbeval.tasks import generated
from sbeval_example import first_token

@dataclass(frozen=True, slots=True, kw_only=True)
class Config(generated.Config):
    seq_len: tuple[int, ...] = option((8,), TASK, "Tokens of a row.")
    kind: str = option("first", TASK, "first or last.")

    def __post_init__(self):
        generated.Config.__post_init__(self)
        if self.kind not in ("first", "last"):
            raise ValueError(f"kind must be first or last; got {self.kind}")

@dataclass(frozen=True, slots=True, kw_only=True)
class Cell(first_token.Cell):
    family: str = "swept"

    @property
    def length(self):
        return self.config.seq_len[0]

    def generate(self, seed, rows):
        one = first_token.Config(seq_len=self.length)
        return first_token.Cell(config=one).generate(seed, rows)

FAMILY = generated.family(Cell, help="Swept.", presets={"quick": Config(steps=5)})
"""


def test_a_broken_figure_or_task_of_a_package_stops_no_other(installed: Path, tmp_path: Path) -> None:
    package = tmp_path / "broken-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    names = "[sbeval.figures]\nbroken = own_broken\n[sbeval.tasks]\nbroken = own_broken\n"
    (package / "entry_points.txt").write_text(names)
    (tmp_path / "own_broken.py").write_text("import not_installed_here")
    paths = os.pathsep.join([str(tmp_path), str(installed)])
    shown = run(paths, "first-token", "--attention", "rope", *STEPS, "--results-dir", tmp_path / "results")
    said = "sbeval.figures: 'broken' cannot be imported, ModuleNotFoundError: No module named 'not_installed_here'"
    assert shown.count(said) == 1 and "first_token.png" in shown
    shown = run(paths, "plot", "--results-dir", tmp_path / "results", "--out", tmp_path / "drawn")
    assert shown.count(said) == 1 and (tmp_path / "drawn" / "first_token.png").exists()
    assert "sbeval.tasks: 'broken' cannot be imported" in " ".join(run(paths, "--help").replace("│", "").split())


def test_an_own_task_sweeps_factors_and_needs_no_figure(installed: Path, tmp_path: Path) -> None:
    package = tmp_path / "swept-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: swept\nVersion: 1\n")
    (package / "entry_points.txt").write_text("[sbeval.tasks]\nswept = own_task\n")
    (tmp_path / "own_task.py").write_text(OWN)
    paths = os.pathsep.join([str(tmp_path), str(installed)])
    study = tmp_path / "study.yaml"
    study.write_text("swept: {attention: [rope], seq_len: [8, 16]}")
    shown = run(paths, "run", study, "--device", "cpu", "--results-dir", tmp_path / "results")
    assert re.search(r"rope +\S+ +8 .*\n.*rope +\S+ +16 ", shown) and "skipped" not in shown
    assert pd.read_csv(tmp_path / "results" / "swept.csv")["seq_len"].tolist() == [8, 16]
    study.write_text("swept: {kind: none}")
    for command in (("swept", "--kind", "none"), ("run", study)):
        with pytest.raises(AssertionError, match="^sbeval: swept: kind must be first or last; got none\n"):
            run(paths, *command, "--device", "cpu", "--dry-run")


def test_a_method_named_by_its_module_runs_in_ray(installed: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    method = ("--attention", "sbeval_example.tempered:temperature=3")
    run(installed, "first-token", *method, *STEPS, "--executor", "ray", "--workers", 1, "--results-dir", tmp_path)
    (row,) = pd.read_csv(tmp_path / "first_token.csv").to_dict("records")
    assert (row["attention"], row["options"]) == ("sbeval_example.tempered", "temperature=3.0")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing.here", "attention 'nothing.here': no module 'nothing'; install its package, or put its folder on"),
        ("os.path", "attention 'os.path': the module os.path has no Options, Mixer, backend_name"),
        ("rop", "unknown attention 'rop'; did you mean 'rope'?"),
        ("softmax", "'rope' is softmax with RoPE, 'nope' without"),
        ("..rope", "unknown attention '..rope'"),
        ("mine", "stick_breaking; one of your own is package.module, from a folder on PYTHONPATH"),
        ("mine.py", "stick_breaking; one of your own is package.module, from a folder on PYTHONPATH"),
        ("here/mine.py", "stick_breaking; one of your own is package.module"),
    ],
)
def test_a_name_that_is_no_method_is_an_error_that_says_what_would_do(name: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        registry.method(name)


def test_an_import_that_a_module_misses_is_its_own_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_methods").mkdir()
    (tmp_path / "own_methods" / "broken.py").write_text("import not_installed_here")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="not_installed_here"):
        registry.method("own_methods.broken")


def test_an_entry_point_never_takes_a_name_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = importlib.metadata.EntryPoint("rope", "elsewhere.rope", "sbeval.attention")
    monkeypatch.setattr(registry, "entry_points", lambda: importlib.metadata.EntryPoints([entry]))
    with pytest.warns(UserWarning, match="'rope' is sbeval.kernels.rope; elsewhere.rope is left out"):
        registry._add_installed()
    assert registry.ATTENTION["rope"] == "sbeval.kernels.rope"


@pytest.mark.parametrize("name", ["tempered", "first_token", "first_token_figure"])
def test_contributing_says_how_many_lines_each_takes(name: str) -> None:
    lines = len((PACKAGE / f"{name}.py").read_text().splitlines())
    stated = re.search(rf"{name}\.py`, (\d+) lines", (ROOT / "CONTRIBUTING.md").read_text())
    assert lines <= 60 and stated and int(stated[1]) == lines
