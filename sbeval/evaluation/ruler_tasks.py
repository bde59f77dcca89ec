"""The 13 tasks of RULER (Hsieh et al. 2024, arXiv 2404.06654): prompts whose amount of haystack is still open.

A sample is a function of task, length, tokenizer, seed and index alone. It has random generators of its own, and the
tokenizer only decides how much haystack fits (`sbeval.evaluation.ruler_prompts`):

    A special magic number is hidden within the following text. [...]        instruction
    The grass is green. The sky is blue. [...]                               haystack: a unit, repeated
    One of the special magic numbers for long-kayak is: 8231406.             needle, at some depth
    The grass is green. [...]
    What is the special magic number for long-kayak mentioned in the [...]   question, and the beginning of the answer

Templates are read from the installed lm_eval. Its port departs from NVIDIA/RULER in these points:

    lm_eval                                                     here
    qa: mean over the references of one answer                  1 if any of them is found, as in NVIDIA's
    cwe: no worked example in the prompt                        with one, as in NVIDIA's
    vt: a misspelt word (assgined; so do older NVIDIA's),       assigned; lines joined by newlines, as in NVIDIA's
        lines joined by spaces
    fwe: up to L + 50 tokens                                    at most L, tokens to generate included
    fitted in steps of 5 to 500 units, to 19 % of L             fitted to the last unit (word, line, document)
    no end where the smallest prompt is longer than L           an error (NVIDIA's has no end either)
    samples depend on earlier draws of all tasks                each has its own seed
    metrics are called 4096, 8192, ...                          `score`, with the length in a column
    essays, SQuAD and HotpotQA from the network                 files, and for essays a built-in text

Departures of ours: the essay is Walden (Henry David Thoreau, 1854; public domain; Project Gutenberg's text 205 without
its table of contents) or a file of the user's, since RULER's own are under copyright; sentences end by a rule (. ! or ?
before a capital), not by nltk's model; the worked example of vt, at most 500 tokens upstream, has at most a third of L
where that is less and five lines of noise fit; where all words of wonderwords do not fill L in cwe (131072 tokens with
some tokenizers), NVIDIA draws from a longer list, which is not available here: that is an error. Where RULER's
references are unordered, teacher forcing takes their order in the text (values of one key, common words), separated as
in a worked example, else by commas.
"""

