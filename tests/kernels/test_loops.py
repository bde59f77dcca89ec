"""Loops of Triton and Gluon kernels carry every variable that they change.

Triton finds these by comparing a variable before and after one turn. Of two names for one value it sees no change where
a turn hands one on to the other, and the second name keeps its first value for ever:

    older = newer = 0
    while ...:
        older = newer
        newer = ...
"""

import ast
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"


def aliases(source: str) -> list[str]:
    """Return the assignments in kernels that make two names of one value before a loop that changes both."""
    found = []
    for kernel in ast.walk(ast.parse(source)):
        if not isinstance(kernel, ast.FunctionDef) or not any("jit" in ast.unparse(x) for x in kernel.decorator_list):
            continue
        loops = [node for node in ast.walk(kernel) if isinstance(node, ast.For | ast.While)]
        for node in ast.walk(kernel):
            if isinstance(node, ast.Assign) and (isinstance(node.value, ast.Name) or len(node.targets) > 1):
                names = {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
                if any(node.lineno < loop.lineno and len(names & _changed(loop)) > 1 for loop in loops):
                    found.append(f"{kernel.name}, line {node.lineno}: {ast.unparse(node)}")
    return found


def _changed(loop: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(loop) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.py")), ids=lambda path: path.name)
def test_no_variable_of_a_loop_is_an_alias(path: Path) -> None:
    assert aliases(path.read_text()) == []


KERNEL = """
@gluon.jit
def kernel(X, n):
    newer = n * 0
    {older}
    while n > 0:
        store(X, older)
        older = newer
        newer = load(X)
        n -= 1
"""


@pytest.mark.parametrize(
    ("older", "found"),
    [("older = newer", ["kernel, line 5: older = newer"]), ("older = last = newer", 1), ("older = n * 0", [])],
)
def test_aliases_are_found(older: str, found: list[str] | int) -> None:
    names = aliases(KERNEL.format(older=older))
    assert names == found if isinstance(found, list) else len(names) == found
