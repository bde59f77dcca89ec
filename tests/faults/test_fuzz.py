"""Fuzz tables, checkpoints and the options of generators: each gives a valid result or a one-line error.

SBEVAL_TESTS=full tries 10,000 cases of each instead of 25.
"""

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sbeval.data import recall
from sbeval.data.corpus import Split
from sbeval.data.dataloader import Batches
from sbeval.data.recall import Recall
from sbeval.data.tokenizer import Bytes
from sbeval.errors import InputError
from sbeval.evaluation import ruler_tasks, ruler_texts
from sbeval.evaluation.ruler_prompts import Writer
from sbeval.models.config import ModelConfig
from sbeval.models.decoder import IGNORE, Decoder
from sbeval.tables import provenance, table
from sbeval.tables.rows import Measurement
from sbeval.tasks import flip_flop, flip_flop_data, recall_data
from sbeval.training import checkpoint
from sbeval.training.checkpoint import State
from sbeval.training.config import TrainConfig
from sbeval.training.optimizer import optimizer_for

FULL = os.environ.get("SBEVAL_TESTS") == "full"
fuzzed = settings(
    max_examples=10_000 if FULL else 25,
    deadline=None,
    derandomize=not FULL,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
# a change of a file's bytes: where, what is taken out, what is put in
EDITS = st.lists(
    st.tuples(
        st.floats(0, 1), st.integers(0, 40), st.binary(max_size=12) | st.sampled_from([b'"', b",", b"\n", b"nan"])
    ),
    min_size=1,
    max_size=3,
)


def edited(content: bytes, edits: list[tuple[float, int, bytes]]) -> bytes:
    for place, out, new in edits:
        start = int(place * len(content))
        content = content[:start] + new + content[start + out :]
    return content


def one_line(error: InputError) -> None:
    assert str(error) and len(str(error).splitlines()) == 1


def example_table() -> str:
    """The first rows of a committed table."""
    path = Path(__file__).parents[2] / "results" / "length_gen.csv"
    return "".join(path.read_text().splitlines(keepends=True)[:4])


def read_table(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        found = table.read(path, required=["cell"])
        # what is read can be written, and is then the same
        copy = path.with_name("copy.csv")
        copy.unlink(missing_ok=True)
        names = [name for name in found.columns if name not in table.OUTCOME]
        if set(table.columns(Measurement)) <= set(found.columns) and not found.duplicated(names).any():
            rows = found[(found["cell"] != "")]
            if len(rows) and not any("\r" in str(cell) or "\0" in str(cell) for cell in rows.to_numpy().ravel()):
                table.write(copy, rows)
                assert len(table.read(copy)) == len(rows)
    except InputError as error:
        one_line(error)


@fuzzed
@given(content=st.binary(max_size=400))
def test_a_table_of_any_bytes(content: bytes, tmp_path: Path) -> None:
    read_table(tmp_path / "any.csv", content)


@fuzzed
@given(edits=EDITS)
def test_a_table_with_any_change(edits: list[tuple[float, int, bytes]], tmp_path: Path) -> None:
    read_table(tmp_path / "any.csv", edited(example_table().encode(), edits))


@fuzzed
@given(cells=st.lists(st.lists(st.text(max_size=6), min_size=3, max_size=3), max_size=5))
def test_a_table_of_any_cells(cells: list[list[str]], tmp_path: Path) -> None:
    file = io.StringIO(newline="")
    csv.writer(file, lineterminator="\n").writerows([["cell", "value", "what"], *cells])
    read_table(tmp_path / "any.csv", file.getvalue().encode(errors="replace"))


@fuzzed
@given(content=st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_a_run_file_of_anything(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(content)
    try:
        assert isinstance(provenance.read_run(tmp_path / "run.json"), dict)
    except InputError as error:
        one_line(error)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in the middle of training."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    checkpoint.save(folder, *trained())
    return folder


def trained() -> tuple[Decoder, State, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Decoder(ModelConfig(vocab_size=8, width=4, layers=1, heads=1, hidden=4, tied=True))
    optimizer = optimizer_for(model, TrainConfig(steps=1, batch=1, length=4, lr=0.1))
    model.loss(torch.arange(4)[None], torch.arange(4)[None]).backward()
    optimizer.step()
    return model, State(losses=[1.0]), optimizer


def load(folder: Path) -> None:
    """Read all of a checkpoint; raise a one-line InputError that names what is invalid."""
    try:
        checkpoint.load_state(folder)
        model = checkpoint.load_model(folder)
        checkpoint.restore(folder, model, optimizer_for(model, TrainConfig(steps=1, batch=1, length=4, lr=0.1)))
    except InputError as error:
        one_line(error)
        assert str(folder) in str(error)


FILES = st.sampled_from(["config.json", "model.safetensors", "optimizer.safetensors"])


@pytest.mark.parametrize("sealed", [True, False])
@fuzzed
@given(name=FILES, edits=EDITS)
def test_a_checkpoint_with_any_change(
    sealed: bool, name: str, edits: list[tuple[float, int, bytes]], saved: Path
) -> None:
    """Also a checkpoint from before digests, in which only changed values pass unseen."""
    originals = {path: path.read_bytes() for path in saved.iterdir()}
    try:
        if not sealed:
            config = json.loads((saved / "config.json").read_text())
            kept = {key: config[key] for key in ("model", "state", "training")}
            (saved / "config.json").write_text(json.dumps(kept))
        path = saved / name
        before = path.read_bytes()
        path.write_bytes(edited(before, edits))
        if sealed and path.read_bytes() != before and name != "config.json":
            with pytest.raises(InputError, match="is damaged"):
                model = checkpoint.load_model(saved)
                checkpoint.restore(saved, model, optimizer_for(model, TrainConfig(steps=1, batch=1, length=4, lr=0.1)))
        load(saved)
    finally:
        for path, content in originals.items():
            path.write_bytes(content)


FIELDS = st.sampled_from(sorted(ModelConfig.__dataclass_fields__))
VALUES = JSON | st.sampled_from(
    [
        "rope",
        "rope:theta=-1",
        "rope:theta=nan",
        "fire:x",
        "alibi",
        "sliding_window:window=0",
        "stick_breaking:epsilon=x",
    ]
)


@fuzzed
@given(model=st.dictionaries(FIELDS, VALUES, max_size=3), state=JSON, other=JSON)
def test_a_checkpoint_whose_config_says_anything(model: dict[str, Any], state: Any, other: Any, saved: Path) -> None:
    path = saved / "config.json"
    original = path.read_bytes()
    config = json.loads(original)
    try:
        for given_ in (
            {"model": config["model"] | model, "state": config["state"]},
            {"model": config["model"], "state": state, "training": other, "files": other},
            other,
        ):
            path.write_text(json.dumps(given_))
            load(saved)
    finally:
        path.write_bytes(original)


INT = st.integers(-2, 40) | st.integers()


@fuzzed
@given(
    options=st.fixed_dictionaries(
        {"vocab_size": st.integers(-1, 200), "seq_len": st.integers(-1, 40), "kv_pairs": st.integers(-1, 12)},
        optional={
            "slot_power": st.floats(),
            "filler": st.sampled_from([*recall.FILLERS, "some"]),
            "key_pool": INT,
            "n_back": INT,
            "score_prefix": st.booleans(),
            "distinct": st.lists(st.sampled_from([*recall.DISTINCT, "all"]), max_size=3).map(tuple),
        },
    ),
    seed=st.integers(0, 2**42),
    rows=st.lists(st.integers(0, 2**40), min_size=1, max_size=3),
)
def test_recall_of_any_options(options: dict[str, Any], seed: int, rows: list[int]) -> None:
    try:
        task = Recall(**options)
    except InputError as error:
        one_line(error)
        return
    found = recall_data.generate(task, seed, torch.tensor(rows))
    scored = found.targets != IGNORE
    assert found.tokens.shape == (len(rows), task.seq_len)
    assert 0 <= int(found.tokens.min()) and int(found.tokens.max()) < task.vocab_size
    assert bool((found.targets[scored] >= task.half).all())
    assert torch.equal(found.tokens, recall_data.generate(task, seed, torch.tensor(rows)).tokens)


@fuzzed
@given(
    length=st.integers(-2, 60),
    p_ignore=st.floats() | st.floats(0, 1),
    seed=st.integers(0, 2**42),
    row=st.integers(0, 2**40),
)
def test_flip_flop_of_any_options(length: int, p_ignore: float, seed: int, row: int) -> None:
    try:
        config = flip_flop.Config(seq_len=length, p_ignore=p_ignore)
    except InputError as error:
        one_line(error)
        return
    found = flip_flop_data.generate(config.seq_len, config.p_ignore, seed, torch.tensor([row]))
    tokens, last = found.tokens[0].tolist(), None
    assert len(tokens) == length
    for place in range(0, length, 2):
        if tokens[place] == flip_flop_data.WRITE:
            last = tokens[place + 1]
        if tokens[place] == flip_flop_data.READ:
            assert found.targets[0, place].item() == tokens[place + 1] == last


@fuzzed
@given(
    documents=st.lists(st.integers(0, 20), min_size=1, max_size=6),
    length=st.integers(-1, 12),
    batch=st.integers(-1, 4),
    seed=st.integers(-1, 2**31),
    packing=st.sampled_from(["stream", "documents", "rows"]),
    step=st.integers(0, 50),
)
def test_batches_of_any_options(
    documents: list[int], length: int, batch: int, seed: int, packing: str, step: int
) -> None:
    offsets = np.cumsum([0, *(size + 1 for size in documents)]).astype(np.int64)
    tokens = np.arange(offsets[-1]).astype(np.uint16)
    split = Split(
        corpus="any", role="train", tokens=tokens, offsets=offsets, documents=tuple(map(str, range(len(documents))))
    )
    try:
        batches = Batches(split, length, batch, seed, packing)
    except InputError as error:
        one_line(error)
        return
    found = batches[step]
    scored = found.targets != IGNORE
    assert found.tokens.shape == (batch, length) and torch.equal(found.targets[scored], found.tokens[scored] + 1)


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Writer:
    folder = tmp_path_factory.mktemp("needle")
    squad, hotpot = [], []
    for n in range(20):
        asked = {"question": f"Which {n}?", "answers": [{"text": str(n)}], "is_impossible": False}
        squad.append({"title": f"{n}", "paragraphs": [{"context": f"Text {n}.", "qas": [asked]}]})
        hotpot.append(
            {"question": f"Which {n}?", "answer": str(n), "context": [[f"Title {n}", [f"Text {n}.", " More."]]]}
        )
    (folder / "squad.json").write_text(json.dumps({"data": squad}))
    (folder / "hotpot.json").write_text(json.dumps(hotpot))
    sources = ruler_texts.load(None, str(folder / "squad.json"), str(folder / "hotpot.json"))
    return Writer(Bytes(), sources, folder)


@fuzzed
# shorter than any piece of a prompt
@example(task="niah_single_1", length=0, seed=0, index=0, use="test")
@given(
    task=st.sampled_from(sorted(ruler_tasks.TASKS)),
    length=st.integers(0, 4096),
    seed=st.integers(0, 2**40),
    index=st.integers(0, 2**20),
    use=st.sampled_from(["test", "train", "validation"]),
)
def test_needles_of_any_length(task: str, length: int, seed: int, index: int, use: str, writer: Writer) -> None:
    try:
        (prompt,) = writer._write(task, range(index, index + 1), length, seed, use, lambda _: None)
    except InputError as error:
        one_line(error)
        return
    assert len(prompt.tokens) + ruler_tasks.TASKS[task].new_tokens <= length
    assert len(prompt.answer) and prompt.references
    assert all(reference in Bytes().decode(prompt.tokens) for reference in prompt.references) or task.startswith("qa")
