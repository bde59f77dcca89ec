"""Test atomic writes."""

import errno
import os
import subprocess
import sys
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


def test_every_error_of_a_path_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "file")
    (tmp_path / "here.lock").symlink_to(tmp_path / "file")
    for path in (tmp_path / "file" / "x", tmp_path / "dangling", tmp_path / ("x" * 300), Path("/proc/sbeval/x")):
        with pytest.raises(InputError, match="^cannot write ") as caught, files.replacing(path) as temporary:
            temporary.write_text("new")
        assert "\n" not in str(caught.value)
    for path in (tmp_path / "file" / "x", tmp_path / "here", Path("/proc/sbeval/x")):
        with pytest.raises(InputError, match="^cannot write "), files.locked(path):
            pass
    assert (tmp_path / "file").read_text() == ""


def test_folders_and_devices_are_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="it is a folder$"), files.replacing(tmp_path):
        pass
    with pytest.raises(InputError, match="it is not a file$"), files.replacing(Path("/dev/null")):
        pass
    assert Path("/dev/null").is_char_device()


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")
    with files.replacing(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "new"


def test_what_a_killed_writer_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    write = "import os, sys\nfrom pathlib import Path\nfrom sbeval.runtime import files\n"
    write += "with files.replacing(Path(sys.argv[1])):\n    os.kill(os.getpid(), 9)"
    path, other = tmp_path / "figure.png", tmp_path / ".figure.png.tmp"
    killed = subprocess.run([sys.executable, "-c", write, str(path)], check=False)
    assert killed.returncode == -9 and len(list(tmp_path.glob(".figure.png.*.tmp"))) == 1
    # of another program
    other.touch()
    with files.replacing(path) as temporary:
        temporary.write_text("new")
        files.remove_left(tmp_path)
        assert set(tmp_path.iterdir()) == {temporary, other}
    assert set(tmp_path.iterdir()) == {path, other} and path.read_text() == "new"


@pytest.mark.parametrize("kind", ["file", "link", "folder", "nothing"])
def test_whatever_is_in_the_way_is_cleared(kind: str, tmp_path: Path) -> None:
    kept, way = tmp_path / "kept", tmp_path / ".new.partial"
    kept.mkdir()
    (kept / "file").touch()
    if kind == "file":
        way.touch()
    elif kind == "link":
        way.symlink_to(kept)
    elif kind == "folder":
        (way / "inner").mkdir(parents=True)
    with files.new_folder(tmp_path / "new") as partial:
        (partial / "whole").touch()
    assert (tmp_path / "new" / "whole").exists() and (kept / "file").exists()
    assert not os.path.lexists(way)


def test_a_mode_follows_the_umask(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch(0o600)
    before = os.umask(0o027)
    try:
        files.readable_as_others(path)
        assert os.umask(0o027) == 0o027, "the umask stays"
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_disk_that_becomes_read_only_while_a_lock_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an error of the disk: no new file, no new name; the lock is open already."""
    path = tmp_path / "file"
    path.write_text("old")

    def refuse(*_: object, **options: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with files.locked(path):
        with monkeypatch.context() as patch:
            for name in ("open", "replace", "unlink", "mkdir"):
                patch.setattr(os, name, refuse)
            with pytest.raises(InputError, match="Read-only file system; what is finished is kept"):
                with files.replacing(path) as temporary:
                    temporary.write_text("new")
    assert path.read_text() == "old"
    # the lock is free again
    with files.locked(path), files.replacing(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"


def test_pointers_of_git_lfs_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.safetensors is a pointer of Git LFS"):
        files.check_not_pointer(tmp_path / "model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid ...")
    files.check_not_pointer(tmp_path / "text", b"version https://git-lfs is a text")
