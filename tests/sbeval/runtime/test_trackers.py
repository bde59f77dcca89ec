"""Training curves reach every tracker that was asked for, and each run is ended."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sbeval.errors import InputError
from sbeval.runtime import trackers


class Hosted:
    """A stand-in for the module `wandb` or `trackio`: one run, its numbers, and whether it was finished."""

    def __init__(self) -> None:
        self.begun: dict[str, Any] = {}
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = False

    def init(self, **options: Any) -> Any:
        self.begun = options

        def log(numbers: dict[str, float], step: int) -> None:
            self.logged.append((step, numbers))

        def finish() -> None:
            self.finished = True

        return SimpleNamespace(log=log, finish=finish)


def test_no_tracker_is_no_logger() -> None:
    with trackers.opened((), "a") as log:
        assert log is None


def test_numbers_reach_all_trackers_and_runs_end_with_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    hosted = {name: Hosted() for name in ("wandb", "trackio")}
    for name, module in hosted.items():
        monkeypatch.setitem(sys.modules, name, module)
    with (
        pytest.raises(KeyboardInterrupt),
        trackers.opened((f"tensorboard:{tmp_path}", "wandb:recall", "trackio:recall"), "cell") as log,
    ):
        assert log
        log(10, {"loss": 1.5})
        raise KeyboardInterrupt
    assert list((tmp_path / "cell").glob("events*"))
    for module in hosted.values():
        assert module.begun == {"project": "recall", "name": "cell"} and module.logged == [(10, {"loss": 1.5})]
        assert module.finished


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("wandb", "--track wandb needs a project: wandb:NAME"),
        ("tensorboard:", "--track tensorboard needs a folder"),
        ("wandbb:x", "unknown tracker 'wandbb'; did you mean 'wandb'?"),
        ("trackio:x", "--track trackio:... needs the trackio package: pip install trackio"),
    ],
)
def test_mistakes_are_said_before_training(spec: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(InputError) as error:
        trackers.check([spec])
    assert message in str(error.value)
