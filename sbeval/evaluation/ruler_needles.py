"""Needles in haystacks of RULER: in repeated noise, in an essay, or among other needles (see `ruler_tasks`)."""

import itertools
import random
import uuid
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sbeval.evaluation.ruler_drafts import Draft, Sample, Setting, templates, words
from sbeval.evaluation.ruler_texts import Part, Pieces, opened

# depths of needles in an essay, per cent
DEPTHS = [int(depth) for depth in np.round(np.linspace(0, 100, num=40))]
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NIAH_ANSWER = " The special magic {type_needle_v} for {query} mentioned in the provided text are"


@dataclass(frozen=True, slots=True, kw_only=True)
class Niah:
    """Needles in a haystack of `noise`, `essay` or `needles`."""

    haystack: str
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1


def _random(kind: str, rng: random.Random) -> str:
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return f"{rng.choice(words('adjective'))}-{rng.choice(words('noun'))}"


def draft(niah: Niah, key: str, setting: Setting, questions: int = 1) -> Draft:
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
