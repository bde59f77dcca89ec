"""Names are read as they are in Markdown, LaTeX, terminals and figures."""

import io

import pytest
from rich.table import Table

from sbeval.runtime.console import plain
from sbeval.tables import markup


@pytest.mark.parametrize(
    "text, markdown, latex",
    [
        ("arc_easy (0) acc_norm", "arc_easy (0) acc_norm", r"arc\_easy (0) acc\_norm"),
        ("run[a]", r"run\[a\]", "run[a]"),
        ("a|b*c", r"a\|b\*c", r"a\textbar{}b*c"),
        ("$x^2$ & 50 %", r"\$x^2\$ & 50 %", r"\$x\textasciicircum{}2\$ \& 50 \%"),
        ("_a_ {b} #1 ~", r"\_a\_ {b} #1 \~", r"\_a\_ \{b\} \#1 \textasciitilde{}"),
        ("a\\b<c>", r"a\\b\<c\>", r"a\textbackslash{}b\textless{}c\textgreater{}"),
    ],
)
def test_names_are_no_markup(text: str, markdown: str, latex: str) -> None:
    assert markup.markdown(text) == markdown
    assert markup.latex(text) == latex


def test_a_pipe_has_whole_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    file = io.StringIO()
    grid = Table(*(f"run[{'a' * 60}{column}] :smile:" for column in range(9)), title="[b]")
    plain(file=file).print(grid)
    written = file.getvalue()
    assert all(f"run[{'a' * 60}{column}] :smile:" in written for column in range(9)) and "[b]" in written
