"""Tables in Markdown, and names in Markdown and LaTeX as they are read there: nothing in a name is markup."""

import re
from collections.abc import Iterable, Sequence

LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", **{sign: f"\\{sign}" for sign in "_%&#${}"},
}  # fmt: skip
# an underscore inside a word is none of emphasis
MARKDOWN = re.compile(r"[\\`*\[\]<>|$~]|(?<![^\W_])_|_(?![^\W_])")


def latex(text: str) -> str:
    """Return a text as LaTeX."""
    return "".join(LATEX.get(sign, sign) for sign in text)


def markdown(text: str) -> str:
    """Return a text as Markdown, in a cell of a table too."""
    return MARKDOWN.sub(lambda found: f"\\{found.group()}", text)


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown, without the end of its last line; cells are Markdown already."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
