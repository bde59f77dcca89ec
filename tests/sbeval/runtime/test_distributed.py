"""Test that two processes train as one does, resume each other's checkpoints, and share an evaluation."""

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from rich.console import Console

from sbeval.data.dataloader import Batch
from sbeval.errors import InputError
from sbeval.evaluation import perplexity
from sbeval.models.config import ModelConfig
from sbeval.models.decoder import IGNORE, Decoder
from sbeval.runtime import distributed
from sbeval.runtime.distributed import World
from sbeval.runtime.progress import Progress
from sbeval.tables import table
from sbeval.training import checkpoint
from sbeval.training.config import TrainConfig
from sbeval.training.optimizer import optimizer_for
from sbeval.training.trainer import Trainer

CPU = torch.device("cpu")
MODEL = ModelConfig(vocab_size=31, width=16, layers=2, heads=2, hidden=24, init_std=0.2)


class Data:
    """4 rows of 8, the second half with fewer targets; `stop_at` interrupts."""

    def __init__(self, stop_at: int = -1) -> None:
        self.stop_at = stop_at

    def __getitem__(self, step: int) -> Batch:
        if step == self.stop_at:
            os.kill(os.getpid(), 15)
        tokens, targets = torch.randint(1, 31, (2, 4, 8), generator=torch.Generator().manual_seed(step))
        targets[2, :6] = IGNORE
        return Batch(tokens=tokens, targets=targets, cu_seqlens=None)


def work(folder: Path, stop_at: int, world: World, shard: bool = False, tied: bool = False) -> None:
    config = TrainConfig(
        steps=12, batch=4, length=8, lr=0.01, warmup=2, log_every=3, micro_batch=1, eps=1e-3, look_every=3
    )
    # three rows, of which two processes cannot have as many each
    whole = Data()[99]
    held_out = Batch(tokens=whole.tokens[:3], targets=whole.targets[:3], cu_seqlens=None)
    with Progress(Console(file=io.StringIO())) as progress:
        try:
            model = dataclasses.replace(MODEL, tied=tied)
            trainer = Trainer(model, config, Data(stop_at), folder, CPU, world, shard=shard, held_out=held_out)
            trained = trainer.run(progress.add("train", 12))
        except KeyboardInterrupt:
            return
    windows = [(index, row) for index, row in enumerate(np.random.default_rng(0).integers(0, 31, (5, 9)))]
    how = perplexity.Execution(place=CPU, dtype="float32", world=world)
    found = perplexity.measure(trained.model, windows, np.ones_like, how)
    if world.leads:
        (folder.parent / f"{folder.name}.json").write_text(json.dumps(found.losses.tolist()))


def start(folder: Path, processes: int, stop_at: int = -1, *rest: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    # FSDP looks for a GPU of each process where there are any, though these train on the CPU
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, __file__, str(folder), str(stop_at), *rest],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr


def losses_of(folder: Path) -> list[float]:
    return checkpoint.load_state(folder).losses


def assert_same_looks(found: Path, wanted: Path) -> None:
    found_looks, looks = (checkpoint.load_state(folder).held_out for folder in (found, wanted))
    assert [step for step, _ in found_looks] == [step for step, _ in looks] == [3, 6, 9, 12]
    assert [loss for _, loss in found_looks] == pytest.approx([loss for _, loss in looks], rel=1e-5)


@pytest.mark.parametrize(("first", "then"), [pytest.param(2, 1, marks=pytest.mark.slow), (1, 2)])
def test_processes_train_what_one_trains(first: int, then: int, tmp_path: Path) -> None:
    work(tmp_path / "one", -1, distributed.ALONE)
    if first == 1:
        work(tmp_path / "many", 4, distributed.ALONE)
    else:
        start(tmp_path / "many", first, stop_at=4)
    assert 4 < len(losses_of(tmp_path / "many")) < 12
    start(tmp_path / "many", then)
    assert losses_of(tmp_path / "many") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-5)
    assert_same_looks(tmp_path / "many", tmp_path / "one")
    one, many = (checkpoint.load_model(tmp_path / name) for name in ("one", "many"))
    for a, b in zip(one.parameters(), many.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    found = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "many")]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4)


