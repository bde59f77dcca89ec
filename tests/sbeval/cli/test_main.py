"""Test commands and their results, and that a mistake gives one line, exit code 2 and changes nothing."""

import contextlib
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from sbeval import registry
from sbeval.cli import main
from sbeval.runtime import signals, threads
from sbeval.sweep import study, study_file
from sbeval.tables import curves, table
from sbeval.tables.results import Results
from sbeval.tasks import drawn, length_gen, length_gen_rows, mqrar
from sbeval.training import trainer
from sbeval.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("home")
RECALL = (
    *"mqrar --device cpu --vocab-size 32 --seq-len 16 --kv-pairs 2 --width 16 --batch 4 --steps 12".split(),
    *"--test-rows 30".split(),
)
LONG = "x" * 300
LENGTHS = (
    *"length-gen --device cpu --train-len 16 --eval-len 64 --train-tokens 128 --batch-tokens 32".split(),
    *"--documents 3".split(),
)


class Done(NamedTuple):
    code: int | str | None
    out: str
    err: str


class Kept(NamedTuple):
    """Results of two commands with two methods each."""

    results: Path
    lengths: Done
    recall: Done


def run(*arguments: object) -> Done:
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["sbeval", *map(str, arguments)])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main.main()
    return Done(ended.value.code, out.getvalue(), err.getvalue())


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def cells(results: Path, family: str) -> set[str]:
    return set(table.read(results / f"{family}.csv")["cell"])


def curve(results: Path, cell: str, metric: str) -> list[tuple[int, float]]:
    found = curves.read(Results(results), [cell])
    found = found[found["metric"] == metric]
    return list(zip(found["step"], found["value"], strict=True))


def record(results: Path, cell: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((results / "runs" / f"{cell}.json").read_text())
    return found


def assert_one_line(done: Done, *parts: str) -> None:
    said = [line for line in done.err.splitlines() if not line.startswith("tokenize ")]
    assert done.code == 2 and len(said) == 1 and said[0].startswith("sbeval: "), done
    for part in parts:
        assert part in said[0], (part, said[0])


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, texts: Path) -> Kept:
    results = tmp_path_factory.mktemp("kept") / "results"
    lengths = run(*LENGTHS, "--corpus", texts, "--results-dir", results)
    return Kept(results, lengths, run(*RECALL, "--results-dir", results))


@pytest.fixture
def results(kept: Kept, tmp_path: Path) -> Path:
    """A copy of finished results that a test may change."""
    return Path(shutil.copytree(kept.results, tmp_path / "results"))


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make any training fail the test."""

    def refuse(*arguments: object, **options: object) -> None:
        pytest.fail("it went on to train")

    for module in (trainer, drawn):
        monkeypatch.setattr(module, "Trainer", refuse)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands draw no figures, which takes them longer than such models take to train."""
    monkeypatch.setattr(study, "draw_figures", lambda *arguments, **options: [])


# commands that do their work


