import json
import math
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from sbeval.errors import InputError
from sbeval.tables import provenance
from sbeval.tables.rows import Provenance


@dataclass(frozen=True)
class Config:
    lr: float
    corpus: Path
    lengths: tuple[int, ...]


def collected(device: str = "cpu", device_name: str | None = None) -> Provenance:
    return provenance.collect(
        cell="toy-a",
        preset="quick",
        corpus="books",
        tokenizer="bytes",
        train_tokens=5,
        dtype="float32",
        device=device,
        device_name=device_name,
        backend="torch",
    )


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    for name in ("sbeval/code.py", "results/toy.csv"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("1\n")
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True)
    provenance.commit.cache_clear()
    return folder


def head(folder: Path) -> str:
    done = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    return done.stdout[:12]


def test_commit_of_clean_source(repository: Path) -> None:
    assert provenance.commit(repository / "sbeval") == head(repository)


def test_results_and_untracked_files_leave_the_source_clean(repository: Path) -> None:
    (repository / "results" / "toy.csv").write_text("2\n")
    (repository / "notes.txt").write_text("new\n")
    assert provenance.commit(repository / "sbeval") == head(repository)


def test_changed_source_is_dirty(repository: Path) -> None:
    (repository / "sbeval" / "code.py").write_text("2\n")
    assert provenance.commit(repository / "sbeval") == f"{head(repository)}+dirty"


def test_commit_is_unknown_where_git_does_not_track_the_source(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SBEVAL_COMMIT", raising=False)
    installed = repository / "env" / "site-packages"
    installed.mkdir(parents=True)
    (installed / "code.py").touch()
    assert provenance.commit(installed) == "unknown"
    assert provenance.commit(tmp_path) == "unknown"
    provenance.commit.cache_clear()
    monkeypatch.setenv("SBEVAL_COMMIT", "abc123")
    assert provenance.commit(tmp_path) == "abc123"


def test_commit_is_unknown_without_git(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SBEVAL_COMMIT", raising=False)
    monkeypatch.setenv("PATH", "")
    assert provenance.commit(repository / "sbeval") == "unknown"


def test_collect_fills_in_versions_and_time() -> None:
    found = collected()
    assert (found.cell, found.device, found.train_tokens) == ("toy-a", "cpu", 5)
    assert found.torch == metadata.version("torch")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", found.utc)


def test_a_package_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "PACKAGES", ("numpy", "no-such-package"))
    assert provenance.versions()["no-such-package"] == "none"
    assert provenance.versions()["numpy"] == np.__version__


def test_device_is_the_cards_name_when_torch_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = SimpleNamespace(get_device_name=lambda device: f"Card of {device}")
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert collected("cuda:1").device == "Card of cuda:1"
    assert collected("cpu").device == "cpu"
    assert collected("cuda", device_name="Card").device == "Card"
    monkeypatch.delitem(sys.modules, "torch")
    assert collected("cuda:1").device == "cuda:1"


def test_nothing_here_imports_torch() -> None:
    code = "import sys, sbeval.tables.provenance as p; p.versions(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_run_file_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/some/folder/sbeval", "mqrar", "--seed", "1"])
    record = provenance.run_record(
        config=Config(lr=0.1 + 0.2, corpus=Path("a") / "b", lengths=(1, 2)),
        provenance=collected(),
        status="finished",
        corpus_digest="sha256:00",
        wall_s=1.5,
        tokens_per_s=float("inf"),
        measured={"loss": [2.0, math.nan, np.float32(0.5)], "peak": np.array([[1, 2]]), "kinds": {"b", "a"}, "ä": None},
    )
    path = tmp_path / "runs" / "toy-a.json"
    provenance.write_run(path, record)
    back = provenance.read_run(path)
    assert back["config"] == {"lr": 0.1 + 0.2, "corpus": "a/b", "lengths": [1, 2]}
    assert back["argv"] == ["sbeval", "mqrar", "--seed", "1"]
    assert back["measured"] == {"loss": [2.0, None, 0.5], "peak": [[1, 2]], "kinds": ["a", "b"], "ä": None}
    assert back["tokens_per_s"] is None and back["status"] == "finished"
    assert set(back["versions"]) == {"python", "numpy", "sbeval", "torch", "triton"}
    assert set(back["host"]) == {"platform", "machine", "cpus"}
    assert back["provenance"]["cell"] == "toy-a"
    # a loss curve is one line
    assert '    "loss": [2.0, null, 0.5],' in path.read_text(encoding="utf-8").splitlines()


def test_layout_is_json() -> None:
    value = {"a": {}, "b": {"c": [1, {"d": "e\n"}]}, 'f"': []}
    assert json.loads(provenance._layout(value)) == value


def test_what_has_no_place_in_a_run_file_is_refused_and_leaves_none(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="a object cannot be written"):
        provenance.write_run(tmp_path / "a.json", {"x": object()})
    assert list(tmp_path.iterdir()) == []


def test_a_failed_run_has_a_reason() -> None:
    record = provenance.run_record(config={}, provenance=collected(), status="failed", reason="out of memory")
    assert (record["status"], record["reason"]) == ("failed", "out of memory")
    with pytest.raises(AssertionError):
        provenance.run_record(config={}, provenance=collected(), status="failed")


def test_reading_what_is_no_run_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run file"):
        provenance.read_run(tmp_path / "absent.json")
    for text, message in (('{"status": "fini', "cannot read the run file"), ("[]", "is not a JSON object")):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(InputError, match=message):
            provenance.read_run(tmp_path / "a.json")
