"""Errors of the user's are one line that names what was given, what is allowed, and the nearest name."""

from types import SimpleNamespace

import pytest

from sbeval.errors import SEEDS, InputError, check_swept, choose, first_line


def test_the_nearest_name_is_offered() -> None:
    assert choose("fruit", "pear", ("apple", "pear")) == "pear"
    with pytest.raises(InputError, match=r"^unknown fruit 'paer'; did you mean 'pear'\? known: apple, pear$"):
        choose("fruit", "paer", ("pear", "apple"))
    with pytest.raises(InputError, match=r"^unknown fruit 'xyz'; known: apple$"):
        choose("fruit", "xyz", ("apple",))
    # as the command line spells it
    with pytest.raises(InputError, match="did you mean 'flip_flop'"):
        choose("task", "flip-flop", ("flip_flop", "mqrar"))


def test_swept_options_have_a_value_and_seeds_are_in_range() -> None:
    check_swept(SimpleNamespace(lrs=(1.0,), seeds=(0, SEEDS[-1])), "lrs", "seeds")
    with pytest.raises(InputError, match="lrs is empty: give one or more"):
        check_swept(SimpleNamespace(lrs=()), "lrs")
    for seed in (-1, 1 << 31):
        with pytest.raises(InputError, match=rf"a seed \(--seed\) must be 0 to 2147483647; got {seed}"):
            check_swept(SimpleNamespace(seeds=(0, seed)))


def test_the_first_line_of_an_error_is_never_empty() -> None:
    assert first_line(ValueError("\none\ntwo")) == "one" and first_line(KeyboardInterrupt()) == "KeyboardInterrupt"
