"""Standard streams of any kind, each in a process of its own."""

import os
import pty
import subprocess
import sys

import pytest

GUARDED = "import sys\nfrom sbeval.runtime import streams\nwith streams.guarded():\n    "
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def run(code: str, **options: object) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | ASCII
    return subprocess.run(  # type: ignore[call-overload, no-any-return]  # options of any kind
        [sys.executable, "-c", GUARDED + code], text=True, check=False, env=environment, **options
    )


def test_an_ascii_terminal_gets_signs_that_it_has() -> None:
    done = run("print('4.5 \\u00b1 0.1 \\u2026 \\u65e5 caf\\udce9')", capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "4.5 +- 0.1 ... ? caf?\n", "")


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_full_disk_names_the_stream(name: str) -> None:
    catch = f"try:\n        print('x', file=sys.{name}, flush=True)\n    except OSError as error:\n"
    with open("/dev/full", "w") as full:
        other = {"stdout": "stderr", "stderr": "stdout"}[name]
        told = f"        print(error.filename, error.strerror, file=sys.{other})"
        done = run(catch + told, **{name: full, other: subprocess.PIPE})
    said = done.stderr if name == "stdout" else done.stdout
    wanted = {"stdout": "output", "stderr": "error"}[name]
    assert (done.returncode, said) == (0, f"standard {wanted} No space left on device\n")


def test_a_terminal_that_is_gone_takes_what_is_written() -> None:
    master, slave = pty.openpty()
    writes = "    for _ in range(100): print('x' * 1000, flush=True)\n    print('done', file=sys.stderr)"
    waits = f"sys.stdin.readline()\n{writes}"
    with subprocess.Popen(
        [sys.executable, "-c", GUARDED + waits], stdin=subprocess.PIPE, stdout=slave, stderr=subprocess.PIPE, text=True
    ) as process:
        os.close(slave)
        os.close(master)
        _, said = process.communicate("\n", timeout=60)
    assert (process.returncode, said) == (0, "done\n")


def test_what_stands_for_a_stream_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    from sbeval.runtime import streams

    before = sys.stdout, sys.stderr
    with streams.guarded():
        assert (sys.stdout, sys.stderr) == before
        print("as ever")
    assert capsys.readouterr().out == "as ever\n"
