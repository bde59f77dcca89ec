"""The source of Python itself as text: the standard library, and the distributions that sbeval is installed with.

Both are present wherever sbeval runs, so that a first command needs neither a download nor a path. Files of the
distributions are those that their RECORD lists. Left out are

    tests              files in folders of tests, test_*.py, *_test.py, conftest.py
    generated files    those declared as such in their first lines, files of versions, and tables: few letters
    copies             a file of which more than half, in runs of three lines, occurs in files before it
    licence headers    the comment at the top of a file if it mentions a licence or a copyright

Copies are searched in the order test, valid, train, so that no test file has a near copy in another split.
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

# installed with sbeval on every platform, without extras: the same versions of these and of Python give the same text.
# The distributions of a split share no code with those of another.
DISTRIBUTIONS: dict[Role, tuple[str, ...]] = {
    "test": ("matplotlib", "networkx", "fonttools", "seaborn"),
    "valid": ("huggingface-hub", "pillow"),
    "train": (
        *("annotated-doc", "annotated-types", "click", "contourpy", "cycler", "filelock", "fsspec", "httpx2", "idna"),
        *("jinja2", "kiwisolver", "markdown-it-py", "markupsafe", "mdurl", "mpmath", "numpy", "packaging", "pandas"),
        *("platformdirs", "pyarrow", "pydantic", "pydantic-core", "pygments", "pyparsing", "python-dateutil"),
        *("pyyaml", "rich", "safetensors", "scipy", "setuptools", "shellingham", "six", "sympy", "tokenizers", "torch"),
        *("tqdm", "typer", "typing-extensions", "typing-inspection"),
    ),
}
# folders of the standard library that hold tests or other packages
NO_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
TEST = re.compile(r"(^|/)(_?tests?|_?testing)/|(^|/)(test_[^/]*|[^/]*_test|conftest)\.py$")
VERSION = re.compile(r"(^|/)(_*version_*|__config__)\.py$")
# in a comment or at the start of the docstring: further down a docstring may describe files generated elsewhere
GENERATED = re.compile(
    r"""auto-?generated|automatically generated|^(#|\W?["']{3}).*(generated (by|from|using)|(is|was) generated|"""
    r"""do not edit|do not modify|don't edit)""",
    re.IGNORECASE | re.MULTILINE,
)
LICENCE = re.compile(r"licen[cs]e|copyright", re.IGNORECASE)
# the comment at the top of a file, with the empty lines after it
HEADER = re.compile(r"(?:[ \t]*#[^\n]*\n|[ \t]*\n)+")
# lines at the top of a file that are searched for GENERATED
TOP_LINES = 15
# lines of a run, and the share of copied runs above which a file is a copy
RUN_LINES, COPIED = 3, 0.5
# share of letters among a file's non-space characters below which it is a table
LETTERS = 0.55
_SPACE, _LETTERS = string.whitespace.encode(), string.ascii_letters.encode()


class File(NamedTuple):
    """A source file: its split, its name in messages and results, and its path."""

    role: Role
    name: str
    path: Path


def stdlib_folder() -> Path:
    """Return the folder of the standard library of the running Python."""
    return Path(sysconfig.get_paths()["stdlib"])


def stdlib_files(folder: Path) -> list[str]:
    """List the modules of a standard library without its tests, as sorted paths relative to `folder`."""
    files: list[str] = []
    for parent, folders, names in os.walk(folder):
        # not entered, since site-packages can be far larger than the rest
        folders[:] = [inner for inner in folders if inner not in NO_STDLIB]
        files.extend((Path(parent) / name).relative_to(folder).as_posix() for name in names if name.endswith(".py"))
    return sorted(files)


def installed() -> tuple[dict[str, str], list[File]]:
    """Return the versions of Python and of each distribution, and their files without those of tests and versions.

    A distribution that is not installed, or whose files are not recorded, is absent from both.
    """
    versions = {"python": platform.python_version()}
    files: list[File] = []
    for role, names in DISTRIBUTIONS.items():
        for name in names:
            try:
                distribution = metadata.distribution(name)
            except metadata.PackageNotFoundError:
                continue
            recorded = sorted(file.as_posix() for file in distribution.files or ())
            modules = [file for file in recorded if file.endswith(".py") and not file.startswith("..")]
            wanted = [file for file in modules if not TEST.search(file) and not VERSION.search(file)]
            files += [File(role, file, Path(str(distribution.locate_file(file)))) for file in wanted]
            if modules:
                versions[name] = distribution.version
    folder = stdlib_folder()
    files += [File("train", f"stdlib/{name}", folder / name) for name in stdlib_files(folder)]
    return versions, files


def read(path: Path) -> str:
    """Return the text of a module, empty when it is not UTF-8."""
    raw = path.read_bytes()
    try:
        return "" if b"\0" in raw else raw.decode()
    except UnicodeDecodeError:
        return ""


def without_licence(text: str) -> str:
    """Return a module's text without the comment at its top, if that mentions a licence or a copyright."""
    header = HEADER.match(text)
    return text[header.end() :] if header and LICENCE.search(header[0]) else text


def select(files: list[File]) -> Iterator[File]:
    """Yield the files that are neither empty, generated, tables nor copies of earlier ones."""
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
    characters = text.encode().translate(None, _SPACE)
    return len(characters) - len(characters.translate(None, _LETTERS)) < LETTERS * len(characters)


def _runs(text: str) -> set[int]:
    """Return a hash of every run of RUN_LINES lines, stripped and without empty lines."""
    lines = [stripped for line in text.split("\n") if (stripped := line.strip())]
    return {hash(tuple(lines[start : start + RUN_LINES])) for start in range(max(1, len(lines) - RUN_LINES + 1))}
