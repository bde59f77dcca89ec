"""Fine-tuning until solved: on what, when it ends, what it measures, which rate it chooses, and that it resumes."""

import dataclasses
import io
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console

from sbeval.errors import InputError
from sbeval.evaluation import diagnostics, ruler_lessons
from sbeval.evaluation.ruler_lessons import Lesson, Store
from sbeval.evaluation.ruler_prompts import Prompt, Writer
from sbeval.models import config as model_config
from sbeval.models.decoder import Decoder
from sbeval.sweep import finished, graph, scheduler
from sbeval.sweep.cell import cell_id
from sbeval.sweep.context import RunContext
from sbeval.tables import curves, table
from sbeval.tables.needle import SOLVED
from sbeval.tables.results import Results
from sbeval.tasks import needle, needle_tuning
from sbeval.tasks.needle import Cell, Config, Row, cells
from sbeval.tasks.needle_tuning import Validation, open_writer, solved_from
from sbeval.training import checkpoint, schedule
from sbeval.training.checkpoint import State
from sbeval.training.stepper import Stepper

TINY: dict[str, Any] = {"width": 16, "layers": 1, "heads": 2, "hidden": 32, "tied": True}
CPU = torch.device("cpu")


def run(config: Config, results: Path) -> list[Cell]:
    grid = cells(config)
    context = RunContext(results_dir=results, device=CPU)
    assert scheduler.run(grid, context, preset="quick", console=Console(file=io.StringIO()))
    return grid


def rows_of(found: list[Cell], results: Path) -> pd.DataFrame:
    return finished.results_of(found, results)


