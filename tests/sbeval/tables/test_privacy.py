"""What is recorded of a run names no user, host or home folder, and holds no secret."""

import json
from pathlib import Path
from typing import Any

import pytest

from sbeval.runtime import trackers
from sbeval.tables import privacy, provenance
from sbeval.tables.results import Results
from sbeval.tables.run_files import command_line

RESULTS = Path(__file__).parents[3] / "results"


@pytest.fixture(autouse=True)
def ann(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/data/people/ann"))
    monkeypatch.setattr(Path, "cwd", lambda: Path("/data/people/ann/work"))
    monkeypatch.setattr("getpass.getuser", lambda: "ann")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("books", "books"),
        ("./books", "./books"),
        ("/data/people/ann/work/books", "books"),
        ("/data/people/ann/work", "."),
        ("/data/people/ann/books/a.txt", "~/books/a.txt"),
        ("/data/people/anna/books", "/data/people/anna/books"),
        ("/home/bob/books", "~/books"),
        ("/Users/bob/books", "~/books"),
        ("/scratch/ann/books", "/scratch/USER/books"),
        ("cannot read /data/people/ann/x: gone", "cannot read ~/x: gone"),
        ("https://ann:pass@host/set?token=abc&n=1", "https://***@host/set?token=***&n=1"),
        ("https://host/set?key=abc", "https://host/set?key=***"),
        ("https://host/set?X-Amz-Signature=abc#top", "https://host/set?X-Amz-Signature=***#top"),
        ("hf_AbCdEfGhIjKlMnOpQrStUvWx", "***"),
        ("hf:allenai/c4:en", "hf:allenai/c4:en"),
    ],
)
def test_texts(text: str, wanted: str) -> None:
    assert privacy.shared(text) == wanted


def test_values_of_options() -> None:
    given = (
        "few-shot --hf-token abc --api-key=abc --address gpu7:6379 --tokenizer bpe:300 --train-tokens 8 --key-pool 4"
    )
    wanted = "few-shot --hf-token *** --api-key=*** --address *** --tokenizer bpe:300 --train-tokens 8 --key-pool 4"
    assert privacy.shared_argv(given.split()) == wanted.split()


def test_a_run_file_and_its_command(tmp_path: Path) -> None:
    origin = provenance.collect(
        cell="c", preset="p", corpus="books", tokenizer="/home/bob/tok", train_tokens=0, dtype="float32", device="cpu",
        backend="torch",
    )  # fmt: skip
    argv = ["/opt/bin/sbeval", "length-gen", "--corpus", "/data/people/ann/my books", "--address", "gpu7:1"]
    record = provenance.run_record(
        config={"corpus": "/data/people/ann/my books", "window": [1]},
        provenance=origin,
        status="failed",
        reason="cannot read /data/people/ann/x",
        argv=argv,
    )
    provenance.write_run(tmp_path / "run.json", record)
    written = (tmp_path / "run.json").read_text()
    assert "people" not in written and "bob" not in written and "gpu7" not in written
    found = provenance.read_run(tmp_path / "run.json")
    assert found["config"]["corpus"] == "~/my books" and found["provenance"]["tokenizer"] == "~/tok"
    # the shell expands ~/
    assert command_line(found["argv"]) == "sbeval length-gen --corpus ~/'my books' --address '***'"


# what the page says of each entry of a run file
SAID = {
    "status": "status",
    "reason": "why a cell failed",
    "provenance": "commit of sbeval",
    "config": "the whole configuration",
    "argv": "the command line",
    "versions": "versions of Python, NumPy, PyTorch, Triton and sbeval",
    "host": "the operating system with the version of its kernel, the architecture and the number of CPUs",
    "device": "name of the GPU, or `cpu` and the number of threads",
    "corpus_digest": "digests of the text",
    "wall_s": "seconds",
    "tokens_per_s": "tokens per second",
    "measured": "what else was measured",
}


def test_the_page_on_records_names_all_that_is_recorded_and_sent() -> None:
    page = (RESULTS.parent / "docs" / "records.md").read_text()
    origin = provenance.collect(
        cell="c", preset="", corpus="", tokenizer="", train_tokens=0, dtype="float32", device="cpu", backend="torch"
    )
    record = provenance.run_record(config={}, provenance=origin, status="finished")
    assert set(record) == set(SAID) and set(record["host"]) == {"platform", "machine", "cpus"}
    assert [said for said in SAID.values() if said not in page] == []
    assert all(f"--track {kind}:" in page for kind in trackers.PACKAGES)
    results = Results(Path("results"))
    for path in (results.runs, results.checkpoints, results.values("x").parent, results.curves("x").parent):
        assert f"`{path}/" in page
    assert f"`{results.answers('x').parent}/" in page and "samples" not in page


def test_names_that_are_not_utf8_can_be_recorded(tmp_path: Path) -> None:
    provenance.write_run(tmp_path / "run.json", {"corpus": b"caf\xe9".decode(errors="surrogateescape")})
    assert provenance.read_run(tmp_path / "run.json") == {"corpus": "caf\\xe9"}


def test_committed_run_files_have_nothing_to_hide() -> None:
    for path in RESULTS.glob("**/runs/*.json"):
        record = json.loads(path.read_text())
        assert [text for text in strings(record) if privacy.shared(text) != text] == [], path
        assert privacy.shared_argv(record["argv"]) == record["argv"], path


def strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [text for one in value for text in strings(one)]
    return [value] if isinstance(value, str) else []
