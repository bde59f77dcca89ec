"""Examine this machine: devices, attention methods, optional packages, and which presets fit into memory."""

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
import torch

from sbeval import registry
from sbeval.errors import InputError, first_line
from sbeval.evaluation import perplexity
from sbeval.kernels import stick_breaking
from sbeval.models.config import ModelConfig
from sbeval.models.decoder import Decoder, n_parameters
from sbeval.runtime import device as devices
from sbeval.sweep import cost
from sbeval.sweep.graph import steps
from sbeval.tables import provenance
from sbeval.tasks import attention_map, length_gen, length_gen_losses
from sbeval.training.config import TrainConfig
from sbeval.training.text_model import EvaluatedModel, likely_vocabulary

# module, name on PyPI, purpose
PACKAGES = (
    ("fla", "fla-core", "a peer in `sbeval bench kernel`"),
    ("stickbreaking_attention", "stickbreaking-attention", "the authors' kernel, a peer there"),
    ("transformers", "transformers", "models and tokenizers of Hugging Face: sbeval[hf]"),
    ("datasets", "datasets", "corpora of Hugging Face: sbeval[hf]"),
    ("lm_eval", "lm_eval", "few-shot and needle: sbeval[few-shot]"),
    ("wonderwords", "wonderwords", "needle: sbeval[needle]"),
    ("ray", "ray", "--executor ray: sbeval[ray]"),
    ("plotly", "plotly", "figures as pages: sbeval[html]"),
    ("tensorboard", "tensorboard", "--tensorboard: sbeval[tensorboard]"),
)
GIB = 1 << 30
# timeout in seconds for importing a package
PATIENCE_S = 120
# fraction of free memory that the framework leaves for tensors
USABLE = 0.9


@dataclass(frozen=True, slots=True)
class Section:
    """A table of the report."""

    title: str
    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Report:
    """All sections. able: True if any method and preset can run."""

    sections: list[Section]
    able: bool


def examine(device: torch.device, results_dir: Path) -> Report:
    """Build the report, with memory and times of `device`. Takes some seconds, mostly for imports."""
    free, total = memory(device)
    methods, presets = list(_methods(device)), list(_presets(device, int(USABLE * free)))
    all_devices = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]
    return Report(
        [
            Section("Versions", ("package", "version"), list(_versions())),
            Section("Devices", ("device", "name", "free GiB", "of", "TFLOP/s"), [_device(one) for one in all_devices]),
            Section(f"Attention on {device}", ("method", "backend", "runs"), [*methods, _hopper(device)]),
            Section("Optional packages", ("package", "here", "what for"), [_package(*each) for each in PACKAGES]),
            Section("Folders", ("folder", "path", "free GiB"), list(_folders(results_dir))),
            Section(
                f"Presets on {device} ({free / GIB:.1f} of {total / GIB:.1f} GiB free; memory and time are estimates)",
                ("family", "preset", "model", "training GiB", "evaluation GiB", "verdict", "time"),
                presets,
            ),
        ],
        able=any(runs == "yes" for *_, runs in methods) and any(row[5] != "too large" for row in presets),
    )