@pytest.fixture
def tuned(config: Config, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setattr(needle_tuning, "HELD_OUT", 3)
    monkeypatch.setattr(needle_tuning, "AGREE", 12)
    # validation at every step
    monkeypatch.setattr(needle_tuning, "SHARE", 9)
    # the models of `config`, trained at the length of the prompts
    (Path(config.corpus) / "train0.txt").write_text("train says this and that. " * 200)
    return dataclasses.replace(
        config,
        train_len=768,
        eval_len=768,
        train_tokens=1536,
        batch_tokens=1536,
        max_epochs=None,
        lengths=(768,),
        finetune=6 * 1536,
        finetune_lrs=(1e-2,),
        finetune_prompts=12,
        finetune_needles=2,
        samples=2,
    )


@pytest.fixture
def solved_at(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[float]]:
    """Shares of held-out prompts that are right, at each validation; the last holds for all further ones."""
    shares: dict[str, list[float]] = {}
    names: dict[int, str] = {}
    prompts = Writer.prompts

    def named(self: Writer, name: str, *arguments: Any, **others: Any) -> list[Prompt]:
        found = prompts(self, name, *arguments, **others)
        names.update({id(prompt): name for prompt in found})
        return found

    def greedy(decoder: Decoder, prompts: list[Prompt], *others: object) -> float:
        assert not decoder.training
        mine = shares[names[id(prompts[0])]]
        return mine.pop(0) if len(mine) > 1 else mine[0]

    monkeypatch.setattr(Writer, "prompts", named)
    monkeypatch.setattr(needle_tuning, "_greedy", greedy)
    return shares


def save(folder: Path, length: int = 768) -> Path:
    # not the seed of the models that are trained
    torch.manual_seed(1)
    decoder = Decoder(model_config.ModelConfig(vocab_size=257, attention="stick_breaking", **TINY))
    checkpoint.save(folder, decoder, State(finished=True), training={"length": length})
    return folder


def test_what_it_is_taught_is_not_in_the_test(tuned: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: dict[str, list[Prompt]] = {"test": [], "validation": []}
    taught: list[Lesson] = []
    prompts, lessons = Writer.prompts, Store.lessons

    def asked(self: Writer, *arguments: Any, use: str = "test", **others: Any) -> list[Prompt]:
        found = prompts(self, *arguments, use=use, **others)
        written[use] += found
        return found

    def drawn(self: Store, *arguments: Any, **others: Any) -> list[Lesson]:
        found = lessons(self, *arguments, **others)
        taught.extend(found)
        return found

    monkeypatch.setattr(Writer, "prompts", asked)
    monkeypatch.setattr(Store, "lessons", drawn)
    given = dataclasses.replace(
        tuned,
        checkpoint=str(save(tmp_path / "model", 3072)),
        tasks=("niah_single_1", "vt"),
        lengths=(3072,),
        samples=5,
        batch_tokens=3072,
        finetune=3072,
    )
    found = run(given, tmp_path / "results")
    values = {use: {value for item in written[use] for value in item.references} for use in written}
    # of vt there are five to a prompt
    assert len(values["test"]) == 30 and len(values["validation"]) == 18 and not values["test"] & values["validation"]
    text = bytes(int(token) for lesson in taught for token in lesson.tokens if token < 256).decode()
    assert {"special magic number for" in text, "VAR" in text} == {True}
    assert not [value for value in values["test"] if value in text]
    rows = rows_of(found, tmp_path / "results")
    assert len(_tuned(tmp_path / "results")) == 1 and (rows["train_len"] == 3072).all()


def test_it_starts_from_the_model_and_takes_whole_steps(tuned: Config, tmp_path: Path) -> None:
    still = dataclasses.replace(
        tuned, checkpoint=str(save(tmp_path / "model")), finetune=2 * 1536 + 5, finetune_lrs=(1e-12,)
    )
    found = [
        rows_of(run(one, tmp_path / "results"), tmp_path / "results")
        for one in (still, dataclasses.replace(still, finetune=0))
    ]
    likely, before = (
        float(rows[(rows["metric"] == "log_probability") & rows["depth_start"].isna()]["value"].item())
        for rows in found
    )
    assert likely == pytest.approx(before, rel=1e-4)
    assert [set(rows["finetune_tokens"]) for rows in found] == [{2 * 1536}, {0}]


def test_a_step_has_a_sequence_of_the_checkpoint(tuned: Config, tmp_path: Path) -> None:
    given = dataclasses.replace(tuned, checkpoint=str(save(tmp_path / "model", 3072)))
    # the default too
    for step in (3071, None):
        tokens = step or tuned.batch_tokens
        with pytest.raises(InputError, match=f"{tokens} is less than a sequence of the checkpoint's 3072"):
            cells(dataclasses.replace(given, finetune_batch_tokens=step))
    assert cells(dataclasses.replace(given, finetune_batch_tokens=3072))


def test_it_ends_when_all_tasks_are_solved(tuned: Config, tmp_path: Path, solved_at: dict[str, list[float]]) -> None:
    solved_at |= {"niah_single_1": [1.0, 0.9, 1.0, 1.0, 1.0], "niah_single_2": [0.5, 0.96, 0.96, 0.96, 0.96]}
    both = dataclasses.replace(tuned, tasks=("niah_single_1", "niah_single_2"))
    found = run(both, tmp_path)
    rows = rows_of(found, tmp_path)
    after = rows[rows["metric"] == "tokens_to_solve"].set_index("task")
    # the first validation that found it so, also if training continued
    assert after["value"].astype(float).to_dict() == {"niah_single_1": 1536, "niah_single_2": 2 * 1536}
    assert set(rows["ended"]) == {"solved"} and set(rows["finetune_tokens"]) == {6 * 1536}
    held_out = rows[rows["metric"] == "held_out"].set_index("task")
    assert held_out["value"].astype(float).to_dict() == {"niah_single_1": 1.0, "niah_single_2": 0.96}
    assert set(held_out["n"]) == {3}
    # how it went is kept, of each task
    kept = curves.read(Results(tmp_path), rows["cell"]).merge(rows[["cell", "task"]].drop_duplicates())
    by_step = {key: of.sort_values("step")["value"].tolist() for key, of in kept.groupby(["task", "metric"])}
    assert by_step["niah_single_1", "held_out_0.01"] == [1.0, 0.9, 1.0, 1.0, 1.0]
    assert len(by_step["niah_single_2", "finetune_loss_0.01"]) == 5
    record = json.loads(Results(tmp_path).run_file(cell_id(found[0])).read_text())
    (of_rate,) = record["measured"]["finetune"]
    assert (of_rate["lr"], of_rate["tokens"]) == (1e-2, 5 * 1536) and of_rate["seconds"] > 0
    # one model for both tasks, trained for five steps
    (folder,) = (tmp_path / "checkpoints" / one for one in _tuned(tmp_path))
    assert checkpoint.load_state(folder).step == 5


def _tuned(results: Path) -> list[str]:
    folders = [path for path in (results / "checkpoints").iterdir() if path.is_dir()]
    return [path.name for path in folders if checkpoint.load_state(path).task_scores]


def test_what_is_never_solved_is_censored_at_the_budget(
    tuned: Config, tmp_path: Path, solved_at: dict[str, list[float]]
) -> None:
    solved_at |= {"niah_single_2": [0.94]}
    asked = dataclasses.replace(
        tuned, tasks=("niah_single_2", "niah_single_1"), finetune_tasks=("niah_single_2",), lengths=(1024,)
    )
    rows = rows_of(run(asked, tmp_path), tmp_path)
    (after,) = rows[rows["metric"] == "tokens_to_solve"].itertuples()
    assert (after.value, after.ended, after.length, after.n) == (6 * 1536, "budget", 768, 1)
    # what it was not fine-tuned on is neither
    assert set(rows[rows["task"] == "niah_single_1"]["ended"]) == {""} and set(
        rows[rows["task"] == "niah_single_2"]["ended"]
    ) == {"budget"}


@pytest.mark.parametrize(
    ("shares", "tokens", "ended"),
    [
        ([0.5, 0.96, 1.0, 1.0, 1.0], 2 * 1536, "solved"),
        # fewer than four: the last asks nine prompts more
        ([0.5, 0.5, 1.0, 1.0, 1.0, 1.0], 3 * 1536, "solved"),
        ([1.0, 0.7, 1.0, 1.0, 1.0, 1.0], 3 * 1536, "solved"),
        ([0.5, 0.5, 0.5, 0.5, 1.0, 0.95], 5 * 1536, "solved"),
        ([0.5, 0.5, 0.5, 0.5, 1.0, 0.8], 5 * 1536, "budget"),
        ([0.5, 0.5, 0.5, 0.5, 0.9, 1.0], 5 * 1536, "budget"),
    ],
)
def test_what_is_solved_in_the_last_steps_is_solved(
    shares: list[float],
    tokens: int,
    ended: str,
    tuned: Config,
    tmp_path: Path,
    solved_at: dict[str, list[float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(needle_tuning, "VALIDATIONS", 5)
    solved_at |= {"niah_single_2": shares}
    rows = rows_of(run(dataclasses.replace(tuned, finetune=5 * 1536), tmp_path), tmp_path)
    (after,) = rows[rows["metric"] == "tokens_to_solve"].itertuples()
    assert (after.value, after.ended) == (tokens, ended)


def test_at_the_end_a_task_that_few_found_solved_is_asked_with_other_prompts(
    tuned: Config, tmp_path: Path, solved_at: dict[str, list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    solved_at |= {"niah_single_1": [0.5, 1.0], "niah_single_2": [0.5, 0.5, 0.5, 0.5, 0.5, 1.0], "niah_single_3": [0.5]}
    asked: list[list[int]] = []
    greedy = needle_tuning._greedy

    def seen(decoder: Decoder, prompts: Any, *others: Any) -> float:
        asked.append([id(prompt) for prompt in prompts])
        return greedy(decoder, prompts, *others)

    monkeypatch.setattr(needle_tuning, "_greedy", seen)
    rows = rows_of(run(dataclasses.replace(tuned, tasks=tuple(solved_at)), tmp_path), tmp_path)
    # 6 validations of 3 tasks; at the last, of the second, which is the first to find it solved, nine prompts more
    assert [len(ids) for ids in asked] == [*([3] * 17), 9, 3]
    assert len({one for ids in asked for one in ids}) == 3 * 3 + 9
    held_out = rows[rows["metric"] == "held_out"].set_index("task")
    assert held_out["n"].astype(int).to_dict() == {"niah_single_1": 3, "niah_single_2": 12, "niah_single_3": 3}
    assert held_out["ended"].to_dict() == {
        "niah_single_1": "solved",
        "niah_single_2": "solved",
        "niah_single_3": "budget",
    }


def test_a_task_is_not_solved_by_chance() -> None:
    draw, tries = np.random.default_rng(0), 400
    held_out, agree, count = needle_tuning.HELD_OUT, needle_tuning.AGREE, needle_tuning.VALIDATIONS
    solved, once = 0, 0
    for _ in range(tries):
        shares = draw.binomial(held_out, 0.9, count) / held_out
        scores = [Validation(step, score, held_out) for step, score in enumerate(shares.tolist(), start=1)]
        # training may end at any of them, and at the last asks more
        ended = any(solved_from(scores[:end]) is not None for end in range(1, count + 1))
        if not ended and shares[-1] >= SOLVED:
            right = held_out * shares[-1] + draw.binomial(agree - held_out, 0.9)
            ended = solved_from([*scores[:-1], Validation(count, right / agree, agree)]) is not None
        solved += ended
        once += shares.max() >= SOLVED
    # of models that have 90 % right most have 95 % of 64 prompts right at one of thirty validations
    assert once > 0.9 * tries and solved < 0.05 * tries
    right = [Validation(step, 1.0, held_out) for step in range(1, 5)]
    assert solved_from(right) == 1 and solved_from([Validation(0, 0.9, held_out), *right]) == 1
    # a task that others made it lose
    assert solved_from([*right, *(Validation(step, 0.7, held_out) for step in range(5, 11))]) is None
    assert [solved_from(right[:count]) for count in range(4)] == [None] * 4
    assert solved_from([Validation(1, 0.95, agree)]) == 1 and solved_from([Validation(1, 0.94, agree)]) is None
    # prompts enough decide alone that what few found is not so
    assert solved_from([*right[:2], Validation(3, 0.94, agree)]) is None


def test_other_lessons_make_another_model(
    tuned: Config, tmp_path: Path, solved_at: dict[str, list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    solved_at |= {"niah_single_2": [1.0]}
    # cells of one fine-tuned model
    first, second, third = (dataclasses.replace(tuned, lengths=(length,)) for length in (768, 896, 1024))
    run(first, tmp_path)
    run(second, tmp_path)
    assert len(_tuned(tmp_path)) == 1
    monkeypatch.setattr(ruler_lessons, "VERSION", ruler_lessons.VERSION + 1)
    run(third, tmp_path)
    assert len(_tuned(tmp_path)) == 2


def test_validation_chooses_the_rate_and_every_rate_has_its_row(
    tuned: Config, tmp_path: Path, solved_at: dict[str, list[float]], asked: list[int]
) -> None:
    # the first rate is not solved, the second after three steps
    solved_at |= {"niah_single_2": [0.0] * 6 + [0.5, 0.9, 1.0]}
    found = run(dataclasses.replace(tuned, finetune_lrs=(3e-3, 1e-3, 1e-3)), tmp_path)
    assert [step.title for step in graph.steps(found)] == [
        "train rope seed 0",
        "fine-tune rope seed 0 lr 0.001",
        "fine-tune rope seed 0 lr 0.003",
        "rope seed 0 fine-tuned niah_single_2",
    ]
    rows = rows_of(found, tmp_path)
    after = rows[rows["metric"] == "tokens_to_solve"].astype({"value": float}).sort_values("finetune_lr")
    assert after[["finetune_lr", "chosen", "ended", "value"]].to_numpy().tolist() == [
        [1e-3, 0, "budget", 6 * 1536],
        [3e-3, 1, "solved", 3 * 1536],
    ]
    # only the chosen model is evaluated
    scores = rows[rows["metric"] == "score"]
    assert set(scores["ended"]) == {"solved"} and scores["chosen"].isna().all() and sum(asked) == 2
    assert set(scores["finetune_lr"].astype(float)) == {3e-3}


def test_a_rate_that_diverges_is_not_chosen(
    tuned: Config, tmp_path: Path, solved_at: dict[str, list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    solved_at |= {"niah_single_2": [0.5]}
    steps, trained = Stepper.run, list[float]()

    def diverge(self: Stepper, batch: Any, at: int) -> Any:
        trained.append(self.config.lr)
        loss = steps(self, batch, at)
        return loss * float("nan") if self.config.lr in diverging and at == 2 else loss

    diverging = [1e-2]
    monkeypatch.setattr(Stepper, "run", diverge)
    two = dataclasses.replace(tuned, finetune_lrs=(1e-3, 1e-2), tasks=("niah_single_2", "niah_single_1"))
    two = dataclasses.replace(two, finetune_tasks=("niah_single_2",))
    found = run(two, tmp_path)
    # once, for both cells
    assert trained.count(1e-2) == 3
    rows = rows_of(found, tmp_path)
    after = rows[rows["metric"] == "tokens_to_solve"].sort_values("finetune_lr")
    assert after[["finetune_lr", "chosen", "ended"]].to_numpy().tolist() == [[1e-3, 1, "budget"], [1e-2, 0, "diverged"]]
    assert set(rows[rows["metric"] == "score"]["ended"]) == {"budget", ""}
    diverging.append(1e-3)
    context = RunContext(results_dir=tmp_path / "none", device=CPU)
    assert not scheduler.run(cells(two), context, preset="quick", console=Console(file=io.StringIO()))


def test_the_gain_from_copying_is_that_before_fine_tuning(tuned: Config, tmp_path: Path) -> None:
    (cell,) = run(tuned, tmp_path)
    rows = rows_of([cell], tmp_path)
    (base,) = {path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()} - {*_tuned(tmp_path)}
    model = checkpoint.load_model(tmp_path / "checkpoints" / base).eval()
    wanted = diagnostics.copy_gain(model, 384, 257, 256, CPU, "float32")
    assert wanted.distance == 384 and set(rows["copy_gain"].astype(float)) == {round(wanted.value, 4)}


def test_it_lowers_the_loss_on_answers(tuned: Config, tmp_path: Path) -> None:
    (cell,) = run(tuned, tmp_path)
    (plain,) = run(dataclasses.replace(tuned, finetune=0), tmp_path)
    likely = [
        rows[(rows["metric"] == "log_probability") & rows["depth_start"].isna()]["value"].astype(float).mean()
        for rows in (rows_of([one], tmp_path) for one in (plain, cell))
    ]
    assert likely[1] > likely[0] + 1
    # without fine-tuning nothing says how it would have been
    assert plain.config.finetune_lrs == ()
    assert cell_id(plain) == cell_id(cells(dataclasses.replace(tuned, finetune=0, finetune_lrs=(9.0,)))[0])


@pytest.mark.parametrize("step", [0, 3])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(
    step: int, tuned: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = rows_of(run(tuned, tmp_path / "whole"), tmp_path / "whole")
    steps = Stepper.run

    def stopped(self: Stepper, batch: Any, at: int) -> Any:
        loss = steps(self, batch, at)
        if self.config.schedule == "wsd" and at == step:
            signal.raise_signal(signal.SIGINT)
        return loss

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Stepper, "run", stopped)
        run(tuned, tmp_path / "results")
    (name,) = _tuned(tmp_path / "results")
    state = checkpoint.load_state(tmp_path / "results" / "checkpoints" / name)
    assert state.step == step + 1 and not state.finished and len(state.task_scores) == step + 1
    again = rows_of(run(tuned, tmp_path / "results"), tmp_path / "results")
    pd.testing.assert_frame_equal(again.drop(columns="utc"), whole.drop(columns="utc"))


def test_seeds_and_methods_share_prompts_and_differ_in_their_order(tuned: Config, tmp_path: Path) -> None:
    two = dataclasses.replace(tuned, seeds=(0, 1), attention=("rope", "alibi"))
    orders: dict[tuple[str, int], list[int]] = {}
    loaded = []
    with scheduler.progress_of(RunContext(results_dir=tmp_path, device=CPU)) as progress:
        for cell in cells(two):
            (tuning,) = cell.tunings
            _, writer = open_writer(tuning.config, progress)
            batches = tuning._batches(writer, tuning.schedule(), progress)
            loaded.append({path.name for path in (writer.cache_dir / "needle").glob("lessons-*.npz")})
            orders[cell.attention, cell.seed] = batches[0].tokens.flatten().tolist()
    assert loaded[0] == loaded[-1] and len(loaded[0]) == 3 * 2
    assert orders["rope", 0] == orders["alibi", 0] != orders["rope", 1] == orders["alibi", 1]


def test_validations_cost_a_tenth_of_training_at_most(tuned: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needle_tuning, "SHARE", 0.1)
    for steps, tasks, count in ((600, 1, 30), (100, 1, 20), (100, 2, 10), (6, 1, 1)):
        asked = dataclasses.replace(tuned, finetune=steps * 1536, tasks=("niah_single_2", "niah_single_1")[:tasks])
        (tuning,) = cells(asked)[0].tunings
        training = tuning.schedule()
        assert -(-training.steps // training.check_every) == count
        cost = count * tasks * 3 * 768 / 3
        assert cost <= 0.1 * training.tokens or count == 1


def test_rate_is_constant_then_falls_over_a_sixth_of_the_budget(tuned: Config) -> None:
    (cell,) = cells(dataclasses.replace(tuned, finetune=1000 * 1536, finetune_batch_tokens=768))
    (tuning,) = cell.tunings
    training = tuning.schedule()
    assert (training.steps, training.batch, training.warmup, training.schedule) == (2000, 1, 50, "wsd")
    rates = [schedule.learning_rate(training, step) for step in (0, 49, 1666, 1833, 1999)]
    assert rates == pytest.approx([2e-4, 1e-2, 1e-2, 5e-3, 3e-5], rel=0.01)
    assert training.check_every == 67 and not training.sparse
    run_file = json.loads(json.dumps(dataclasses.asdict(training)))
    assert run_file["lr"] == 1e-2
    # YaRN is an option of evaluation: the same fine-tuned model
    both = cells(dataclasses.replace(tuned, attention=("rope", "rope:scaling=yarn,factor=8,train_len=768")))
    assert len(both) == 2 and both[0].tunings == both[1].tunings


def test_tables_have_the_columns(tuned: Config, tmp_path: Path, solved_at: dict[str, list[float]]) -> None:
    solved_at |= {"niah_single_2": [1.0]}
    (cell,) = run(tuned, tmp_path)
    rows = table.read(tmp_path / "needle.csv", table.columns(Row))
    assert (rows["cell"] == cell_id(cell)).all() and set(rows["finetune_lr"].dropna()) == {1e-2}
    said = needle.FAMILY.summary(rows)
    assert "tokens to solve" in [str(column.header) for column in said.columns]


@pytest.mark.parametrize("right", [1.0, 0.5])
def test_further_seeds_are_taught_at_the_chosen_rate(
    right: float, tuned: Config, tmp_path: Path, solved_at: dict[str, list[float]]
) -> None:
    two = dataclasses.replace(tuned, seeds=(0, 1), finetune_lrs=(1e-3, 3e-3), attention=("rope", "alibi"))
    # RoPE's first rate solves nothing, its second may; ALiBi's first does at once, or none
    solved_at |= {"niah_single_2": [*[0.0] * 6, right, right] if right == 1 else [right]}
    first = run(two, tmp_path)
    assert [(cell.attention, cell.seed, cell.config.finetune_lrs) for cell in first] == [
        ("rope", 0, (1e-3, 3e-3)),
        ("alibi", 0, (1e-3, 3e-3)),
    ]
    rates = ((3e-3,), (1e-3,)) if right == 1 else ((1e-3, 3e-3),) * 2
    further = needle.more(two, rows_of(first, tmp_path))
    assert [(cell.attention, cell.seed, cell.config.finetune_lrs) for cell in further] == [
        ("rope", 1, rates[0]),
        ("alibi", 1, rates[1]),
    ]
    assert [cell.config.finetune_lrs for cell in needle.more(two, None)] == [(1e-3, 3e-3)] * 2
    # of a task that no model is taught, as qa_2, scores have the rate alone
    untaught = rows_of(first, tmp_path).query("metric != 'tokens_to_solve'")
    assert all(len(cell.config.finetune_lrs) == 1 for cell in needle.more(two, untaught))
    # one rate is chosen by no one, a model that is not taught has none, and of one seed there is no other
    for alone in ({"finetune_lrs": (1e-3,)}, {"finetune": 0}):
        every = dataclasses.replace(two, **alone)
        assert [cell.seed for cell in cells(every)] == [0, 0, 1, 1] and needle.more(every, None) == []
    one = dataclasses.replace(two, seeds=(1,))
    assert [cell.seed for cell in cells(one)] == [1, 1] and needle.more(one, None) == []
