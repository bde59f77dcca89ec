"""Stored responses: written at once, of their tokens and request, and never read as anything but what was written."""

import random
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from sbeval.errors import InputError
from sbeval.evaluation.response_cache import Answers, key

WRITTEN = {key("score", [number]): [-1.5 * number, number % 2 == 0, [number, 2, 3]] for number in range(20)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "answers" / "model.sqlite"
    with closing(Answers(path)) as answers:
        answers.keep(WRITTEN)
    return path


def read(path: Path) -> tuple[dict[bytes, object], list[str]]:
    """Return what is found of WRITTEN, and the lines that say why the rest is not."""
    lines: list[str] = []
    with closing(Answers(path, say=lines.append)) as answers:
        return answers.find(WRITTEN), lines


def change(path: Path, command: str, *values: object) -> None:
    with closing(sqlite3.connect(path)) as file, file:
        file.execute(command, values)


def test_answers_survive_the_process_that_wrote_them(path: Path) -> None:
    assert read(path) == (WRITTEN, [])
    with closing(Answers(path)) as answers:
        assert answers.find([key("score", [20])]) == {}


def test_anew_deletes_what_earlier_runs_wrote(path: Path) -> None:
    with closing(Answers(path, anew=True)) as answers:
        assert answers.find(WRITTEN) == {}
    assert read(path) == ({}, [])


def test_without_a_path_answers_are_in_memory(tmp_path: Path) -> None:
    with closing(Answers()) as answers:
        answers.keep(WRITTEN)
        assert answers.find(WRITTEN) == WRITTEN
    assert not list(tmp_path.iterdir())


def test_an_answer_is_of_its_tokens_and_request() -> None:
    keys = [key("a", [1, 2]), key("b", [1, 2]), key("a", [1, 2, 3]), key("a", [258])]
    assert len(set(keys)) == 4 and key("a", [1, 2]) == key("a", (1, 2))


@pytest.mark.parametrize("digit", [b"-1.5", b"-7.5", b"-13.5"])
def test_a_digit_that_changed_is_named_and_is_no_answer(path: Path, digit: bytes) -> None:
    whole = path.read_bytes()
    assert whole.count(b"[" + digit) == 1
    path.write_bytes(whole.replace(b"[" + digit, b"[" + digit[:-1] + b"6"))
    (changed,) = (one for one, answer in WRITTEN.items() if str(answer[0]).encode() == digit)
    found, (line,) = read(path)
    assert found == {one: answer for one, answer in WRITTEN.items() if one != changed}
    assert line.startswith(f"{path}: 1 of 20 stored responses are not as they were written")
    assert changed.hex()[:10] in line
    # it is written again
    with closing(Answers(path)) as answers:
        answers.keep({changed: WRITTEN[changed]})
    assert read(path) == (WRITTEN, [])


def test_an_answer_under_the_key_of_another_is_no_answer(path: Path) -> None:
    one, other = list(WRITTEN)[:2]
    columns = "(SELECT answer, digest FROM responses WHERE key = ?)"
    change(path, f"UPDATE responses SET (answer, digest) = {columns} WHERE key = ?", one, other)
    found, lines = read(path)
    assert other not in found and found[one] == WRITTEN[one] and len(lines) == 1


@pytest.mark.parametrize("values", [(None, None), ("[0]", None), (1, b""), (b"[0]", b"")])
def test_values_of_another_kind_are_no_answers(path: Path, values: tuple[object, object]) -> None:
    change(path, "UPDATE responses SET answer = ?, digest = ?", *values)
    found, (line,) = read(path)
    assert found == {} and "20 of 20" in line and line.endswith(", ...")


def test_a_changed_byte_anywhere_changes_no_answer(path: Path) -> None:
    whole = path.read_bytes()
    draw = random.Random(0)
    for _ in range(150):
        at = draw.randrange(len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :])
        try:
            found, _ = read(path)
        except InputError as error:
            assert f"{path} is not a cache of model responses" in str(error) and "remove it" in str(error)
            continue
        assert found.items() <= WRITTEN.items()


def test_answers_that_are_lost_are_said_to_be(path: Path) -> None:
    """A record without its key is not found, whatever its digest says."""
    whole = path.read_bytes()
    path.write_bytes(whole[:-500] + bytes(500))
    try:
        found, lines = read(path)
    except InputError as error:
        found, lines = {}, [str(error)]
    assert len(lines) == 1 and str(path) in lines[0] and found.items() < WRITTEN.items()


def test_a_disk_that_takes_no_answers_is_not_taken_for_a_damaged_file(path: Path) -> None:
    """Nobody is to remove the answers of a day because the disk is full."""
    answers = Answers(path)
    try:
        # no more than it has
        answers._file.execute("PRAGMA max_page_count = 1")
        with pytest.raises(InputError, match="^cannot write .* full; earlier answers are kept") as caught:
            answers.keep({bytes([n]): "x" * 1000 for n in range(50)})
    finally:
        answers.close()
    assert read(path)[0] == WRITTEN and "remove it" not in str(caught.value)
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError, match="^cannot write .*: unable to open database file; earlier answers are kept"):
        Answers(path)


def test_a_file_without_answers_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "model.sqlite").write_text("no database, but a text that is long enough to be taken for one" * 20)
    with pytest.raises(InputError, match="is not a cache of model responses"):
        Answers(tmp_path / "model.sqlite")
