"""Prompts fill a length to the last unit, are the same whatever else was written, and are kept until used."""

import random
import re
from bisect import bisect_left
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sbeval.data.tokenizer import Tokenizer
from sbeval.errors import InputError
from sbeval.evaluation import ruler_drafts, ruler_tasks, ruler_texts
from sbeval.evaluation.ruler_drafts import Setting
from sbeval.evaluation.ruler_prompts import Prompt, Writer
from sbeval.evaluation.ruler_texts import Sources

LENGTH, COUNT = 2048, 3


# lm_eval's YAML files of RULER say the same
NEW_TOKENS = {name: 128 for name in ruler_tasks.TASKS if name.startswith("niah")} | {
    "vt": 30,
    "cwe": 120,
    "fwe": 50,
    "qa_1": 32,
    "qa_2": 32,
}


def setting(writer: Writer, length: int = LENGTH, **others: Any) -> Setting:
    return Setting(length=length, seed=42, tables=writer.tables, sources=writer.sources, **others)


def same(one: list[Prompt], other: list[Prompt]) -> bool:
    return len(one) == len(other) and all(
        np.array_equal(a.tokens, b.tokens)
        and np.array_equal(a.answer, b.answer)
        and (a.references, a.depth) == (b.references, b.depth)
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("task", ruler_tasks.TASKS)
def test_prompts_fill_the_length_to_the_last_unit(task: str, writer: Writer) -> None:
    new_tokens = NEW_TOKENS[task]
    for index, prompt in enumerate(writer.prompts(task, LENGTH, 42, COUNT)):
        said = writer.tokenizer.decode(prompt.tokens)
        assert prompt.tokens.tolist() == writer.tokenizer.encode(said).tolist()
        assert len(prompt.tokens) + new_tokens <= LENGTH
        draft = ruler_tasks.draft(task, index, setting(writer))
        (units,) = (units for units in near(draft, len(prompt.tokens)) if draft.write(units).prompt == said)
        longer = draft.write(units + 1).prompt
        assert len(writer.tokenizer.encode(longer)) + new_tokens > LENGTH


def near(draft: ruler_drafts.Draft, tokens: int) -> range:
    """Units that a prompt of so many tokens may have."""
    units = range(draft.least, draft.most)
    first, last = (bisect_left(units, tokens + by, key=draft.tokens) for by in (-25, 25))
    return units[first:last]


@pytest.mark.parametrize("task", ruler_tasks.TASKS)
def test_a_length_that_nothing_fits_is_an_error_that_says_which_would(task: str, small: Writer) -> None:
    small.prefix = (7,)
    with pytest.raises(InputError, match=f"{task} does not fit 400 tokens: its smallest prompt has ") as caught:
        small.prompts(task, 400, 42, 1)
    needed = int(str(caught.value).rpartition("--length ")[2].split()[0])
    assert needed > 400
    if task not in ("vt", "fwe"):
        # those two have parts that grow with the length
        (prompt,) = small.prompts(task, needed, 42, 1)
        assert prompt.tokens[0] == 7 and len(prompt.tokens) + NEW_TOKENS[task] <= needed


def test_lessons_that_do_not_fit_are_put_right_by_other_options(small: Writer) -> None:
    with pytest.raises(InputError, match=r"name others with --finetune-task, or train at --train-len \d+ or more"):
        small.prompts("vt", 512, 42, 1, use="train")


def test_words_that_run_out_before_the_length_are_an_error(small: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    few = ruler_drafts.words("noun")[:300]
    monkeypatch.setattr(ruler_tasks, "words", lambda *kinds: few)
    with pytest.raises(InputError, match="cwe cannot fill 32768 tokens: with all of its words its prompt") as caught:
        small.prompts("cwe", 32768, 42, 2)
    length = int(re.findall(r"give --length (\d+) or less, or leave cwe out", str(caught.value))[0])
    for prompt in small.prompts("cwe", length, 42, 2):
        # three times the longest word and its number
        assert 0 <= length - NEW_TOKENS["cwe"] - len(prompt.tokens) <= 3 * (max(map(len, few)) + len(" 1000. "))
    with pytest.raises(InputError, match=r"name others with --finetune-task, or train at --train-len \d+ or less"):
        small.prompts("cwe", 32768, 42, 1, use="train")


@pytest.fixture(scope="module")
def other(text: Tokenizer, sources: Sources, tmp_path_factory: pytest.TempPathFactory) -> Writer:
    """One that has written other tasks and lengths before, in another order."""
    random.seed(1)
    np.random.seed(1)
    writer = Writer(text, sources, tmp_path_factory.mktemp("cache"))
    for task in reversed(ruler_tasks.TASKS):
        writer.prompts(task, LENGTH + 512, 42, 1)
    return writer


@pytest.mark.parametrize("task", ruler_tasks.TASKS)
def test_a_sample_is_the_same_whatever_else_ran(task: str, writer: Writer, other: Writer) -> None:
    wanted = writer.prompts(task, LENGTH, 42, COUNT)
    # one first, and the others after it
    one, found = other.prompts(task, LENGTH, 42, 1), other.prompts(task, LENGTH, 42, COUNT)
    assert same(one, wanted[:1]) and same(found, wanted)
    assert len({prompt.tokens.tobytes() for prompt in found}) == COUNT
    for others in (other.prompts(task, LENGTH, 43, 1), other.prompts(task, LENGTH + 512, 42, 1)):
        assert not np.array_equal(others[0].tokens, wanted[0].tokens)


@pytest.mark.parametrize("task", [name for name in ruler_tasks.TASKS if name[:2] != "qa"])
def test_lessons_are_none_of_the_tests(task: str, writer: Writer) -> None:
    tests = writer.prompts(task, LENGTH, 42, COUNT)
    lessons = writer.prompts(task, LENGTH, 42, COUNT, use="train")
    assert not {item.tokens.tobytes() for item in tests} & {item.tokens.tobytes() for item in lessons}
    assert not {item.references for item in tests} & {item.references for item in lessons}
    assert writer.path(task, LENGTH, 42) != writer.path(task, LENGTH, 42, use="train")


def test_a_write_that_is_stopped_leaves_what_was_there(small: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    first = small.prompts("niah_single_1", 1024, 42, 2)
    path = small.path("niah_single_1", 1024, 42)
    before = path.read_bytes()

    def stopped(file: Any, **arrays: Any) -> None:
        file.write(b"PK half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(np, "savez", stopped)
        small.prompts("niah_single_1", 1024, 42, 4)
    assert path.read_bytes() == before
    assert {item.name for item in path.parent.iterdir()} == {path.name, f"{path.name}.lock", f"{path.name}.sha256"}
    assert same(small.prompts("niah_single_1", 1024, 42, 4)[:2], first)


def test_kept_prompts_are_read_not_written(small: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = small.prompts("niah_single_1", 1024, 42, 3)
    monkeypatch.setattr(ruler_tasks, "draft", None)
    assert same(small.prompts("niah_single_1", 1024, 42, 2), wanted[:2])


@pytest.mark.parametrize("name", ["", ".sha256"])
def test_kept_prompts_that_were_changed_are_named_and_written_again(
    name: str, small: Writer, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = small.prompts("niah_single_1", 1024, 42, 2)
    path = small.path("niah_single_1", 1024, 42)
    changed = path.with_name(path.name + name)
    whole = changed.read_bytes()
    for damaged in (whole[:-1], whole[:9] + bytes([whole[9] ^ 1]) + whole[10:], b"", None):
        changed.unlink()
        if damaged is not None:
            changed.write_bytes(damaged)
        assert same(small.prompts("niah_single_1", 1024, 42, 2), wanted)
        assert changed.read_bytes() == whole
        said = capsys.readouterr().out
        assert str(path) in said and said.endswith("made again\n") if name or damaged is not None else not said


def test_prompts_are_kept_by_what_they_depend_on(small: Writer, tmp_path: Path) -> None:
    (tmp_path / "essay.txt").write_text("Another text. It is short! Is it? It is.")
    other = Writer(small.tokenizer, ruler_texts.load(str(tmp_path / "essay.txt"), None, None), tmp_path)
    for task, shared in (("niah_single_1", True), ("cwe", True), ("niah_single_2", False), ("qa_1", False)):
        assert (small.path(task, 1024, 42) == other.path(task, 1024, 42)) == shared
    assert other.sources.essay.starts[:4] == [0, 2, 5, 7]
    paths = {small.path("vt", *key) for key in ((1024, 42), (1024, 43), (2048, 42))}
    small.prefix = (1,)
    assert len(paths | {small.path("vt", 1024, 42)}) == 4


def test_more_samples_than_questions_is_an_error(small: Writer) -> None:
    with pytest.raises(InputError, match=r"dev\.json has 40 questions: --samples can be that many at most"):
        small.prompts("qa_1", 2048, 42, 41)
