"""Test options derived from configs; the flags of every command are frozen, so that none is lost or renamed unseen."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import typer.main
from typer.core import TyperGroup
from typer.testing import CliRunner

from sbeval.cli import options
from sbeval.cli.main import app
from sbeval.config import LATER, MODEL, TASK, option
from sbeval.sweep import study_file

FROZEN = Path(__file__).with_name("flags.json")


def flags() -> dict[str, list[str]]:
    found = {}
    for name, command in _commands(typer.main.get_command(app)):
        found[name] = sorted(
            {flag for one in command.params for flag in (*one.opts, *one.secondary_opts)} - {"--help", "-h"}
        )
    return found


def _commands(group: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(group, TyperGroup):
        return [(prefix.strip(), group)]
    context = typer.Context(group)
    commands = {name: group.resolve_command(context, [name])[1] for name in sorted(group.commands)}
    return [one for name, command in commands.items() for one in _commands(command, f"{prefix} {name}")]


def test_flags_are_those_of_the_committed_list() -> None:
    """If a change is intended, rewrite the list: json.dumps(flags(), indent=1)."""
    assert flags() == json.loads(FROZEN.read_text())


def test_fields_with_help_become_options_and_only_what_is_given_is_passed_on() -> None:
    import dataclasses

    @dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        sizes: tuple[int, ...] = option((1, 2), MODEL, "Sizes.", flag="--size")
        rate: float | None = option(None, MODEL, "Rate.", LATER)
        exact: bool = option(True, TASK, "Exact.")
        hidden: int = 3

    given: list[tuple[options.Common, dict[str, Any]]] = []
    toy = typer.Typer()
    presets = {"quick": Config(), "small": Config(sizes=(8,)), "paper": Config(sizes=(8,), rate=0.5)}
    options.command(
        toy, "toy", Config, presets, options.Common, lambda *both: given.append(both), help="A toy.", panel="Tasks"
    )
    runner = CliRunner()
    assert runner.invoke(toy, ["--size", "3", "--size", "4", "--no-exact", "--force"]).exit_code == 0
    ((common, options_given),) = given
    assert options_given == {"sizes": (3, 4), "exact": False} and common.force and common.preset is None
    text = " ".join(runner.invoke(toy, ["--help"], env={"COLUMNS": "200"}).stdout.split())
    assert "Sizes. Repeat for several. [default: 8; quick: 1, 2]" in text and "Rate. [paper: 0.5]" in text
    assert "Exact. [default: yes]" in text and "hidden" not in text
    assert text.index("Task") < text.index("Model") < text.index("Run")
    assert runner.invoke(toy, ["--hidden", "1"]).exit_code == 2
    # numbers may be separated by commas
    assert runner.invoke(toy, ["--size", "3,4", "--size", "5"]).exit_code == 0
    assert given[-1][1] == {"sizes": (3, 4, 5)}
    wrong = runner.invoke(toy, ["--size", "3,x"])
    assert wrong.exit_code == 2 and "'x' is not an integer" in wrong.output


def test_help_has_a_short_flag_and_the_version_is_printed() -> None:
    from sbeval import __version__

    runner = CliRunner()
    assert runner.invoke(app, ["--version"]).stdout.strip() == f"sbeval {__version__}"
    assert "Tasks" in runner.invoke(app, ["-h"]).stdout and "--kv-pairs" in runner.invoke(app, ["mqrar", "-h"]).stdout


def test_commands_are_built_when_they_are_called_or_completed() -> None:
    built: list[str] = []
    toy = typer.Typer(cls=options.Commands)

    def add(alone: typer.Typer) -> None:
        def work(size: int = 1) -> None:
            print(f"size {size}")

        built.append("work")
        alone.command("work", help="A toy.")(work)

    options.later(toy, "work", add, help="A toy.", panel="Tasks")
    toy.command("other")(lambda: None)
    runner = CliRunner()
    assert "A toy." in runner.invoke(toy, ["--help"]).stdout and runner.invoke(toy, ["other"]).exit_code == 0
    wrong = runner.invoke(toy, ["wrok"])
    assert wrong.exit_code == 2 and "Did you mean 'work'?" in wrong.output and not built
    assert runner.invoke(toy, ["work", "--size", "3"]).stdout == "size 3\n"
    assert "--size" in runner.invoke(toy, ["work", "--help"]).stdout
    completed = {"_ROOT_COMPLETE": "complete_bash", "COMP_WORDS": "root work --si", "COMP_CWORD": "2"}
    assert runner.invoke(toy, [], prog_name="root", env=completed).stdout == "--size\n"


def test_help_of_all_commands_imports_no_family() -> None:
    script = """
import sys
from sbeval.cli import main as cli
sys.argv = ["sbeval", "--help"]
try:
    cli.main()
except SystemExit:
    print([name for name in sys.modules if name.startswith(("sbeval.tasks", "sbeval.training", "sbeval.models"))])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    *text, last = done.stdout.splitlines()
    assert last == "[]" and any("Multi-query repeated" in line for line in text)


def test_help_of_run_lists_the_studies() -> None:
    text = " ".join(CliRunner().invoke(app, ["run", "--help"], env={"COLUMNS": "200"}).stdout.split())
    for name, line in study_file.summaries().items():
        assert f"{name}: {line}" in text
