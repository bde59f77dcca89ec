"""Digests of configurations."""

import dataclasses

from sbeval.config import LATER, digest_of


def test_a_later_option_at_its_default_changes_no_name() -> None:
    @dataclasses.dataclass(frozen=True)
    class Before:
        lr: float = 0.1

    @dataclasses.dataclass(frozen=True)
    class After:
        lr: float = 0.1
        new: int | None = dataclasses.field(default=None, metadata=LATER)

    assert digest_of(Before()) == digest_of(After()) != digest_of(After(new=1))
    assert digest_of(Before(lr=0.2)) != digest_of(Before())
