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

import ast
import dataclasses
import functools
import importlib.util
import itertools
import math
import random
import string
import uuid
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sbeval.errors import InputError
from sbeval.evaluation.ruler_texts import Part, Pieces, Questions, Sources, Tables, opened

# depths of needles in an essay, per cent
DEPTHS = [int(depth) for depth in np.round(np.linspace(0, 100, num=40))]
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NIAH_ANSWER = " The special magic {type_needle_v} for {query} mentioned in the provided text are"
MISSING = "needle needs {} for the prompts of RULER: pip install 'sbeval[needle]'"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A prompt, its reference answer, and the references that are searched in a completion. depth: per cent of the
    haystack before the queried needle; None where it is not a single one. further: of a lesson, more questions, each
    with its answer."""

    parts: Sequence[Part]
    answer: str
    references: tuple[str, ...]
    depth: float | None = None
    further: tuple[tuple[str, str], ...] = ()

    @property
    def prompt(self) -> str:
        return "".join(part.text for part in self.parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A sample whose haystack is still open: `least` to `most` units.

    tokens: an estimate for so many units, whose error changes little from one number to the next. largest: maximum
    tokens of a unit, where it is an error that all units do not fill the length; else None.
    """

    least: int
    most: int
    tokens: Callable[[int], int]
    write: Callable[[int], Sample]
    largest: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """The inputs of a draft. use: test, train or validation, which draw different samples; only in a test does the
    essay start at its beginning."""

    length: int
    seed: int
    tables: Tables
    sources: Sources
    use: str = "test"


