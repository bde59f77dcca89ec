"""Prompts are RULER's word for word, fill a length to the last unit, and are the same whatever else was written."""

import json
import random
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sbeval.evaluation import ruler_needles, ruler_prompts, ruler_tasks, ruler_texts
from sbeval.evaluation.ruler_drafts import Setting
from sbeval.evaluation.ruler_prompts import Writer
from sbeval.evaluation.ruler_scores import score

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


@pytest.mark.parametrize("task", ruler_tasks.TASKS)
def test_the_reference_is_what_the_text_says(task: str, writer: Writer) -> None:
    rule = ruler_tasks.TASKS[task].score
    for prompt in writer.prompts(task, LENGTH, 42, COUNT):
        text = writer.tokenizer.decode(prompt.tokens)
        found = solved(task, text)
        if rule == "all":
            assert sorted(found) == sorted(prompt.references)
        else:
            assert any(item in prompt.references for item in found)
        answer = writer.tokenizer.decode(prompt.answer)
        # what is scored follows the prompt's own last character
        assert score(answer, prompt.references, rule) == 1 and not answer.endswith(" ")
        assert score("none of these", prompt.references, rule) == 0


def solved(task: str, text: str) -> list[str]:
    """Answers to a prompt, from its text alone."""
    if task.startswith("niah"):
        query = re.findall(r"What (?:is|are all) the special magic \w+ for (.*?) mentioned in the", text)[-1]
        names = re.split(r", and |, ", query)
        pairs = re.findall(r"One of the special magic \w+ for (.+?) is: (\S+)\.", text)
        return [value for name in names for key, value in pairs if key == name]
    last = text.rpartition("\n\n")[0].rpartition("\n\n")[2] if task == "vt" else text
    if task == "vt":
        value = re.findall(r"assigned the value (\d+) in the text", text)[-1]
        found = [name for name, number in re.findall(r"VAR ([A-Z]+) = (\d+)", text) if number == value]
        for name in found:
            found += [one for one, other in re.findall(r"VAR ([A-Z]+) = VAR ([A-Z]+)", text) if other == name]
        return found
    if task == "cwe":
        listed = text.split("Below is a numbered list of words.")[-1].split("\nQuestion:")[0]
        counts = Counter(re.findall(r"\d+\. (.+?)(?= \d+\. |$)", listed.partition("\n")[2]))
        return [word for word, _ in counts.most_common(10)]
    if task == "fwe":
        counts = Counter(re.findall(r"\b[a-z]{6}\b", text.split("coded words. ")[1].split("\nQuestion:")[0]))
        return [word for word, _ in counts.most_common(3)]
    number = re.findall(r"Question: Wh\w+ (?:is|was) (\d+)\?", last)[0]
    given = text.split("Question:")[0]
    return [item for item in (f"the {number}th", f"town {number}") if re.search(rf"{item}\b", given)]


def test_depth_is_where_the_needle_stands(writer: Writer) -> None:
    for task in ("niah_single_1", "niah_single_2", "niah_multikey_1", "niah_multikey_3"):
        for prompt in writer.prompts(task, LENGTH, 42, 8):
            text = writer.tokenizer.decode(prompt.tokens).split("afterwards.\n")[1].rpartition("\nWhat ")[0]
            place = text.index(prompt.references[0])
            assert prompt.depth is not None and abs(100 * place / len(text) - prompt.depth) < 12
    assert all(prompt.depth is None for prompt in writer.prompts("niah_multiquery", LENGTH, 42, 2))


NUMBER, UUID = r"\d{7}", r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


def written(task: str, units: int, writer: Writer, length: int = LENGTH) -> str:
    return ruler_tasks.draft(task, 0, setting(writer, length)).write(units).prompt


def test_a_needle_in_noise_is_rulers(small: Writer) -> None:
    key = r"([a-z'. -]+-[a-z'. -]+)"
    needle = rf"One of the special magic numbers for {key} is: {NUMBER}\."
    said = re.fullmatch(
        r"A special magic number is hidden within the following text\. Make sure to memorize it\. I will quiz you "
        rf"about the number afterwards\.\n(?:{NOISE}\n)*{needle}(?:\n{NOISE})*\nWhat is the special magic number for "
        rf"{key} mentioned in the provided text\? The special magic number for {key} mentioned in the provided text is",
        written("niah_single_1", 4, small),
    )
    assert said is not None and len(set(said.groups())) == 1


def test_several_needles_are_rulers(small: Writer) -> None:
    said = written("niah_multiquery", 200, small, 8192)
    assert said.startswith(
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you "
        "about the numbers afterwards.\n"
    )
    question = said.rpartition("\n")[2]
    query = re.fullmatch(
        r"What are all the special magic numbers for (.*) mentioned in the provided text\? The special magic numbers "
        r"for (.*) mentioned in the provided text are",
        question,
    )
    assert query is not None and query[1] == query[2] and re.fullmatch(r"[^,]+, [^,]+, [^,]+, and [^,]+", query[1])
    assert said.count("One of the special magic numbers for ") == 4
    uuids = written("niah_multikey_3", 3, small)
    assert len(re.findall(rf"One of the special magic uuids for {UUID} is: {UUID}\.", uuids)) == 4


def test_an_essay_is_whole_but_for_its_needles(small: Writer) -> None:
    said = written("niah_single_2", 300, small)
    text = said.split("afterwards.\n")[1].rpartition("\nWhat ")[0]
    before, needle, after = re.split(r"(One of the special magic numbers for [^:]*: \d+\.)", text)
    assert needle and f"{before}{after.lstrip()}".split() == small.sources.essay.words[:300]
    assert not before or re.search(r"[.!?][\"'”’)\]]* $", before)


