"""The source of Python itself as text: the standard library, and the distributions that sbeval is installed with.

Both are present wherever sbeval runs, so that a first command needs neither a download nor a path. Files of the
distributions are those that their RECORD lists. Left out are

    tests              files in folders of tests, test_*.py, *_test.py, conftest.py
    generated files    those whose first lines say so, files of versions, and tables: files with few letters
    copies             a file of which more than half, in runs of three lines, stands in files before it
    licence headers    the comment at the top of a file where it speaks of a licence or a copyright

Copies are searched in the order test, valid, train, so that no file that is tested has a near copy in another split.
"""

import os
import platform
import re
import string
import sysconfig
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

Role = Literal["train", "valid", "test"]

# what `pip install sbeval` brings on every platform without extras: with the same versions of these and of Python it is
# the same text everywhere. A split is made of distributions that share no code with those of another.
DISTRIBUTIONS: dict[Role, tuple[str, ...]] = {
    "test": ("matplotlib", "networkx", "fonttools", "seaborn"),
    "valid": ("huggingface-hub", "pillow"),
    "train": (
        "annotated-doc", "annotated-types", "click", "contourpy", "cycler", "filelock", "fsspec", "httpx2", "idna",
        "jinja2", "kiwisolver", "markdown-it-py", "markupsafe", "mdurl", "mpmath", "numpy", "packaging", "pandas",
        "platformdirs", "pyarrow", "pydantic", "pydantic-core", "pygments", "pyparsing", "python-dateutil", "pyyaml",
        "rich", "safetensors", "setuptools", "shellingham", "six", "sympy", "tokenizers", "torch", "tqdm", "typer",
        "typing-extensions", "typing-inspection",
    ),
}  # fmt: skip
# folders of the standard library that hold tests or are another's
NO_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
TEST = re.compile(r"(^|/)(_?tests?|_?testing)/|(^|/)(test_[^/]*|[^/]*_test|conftest)\.py$")
VERSION = re.compile(r"(^|/)(_*version_*|__config__)\.py$")
# in a comment or where the docstring begins, for a module's docstring also speaks of what is generated elsewhere
GENERATED = re.compile(
    r"""auto-?generated|automatically generated|^(#|\W?["']{3}).*(generated (by|from|using)|(is|was) generated|"""
    r"""do not edit|do not modify|don't edit)""",
    re.IGNORECASE | re.MULTILINE,
)
LICENCE = re.compile(r"licen[cs]e|copyright", re.IGNORECASE)
# the comment at the top of a file, with the empty lines after it
HEADER = re.compile(r"(?:[ \t]*#[^\n]*\n|[ \t]*\n)+")
# lines of a file in which it says that it is generated
TOP_LINES = 15
# lines of a run that is compared, and the share of copied runs above which a file is a copy
RUN_LINES, COPIED = 3, 0.5
# share of letters among a file's characters, without white space, below which it is a table
LETTERS = 0.55
_SPACE, _LETTERS = string.whitespace.encode(), string.ascii_letters.encode()


class File(NamedTuple):
    """A file of source: its split, its name in messages and results, and where it is."""

    role: Role
    name: str
    path: Path


def stdlib_folder() -> Path:
    """Return the folder of the standard library of the Python that runs."""
    return Path(sysconfig.get_paths()["stdlib"])


def stdlib_files(folder: Path) -> list[str]:
    """List the modules of a standard library without its tests, as sorted paths relative to `folder`."""
    files: list[str] = []
    for parent, folders, names in os.walk(folder):
        # not entered: site-packages can be far larger than all the rest
        folders[:] = [inner for inner in folders if inner not in NO_STDLIB]
        files.extend((Path(parent) / name).relative_to(folder).as_posix() for name in names if name.endswith(".py"))
    return sorted(files)


def installed() -> tuple[dict[str, str], list[File]]:
    """Find what is installed: the version of Python and of each distribution, and their files but tests and versions.

    A distribution that is not installed, or whose files are not recorded, is absent from both.
    """
    found = {"python": platform.python_version()}
    files: list[File] = []
    for role, names in DISTRIBUTIONS.items():
        for name in names:
            try:
                distribution = metadata.distribution(name)
            except metadata.PackageNotFoundError:
                continue
            recorded = sorted(file.as_posix() for file in distribution.files or ())
            modules = [file for file in recorded if file.endswith(".py") and not file.startswith("..")]
            kept = [file for file in modules if not TEST.search(file) and not VERSION.search(file)]
            files += [File(role, file, Path(str(distribution.locate_file(file)))) for file in kept]
            if modules:
                found[name] = distribution.version
    folder = stdlib_folder()
    files += [File("train", f"stdlib/{name}", folder / name) for name in stdlib_files(folder)]
    return found, files


def read(path: Path) -> str:
    """Read a module; empty when it is not UTF-8 text."""
    raw = path.read_bytes()
    try:
        return "" if b"\0" in raw else raw.decode()
    except UnicodeDecodeError:
        return ""


def without_licence(text: str) -> str:
    """Return a module's text without the comment at its top, where that speaks of a licence or a copyright."""
    header = HEADER.match(text)
    return text[header.end() :] if header and LICENCE.search(header[0]) else text


def select(files: list[File]) -> Iterator[File]:
    """Yield the files that are neither empty, generated, tables nor copies of those before them."""
    seen: set[int] = set()
    for file in files:
        text = without_licence(read(file.path))
        if not text.strip() or _is_generated(text) or _is_table(text):
            continue
        runs = _runs(text)
        if len(runs & seen) <= COPIED * len(runs):
            seen |= runs
            yield file


def _is_generated(text: str) -> bool:
    return GENERATED.search("\n".join(text.split("\n", TOP_LINES)[:TOP_LINES])) is not None


def _is_table(text: str) -> bool:
    written = text.encode().translate(None, _SPACE)
    return len(written) - len(written.translate(None, _LETTERS)) < LETTERS * len(written)


def _runs(text: str) -> set[int]:
    """Number every run of RUN_LINES lines, without empty lines and the space around them."""
    lines = [stripped for line in text.split("\n") if (stripped := line.strip())]
    return {hash(tuple(lines[start : start + RUN_LINES])) for start in range(max(1, len(lines) - RUN_LINES + 1))}
