"""Provenance: its columns in the rows of a table, and the run file of a cell with everything else.

A run file is results/runs/<cell>.json. JSON has no NaN and no infinity: both are written as null.
"""

import functools
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from sbeval.errors import InputError, spelled
from sbeval.runtime.files import replacing, storing
from sbeval.tables.privacy import shared, shared_argv
from sbeval.tables.rows import Provenance

SOURCE = Path(__file__).resolve().parents[1]
PACKAGES = ("numpy", "sbeval", "torch", "triton")


def collect(
    *,
    cell: str,
    preset: str,
    corpus: str,
    tokenizer: str,
    train_tokens: int,
    dtype: str,
    device: str,
    backend: str,
    device_name: str | None = None,
    unique_tokens: int | None = None,
    epochs: float | None = None,
) -> Provenance:
    """Complete the provenance columns of a cell's rows with commit, versions and time.

    device: torch's name (`cpu`, `cuda:1`). The column has the name of the card, or `device_name` if given.
    """
    installed = versions()
    return Provenance(
        cell=cell,
        preset=preset,
        corpus=spelled(corpus),
        tokenizer=shared(spelled(tokenizer)),
        train_tokens=train_tokens,
        unique_tokens=unique_tokens,
        epochs=epochs,
        dtype=dtype,
        device=device_name or name_of(device),
        backend=backend,
        commit=commit(SOURCE),
        torch=installed["torch"],
        triton=installed["triton"],
        utc=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )


def run_record(
    *,
    config: object,
    provenance: Provenance,
    status: Literal["finished", "failed"],
    reason: str = "",
    corpus_digest: str = "",
    wall_s: float | None = None,
    tokens_per_s: float | None = None,
    measured: Mapping[str, object] | None = None,
    argv: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Collect the contents of a run file.

    reason: why a run failed. wall_s: seconds. tokens_per_s: of training; None where nothing was trained. measured:
    anything else, such as memory and timings.
    """
    program, *arguments = sys.argv if argv is None else argv
    assert (status == "failed") == bool(reason), "a failed run has a reason, a finished one has none"
    return {
        "status": status,
        "reason": reason,
        "provenance": provenance,
        "config": config,
        # without the folder of the program, which depends on the machine
        "argv": [Path(program).name, *shared_argv(arguments)],
        "versions": versions(),
        "host": {"platform": platform.platform(), "machine": platform.machine(), "cpus": os.cpu_count()},
        "device": provenance.device,
        "corpus_digest": corpus_digest,
        "wall_s": wall_s,
        "tokens_per_s": tokens_per_s,
        "measured": measured or {},
    }


def write_run(path: Path, record: Mapping[str, object]) -> None:
    """Write a run file atomically, as JSON with one entry on a line and its own digest; create its folder.

    Dataclasses become objects, Paths text, sets sorted lists, arrays and tensors lists, NaN and infinity null. Secrets,
    and names of users and home folders, are left out (`sbeval.tables.privacy`).
    """
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    plain = _plain(record)
    with replacing(path) as temporary:
        temporary.write_text(_layout(plain | {"digest": _digest(plain)}) + "\n", encoding="utf-8")


def read_run(path: Path) -> dict[str, Any]:
    """Read a run file without its digest; InputError when it is missing, not a JSON object or not as it was written.

    Files from before there were digests are not checked.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"no run file {path}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read the run file {path}: {error}") from None
    if not isinstance(record, dict):
        raise InputError(f"the run file {path} is not a JSON object")
    if record.pop("digest", None) not in (None, _digest(record)):
        raise InputError(f"the run file {path} is not as it was written: its digest does not match; run its cell again")
    return record


@functools.cache
def commit(folder: Path) -> str:
    """Return the commit of the source in `folder`, with `+dirty` when tracked files differ from it.

    It is looked up once, while the running code is still that on disk. Changed result tables do not count: the first
    cell of a sweep would mark all others. Outside git, and in a folder that git does not track, such as an environment
    inside the checkout of another project, it is the value of SBEVAL_COMMIT, else `unknown`.
    """
    if not _git(folder, "ls-files", "--error-unmatch", "."):
        return os.environ.get("SBEVAL_COMMIT", "unknown")
    head = _git(folder, "rev-parse", "--short=12", "HEAD")
    if head is None:
        return "unknown"
    changed = _git(folder, "diff", "--name-only", "HEAD", "--", ":(top)", ":(top,exclude)results")
    return head if changed == "" else f"{head}+dirty"


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that numbers depend on; `none` for one that is not installed.

    They are read from the packages' metadata, without imports.
    """
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def name_of(device: str) -> str:
    """Return the name of the card for torch's device name, if torch is imported; otherwise `device` itself."""
    torch = sys.modules.get("torch")
    if torch is None or not device.startswith("cuda"):
        return device
    return str(torch.cuda.get_device_name(device))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _plain(value: Any) -> Any:
    """Convert a value to JSON's types; TypeError where that would be a guess."""
    if isinstance(value, str):
        return shared(spelled(value))
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return shared(spelled(value.as_posix()))
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return [_plain(item) for item in sorted(value)]
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    # numpy's and torch's scalars and arrays
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    raise TypeError(f"a {type(value).__name__} cannot be written to a run file")


def _digest(record: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _layout(value: Any, margin: str = "") -> str:
    """Write objects with one entry on a line and lists on one line, however long."""
    if not isinstance(value, dict) or not value:
        return json.dumps(value, allow_nan=False, ensure_ascii=False)
    inner = margin + "  "
    entries = [f"{inner}{json.dumps(key, ensure_ascii=False)}: {_layout(item, inner)}" for key, item in value.items()]
    return "{\n" + ",\n".join(entries) + f"\n{margin}}}"
