"""The 13 tasks of RULER (Hsieh et al. 2024, arXiv 2404.06654): prompts of which only the amount of haystack is open.

A sample is a function of task, length, tokenizer, seed and index alone. Its draws come from generators of its own, and
the tokenizer only decides how much haystack fits (`sbeval.evaluation.ruler_prompts`):

    A special magic number is hidden within the following text. [...]        instruction
    The grass is green. The sky is blue. [...]                               haystack: a unit, repeated
    One of the special magic numbers for long-kayak is: 8231406.             needle, at some depth
    The grass is green. [...]
    What is the special magic number for long-kayak mentioned in the [...]   question, and the beginning of the answer

Templates are read from the installed lm_eval. Its port departs from NVIDIA/RULER; here is what, and our choice:

    lm_eval                                                     here
    qa: mean over the references of one answer                  1 if any of them is found, as NVIDIA
    cwe: no worked example in the prompt                        with it, as NVIDIA
    vt: a misspelt word (assgined; so do older NVIDIA's),       assigned; lines joined by newlines, as NVIDIA
        lines joined by spaces
    fwe: up to L + 50 tokens                                    at most L with the tokens to generate
    fitted in steps of 5 to 500 units, to 19 % of L             fitted to the last unit (word, line, document)
    no end at lengths that the smallest prompt does not fit     an error that says so (NVIDIA's has no end either)
    samples depend on what was drawn before, by any task        each has its own seed
    metrics are called 4096, 8192, ...                          `score`, with the length in a column
    essays, SQuAD and HotpotQA from the network                 files, and for essays a built-in text

Departures of ours: the essay is Walden (Henry David Thoreau, 1854; public domain; Project Gutenberg's text 205 without
its table of contents), for RULER's own are under copyright, or a file of the user's; sentences end by a rule (. ! or ?
before a capital), not by nltk's model; the worked example of vt, at most 500 tokens upstream, has at most a third of L
where that is less and five lines of noise fit; where all words of wonderwords do not fill L in cwe (131072 tokens with
some tokenizers), NVIDIA draws from a longer list, and here that is an error, for the list is not at hand. Where RULER's
references have no order, teacher forcing takes that in which they stand (values of one key, common words); between them
stands what a worked example has, else a comma.
"""

