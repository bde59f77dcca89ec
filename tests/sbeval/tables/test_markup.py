"""Names are read as they are in Markdown and LaTeX, and tables have a line of their columns."""

import pytest

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


def test_a_table_has_its_headings_and_a_line_for_each_row() -> None:
    assert markup.table(("a", "b"), [("1", "2"), ("", "4")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n|  | 4 |"
