"""Test a disk that is full or becomes read-only: a one-line error, no torn file, and a resume once there is space.

The disk is a small tmpfs, which only root can mount.
"""

import contextlib
import dataclasses
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from sbeval.cli import main
from sbeval.data import corpus
from sbeval.data.tokenizer import Bytes
from sbeval.errors import InputError
from sbeval.evaluation import ruler_texts
from sbeval.evaluation.response_cache import Answers
from sbeval.evaluation.ruler_prompts import Writer
from sbeval.models.config import ModelConfig
from sbeval.models.decoder import Decoder
from sbeval.runtime import distributed, files
from sbeval.tables import provenance, store, table
from sbeval.tables.results import Results
from sbeval.tables.rows import Identity, Measurement
from sbeval.tables.store import Stored
from sbeval.tasks import drawn
from sbeval.training import checkpoint
from sbeval.training.checkpoint import State
from sbeval.training.config import TrainConfig
from sbeval.training.optimizer import optimizer_for
from sbeval.training.trainer import Trainer

RECALL = (
    *"mqrar --device cpu --vocab-size 32 --seq-len 16 --kv-pairs 2 --width 16 --batch 4 --steps 20".split(),
    *"--test-rows 12".split(),
)
NO_SPACE, READ_ONLY = "No space left on device", "Read-only file system"
FULL = os.environ.get("SBEVAL_TESTS") == "full"
PAGE = 4096


def mount(*arguments: object) -> None:
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount a small disk here: {done.stderr.strip()}")


