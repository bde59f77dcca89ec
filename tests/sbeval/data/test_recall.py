"""Sizes of associative recall that are impossible are errors that name what is possible."""

import re
from typing import Any

import pytest

from sbeval.data.recall import Recall
from sbeval.errors import InputError


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"seq_len": 63, "vocab_size": 128}, "seq_len must be even and at least 4; got 63"),
        ({"seq_len": 64, "vocab_size": 128, "kv_pairs": 17}, "kv_pairs must be 1 to 16 at seq_len 64"),
        ({"seq_len": 64, "vocab_size": 64, "kv_pairs": 4}, "vocab_size must be above seq_len 64; got 64"),
        ({"slot_power": 11}, "slot_power must be -10 to 10; got 11"),
        ({"filler": "values"}, "unknown filler 'values'; did you mean 'value'"),
        ({"distinct": ("kees",)}, "unknown --distinct 'kees'; did you mean 'keys'"),
        ({"key_pool": 4096}, "key_pool must be 1 to 4095 (the keys); got 4096"),
        ({"key_pool": 31, "distinct": ("keys",)}, "32 distinct keys cannot be drawn from key_pool 31"),
        ({"n_back": 0}, "n_back must be at least 1; got 0"),
        # all pairs and all queries but the last could be of one key
        ({"kv_pairs": 4, "n_back": 8}, "n_back must be at most 7, the values that a key can have; got 8"),
        ({"kv_pairs": 4, "n_back": 5, "distinct": ("keys",)}, "n_back must be at most 4,"),
        ({"kv_pairs": 4, "n_back": 2, "distinct": ("keys", "queries")}, "n_back must be at most 1,"),
        ({"kv_pairs": 4, "n_back": 5, "filler": "padding"}, "n_back must be at most 4,"),
    ],
)
def test_impossible_sizes(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        Recall(**sizes)
