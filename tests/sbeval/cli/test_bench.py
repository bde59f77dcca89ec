"""The options of benchmarks, which need a GPU to run: what they are given, and what they refuse, in one line."""

import contextlib
import io
import sys
from pathlib import Path

import pytest

from sbeval.cli import main
from sbeval.cli.bench import Kernel, Model, Skipping


def run(*arguments: str) -> tuple[object, str]:
    err = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["sbeval", "bench", *arguments])
        with contextlib.redirect_stderr(err):
            main.main()
    return ended.value.code, err.getvalue()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("kernel --length x", "invalid value for '--length': 'x' is not an integer; see "),
        (
            "kernel --cache 8,1.5",
            "invalid value for '--cache': '1.5' is not an integer; see ",
        ),
        ("kernel --head-dim 64,0", "--head-dim must be at least 1; got 0"),
        ("kernel --heads 0", "--heads must be at least 1; got 0"),
        ("model --batch x", "invalid value for '--batch': 'x' is not an integer; see "),
        ("model --repeats -1", "--repeats must be at least 1; got -1"),
        ("skipping", "give the checkpoint folder of a stick-breaking model with --checkpoint"),
        ("skipping --length 0", "--length must be at least 1; got 0"),
        # after the options: nothing is measured on a CPU
        ("kernel --device cpu --length 8,16 --length 32", "benchmarks need a GPU; this device is cpu"),
    ],
)
def test_a_mistake_is_one_line(arguments: str, line: str, tmp_path: Path) -> None:
    code, err = run(*arguments.split(), "--results-dir", str(tmp_path))
    assert code == 2 and err.count("\n") == 1 and err.startswith(f"sbeval: {line}")
    assert not list(tmp_path.iterdir())


def test_numbers_are_separated_by_commas_or_repeated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list[object] = []
    drawn: list[object] = []

    def draw(*_: object, where: object, **__: object) -> list[Path]:
        drawn.append(where)
        return []

    monkeypatch.setattr("sbeval.runtime.device.pick", lambda name: "a card")
    monkeypatch.setattr("sbeval.runtime.device.pick_dtype", lambda name, where: "bfloat16")
    monkeypatch.setattr("sbeval.bench.problems.problems", lambda *sizes: given.append(sizes))
    monkeypatch.setattr("sbeval.bench.kernels.kernel", lambda *measured: "")
    monkeypatch.setattr("sbeval.runtime.device.describe", lambda where: f"{where}, described")
    monkeypatch.setattr("sbeval.report.figures.draw_figures", draw)
    assert run("kernel", "--length", "32,8", "--length", "16", "--results-dir", str(tmp_path)) == (0, "")
    assert given == [([8, 16, 32], (64, 128), 12, (16384, 65536))]
    # the table may have timings of other devices
    assert drawn == [["device=a card, described"]]


def test_defaults_are_allowed() -> None:
    assert Kernel().lengths == (1024, 4096, 16384, 65536) and Model().batch == 4 and Skipping().tokenizer == "bytes"