def test_a_sharded_model_goes_on_from_one_process_and_one_process_from_it(tmp_path: Path) -> None:
    work(tmp_path / "one", -1, distributed.ALONE, tied=True)
    work(tmp_path / "many", 4, distributed.ALONE, tied=True)
    assert 4 < checkpoint.load_state(tmp_path / "many").step < 9
    start(tmp_path / "many", 2, 8, "shard")
    assert 8 < checkpoint.load_state(tmp_path / "many").step < 12
    assert [path.name for path in sorted((tmp_path / "many").iterdir())] == ["config.json", "shards"]
    shutil.copytree(tmp_path / "many", tmp_path / "sharded")
    work(tmp_path / "many", -1, distributed.ALONE, tied=True)
    start(tmp_path / "sharded", 2, -1, "shard")
    one = checkpoint.load_model(tmp_path / "one")
    for name in ("many", "sharded"):
        assert losses_of(tmp_path / name) == pytest.approx(losses_of(tmp_path / "one"), rel=1e-5)
        assert_same_looks(tmp_path / name, tmp_path / "one")
        # whoever finishes leaves one plain file, and nothing of the optimizer
        assert not {"shards", "optimizer.safetensors"} & {path.name for path in (tmp_path / name).iterdir()}
        for a, b in zip(one.parameters(), checkpoint.load_model(tmp_path / name).parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        found = [json.loads((tmp_path / f"{which}.json").read_text()) for which in ("one", name)]
        np.testing.assert_allclose(found[1], found[0], rtol=1e-4)


def test_shards_that_are_cut_short_are_said(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Decoder(MODEL)
    optimizer = optimizer_for(model, TrainConfig(steps=1, batch=4, length=8, lr=0.01))
    model.loss(torch.arange(8)[None], torch.arange(8)[None]).backward()
    optimizer.step()
    checkpoint.save_sharded(tmp_path / "saved", model, checkpoint.State(losses=[1.0]), optimizer, distributed.ALONE)
    other = Decoder(MODEL)
    again = optimizer_for(other, TrainConfig(steps=1, batch=4, length=8, lr=0.01))
    checkpoint.restore(tmp_path / "saved", other, again)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        assert {key: x.tolist() for key, x in optimizer.state[a].items()} == {
            key: x.tolist() for key, x in again.state[b].items()
        }
    # from outside no pickle is read
    with pytest.raises(InputError, match="is a checkpoint of a sharded model in training"):
        checkpoint.load_model(tmp_path / "saved")
    for path in sorted((tmp_path / "saved" / "shards").iterdir()):
        whole = path.read_bytes()
        path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 4]) + whole[-8:])
        # before its index, a pickle, is read
        with pytest.raises(InputError, match=f"{path} can't be read: it is damaged.*; remove its folder"):
            checkpoint.restore(tmp_path / "saved", other, again)
        path.write_bytes(whole)
    (tmp_path / "saved" / "shards" / ".metadata").unlink()
    with pytest.raises(InputError, match="metadata can't be read: No such file .*; remove its folder to train again"):
        checkpoint.restore(tmp_path / "saved", other, again)


def test_one_process_has_nothing_to_shard() -> None:
    config = TrainConfig(steps=1, batch=4, length=8, lr=0.01)
    with pytest.raises(InputError, match="--shard needs several processes"):
        Trainer(MODEL, config, Data(), None, CPU, shard=True)


def test_a_batch_is_shared_evenly() -> None:
    config = TrainConfig(steps=1, batch=4, length=8, lr=0.01)
    with pytest.raises(InputError, match="batch must be a multiple of the 3 processes; got 4 sequences"):
        Trainer(MODEL, config, Data(), None, CPU, World(0, 3))


