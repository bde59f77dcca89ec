"""Test the layout of the repository."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from sbeval import registry

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


@pytest.mark.parametrize("name", registry.ATTENTION)
def test_methods_implement_the_interface(name: str) -> None:
    method = registry.method(name)
    mixer = method.Mixer(method.Options(), heads=4, kv_heads=2, head_dim=8, width=32, scale=0.5)
    assert callable(mixer)
    assert {method.backend_name(kind) for kind in ("cpu", "cuda")} >= {"torch"}
    module = __import__(registry.ATTENTION[name], fromlist=["reference"])
    assert module.reference and module.attention and module.__doc__


@pytest.mark.parametrize("name", registry.TASKS)
def test_families_implement_the_interface(name: str) -> None:
    family = registry.task(name)
    assert name == family.name and "quick" in family.presets
    cells = family.cells(family.presets["quick"])
    assert {cell.family for cell in cells} == {name} and all(cell.flops > 0 for cell in cells)


@pytest.mark.parametrize("name", registry.FIGURES)
def test_figures_implement_the_interface(name: str) -> None:
    figure = registry.figure(name)
    assert figure.TABLE and figure.COLUMNS and callable(figure.draw) and callable(figure.chart)


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
    assert any('-c "$command"' in line for line in lines[taken:])