@dataclass(frozen=True, slots=True, kw_only=True)
class Niah:
    """Needles in a haystack of `noise`, `essay` or `needles`."""

    haystack: str
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1


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
        return _niah(task.niah, key, setting)
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
    return _niah(more, key, setting, questions=max(1, needles // (niah.values * niah.queries)))


@functools.cache
def templates(module: str) -> dict[str, Any]:
    """Return the literals at the top of a module of lm_eval's RULER; importing it would access the network."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise InputError(MISSING.format("lm_eval"))
    path = Path(spec.submodule_search_locations[0]) / "tasks" / "ruler" / f"{module}.py"
    try:
        source = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; needle needs lm_eval 0.4.13 or later") from None
    values = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                values[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                continue
    return values


@functools.cache
def words(*kinds: str) -> list[str]:
    """Return the words of wonderwords of these kinds, sorted."""
    try:
        import wonderwords
    except ImportError:
        raise InputError(MISSING.format("wonderwords")) from None
    return sorted({word for kind in kinds for word in wonderwords.RandomWord().filter(include_categories=[kind])})


def _random(kind: str, rng: random.Random) -> str:
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return f"{rng.choice(words('adjective'))}-{rng.choice(words('noun'))}"


def _niah(niah: Niah, key: str, setting: Setting, questions: int = 1) -> Draft:
    rng = random.Random(key)
    needle: str = templates("prepare_niah")["NEEDLE"]
    keys = [_random(niah.key, rng) for _ in range(niah.keys)]
    pairs = [(name, _random(niah.value, rng)) for name in keys for _ in range(niah.values)]
    rng.shuffle(pairs)
    needles = [needle.format(type_needle_v=niah.value, key=name, value=value) for name, value in pairs]
    asked = rng.sample(keys, niah.queries * questions)
    queried, *others = (asked[start : start + niah.queries] for start in range(0, len(asked), niah.queries))

    def values(names: Sequence[str]) -> tuple[str, ...]:
        # in the order of the question, values of one key in the order of the text
        return tuple(value for name in names for other, value in pairs if other == name)

    answers = values(queried)
    sought = [index for index, (name, _) in enumerate(pairs) if name in queried]
    head, tail = setting.tables.around(_niah_template(niah, queried))
    further = tuple(
        (_niah_template(niah, names).partition("{context}")[2], " " + ", ".join(values(names))) for names in others
    )

    def sample(haystack: Sequence[Part], depths: Sequence[float], gap: str = "") -> Sample:
        end = setting.tables.new([gap + tail.text]).part([0]) if gap else tail
        return Sample(
            parts=[head, *haystack, end],
            answer=" " + ", ".join(answers),
            references=answers,
            depth=depths[sought[0]] if len(sought) == 1 else None,
            further=further,
        )

    fixed = head.tokens + tail.tokens
    if niah.haystack == "essay":
        return _in_essay(needles, fixed, rng, setting, sample)
    lines = _noise(setting) if niah.haystack == "noise" else _needles(niah, needle, rng, setting)
    added = setting.tables.new([f"\n{text}" for text in needles])
    sums = np.cumsum(lines.tokens)

    def write(units: int) -> Sample:
        cuts = sorted(random.Random(f"{key} {units}").sample(range(units), len(needles)))
        haystack: list[Part] = []
        for number, (first, last) in enumerate(itertools.pairwise([0, *cuts, units])):
            haystack += [lines.part(range(first, last)), added.part(range(number, min(number + 1, len(needles))))]
        return sample(haystack, [100 * cut / units for cut in cuts])

    return Draft(
        least=len(needles),
        most=len(sums),
        write=write,
        tokens=lambda units: fixed + int(added.tokens.sum() + sums[units - 1]),
    )


def _noise(setting: Setting) -> Pieces:
    # one at least, of which the length is then said to be too short
    return setting.tables.kept(f"noise {setting.length}", lambda: ["\n" + NOISE] * max(1, setting.length // 4))


def _needles(niah: Niah, needle: str, rng: random.Random, setting: Setting) -> Pieces:
    """Return lines like the needle, somewhat more than fit."""

    def lines(count: int, rng: random.Random) -> list[str]:
        pairs = ({"key": _random(niah.key, rng), "value": _random(niah.value, rng)} for _ in range(count))
        return ["\n" + needle.format(type_needle_v=niah.value, **pair) for pair in pairs]

    some = setting.tables.kept(f"needles {niah.key} {niah.value}", lambda: lines(64, random.Random(0)))
    drawn = lines(int(1.1 * setting.length / some.tokens.mean()) + 8, rng)
    while (pieces := setting.tables.new(drawn)).tokens.sum() < setting.length:
        drawn += lines(len(drawn) // 4, rng)
    return pieces


def _niah_template(niah: Niah, queried: Sequence[str]) -> str:
    """Return the template with everything but its context filled in."""
    template: str = templates("niah_utils")["TEMPLATE"] + NIAH_ANSWER
    noun = niah.value
    if niah.queries * niah.values == 1:
        for many, one in (("Some", "A"), ("are all", "is"), ("are", "is")):
            template = template.replace(many, one)
        noun = noun[:-1]
    query = queried[0] if len(queried) == 1 else ", ".join(queried[:-1]) + ", and " + queried[-1]
    return template.replace("{type_needle_v}", noun).replace("{query}", query)


def _in_essay(
    needles: Sequence[str],
    fixed: int,
    rng: random.Random,
    setting: Setting,
    sample: Callable[[Sequence[Part], Sequence[float], str], Sample],
) -> Draft:
    """Return a draft with needles after sentences of an essay, whose units are words.

    As upstream, needles and the texts before, between and after them are joined by spaces, also where a text is empty.
    """
    essay = setting.sources.essay
    words = setting.tables.kept("essay", lambda: [f" {word}" for word in essay.words])
    sums = setting.tables.sums("essay", words)
    count = len(needles)
    # needles after text, then needles after an empty text
    added = setting.tables.new([f"{gap}{text}" for gap in (" ", "  ") for text in needles])
    depths = sorted(rng.sample(DEPTHS, count))
    first = rng.choice(essay.starts[: len(essay.starts) // 2]) if setting.use != "test" else 0
    # sentences before this sample's part of the essay
    skipped = bisect_left(essay.starts, first)

    def write(units: int) -> Sample:
        sentences = bisect_left(essay.starts, first + units) - skipped
        haystack: list[Part] = []
        last = first
        for number, depth in enumerate(depths):
            sentence = int(sentences * (depth / 100))
            here = essay.starts[skipped + sentence] if sentence < sentences else first + units
            haystack += [words.part(range(last, here)), added.part([number if last < here else count + number])]
            last = here
        rest = words.part(range(last, first + units))
        return sample(opened([*haystack, rest]), depths, "" if rest.indices else " ")

    return Draft(
        least=count,
        most=min(setting.length, len(essay.words) - first),
        write=write,
        tokens=lambda units: fixed + int(added.tokens[:count].sum() + sums[first + units] - sums[first]),
    )


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
