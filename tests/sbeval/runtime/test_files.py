"""Test atomic writes."""

import os
from pathlib import Path

import pytest

from sbeval.errors import InputError
from sbeval.runtime import files


def test_prepare_makes_folders_or_says_why_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a" / "b"
    assert files.prepare(folder) == folder and folder.is_dir() and files.prepare(folder) == folder
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="cannot make the results folder"):
            files.prepare(path)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(InputError, match="cannot write to the results folder"):
        files.prepare(folder)


def test_replacing_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), files.replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with files.replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_new_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    (tmp_path / ".new.partial").mkdir()
    (tmp_path / ".new.partial" / "left").touch()
    with pytest.raises(KeyboardInterrupt), files.new_folder(folder) as partial:
        (partial / "half").touch()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with files.new_folder(folder) as partial:
        (partial / "whole").touch()
        assert not folder.exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "whole"]
