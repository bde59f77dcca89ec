"""Benchmarks of lm-eval from JSONL files, where there is no network: its own definitions over items from a folder.

lm-eval's definition of a task (prompt, choices, metrics, version) is used unchanged; only its `download` reads the
folder instead of the hub. So the same items give the same prompts as from the hub. A file is either

    <dataset>[_<config>]_<split>.jsonl    the hub's own fields, for any dataset: sciq_test.jsonl, race_high_test.jsonl

or one of the shorter forms in `SHORT`, whose items are converted to the hub's fields here. Those are the forms of
llm-foundry's copies of these sets (https://github.com/mosaicml/llm-foundry, scripts/eval/local_data), some of which
differ from the published items: ARC's questions have four options each, BoolQ's passages lack their title, and files
made from HellaSwag's prompts lack some white space and brackets.

Examples for a prompt come from the split that lm-eval draws them from, where there is a file for it; else the first
HELD_OUT items of the scored file are set aside for that and not scored.
"""

import codecs
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import jinja2
import pyarrow as pa  # type: ignore[import-untyped]  # it ships no types
from lm_eval.api.task import ConfigurableTask

from sbeval.errors import InputError, reading

# items to draw examples from, where they are taken from the scored ones
HELD_OUT = 32
# what templates and tables raise for items that lack a field or hold another kind of value
NOT_ITEMS = (LookupError, TypeError, AttributeError, pa.ArrowException, jinja2.TemplateError)

Item = dict[str, Any]


def _letters(count: int) -> list[str]:
    return [chr(ord("A") + index) for index in range(count)]


def _options(item: Item) -> Item:
    labels = _letters(len(item["choices"]))
    return {"choices": {"text": item["choices"], "label": labels}, "answerKey": labels[item["gold"]]}


def _arc(item: Item) -> Item:
    return {"question": item["question"], **_options(item)}


def _openbookqa(item: Item) -> Item:
    return {"question_stem": item["question"], **_options(item)}


def _hellaswag(item: Item) -> Item:
    # lm-eval joins the parts again; its cleaning changes nothing here
    activity, _, context = item["query"].partition(": ")
    return {
        "activity_label": activity,
        "ctx_a": context,
        "ctx_b": "",
        "endings": item["choices"],
        "label": str(item["gold"]),
    }


def _piqa(item: Item) -> Item:
    return {"goal": item["goal"], "sol1": item["choices"][0], "sol2": item["choices"][1], "label": item["gold"]}


def _shared(contexts: list[str]) -> str:
    """Return the common beginning of both contexts, up to the end of a word."""
    prefix = os.path.commonprefix(contexts)
    return prefix[: prefix.rfind(" ") + 1]


def _winogrande(item: Item) -> Item:
    before = _shared(item["contexts"])
    first, second = (context[len(before) :] for context in item["contexts"])
    return {
        "sentence": f"{before}_ {item['continuation']}",
        "option1": first,
        "option2": second,
        "answer": str(item["gold"] + 1),
    }


def _wsc273(item: Item) -> Item:
    before = _shared(item["contexts"])
    # the item lacks the pronoun; the substitute has its position, all that lm-eval uses
    return {
        "text": f"{before}it {item['continuation']}",
        "pronoun": "it",
        "pronoun_loc": len(before),
        "options": [context[len(before) :] for context in item["contexts"]],
        "label": item["gold"],
    }


def _boolq(item: Item) -> Item:
    return {"passage": item["passage"], "question": item["question"].rstrip("?"), "label": int(item["gold"])}


def _copa(item: Item) -> Item:
    premise, _, word = item["context"].rpartition(" ")
    kind = {"because": "cause", "therefore": "effect"}[word]
    first, second = (choice.strip() for choice in item["choices"])
    return {"premise": f"{premise}.", "question": kind, "choice1": first, "choice2": second, "label": item["gold"]}


def _lambada(item: Item) -> Item:
    return {"text": f"{item['context']} {item['target']}"}


def _gsm8k(item: Item) -> Item:
    return {"question": item["context"], "answer": f"{item['chain_of_thought']}\n#### {item['answer']}"}


def _mmlu(item: Item) -> Item:
    return {"question": item["question"], "choices": item["choices"], "answer": item["gold"]}


