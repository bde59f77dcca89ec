"""A sealed file is intact as long as it and its seal are what was written."""

from pathlib import Path

import pytest

from sbeval.runtime.files import replacing
from sbeval.runtime.seals import is_intact, seal


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.npy"
    with replacing(path) as temporary:
        temporary.write_bytes(b"some tokens")
        seal(path, temporary)
    return path


def test_what_was_written_is_intact(path: Path) -> None:
    lines: list[str] = []
    assert is_intact(path, lines.append) and not lines
    # nothing is said of a file that is yet to be made
    assert not is_intact(path.with_name("other"), lines.append) and not lines


@pytest.mark.parametrize("name", ["tokens.npy", "tokens.npy.sha256"])
def test_any_change_of_the_file_or_its_seal_is_named(name: str, path: Path) -> None:
    changed = path.with_name(name)
    whole = changed.read_bytes()
    for content in (b"", whole[:-1], whole + b"\n", bytes([whole[0] ^ 1]) + whole[1:], b"\xff"):
        changed.write_bytes(content)
        lines: list[str] = []
        assert not is_intact(path, lines.append)
        assert lines == [f"{path} is not as it was written, and is made again"]
    changed.write_bytes(whole)
    assert is_intact(path)


def test_a_file_without_a_seal_is_named(path: Path) -> None:
    path.with_name("tokens.npy.sha256").unlink()
    lines: list[str] = []
    assert not is_intact(path, lines.append) and lines == [f"{path} has no digest beside it, and is made again"]
