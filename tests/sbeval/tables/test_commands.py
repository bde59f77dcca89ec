"""The fewest commands that make the same rows: nothing but one option differs, and no folder of a machine is named."""

import pytest

from sbeval.tables.commands import fewest


def lines(*commands: str) -> list[list[str]]:
    return [["sbeval", *command.split()] for command in commands]


def test_commands_that_differ_in_one_repeated_option_become_one() -> None:
    given = lines(
        "mqrar --attention rope --lr 1e-3 --workers 4 --results-dir r/a",
        "mqrar --results-dir r/b --lr 1e-3 --attention nope --force",
    )
    assert fewest(given) == ["sbeval mqrar --attention rope --attention nope --lr 1e-3"]
    # both together would run four cells
    apart = lines("mqrar --attention rope --lr 1e-3", "mqrar --attention nope --lr 2e-3")
    assert sorted(fewest(apart)) == [
        "sbeval mqrar --attention nope --lr 2e-3",
        "sbeval mqrar --attention rope --lr 1e-3",
    ]


def test_options_that_are_not_repeated_or_not_given_keep_commands_apart() -> None:
    assert len(fewest(lines("mqrar --steps 10", "mqrar --steps 20"))) == 2
    assert len(fewest(lines("mqrar", "mqrar --seed 1"))) == 2
    assert len(fewest(lines("mqrar --seed 1", "flip-flop --seed 2"))) == 2


def test_timings_that_were_not_taken_together_keep_their_commands() -> None:
    given = lines("bench kernel --head-dim 64", "bench kernel --head-dim 128 --force", "bench kernel --head-dim 128")
    assert fewest(given) == ["sbeval bench kernel --head-dim 128", "sbeval bench kernel --head-dim 64"]


def test_the_command_of_most_runs_is_the_first() -> None:
    given = lines("mqrar --steps 20", "mqrar --steps 10", "mqrar --steps 10")
    assert fewest([*given, []]) == ["sbeval mqrar --steps 10", "sbeval mqrar --steps 20"]


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("length-gen --corpus ~/secret/books", "length-gen --corpus books"),
        ("length-gen --corpus secret/books/", "length-gen --corpus books"),
        ("length-gen --corpus=/data/books", "length-gen --corpus books"),
        ("length-gen --corpus hf:someone/books", "length-gen --corpus hf:someone/books"),
        ("bench skipping --checkpoint r/a/checkpoints/ab12", "bench skipping --checkpoint results/checkpoints/ab12"),
        ("few-shot --model someone/model", "few-shot --model someone/model"),
        ("few-shot --model ../model", "few-shot --model model"),
        ("run ../secret/mine.yaml --set models.corpus=/secret/books", "run mine.yaml --set models.corpus=books"),
        ("mqrar --device cuda:1 --address gpu7:6379 --positions", "mqrar --positions"),
    ],
)
def test_no_folder_or_host_is_named(given: str, shown: str) -> None:
    assert fewest(lines(given)) == [f"sbeval {shown}"]


def test_a_module_is_the_command() -> None:
    assert fewest([["__main__.py", "mqrar"], ["/usr/bin/sbeval", "mqrar"]]) == ["sbeval mqrar"]