def _blimp(item: Item) -> Item:
    return {"sentence_good": item["good"], "sentence_bad": item["bad"]}


def _wikitext(item: Item) -> Item:
    return {"page": item["text"]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Short:
    """A dataset's shorter form. files: stem of the file of each split. config: the field of an item that names its
    config of the dataset."""

    files: Mapping[str, str]
    convert: Callable[[Item], Item]
    config: str | None = None


# by the dataset's name on the hub and, where configs have files of their own, config
SHORT = {
    "allenai/ai2_arc:ARC-Easy": Short(files={"test": "arc_easy_test"}, convert=_arc),
    "allenai/ai2_arc:ARC-Challenge": Short(files={"test": "arc_challenge_test"}, convert=_arc),
    "allenai/openbookqa:main": Short(files={"test": "openbookqa_test"}, convert=_openbookqa),
    "Rowan/hellaswag": Short(files={"validation": "hellaswag_val"}, convert=_hellaswag),
    "baber/piqa": Short(files={"validation": "piqa_val"}, convert=_piqa),
    "allenai/winogrande:winogrande_xl": Short(files={"validation": "winogrande_xl_val"}, convert=_winogrande),
    "lighteval/winograd_wsc:wsc273": Short(files={"test": "wsc273"}, convert=_wsc273),
    "aps/super_glue:boolq": Short(files={"validation": "boolq_val"}, convert=_boolq),
    "aps/super_glue:copa": Short(files={"validation": "copa_val"}, convert=_copa),
    "EleutherAI/lambada_openai:default": Short(files={"test": "lambada_openai_test"}, convert=_lambada),
    "openai/gsm8k:main": Short(files={"test": "gsm8k_test"}, convert=_gsm8k),
    "EleutherAI/wikitext_document_level:wikitext-2-raw-v1": Short(
        files={"test": "wikitext2_test_docs"}, convert=_wikitext
    ),
    "cais/mmlu": Short(
        files={"test": "mmlu_test", "dev": "mmlu_dev", "validation": "mmlu_val"}, convert=_mmlu, config="subject"
    ),
    "nyu-mll/blimp": Short(files={"train": "blimp"}, convert=_blimp, config="uid"),
}


def local_task(folder: Path, shots: int | None) -> type[Any]:
    """Return a class of lm-eval tasks whose items are read from `folder`.

    shots: examples in a prompt, None for the definition's.
    """

    class LocalTask(ConfigurableTask):  # type: ignore[misc]  # lm-eval has no types
        def __init__(self, config: dict[str, Any]) -> None:
            options = {name: value for name, value in config.items() if name != "class"}
            # a definition with 0 examples is always zero-shot
            if shots is not None and options.get("num_fewshot") != 0:
                options["num_fewshot"] = shots
            super().__init__(config=options)

        def download(self, dataset_kwargs: dict[str, Any] | None = None, **_: Any) -> None:
            self.dataset = splits(folder, self.config, self.DATASET_PATH, self.DATASET_NAME)

    return LocalTask


def splits(folder: Path, config: Any, dataset: str, name: str | None) -> dict[str, datasets.Dataset]:
    """Return the splits that a task reads: the scored one, and the one that examples come from.

    Raise InputError that names a missing file.
    """
    scored = config.test_split or config.validation_split
    pool = config.fewshot_split or config.training_split or config.validation_split or scored
    items = _split(folder, dataset, name, scored)
    if items is None:
        stems = _stems(dataset, name, scored)
        names = " or ".join(f"{stem}.jsonl" for stem in stems)
        short = _short(dataset, name)
        lacks = "has no such file"
        if short and short.config and (folder / f"{stems[-1]}.jsonl").is_file():
            lacks = f"has none with items whose {short.config!r} is {name!r}"
        raise InputError(f"task {config.task!r} reads {names}, and {folder} {lacks}")
    written = config.fewshot_config is not None and config.fewshot_config.samples is not None
    needed = 0 if written else config.num_fewshot or 0
    if not needed:
        return {pool: _dataset(items, config), scored: _dataset(items, config)}
    examples = _split(folder, dataset, name, pool)
    if pool == scored:
        raise InputError(f"task {config.task!r} has only one split: no examples to draw; give --task {config.task}:0")
    aside = ""
    if examples is None:
        aside = f"; without {_stems(dataset, name, pool)[0]}.jsonl the first {HELD_OUT} items are for examples"
        examples, items = items[:HELD_OUT], items[HELD_OUT:]
    if needed > len(examples) or not items:
        given = f"{folder} has {len(examples)} to draw from and {len(items)} other items to score{aside}"
        raise InputError(f"task {config.task!r} needs {needed} examples, and {given}")
    return {pool: _dataset(examples, config), scored: _dataset(items, config)}


def check(task: Any, folder: Path) -> None:
    """Raise InputError that names the first item of a task that lacks what its definition asks for."""
    for number, item in enumerate(task.eval_docs, 1):
        with reading(f"item {number} of task {task.config.task!r} in {folder}", *NOT_ITEMS):
            prompt = task.doc_to_text(item)
            task.doc_to_target(item)
            # a field that is absent or null is no text: templates write it as the word None
            present = {name: value for name, value in item.items() if value is not None}
            if len(present) < len(item) and task.doc_to_text(present) != prompt:
                raise ValueError(f"it has no {' or '.join(sorted(item.keys() - present.keys()))}")


def _dataset(items: list[Item], config: Any) -> datasets.Dataset:
    # fields of several kinds, and integers of more than 64 bits, are none of a table
    with reading(f"the items of task {config.task!r}", *NOT_ITEMS):
        return datasets.Dataset.from_list(items)


def _stems(dataset: str, name: str | None, split: str) -> list[str]:
    own = "_".join([dataset.rpartition("/")[2], *([name] if name else []), split])
    short = _short(dataset, name)
    return [own, *([short.files[split]] if short and split in short.files else [])]


def _short(dataset: str, name: str | None) -> Short | None:
    return SHORT.get(f"{dataset}:{name}") or SHORT.get(dataset)


def _split(folder: Path, dataset: str, name: str | None, split: str) -> list[Item] | None:
    """Return the items in the hub's fields; None where the split has no file."""
    own, *others = _stems(dataset, name, split)
    if (path := folder / f"{own}.jsonl").is_file():
        return read(path, None)[None]
    short = _short(dataset, name)
    if short is None or not others or not (path := folder / f"{others[0]}.jsonl").is_file():
        return None
    items = read(path, short.config).get(name if short.config else None)
    try:
        for number, item in enumerate(items or [], 1):
            choices = item.get("choices") or item.get("contexts")
            # Python would take -1 for the last one
            if choices and item.get("gold") not in range(len(choices)):
                given = f"gold is {item.get('gold')!r}, of {len(choices)} choices"
                raise InputError(f"item {number} of {path} has no answer: {given}")
        return items and [short.convert(item) for item in items]
    except InputError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is not in a form that sbeval.evaluation.lm_eval_local reads ({type(error).__name__}: {error})"
        ) from None


