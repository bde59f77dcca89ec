"""Lessons for fine-tuning: what they ask, how they fill their lengths, and that rows of them are as if alone."""

from typing import Any

import numpy as np
import pytest
import torch

from sbeval.config import IGNORE
from sbeval.data.tokenizer import Tokenizer
from sbeval.evaluation import ruler_lessons
from sbeval.evaluation.ruler_lessons import Kind, Lesson, LessonBatches, Store
from sbeval.evaluation.ruler_prompts import Writer
from sbeval.models.config import ModelConfig
from sbeval.models.decoder import Decoder

TASKS = ("niah_single_1", "niah_single_2", "niah_multikey_2", "niah_multivalue", "niah_multiquery", "vt", "fwe")


def answers(lesson: Lesson, text: Tokenizer) -> list[str]:
    """Return the answers of a lesson, as text."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], lesson.answered[:-1], [False]]).astype(int)))
    return [text.decode(lesson.tokens[first:last]) for first, last in edges.reshape(-1, 2)]


@pytest.mark.parametrize(("task", "questions", "each"), [
    ("niah_single_1", 8, 1), ("niah_single_2", 8, 1), ("niah_multikey_1", 8, 1), ("niah_multikey_2", 8, 1),
    ("niah_multivalue", 2, 4), ("niah_multiquery", 2, 4), ("vt", 1, 5),
])  # fmt: skip
def test_a_lesson_asks_for_each_of_its_needles(task: str, questions: int, each: int, writer: Writer) -> None:
    for lesson in Store(writer).lessons(task, 2048, Kind(8), 3):
        said = writer.tokenizer.decode(lesson.tokens[~lesson.answered])
        found = answers(lesson, writer.tokenizer)
        values = [value.strip(", ") for answer in found for value in answer.split()]
        assert len(found) == questions and len(set(values)) == len(values) == questions * each
        assert all(value in said for value in values)
        assert lesson.tokens[-1] == writer.tokenizer.eos and lesson.answered[-1]
        # a question right before each answer, each about another needle
        if task.startswith("niah_single"):
            asked = said.split("What is the special magic number for ")[1:]
            keys = [question.partition(" mentioned")[0] for question in asked]
            assert len(set(keys)) == questions
            for key, value in zip(keys, values, strict=True):
                assert f"One of the special magic numbers for {key} is: {value}." in said


def test_values_are_words_first(writer: Writer) -> None:
    (lesson,) = Store(writer).lessons("niah_single_1", 1024, Kind(2, words=True), 1)
    values = [answer.strip() for answer in answers(lesson, writer.tokenizer)]
    assert len(values) == 2 and all(value.replace("-", "").isalpha() for value in values)
    assert "One of the special magic words for" in writer.tokenizer.decode(lesson.tokens)


@pytest.mark.parametrize("task", TASKS)
def test_lessons_fill_their_length_with_fewer_needles_in_short_ones(task: str, writer: Writer) -> None:
    for length in (512, 2048):
        found = Store(writer).lessons(task, length, Kind(8), 3)
        assert len(found) == 3 or task in ("vt", "fwe")
        # the last token is a target only
        assert all(0.85 * length < len(lesson.tokens) <= length + 1 for lesson in found)
    if task == "niah_single_1":
        assert {len(answers(lesson, writer.tokenizer)) for lesson in Store(writer).lessons(task, 512, Kind(8), 3)} <= {
            1, 2, 4,
        }  # fmt: skip


def test_lessons_that_fit_no_needle_are_left_out(small: Writer) -> None:
    # in bytes the instruction alone is longer
    assert Store(small).lessons("niah_single_1", 256, Kind(8), 3) == []
    assert Store(small).lessons("niah_single_1", 256, Kind(8), 3) == [], "as they are kept"


def test_lessons_are_no_prompts_of_a_test_and_are_kept(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(writer)
    wanted = store.lessons("niah_single_2", 1024, Kind(), 3)
    tests, held_out = (writer.prompts("niah_single_2", 1024, 42, 3, use=use) for use in ("test", "validation"))
    said = [writer.tokenizer.decode(item.tokens) for item in (*tests, *held_out)]
    for lesson in wanted:
        (value,) = (answer.strip() for answer in answers(lesson, writer.tokenizer))
        assert not any(value in text for text in said)
    monkeypatch.setattr(Store, "_write", None)
    again = store.lessons("niah_single_2", 1024, Kind(), 3)
    assert all(np.array_equal(one.tokens, other.tokens) for one, other in zip(wanted, again, strict=True))
    assert all(np.array_equal(one.answered, other.answered) for one, other in zip(wanted, again, strict=True))


def test_numbers_take_the_place_of_words_then_half_of_the_prompts_are_those_of_the_test() -> None:
    assert ruler_lessons.shares(0, 100) == (1, 0, 0) and ruler_lessons.shares(25, 100) == (0.5, 0.5, 0)
    assert ruler_lessons.shares(49, 100)[2] == 0 and ruler_lessons.shares(50, 100) == (0, 0.5, 0.5)
    assert ruler_lessons.lengths(2048) == [2048, 1024, 512, 256] and ruler_lessons.lengths(300) == [300]


def test_stored_lessons_are_as_many_as_are_drawn() -> None:
    found = ruler_lessons.counts(1200, ("niah_single_1", "vt"), 512, 8)
    many, plain = Kind(8), Kind()
    assert sum(found.values()) == pytest.approx(1200, abs=5)
    assert found["niah_single_1", 256, many] == 2 * found["niah_single_1", 512, many] == 200
    assert 2 * found["niah_single_1", 256, plain] == found["niah_single_1", 256, many]
    assert ("vt", 256, many) not in found and found["vt", 256, plain] == 400
    # with one needle two kinds are the same
    assert sum(ruler_lessons.counts(1200, ("niah_single_1",), 512, 1).values()) == pytest.approx(1200, abs=5)


def lesson(*tokens: int, answer: int = 1) -> Lesson:
    ids = np.array([*tokens, 20], dtype=np.uint16)
    return Lesson(tokens=ids, answered=np.arange(len(ids)) >= len(ids) - 1 - answer)


def batches(stored: dict[tuple[str, int, Kind], list[Lesson]], **changes: Any) -> LessonBatches:
    options: dict[str, Any] = {"steps": 8, "batch": 6, "length": 16, "seed": 0, "eos": 20, "rest": 0.1}
    return LessonBatches(stored, 2, **options | changes)


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, int, Kind], list[Lesson]]:
    """Lessons of 8 and 16 tokens, of two tasks, the second of which has none so short."""
    monkeypatch.setattr(ruler_lessons, "SHORTEST", 8)
    found: dict[tuple[str, int, Kind], list[Lesson]] = {}
    for number, kind in enumerate(ruler_lessons.kinds(2)):
        found["a", 16, kind] = [lesson(1, number, *range(2, 2 + count)) for count in (11, 13)]
        found["a", 8, kind] = [lesson(2, number, *range(3, 3 + count), answer=2) for count in (4, 5)]
    return found | {("b", 16, Kind()): [lesson(5, 4, 3, 2)], ("b", 8, Kind()): []}


def test_rows_hold_lessons_of_one_length_apart(stored: dict[tuple[str, int, Kind], list[Lesson]]) -> None:
    seen = set()
    for step in range(8):
        batch = batches(stored)[step]
        assert batch.cu_seqlens is not None
        bounds = batch.cu_seqlens.tolist()
        assert bounds[0] == 0 and bounds[-1] == 6 * 16 and set(np.diff(bounds)) <= {8, 16}
        assert {row * 16 for row in range(6)} <= set(bounds)
        flat, targets = batch.tokens.flatten(), batch.targets.flatten()
        for first, last in zip(bounds, bounds[1:], strict=False):
            inside = targets[first:last]
            count = int((inside != IGNORE).sum())
            # the next token, to the end; then padding
            assert inside[: count - 1].tolist() == flat[first + 1 : first + count].tolist()
            assert inside[count - 1] == 20 and (inside[count:] == IGNORE).all()
            if flat[first] != 5:
                seen.add((step, int(flat[first + 1])))
    # words and numbers in the first half, numbers and the third kind in the second
    assert {kind for step, kind in seen if step < 4} == {0, 1} and {kind for step, kind in seen if step >= 4} == {1, 2}
    one, other = batches(stored)[3], batches(stored)[3]
    assert torch.equal(one.tokens, other.tokens) and torch.equal(one.weights, other.weights)
    assert not torch.equal(one.tokens, batches(stored, seed=1)[3].tokens)


def test_answers_weigh_one_and_the_rest_a_tenth(stored: dict[tuple[str, int, Kind], list[Lesson]]) -> None:
    batch = batches(stored)[0]
    scored = batch.targets != IGNORE
    assert (batch.weights[~scored] == 0).all() and batch.weights.sum().item() == pytest.approx(1.1)
    heavy = batch.weights == batch.weights.max()
    assert batch.weights[heavy].sum().item() == pytest.approx(1.0)
    # ends are answers
    assert heavy[batch.targets == 20].all()
    assert batches(stored, rest=0.0)[0].weights.sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize("attention", ["rope", "stick_breaking", "alibi", "forgetting", "sliding_window:window=4"])
def test_a_packed_batch_has_the_loss_of_its_lessons_one_at_a_time(
    attention: str, stored: dict[tuple[str, int, Kind], list[Lesson]]
) -> None:
    torch.manual_seed(0)
    model = Decoder(ModelConfig(vocab_size=24, width=16, layers=2, heads=2, hidden=32, attention=attention))
    batch = batches(stored)[1]
    hidden = model(batch.tokens, batch.cu_seqlens)
    packed = model.score(hidden, batch.targets, batch.weights)
    assert batch.cu_seqlens is not None
    bounds = batch.cu_seqlens.tolist()
    flat = [x.flatten() for x in (batch.tokens, batch.targets, batch.weights)]
    alone = [
        model.score(model(tokens), targets, weights)
        for first, last in zip(bounds, bounds[1:], strict=False)
        for tokens, targets, weights in [[x[None, first:last] for x in flat]]
    ]
    assert len(alone) > 6
    torch.testing.assert_close(packed, torch.stack(alone).sum())
    # and gradients
    parameter = model.embedding.weight
    (one,) = torch.autograd.grad(packed, [parameter])
    (other,) = torch.autograd.grad(torch.stack(alone).sum(), [parameter])
    torch.testing.assert_close(one, other)
