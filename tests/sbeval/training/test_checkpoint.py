"""Checkpoints come back as they went; a writer killed anywhere leaves one; what can't be used is named in one line."""

import functools
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sbeval.errors import InputError
from sbeval.models.config import ModelConfig
from sbeval.models.decoder import Decoder
from sbeval.runtime import files
from sbeval.training import checkpoint
from sbeval.training.checkpoint import State, find, load_model, load_state, remove, restore, save, tidy
from sbeval.training.config import TrainConfig
from sbeval.training.optimizer import optimizer_for

SHAPE: dict[str, Any] = {"vocab_size": 20, "width": 16, "layers": 1, "heads": 2, "hidden": 24}
# the changes to the file system that one save makes
CHANGES = 9


def build(**changes: Any) -> tuple[Decoder, torch.optim.Optimizer]:
    model = Decoder(ModelConfig(**(SHAPE | changes)))
    return model, optimizer_for(model, TrainConfig(steps=3, batch=2, length=6, lr=0.1))


def train(model: Decoder, optimizer: torch.optim.Optimizer) -> None:
    for step in range(3):
        tokens = torch.arange(step, step + 12).view(2, 6)
        model.loss(tokens, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()


@functools.cache
def trained() -> tuple[Decoder, torch.optim.Optimizer]:
    model, optimizer = build()
    train(model, optimizer)
    return model, optimizer


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], x) for name, x in wanted.items())


def refused(act: Callable[[], object], *, names: Path) -> str:
    """The message of the InputError that `act` raises: one line, with the path."""
    with pytest.raises(InputError) as caught:
        act()
    message = str(caught.value)
    assert "\n" not in message and str(names) in message
    return message


