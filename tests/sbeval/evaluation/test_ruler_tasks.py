"""Prompts are RULER's word for word, fill a length to the last unit, and are the same whatever else was written."""

import json
import random
import re
from bisect import bisect_left
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from sbeval.data import tokenizer
from sbeval.data.tokenizer import EOS, Library, Tokenizer
from sbeval.errors import InputError
from sbeval.evaluation import ruler_prompts, ruler_tasks, ruler_texts
from sbeval.evaluation.ruler_prompts import Prompt, Writer
from sbeval.evaluation.ruler_scores import score
from sbeval.evaluation.ruler_tasks import Setting
from sbeval.evaluation.ruler_texts import Sources, Tables
from sbeval.tables.published import LONGEST, RULER_TASKS, SHORTEST

LENGTH, COUNT = 2048, 3
# lm_eval's YAML files of RULER say the same
NEW_TOKENS = {name: 128 for name in ruler_tasks.TASKS if name.startswith("niah")} | {
    "vt": 30,
    "cwe": 120,
    "fwe": 50,
    "qa_1": 32,
    "qa_2": 32,
}


def sentences(number: int) -> str:
    return " ".join(f"Person {number} saw town {number + place} in {1900 + place}." for place in range(9))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("qa")
    paragraphs = [
        {
            "context": f"{sentences(number)} It was the {number}th.",
            "qas": [
                {
                    "question": f"Who was {number}?",
                    "is_impossible": False,
                    "answers": [{"text": f"the {number}th"}, {"text": f"It was {number}"}],
                },
                {"question": "Who was not?", "answers": [], "is_impossible": True},
            ],
        }
        for number in range(40)
    ]
    articles = [{"title": f"T{start}", "paragraphs": paragraphs[start : start + 4]} for start in range(0, 40, 4)]
    rows = [
        {
            "question": f"Where is {number}?",
            "answer": f"town {number}",
            "context": [[f"Title {one % 40}", [sentences(one % 40), " The end."]] for one in (number, number + 1)],
        }
        for number in range(40)
    ]
    found = {"squad": folder / "dev.json", "hotpot": folder / "hotpot.json"}
    found["squad"].write_text(json.dumps({"version": "v2.0", "data": articles}))
    found["hotpot"].write_text(json.dumps(rows))
    return found


@pytest.fixture(scope="module")
def sources(files: dict[str, Path]) -> Sources:
    return ruler_texts.load(None, str(files["squad"]), str(files["hotpot"]))


