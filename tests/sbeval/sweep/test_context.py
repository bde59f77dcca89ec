"""A model is trained by one process at a time, and what --force clears is cleared once."""

import dataclasses
import io
import pickle
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from rich.console import Console

from sbeval.errors import InputError
from sbeval.models.config import ModelConfig
from sbeval.models.decoder import Decoder
from sbeval.runtime.progress import Progress
from sbeval.sweep.context import RunContext
from sbeval.training import checkpoint


def turns(held: AbstractContextManager[object], wanted: Callable[[], AbstractContextManager[object]]) -> list[str]:
    """Hold a lock while another thread wants it, and return in what order they did their work."""
    order: list[str] = []

    def second() -> None:
        with wanted():
            order.append("second")

    with held:
        other = threading.Thread(target=second)
        other.start()
        time.sleep(0.1)
        order.append("first")
    other.join()
    return order


def test_force_empties_a_checkpoint(tmp_path: Path) -> None:
    context, progress = RunContext(results_dir=tmp_path, device=torch.device("cpu")), Progress(Console(quiet=True))
    with context.checkpoint(["key"], progress) as folder:
        folder.mkdir(parents=True)
        (folder / "config.json").touch()
    with context.checkpoint(["key"], progress) as again:
        assert again == folder and folder.exists()
    forced = dataclasses.replace(context, force=True)
    with forced.checkpoint(["key"], progress) as again:
        assert again == folder and not folder.exists()
        folder.mkdir()
    # once in a run: the copy is that of another worker
    for other in (forced, pickle.loads(pickle.dumps(forced))):
        with other.checkpoint(["key"], progress):
            assert folder.exists()
    with RunContext(results_dir=tmp_path, device=torch.device("cpu"), force=True).checkpoint(["key"], progress):
        assert not folder.exists()


def test_what_was_not_cleared_to_the_end_is_cleared_again(tmp_path: Path) -> None:
    forced = RunContext(results_dir=tmp_path, device=torch.device("cpu"), force=True)
    with pytest.raises(KeyboardInterrupt), forced.clearing(tmp_path / "answers"):
        raise KeyboardInterrupt
    for stale in (True, False):
        with forced.clearing(tmp_path / "answers") as found:
            assert found == stale


@pytest.mark.parametrize("finished", [None, False, True])
def test_a_checkpoint_is_of_one_at_a_time(
    finished: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits says so, unless the other one reads a checkpoint that is finished."""
    monkeypatch.setattr("sbeval.sweep.context.POLL_S", 0.01)
    context, console = (
        RunContext(results_dir=tmp_path, device=torch.device("cpu")),
        Console(file=io.StringIO(), width=200),
    )
    folder = context.folder(["key"])
    if finished is not None:
        model = Decoder(ModelConfig(vocab_size=8, width=4, layers=1, heads=1, hidden=4))
        checkpoint.save(folder, model, checkpoint.State(finished=finished))

    def checkpoints() -> AbstractContextManager[Path]:
        return context.checkpoint(["key"], Progress(console))

    assert turns(checkpoints(), checkpoints) == ["first", "second"]
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == ("" if finished else f"another process trains {folder}: waiting\n")


def test_a_cell_is_of_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sbeval.sweep.context.POLL_S", 0.01)
    context = RunContext(results_dir=tmp_path, device=torch.device("cpu"))
    console = Console(file=io.StringIO(), width=200)

    def cells() -> AbstractContextManager[None]:
        return context.cell("recall-rope", Progress(console))

    with context.cell("recall-nope", Progress(console)):
        assert turns(cells(), cells) == ["first", "second"]
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == "another process runs recall-rope: waiting\n"


def test_tensorboard_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    context = RunContext(results_dir=tmp_path, device=torch.device("cpu"), track=(f"tensorboard:{tmp_path}",))
    with pytest.raises(InputError, match=r"pip install 'sbeval\[tensorboard\]'"), context.logger("a"):
        pass
    with dataclasses.replace(context, track=()).logger("a") as log:
        assert log is None