def unseal(folder: Path, **changes: Any) -> None:
    """Make it a checkpoint from before there were digests, with a change of the model's config."""
    config = json.loads((folder / "config.json").read_text())
    kept = {name: value for name, value in config.items() if name not in ("files", "digest")}
    (folder / "config.json").write_text(json.dumps(kept | {"model": kept["model"] | changes}))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint in the middle of training."""
    torch.manual_seed(0)
    model, optimizer = build()
    train(model, optimizer)
    save(tmp_path / "run", model, State(losses=[3.0, 2.0, 1.0]), optimizer)
    return tmp_path / "run"


@pytest.mark.parametrize(
    "changes", [{}, {"tied": True, "positions": 6}, {"attention": "stick_breaking:remainder=bias"}], ids=str
)
def test_round_trip(changes: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, optimizer = build(**changes)
    train(model, optimizer)
    state = State(losses=[1.5, 0.1 + 0.2, 1e-30], scores=[(2, 0.25), (3, 1 / 3)], seconds=1.25)
    save(tmp_path / "deep" / "run", model, state, optimizer)
    folder = find(tmp_path / "deep" / "run")
    assert folder is not None
    assert load_state(folder) == state
    loaded = load_model(folder)
    assert loaded.config == model.config
    assert same(loaded.state_dict(), model.state_dict())
    assert (loaded.head.weight is loaded.embedding.weight) == model.config.tied
    other, empty = build(**changes)
    restore(folder, other, empty)
    assert same(other.state_dict(), model.state_dict())
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert same(empty.state[theirs], optimizer.state[mine])
        assert optimizer.state[mine]["step"] == 3


def test_a_finished_run_keeps_no_moments(saved: Path) -> None:
    model, _ = build()
    assert {path.name for path in saved.iterdir()} == {"model.safetensors", "optimizer.safetensors", "config.json"}
    save(saved, model, State(losses=[1.0], finished=True))
    assert {path.name for path in saved.iterdir()} == {"model.safetensors", "config.json"}
    assert load_state(saved).finished
    assert [path.name for path in saved.parent.iterdir()] == ["run"], "nothing is left beside it"


class KilledError(BaseException):
    """The process ends here."""


def save_until(folder: Path, step: int, changes: int) -> bool:
    """Save weights that are all `step`, at `step`, and return whether that was cut off after so many changes."""
    left = changes

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal left
            if left == 0:
                if function is clear and args[0].exists():
                    # removed by half
                    for path in list(args[0].iterdir())[:1]:
                        path.unlink()
                raise KilledError
            left -= 1
            return function(*args, **options)

        return call

    model, optimizer = trained()
    for parameter in model.parameters():
        parameter.data.fill_(step)
    clear = files.clear
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (Path, "mkdir"),
            (Path, "rename"),
            (Path, "write_text"),
            (checkpoint, "clear"),
            (checkpoint, "save_file"),
        ):
            patch.setattr(owner, name, counted(getattr(owner, name)))
        try:
            save(folder, model, State(losses=[0.0] * step), optimizer)
        except KilledError:
            return True
    return False


def step_of(folder: Path) -> int:
    """The step of what is found at `folder`, all of whose files must be of that step; 0 for nothing."""
    path = find(folder)
    if path is None:
        return 0
    step = load_state(path).step
    model, optimizer = build()
    restore(path, model, optimizer)
    assert all(bool((parameter == step).all()) for parameter in model.parameters())
    return step


@pytest.mark.parametrize("first", range(CHANGES + 1))
def test_a_writer_killed_anywhere_leaves_a_checkpoint(first: int, tmp_path: Path) -> None:
    for second in range(CHANGES + 1):
        folder = tmp_path / f"{second}" / "run"
        assert not save_until(folder, 1, 100)
        assert save_until(folder, 2, first) == (first < CHANGES)
        before = step_of(folder)
        assert before in (1, 2)
        # and so again, with what the first left behind
        save_until(folder, 3, second)
        assert step_of(folder) in (before, 3)
        assert not save_until(folder, 4, 100)
        assert step_of(folder) == 4
        assert [path.name for path in folder.parent.iterdir()] == ["run"]


def test_a_first_save_killed_leaves_nothing_or_all(tmp_path: Path) -> None:
    steps = []
    for changes in range(CHANGES):
        save_until(tmp_path / f"{changes}" / "run", 1, changes)
        steps.append(step_of(tmp_path / f"{changes}" / "run"))
    assert steps == sorted(steps)
    assert set(steps) == {0, 1}


def test_between_the_renames_the_old_one_is_found(saved: Path) -> None:
    saved.rename(saved.with_name(".run.old"))
    assert find(saved) == saved.with_name(".run.old")
    assert load_state(saved.with_name(".run.old")).step == 3


def test_nothing_to_find(tmp_path: Path) -> None:
    assert find(tmp_path / "run") is None
    (tmp_path / "run").mkdir()
    assert find(tmp_path / "run") is None
    assert "it has no config.json" in refused(lambda: load_model(tmp_path / "run"), names=tmp_path / "run")
    assert "it has no config.json" in refused(lambda: load_state(tmp_path / "no"), names=tmp_path / "no")


def test_what_is_removed_is_gone(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(saved, saved.with_name(".run.old"))
    rmtree = shutil.rmtree

    def cut_off(path: Path, **options: Any) -> None:
        if path == saved:
            raise KilledError
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", cut_off)
    with pytest.raises(KilledError):
        remove(saved)
    assert saved.exists() and find(saved) is None
    monkeypatch.undo()
    remove(saved)
    assert not list(saved.parent.iterdir())
    remove(saved)


def test_what_a_killed_writer_left_is_tidied(saved: Path) -> None:
    old, partial = saved.with_name(".run.old"), saved.with_name(".run.partial")
    shutil.copytree(saved, old)
    shutil.copytree(saved, partial)
    tidy(saved)
    assert list(saved.parent.iterdir()) == [saved]
    # between the renames the old one is all there is
    saved.rename(old)
    tidy(saved)
    assert find(saved) == old


@pytest.mark.parametrize("size", [0, 4, 100, -1])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_files_cut_short(name: str, size: int, saved: Path) -> None:
    path = saved / name
    path.write_bytes(path.read_bytes()[:size])
    message = refused(lambda: restore(saved, *build()), names=path)
    assert "remove its folder to train again" in message


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "config.json"])
def test_a_flipped_bit_anywhere_is_named(name: str, saved: Path) -> None:
    """In a tensor's values too, which safetensors itself does not check."""
    path = saved / name
    whole = path.read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 50)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        refused(lambda: restore(saved, *build()), names=path)
    path.write_bytes(whole)
    restore(saved, *build())


