"""Names stand whole on a console, without markup."""

import io

import pytest
from rich.table import Table

from sbeval.runtime import console as module
from sbeval.runtime.console import plain


def test_a_pipe_has_whole_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    file = io.StringIO()
    grid = Table(*(f"run[{'a' * 60}{column}] :smile:" for column in range(9)), title="[b]")
    plain(file=file).print(grid)
    written = file.getvalue()
    assert all(f"run[{'a' * 60}{column}] :smile:" in written for column in range(9)) and "[b]" in written


def test_a_terminal_gets_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    console = plain(file=io.StringIO(), force_terminal=True, width=60)
    monkeypatch.setattr(module, "plain", lambda: console)
    module.print_table("Title", ("a", "b"), [("1", "[x]")])
    assert isinstance(console.file, io.StringIO)
    assert "┃" in console.file.getvalue() and "[x]" in console.file.getvalue()