@contextlib.contextmanager
def mounted(folder: Path, options: str = "size=4m") -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    try:
        mount("-t", "tmpfs", "-o", options, "tmpfs", folder)
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of four megabytes."""
    with mounted(tmp_path / "disk") as folder:
        yield folder


def fill(disk: Path, free: int) -> Path:
    """Fill the disk up to `free` pages."""
    ballast = disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb") as file:
        while True:
            file.write(bytes(PAGE))
            file.flush()
    with ballast.open("rb+") as file:
        file.truncate(max(0, ballast.stat().st_size // PAGE - free) * PAGE)
    return ballast


def run(*arguments: object) -> tuple[int, str]:
    """Return the exit code and the last line of stderr."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["sbeval", *map(str, arguments)])
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            main.main()
    code = ended.value.code
    assert isinstance(code, int)
    return code, said.getvalue()


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save at every validation step; figures, which need most space, have their own test."""

    class Eager(Trainer):
        def __init__(self, model: Any, config: TrainConfig, *arguments: Any, **options: Any) -> None:
            super().__init__(model, config, *arguments, **options)
            object.__setattr__(self.config, "checkpoint_seconds", 0.0)

    monkeypatch.setattr(drawn, "Trainer", Eager)
    monkeypatch.setattr("sbeval.sweep.study.draw_figures", lambda *_, **__: [])
    monkeypatch.setattr("sbeval.runtime.device.measured_flops", lambda *_: 1e10)


def rows(results: Path) -> pd.DataFrame:
    return table.read(results / "mqrar.csv").drop(columns="utc")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """Return the rows of a run with enough disk space."""
    results = tmp_path_factory.mktemp("unbroken")
    assert run(*RECALL, "--results-dir", results)[0] == 0
    return rows(results)


def assert_one_line(code: int, said: str, reason: str) -> None:
    lines = [line for line in said.splitlines() if line.startswith("sbeval: ")]
    assert code == 2 and "Traceback" not in said, said
    assert len(lines) == 1 and lines[0].startswith("sbeval: cannot write ") and reason in lines[0], said


def assert_nothing_torn(results: Path) -> None:
    """Assert that all files are readable and no partial file is left."""
    assert not list(results.rglob("*.tmp")) and not list(results.rglob("*.partial"))
    if (results / "mqrar.csv").exists():
        for cell in set(table.read(results / "mqrar.csv")["cell"]):
            provenance.read_run(results / "runs" / f"{cell}.json")
    for folder in results.glob("checkpoints/*"):
        found = checkpoint.find(folder)
        if found is not None:
            checkpoint.load_model(found)


# what is written when the disk is found full, its name, and the pages that it finds: some, but too few
WRITERS = (
    (checkpoint, "save", "checkpoints/", 1),
    (provenance, "write_run", "runs/mqrar", 0),
    (table, "keep", "", 0),
)


@pytest.mark.parametrize(("owner", "name", "file", "free"), WRITERS, ids=["checkpoint", "run", "table"])
def test_a_sweep_on_a_disk_that_fills_goes_on_when_there_is_room(
    owner: Any, name: str, file: str, free: int, disk: Path, unbroken: pd.DataFrame
) -> None:
    """Fill the disk before the first write, then before the second; then free it."""
    results, write = disk / "results", getattr(owner, name)
    for calls in (1, 2):
        left = [None] * calls

        def filling(*arguments: Any, left: list[None] = left) -> None:
            left.pop()
            if not left:
                fill(disk, free)
            write(*arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, filling)
            code, said = run(*RECALL, "--results-dir", results)
        assert_one_line(code, said, NO_SPACE)
        assert f"cannot write {results}/{file}" in said
        (disk / "ballast").unlink()
        assert_nothing_torn(results)
    assert run(*RECALL, "--results-dir", results)[0] == 0
    pd.testing.assert_frame_equal(rows(results), unbroken, check_exact=True)


def test_results_that_become_read_only_in_the_middle(
    disk: Path, unbroken: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Any] = []
    keep = store.keep

    def protecting(*arguments: Any) -> None:
        if kept:
            mount("-o", "remount,ro", disk)
        kept.append(arguments)
        keep(*arguments)

    monkeypatch.setattr(store, "keep", protecting)
    results = disk / "results"
    code, said = run(*RECALL, "--results-dir", results)
    assert_one_line(code, said, READ_ONLY)
    assert len(kept) == 2 and table.read(results / "mqrar.csv")["cell"].nunique() == 1
    # while it is so
    code, said = run(*RECALL, "--results-dir", results)
    assert code == 2 and "cannot write to the results folder" in said
    monkeypatch.undo()
    mount("-o", "remount,rw", disk)
    assert_nothing_torn(results)
    assert run(*RECALL, "--results-dir", results)[0] == 0
    pd.testing.assert_frame_equal(rows(results), unbroken, check_exact=True)


def model_and_optimizer() -> tuple[Decoder, torch.optim.Optimizer]:
    model = Decoder(ModelConfig(vocab_size=64, width=64, layers=2, heads=2, hidden=96))
    optimizer = optimizer_for(model, TrainConfig(steps=1, batch=1, length=8, lr=0.1))
    model.loss(torch.arange(8)[None], torch.arange(8)[None]).backward()
    optimizer.step()
    return model, optimizer


def save(path: Path) -> None:
    model, optimizer = model_and_optimizer()
    checkpoint.save(path, model, State(losses=[1.0]), optimizer)


def save_sharded(path: Path) -> None:
    model, optimizer = model_and_optimizer()
    checkpoint.save_sharded(path, model, State(losses=[1.0]), optimizer, distributed.ALONE)


def tokenize(path: Path) -> None:
    corpus.open(str(path.parents[1] / "texts"), tokenizer="bytes", cache_dir=path)


def train_tokenizer(path: Path) -> None:
    corpus.open(str(path.parents[1] / "texts"), tokenizer="bpe:260", cache_dir=path)


def answer(path: Path) -> None:
    file = Answers(path / "answers.sqlite")
    try:
        for number in range(200):
            file.keep({bytes([number]): "x" * 10_000})
    finally:
        file.close()


def draw(path: Path) -> None:
    import matplotlib.pyplot as plt

    figure = plt.figure()
    try:
        figure.text(0.5, 0.5, "all that fits")
        for suffix in ("png", "pdf"):
            with files.replacing(path.with_suffix(f".{suffix}")) as temporary:
                figure.savefig(temporary, format=suffix, dpi=1000)
    finally:
        plt.close(figure)


def prompt(path: Path) -> None:
    pytest.importorskip("wonderwords")
    sources = ruler_texts.load(None, None, None)
    Writer(Bytes(), sources, path).prompts("niah_single_1", 4096, 0, 3)


def keep_rows(path: Path) -> None:
    origin = provenance.collect(
        cell="a", preset="", corpus="", tokenizer="", train_tokens=0, dtype="float32", device="cpu", backend="torch"
    )
    identity = Identity(
        family="toy", task="t", model="m", attention="rope", options="", params=1, train_len=1, eval_len=1, seed=0
    )
    for cell in ("a", "b"):
        measured = [Measurement(metric=f"m{index}", unit="1", value=0.5, n=4) for index in range(40)]
        rows = table.frame(identity, measured, dataclasses.replace(origin, cell=cell))
        values = pd.DataFrame({"metric": "correct", "unit_id": "1", "value": [1.0]})
        curves = {"loss": [(step, 0.5) for step in range(2000)]}
        store.keep(Results(path), "toy", Stored(cell, {"status": "finished"}, rows, values, curves))
    table.assemble(Results(path).table("toy"))


WRITES = [save, save_sharded, tokenize, train_tokenizer, answer, draw, prompt, keep_rows]


@pytest.fixture
def texts_beside(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in ("train", "test"):
        (texts / f"{name}.txt").write_text("of which there is much " * 2000)


def assert_refused(write: Callable[[Path], None], disk: Path) -> bool:
    """Write, and return whether there was room; where not, that is one line, and what failed leaves room for others."""
    try:
        write(disk / "place")
        return True
    except InputError as error:
        pattern = r"cannot write [^\n]*; (what is finished is|earlier answers are) kept: fix this [^\n]*"
        assert re.fullmatch(pattern, str(error)), error
    assert not [path for path in disk.rglob("*") if path.suffix in (".tmp", ".partial", ".unfinished")]
    return False


@pytest.mark.usefixtures("texts_beside")
@pytest.mark.parametrize("write", WRITES)
def test_everything_that_is_written_says_that_the_disk_is_full(write: Callable[[Path], None], tmp_path: Path) -> None:
    """Wherever it fills: with no page left, with one, and so on, until all fits."""
    rooms = (*range(12), *range(12, 80, 4), 960) if FULL else (0, 1, 3, 6, 960)
    found = []
    for free in rooms:
        with mounted(tmp_path / "disk") as disk:
            ballast = fill(disk, free)
            found.append(assert_refused(write, disk))
            ballast.unlink()
            # what is there is whole, and is gone on with
            assert write is draw or assert_refused(write, disk)
    assert not found[0] and found == sorted(found)


@pytest.mark.usefixtures("texts_beside")
@pytest.mark.parametrize("write", WRITES)
def test_a_disk_that_takes_no_further_file_is_full(write: Callable[[Path], None], tmp_path: Path) -> None:
    """As of a quota of files: each file and folder in turn is the first for which there is no room."""
    found = []
    # the root is one
    for files_ in range(1, 40) if FULL else (1, 2, 4, 7, 39):
        with mounted(tmp_path / "disk", f"size=8m,nr_inodes={files_}") as disk:
            found.append(assert_refused(write, disk))
    assert not found[0] and found[-1] and found == sorted(found)