def test_length_gen_leaves_table_runs_and_figures(kept: Kept) -> None:
    done, folder = kept.lengths, kept.results
    assert done.code == 0, done
    rows = table.read(folder / "length_gen.csv", table.columns(length_gen_rows.Row))
    assert set(rows["attention"]) == {"stick_breaking", "rope"}
    assert set(rows["metric"]) == {"loss", "perplexity", "bits_per_byte", "loss_last_k"}
    assert (rows["n"] == 3).all() and (rows["train_len"] == 16).all() and (rows["eval_len"] == 64).all()
    for cell in cells(folder, "length_gen"):
        run_file = record(folder, cell)
        assert run_file["status"] == "finished" and run_file["config"]["config"]["train_len"] == 16
        assert len(curve(folder, cell, "loss")) == 4 and len(run_file["corpus_digest"]) == 16
        assert run_file["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert "Loss of the last 4 tokens" in done.out and "stick_breaking" in done.out
    for file in ("length_gen.csv", "figures/length_gen.png", "figures/length_gen.pdf"):
        assert (folder / file).stat().st_size > 0 and str(folder / file) in done.out


def test_figures_of_a_command_have_its_settings_and_all_their_methods(
    results: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a clone, whose results/ has tables already: `sbeval plot` draws everything in them."""
    drawn: list[set[tuple[str, int]]] = []

    def figures(name: str, rows: pd.DataFrame) -> dict[str, Figure]:
        if name == "length_gen":
            drawn.append(set(zip(rows["attention"], rows["train_len"], strict=True)))
        return whole(name, rows)

    whole = registry.figures
    monkeypatch.setattr(registry, "figures", figures)
    left_out = f"presets of {results / 'length_gen.csv'}; sbeval plot --results-dir {results} draws all"
    alibi = (*LENGTHS, "--attention", "alibi", "--corpus", texts, "--results-dir", results)
    again = run(*alibi)
    assert again.code == 0 and left_out not in again.out
    other = run(*alibi, "--train-len", 32)
    assert other.code == 0 and left_out in other.out
    assert run("plot", "length-gen", "--format", "png", "--results-dir", results).code == 0
    shared = {(name, 16) for name in ("stick_breaking", "rope", "alibi")}
    assert drawn == [shared, {("alibi", 32)}, {*shared, ("alibi", 32)}]


@pytest.fixture
def short(tmp_path: Path) -> Path:
    """A text of about 300 tokens, and a held-out text of the same kind."""
    folder = tmp_path / "short"
    folder.mkdir()
    for name in ("train", "valid", "test"):
        (folder / f"{name}.txt").write_text(f"{name} says this and that. " * 12)
    return folder


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("command", ["length-gen", "train"])
def test_a_presets_tokens_end_at_four_epochs_and_that_is_said(
    command: str, short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(length_gen.PRESETS, "quick", length_gen.Config(train_len=16, eval_len=64, batch_tokens=32))
    where = ("--device", "cpu", "--attention", "rope", "--corpus", short, "--results-dir", tmp_path / "r")
    done = run(command, *where)
    assert done.code == 0, done
    lines = [line for line in done.out.splitlines() if "epochs of 'short'" in line]
    assert len(lines) == 1 and lines[0].startswith("614,400 training tokens are ")
    assert "training ends after 4 epochs" in lines[0] and "another --corpus" in lines[0]
    assert "held-out" in done.err
    if command == "length-gen":
        rows = table.read(tmp_path / "r" / "length_gen.csv", table.columns(length_gen_rows.Row))
        assert set(rows["epochs"]) == {4.0} and (rows["train_tokens"] == 4 * rows["unique_tokens"]).all()
        (cell,) = cells(tmp_path / "r", "length_gen")
        measured = record(tmp_path / "r", cell)["measured"]
        assert measured["ended_by"] == "max_epochs" and len(curve(tmp_path / "r", cell, "held_out_loss")) > 3
        assert record(tmp_path / "r", cell)["provenance"]["epochs"] == 4.0
    # nothing is left to train, nor to say, where tokens are asked for
    again = run(command, *where, "--train-tokens", 1024)
    assert again.code == 0 and "epochs of 'short'" not in again.out
    many = run(command, *where, "--train-tokens", 2048)
    (line,) = [line for line in many.out.splitlines() if "epochs of 'short'" in line]
    assert many.code == 0 and "past 4 epochs" in line
    bounded = run(command, *where, "--train-tokens", 2048, "--max-epochs", 2)
    assert bounded.code == 0 and "training ends after 2 epochs" in bounded.out


def test_mqrar_leaves_table_runs_and_figures(kept: Kept) -> None:
    done, folder = kept.recall, kept.results
    assert done.code == 0, done
    rows = table.read(folder / "mqrar.csv", table.columns(mqrar.Row))
    assert set(rows["attention"]) == {"stick_breaking", "rope"}
    assert set(rows["metric"]) == {"accuracy", "validation_accuracy", "solved", "steps"}
    everything = rows[(rows["metric"] == "accuracy") & (rows["split"] == "all")]
    assert everything["n"].tolist() == [30, 30] and (everything["train_tokens"] == 12 * 4 * 16).all()
    for cell in cells(folder, "mqrar"):
        assert record(folder, cell)["status"] == "finished" and len(curve(folder, cell, "loss")) == 12
    assert "MQRAR accuracy" in done.out
    for file in ("mqrar.csv", "figures/mqrar.png", "figures/mqrar.pdf"):
        assert (folder / file).stat().st_size > 0 and str(folder / file) in done.out


def test_nothing_is_left_elsewhere(kept: Kept, home: Path) -> None:
    assert kept.results.exists()
    assert [path.name for path in home.iterdir()] == ["cache"]
    assert [path.name for path in (home / "cache").iterdir()] == ["sbeval"]
    assert not list(kept.results.rglob(".*"))


@pytest.mark.usefixtures("untrained")
def test_what_is_finished_is_not_run_again(results: Path) -> None:
    before = snapshot(results)
    done = run(*RECALL, "--results-dir", results)
    assert done.code == 0 and "2 of 2 cells are finished already; --force runs them again" in done.out
    assert "nothing to run" in done.out and "MQRAR accuracy" in done.out
    assert snapshot(results) == before


@pytest.mark.usefixtures("undrawn")
def test_train_leaves_the_checkpoint_that_length_gen_and_checkpoint_read(texts: Path, tmp_path: Path) -> None:
    shared = (
        *"--device cpu --attention rope --train-len 16 --train-tokens 128 --batch-tokens 32".split(),
        "--corpus",
        texts,
    )
    results = tmp_path / "results"
    trained = run("train", *shared, "--results-dir", results)
    (folder,) = (results / "checkpoints").iterdir()
    assert trained.code == 0 and f"rope seed 0: {folder}" in trained.out
    assert "1 model to train, " in trained.out and not list(results.glob("*.csv"))
    kept = snapshot(folder)
    assert "nothing to run" in run("train", *shared, "--results-dir", results).out
    assert run("length-gen", *shared, "--eval-len", "64", "--documents", "3", "--results-dir", results).code == 0
    assert snapshot(folder) == kept and list((results / "checkpoints").iterdir()) == [folder]
    again = run(
        "length-gen",
        "--device",
        "cpu",
        "--checkpoint",
        folder,
        "--corpus",
        texts,
        *"--eval-len 64 --train-len 16 --documents 3 --window 8".split(),
        "--results-dir",
        results,
    )
    assert again.code == 0, again
    rows = table.read(results / "length_gen.csv")
    assert set(rows["model"]) == {"quick", folder.name} and set(rows["window"].dropna()) == {8}
    wide = rows[(rows["metric"] == "perplexity") & (rows["context_length"] == 64)]
    assert len(wide) == 2 and wide["value"].nunique() == 1


@pytest.mark.usefixtures("undrawn")
def test_a_text_that_changed_is_trained_on_again(results: Path, texts: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(texts, tmp_path / "texts"))
    command = (*LENGTHS, "--attention", "rope", "--corpus", changed, "--results-dir", results)
    assert run(*command).code == 0
    assert "1 of 1 cells are finished already" in run(*command).out
    before = {cell: record(results, cell) for cell in cells(results, "length_gen")}
    losses = {cell: curve(results, cell, "loss") for cell in before}
    (changed / "train0.txt").write_text("another text " * 50)
    done = run(*command)
    assert done.code == 0 and "1 cell to run" in done.out
    after = {cell: record(results, cell) for cell in cells(results, "length_gen")}
    differing = [cell for cell in after if after[cell] != before[cell]]
    assert len(differing) == 1 and after.keys() == before.keys()
    assert after[differing[0]]["corpus_digest"] != before[differing[0]]["corpus_digest"]
    assert curve(results, differing[0], "loss") != losses[differing[0]]


@pytest.mark.usefixtures("undrawn")
def test_force_trains_again_and_replaces_the_rows(results: Path) -> None:
    before = snapshot(results)
    old = table.read(results / "mqrar.csv")
    done = run(*RECALL, "--attention", "rope", "--results-dir", results, "--force")
    assert done.code == 0 and "1 cell to run" in done.out
    after = snapshot(results)
    changed = {name for name in after if before.get(name) != after[name] and name.startswith("runs/")}
    assert len(changed) == 1 and "rope" in (name := changed.pop())
    assert json.loads(after[name])["tokens_per_s"] > 0
    new = table.read(results / "mqrar.csv")
    pd.testing.assert_frame_equal(new.drop(columns="utc"), old.drop(columns="utc"))


def test_dry_run_says_the_grid_and_its_cost_and_writes_nothing(results: Path, tmp_path: Path) -> None:
    before = snapshot(results)
    done = run(*RECALL, "--attention", "rope", "--attention", "nope", "--results-dir", results, "--dry-run")
    first, second, cost = done.out.splitlines()
    assert done.code == 0 and done.err == ""
    assert first.startswith("mqrar-rope-2-pairs-width-16-") and first.endswith("FLOPs  finished")
    assert second.startswith("mqrar-nope-2-pairs-width-16-") and second.endswith("FLOPs")
    assert cost.startswith("1 cell to run, ") and "FLOPs: roughly " in cost and " on cpu" in cost
    assert snapshot(results) == before
    # a model on the hub, whose size is unknown before its download
    hub = run("few-shot", "--device", "cpu", "--model", "someone/model", "--task", "copa", "--dry-run")
    cell, cost = hub.out.splitlines()[-2:]
    assert cell.startswith("few_shot-someone-model-copa-") and cell.endswith("  cost unknown"), hub
    assert cost == "1 cell to run, at a cost that is not known yet"
    forced = run(*RECALL, "--results-dir", results, "--dry-run", "--force")
    assert "finished" not in forced.out and "2 cells to run" in forced.out
    # a corpus must be there, and no folder is made
    done = run(*LENGTHS, "--corpus", tmp_path / "absent", "--results-dir", tmp_path / "new", "--dry-run")
    assert done.code == 2 and "there is no such file or folder" in done.err and not (tmp_path / "new").exists()


def test_a_dry_run_lists_further_seeds_once_it_is_known_at_which_rate(tmp_path: Path) -> None:
    sweep = (*RECALL, "--attention", "rope", "--lr", "1e-3", "--lr", "2e-3", "--seed", "0", "--seed", "1")
    first = run(*sweep[:-2], "--results-dir", tmp_path)
    assert first.code == 0 and "2 cells to run" in first.out
    *cells, cost = run(*sweep, "--results-dir", tmp_path, "--dry-run").out.splitlines()
    # the first seed solved it at neither rate: the second runs at both
    assert [cell.endswith("finished") for cell in cells] == [True, True, False, False]
    assert all("-seed-1-" in cell for cell in cells[2:]) and cost.startswith("2 cells to run, ")
    # all begin again, and what is best may change
    *_, cost, then = run(*sweep, "--results-dir", tmp_path, "--dry-run", "--force").out.splitlines()
    assert cost.startswith("2 cells to run, ") and then.startswith("then at most 2 cells at what rates turn out best")


def test_a_dry_run_counts_the_training_of_further_seeds(tmp_path: Path) -> None:
    sweep = ("needle", "--preset", "quick", "--device", "cpu", "--finetune-lr", "1e-3,3e-3", "--results-dir", tmp_path)
    alone = run(*sweep, "--seed", "1", "--dry-run").out.splitlines()[-1]
    *_, first, then = run(*sweep, "--seed", "0", "--seed", "1", "--dry-run").out.splitlines()
    flops = [line.split(", ")[1].split(":")[0] for line in (alone, first, then)]
    assert len(set(flops)) == 1 and flops[0].endswith(" FLOPs"), flops


def test_a_dry_run_of_train_has_the_models_alone(tmp_path: Path) -> None:
    train = ("train", "--device", "cpu", "--attention", "rope", "--seed", "0,1")
    done = run(*train, "--results-dir", tmp_path, "--dry-run")
    *models, cost = done.out.splitlines()
    assert [model.split("  ")[0] for model in models] == ["train rope seed 0", "train rope seed 1"]
    assert cost.startswith("2 models to train, ") and not list(tmp_path.iterdir())


@pytest.mark.usefixtures("undrawn")
def test_a_method_that_comes_later_leaves_the_others_alone(results: Path) -> None:
    runs = {path: path.stat().st_mtime_ns for path in (results / "runs").iterdir()}
    rows = (results / "mqrar.csv").read_text().splitlines()
    done = run(*RECALL, "--attention", "rope", "--attention", "alibi", "--results-dir", results)
    assert done.code == 0 and "1 of 2 cells are finished already" in done.out
    assert runs.items() <= {path: path.stat().st_mtime_ns for path in (results / "runs").iterdir()}.items()
    after = (results / "mqrar.csv").read_text().splitlines()
    assert set(rows) < set(after)
    assert all(line.startswith("mqrar,mqrar,2x16,alibi,") for line in set(after) - set(rows))
    assert len(cells(results, "mqrar")) == 3


def test_attention_map_leaves_a_table_figures_and_a_page(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    sizes = ("--vocab-size", "32", "--seq-len", "24", "--kv-pairs", "6", "--width", "16", "--batch", "4")
    done = run(
        "attention-map", "--device", "cpu", *sizes, "--steps", "4", "--test-rows", "30", "--results-dir", tmp_path
    )
    assert done.code == 0, done
    assert "latest" in done.out and "stick_breaking" in done.out
    assert len(cells(tmp_path, "attention_map")) == 2
    for suffix in ("png", "pdf", "html"):
        assert (tmp_path / "figures" / f"attention_map.{suffix}").stat().st_size > 1000
    assert_one_line(run("attention-map", "--checkpoint", tmp_path), "--checkpoint", "not a checkpoint folder")
    decided = run("attention-map", "--checkpoint", tmp_path, "--attention", "rope", "--width", "7")
    assert_one_line(decided, "--attention and --width: a --checkpoint decides that already")


def test_flip_flop_leaves_a_table_and_a_figure(tmp_path: Path) -> None:
    sizes = ("--seq-len", "16", "--width", "8", "--batch", "4", "--steps", "4", "--test-rows", "20", "--device", "cpu")
    done = run("flip-flop", *sizes, "--results-dir", tmp_path)
    assert done.code == 0, done
    assert "here" in done.out and "published" in done.out
    assert len(cells(tmp_path, "flip_flop")) == 2
    assert (tmp_path / "figures" / "flip_flop.pdf").exists()


@pytest.mark.usefixtures("undrawn")
def test_a_cell_that_diverges_is_recorded_and_the_sweep_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    command = (*RECALL, "--attention", "rope", "--lr", "1e4", "--lr", "1e-3", "--results-dir", tmp_path)
    done = run(*command)
    assert done.code == 1 and "recorded as diverged, continuing with the next" in done.out
    # in the table, too
    assert "1 diverged │" in done.out
    rows = table.read(tmp_path / "mqrar.csv")
    (finished,) = set(rows[rows["metric"] == "accuracy"]["cell"])
    (failed,) = {path.stem for path in (tmp_path / "runs").iterdir()} - {finished}
    assert "lr-10000-" in failed and record(tmp_path, failed)["status"] == "failed"
    assert "the loss is nan at step 10" in record(tmp_path, failed)["reason"]
    assert "lr-0.001-" in finished and record(tmp_path, finished)["status"] == "finished"
    again = run(*command)
    assert again.code == 1 and "1 of 2 cells are finished already" in again.out and "1 cell to run" in again.out


def test_an_interrupted_command_keeps_its_threads_from_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number in the results folder is of the command, not of whichever is completed next."""
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    monkeypatch.setattr(threads, "fastest", lambda most: 1)
    # for the rest of the process
    monkeypatch.setattr(signals, "ignore", lambda: None)

    def interrupted(*_: object) -> bool:
        raise KeyboardInterrupt

    def kept(steps: int, work: Callable[..., bool]) -> set[str]:
        monkeypatch.setattr(study, "run", work)
        run(*RECALL, "--steps", steps, "--results-dir", tmp_path)
        monkeypatch.setenv("OMP_NUM_THREADS", "")
        return {path.name for path in Results(tmp_path).locks.glob("threads-*")}

    try:
        first = kept(10, interrupted)
        assert len(first) == 1
        assert len(kept(20, interrupted)) == 2
        # completed: what is left is the first's, which goes on with it
        assert kept(20, lambda *_: True) == first and kept(10, lambda *_: True) == set()
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("undrawn")
def test_ctrl_c_keeps_what_is_done_and_the_same_command_ends_as_if_unbroken(tmp_path: Path) -> None:
    broken, unbroken = tmp_path / "broken", tmp_path / "unbroken"
    command = (*RECALL, "--steps", "150")
    process = subprocess.Popen(
        [sys.executable, "-m", "sbeval", *command, "--results-dir", str(broken)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # sums depend on the number of threads
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    while process.poll() is None and not (broken / "mqrar.csv").exists():
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "sbeval: interrupted; finished work is kept, and the same command resumes"
    assert "Traceback" not in err
    first = cells(broken, "mqrar")
    assert len(first) == 1
    states = [json.loads(path.read_text())["state"] for path in (broken / "checkpoints").glob("*/config.json")]
    assert sorted(state["finished"] for state in states) == [False, True]
    assert all(0 < len(state["losses"]) < 150 for state in states if not state["finished"])
    done = run(*command, "--results-dir", broken)
    assert done.code == 0 and "1 of 2 cells are finished already" in done.out
    # progress goes on where it stood
    assert [line for line in done.err.splitlines() if line.startswith("train ")][-1].count(": 100 %") == 1
    assert run(*command, "--results-dir", unbroken).code == 0
    one, other = (table.read(folder / "mqrar.csv").drop(columns="utc") for folder in (broken, unbroken))
    assert len(set(one["cell"])) == 2
    pd.testing.assert_frame_equal(one, other, check_exact=True)
    for cell in set(one["cell"]):
        losses = [curve(folder, cell, "loss") for folder in (broken, unbroken)]
        assert len(losses[0]) == 150 and losses[0] == losses[1]


# help and figures need little


HELP = """
import sys
from sbeval.cli import main as cli
for command in ([], ["length-gen"], ["mqrar"], ["needle"], ["export"], ["plot"]):
    sys.argv = ["sbeval", *command, "--help"]
    try:
        cli.main()
    except SystemExit as ended:
        assert ended.code == 0, (command, ended.code)
print("heavy:", *{"torch", "triton", "pandas", "matplotlib", "numpy", "transformers"} & set(sys.modules))
"""


def test_help_answers_without_heavy_imports() -> None:
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *text, last = done.stdout.splitlines()
    assert last == "heavy:"
    for option in ("--attention", "--preset", "--eval-len", "--kv-pairs", "--dry-run", "--format", "length-gen"):
        assert any(option in line for line in text), option


WITHOUT_TORCH = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "triton"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
from sbeval.cli import main as cli
cli.main()
"""


def test_plot_draws_from_tables_where_torch_cannot_be_imported(results: Path) -> None:
    shutil.rmtree(results / "figures")
    command = ["plot", "mqrar", "length-gen", "--format", "png", "--results-dir", str(results)]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT_TORCH, *command], capture_output=True, text=True, check=False
    )
    files = [results / "figures" / name for name in ("mqrar.png", "length_gen.png")]
    assert (done.returncode, done.stdout.split()) == (0, [str(file) for file in files]), done.stderr
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    assert len(list((results / "figures").iterdir())) == 2


def test_check_counts_what_it_has_read(results: Path) -> None:
    done = run("check", "--results-dir", results)
    rows = sum(len(table.read(path)) for path in results.glob("*.csv"))
    runs, others = len(list((results / "runs").iterdir())), len(list(results.rglob("*.parquet")))
    figures = len({path.stem for path in (results / "figures").iterdir()})
    counted = f"{rows} rows, 2 tables, {runs} run files, {others} other files"
    assert done.code == 0 and done.out.splitlines()[-1] == (
        f"{results}: {counted}: as written; figures: {figures} of these results"
    )


def test_check_names_a_figure_of_an_older_table_which_is_no_fault(results: Path, tmp_path: Path) -> None:
    older = tmp_path / "older" / "mqrar.csv"
    older.parent.mkdir()
    older.write_text("".join((results / "mqrar.csv").read_text().splitlines(keepends=True)[:-1]))
    figures = results / "figures"
    assert run("plot", "mqrar", "--format", "png", "--results-dir", older.parent, "--out", figures).code == 0
    done = run("check", "--results-dir", results)
    assert done.code == 0 and len(done.out.splitlines()) == 2
    line, last = done.out.splitlines()
    of, _, redraw = line.partition(" has now; ")
    assert of == f"{figures / 'mqrar.png'}: drawn from other rows than {results / 'mqrar.csv'}"
    redraw = redraw.removesuffix(" redraws it, or remove it")
    assert redraw == f"sbeval plot mqrar --results-dir {results}"
    assert last.endswith("as written; figures: 4 of these results, 1 of others")
    assert run(*redraw.split()[1:]).code == 0
    assert len(run("check", "--results-dir", results).out.splitlines()) == 1


def test_compare_needs_no_torch(results: Path) -> None:
    command = ["compare", str(results), str(results), "--format", "markdown"]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT_TORCH, *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("numbers in both, 0 apart (*: p < 0.05, Holm over methods)") == 2


# mistakes


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("length-gen --train-len 256 --eval-len 64", ["--eval-len 64", "--train-len 256", "give --eval-len 256"]),
        ("length-gen --train-len 0", ["train_len", "at least 1", "got 0"]),
        ("length-gen --documents 0", ["documents", "at least 1", "got 0"]),
        ("length-gen --train-len 32 --batch-tokens 31", ["--batch-tokens 31", "--train-len 32", "--batch-tokens 32"]),
        ("needle --train-len 4096 --batch-tokens 512 --dry-run", ["--batch-tokens 512", "--train-len 4096"]),
        ("length-gen --micro-batch-tokens 0", ["micro_batch_tokens", "at least 1", "got 0"]),
        ("length-gen --corpus-tokens -5", ["corpus_tokens", "at least 1", "got -5"]),
        ("length-gen --schedule cosin", ["'cosin'", "did you mean 'cosine'"]),
        ("length-gen --packing document", ["'document'", "did you mean 'documents'"]),
        ("length-gen --size quik", ["model size 'quik'", "did you mean 'quick'"]),
        ("length-gen --tokenizer bpe:x", ["'bpe:x'", "at least 257"]),
        ("length-gen --tokenizer bpe:3", ["'bpe:3'", "at least 257"]),
        ("mqrar --seq-len 63", ["seq_len", "even", "got 63"]),
        ("mqrar --seq-len 2 --vocab-size 32", ["seq_len", "at least 4", "got 2"]),
        ("mqrar --seq-len 64 --vocab-size 128 --kv-pairs 17", ["1 to 16 at seq_len 64", "got 17"]),
        ("mqrar --kv-pairs 4 --kv-pairs 0", ["kv_pairs", "got 0"]),
        ("mqrar --seq-len 64 --kv-pairs 4 --vocab-size 64", ["vocab_size", "above seq_len 64", "got 64"]),
        ("mqrar --slot-power nan", ["slot_power", "-10 to 10", "got nan"]),
        ("mqrar --heads 0", ["heads", "at least 1", "got 0"]),
        ("mqrar --width 64 --heads 3", ["width 64", "3 heads"]),
        ("mqrar --width 18 --heads 2", ["rope of width 18 with 2 heads", "even size", "width / heads", "is 9"]),
        (
            "mqrar --width 9 --attention alibi --attention sliding_window:window=8",
            ["mqrar: sliding_window:window=8", "even size", "is 9"],
        ),
        ("mqrar --width 9 --attention alibi --attention forgetting:rotary=true", ["even size", "is 9"]),
        ("attention-map --width 9", ["even size", "is 9"]),
        ("flip-flop --width 9 --heads 1 --dry-run", ["even size", "is 9"]),
        ("mqrar --width 512 --attention nope", ["at most 256", "is 512"]),
        ("mqrar --width -4", ["width", "at least 1", "got -4"]),
        ("mqrar --patience -1", ["patience", "at least 0", "got -1"]),
        ("mqrar --stored-rows 5", ["stored_rows", "at least the batch 64", "got 5"]),
        ("needle --length 511", ["--length", "512 to 131072", "got 511"]),
        ("needle --task qa_1", ["qa_1", "--squad PATH"]),
        ("mqrar --executor rey", ["executor 'rey'", "did you mean 'ray'"]),
        ("mqrar --address auto", ["--address", "--executor ray"]),
        ("mqrar --steps 0", ["steps", "at least 1", "got 0"]),
        ("mqrar --test-rows 0", ["test_rows", "at least 1", "got 0"]),
        ("mqrar --lr 0", ["lr", "above 0", "got 0"]),
        ("mqrar --schedule powr", ["'powr'", "did you mean 'power'"]),
        ("mqrar --attention ropee", ["attention 'ropee'", "did you mean 'rope'"]),
        ("length-gen --attention stick-breaking", ["'stick-breaking'", "did you mean 'stick_breaking'"]),
        ("mqrar --attention rope:thetta=1", ["'thetta'", "did you mean 'theta'"]),
        ("mqrar --attention rope:theta", ["'theta'", "rope:theta=..."]),
        ("mqrar --attention rope:theta=big", ["rope:theta", "number", "'big'"]),
        ("mqrar --preset qick", ["preset 'qick'", "did you mean 'quick'"]),
        ("mqrar --device cdua", ["device 'cdua'", "did you mean 'cuda'"]),
        ("mqrar --device cuda:first", ["device 'cuda:first'", "cuda:0"]),
        ("mqrar --dtype bf16", ["dtype 'bf16'", "did you mean 'bfloat16'"]),
        # beyond all bounds: said before a gigabyte is asked for
        (f"mqrar --width {1 << 40}", ["width must be at most", f"got {1 << 40}"]),
        (f"mqrar --layers {1 << 40}", ["layers must be at most", f"got {1 << 40}"]),
        (f"mqrar --vocab-size {1 << 40}", ["vocab_size must be at most", f"got {1 << 40}"]),
        (f"needle --length {1 << 40}", ["--length", "512 to 131072", f"got {1 << 40}"]),
        (f"length-gen --batch-tokens {1 << 40}", ["a step must have at most", "sequences"]),
        # longer than the name of a file may be
        (f"length-gen --corpus {LONG}", [f"corpus '{LONG}'"]),
        (f"length-gen --tokenizer {LONG}", [f"tokenizer '{LONG}'"]),
        (f"length-gen --checkpoint {LONG}", [LONG]),
        (f"length-gen --size {LONG}", ["model size"]),
        (f"mqrar --attention {LONG}", ["attention"]),
        (f"plot {LONG}", ["figure"]),
        ("plot mqarr", ["figure 'mqarr'", "did you mean 'mqrar'"]),
        ("plot --format pgn", ["format 'pgn'", "did you mean 'png'"]),
    ],
)
def test_a_mistake_is_one_line_and_loses_nothing(arguments: str, parts: list[str], results: Path) -> None:
    before = snapshot(results)
    command, *rest = arguments.split()
    device = () if command == "plot" or "--device" in rest else ("--device", "cpu")
    assert_one_line(run(command, *device, "--results-dir", results, *rest), *parts)
    assert snapshot(results) == before


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ("mqrar --sed 1", "--seed"),
        ("mqrar --seed -1", "--seed"),
        ("length-gen --seed 99999999999", "--seed"),
        ("mqrar --steps many", "invalid value for '--steps': 'many' is not an integer; see "),
        ("mqrar --lr 1e-3,fast", "invalid value for '--lr': 'fast' is not a number; see "),
        ("length-gen --lr", "--lr"),
        ("mqrar extra", "unexpected extra argument(s) (extra); see "),
        ("run", "missing argument 'study'; see "),
        ("lengthgen", "no such command 'lengthgen'. Did you mean 'length-gen'? See "),
    ],
)
def test_what_the_parser_refuses(arguments: str, part: str, results: Path) -> None:
    before = snapshot(results)
    done = run(*arguments.split(), *(("--results-dir", results) if " " in arguments else ()))
    assert_one_line(done, part)
    assert snapshot(results) == before


def test_a_study_file_is_shown_as_it_is() -> None:
    assert run("run", "quick", "--show").out == study_file.text("quick")
    assert_one_line(run("run", "quick", "--show", "--set", "mqrar.steps=9"), "--show prints the study file as it is: ")


def test_without_a_command_there_is_help() -> None:
    for arguments in ((), ("bench",)):
        done = run(*arguments)
        assert done.code == 2 and "Usage:" in done.out and done.err == ""


@pytest.mark.usefixtures("untrained")
def test_cuda_without_a_gpu(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = snapshot(results)
    for name in ("cuda", "cuda:1"):
        done = run("mqrar", "--device", name, "--results-dir", results)
        assert_one_line(done, f"--device {name}", "no GPU here", "leave --device out")
    assert snapshot(results) == before


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize(
    ("files", "parts"),
    [
        (None, ["unknown corpus", "give python, stdlib, an existing file or folder, or hf:NAME"]),
        ({}, ["holds no file to read"]),
        ({"a.txt": b"", "b.txt": b" \n"}, ["holds no text"]),
        ({"a.txt": b"one document"}, ["train and a test split", "two documents or more"]),
        ({"a.txt": bytes(range(256)), "b.txt": b"text"}, ["a.txt is not UTF-8 text", "give text, .jsonl or .parquet"]),
        ({"a.jsonl": b'{"text": "a"}\n{"te'}, ["a.jsonl:2 is not JSON"]),
        ({"a.jsonl": b'{"body": "a"}\n'}, ["no field 'text'", "body", "--text-field"]),
        ({"train.txt": b"x" * 999, "test.txt": b"x" * 50}, ["the longest has 50", "--eval-len 49 or less"]),
    ],
)
def test_a_corpus_that_will_not_do_is_said_before_training(
    files: dict[str, bytes] | None, parts: list[str], results: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "corpus"
    if files is not None:
        folder.mkdir()
    for name, content in (files or {}).items():
        (folder / name).write_bytes(content)
    before = snapshot(results)
    assert_one_line(run(*LENGTHS, "--corpus", folder, "--results-dir", results), *parts)
    assert snapshot(results) == before


def test_the_eval_len_that_is_offered_will_do(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for role in ("train", "test"):
        (folder / f"{role}.txt").write_text("abcde" * 8)
    command = (*LENGTHS, "--attention", "rope", "--corpus", folder, "--results-dir", tmp_path / "results")
    refused = run(*command)
    assert_one_line(refused, "--eval-len 39 or less")
    assert run(*command, "--eval-len", "39").code == 0


def _without_seed(text: str) -> str:
    return text.replace(",seed,", ",sead,", 1)


def _without_factor(text: str) -> str:
    return text.replace(",kv_pairs,", ",pairs,", 1).replace(",context_length,", ",length,", 1)


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (_without_seed, ["has no column 'seed'"]),
        (_without_factor, ["has no column '"]),
        (lambda text: text[:-3], ["the last line is not ended", "fix or remove it"]),
        (lambda text: text[: text.rindex(",", 0, -40)] + "\n", ["cells where the header has", "fix or remove"]),
        (lambda text: text.replace(",16,", ",16x,", 1), ["'16x'", "not a whole number", "fix or remove"]),
        (lambda text: "", ["is empty, without even a header"]),
    ],
)
@pytest.mark.parametrize("family", ["length_gen", "mqrar"])
def test_a_spoilt_table_is_said_before_training_and_by_plot(
    family: str, spoil: Any, parts: list[str], results: Path, texts: Path
) -> None:
    path = results / f"{family}.csv"
    path.write_text(spoil(path.read_text()))
    before = snapshot(results)
    command = (*RECALL, "--seed", "1") if family == "mqrar" else (*LENGTHS, "--corpus", texts, "--seed", "1")
    for options in ((), ("--force",), ("--dry-run",)):
        assert_one_line(run(*command, *options, "--results-dir", results), str(path), *parts)
    assert_one_line(run("plot", family, "--results-dir", results), str(path), *parts)
    assert snapshot(results) == before


@pytest.mark.usefixtures("untrained")
def test_a_results_folder_that_cannot_be_written(tmp_path: Path, texts: Path) -> None:
    file = tmp_path / "file"
    file.write_text("precious")
    for command in (RECALL, (*LENGTHS, "--corpus", texts)):
        below = run(*command, "--results-dir", file / "below")
        assert_one_line(below, "cannot make the results folder", str(file / "below"))
        for options in ((), ("--dry-run",)):
            assert_one_line(run(*command, *options, "--results-dir", file), "--results-dir", f"'{file}' is a file")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "runs").write_text("precious")
    assert_one_line(run(*RECALL, "--results-dir", tmp_path / "results"), "cannot make the results folder", "runs")
    assert file.read_text() == (tmp_path / "results" / "runs").read_text() == "precious"


def test_figures_that_cannot_be_written(results: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("precious")
    before = snapshot(results)
    done = run("plot", "mqrar", "--results-dir", results, "--out", file / "below")
    assert_one_line(done, "cannot make the folder of figures", str(file / "below"), "with --out")
    assert snapshot(results) == before and file.read_text() == "precious"


def test_figures_without_a_table(tmp_path: Path) -> None:
    assert_one_line(run("plot", "mqrar", "--results-dir", tmp_path), "no table", str(tmp_path / "mqrar.csv"))


def test_tensorboard_logs_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    # said before training
    monkeypatch.setattr(Trainer, "run", None)
    file = tmp_path / "file"
    file.write_text("precious")
    done = run(*RECALL, "--results-dir", tmp_path / "results", "--tensorboard", file / "logs")
    assert_one_line(done, "cannot write TensorBoard logs", str(file / "logs"))
    assert file.read_text() == "precious"


def test_errors_that_no_place_expects_are_one_line(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And never the parser's own `Aborted.`."""
    raised = (
        (EOFError("the stream ended early"), "the stream ended early"),
        (OSError(errno.EIO, "Input/output error", "some/file"), "cannot read or write some/file: Input/output error"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
    )
    for error, line in raised:

        def fail(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr("sbeval.tables.few_shot.render", fail)
        monkeypatch.setattr("sbeval.tables.table.read", lambda *_, **__: None)
        done = run("table", "few-shot", "--results-dir", results)
        assert (done.code, done.err) == (2, f"sbeval: {line}\n")


@pytest.mark.parametrize("command", ["report --out {folder}", "report --out /dev/null", "plot --out /dev/null"])
def test_an_output_that_is_no_file_stays_what_it_is(command: str, results: Path, tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    done = run(*command.format(folder=tmp_path).split(), "--results-dir", results)
    assert done.code == 2 and done.err.splitlines()[-1].startswith("sbeval: cannot ")
    assert "Traceback" not in done.err and Path("/dev/null").is_char_device() and tmp_path.is_dir()


def test_an_output_that_is_full_is_one_line(results: Path) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "sbeval", "compare", str(results), str(results)]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "sbeval: cannot read or write standard output: No space left on device\n"


@pytest.mark.usefixtures("undrawn")
def test_files_in_the_way_of_checkpoints_are_cleared_and_the_weights_can_be_read(tmp_path: Path) -> None:
    """A file where `.partial` and a link where `.old` belong: as other programs, or a copy of a folder, leave them."""
    assert run(*RECALL, "--attention", "rope", "--results-dir", tmp_path).code == 0
    (folder,) = (path for path in (tmp_path / "checkpoints").iterdir() if path.is_dir())
    kept = tmp_path / "kept"
    kept.mkdir()
    folder.with_name(f".{folder.name}.partial").touch()
    folder.with_name(f".{folder.name}.old").symlink_to(kept)
    # of processes that were killed while they wrote
    left = [tmp_path / name / f".x.{'0' * 32}.tmp" for name in ("", "runs", "values", "curves", "locks")]
    for path in left:
        path.touch()
    before = os.umask(0o022)
    try:
        assert run(*RECALL, "--attention", "rope", "--results-dir", tmp_path, "--force").code == 0
    finally:
        os.umask(before)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [folder.name] and kept.is_dir()
    assert not any(path.exists() for path in left)
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("kind", ["link", "folder"])
def test_what_stands_where_a_lock_belongs_is_one_line(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("kept")
    lock = tmp_path / "mqrar.csv.lock"
    if kind == "link":
        lock.symlink_to(target)
    else:
        lock.mkdir()
    done = run(*RECALL, "--attention", "rope", "--steps", "2", "--results-dir", tmp_path)
    assert done.code == 2 and done.err.splitlines()[-1].startswith("sbeval: cannot write "), done.err
    assert "Traceback" not in done.err and target.read_text() == "kept"