def test_a_checkpoint_from_before_digests_is_read(saved: Path) -> None:
    model = load_model(saved)
    unseal(saved)
    assert same(load_model(saved).state_dict(), model.state_dict())
    assert load_state(saved).losses == [3.0, 2.0, 1.0]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_files_that_are_missing(name: str, saved: Path) -> None:
    (saved / name).unlink()
    refused(lambda: restore(saved, *build()), names=saved / name)


@pytest.mark.parametrize("content", [b"", b'{"model": ', b"\xff\xfe{}", b"not json", b"[" * 100_000], ids=len)
def test_a_config_that_is_not_json(content: bytes, saved: Path) -> None:
    (saved / "config.json").write_bytes(content)
    assert "is not JSON" in refused(lambda: load_model(saved), names=saved / "config.json")
    assert "is not JSON" in refused(lambda: load_state(saved), names=saved / "config.json")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([], "TypeError"),
        ({}, "KeyError: 'model'"),
        ({"model": SHAPE}, "KeyError: 'state'"),
        ({"model": SHAPE | {"depth": 3}, "state": {}}, "depth"),
        ({"model": {"vocab_size": 5}, "state": {}}, "width"),
        ({"model": SHAPE | {"width": 0}, "state": {}}, "width must be at least 1; got 0"),
        ({"model": SHAPE | {"width": "wide"}, "state": {}}, "TypeError"),
        ({"model": SHAPE | {"width": 16.0}, "state": {}}, "TypeError: width is 16.0"),
        ({"model": SHAPE | {"tied": 1}, "state": {}}, "TypeError: tied is 1"),
        ({"model": SHAPE, "state": {"losses": 3}}, "TypeError: losses is 3"),
        ({"model": SHAPE, "state": {}, "modle": {}}, "unknown 'modle'"),
        ({"model": SHAPE, "state": {"epoch": 1}}, "epoch"),
        ({"model": SHAPE, "state": {"scores": [1]}}, "TypeError"),
    ],
    ids=str,
)
def test_a_config_of_something_else(content: object, reason: str, saved: Path) -> None:
    (saved / "config.json").write_text(json.dumps(content))
    message = refused(lambda: load_model(saved), names=saved / "config.json")
    assert "is not the config of a checkpoint" in message and reason in message


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"vocab_size": 21}, "size mismatch for embedding.weight"),
        ({"positions": 4}, 'Missing key.* "positions.weight"'),
        ({"layers": 2}, "it has 1 layers, not 2"),
        # would take all memory, or forever
        ({"vocab_size": 1 << 24}, "size mismatch"),
        ({"layers": 1 << 24}, "it has 1 layers"),
        ({"tied": True, "width": 32}, "size mismatch"),
    ],
    ids=str,
)
def test_weights_that_do_not_fit(changes: dict[str, Any], what: str, saved: Path) -> None:
    unseal(saved, **changes)
    with pytest.raises(InputError, match=f"does not fit its config: .*{what}"):
        load_model(saved)
    refused(lambda: load_model(saved), names=saved / "model.safetensors")


def test_moments_that_do_not_fit(saved: Path, tmp_path: Path) -> None:
    unseal(saved)
    model, optimizer = build(hidden=30)
    train(model, optimizer)
    save(tmp_path / "other", model, State(), optimizer)
    path = saved / "optimizer.safetensors"
    shutil.copy(tmp_path / "other" / path.name, path)
    message = refused(lambda: restore(saved, *build()), names=path)
    assert "exp_avg of blocks.0.mlp.up.weight has shape (60, 16), not (48, 16)" in message
    untrained, fresh = build()
    save(tmp_path / "other", untrained, State(), fresh)
    shutil.copy(tmp_path / "other" / path.name, path)
    assert "step of embedding.weight has none" in refused(lambda: restore(saved, *build()), names=path)


class Trap:
    """Unpickled, makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "config.json"])
@pytest.mark.parametrize("dump", [pickle.dump, torch.save])
@pytest.mark.parametrize("sealed", [True, False])
def test_nothing_is_unpickled(name: str, dump: Callable[..., None], sealed: bool, saved: Path, tmp_path: Path) -> None:
    if not sealed:
        unseal(saved)
    with (saved / name).open("wb") as file:
        dump(Trap(tmp_path / "sprung"), file)

    def load() -> None:
        load_state(saved)
        restore(saved, *build())

    refused(load, names=saved / name)
    assert not (tmp_path / "sprung").exists()
