"""Tokens in a file: any part as NumPy gives it, also of a file that is replaced; an error for one that is changed."""

import gc
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from sbeval.data.token_file import TokenFile
from sbeval.errors import InputError


@pytest.fixture(params=[np.uint16, np.uint32])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    np.save(tmp_path / "tokens.npy", np.arange(50_000, dtype=request.param))
    return tmp_path / "tokens.npy"


def test_any_part_is_what_numpy_gives(path: Path) -> None:
    array, tokens = np.load(path), TokenFile(path)
    assert len(tokens) == len(array)
    for part in (slice(None), slice(7, 9), slice(49_990, 60_000), slice(-3, None), slice(5, 5), slice(9, 2)):
        assert tokens[part].dtype == array.dtype and np.array_equal(tokens[part], array[part])


def test_an_empty_file_has_no_tokens(tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", np.zeros(0, dtype=np.uint16))
    tokens = TokenFile(tmp_path / "tokens.npy")
    assert len(tokens) == len(tokens[:]) == 0


def test_a_file_that_is_replaced_or_removed_is_read_on(path: Path) -> None:
    tokens = TokenFile(path)
    np.save(path.with_name("other.npy"), np.zeros(9, dtype=np.uint16))
    path.with_name("other.npy").replace(path)
    assert tokens[100:103].tolist() == [100, 101, 102]
    path.unlink()
    assert tokens[100:103].tolist() == [100, 101, 102]


@pytest.mark.parametrize("change", ["cut", "emptied", "overwritten", "grown"])
def test_a_file_that_is_changed_while_it_is_open_is_named(change: str, path: Path) -> None:
    """A part that is still there too: what was cut and written again has other tokens."""
    tokens = TokenFile(path)
    assert len(tokens[49_000:]) == 1000
    with path.open("rb+") as file:
        if change in ("cut", "emptied"):
            file.truncate(40_000 if change == "cut" else 0)
        else:
            file.seek(0, os.SEEK_END if change == "grown" else os.SEEK_SET)
            file.write(bytes(1000))
    for part in (slice(49_000, None), slice(0, 10)):
        with pytest.raises(InputError, match=r"tokens\.npy was changed while it was in use: run .* to resume$"):
            tokens[part]


def test_another_process_opens_the_file_again(path: Path) -> None:
    tokens = TokenFile(path)
    copy = pickle.loads(pickle.dumps(tokens))
    del tokens
    gc.collect()
    assert copy[3:5].tolist() == [3, 4]


def test_no_descriptor_is_left(path: Path) -> None:
    def opened() -> int:
        return len(os.listdir("/proc/self/fd"))

    gc.collect()
    before = opened()
    for _ in range(20):
        TokenFile(path)[:3]
    gc.collect()
    assert opened() <= before
