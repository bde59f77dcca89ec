"""Names stand whole on a console, without markup."""

import io

import pytest
from rich.table import Table

from sbeval.runtime.console import plain


def test_a_pipe_has_whole_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    file = io.StringIO()
    grid = Table(*(f"run[{'a' * 60}{column}] :smile:" for column in range(9)), title="[b]")
    plain(file=file).print(grid)
    written = file.getvalue()
    assert all(f"run[{'a' * 60}{column}] :smile:" in written for column in range(9)) and "[b]" in written
