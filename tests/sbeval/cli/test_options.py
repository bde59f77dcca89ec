"""Test options derived from configs; the flags of every command are frozen, so that none is lost or renamed unseen."""

import json
from pathlib import Path
from typing import Any

import typer.main
from typer.testing import CliRunner

from sbeval.cli import options
from sbeval.cli.main import app
from sbeval.config import LATER, MODEL, TASK, option

FROZEN = Path(__file__).with_name("flags.json")


def flags() -> dict[str, list[str]]:
    found = {}
    for name, command in _commands(typer.main.get_command(app)):
        found[name] = sorted(
            {flag for one in command.params for flag in (*one.opts, *one.secondary_opts)} - {"--help", "-h"}
        )
    return found


def _commands(group: Any, prefix: str = "") -> list[tuple[str, Any]]:
    inner = getattr(group, "commands", None)
    if inner is None:
        return [(prefix.strip(), group)]
    return [one for name, command in sorted(inner.items()) for one in _commands(command, f"{prefix} {name}")]


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
    assert wrong.exit_code == 2 and "'3,x' is not a valid integer" in wrong.output


def test_help_has_a_short_flag_and_the_version_is_printed() -> None:
    from sbeval import __version__

    runner = CliRunner()
    assert runner.invoke(app, ["--version"]).stdout.strip() == f"sbeval {__version__}"
    assert "Tasks" in runner.invoke(app, ["-h"]).stdout and "--kv-pairs" in runner.invoke(app, ["mqrar", "-h"]).stdout
