"""Load pretrained models: our checkpoints, released stick-breaking models, or causal language models of Hugging Face.

Weights are read from safetensors alone, and code that comes with a model runs only with --trust-remote-code.
"""

import hashlib
import importlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from sbeval import registry
from sbeval.data.tokenizer import Tokenizer, check_same, quiet
from sbeval.errors import InputError, first_line, reason
from sbeval.evaluation.perplexity import Predictor
from sbeval.models import own
from sbeval.models.decoder import Decoder
from sbeval.pretrained import checks, foreign, released
from sbeval.pretrained.hub_model import HubModel, positions_of
from sbeval.runtime import device
from sbeval.runtime.files import is_of_the_disk, sha256
from sbeval.tables.rows import method_of
from sbeval.training import checkpoint

# files of their tokenizers, and of code that comes with a model
TEXT_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model")
CODE_FILES = ("**/*.py",)
ADAPTER = "adapter_config.json"
Module = TypeVar("Module", bound=torch.nn.Module)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pretrained:
    """A model and its columns of a result table.

    train_len, tokenizer (a digest): None if its files do not record them. positions: the size of its table of
    positions, None if it has none.
    """

    model: Predictor
    name: str
    attention: str
    options: str
    params: int
    vocab_size: int
    train_len: int | None
    backend: str
    positions: int | None
    tokenizer: str | None = None

    def check_tokenizer(self, text: Tokenizer, spec: str) -> None:
        """Raise InputError when a tokenizer has more tokens than the model of `spec`, or is not its own."""
        if text.vocab_size > self.vocab_size:
            raise InputError(
                f"tokenizer {text.name!r} has {text.vocab_size} tokens and the model of {spec} {self.vocab_size}: "
                "give the --tokenizer that it was trained with"
            )
        check_same(self.tokenizer, text, spec)

    def check_length(self, length: int, spec: str) -> None:
        """Raise InputError when `length` tokens exceed the positions of the model of `spec`."""
        if self.positions is not None and length > self.positions:
            raise InputError(
                f"the model of {spec} has a table of {self.positions} positions and can't read {length} tokens: "
                f"give {self.positions} or less"
            )


