"""Commands are killed (SIGKILL) at random moments and given again: no row is lost, doubled or torn, and the end is that
of an unbroken run.

SBEVAL_TESTS=full kills each command 50 times instead of 2. A process that has imported everything forks a child for
each command, so that a kill costs no import; what needs no disk (timing a matrix product, figures) is left out.
"""

import contextlib
import json
import os
import random
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from filelock import FileLock

from sbeval.models.decoder import Decoder
from sbeval.runtime import files
from sbeval.tables import provenance, table
from sbeval.training import checkpoint
from sbeval.training.config import TrainConfig
from sbeval.training.optimizer import optimizer_for
from sbeval.training.trainer import Trainer

FULL = os.environ.get("SBEVAL_TESTS") == "full"
KILLS = 50 if FULL else 2
RECALL = (
    "mqrar --device cpu --vocab-size 32 --seq-len 16 --kv-pairs 2 --width 16 --batch 4 --steps 20 --test-rows 12 "
    "--lr 3e-3"
)
TRAIN = (
    "train --device cpu --attention stick_breaking --attention rope --train-len 16 --train-tokens 800 "
    "--batch-tokens 32 --corpus {texts}"
)
TRAIN_ONE = TRAIN.replace("--attention rope ", "")
NEEDLE = (
    "needle --device cpu --checkpoint {model} --tokenizer bytes --finetune 0 --task niah_single_1 --samples 3 "
    "--length 640"
)
# one that is fine-tuned until solved
TUNED = (
    "needle --preset quick --device cpu --attention rope --corpus {texts} --tokenizer bytes --train-len 640 "
    "--train-tokens 640 --batch-tokens 640 --finetune 3840 --finetune-prompts 6 --finetune-lr 1e-3 --finetune-lr 3e-3 "
    "--task niah_single_1 --samples 2 --length 640"
)
# columns of when and on what
WHEN = ["utc", "device", "commit"]


class Forks:
    """The process that forks, and the results of its commands."""

    def __init__(self, process: "subprocess.Popen[str]", log: Path) -> None:
        self.process, self.log = process, log

    def run(self, command: str, results: Path, meanwhile: Callable[[int], None] = lambda child: None) -> int:
        """Return the exit code of a command; `meanwhile` is called with its process id."""
        assert self.process.stdin is not None and self.process.stdout is not None
        words = [*shlex.split(command), "--results-dir", str(results)]
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()
        meanwhile(int(self.process.stdout.readline()))
        return int(self.process.stdout.readline())

    def finish(self, command: str, results: Path) -> float:
        """Run a command to completion and return its seconds."""
        start = time.perf_counter()
        assert self.run(command, results) == 0, self.log.read_text()
        return time.perf_counter() - start


def kill(delay: float, child: int) -> None:
    time.sleep(delay)
    # it may have come to its end
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    folder = tmp_path_factory.mktemp("forks")
    # sums depend on the number of threads, and one is enough here
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, __file__, str(folder / "log")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stdin is not None
        yield Forks(process, folder / "log")
        process.stdin.close()