def length_gen(results: Path, corpus: Path, device: str, processes: int) -> str:
    """Return the output of the command, started alone or by torchrun."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    options = (
        f"length-gen --device {device} --dtype float32 --tokenizer bytes --size quick --attention stick_breaking "
        "--attention rope --train-len 64 --eval-len 256 --train-tokens 5120 --batch-tokens 512 --documents 5 "
        f"--window 128 --corpus {corpus} --results-dir {results}"
    )
    done = subprocess.run(
        [sys.executable, "-m", *(launcher if processes > 1 else []), "sbeval", *options.split()],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


SEVERAL = torch.cuda.device_count()
on_gpus = pytest.mark.skipif(SEVERAL < 2, reason="needs several GPUs")


@pytest.mark.parametrize(
    ("device", "processes"),
    [pytest.param("cpu", 2, marks=pytest.mark.slow), pytest.param("cuda", min(4, SEVERAL), marks=on_gpus)],
)
def test_a_model_is_evaluated_by_all_processes_as_by_one(device: str, processes: int, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    # five windows, which the processes cannot share evenly
    for number, role in enumerate(("train", *5 * ["test"])):
        words = (f"{role} {number}: the {i * (number + 3) % 17}th word; " for i in range(40))
        (corpus / f"{role}{number}.txt").write_text("".join(words))
    length_gen(tmp_path / "one", corpus, device, 1)
    shutil.copytree(tmp_path / "one" / "checkpoints", tmp_path / "evaluated" / "checkpoints")
    said = [length_gen(tmp_path / name, corpus, device, processes) for name in ("evaluated", "trained")]
    assert "train rope seed 0: 100 %" in said[1] and not any("arning" in text for text in said), said
    keys = ["attention", "metric", "position_start", "context_length", "window", "per"]
    one, evaluated, trained = (
        table.read(tmp_path / name / "length_gen.csv").sort_values(keys) for name in ("one", "evaluated", "trained")
    )
    assert len(one) > 60
    # of a CPU its threads too, of which torchrun gives each process one, as we do here
    for column in (*keys, "n", "train_tokens", "device"):
        assert one[column].astype(str).tolist() == evaluated[column].astype(str).tolist(), column
    for column in ("value", "stderr"):
        np.testing.assert_allclose(evaluated[column], one[column], rtol=1e-4)
    # at each step sums of gradients are rounded in another order
    np.testing.assert_allclose(trained["value"], one["value"], rtol=1e-2)


@pytest.mark.parametrize(("name", "backend"), [("cuda:1", "nccl"), ("cpu", "gloo")])
def test_the_gpu_of_a_process_is_said_to_the_group(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the first barrier guesses it, with a warning."""
    place, begun = torch.device(name), list[Any]()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: begun.append(device))
    monkeypatch.setattr(dist, "init_process_group", lambda *given, **options: begun.append((given, options)))
    for call, result in (("get_rank", 1), ("get_world_size", 2), ("destroy_process_group", None)):
        monkeypatch.setattr(dist, call, lambda result=result: result)
    with distributed.joined(place) as world:
        assert world == World(1, 2)
    assert begun == ([place, (("nccl",), {"device_id": place})] if backend == "nccl" else [(("gloo",), {})])


def test_a_model_is_evaluated_in_another_way() -> None:
    torch.manual_seed(0)
    model = Decoder(ModelConfig(vocab_size=31, width=16, layers=2, heads=2, hidden=24, attention="rope")).eval()
    other = model.evaluated_as("rope:theta=50.0")
    tokens = torch.arange(16)[None]
    assert model.evaluated_as("rope") is model and other.config.attention == "rope:theta=50.0"
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert not torch.allclose(model(tokens), other(tokens))


if __name__ == "__main__":
    with distributed.joined(CPU) as joined:
        both = len(sys.argv) > 3
        work(Path(sys.argv[1]), int(sys.argv[2]), joined, shard=both, tied=both)
