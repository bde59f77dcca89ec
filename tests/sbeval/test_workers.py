"""Test that the cells of every family give the same rows in two processes as in one."""

import contextlib
import io
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Self

import pandas as pd
import pytest
import torch

from sbeval.cli import main
from sbeval.sweep import study
from sbeval.tables import table

pytestmark = pytest.mark.usefixtures("home")
# a family's command: as few steps as make a row, and more than one cell
MODELS = (
    "--tokenizer bytes --train-len 16 --train-tokens 128 --batch-tokens 32 --corpus {texts} --attention rope "
    "--attention alibi"
)
RECALL = "--vocab-size 32 --seq-len 24 --width 16 --batch 4 --steps 4 --test-rows 30"
COMMANDS = {
    "length-gen": f"{MODELS} --eval-len 64 --documents 3",
    "needle": f"{MODELS} --task niah_single_1 --length 1024 --samples 1 --finetune 0 --essays {{essay}}",
    # both benchmarks of each model need its training, which is not done twice
    "few-shot": f"{MODELS} --data-dir {{items}} --task copa --task arc_easy:0 --limit 4",
    "mqrar": f"{RECALL} --kv-pairs 2 --kv-pairs 4 --attention rope",
    "attention-map": f"{RECALL} --kv-pairs 6",
    "flip-flop": "--seq-len 16 --width 8 --batch 4 --steps 4 --test-rows 20",
    "run": "{study}",
}


def run(*arguments: object) -> tuple[Any, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["sbeval", *map(str, arguments)])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main.main()
    return ended.value.code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def files(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Inputs of the commands."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "essay.txt").write_text("This is a sentence. Here is another one! Is it? " * 30)
    (folder / "items").mkdir()
    copa = [{"context": f"I saw {n} birds because", "choices": ["of it.", "of us."], "gold": n % 2} for n in range(6)]
    easy = [{"question": f"What is {n}?", "choices": ["a", "number", "no"], "gold": 1} for n in range(6)]
    for stem, rows in (("copa_val", copa), ("arc_easy_test", easy)):
        (folder / "items" / f"{stem}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tiny.yaml").write_text(
        f"models: {{attention: [rope], train_len: 16, train_tokens: 128, batch_tokens: 32, corpus: {texts}}}\n"
        "length_gen: {eval_len: 64, documents: 3}\n"
        f"few_shot: {{tasks: [copa], suites: [], data_dir: {folder / 'items'}, eval_len: 64}}\n"
    )
    return {
        "texts": texts,
        "essay": folder / "essay.txt",
        "items": folder / "items",
        "study": folder / "tiny.yaml",
    }


# where one command of several is enough
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("mqrar", "flip-flop", "run")]


@pytest.mark.parametrize("family", ["length-gen", "needle", "few-shot", "attention-map", *SLOW])
def test_two_workers_leave_what_one_process_leaves(
    family: str, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "draw_figures", lambda *_, **__: [])
    command = (family, *COMMANDS[family].format(**files).split(), "--device", "cpu")
    found: list[pd.DataFrame] = []
    for name, workers in (("alone", ()), ("together", ("--workers", 2))):
        code, out, err = run(*command, *workers, "--results-dir", tmp_path / name)
        assert code == 0, (out, err)
        tables = [table.read(path) for path in sorted((tmp_path / name).glob("*.csv"))]
        found.append(pd.concat(tables).drop(columns="utc").reset_index(drop=True))
    assert len(set(found[0]["cell"])) > 1
    pd.testing.assert_frame_equal(found[0], found[1], check_exact=True)
    # what several cells need is trained once, and shown as it would be alone
    trained = [path.parent.name for path in (tmp_path / "alone").glob("checkpoints/[!.]*/config.json")]
    assert err.count("cells: 100 %") == 1 and len(trained) == sum(
        line.startswith("train ") and ": 100 %" in line for line in err.splitlines()
    )
    assert "another process trains" not in err


