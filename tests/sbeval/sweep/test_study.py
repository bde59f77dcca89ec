"""Test whole studies of tiny models: their results, resuming after an interrupt, and continuing after failures."""

import contextlib
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from sbeval import registry
from sbeval.cli import main
from sbeval.data.corpus import Corpus
from sbeval.errors import InputError
from sbeval.runtime.progress import Progress
from sbeval.sweep import study as studies
from sbeval.sweep import study_file
from sbeval.sweep.context import RunContext
from sbeval.tables import curves, table
from sbeval.tables.results import Results
from sbeval.tasks import needle, text_training
from sbeval.training.text_model import TextModel
from sbeval.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("home")
RECALL = {"vocab_size": 32, "seq_len": 16, "kv_pairs": [2], "widths": [16], "batch": 4, "steps": 12, "test_rows": 30}


def run(*arguments: object) -> tuple[Any, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["sbeval", "run", *map(str, arguments)])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main.main()
    return ended.value.code, out.getvalue(), err.getvalue()


@pytest.fixture(autouse=True)
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the names of requested figures; drawing is tested with the families' commands."""
    names: list[str] = []

    def draw(folder: Path, figures: Sequence[str], *_: object, **__: object) -> list[Path]:
        names.extend(figures)
        return []

    monkeypatch.setattr(studies, "draw_figures", draw)
    return names


def checkpoints(results: Path) -> dict[str, int]:
    """Return the finished models and their modification times."""
    return {
        path.parent.name: path.stat().st_mtime_ns
        for path in (results / "checkpoints").glob("[!.]*/config.json")
        if json.loads(path.read_text())["state"]["finished"]
    }


def records(results: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in (results / "runs").glob("*.json")}


def test_a_study_trains_each_model_once_and_leaves_what_its_families_do(
    study: Path, tmp_path: Path, drawn: list[str]
) -> None:
    code, out, _ = run(study, "--device", "cpu", "--results-dir", tmp_path)
    assert code == 0, out
    # rope, alibi and those of flip-flop
    assert len(checkpoints(tmp_path)) == 4 and len(records(tmp_path)) == 3 + 2 + 2
    for family, said in (("length_gen", "Loss of the last"), ("needle", "niah_single_1"), ("flip_flop", "published")):
        assert set(table.read(tmp_path / f"{family}.csv")["preset"]) == {"quick"} and said in out
        assert str(tmp_path / f"{family}.csv") in out
    assert drawn == ["length_gen", "loss_by_position", "needle", "needle_depth", "flip_flop"]
    # a model that is trained before says in every run file how fast that was
    found = [record for name, record in records(tmp_path).items() if name.startswith("length_gen")]
    assert all(record["tokens_per_s"] > 0 for record in found)
    losses = curves.read(Results(tmp_path), table.read(tmp_path / "length_gen.csv")["cell"])
    assert losses[losses["metric"] == "loss"].groupby("cell").size().tolist() == [4] * len(found)
    before = checkpoints(tmp_path)
    code, out, _ = run(study, "--device", "cpu", "--results-dir", tmp_path)
    assert code == 0 and "7 of 7 cells are finished already" in out and checkpoints(tmp_path) == before
    # the next step, and what another evaluation of the same models would cost
    assert out.splitlines()[-1].startswith("next: ") and f"sbeval report --results-dir {tmp_path} puts" in out
    code, out, _ = run(
        study, "--set", "length_gen.eval_len=32", "--device", "cpu", "--results-dir", tmp_path, "--dry-run"
    )
    rows = {cells[1].strip(): cells for line in out.splitlines() if len(cells := line.split("│")) > 3}
    assert code == 0 and rows["training"][4].strip() == "" and rows["length_gen"][2].strip() == "3"
    code, out, _ = run(study, "--force", "--device", "cpu", "--results-dir", tmp_path, "--dry-run")
    rows = {cells[1].strip(): cells for line in out.splitlines() if len(cells := line.split("│")) > 3}
    assert rows["training"][4].strip() == "2"