import ast
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
    """A prompt, what follows it when the model is right, and what is looked for in what it says. `depth` is where the
    needle that is asked for stands, in per cent of the haystack before it; None where there is no single one."""

    parts: Sequence[Part]
    answer: str
    references: tuple[str, ...]
    depth: float | None = None

    @property
    def prompt(self) -> str:
        return "".join(part.text for part in self.parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A sample of which the haystack is open: `least` to `most` units.

    tokens: of the prompt with so many units, but for an error that changes little from one number to the next.
    largest: tokens of a unit at most, where fewer units than fill the length are an error; else None.
    """

    least: int
    most: int
    tokens: Callable[[int], int]
    write: Callable[[int], Sample]
    largest: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a draft may depend on. `training` draws other samples, whose essay starts anywhere."""

    length: int
    seed: int
    tables: Tables
    sources: Sources
    training: bool = False


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
    """Tokens that are generated, how the answer is scored, and what is drawn."""

    new_tokens: int
    score: str = "all"
    niah: Niah | None = None
    source: str = ""  # of its questions: `squad` or `hotpot`


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
    """Sample number `index` of a task, its haystack still open."""
    task = TASKS[name]
    key = f"{'train' if setting.training else 'test'} {name} {setting.length} {setting.seed} {index}"
    if task.niah is not None:
        return _niah(task.niah, key, setting)
    if task.source:
        return _qa(setting.sources.questions[task.source], index, key, setting)
    return {"vt": _vt, "cwe": _cwe, "fwe": _fwe}[name](key, setting)


@functools.cache
def templates(module: str) -> dict[str, Any]:
    """The literals at the top of a module of lm_eval's RULER, which is read, not run: it would ask the network."""
    found = importlib.util.find_spec("lm_eval")
    if found is None or not found.submodule_search_locations:
        raise InputError(MISSING.format("lm_eval"))
    path = Path(found.submodule_search_locations[0]) / "tasks" / "ruler" / f"{module}.py"
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
    """The words of wonderwords of these kinds, sorted."""
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


def _niah(niah: Niah, key: str, setting: Setting) -> Draft:
    rng = random.Random(key)
    needle: str = templates("prepare_niah")["NEEDLE"]
    keys = [_random(niah.key, rng) for _ in range(niah.keys)]
    pairs = [(name, _random(niah.value, rng)) for name in keys for _ in range(niah.values)]
    rng.shuffle(pairs)
    needles = [needle.format(type_needle_v=niah.value, key=name, value=value) for name, value in pairs]
    asked = rng.sample(keys, niah.queries)
    # in the order of the question, values of one key in the order in which they stand
    answers = tuple(value for name in asked for other, value in pairs if other == name)
    sought = [place for place, (name, _) in enumerate(pairs) if name in asked]
    head, tail = setting.tables.around(_niah_template(niah, asked))

    def sample(haystack: Sequence[Part], depths: Sequence[float], gap: str = "") -> Sample:
        end = setting.tables.new([gap + tail.text]).part([0]) if gap else tail
        return Sample(
            parts=[head, *haystack, end],
            answer=" " + ", ".join(answers),
            references=answers,
            depth=depths[sought[0]] if len(sought) == 1 else None,
        )

    fixed = head.tokens + tail.tokens
    if niah.haystack == "essay":
        return _in_essay(needles, fixed, rng, setting, sample)
    lines = _noise(setting) if niah.haystack == "noise" else _needles(niah, needle, rng, setting)
    added = setting.tables.new([f"\n{text}" for text in needles])
    sums = np.cumsum(lines.tokens)

    def write(units: int) -> Sample:
        places = sorted(random.Random(f"{key} {units}").sample(range(units), len(needles)))
        haystack: list[Part] = []
        for number, (first, last) in enumerate(itertools.pairwise([0, *places, units])):
            haystack += [lines.part(range(first, last)), added.part(range(number, min(number + 1, len(needles))))]
        return sample(haystack, [100 * place / units for place in places])

    return Draft(
        least=len(needles),
        most=len(sums),
        write=write,
        tokens=lambda units: fixed + int(added.tokens.sum() + sums[units - 1]),
    )


def _noise(setting: Setting) -> Pieces:
    return setting.tables.kept(f"noise {setting.length}", lambda: ["\n" + NOISE] * (setting.length // 4))


def _needles(niah: Niah, needle: str, rng: random.Random, setting: Setting) -> Pieces:
    """Lines like the needle, somewhat more than fit."""

    def lines(count: int, rng: random.Random) -> list[str]:
        pairs = ({"key": _random(niah.key, rng), "value": _random(niah.value, rng)} for _ in range(count))
        return ["\n" + needle.format(type_needle_v=niah.value, **pair) for pair in pairs]

    some = setting.tables.kept(f"needles {niah.key} {niah.value}", lambda: lines(64, random.Random(0)))
    drawn = lines(int(1.1 * setting.length / some.tokens.mean()) + 8, rng)
    while (found := setting.tables.new(drawn)).tokens.sum() < setting.length:
        drawn += lines(len(drawn) // 4, rng)
    return found


def _niah_template(niah: Niah, asked: Sequence[str]) -> str:
    """The template with all but its context."""
    template: str = templates("niah_utils")["TEMPLATE"] + NIAH_ANSWER
    noun = niah.value
    if niah.queries * niah.values == 1:
        for many, one in (("Some", "A"), ("are all", "is"), ("are", "is")):
            template = template.replace(many, one)
        noun = noun[:-1]
    query = asked[0] if len(asked) == 1 else ", ".join(asked[:-1]) + ", and " + asked[-1]
    return template.replace("{type_needle_v}", noun).replace("{query}", query)


def _in_essay(
    needles: Sequence[str],
    fixed: int,
    rng: random.Random,
    setting: Setting,
    sample: Callable[[Sequence[Part], Sequence[float], str], Sample],
) -> Draft:
    """Needles after sentences of an essay, of which the units are words.

    As upstream, needles and what stands before, between and after them are joined by spaces, also where that is empty.
    """
    essay = setting.sources.essay
    words = setting.tables.kept("essay", lambda: [f" {word}" for word in essay.words])
    sums = setting.tables.sums("essay", words)
    count = len(needles)
    # as they follow text, then as they follow nothing
    added = setting.tables.new([f"{gap}{text}" for gap in (" ", "  ") for text in needles])
    depths = sorted(rng.sample(DEPTHS, count))
    first = rng.choice(essay.starts[: len(essay.starts) // 2]) if setting.training else 0
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
        return (
            names,
            [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a} " for a, b in itertools.pairwise(names))],
            value,
        )

    def lines(units: int, steps: Sequence[str], order: random.Random) -> list[str]:
        text = [NOISE] * units
        for moved, (place, step) in enumerate(zip(sorted(order.sample(range(units), 5)), steps, strict=True)):
            text.insert(place + moved, step)
        return text

    shown, shown_steps, value = chain(3)
    filled = template.replace("{query}", value).replace("{num_v}", "5")
    without = setting.tables.new([filled + "\n".join(shown_steps)]).tokens[0]
    units = max(5, int(min(500, setting.length // 3) - without) // line)
    example = filled.replace("{context}", "\n".join(lines(units, shown_steps, rng))) + " " + " ".join(shown) + "\n\n"

    names, steps, value = chain(5)
    head, tail = setting.tables.around(example + template.replace("{query}", value).replace("{num_v}", "5"))
    fixed = head.tokens + tail.tokens + int(setting.tables.new(["\n" + step for step in steps]).tokens.sum())

    def write(units: int) -> Sample:
        text = lines(units, steps, random.Random(f"{key} {units}"))
        # white space belongs to what comes after it
        spaced = [
            ("\n\n" if place == 0 else " \n" if text[place - 1].endswith(" ") else "\n") + item.rstrip()
            for place, item in enumerate(text)
        ]
        end = setting.tables.new([" " + tail.text]).part([0]) if text[-1].endswith(" ") else tail
        parts = [head, setting.tables.repeated(spaced), end]
        return Sample(parts=parts, answer=" " + " ".join(names), references=tuple(names))

    return Draft(least=5, most=setting.length, write=write, tokens=lambda units: fixed + units * line)


def _numbered(entries: Sequence[str]) -> str:
    return " ".join(f"{place}. {word}" for place, word in enumerate(entries, 1))


def _cwe(key: str, setting: Setting) -> Draft:
    config = templates("cwe_utils")["CONFIG"]
    template = config["template"] + config["answer_prefix"]
    shown, often, seldom = (20, (3, 1), (6, 1)) if setting.length < 4096 else (40, (10, 3), (30, 3))
    vocabulary = words("noun", "adjective", "verb")
    rng = random.Random(key)

    def entries(chosen: Sequence[int], times: tuple[int, int], order: random.Random) -> list[int]:
        found = list(chosen[:10]) * times[0] + list(chosen[10:]) * times[1]
        order.shuffle(found)
        return found

    spelt = setting.tables.kept("words", lambda: [f" {word}" for word in vocabulary])
    # an entry has three tokens at least; the smallest prompt is written at any length, to say that it does not fit
    count = max(setting.length // 3, 10 * seldom[0] + 1)
    places = setting.tables.kept(f"places {count}", lambda: [f" {place}." for place in range(1, count)])
    example = rng.sample(range(len(vocabulary)), shown)
    listed = _numbered([vocabulary[index] for index in entries(example, often, rng)])
    answered = " " + _numbered([vocabulary[index] for index in example[:10]]) + "\n"
    head, tail = setting.tables.around(template.replace("{context}", listed) + answered + template)
    chosen = rng.sample(range(len(vocabulary)), len(vocabulary))
    sums = np.cumsum(spelt.tokens[chosen] * np.repeat(seldom, (10, len(chosen) - 10)))
    numbers = np.cumsum(places.tokens)
    largest = seldom[1] * int(spelt.tokens.max() + places.tokens.max())

    def number(units: int) -> int:
        return 10 * seldom[0] + (units - 10) * seldom[1]

    def write(units: int) -> Sample:
        listed = entries(chosen[:units], seldom, random.Random(f"{key} {units}"))
        # all are as frequent: in the order in which they first occur
        first = _numbered([vocabulary[index] for index in sorted(chosen[:10], key=listed.index)])
        context = opened(setting.tables.woven(places, range(len(listed)), spelt, listed))
        common = tuple(vocabulary[index] for index in chosen[:10])
        return Sample(parts=[head, *context, tail], answer=" " + first, references=common)

    return Draft(
        least=10,
        most=max(10, min(len(chosen), 10 + (len(numbers) - number(10)) // seldom[1])),
        write=write,
        largest=largest,
        tokens=lambda units: head.tokens + tail.tokens + int(sums[units - 1] + numbers[: number(units)][-1]),
    )


# below this many words ranks 4 and 5 of the coded text can be as frequent, and the answer is open
LEAST_CODED = 83


def _fwe(key: str, setting: Setting) -> Draft:
    config = templates("fwe_utils")["CONFIG"]
    head, tail = setting.tables.around(config["template"] + config["answer_prefix"])
    rng = random.Random(key)
    coded: dict[str, None] = {}
    # the answer is three of them, after the first
    while len(coded) < max(4, setting.length // 50):
        coded["".join(rng.choices(string.ascii_lowercase, k=6))] = None
    vocabulary = ["...", *list(coded)[1:]]
    spelt = setting.tables.new([f" {word}" for word in vocabulary])
    # Zipf with exponent 2: zeta(2) = pi^2 / 6
    shares = np.arange(1.0, len(vocabulary) + 1) ** -2 / (math.pi**2 / 6)

    def times(units: int) -> Any:
        return (units * shares).astype(np.int64)

    def write(units: int) -> Sample:
        found = np.repeat(np.arange(len(vocabulary)), times(units)).tolist()
        random.Random(f"{key} {units}").shuffle(found)
        top = tuple(vocabulary[1:4])
        return Sample(parts=[head, spelt.part(found), tail], answer=" " + ", ".join(top), references=top)

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
    asked = questions.asked[index]
    rng = random.Random(key)
    # first what the question needs, then what stands near it, then anything
    near = rng.sample(asked.near, len(asked.near))
    taken = {*asked.needed, *near}
    rest = [place for place in range(len(questions.documents)) if place not in taken]
    order = [*asked.needed, *near, *rng.sample(rest, len(rest))]
    head, tail = setting.tables.around(config["template"].replace("{query}", asked.question) + " Answer:")
    documents = setting.tables.kept(questions.path, lambda: ["\n" + text for text in questions.documents])
    labels = setting.tables.kept(
        f"{questions.path} labels",
        lambda: ["\n\n" + label.replace("{i}", str(place)).rstrip() for place in range(1, len(order) + 1)],
    )
    sums = np.cumsum(documents.tokens[order]) + np.cumsum(labels.tokens[: len(order)])

    def write(units: int) -> Sample:
        shuffled = random.Random(f"{key} {units}").sample(order[:units], units)
        single = len(asked.needed) == 1
        return Sample(
            parts=[head, *setting.tables.woven(labels, range(units), documents, shuffled), tail],
            answer=" " + asked.answers[0],
            references=asked.answers,
            depth=100 * shuffled.index(asked.needed[0]) / max(1, units - 1) if single else None,
        )

    return Draft(
        least=len(asked.needed),
        most=len(order),
        write=write,
        tokens=lambda units: head.tokens + tail.tokens + int(sums[units - 1]),
    )