@pytest.fixture
def how(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Record how the study would run, instead of running it."""
    found: list[Any] = []

    def note(parts: Any, place: Any, console: Any, how: Any) -> bool:
        found.append(how)
        return True

    monkeypatch.setattr(study, "run", note)
    return found


@pytest.mark.parametrize("family", COMMANDS)
def test_every_family_takes_an_executor(family: str, files: dict[str, Path], how: list[Any], tmp_path: Path) -> None:
    ray = ("--executor", "ray", "--address", "host:6379", "--gpus-per-cell", 0.25)
    command = (family, *COMMANDS[family].format(**files).split(), "--device", "cpu", "--results-dir", tmp_path)
    assert run(*command, *ray)[0] == 0
    assert (how[0].kind, how[0].address, how[0].gpus_per_cell) == ("ray", "host:6379", 0.25)
    code, _, err = run(*command, "--gpus-per-cell", 1)
    assert code == 2 and err == "sbeval: --address and --gpus-per-cell are for --executor ray\n"


@pytest.mark.parametrize("options", ["--workers 2", "--executor ray"])
def test_processes_of_torchrun_start_no_others(options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = run("length-gen", "--device", "cpu", *options.split(), "--results-dir", tmp_path)
    assert code == 2 and err == (
        "sbeval: --workers and --executor ray start their own processes: leave them out, or start without torchrun\n"
    )


def test_workers_save_what_they_train_when_their_driver_is_killed(tmp_path: Path) -> None:
    options = "--kv-pairs 2 --kv-pairs 4 --attention rope --steps 1000000 --patience 0 --stop-accuracy 1.1"
    command = f"mqrar {RECALL.replace('--steps 4 ', '')} {options} --device cpu --workers 2 --results-dir {tmp_path}"
    words, shown = [sys.executable, "-m", "sbeval", *command.split()], ""
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as driver:
        assert driver.stderr is not None
        # both are at work
        while not all(f"train rope {pairs} pairs" in shown for pairs in (2, 4)):
            shown += (line := driver.stderr.readline())
            assert line, shown
        driver.kill()
        # workers have it open too
        driver.stderr.read()
    saved = [json.loads(path.read_text()) for path in tmp_path.glob("checkpoints/*/config.json")]
    assert len(saved) == 2 and all(state["state"]["losses"] for state in saved)


GPUS = torch.cuda.device_count()
# an empty process on a GPU holds more
AT_WORK = 200 << 20


class Watch:
    """The most memory that each GPU gave away while the block ran, in bytes."""

    def __enter__(self) -> Self:
        self._before = [torch.cuda.mem_get_info(card)[0] for card in range(GPUS)]
        self.taken = [0] * GPUS
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._over.wait(0.1):
            now = [torch.cuda.mem_get_info(card)[0] for card in range(GPUS)]
            self.taken = [max(*pair) for pair in zip(self.taken, map(int.__sub__, self._before, now), strict=True)]

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()


@pytest.mark.skipif(GPUS < 2, reason="needs several GPUs")
@pytest.mark.parametrize(("device", "each"), [("cuda", 2), ("cuda:1", 1)])
def test_a_sweep_is_at_work_on_every_gpu_unless_it_is_put_on_one(device: str, each: int, tmp_path: Path) -> None:
    seeds = [word for seed in range(each * GPUS) for word in ("--seed", seed)]
    command = ("mqrar", *RECALL.replace("--steps 4 ", "--steps 200 ").split(), "--kv-pairs", 4, *seeds, "--patience", 0)
    try:
        with Watch() as watch:
            # one rate: all seeds but the first begin when that is known
            code, out, err = run(
                *command,
                "--attention",
                "stick_breaking",
                "--attention",
                "rope",
                "--device",
                device,
                "--workers",
                each * GPUS,
                "--results-dir",
                tmp_path,
            )
    finally:
        # the driver is this process
        torch.cuda.set_device(0)
    assert code == 0, (out, err)
    assert len(set(table.read(tmp_path / "mqrar.csv")["cell"])) == 2 * each * GPUS
    busy = [taken > AT_WORK for taken in watch.taken]
    assert busy == [device == "cuda" or card == 1 for card in range(GPUS)], watch.taken