@pytest.mark.parametrize(
    ("task", "depths", "wanted"),
    [
        ("niah_single_2", [0], "\n ONE {} {} {}\n"),
        ("niah_single_2", [50], "\n{} ONE {} {}\n"),
        ("niah_single_2", [100], "\n{} {} {} ONE \n"),
        ("niah_multiquery", [0, 2, 97, 100], "\n ONE  ONE {} {} ONE {} ONE \n"),
    ],
)
def test_needles_are_joined_to_an_essay_by_spaces_as_rulers(
    task: str, depths: list[int], wanted: str, writer: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands before, between and after needles is joined with them, also where it is empty: two spaces then."""
    (tmp_path / "essay.txt").write_text("This is one. Here is another! Is it?")
    three = Writer(writer.tokenizer, ruler_texts.load(str(tmp_path / "essay.txt"), None, None), tmp_path)
    monkeypatch.setattr(ruler_needles, "DEPTHS", depths)
    sample = ruler_tasks.draft(task, 0, setting(three)).write(8)
    text = re.sub(r"One of the special magic numbers for \S+ is: \d{7}\.", "ONE", sample.prompt)
    context = text.split("afterwards.")[1].split("What ")[0]
    assert context == wanted.format("This is one.", "Here is another!", "Is it?")
    assert three.encode([sample])[0].tolist() == three.tokenizer.encode(sample.prompt).tolist()
    # written in parts where the tokenizer allows it, as any other
    assert ruler_prompts._apart(sample)


def test_variables_are_rulers(small: Writer) -> None:
    said = written("vt", 8, small)
    example, asked = said.split("\n\nMemorize and track")
    head = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    assert example.startswith(head) and "assgined" not in said and asked.count("\n" + NOISE) == 8
    assert re.search(
        r"\nQuestion: Find all variables that are assigned the value (\d{5}) in the text above\. Answer: According to "
        r"the chain\(s\) of variable assignment in the text above, 5 variables are assigned the value \1, they are:  "
        r"?[A-Z]{3}( [A-Z]{3}){4}$",
        example,
    )
    assert re.search(r"\nVAR [A-Z]{5} = VAR [A-Z]{5} \n", asked) and asked.endswith("they are: ")


@pytest.mark.parametrize("length", [2048, 4096])
def test_common_words_are_lm_evals_and_nvidias_example(length: int, small: Writer) -> None:
    from lm_eval.tasks.ruler import cwe_utils

    said = written("cwe", 30, small, length)
    example, answered, asked = re.split(r"are:( 1\. .* 10\. .*)\n", said)
    common, uncommon, shown = ((6, 1), 20, (3, 1)) if length < 4096 else ((30, 3), 40, (10, 3))
    for text, words, times in ((example + "are:", uncommon, shown), (asked, 30, common)):
        context = text.split("most often.\n")[1].split("\nQuestion:")[0]
        assert text == cwe_utils.TEMPLATE.format(context=context)
        counts = Counter(re.findall(r"\d+\. (.+?)(?= \d+\. |$)", context))
        assert sorted(counts.values()) == [times[1]] * (words - 10) + [times[0]] * 10
    assert len(re.findall(r"\d+\. ", answered)) == 10


def test_coded_words_are_lm_evals(small: Writer) -> None:
    from lm_eval.tasks.ruler import fwe_utils

    said = written("fwe", 300, small)
    context = said.split("coded words. ")[1].split("\nQuestion:")[0]
    assert said == fwe_utils.TEMPLATE.format(context=context)
    random.seed(0)
    vocabulary = setting(small).length // 50

    def fits(text: str) -> Any:
        return SimpleNamespace(input_ids="")

    theirs, _, _ = fwe_utils.generate_input_output(10**9, fits, num_words=300, vocab_size=vocabulary)
    coded = theirs.split("coded words. ")[1].split("\nQuestion:")[0]
    assert sorted(Counter(context.split()).values()) == sorted(Counter(coded.split()).values())


@pytest.mark.parametrize(("task", "name", "least"), [("qa_1", "squad", 1), ("qa_2", "hotpot", 2)])
def test_questions_are_lm_evals(
    task: str, name: str, least: int, small: Writer, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks.ruler import qa_utils

    reader = qa_utils.read_squad if name == "squad" else qa_utils.read_hotpotqa
    monkeypatch.setattr(qa_utils, "download_json", lambda url: json.loads(files[name].read_text()))
    questions, documents = reader.__wrapped__()
    ours = small.sources.questions[name]
    assert ours is not None and ours.documents == documents and len(ours.asked) == len(questions) == 40
    for mine, theirs in zip(ours.asked, questions, strict=True):
        assert (mine.question, list(mine.answers)) == (theirs["query"], theirs["outputs"])
        assert list(mine.needed) == theirs["context"] and list(mine.near) == theirs.get("more_context", [])
    said = written(task, least, small)
    theirs, _ = qa_utils.generate_input_output(0, least, questions, documents)
    # documents may stand in another order
    parts = re.split(r"Document \d+:\n|\n\n", said)
    assert sorted(parts) == sorted(re.split(r"Document \d+:\n|\n\n", theirs + " Answer:"))
    assert re.findall(r"Document (\d+):\n", said) == [str(number) for number in range(1, least + 1)]


def test_tasks_are_lm_evals() -> None:
    import lm_eval

    folder = Path(lm_eval.__file__).parent / "tasks" / "ruler"
    names = {"qa_1": "qa_squad", "qa_2": "qa_hotpot"}
    for task, new_tokens in NEW_TOKENS.items():
        definition = (folder / f"{names.get(task, task)}.yaml").read_text()
        own = re.search(r"max_gen_toks: (\d+)", definition)
        # others include that of the first
        assert own is None or int(own[1]) == new_tokens, task
        assert ruler_tasks.TASKS[task].new_tokens == new_tokens