def llama(texts: list[str]) -> Library:
    """A tokenizer that cuts text by another pattern than GPT-2's: digits in threes, line ends with what is before."""
    pattern = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1024, initial_alphabet=alphabet, special_tokens=[EOS], show_progress=False)
    backend.train_from_iterator(texts, trainer)
    return Library(backend, name="llama", eos=0)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def text(request: pytest.FixtureRequest, sources: Sources, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    words = " ".join([*sources.essay.words[:20000], *ruler_tasks.words("noun", "adjective")])
    if request.param == "llama":
        return llama([words])
    return tokenizer.load("bpe:1024", train_texts=lambda: [words], cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def writer(text: Tokenizer, sources: Sources, tmp_path_factory: pytest.TempPathFactory) -> Writer:
    return Writer(text, sources, tmp_path_factory.mktemp("cache"))


@pytest.fixture
def small(sources: Sources, tmp_path: Path) -> Writer:
    """Writes in bytes: a letter is a token."""
    return Writer(tokenizer.load("bytes", cache_dir=tmp_path), sources, tmp_path)


def setting(writer: Writer, length: int = LENGTH, **others: Any) -> Setting:
    return Setting(length=length, seed=42, tables=writer.tables, sources=writer.sources, **others)


def same(one: list[Prompt], other: list[Prompt]) -> bool:
    return len(one) == len(other) and all(
        np.array_equal(a.tokens, b.tokens)
        and np.array_equal(a.answer, b.answer)
        and (a.references, a.depth) == (b.references, b.depth)
        for a, b in zip(one, other, strict=True)
    )


# length


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


def near(draft: ruler_tasks.Draft, tokens: int) -> range:
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
        small.prompts("vt", 512, 42, 1, training=True)


def test_words_that_run_out_before_the_length_are_an_error(small: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    few = ruler_tasks.words("noun")[:300]
    monkeypatch.setattr(ruler_tasks, "words", lambda *kinds: few)
    with pytest.raises(InputError, match="cwe cannot fill 32768 tokens: with all of its words its prompt") as caught:
        small.prompts("cwe", 32768, 42, 2)
    length = int(re.findall(r"give --length (\d+) or less, or leave cwe out", str(caught.value))[0])
    for prompt in small.prompts("cwe", length, 42, 2):
        # three times the longest word and its number
        assert 0 <= length - NEW_TOKENS["cwe"] - len(prompt.tokens) <= 3 * (max(map(len, few)) + len(" 1000. "))
    with pytest.raises(InputError, match=r"name others with --finetune-task, or train at --train-len \d+ or less"):
        small.prompts("cwe", 32768, 42, 1, training=True)


# one sample


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
    lessons = writer.prompts(task, LENGTH, 42, COUNT, training=True)
    assert not {item.tokens.tobytes() for item in tests} & {item.tokens.tobytes() for item in lessons}
    assert not {item.references for item in tests} & {item.references for item in lessons}
    assert writer.path(task, LENGTH, 42) != writer.path(task, LENGTH, 42, training=True)


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


# words


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
    monkeypatch.setattr(ruler_tasks, "DEPTHS", depths)
    sample = ruler_tasks.draft(task, 0, setting(three)).write(8)
    text = re.sub(r"One of the special magic numbers for \S+ is: \d{7}\.", "ONE", sample.prompt)
    context = text.split("afterwards.")[1].split("What ")[0]
    assert context == wanted.format("This is one.", "Here is another!", "Is it?")
    assert three._encode([sample])[0].tolist() == three.tokenizer.encode(sample.prompt).tolist()
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


# scores


def test_scores_are_rulers() -> None:
    assert score("It is A or\x07b", ("a", "B", "c", "d"), "all") == 0.5
    assert score("it is b", ("a", "B", "c"), "part") == 1 and score("", ("a",), "part") == 0
    assert score("8231406, 12", ("8231406",), "all") == 1 and score("823140", ("8231406",), "all") == 0


# what is kept


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


# files


def test_questions_may_be_lines(tmp_path: Path, files: dict[str, Path]) -> None:
    published = ruler_texts.load(None, str(files["squad"]), str(files["hotpot"])).questions
    data = json.loads(files["squad"].read_text())["data"]
    paragraphs = [(article["title"], item) for article in data for item in article["paragraphs"]]
    lines = {
        "contexts": [{"id": number, "text": item["context"]} for number, (_, item) in enumerate(paragraphs)],
        "questions": [
            {
                "title": title,
                "ctx": number,
                "question": asked["question"],
                "answers": [answer["text"] for answer in asked["answers"]],
                "impossible": not asked["answers"],
            }
            for number, (title, item) in enumerate(paragraphs)
            for asked in item["qas"]
        ],
        "hotpot": json.loads(files["hotpot"].read_text()),
    }
    for name, rows in lines.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = ruler_texts.load(None, str(tmp_path / "questions.jsonl"), str(tmp_path / "hotpot.jsonl")).questions
    for name in ("squad", "hotpot"):
        one, other = published[name], found[name]
        assert one is not None and other is not None and (one.documents, one.asked) == (other.documents, other.asked)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, r"cannot read .*squad\.json: No such file"),
        ("no json", r"squad\.json is not JSON"),
        ("{}", r"--squad .*squad\.json is not SQuAD: KeyError 'data'"),
        ('{"data": []}', r"--squad .*squad\.json has no question with an answer"),
    ],
)
def test_files_that_are_none_are_errors(content: str | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "squad.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=said):
        ruler_texts.load(None, str(path), None)


def test_more_samples_than_questions_is_an_error(small: Writer) -> None:
    with pytest.raises(InputError, match=r"dev\.json has 40 questions: --samples can be that many at most"):
        small.prompts("qa_1", 2048, 42, 41)


def test_an_essay_without_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no text: give"):
        ruler_texts.load(str(tmp_path), None, None)


def test_prompts_that_are_written_in_parts_are_those_of_the_whole(writer: Writer) -> None:
    tables = Tables(writer.tokenizer)
    part = tables.new([" one", " two", "\nthree"]).part([2, 0, 0])
    assert part.text == "\nthree one one" and part.tokens == len(part.ids)
    assert part.ids.tolist() == [
        token for item in ("\nthree", " one", " one") for token in writer.tokenizer.encode(item)
    ]
    assert tuple(ruler_tasks.TASKS) == RULER_TASKS and (SHORTEST, LONGEST) == (512, 131072)
