"""Study files: options of the families' configs in YAML, checked against the annotations of the config classes.

    models: {preset: quick, attention: [stick_breaking, rope]}     training options, for all families of text models
    length_gen: {eval_len: 4096}                                   a family, with options over its preset
    needle: {preset: quick, tasks: [niah_single_1], samples: 20}
    mqrar:                                                         the preset as it is
    flip_flop: [{seeds: [0]}, {seeds: [1], lrs: [1e-3]}]           several sweeps, in this order

`models`, with the training options of its preset, sets defaults for the families of text models, which their own
sections override. A section without a preset uses that of `models`, by default `quick`. Options imply others as
those of the family's command do (`Family.completed`).
"""

import dataclasses
import math
import re
import reprlib
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from sbeval import registry
from sbeval.errors import InputError, choose, reason, shown
from sbeval.training.text_model import TRAINING, TextModel, uncut

STUDIES = resources.files("sbeval") / "studies"
NOTHING = ("", "~", "null")
# the family whose presets say how models are trained
MODELS = "length_gen"
# of a study file: a list of thousands of seeds is an error, and takes seconds to read
MAX_CHARACTERS = 1 << 18
KINDS = {int: "an integer", float: "a number", str: "text", bool: "true or false"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A family and the config to run, of the family's config class; `others` are of further sweeps, which follow it."""

    family: str
    preset: str
    config: Any
    others: tuple[Any, ...] = ()

    @property
    def configs(self) -> tuple[Any, ...]:
        return (self.config, *self.others)


def names() -> list[str]:
    """Return the names of the studies in the package."""
    return sorted(file.name.removesuffix(".yaml") for file in STUDIES.iterdir() if file.name.endswith(".yaml"))


def summaries() -> dict[str, str]:
    """Return the first line of each study in the package, which says what it is, by name."""
    return {name: text(name).partition("\n")[0].removeprefix("# ") for name in names()}


def text(study: str) -> str:
    """Return the text of a study file, given a name or a path."""
    if study in names():
        return (STUDIES / f"{study}.yaml").read_text(encoding="utf-8")
    try:
        # not Path(study).open: an empty name would be the current folder
        with open(study, encoding="utf-8") as file:
            content = file.read(MAX_CHARACTERS + 1)
    except FileNotFoundError:
        if Path(study).suffix or len(Path(study).parts) > 1:
            raise InputError(f"there is no study file {study}; studies of the package: {', '.join(names())}") from None
        try:
            return choose("study", study, names())
        except InputError as error:
            raise InputError(f"{error}, or the path of a study file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {study}: {getattr(error, 'strerror', None) or error}") from None
    if len(content) > MAX_CHARACTERS:
        raise InputError(f"{study} has more than {MAX_CHARACTERS:,} characters: it is no study")
    return content


def read(study: str, changes: Iterable[str] = ()) -> dict[str, Any]:
    """Return the document of a study, given a name or a path.

    changes: `section.option=value`, which override the document. Raise InputError if it is not a study.
    """
    document = _mapping(study, _parsed(study, text(study)))
    changed: dict[str, str] = {}
    for change in changes:
        match = re.fullmatch(r"(\w+)\.(\w+)=(.*)", change, re.DOTALL)
        if match is None:
            raise InputError(f"--set takes SECTION.OPTION=VALUE, such as needle.samples=20; got {change!r}")
        section, option, value = match.groups()
        given = {option: _parsed(f"--set {change}", value)}
        sweeps = [sweep | given for sweep in _sweeps(section, document.get(section))]
        document[section] = sweeps if len(sweeps) > 1 else sweeps[0]
        if section == "models":
            changed[option] = change
    for option, change in changed.items():
        _check_used(option, change, document)
    return document


def _check_used(option: str, change: str, document: Mapping[str, Any]) -> None:
    """Raise InputError for a change to `models` that no section uses: all have the option themselves, or are of
    generated examples."""
    families = [name for name in document if name in registry.TASKS]
    users = [name for name in families if option == "preset" or issubclass(registry.task(name).config, TextModel)]
    if families and not users:
        why = f"models is for text models, and this study has {', '.join(families)}: give the option to a section"
    elif families and all(option in sweep for name in users for sweep in _sweeps(name, document[name])):
        own = "has its own" if len(users) == 1 else "have their own"
        why = f"{', '.join(users)} {own} {option}: give --set {users[0]}.{option}=VALUE"
    else:
        return
    raise InputError(f"--set {shown(change)} changes nothing: {why}")


def given(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the document of a study that is given as its content: sections of options, in Python's types."""
    try:
        text = yaml.safe_dump(dict(content), sort_keys=False)
    except yaml.YAMLError as error:
        # ends with the value
        given = shown(repr(error.args[-1]))
        raise InputError(f"a study has options of numbers, text and lists; got {given}") from None
    return _mapping("the study", _parsed("the study", text))


def parts(document: Mapping[str, object], dtype: Callable[[str | None], str]) -> list[Part]:
    """Return the parts of a document, in its order.

    dtype: maps the dtype that the document names, or None, to that of matrix products. InputError names unknown
    options, with the nearest known one, and values of the wrong type.
    """
    for name in document:
        choose("section", name, ("models", *registry.TASKS))
    shared = _mapping("models", document.get("models"))
    presets = registry.task(MODELS).presets
    preset = choose("preset of models", _value("models.preset", shared.pop("preset", "quick"), str), presets)
    trained = presets[preset]
    models = {name: getattr(trained, name) for name in TRAINING if name != "dtype"}
    models |= uncut(_options("models", shared, TextModel, TRAINING))
    families = [name for name in document if name != "models"]
    if not families:
        raise InputError(f"nothing to run: a study has a section for each of its families: {', '.join(registry.TASKS)}")
    return [_part(name, _sweeps(name, document[name]), preset, models, dtype) for name in families]


def _sweeps(family: str, given: object) -> list[dict[str, Any]]:
    """Return the sweeps of a section, which holds the options of one or a list of several."""
    if not isinstance(given, list):
        return [_mapping(family, given)]
    if not given:
        raise InputError(f"{family} is an empty list: give a sweep, or leave the section out")
    return [_mapping(f"{family}[{index}]", sweep) for index, sweep in enumerate(given)]


def _part(
    family: str,
    sweeps: Sequence[dict[str, Any]],
    preset: str,
    models: dict[str, Any],
    dtype: Callable[[str | None], str],
) -> Part:
    presets, configs = zip(*(_config(family, sweep, preset, models, dtype) for sweep in sweeps), strict=True)
    if len(set(presets)) > 1:
        raise InputError(f"the sweeps of {family} start from different presets ({', '.join(presets)}): give one")
    return Part(family=family, preset=presets[0], config=configs[0], others=configs[1:])


def _config(
    family: str, section: dict[str, Any], preset: str, models: dict[str, Any], dtype: Callable[[str | None], str]
) -> tuple[str, Any]:
    """Return the preset and the config of one sweep."""
    of = registry.task(family)
    own = "preset" in section
    preset = _value(f"{family}.preset", section.pop("preset", preset), str)
    kind = f"preset of {family}" if own else f"preset of {family}, which takes that of models where it has none"
    base = of.presets[choose(kind, preset, of.presets)]
    # other fields are part of ids alone
    known = [field.name for field in dataclasses.fields(base) if "help" in field.metadata or field.name == "dtype"]
    given = _options(family, section, type(base), known)
    try:
        options = of.completed(given)
        if isinstance(base, TextModel):
            changed = {name: value for name, value in models.items() if value != getattr(base, name)}
            options = of.completed(changed) | models | options
        options["dtype"] = dtype(options.get("dtype"))
        return preset, dataclasses.replace(base, **options)
    except InputError as error:
        raise InputError(f"{family}: {error}") from None
    # of an own task
    except ValueError as error:
        raise InputError(f"{family}: {reason(error)}") from None


def _parsed(where: str, text: str) -> Any:
    """Parse YAML into strings, lists and mappings. Annotations give strings their type: YAML would take 3e-4 for text
    and `no` for false."""
    try:
        root = yaml.compose(text, Loader=yaml.BaseLoader)
        for node in _mappings(root):
            _check_duplicates(where, node)
        # from the nodes: parsing takes longest
        return None if root is None else yaml.BaseLoader("").construct_document(root)
    except yaml.YAMLError as error:
        raise InputError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise InputError(f"{where} is not a study: it is nested too deep") from None


def _mappings(node: Any) -> Iterator[Any]:
    """Yield a node and those inside it."""
    yield node
    if isinstance(node, yaml.MappingNode):
        for _, value in node.value:
            yield from _mappings(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _mappings(value)


def _check_duplicates(where: str, node: Any) -> None:
    """Raise InputError if a mapping has duplicate keys, of which YAML keeps the last."""
    keys = Counter(str(key.value) for key, _ in node.value) if isinstance(node, yaml.MappingNode) else Counter()
    if twice := [key for key, count in keys.items() if count > 1]:
        raise InputError(f"{where}: duplicate key {shown(twice[0])!r}")


def _mapping(path: str, given: object) -> dict[str, Any]:
    """Return a copy of a section, which may be empty."""
    if given is None or given in NOTHING:
        return {}
    if not isinstance(given, dict):
        raise InputError(f"{path} must hold names with values, such as {{samples: 20}}; got {reprlib.repr(given)}")
    return dict(given)


def _options(section: str, given: Mapping[str, object], kind: type[Any], known: Sequence[str]) -> dict[str, Any]:
    hints = get_type_hints(kind)
    values = {}
    for name, value in given.items():
        choose(f"option of {section}", name, (*known, "preset"))
        values[name] = _value(f"{section}.{name}", value, hints[name])
    return values


def _value(path: str, given: object, hint: Any) -> Any:
    """Convert a value to the type of a config field's annotation."""
    if isinstance(hint, types.UnionType):
        if given is None or given in NOTHING:
            return None
        (hint,) = (option for option in get_args(hint) if option is not types.NoneType)
    if hint in KINDS:
        if isinstance(given, str) and (value := _scalar(given, hint)) is not None:
            return value
        raise InputError(f"{path} must be {KINDS[hint]}; got {reprlib.repr(given)}")
    item = get_args(hint)[0]
    if isinstance(given, str):
        # one value is a list of one, and numbers may be separated by commas: --set mqrar.kv_pairs=8,16
        given = [given] if item is str else given.split(",")
    if not isinstance(given, list):
        raise InputError(f"{path} must be a list, each {KINDS[item]}; got {reprlib.repr(given)}")
    return tuple(_value(f"{path}[{index}]", one, item) for index, one in enumerate(given))


def _scalar(text: str, kind: type) -> Any:
    """Convert text to an int, a finite float, a bool or a str; None if it is not one."""
    if kind is str:
        return text
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower())
    try:
        number = kind(text)
    except ValueError:
        return None
    return number if kind is int or math.isfinite(number) else None
