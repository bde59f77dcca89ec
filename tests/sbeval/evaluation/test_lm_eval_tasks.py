"""lm-eval's tasks by name: their items, examples and digest, and the scores of a model that knows the answers."""

import json
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.model import TemplateLM

from sbeval.errors import InputError
from sbeval.evaluation import lm_eval_tasks
from sbeval.evaluation.lm_eval_tasks import Adapter


def write(folder: Path, stem: str, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / f"{stem}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def copa(count: int, word: str = "birds") -> list[dict[str, Any]]:
    return [
        {"context": f"I saw {n} {word} because", "choices": ["i looked up.", f"the {n} were red."], "gold": n % 2}
        for n in range(count)
    ]


class Knows(Adapter):
    """Prefers the continuation that is the answer: the first of even items, the second of odd ones."""

    requests = 0

    def __init__(self) -> None:
        # without a model
        TemplateLM.__init__(self)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        self.requests += len(requests)
        return [
            (0.0 if int(request.args[0].split()[2]) % 2 == ("were" in request.args[1]) else -9.0, False)
            for request in requests
        ]


@pytest.fixture(autouse=True)
def anew() -> None:
    lm_eval_tasks.load.cache_clear()


def test_a_benchmark_has_the_items_of_its_file_and_their_digest(tmp_path: Path) -> None:
    first = lm_eval_tasks.load("copa", None, write(tmp_path / "one", "copa_val", copa(12)))
    again = lm_eval_tasks.load("copa", None, write(tmp_path / "two", "copa_val", copa(12)))
    other = lm_eval_tasks.load("copa", None, write(tmp_path / "three", "copa_val", copa(12, "cats")))
    assert first.name == "copa" and first.shots == 0 and set(first.tasks) == {"copa"} and not first.groups
    assert first.digest == again.digest != other.digest


def test_scores_have_their_error_count_and_chance(tmp_path: Path) -> None:
    benchmark = lm_eval_tasks.load("copa", None, write(tmp_path / "items", "copa_val", copa(12)))
    model = Knows()
    (score, bits), values = lm_eval_tasks.scores(benchmark, model, None)
    assert (score.task, score.metric, score.filter, score.value, score.stderr) == ("copa", "acc", "", 1.0, 0.0)
    assert (score.n, score.chance) == (12, 0.5) and model.requests == 24
    assert (values[values["metric"] == "acc"]["value"] == 1).all()
    assert (bits.task, bits.metric, bits.n, bits.chance) == ("copa", "gold_bits_per_byte", 12, None)
    (limited, _), _ = lm_eval_tasks.scores(benchmark, Knows(), 5)
    assert limited.n == 5


def test_names_and_examples_that_are_unknown_are_errors(tmp_path: Path) -> None:
    folder = write(tmp_path / "items", "copa_val", copa(40))
    with pytest.raises(InputError, match=r"has no task 'copaa'; did you mean .*copa.*`lm_eval ls tasks` lists all"):
        lm_eval_tasks.load("copaa", None, folder)
    with pytest.raises(InputError, match="hellaswag"):
        lm_eval_tasks.load("hellaswag", None, folder)
    assert lm_eval_tasks.load("copa", 2, folder).shots == 2


def test_a_tokenizer_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tokenizer with model"):
        lm_eval_tasks.hub_text(str(tmp_path))


def test_the_version_is_that_of_the_package() -> None:
    import lm_eval

    assert lm_eval_tasks.version() == lm_eval.__version__
