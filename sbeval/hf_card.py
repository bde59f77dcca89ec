"""What an exported folder has beside the model: a model card, and on request the code that other tools load it by."""

import json
import shutil
from pathlib import Path

from sbeval import registry
from sbeval.errors import InputError, first_line
from sbeval.models.config import ModelConfig
from sbeval.models.decoder import n_parameters
from sbeval.tables.rows import method_of

MODULE = "modeling_sbeval"
# the module that is copied, which imports nothing of sbeval
PORTABLE = Path(__file__).with_name("hf_portable.py")
METHODS = ("stick_breaking", "alibi", "fire", "forgetting", "nope", "rope", "sliding_window")


def check_portable(attention: str) -> None:
    """Raise InputError for an attention spec that the copied module does not compute."""
    name, options = method_of(attention)
    if name not in METHODS or "scaling=" in options:
        raise InputError(
            f"--code has no {attention!r}, only {', '.join(METHODS)} as they are trained: leave --code out, and import "
            "sbeval.hf where the folder is loaded"
        )


def write_code(folder: Path) -> None:
    """Add the module that `trust_remote_code=True` imports, and its names in config.json."""
    shutil.copyfile(PORTABLE, folder / f"{MODULE}.py")
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    names = {"AutoConfig": "SbevalConfig", "AutoModelForCausalLM": "SbevalForCausalLM"}
    config["auto_map"] = {auto: f"{MODULE}.{name}" for auto, name in names.items()}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_card(folder: Path, shape: ModelConfig, *, train_len: int | None, tokenizer: str | None, code: bool) -> None:
    """Write README.md, the model card: what the model is, and how it is loaded and evaluated."""
    name, options = method_of(shape.attention)
    facts = {
        "attention": f"`{shape.attention}`",
        "parameters": f"{n_parameters(shape):,}",
        "layers x width": f"{shape.layers} x {shape.width}, {shape.heads} heads of {shape.d_head}",
        "vocabulary": f"{shape.vocab_size:,}",
        "training length": f"{train_len} tokens" if train_len else "unknown",
        "tokenizer": f"`{tokenizer}`" if tokenizer else "none: it was not trained on text",
    }
    trust = ", trust_remote_code=True" if code else ""
    tokens = (
        f'tokenizer = AutoTokenizer.from_pretrained("FOLDER"{trust})' if tokenizer else "# input_ids are the task's"
    )
    first = "" if code else "import sbeval.hf  # registers the architecture\n"
    package = "" if name in METHODS else f", and the package of the method, `{registry.ATTENTION.get(name, name)}`"
    evaluate = (
        "    lm_eval --model hf --model_args pretrained=FOLDER,trust_remote_code=True --tasks lambada_openai\n"
        if code and tokenizer
        else ""
    )
    text = f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [sbeval, {name}]
---

# A decoder with {name.replace("_", " ")} attention

Trained with sbeval, which evaluates stick-breaking attention
([arXiv 2410.17980](https://arxiv.org/abs/2410.17980)) and its baselines. It is meant for research on attention: small
models of this kind are not fit for use as assistants.

| | |
| --- | --- |
{chr(10).join(f"| {key} | {value} |" for key, value in facts.items())}

With `pip install {"transformers" if code else "'sbeval[hf]'"}`{", in plain PyTorch" if code else package}:

```python
{first}from transformers import AutoModelForCausalLM{", AutoTokenizer" if tokenizer else ""}

model = AutoModelForCausalLM.from_pretrained("FOLDER"{trust})
{tokens}
```

{evaluate}    pip install 'sbeval[hf]'
    sbeval length-gen --checkpoint FOLDER --corpus TEXTS
"""
    (folder / "README.md").write_text(text, encoding="utf-8")


def push(folder: Path, repository: str) -> str:
    """Upload a folder to a repository of the hub, which is made if it does not exist (private), and return its address.

    Raise InputError when the hub refuses; the folder stays.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi()
    try:
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Export of a checkpoint of sbeval")
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise InputError(f"cannot push {folder} to {repository}: {first_line(error)}") from None
    return str(address)