@pytest.fixture(scope="module")
def model(forks: Forks, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder."""
    results = tmp_path_factory.mktemp("model")
    forks.finish(TRAIN_ONE.format(texts=texts), results)
    (folder,) = (path for path in (results / "checkpoints").iterdir() if path.is_dir())
    return folder


def rows(results: Path, family: str) -> pd.DataFrame:
    """Return the table without times, or nothing if it does not exist. A torn table is an error."""
    path = results / f"{family}.csv"
    return table.read(path).drop(columns=WHEN) if path.exists() else pd.DataFrame({"cell": []})


def assert_whole(results: Path, family: str, expected: pd.DataFrame, before: set[str]) -> set[str]:
    """Assert that finished cells have all rows once and a run file, and no checkpoint is torn; return the cells."""
    found = rows(results, family)
    cells = set(found["cell"])
    assert before <= cells
    if cells:
        pd.testing.assert_frame_equal(found, expected[expected["cell"].isin(cells)].reset_index(drop=True))
    for cell in cells:
        assert provenance.read_run(results / "runs" / f"{cell}.json")["status"] == "finished"
    for folder in checkpoints(results):
        state = checkpoint.load_state(folder)
        decoder: Decoder = checkpoint.load_model(folder)
        if not state.finished:
            config = TrainConfig(steps=1, batch=1, length=1, lr=1.0)
            checkpoint.restore(folder, decoder, optimizer_for(decoder, config))
    return cells


def checkpoints(results: Path) -> list[Path]:
    names = {path.name for path in (results / "checkpoints").glob("[!.]*") if path.is_dir()}
    names |= {path.name[1:].removesuffix(".old") for path in (results / "checkpoints").glob(".*.old")}
    found = [checkpoint.find(results / "checkpoints" / name) for name in names]
    return [folder for folder in found if folder is not None]


def responses(results: Path) -> list[tuple[bytes, bytes]]:
    """Return the stored responses of models, of which there are none while there is no file."""
    stored: list[tuple[bytes, bytes]] = []
    for path in results.glob("answers/*.sqlite"):
        with contextlib.suppress(sqlite3.OperationalError), contextlib.closing(sqlite3.connect(path)) as file:
            stored += file.execute("SELECT key, answer FROM responses ORDER BY key").fetchall()
    return stored


def left(results: Path) -> dict[str, Any]:
    """Return all results of a finished command except times: weights, losses, responses, numbers."""
    # the folder of a fine-tuned model is named by the whole checkpoint that it began with, times included
    weights = sorted(path.read_bytes() for path in results.rglob("model.safetensors"))
    losses = sorted(checkpoint.load_state(path).losses for path in checkpoints(results))
    answers = responses(results)
    folders = sum(path.is_dir() for path in results.glob("checkpoints/*"))
    return {"weights": weights, "losses": losses, "answers": answers, "folders": folders}


@pytest.mark.parametrize(
    ("family", "command"),
    [
        ("mqrar", RECALL),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (("train", TRAIN), ("needle", NEEDLE), ("needle", TUNED))
        ),
    ],
)
def test_a_command_killed_at_random_moments_ends_as_if_unbroken(
    family: str, command: str, forks: Forks, texts: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    command = command.format(texts=texts, model=request.getfixturevalue("model") if "{model}" in command else "")
    unbroken = tmp_path / "unbroken"
    # the first run imports, tokenizes and writes prompts
    forks.finish(command, tmp_path / "first")
    seconds = forks.finish(command, unbroken)
    expected, moments = rows(unbroken, family), random.Random(family)
    kills = rounds = 0
    while kills < KILLS:
        results, cells, code = tmp_path / f"{rounds}", set[str](), -1
        while code != 0:
            delay = moments.uniform(0, seconds / 2)
            code = forks.run(command, results, *([partial(kill, delay)] if kills < KILLS else []))
            assert code in (0, -signal.SIGKILL), forks.log.read_text()
            kills += code != 0
            cells = assert_whole(results, family, expected, cells)
        pd.testing.assert_frame_equal(rows(results, family), expected, check_exact=True)
        assert left(results) == left(unbroken)
        rounds += 1
    print(f"{family}: {seconds:.1f} s, {kills} kills over {rounds} results")


@pytest.fixture(scope="module")
def answered(forks: Forks, model: Path, tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """Return the rows of an uninterrupted evaluation."""
    results = tmp_path_factory.mktemp("answered")
    forks.finish(NEEDLE.format(model=model), results)
    return rows(results, "needle")


@pytest.mark.parametrize("sent", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_an_evaluation_that_is_told_to_stop_says_how_to_go_on(
    sent: signal.Signals, forks: Forks, model: Path, answered: pd.DataFrame, tmp_path: Path
) -> None:
    command, results = NEEDLE.format(model=model), tmp_path / "stopped"

    def stop(child: int) -> None:
        deadline = time.monotonic() + 60
        while not responses(results) and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(child, sent)

    assert forks.run(command, results, stop) == 130
    said = forks.log.read_text()
    stopped = "sbeval: interrupted; finished work is kept, and the same command resumes"
    assert said.splitlines()[-1] == stopped and "Traceback" not in said, said
    assert not (results / "needle.csv").exists()
    before = responses(results)
    forks.finish(command, results)
    # what was answered is not asked again
    assert set(before) <= set(responses(results))
    pd.testing.assert_frame_equal(rows(results, "needle"), answered, check_exact=True)


def test_a_command_waits_for_a_model_that_another_process_trains(
    forks: Forks, texts: Path, model: Path, tmp_path: Path
) -> None:
    """Here the other process is the test; `model` was trained by the same command."""
    lock = FileLock(files.prepare(tmp_path / "locks") / f"{model.name}.lock")
    lock.acquire()

    def release(child: int) -> None:
        deadline = time.monotonic() + 60
        while "waiting" not in forks.log.read_text() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not (tmp_path / "checkpoints" / model.name).exists()
        lock.release()

    assert forks.run(TRAIN_ONE.format(texts=texts), tmp_path, release) == 0
    folder = tmp_path / "checkpoints" / model.name
    assert f"another process trains {folder}: waiting" in forks.log.read_text().splitlines()
    assert (folder / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


class Eager(Trainer):
    """Save at every validation step."""

    def __init__(self, model: Any, config: TrainConfig, *arguments: Any, **options: Any) -> None:
        super().__init__(model, config, *arguments, **options)
        object.__setattr__(self.config, "checkpoint_seconds", 0.0)


def serve(log: Path) -> None:
    """Fork a child for each command on standard input; print its process id, then its exit code."""
    import torch._dynamo  # noqa: F401  # commands import this, and all below, when they run

    from sbeval import registry
    from sbeval.cli import main as cli
    from sbeval.report import figures
    from sbeval.runtime import device
    from sbeval.tasks import drawn, needle
    from sbeval.training import trainer

    for figure in registry.FIGURES:
        registry.figure(figure)
    registry.task("mqrar")
    device.measured_flops = lambda *_: 1e10
    figures.draw_figures = lambda *_, **__: []
    for module in (trainer, drawn):
        vars(module)["Trainer"] = Eager
    # an answer a batch
    needle.BATCH_TOKENS["cpu"] = 1
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            with log.open("w") as said:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
                sys.argv = ["sbeval", *json.loads(line)]
                os._exit(_code(cli.main))
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _code(main: Any) -> int:
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
        return 99
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


@pytest.mark.slow
def test_a_ray_driver_that_is_killed_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    seeds = " ".join(f"--seed {seed}" for seed in range(3))
    command = f"{RECALL} --attention rope --steps 300 {seeds} --executor ray --workers 2 --results-dir {tmp_path}"
    words = [sys.executable, "-m", "sbeval", *shlex.split(command)]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL) as driver:
        deadline = time.monotonic() + 120
        while not (tmp_path / "mqrar.csv").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        driver.kill()
    before = set(rows(tmp_path, "mqrar")["cell"])
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    found = table.read(tmp_path / "mqrar.csv")
    cells = {path.stem for path in (tmp_path / "runs").iterdir()}
    assert before and before <= cells == set(found["cell"]) and len(cells) == 3
    assert len(found[found["metric"] == "solved"]) == 3


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
