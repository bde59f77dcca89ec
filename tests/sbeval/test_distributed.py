"""Two processes train what one trains, go on from each other's checkpoints, and share an evaluation."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from sbeval import checkpoint, distributed, perplexity
from sbeval.batches import Batch
from sbeval.distributed import World
from sbeval.errors import InputError
from sbeval.model import IGNORE, Decoder, ModelConfig
from sbeval.progress import Progress
from sbeval.train import TrainConfig, Trainer

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


def work(folder: Path, stop_at: int, world: World) -> None:
    config = TrainConfig(steps=12, batch=4, length=8, lr=0.01, warmup=2, log_every=3, micro_batch=1, eps=1e-3)
    with Progress(Console(file=io.StringIO())) as progress:
        try:
            trained = Trainer(MODEL, config, Data(stop_at), folder, CPU, world).run(progress.add("train", 12))
        except KeyboardInterrupt:
            return
    windows = [(index, row) for index, row in enumerate(np.random.default_rng(0).integers(0, 31, (5, 9)))]
    how = {"place": CPU, "dtype": "float32", "world": world}
    found = perplexity.measure(trained.model, windows, np.ones_like, **how)  # type: ignore[arg-type]  # each is its own
    if world.leads:
        (folder.parent / f"{folder.name}.json").write_text(json.dumps(found.losses.tolist()))


def start(folder: Path, processes: int, stop_at: int = -1) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, __file__, str(folder), str(stop_at)], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr


def losses_of(folder: Path) -> list[float]:
    return checkpoint.load_state(folder).losses


@pytest.mark.parametrize(("first", "then"), [(2, 2), (2, 1), (1, 2)])
def test_processes_train_what_one_trains(first: int, then: int, tmp_path: Path) -> None:
    work(tmp_path / "one", -1, distributed.ALONE)
    if first != then:
        start(tmp_path / "many", first, stop_at=4)
        assert 4 < len(losses_of(tmp_path / "many")) < 12
    start(tmp_path / "many", then)
    assert losses_of(tmp_path / "many") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-5)
    one, many = (checkpoint.load_model(tmp_path / name) for name in ("one", "many"))
    for a, b in zip(one.parameters(), many.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    found = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "many")]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4)


def test_a_batch_is_shared_evenly() -> None:
    config = TrainConfig(steps=1, batch=4, length=8, lr=0.01)
    with pytest.raises(InputError, match="3 processes cannot share a batch of 4 sequences evenly"):
        Trainer(MODEL, config, Data(), None, CPU, World(0, 3))


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
        work(Path(sys.argv[1]), int(sys.argv[2]), joined)
