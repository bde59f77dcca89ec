"""The fewest commands that make the rows of a table, from the command lines of its runs, without folders of a machine.

sbeval mqrar --attention rope --lr 1e-3 --workers 4 --results-dir r/a
sbeval mqrar --attention nope --lr 1e-3 --results-dir r/b

sbeval mqrar --attention rope --attention nope --lr 1e-3
"""

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from sbeval.tables.privacy import shared_argv

# options on which no number depends, with and without a value
ASIDE = (
    "--results-dir", "--workers", "--device", "--executor", "--address", "--gpus-per-cell", "--threads", "--track",
    "--tensorboard",
)  # fmt: skip
FLAGS = ("--force", "--dry-run", "--shard")
# options that name files or folders
PATHS = ("--corpus", "--data-dir", "--essays", "--squad", "--hotpot", "--checkpoint", "--model")
# how a name that is no path on a machine, such as one on the hub, does not begin
LOCAL = ("/", "~", ".")
# options of which a command runs every value
REPEATED = (
    "--attention", "--seed", "--lr", "--kv-pairs", "--width", "--n-back", "--task", "--suite", "--model", "--length",
    "--head-dim", "--size", "--cache",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Command:
    """A command line. words: before the options. options: the values of each, none for one without a value."""

    words: tuple[str, ...]
    options: Mapping[str, tuple[str, ...]]

    def merged(self, other: "_Command") -> "_Command | None":
        """Return the command with the cells of both and no others; None if there is none."""
        if self.words != other.words or self.options.keys() != other.options.keys():
            return None
        differing = [name for name, values in self.options.items() if set(values) != set(other.options[name])]
        if len(differing) > 1 or any(name not in REPEATED for name in differing):
            return None
        # one command takes its timings in turn, so that they can be compared: two did not
        if differing and self.words[:1] == ("bench",):
            return None
        both = {name: tuple(dict.fromkeys((*self.options[name], *other.options[name]))) for name in differing}
        return _Command(self.words, {**self.options, **both})

    def text(self) -> str:
        given = [word for name, values in self.options.items() for one in values or ("",) for word in (name, one)]
        return shlex.join(["sbeval", *self.words, *filter(None, given)])


def fewest(lines: Iterable[Sequence[str]]) -> list[str]:
    """Return commands that make what all of these did, that of the most lines first.

    lines: recorded command lines, one a run, the program first. Two become one where they differ in the values of one
    option that can be repeated, except for timings.
    """
    counts = Counter(tuple(line) for line in lines if line)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    commands = [(_parsed(line), count) for line, count in ordered]
    while (pair := _pair(commands)) is not None:
        (first, second), command = pair
        count = commands[first][1] + commands[second][1]
        commands = [(command, count), *(each for at, each in enumerate(commands) if at not in (first, second))]
    commands.sort(key=lambda each: (-each[1], each[0].text()))
    return [command.text() for command, _ in commands]


def _pair(commands: Sequence[tuple[_Command, int]]) -> tuple[tuple[int, int], _Command] | None:
    """Return the positions of two commands that one replaces, and it."""
    for second in range(len(commands)):
        for first in range(second):
            command = commands[first][0].merged(commands[second][0])
            if command is not None:
                return (first, second), command
    return None


def _parsed(line: Sequence[str]) -> _Command:
    words: list[str] = []
    options: dict[str, tuple[str, ...]] = {}
    rest = [part for word in shared_argv(line[1:]) for part in (word.split("=", 1) if _joined(word) else [word])]
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            words.append(PurePosixPath(word).name if word.startswith(LOCAL) else word)
        elif not rest or rest[0].startswith("--"):
            options[word] = ()
        else:
            options[word] = (*options.get(word, ()), _shared(word, rest.pop(0)))
    kept = {name: values for name, values in options.items() if name not in ASIDE and name not in FLAGS}
    return _Command(tuple(words), kept)


def _joined(word: str) -> bool:
    """Return whether a word is an option with its value, `--seed=1`."""
    return word.startswith("--") and "=" in word


def _shared(option: str, value: str) -> str:
    """Return the value of an option without the folders that lead to a file."""
    key, equals, given = value.partition("=") if option == "--set" else ("", "", value)
    if option not in (*PATHS, "--set"):
        return value
    path = PurePosixPath(given)
    if path.parent.name == "checkpoints":
        return f"{key}{equals}results/checkpoints/{path.name}"
    # names on the hub have folders too
    folder = given.startswith(LOCAL) or ("/" in given and option in PATHS[:-2] and not given.startswith("hf:"))
    return f"{key}{equals}{path.name}" if folder else value