def test_families_that_share_models_are_cautioned_once(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    ours = text_training.open_corpus

    def count(config: TextModel, progress: Progress) -> Corpus:
        opened.append(config)
        return ours(config, progress)

    monkeypatch.setattr(text_training, "open_corpus", count)
    context = RunContext(results_dir=tmp_path, device=torch.device("cpu"))
    given = study_file.parts(study_file.read(str(study), ["models.train_tokens=4096"]), lambda said: said or "float32")
    found = studies.cautions(given, context)
    assert len(opened) == 1 and len(found) == 2 and "past 4 epochs" in found[0] and "of held-out text" in found[1]
    # a model that is there already was trained before
    there = tmp_path / "there.yaml"
    own = ', attention: [rope, "rope:scaling=ntk,factor=4", alibi]'
    there.write_text(study.read_text().replace(own, ", checkpoint: there"))
    again = study_file.parts(study_file.read(str(there), ["needle.checkpoint=there"]), str)
    assert [part.config.checkpoint for part in again[:2]] == ["there"] * 2 and studies.cautions(again, context) == []


def test_a_study_that_is_killed_goes_on_and_trains_nothing_again(study: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sbeval", "run", str(study), "--device", "cpu", "--results-dir", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ)
    while process.poll() is None and not (tmp_path / "length_gen.csv").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL
    before, finished = checkpoints(tmp_path), records(tmp_path)
    assert before and not (tmp_path / "flip_flop.csv").exists()
    code, out, err = run(study, "--device", "cpu", "--results-dir", tmp_path)
    assert code == 0 and f"{len(finished)} of 7 cells are finished already" in out
    assert before.items() <= checkpoints(tmp_path).items() and finished.items() <= records(tmp_path).items()
    assert "train rope seed 0" not in err and len(records(tmp_path)) == 7


@pytest.mark.slow
def test_cells_at_once_with_force_train_their_model_once_again(study: Path, tmp_path: Path) -> None:
    lengths = "\n".join(study.read_text().splitlines()[:3]).replace(", alibi]}", "]}")
    (tmp_path / "lengths.yaml").write_text(lengths)
    command = (tmp_path / "lengths.yaml", "--device", "cpu", "--results-dir", tmp_path)
    assert run(*command)[0] == 0
    before = checkpoints(tmp_path)
    # both evaluations can be in other processes than the training, and neither removes what that left
    code, out, _ = run(*command, "--workers", 2, "--force")
    after = checkpoints(tmp_path)
    assert code == 0 and "2 cells to run" in out
    assert len(after) == 1 and before.keys() == after.keys() and before != after
    assert len({record["tokens_per_s"] for record in records(tmp_path).values()}) == 1


def test_a_training_that_fails_fails_all_that_needs_it_and_the_study_goes_on(study: Path, tmp_path: Path) -> None:
    changes = ("--set", "models.lr=1e9", "--set", "models.attention=[rope]", "--set", "length_gen.attention=[rope]")
    code, out, _ = run(study, *changes, "--device", "cpu", "--results-dir", tmp_path)
    assert code == 1 and "2 cells that need it recorded as diverged, continuing with the next" in out
    failed = {name: record["reason"] for name, record in records(tmp_path).items() if record["status"] == "failed"}
    assert {name.split("-")[0] for name in failed} == {"length_gen", "needle"}
    assert all(reason.startswith("train rope seed 0: the loss is ") for reason in failed.values())
    assert "2 of 4 cells failed; the same command retries them:" in out
    assert all(f"  {name}: {reason}" in out for name, reason in failed.items())
    assert len(set(table.read(tmp_path / "flip_flop.csv")["cell"])) == 2


def test_what_one_family_cannot_do_ends_no_study(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise InputError("no needle here")

    monkeypatch.setattr(needle.Cell, "run", refuse)
    code, out, _ = run(study, "--device", "cpu", "--results-dir", tmp_path)
    assert code == 1 and "niah_single_1: no needle here; recorded as failed, continuing with the next" in out
    assert (tmp_path / "flip_flop.csv").exists() and not (tmp_path / "needle.csv").exists()
    assert [record["reason"] for record in records(tmp_path).values() if record["status"] == "failed"] == 2 * [
        "no needle here"
    ]


def test_what_is_the_users_to_change_is_said_before_anything_is_trained(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "run", None)
    for change, said in (
        ("length_gen.eval_len=500", "no document of corpus 'texts'"),
        ("needle.tasks=[cwe]", "cwe does not fit 1024 tokens"),
        ("needle.squad=nowhere.json", "cannot read nowhere.json"),
    ):
        code, _, err = run(study, "--set", change, "--device", "cpu", "--results-dir", tmp_path)
        assert code == 2 and said in err.splitlines()[-1] and err.splitlines()[-1].startswith("sbeval: "), err
    assert not list((tmp_path / "checkpoints").iterdir()) and not list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize(
    ("attention", "said"),
    [
        ("softmax", "has no positions of its own"),
        ("rope:theta=-1", "theta must be positive"),
        ("fire:some=1", "unknown option 'some' of attention 'fire'"),
        ("sliding_window:window=0", "window must be at least 1"),
    ],
)
@pytest.mark.parametrize("family", ["length_gen", "needle"])
def test_a_method_that_is_refused_is_so_before_a_text_is_tokenized(
    family: str, attention: str, said: str, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_training, "open_corpus", None)
    options = ("--set", f"{family}.attention=['{attention}']", "--device", "cpu", "--results-dir", tmp_path)
    code, _, err = run(study, *options)
    assert code == 2 and said in err.splitlines()[-1] and err.splitlines()[-1].startswith("sbeval: "), err


AHEAD = """
from sbeval.kernels import nope
from sbeval.kernels.nope import Options, backend_name

class Mixer(nope.Mixer):
    def forward(self, q, k, v, x, cu_seqlens=None, cache=None):
        return super().forward(q, k, v, x, cu_seqlens, cache) + SHARE * v.mean(1, keepdim=True)
"""


def test_an_own_method_that_sees_later_tokens_is_so_before_a_text_is_tokenized(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(text_training, "open_corpus", None)
    for family, share in (("length_gen", 1), ("flip_flop", 2)):
        (tmp_path / f"ahead_{family}").mkdir()
        (tmp_path / f"ahead_{family}" / "mean.py").write_text(AHEAD.replace("SHARE", str(share)))
        change = ("--set", f"{family}.attention=['rope', 'ahead_{family}.mean:qkv_bias=true']")
        for more in ((), ("--dry-run",)):
            code, _, err = run(study, *change, "--device", "cpu", "--results-dir", tmp_path / "results", *more)
            said = "the output at position 0 changes with the tokens from position 1 on, so it is not causal"
            assert code == 2
            assert err.splitlines()[-1] == f"sbeval: attention 'ahead_{family}.mean:qkv_bias=true': {said}"


def test_an_own_method_that_raises_is_not_checked_which_a_plan_says(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "one.py").write_text(AHEAD.replace("SHARE", "v[:, :, :1, :3]"))
    options = ("--device", "cpu", "--results-dir", tmp_path, "--dry-run")
    code, out, _ = run(study, "--set", "flip_flop.attention=short.one", *options)
    assert code == 0 and "attention 'short.one' is not checked for later tokens: random rows of 256 tokens raise" in out


def test_further_seeds_follow_when_the_rates_of_their_family_are_known(study: Path, tmp_path: Path) -> None:
    options = [f"mqrar.{name}={json.dumps(value)}" for name, value in RECALL.items()]
    options += ["mqrar.lrs=[1e-3, 1e9]", "mqrar.seeds=[0, 1]", "mqrar.attention=[rope]", "mqrar.check_every=6"]
    (tmp_path / "recall.yaml").write_text(
        "mqrar:\nflip_flop: {seq_len: 16, width: 8, batch: 4, steps: 4, test_rows: 20}\n"
    )
    command = (tmp_path / "recall.yaml", *(part for one in options for part in ("--set", one)), "--device", "cpu")
    code, out, _ = run(*command, "--results-dir", tmp_path)
    assert code == 1 and "1 of 5 cells failed" in out
    rows = table.read(tmp_path / "mqrar.csv")
    assert set(rows[rows["metric"] == "accuracy"][["lr", "seed"]].itertuples(index=False, name=None)) == {
        (1e-3, 0),
        (1e-3, 1),
    }


def test_a_study_is_shown_to_write_another_from(tmp_path: Path) -> None:
    code, out, _ = run("quick", "--show")
    assert code == 0
    (tmp_path / "mine.yaml").write_text(out)
    assert study_file.read(str(tmp_path / "mine.yaml")) == study_file.read("quick")
    code, _, err = run("quik", "--dry-run")
    assert code == 2 and err.startswith("sbeval: unknown study 'quik'; did you mean 'quick'? known: ")


def test_a_sweep_without_end_is_refused_at_once() -> None:
    config = dataclasses.replace(registry.task("mqrar").presets["quick"], seeds=tuple(range(20_000)))
    with pytest.raises(InputError, match=r"^mqrar: .*20,000 seeds .*cells, of at most 10,000: give several studies$"):
        studies.cells(study_file.Part(family="mqrar", preset="quick", config=config))