def is_own(spec: str) -> bool:
    """Return whether `spec` is a checkpoint folder of ours."""
    try:
        return {"model", "state"} <= set(json.loads((Path(spec) / "config.json").read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def load(spec: str, place: torch.device, dtype: str, *, trust_remote_code: bool = False) -> Pretrained:
    """Load the model at a path, or of that name on the Hugging Face hub; raise InputError when it cannot be read."""
    if is_own(spec):
        return _own(Path(spec), place, dtype)
    folder = _released(spec)
    _check_adapter(spec)
    if folder is None:
        return _from_hub(spec, place, dtype, trust_remote_code)
    return _read(spec, folder, place, dtype)


def digest(spec: str) -> str:
    """Return a digest of a model's weights, tokenizer and code: 16 hexadecimal digits for a folder, a commit for the
    hub, and both for code in another repository than the model.

    Downloads the config of a model on the hub. Raise InputError when there is no such model.
    """
    folder = Path(spec)
    if not os.path.isdir(folder):
        try:
            config = Path(_hub().hf_hub_download(spec, "config.json"))
        except (OSError, ValueError) as error:
            raise InputError(f"no model {spec!r} in a folder or on the hub: {first_line(error)}") from None
        return "-".join([config.parent.name, *_code_elsewhere(config)])
    folder = checkpoint.find(folder) or folder
    total = hashlib.sha256()
    for code in _code_elsewhere(folder / "config.json"):
        total.update(code.encode())
    others = {path for pattern in (*TEXT_FILES, *CODE_FILES) for path in folder.glob(pattern)}
    for path in sorted({folder / "config.json", *others, *folder.glob("*.safetensors")}):
        # the optimizer's state is not part of the model
        if path.is_file() and path.name != "optimizer.safetensors":
            total.update(bytes.fromhex(sha256(path)))
    return total.hexdigest()[:16]


def _code_elsewhere(path: Path) -> list[str]:
    """Return the commits of other repositories whose code a config names: `repository--module.Class`."""
    try:
        named = dict(json.loads(path.read_text(encoding="utf-8")).get("auto_map", {})).values()
    # who loads the model reports the error
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return []
    files = sorted({str(one).rpartition(".")[0] for one in named if "--" in str(one)})
    pairs = (one.split("--", 1) for one in files)
    try:
        return [Path(_hub().hf_hub_download(repository, f"{module}.py")).parent.name for repository, module in pairs]
    except (OSError, ValueError) as error:
        raise InputError(f"{path} names code of {files[0].split('--')[0]!r}: {first_line(error)}") from None


def likely_parameters(spec: str) -> int:
    """Return the most parameters of a model in a folder, by the size of its files; 0 for one of the hub."""
    return sum(path.stat().st_size for path in Path(spec).glob("model*.safetensors")) // (4 if is_own(spec) else 2)


def _own(folder: Path, place: torch.device, dtype: str) -> Pretrained:
    model = checkpoint.load_model(folder, place).eval()
    tokenizer = checkpoint.training_tokenizer(folder)
    return _decoder(model, name(str(folder)), checkpoint.training_length(folder), place, dtype, tokenizer)


def _decoder(
    model: Decoder, name: str, train_len: int | None, place: torch.device, dtype: str, tokenizer: str | None = None
) -> Pretrained:
    own.check(model.config, place, dtype)
    method, options = method_of(model.config.attention)
    return Pretrained(
        model=model,
        name=name,
        attention=method,
        options=options,
        params=model.n_parameters(),
        vocab_size=model.config.vocab_size,
        train_len=train_len,
        backend=registry.method(method).backend_name(place.type),
        positions=model.config.positions or None,
        tokenizer=tokenizer,
    )


def located(spec: str) -> str:
    """Return a folder's path with its name: `.` is another model elsewhere. InputError for a file, and for a folder
    that holds no model."""
    if os.path.isfile(spec):
        raise InputError(f"{spec} is a file: give the folder of a checkpoint or of an exported model")
    if os.path.isdir(spec) and checkpoint.find(Path(spec)) is None:
        raise InputError(f"{spec} holds no model: it has no config.json; give a checkpoint folder or an exported model")
    return os.path.abspath(spec) if os.path.isdir(spec) and Path(spec).name in ("", "..") else spec


def name(spec: str) -> str:
    """Return the model's name in tables: the name of its folder, or its name on the hub."""
    # os.path returns False for an invalid path, where Path raises
    return Path(spec).resolve().name if os.path.isdir(spec) else spec


def _released(spec: str) -> Path | None:
    """Return the folder of a released stick-breaking model, downloaded if on the hub; None for another model."""
    if os.path.isdir(folder := Path(spec)):
        try:
            config = json.loads((folder / "config.json").read_text())
        # transformers, tried next, reports the error
        except (OSError, ValueError, RecursionError):
            return None
        return folder if released.is_released(config) else None
    try:
        config = json.loads(Path(_hub().hf_hub_download(spec, "config.json")).read_text())
        if not released.is_released(config):
            return None
        return Path(_hub().snapshot_download(spec, allow_patterns=list(released.FILES)))
    except ImportError:
        return None
    # raised for an unknown name, and without network
    except (OSError, ValueError) as error:
        raise InputError(f"no causal language model {spec!r}: {first_line(error)}") from None


def _hub() -> Any:
    return importlib.import_module("huggingface_hub")


def _read(spec: str, folder: Path, place: torch.device, dtype: str) -> Pretrained:
    model, train_len = released.load(folder, device.DTYPES[dtype])
    return _decoder(_unmapped(model.to(place)).eval(), name(spec), train_len, place, dtype)


def _from_hub(spec: str, place: torch.device, dtype: str, trust_remote_code: bool) -> Pretrained:
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        raise InputError(f"model {spec!r} needs transformers: pip install 'sbeval[hf]'") from None
    # registers our models, as `sbeval export` writes them
    from sbeval import hf

    try:
        # what a file lacks or has in another shape is reported below, by its name
        with quiet(transformers):
            model, found = transformers.AutoModelForCausalLM.from_pretrained(
                spec,
                dtype=device.DTYPES[dtype],
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    # raised for an unknown name, without network, for files that it cannot read, and for custom code
    except foreign.broken() as error:
        if "custom code" in str(error):
            raise InputError(
                f"model {spec!r} comes with code of its own, which is not run; --trust-remote-code runs it"
            ) from None
        if is_of_the_disk(error):
            raise InputError(f"cannot write the caches of transformers for model {spec!r}: {reason(error)}") from None
        raise InputError(f"no causal language model {spec!r}: {foreign.explained(spec, error)}") from None
    checks.complete(model, found, spec)
    checks.dtypes(_downloaded(spec), spec)
    model = _unmapped(model.to(place)).eval()
    if isinstance(model, hf.SbevalForCausalLM):
        return _decoder(model.decoder, name(spec), model.config.train_len, place, dtype)
    text, positions = model.config.get_text_config(), positions_of(model)
    split = HubModel(model)
    checks.causal(split, text.vocab_size, place, device.DTYPES[dtype], spec, longest=positions)
    return Pretrained(
        model=split,
        name=name(spec),
        attention="hf",
        options=str(text.model_type),
        params=sum(x.numel() for x in model.parameters()),
        vocab_size=text.vocab_size,
        train_len=getattr(text, "max_position_embeddings", positions),
        backend=str(text._attn_implementation),
        positions=positions,
    )


def _unmapped(model: Module) -> Module:
    """Copy weights that are mapped files into memory: a file that is cut then would end the process with SIGBUS."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_cpu:
            tensor.data = tensor.data.clone()
    return model


def _downloaded(spec: str) -> Path:
    """Return the folder of a model whose config has been read."""
    return Path(spec) if os.path.isdir(spec) else Path(_hub().hf_hub_download(spec, "config.json")).parent


def _check_adapter(spec: str) -> None:
    """Raise InputError where an adapter lies beside the weights: without `peft` it would be ignored."""
    found = (Path(spec) / ADAPTER).exists()
    if not os.path.isdir(spec):
        try:
            found = bool(_hub().hf_hub_download(spec, ADAPTER))
        # it has none, or is out of reach, which who loads it reports
        except (ImportError, OSError, ValueError):
            pass
    if found:
        raise InputError(
            f"model {spec!r} has an adapter ({ADAPTER}), which is not applied: merge it into the weights "
            "(peft's merge_and_unload) and save that, or remove it to evaluate the base model"
        )