import dataclasses
import itertools
import math
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sbeval.errors import InputError
from sbeval.evaluation import ruler_needles
from sbeval.evaluation.ruler_drafts import Draft, Sample, Setting, templates, words
from sbeval.evaluation.ruler_needles import NOISE, Niah
from sbeval.evaluation.ruler_texts import Questions, opened


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Tokens to generate, rule of the score, and what is drawn. source: of the questions, `squad` or `hotpot`."""

    new_tokens: int
    score: str = "all"
    niah: Niah | None = None
    source: str = ""


TASKS = {
    "niah_single_1": Task(new_tokens=128, niah=Niah(haystack="noise")),
    "niah_single_2": Task(new_tokens=128, niah=Niah(haystack="essay")),
    "niah_single_3": Task(new_tokens=128, niah=Niah(haystack="essay", value="uuids")),
    "niah_multikey_1": Task(new_tokens=128, niah=Niah(haystack="essay", keys=4)),
    "niah_multikey_2": Task(new_tokens=128, niah=Niah(haystack="needles")),
    "niah_multikey_3": Task(new_tokens=128, niah=Niah(haystack="needles", key="uuids", value="uuids")),
    "niah_multivalue": Task(new_tokens=128, niah=Niah(haystack="essay", values=4)),
    "niah_multiquery": Task(new_tokens=128, niah=Niah(haystack="essay", keys=4, queries=4)),
    "vt": Task(new_tokens=30),
    "cwe": Task(new_tokens=120),
    "fwe": Task(new_tokens=50),
    "qa_1": Task(new_tokens=32, score="part", source="squad"),
    "qa_2": Task(new_tokens=32, score="part", source="hotpot"),
}


def draft(name: str, index: int, setting: Setting) -> Draft:
    """Return sample number `index` of a task, its haystack still open."""
    task = TASKS[name]
    key = f"{setting.use} {name} {setting.length} {setting.seed} {index}"
    if task.niah is not None:
        return ruler_needles.draft(task.niah, key, setting)
    if task.source:
        return _qa(setting.sources.questions[task.source], index, key, setting)
    return {"vt": _vt, "cwe": _cwe, "fwe": _fwe}[name](key, setting)


def lesson(name: str, index: int, setting: Setting, needles: int, *, words: bool = False) -> Draft:
    """Return a draft like those of a task that hides so many needles, or more, and asks for each of them.

    One question follows the answer to another. words: the values are words. Tasks without needles have one question.
    """
    niah = TASKS[name].niah
    if niah is None:
        return draft(name, index, setting)
    more = dataclasses.replace(
        niah, keys=max(niah.keys, needles // niah.values), value="words" if words else niah.value
    )
    key = f"{setting.use} {name} {setting.length} {setting.seed} {index} {needles} {more.value}"
    return ruler_needles.draft(more, key, setting, questions=max(1, needles // (niah.values * niah.queries)))


def _vt(key: str, setting: Setting) -> Draft:
    rng = random.Random(key)
    config = templates("vt_utils")["CONFIG"]["variable_tracking"]
    template = config["template"] + config["answer_prefix"].replace("assgined", "assigned")
    line = int(setting.tables.kept("noise", lambda: ["\n" + NOISE]).tokens[0])

    def chain(letters: int) -> tuple[list[str], list[str], str]:
        names: list[str] = []
        while len(names) < 5:
            name = "".join(rng.choices(string.ascii_uppercase, k=letters))
            names += [name] if name not in names else []
        value = str(rng.randint(10000, 99998))
        # the space at the end is upstream's
        steps = [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a} " for a, b in itertools.pairwise(names))]
        return names, steps, value

    def lines(units: int, steps: Sequence[str], order: random.Random) -> list[str]:
        text = [NOISE] * units
        for moved, (index, step) in enumerate(zip(sorted(order.sample(range(units), 5)), steps, strict=True)):
            text.insert(index + moved, step)
        return text

    example_names, example_steps, value = chain(3)
    filled = template.replace("{query}", value).replace("{num_v}", "5")
    without = setting.tables.new([filled + "\n".join(example_steps)]).tokens[0]
    units = max(5, int(min(500, setting.length // 3) - without) // line)
    noisy = filled.replace("{context}", "\n".join(lines(units, example_steps, rng)))
    example = f"{noisy} {' '.join(example_names)}\n\n"

    names, steps, value = chain(5)
    head, tail = setting.tables.around(example + template.replace("{query}", value).replace("{num_v}", "5"))
    fixed = head.tokens + tail.tokens + int(setting.tables.new(["\n" + step for step in steps]).tokens.sum())

    def write(units: int) -> Sample:
        text = lines(units, steps, random.Random(f"{key} {units}"))
        # white space belongs to the next piece
        spaced = [
            ("\n\n" if index == 0 else " \n" if text[index - 1].endswith(" ") else "\n") + item.rstrip()
            for index, item in enumerate(text)
        ]
        end = setting.tables.new([" " + tail.text]).part([0]) if text[-1].endswith(" ") else tail
        parts = [head, setting.tables.repeated(spaced), end]
        return Sample(parts=parts, answer=" " + " ".join(names), references=tuple(names))

    return Draft(least=5, most=setting.length, write=write, tokens=lambda units: fixed + units * line)


def _numbered(entries: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(entries, 1))


def _cwe(key: str, setting: Setting) -> Draft:
    config = templates("cwe_utils")["CONFIG"]
    template = config["template"] + config["answer_prefix"]
    shown, often, seldom = (20, (3, 1), (6, 1)) if setting.length < 4096 else (40, (10, 3), (30, 3))
    vocabulary = words("noun", "adjective", "verb")
    rng = random.Random(key)

    def entries(chosen: Sequence[int], times: tuple[int, int], order: random.Random) -> list[int]:
        indices = list(chosen[:10]) * times[0] + list(chosen[10:]) * times[1]
        order.shuffle(indices)
        return indices

    spelt = setting.tables.kept("words", lambda: [f" {word}" for word in vocabulary])
    # an entry has at least three tokens; the smallest prompt is written at any length, for the error if it does not fit
    count = max(setting.length // 3, 10 * seldom[0] + 1)
    labels = setting.tables.kept(f"labels {count}", lambda: [f" {number}." for number in range(1, count)])
    example = rng.sample(range(len(vocabulary)), shown)
    listed = _numbered([vocabulary[index] for index in entries(example, often, rng)])
    answered = " " + _numbered([vocabulary[index] for index in example[:10]]) + "\n"
    head, tail = setting.tables.around(template.replace("{context}", listed) + answered + template)
    chosen = rng.sample(range(len(vocabulary)), len(vocabulary))
    sums = np.cumsum(spelt.tokens[chosen] * np.repeat(seldom, (10, len(chosen) - 10)))
    label_sums = np.cumsum(labels.tokens)
    largest = seldom[1] * int(spelt.tokens.max() + labels.tokens.max())

    def entry_count(units: int) -> int:
        return 10 * seldom[0] + (units - 10) * seldom[1]

    def write(units: int) -> Sample:
        listed = entries(chosen[:units], seldom, random.Random(f"{key} {units}"))
        # all are equally frequent: in the order of their first occurrence
        first = _numbered([vocabulary[index] for index in sorted(chosen[:10], key=listed.index)])
        context = opened(setting.tables.woven(labels, range(len(listed)), spelt, listed))
        common = tuple(vocabulary[index] for index in chosen[:10])
        return Sample(parts=[head, *context, tail], answer=" " + first, references=common)

    return Draft(
        least=10,
        most=max(10, min(len(chosen), 10 + (len(label_sums) - entry_count(10)) // seldom[1])),
        write=write,
        largest=largest,
        tokens=lambda units: head.tokens + tail.tokens + int(sums[units - 1] + label_sums[: entry_count(units)][-1]),
    )


# with fewer words ranks 4 and 5 of the coded text can be equally frequent, and the answer is ambiguous
LEAST_CODED = 83


def _fwe(key: str, setting: Setting) -> Draft:
    config = templates("fwe_utils")["CONFIG"]
    head, tail = setting.tables.around(config["template"] + config["answer_prefix"])
    rng = random.Random(key)
    coded: dict[str, None] = {}
    # the answer is the three words after the first
    while len(coded) < max(4, setting.length // 50):
        coded["".join(rng.choices(string.ascii_lowercase, k=6))] = None
    vocabulary = ["...", *list(coded)[1:]]
    spelt = setting.tables.new([f" {word}" for word in vocabulary])
    # Zipf with exponent 2: zeta(2) = pi^2 / 6
    shares = np.arange(1.0, len(vocabulary) + 1) ** -2 / (math.pi**2 / 6)

    def times(units: int) -> Any:
        return (units * shares).astype(np.int64)

    def write(units: int) -> Sample:
        indices = np.repeat(np.arange(len(vocabulary)), times(units)).tolist()
        random.Random(f"{key} {units}").shuffle(indices)
        top = tuple(vocabulary[1:4])
        return Sample(parts=[head, spelt.part(indices), tail], answer=" " + ", ".join(top), references=top)

    return Draft(
        least=LEAST_CODED,
        most=2 * setting.length,
        write=write,
        tokens=lambda units: head.tokens + tail.tokens + int(times(units) @ spelt.tokens),
    )


def _qa(questions: Questions | None, index: int, key: str, setting: Setting) -> Draft:
    assert questions is not None, "a task without its file is not run"
    config = templates("qa_utils")["CONFIG"]
    label, _ = templates("qa_utils")["DOCUMENT_PROMPT"].split("{document}")
    if index >= len(questions.asked):
        raise InputError(f"{questions.path} has {len(questions.asked)} questions: --samples can be that many at most")
    question = questions.asked[index]
    rng = random.Random(key)
    # first the documents that the question needs, then those on its subject, then any
    near = rng.sample(question.near, len(question.near))
    taken = {*question.needed, *near}
    rest = [number for number in range(len(questions.documents)) if number not in taken]
    order = [*question.needed, *near, *rng.sample(rest, len(rest))]
    head, tail = setting.tables.around(config["template"].replace("{query}", question.question) + " Answer:")
    documents = setting.tables.kept(questions.path, lambda: ["\n" + text for text in questions.documents])
    labels = setting.tables.kept(
        f"{questions.path} labels",
        lambda: ["\n\n" + label.replace("{i}", str(number)).rstrip() for number in range(1, len(order) + 1)],
    )
    sums = np.cumsum(documents.tokens[order]) + np.cumsum(labels.tokens[: len(order)])

    def write(units: int) -> Sample:
        shuffled = random.Random(f"{key} {units}").sample(order[:units], units)
        single = len(question.needed) == 1
        return Sample(
            parts=[head, *setting.tables.woven(labels, range(units), documents, shuffled), tail],
            answer=" " + question.answers[0],
            references=question.answers,
            depth=100 * shuffled.index(question.needed[0]) / max(1, units - 1) if single else None,
        )

    return Draft(
        least=len(question.needed),
        most=len(order),
        write=write,
        tokens=lambda units: head.tokens + tail.tokens + int(sums[units - 1]),
    )