def read(path: Path, group: str | None) -> dict[str | None, list[Item]]:
    """Return the items of a JSONL file by the value of their field `group`; all under None where `group` is None.

    Raise InputError for a line that is not a JSON object in UTF-8. A byte order mark and blank lines are no items.
    """
    return _read(path, group, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _read(path: Path, group: str | None, _: int) -> dict[str | None, list[Item]]:
    items: dict[str | None, list[Item]] = {}
    with reading(path):
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line.decode())
            if not isinstance(item, dict):
                raise TypeError
            items.setdefault(item[group] if group else None, []).append(item)
        except (ValueError, KeyError, TypeError, RecursionError):
            wanted = f"a JSON object in UTF-8{f' with {group!r}' if group else ''}"
            raise InputError(f"{path}:{number}: not {wanted}") from None
    if not items:
        raise InputError(f"{path} is empty")
    return items


def digest(tasks: Mapping[str, Any]) -> str:
    """Return sixteen hexadecimal digits of the tasks' versions, their items and their pools of examples."""
    sha = hashlib.sha256()
    for name, task in tasks.items():
        sha.update(f"{name} {task.VERSION}\n".encode())
        examples = task.fewshot_docs() if task.config.num_fewshot else ()
        for item in (*task.eval_docs, *examples):
            sha.update(json.dumps(item, sort_keys=True, default=str).encode())
    return sha.hexdigest()[:16]
