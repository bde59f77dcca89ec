"""Damage every file that a command reads back, in several ways: it names the file, and its numbers stay what they were.

SBEVAL_TESTS=full damages each file in each way; otherwise each file is damaged in one.
"""

import contextlib
import io
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from sbeval.cli import main
from sbeval.data import corpus
from sbeval.tables import table
from sbeval.training.stepper import Stepper

FULL = os.environ.get("SBEVAL_TESTS") == "full"
# a checkpoint, a store of tokens, a tokenizer, prompts and answers; then a table, run files, values and curves
COMMAND = (
    "needle --device cpu --attention rope --train-len 16 --train-tokens 64 --batch-tokens 32 --tokenizer bpe:262 "
    "--corpus {inputs}/texts --essays {inputs}/essay.txt --task niah_single_2 --length 1024 --samples 2 --finetune 0"
)
SENTENCE = "This is a sentence. Here is another one! Is it? "


def _bit(content: bytes) -> bytes:
    """Change a letter or digit in the middle, or where there is none a bit."""
    middle = len(content) // 2
    places = [at for at in range(middle, len(content)) if content[at : at + 1].isalnum()]
    at = places[0] if places else middle
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "a bit": _bit,
    "cut": lambda content: content[: len(content) * 2 // 3],
    "doubled": lambda content: (
        content[: len(content) // 2] + content[: len(content) // 2] + content[len(content) // 2 :]
    ),
    "zeros": lambda content: bytes(len(content)),
    "empty": lambda content: b"",
}


@dataclass(frozen=True, slots=True)
class Place:
    """A folder with inputs, caches and results of a command that has run."""

    folder: Path
    rows: pd.DataFrame

    def run(self) -> tuple[object, str]:
        """Run the command again, as a new process would, and return its exit code and all that it says."""
        corpus._sha256.cache_clear()
        said = io.StringIO()
        words = COMMAND.format(inputs=self.folder).split()
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
            patch.setattr(sys, "argv", ["sbeval", *words, "--results-dir", str(self.folder / "results")])
            patch.setenv("XDG_CACHE_HOME", str(self.folder / "cache"))
            patch.setenv("COLUMNS", "1000")
            patch.setattr("sbeval.sweep.study.draw_figures", lambda *_, **__: [])
            patch.setattr("sbeval.runtime.device.measured_flops", lambda *_: 1e10)
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                main.main()
        return ended.value.code, said.getvalue()

    def forget(self) -> None:
        """Remove what is measured, so that it is measured again from what is stored."""
        for name in ("needle.csv", "runs", "values", "curves"):
            path = self.folder / "results" / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def measured(results: Path) -> pd.DataFrame:
    return table.read(results / "needle.csv").drop(columns=["utc", "commit"])


def inputs(folder: Path) -> Path:
    (folder / "texts").mkdir()
    for role in ("train0", "valid0", "test0"):
        (folder / "texts" / f"{role}.txt").write_text(f"{role} says this and that. " * 90)
    (folder / "essay.txt").write_text(SENTENCE * 90)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = inputs(tmp_path_factory.mktemp("whole"))
    place = Place(folder, pd.DataFrame())
    code, said = place.run()
    assert code == 0, said
    return Place(folder, measured(folder / "results"))


def files(folder: Path) -> list[Path]:
    """Return the files of ours that a command may read back, relative to the folder."""
    found = (path.relative_to(folder) for name in ("cache", "results") for path in (folder / name).rglob("*"))
    return sorted(path for path in found if (folder / path).is_file() and path.suffix != ".lock")


# what is measured, and what it is measured from
MEASURED = ("needle.csv", "runs", "values", "curves")


def test_a_command_leaves_files_of_every_kind(whole: Place) -> None:
    parts = {part for path in files(whole.folder) for part in path.parts}
    assert {*MEASURED, "checkpoints", "answers", "corpora", "tokenizers", "needle"} <= parts


@contextlib.contextmanager
def restored(folder: Path, kept: Path) -> Iterator[None]:
    """Put the folder back as it was at the end of the block: at its path, which rows and stores name."""
    shutil.copytree(folder, kept)
    try:
        yield
    finally:
        shutil.rmtree(folder)
        kept.rename(folder)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_and_changes_no_number(damage: str, whole: Place, tmp_path: Path) -> None:
    found = files(whole.folder)
    for name in found if FULL else found[list(DAMAGES).index(damage) :: len(DAMAGES)]:
        path = whole.folder / name
        content = path.read_bytes()
        if (damaged := DAMAGES[damage](content)) == content:
            continue
        with restored(whole.folder, tmp_path / "kept"):
            if not set(name.parts) & set(MEASURED):
                whole.forget()
            path.write_bytes(damaged)
            code, said = whole.run()
            check(whole, path, damaged, code, said)


def check(place: Place, path: Path, damaged: bytes, code: object, said: str) -> None:
    """Check what a command did that found a damaged file."""
    told = f"{path.relative_to(place.folder)}: exit code {code}\n{said}"
    # the file, or the cell whose file it is
    named = any(name in said for name in (str(path), path.stem))
    assert "Traceback" not in said, told
    if code != 0:
        lines = [line for line in said.splitlines() if line.startswith("sbeval: ")]
        assert code in (1, 2) and len(lines) <= 1 and named, told
        return
    rows = measured(place.folder / "results")
    # a row of which the cell's name is damaged is of no cell, and stays
    of_the_run = rows["cell"].isin(place.rows["cell"]).to_numpy()
    pd.testing.assert_frame_equal(rows[of_the_run].reset_index(drop=True), place.rows)
    # a process that is killed before its first answer leaves an empty file
    expected = path.suffix == ".sqlite" and not damaged
    assert named or expected or (of_the_run.all() and path.read_bytes() == damaged), told


def test_a_store_that_is_cut_while_a_model_trains_on_it(whole: Place, tmp_path: Path) -> None:
    """Mapped, it would end the process with SIGBUS, and without a word."""
    place, step = Place(inputs(tmp_path), whole.rows), Stepper.run

    def cutting(self: Stepper, batch: Any, number: int) -> Any:
        if number == 0:
            (store,) = (tmp_path / "cache").rglob("train.npy")
            os.truncate(store, 10)
        return step(self, batch, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stepper, "run", cutting)
        code, said = place.run()
    assert code == 2 and "Traceback" not in said, said
    assert said.splitlines()[-1].endswith(
        "train.npy was changed while it was in use: run the same command again to resume"
    )
    code, said = place.run()
    assert code == 0 and said.count("train.npy is not as it was written: ") == 1, said
    # where the text lies is a part of a cell's name
    same = [name for name in whole.rows if name not in ("corpus", "cell")]
    pd.testing.assert_frame_equal(measured(tmp_path / "results")[same], whole.rows[same])
