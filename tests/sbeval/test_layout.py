"""Test the layout of the repository."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEST_COMMAND = "pip install -c constraints.txt -e '.[test]' && pytest"


@pytest.mark.parametrize("name", ["kernels", "tasks", "plots"])
def test_folders_are_linked_and_not_packages(name: str) -> None:
    link = ROOT / "sbeval" / name
    assert not (ROOT / name / "__init__.py").exists()
    # an sdist has no links: there as in a zip the package is complete once it is installed
    if (ROOT / ".git").exists():
        assert link.is_symlink() and link.readlink() == Path("..") / name
        assert link.resolve() == ROOT / name


def test_every_dependency_has_a_tested_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(item for extra in project["optional-dependencies"].values() for item in extra)]
    names = {re.split(r"[\s<>=;\[]", item)[0] for item in asked} - {"sbeval"}
    pinned = set(re.findall(r"^([\w-]+)==[\w.]+$", (ROOT / "constraints.txt").read_text(), re.M))
    assert names - pinned == set()


def test_readme_has_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert "pip install -c constraints.txt -e . && sbeval length-gen --preset quick" in text
    assert TEST_COMMAND in text


def test_ci_runs_the_test_command_of_the_readme() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = script.read_text().splitlines()
    (taken,) = (number for number, line in enumerate(lines) if line.startswith("command="))
    done = subprocess.run(
        ["bash", "-euc", f'{lines[taken]}; printf %s "$command"'], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == TEST_COMMAND
    # first what installs, then what tests
    run = [line.partition(" -c ")[2].partition(" <")[0] for line in lines[taken:] if line.startswith("bash ")]
    assert run == ['"${command% && *}"', '"${command##* && }"']