def memory(device: torch.device) -> tuple[int, int]:
    """Return free and total memory of a device in bytes; for a CPU free is what the system reports as available."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(free), int(total)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    free = next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), total)
    return free, total


def training_bytes(shape: ModelConfig, tokens: int, dtype: str, scored: int) -> int:
    """Estimate the bytes of training: 16 bytes a parameter (weights, gradients, Adam's two moments, float32 each) and,
    with products in half precision, a copy of the weights of `e` bytes; for each of `tokens` tokens of a forward pass
    and layer what the backward pass reads (the residual stream and its norm twice in float32, and in `e` bytes queries,
    keys, values, the mixed heads, and of the MLP its inner values three times); for each of `scored` tokens its logits
    in `e` bytes, and in float32 with their gradient.
    """
    size = 4 if dtype == "float32" else 2
    parameters = n_parameters(shape) * (16 + (size if size < 4 else 0))
    heads = (2 * shape.heads + 2 * shape.n_kv_heads) * shape.d_head
    activations = shape.layers * (4 * 4 * shape.width + size * (heads + 3 * shape.hidden))
    return parameters + tokens * activations + scored * shape.vocab_size * (size + 8)


def evaluation_bytes(shape: ModelConfig, tokens: int, dtype: str) -> int:
    """Estimate the bytes of evaluation: 4 bytes a parameter; for each of `tokens` tokens of a forward pass the
    activations of one layer at a time; for a chunk of tokens its logits in `dtype` and twice in float32."""
    size = 4 if dtype == "float32" else 2
    layer = 3 * 4 * shape.width + size * ((2 * shape.heads + 2 * shape.n_kv_heads) * shape.d_head + 3 * shape.hidden)
    logits = min(tokens, perplexity.CHUNK) * shape.vocab_size * (size + 8)
    return 4 * n_parameters(shape) + tokens * layer + logits


def verdict(shape: ModelConfig, training: TrainConfig, eval_tokens: int, free: int, option: str) -> str:
    """Return whether a model fits into `free` bytes: `fits`, `needs ...` the largest micro-batch, `too large`.

    option: flag that sets the tokens of a forward pass; empty if there is none, and the batch is halved at run time.
    """
    if evaluation_bytes(shape, eval_tokens, training.dtype) > free:
        return "too large"
    rows = whole = training.micro_batch or training.batch
    while rows and _training(shape, training, rows) > free:
        rows //= 2
    if rows == whole:
        return "fits"
    if not rows or (shape.dropout and not option):
        return "too large"
    return f"needs {option} {rows * training.length}" if option else f"fits {rows} of {whole} rows at a time"


def _training(shape: ModelConfig, training: TrainConfig, rows: int) -> int:
    tokens = rows * training.length
    scored = min(tokens, training.capacity or tokens)
    return training_bytes(shape, tokens, training.dtype, scored)


def _versions() -> Iterator[tuple[str, ...]]:
    yield from provenance.versions().items()
    yield "CUDA of torch", str(torch.version.cuda or "none")


def _device(device: torch.device) -> tuple[str, ...]:
    free, total = memory(device)
    dtype = devices.pick_dtype(None, device)
    speed = f"{devices.measured_flops(device, dtype) / 1e12:.2f} in {dtype}"
    return str(device), devices.describe(device), f"{free / GIB:.1f}", f"{total / GIB:.1f}", speed


def _methods(device: torch.device) -> Iterator[tuple[str, ...]]:
    """Run a forward and backward pass of a small model of each method."""
    for name in registry.ATTENTION:
        shape = ModelConfig(vocab_size=64, width=64, layers=1, heads=1, hidden=64, attention=name)
        tokens = torch.arange(64, device=device)[None]
        try:
            with devices.autocast(device, devices.pick_dtype(None, device)):
                Decoder(shape).to(device).loss(tokens, tokens).backward()
            runs = "yes"
        except _kernel_errors() as error:
            runs = f"no: {first_line(error)}"
        except Exception as error:
            if registry.ours(registry.ATTENTION[name]):
                raise
            yield name, "", f"no: {type(error).__name__}: {first_line(error)}"
            continue
        yield name, registry.method(name).backend_name(device.type), runs


def _hopper(device: torch.device) -> tuple[str, ...]:
    """Run the Hopper kernels of stick-breaking, which runs by them where it can."""
    q = torch.randn(1, 64, 1, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    try:
        stick_breaking.attention(q, q, q, backend="triton-hopper")[0].sum().backward()
        runs = "yes"
    except _kernel_errors() as error:
        runs = f"no: {first_line(error)}"
    return "stick_breaking", "triton-hopper", runs


def _kernel_errors() -> tuple[type[Exception], ...]:
    """Return what is raised if a kernel does not compile or fit, does not serve a device, or lacks a compiler."""
    kinds: tuple[type[Exception], ...] = (InputError, RuntimeError, ImportError, OSError)
    try:
        # not a RuntimeError
        return *kinds, importlib.import_module("triton.errors").TritonError
    except ImportError:
        return kinds


def _package(module: str, name: str, use: str) -> tuple[str, ...]:
    """Try to import a package, in a subprocess: the import may change or end its process."""
    if importlib.util.find_spec(module) is None:
        return name, "no", use
    command = [sys.executable, "-W", "ignore", "-c", f"import {module}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        return name, f"broken: import did not finish in {PATIENCE_S} s", use
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return name, f"broken: {lines[-1] if lines else f'import exits with code {done.returncode}'}", use
    try:
        return name, importlib.metadata.version(name), use
    except importlib.metadata.PackageNotFoundError:
        return name, "yes", use


def _folders(results_dir: Path) -> Iterator[tuple[str, ...]]:
    for name, path in (("cache", Path(platformdirs.user_cache_dir("sbeval"))), ("results", results_dir.absolute())):
        existing = next(folder for folder in (path, *path.parents) if folder.exists())
        writable = "" if os.access(existing, os.W_OK) else ", not writable"
        yield name, f"{path}{writable}", f"{shutil.disk_usage(existing).free / GIB:.1f}"


def _presets(device: torch.device, free: int) -> Iterator[tuple[str, ...]]:
    dtype = devices.pick_dtype(None, device)
    speeds = {dtype: devices.measured_flops(device, dtype)}
    for family in registry.TASKS:
        try:
            task = registry.task(family)
        # what others' code can raise is anything
        except Exception:
            if family in registry.HELP:
                raise
            yield family.replace("_", "-"), "", "", "", "", registry.command_help(family), ""
            continue
        for name, preset in task.presets.items():
            config: Any = dataclasses.replace(preset, dtype=dtype)
            # few-shot: the time of training alone, without opening lm-eval's tasks
            cells: Any = length_gen.cells(config) if family == "few_shot" else task.cells(config)
            sizes = [_sizes(cell.config, cell, device) for cell in cells]
            shape, training, tokens, option = max(
                sizes, key=lambda one: _training(one[0], one[1], one[1].micro_batch or one[1].batch)
            )
            whole = _training(shape, training, training.micro_batch or training.batch)
            yield (
                family.replace("_", "-"),
                name,
                f"{n_parameters(shape) / 1e6:.1f} M",
                f"{whole / GIB:.2f}",
                f"{evaluation_bytes(shape, tokens, dtype) / GIB:.2f}",
                verdict(shape, training, tokens, free, option),
                cost.span(*cost.total(cost.seconds(steps(cells), speeds, device))),
            )


def _sizes(config: Any, cell: Any, device: torch.device) -> tuple[ModelConfig, TrainConfig, int, str]:
    """Return model, training, tokens of a forward pass in evaluation, and the flag for those in training."""
    if isinstance(config, EvaluatedModel):
        options: Any = config
        # of which only the model and its training are asked for, the same in all families
        one = length_gen.Cell(config=options)
        longest = max(
            *(getattr(config, name, 0) for name in ("eval_len", "longest")),
            *getattr(config, "rolling", ()),
            *getattr(config, "lengths", ()),
            length_gen_losses.EVAL_TOKENS[device.type],
        )
        shape = one.model(likely_vocabulary(config.tokenizer))
        return shape, one.training(), longest, "--micro-batch-tokens"
    if isinstance(config, attention_map.Config):
        cell = config.recall(config.attention[0], config.seeds[0])
    training = cell.training()
    return cell.model(), training, min(cell.config.test_rows, 256) * training.length, ""
