"""Test what a study file may hold, and that every mistake gives one line with its location and a fix."""

import dataclasses
import os
import random
import re
import time
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbeval import registry
from sbeval.errors import InputError
from sbeval.sweep import study, study_file
from sbeval.tables.published import RULER_TASKS
from sbeval.tasks import attention_map, few_shot, length_gen, mqrar, needle
from sbeval.training.text_model import TRAINING

# 10,000 documents and more
FULL = os.environ.get("SBEVAL_TESTS") == "full"


def parts(text: str, *changes: str, tmp_path: Path) -> dict[str, study_file.Part]:
    path = tmp_path / "study.yaml"
    path.write_text(text)
    return {
        part.family: part
        for part in study_file.parts(study_file.read(str(path), changes), lambda said: said or "float32")
    }


@pytest.mark.parametrize("name", study_file.names())
def test_studies_of_the_package_have_cells(name: str) -> None:
    found = study_file.parts(study_file.read(name), lambda said: said or "float32")
    assert all(registry.task(part.family).cells(part.config) for part in found)


def test_a_study_says_in_its_first_line_what_it_is() -> None:
    found = study_file.summaries()
    said = "what models that train for minutes can show, in a quarter of an hour on two CPU cores"
    assert list(found) == study_file.names() and found["quick"] == said
    for name in found:
        first, second, *_ = study_file.text(name).splitlines()
        # a sentence that goes on would be cut
        assert first.startswith("# ") and second in ("#", ""), name


@pytest.mark.parametrize("name", ["quick", "h200", "paper"])
def test_studies_named_as_presets_have_every_family(name: str) -> None:
    found = study_file.parts(study_file.read(name), lambda said: said or "float32")
    # models of minutes find no needle, and flip-flop is not learned so soon
    missing = {"diagnostics", "few_shot", *(["flip_flop", "needle"] if name == "quick" else [])}
    assert {part.family for part in found} >= set(registry.TASKS) - missing


def test_a_model_of_the_quick_study_serves_both_tasks_of_recall() -> None:
    found = {part.family: part for part in study_file.parts(study_file.read("quick"), lambda said: said or "float32")}
    maps = attention_map.cells(found["attention_map"].config)
    trained = mqrar.cells(found["mqrar"].config)
    assert {need for cell in maps for need in cell.needs} == set(trained) and len(trained) == 6


def test_a_study_of_methods_has_whole_comparisons_whenever_it_is_stopped() -> None:
    (part,) = study_file.parts(study_file.read("which-stick-breaking"), lambda said: said or "float32")
    cells = length_gen.cells(part.config)
    # every method with one seed comes before any with the next
    assert [cell.config.seeds for cell in cells] == [(seed,) for seed in (0, 1, 2) for _ in range(11)]
    assert len({cell.config.attention for cell in cells}) == 11
    training = cells[0].training()
    assert (part.config.size, training.tokens, part.config.max_epochs) == ("25m", 800 * 131072, 4)


def test_the_study_of_retrieval_has_whole_comparisons_whenever_it_is_stopped() -> None:
    def cells_of(*changes: str) -> list[needle.Cell]:
        (part,) = study_file.parts(study_file.read("retrieval", changes), lambda said: said or "float32")
        assert max(part.config.lengths) == 32 * 2048
        first = needle.cells(part.config)
        assert {cell.seed for cell in first} == {0}
        return [*first, *needle.more(part.config, None)]

    cells = cells_of("needle.squad=dev.json")
    # all tasks of every method with one seed come before any with the next
    assert [cell.seed for cell in cells] == [seed for seed in (0, 1, 2) for _ in range(8 * 12)]
    # YaRN is of RoPE's models, each fine-tuned at three rates
    assert len({step for cell in cells for step in cell.tunings}) == 7 * 3 * 3
    assert all(len(cell.config.finetune_tasks) == 11 for cell in cells)
    # qa_2, which does not fit the training length, is of the same models
    last = cells_of("needle.hotpot=dev.json", "needle.tasks=qa_2", "needle.lengths=[4096, 65536]")
    assert {cell.task for cell in (*cells, *last)} == set(RULER_TASKS)
    assert [cell.tunings[0].schedule() for cell in last] == [cell.tunings[0].schedule() for cell in cells[::12]]


def test_the_study_of_the_readme_can_be_read(tmp_path: Path) -> None:
    readme = (Path(__file__).parents[3] / "README.md").read_text()
    found = parts(readme.split("```yaml\n")[1].split("```")[0], tmp_path=tmp_path)
    assert set(found) == {"length_gen", "needle", "mqrar"}
    assert all(registry.task(name).cells(part.config) for name, part in found.items())


def test_a_section_without_options_is_the_preset(tmp_path: Path) -> None:
    found = parts("mqrar:\nflip_flop: {preset: small}\nattention_map: {}\n", tmp_path=tmp_path)
    assert list(found) == ["mqrar", "flip_flop", "attention_map"]
    assert found["mqrar"].config == mqrar.PRESETS["quick"] and found["flip_flop"].preset == "small"


def test_a_section_may_hold_several_sweeps(tmp_path: Path) -> None:
    text = """
        models: {preset: h200, attention: [alibi, rope], train_len: 1024}
        length_gen: [{eval_len: 8192, lr: 1e-3}, {lr: 2e-3, optimizer: muon}, {eval_len: 8192, lr: 1e-3}]
    """
    part = parts(text, tmp_path=tmp_path)["length_gen"]
    assert [(config.lr, config.optimizer, config.eval_len) for config in part.configs] == [
        (1e-3, "adamw", 8192),
        (2e-3, "muon", 16384),
        (1e-3, "adamw", 8192),
    ]
    # in this order, and a sweep that is there twice has its cells once
    assert [(cell.config.lr, cell.attention) for cell in study.cells(part)] == [  # type: ignore[attr-defined]
        (1e-3, "alibi"),
        (1e-3, "rope"),
        (2e-3, "alibi"),
        (2e-3, "rope"),
    ]
    # a change is of every sweep
    part = parts(text, "length_gen.eval_len=4096", "models.train_len=2048", tmp_path=tmp_path)["length_gen"]
    assert {(config.eval_len, config.train_len) for config in part.configs} == {(4096, 2048)}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("length_gen: []", "length_gen is an empty list: give a sweep, or leave the section out"),
        ("length_gen: [3]", "length_gen.0. must hold names with values"),
        ("length_gen: [{lr: 1e-3, lr: 2e-3}]", "duplicate key 'lr'"),
        ("length_gen: [{}, {larning_rate: 3}]", "unknown option 'larning_rate' of length_gen"),
        ("length_gen: [{preset: quick}, {preset: h200}]", "start from different presets .quick, h200.: give one"),
    ],
)
def test_sweeps_that_cannot_be(section: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        parts(section, tmp_path=tmp_path)


def test_further_seeds_of_each_sweep_follow_its_own_results() -> None:
    quick = mqrar.PRESETS["quick"]
    sweep = dataclasses.replace(quick, lrs=(1e-3, 2e-3), seeds=(0, 1), attention=("rope",))
    part = study_file.Part(
        family="mqrar", preset="quick", config=sweep, others=(dataclasses.replace(sweep, kv_pairs=(4,)), sweep)
    )
    assert len(study.cells(part)) == 4
    # at every rate, since none has solved the task
    assert [cell.config.kv_pairs for cell in study.further(part, None)] == [(8,), (8,), (4,), (4,)]  # type: ignore[attr-defined]
    # those with which another sweep begins are there once
    part = dataclasses.replace(part, others=(dataclasses.replace(sweep, seeds=(1, 0)),))
    assert len(study.cells(part)) == 4 and study.further(part, None) == []


def test_families_of_text_models_share_what_models_says(tmp_path: Path) -> None:
    text = """
        models: {preset: h200, attention: [alibi], lr: 3e-4, train_len: 1024}
        length_gen: {eval_len: 8192}
        needle: {preset: quick}
        few_shot: {attention: [nope], eval_len: 4096}
        mqrar: {preset: quick}
    """
    found = parts(text, tmp_path=tmp_path)
    lengths, asked, benchmarks = (found[name].config for name in ("length_gen", "needle", "few_shot"))
    shared = [{name: getattr(config, name) for name in TRAINING} for config in (lengths, asked, benchmarks)]
    assert shared[0] == shared[1] == {**shared[2], "attention": ("alibi",)}
    assert (lengths.lr, lengths.train_tokens, lengths.eval_len) == (3e-4, length_gen.PRESETS["h200"].train_tokens, 8192)
    # what else they have is their own preset's, and they read no further than they were trained to
    assert (asked.samples, asked.eval_len) == (needle.PRESETS["quick"].samples, 1024)
    assert (benchmarks.suites, benchmarks.eval_len) == (few_shot.PRESETS["h200"].suites, 4096)
    assert benchmarks.attention == ("nope",) and found["mqrar"].config.attention == mqrar.Config().attention


def test_options_of_a_section_imply_what_those_of_the_command_do(tmp_path: Path) -> None:
    text = """
        needle: {train_len: 512, train_tokens: 4096}
        few_shot: {train_len: 512, tasks: [copa]}
    """
    found = parts(text, tmp_path=tmp_path)
    asked, benchmarks = found["needle"].config, found["few_shot"].config
    assert (asked.eval_len, asked.max_epochs) == (512, None)
    assert (benchmarks.eval_len, benchmarks.tasks, benchmarks.suites) == (512, ("copa",), ())
    assert benchmarks.max_epochs == few_shot.PRESETS["quick"].max_epochs
    for family, options in (("needle", {"train_len": 512, "train_tokens": 4096}), ("few_shot", {"tasks": ("copa",)})):
        completed = registry.task(family).completed(dict(options))
        assert all(getattr(found[family].config, name) == value for name, value in completed.items())
    # what is given is not replaced
    both = parts("few_shot: {train_len: 512, eval_len: 1024}", tmp_path=tmp_path)["few_shot"].config
    assert both.eval_len == 1024
    with pytest.raises(InputError, match="attention_map: --layers: a --checkpoint decides that already"):
        parts("attention_map: {checkpoint: [there], layers: 2}", tmp_path=tmp_path)
    with pytest.raises(InputError, match="attention_map: --seed: a --checkpoint decides that already"):
        parts("attention_map: {checkpoint: [there], seeds: [1]}", tmp_path=tmp_path)


def test_a_study_of_a_preset_names_its_cells_as_the_familys_command_does(tmp_path: Path) -> None:
    found = parts("models: {preset: h200}\nneedle: {attention: [rope]}\nlength_gen:\n", tmp_path=tmp_path)
    for family, attention in (("needle", ("rope",)), ("length_gen", length_gen.PRESETS["h200"].attention)):
        module = registry.task(family)
        assert found[family].config == dataclasses.replace(module.presets["h200"], attention=attention)


def test_values_are_of_the_kind_that_the_config_declares(tmp_path: Path) -> None:
    text = """
        mqrar: {lrs: [3e-4, 1], key_pool: null, score_prefix: False, seeds: [0, 1], filler: any, distinct: []}
        needle: {essays: ~, samples: 1_000, tokenizer: no}
    """
    found = parts(text, "mqrar.key_pool=7", "mqrar.kv_pairs=[2, 4]", "flip_flop.dtype=bfloat16", tmp_path=tmp_path)
    config = found["mqrar"].config
    assert config.lrs == (3e-4, 1.0) and isinstance(config.lrs[1], float) and config.score_prefix is False
    assert (config.key_pool, config.kv_pairs, config.filler, config.distinct) == (7, (2, 4), "any", ())
    asked = found["needle"].config
    assert (asked.essays, asked.samples, asked.tokenizer) == (None, 1000, "no")
    assert found["flip_flop"].config.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("needle: {samples: many}", "needle.samples must be an integer; got 'many'"),
        ("needle: {sampels: 3}", "unknown option 'sampels' of needle; did you mean 'samples'?"),
        # a field that is part of ids, and does nothing
        ("needle: {finetune_lr: 1e-2}", "unknown option 'finetune_lr' of needle; did you mean 'finetune_lrs'?"),
        ("needel: {}", "unknown section 'needel'; did you mean 'needle'?"),
        ("models: {samples: 3}\nneedle:", "unknown option 'samples' of models; known: attention, "),
        ("mqrar: {preset: quik}", "unknown preset 'quik' of mqrar; did you mean 'quick'?"),
        ("models: {preset: figure5}\nmqrar:", "unknown preset 'figure5' of mqrar, which takes that of models "),
        ("mqrar: {preset: figure5}", "unknown preset 'figure5' of mqrar; known: author, h200, "),
        ("mqrar: {attention: {a: b}}", "mqrar.attention must be a list, each text; got {'a': 'b'}"),
        ("mqrar: {lrs: [1e-3, fast]}", r"mqrar.lrs\[1\] must be a number; got 'fast'"),
        ("mqrar: {lrs: [.nan]}", r"mqrar.lrs\[0\] must be a number; got '.nan'"),
        ("mqrar: {positions: maybe}", "mqrar.positions must be true or false; got 'maybe'"),
        ("mqrar: {steps: 1.5}", "mqrar.steps must be an integer; got '1.5'"),
        ("mqrar: {steps: }", "mqrar.steps must be an integer; got ''"),
        ("mqrar: {filler: [a]}", r"mqrar.filler must be text; got \['a'\]"),
        ("mqrar: [steps]", r"mqrar\[0\] must hold names with values, such as {samples: 20}; got 'steps'"),
        ("mqrar: {seeds: []}", "mqrar: seeds is empty: give one or more"),
        ("mqrar: {seeds: [-1]}", r"mqrar: a seed \(--seed\) must be 0 to 2147483647; got -1"),
        ("needle: {samples: 0}", "needle: --samples must be at least 1; got 0"),
        ("mqrar: {steps: 1, steps: 2}", "duplicate key 'steps'"),
        ("mqrar: {}\nmqrar: {}", "duplicate key 'mqrar'"),
        ("models: {}", "nothing to run: a study has a section for each of its families"),
        ("", "nothing to run"),
        ("- mqrar", "must hold names with values"),
        ("mqrar: {", "is not valid YAML: "),
        ("[" * 5000, "nested too deep"),
    ],
)
def test_mistakes_are_one_line(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said) as error:
        parts(text, tmp_path=tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("study", "change", "said"),
    [
        ("tokens", "models.seeds=[0]", "length_gen has its own seeds: give --set length_gen.seeds=VALUE"),
        ("tuning", "models.lr=1e-3", "length_gen has its own lr: give --set length_gen.lr=VALUE"),
        ("n-back", "models.seeds=[0]", "models is for text models, and this study has mqrar: give the option to a"),
        ("n-back", "models.preset=quick", "mqrar has its own preset: give --set mqrar.preset=VALUE"),
    ],
)
def test_a_change_without_effect_is_an_error(study: str, change: str, said: str) -> None:
    with pytest.raises(InputError, match=re.escape(f"--set {change} changes nothing: {said}")):
        study_file.read(study, [change])
    # one section that has none is enough
    assert study_file.read(study, [change, "diagnostics.size=quick"])["models"]


def test_a_change_without_effect_names_each_section(tmp_path: Path) -> None:
    path = tmp_path / "two.yaml"
    path.write_text("length_gen: {preset: quick, lr: 1e-3}\nneedle: {preset: quick, lr: 3e-3}\n")
    with pytest.raises(InputError, match="length_gen, needle have their own lr: give --set length_gen.lr=VALUE"):
        study_file.read(str(path), ["models.lr=5e-3"])


def test_a_study_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="unknown study 'quik'; did you mean 'quick'. known: .*, h200, .*, or the path"
    ):
        study_file.read("quik")
    with pytest.raises(InputError, match="unknown study ''; known: .*, or the path of a study file"):
        study_file.read("")
    for name in ("quik.yaml", "studies/quick"):
        with pytest.raises(InputError, match=f"there is no study file {name}; studies of the package: 125m, "):
            study_file.read(name)
    with pytest.raises(InputError, match="cannot read .*: .*directory"):
        study_file.read(str(tmp_path))
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot read"):
        study_file.read(str(tmp_path / "bytes.yaml"))
    with pytest.raises(
        InputError, match=r"--set takes SECTION.OPTION=VALUE, such as needle.samples=20; got 'samples=3'"
    ):
        study_file.read("quick", ["samples=3"])


def test_what_yaml_can_be_told_to_run_is_text(tmp_path: Path) -> None:
    text = "mqrar: {filler: !!python/object/apply:os.system [touch gone]}"
    with pytest.raises(InputError, match="mqrar.filler must be text"):
        parts(text, tmp_path=tmp_path)


WORDS = ("", "null", "rope", "rope:theta=x", "alibi,", "quick", "nan", "1e999", "9" * 5000)
KINDS: dict[Any, tuple[str, ...]] = {
    int: ("1", "2", "8", "64", "512", "4096", "0", "-1", "9" * 400),
    float: ("1e-3", "0.5", "1", "0", "-1", "1e300"),
    bool: ("true", "False"),
    str: ("rope", "alibi", "fire", "stdlib", "quick", "copa", "vt", "cosine", "value", "9" * 5000),
}
CONFIGS = {"models": length_gen.Config, **{name: registry.task(name).config for name in registry.TASKS}}
OPTIONS = {section: {**get_type_hints(kind), "preset": str, "prest": str} for section, kind in CONFIGS.items()}
TEXTS = st.text(max_size=6) | st.sampled_from(WORDS)


def anything(draw: random.Random, words: list[str], depth: int = 0) -> Any:
    if draw.random() < 0.6 or depth > 2:
        return draw.choice(words)
    parts = {draw.choice(words): anything(draw, words, depth + 1) for _ in range(draw.randrange(3))}
    return parts if draw.random() < 0.2 else list(parts.values())


def value(draw: random.Random, words: list[str], hint: Any) -> Any:
    """Return a strategy of values, mostly of the type of the option."""
    if draw.random() < 0.05:
        return anything(draw, words)
    if isinstance(hint, UnionType):
        return value(draw, words, get_args(hint)[0]) if draw.random() < 0.7 else "null"
    if hint in KINDS:
        return draw.choice(KINDS[hint])
    return [value(draw, words, get_args(hint)[0]) for _ in range(draw.choice((1, 1, 1, 2, 0)))]


def document(draw: random.Random, words: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for section in (draw.choice(list(registry.TASKS)), *draw.sample(list(OPTIONS), draw.randrange(2))):
        known = OPTIONS[section]
        names = draw.sample(list(known), draw.randrange(4))
        found[section] = {name: value(draw, words, known[name]) for name in names}
        if draw.random() < 0.05:
            found[draw.choice(words)] = anything(draw, words)
    return found


@settings(max_examples=500 if FULL else 50, deadline=None)
@given(words=st.lists(TEXTS, min_size=3, max_size=12), seed=st.integers(0, 1 << 30))
def test_any_document_is_read_or_an_error_of_the_users(words: list[str], seed: int) -> None:
    """10,000 documents: 20 per example, from its words."""
    draw = random.Random(seed)
    for _ in range(20):
        try:
            for part in study_file.parts(document(draw, words), lambda said: said or "float32"):
                registry.task(part.family).cells(part.config)
        except InputError as error:
            assert str(error)


@settings(max_examples=1000 if FULL else 100, deadline=None)
@given(text=st.text(alphabet="mqrar:{}[],- \n\t\"'&*!|>%@#?0e.~", max_size=60))
def test_any_text_is_read_or_an_error_of_the_users(text: str) -> None:
    try:
        found = study_file._parsed("study", text)
    except InputError as error:
        assert "study" in str(error)
    else:
        assert found is None or isinstance(found, str | list | dict)


def test_one_rate_of_fine_tuning_is_a_list_of_one(tmp_path: Path) -> None:
    for rate in ("finetune_lrs: 1e-2", "finetune_lrs: [1e-2]"):
        found = parts(f"needle: {{preset: small, {rate}}}", tmp_path=tmp_path)
        (tuning,) = needle.cells(found["needle"].config)[0].tunings
        assert tuning.schedule().lr == 1e-2


def test_tokens_that_a_study_asks_for_are_not_cut(tmp_path: Path) -> None:
    def bounds(text: str, *changes: str) -> list[float | None]:
        found = parts(text, *changes, tmp_path=tmp_path)
        return [found[name].config.max_epochs for name in ("length_gen", "needle")]

    plain = "models: {preset: quick}\nlength_gen:\nneedle:\n"
    assert bounds(plain) == [4.0, 4.0]
    assert bounds(plain, "models.train_tokens=4096") == [None, None]
    assert bounds(plain, "needle.train_tokens=4096") == [4.0, None]
    assert bounds(plain, "models.train_tokens=4096", "length_gen.max_epochs=8") == [8.0, None]
    assert bounds(plain, "models.train_tokens=4096", "models.max_epochs=4") == [4.0, 4.0]
    assert bounds(plain, "models.max_epochs=") == [None, None]
    # the package's study is a preset, and its cells are called as they were
    assert {part.config.max_epochs for part in study_file.parts(study_file.read("quick"), str)[:1]} == {4.0}


def test_a_document_of_thousands_of_keys_is_answered_at_once(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("".join(f"k{number}: 1\n" for number in range(20_000)))
    start = time.process_time()
    with pytest.raises(InputError, match="unknown section 'k0'"):
        study_file.parts(study_file.read(str(path)), lambda given: given or "float32")
    # looking up each key among all others took minutes
    assert time.process_time() - start < 30
    path.write_text("a: 1\n" * 2)
    with pytest.raises(InputError, match="duplicate key 'a'"):
        study_file.read(str(path))


def test_what_has_no_end_is_no_study() -> None:
    with pytest.raises(InputError, match="^/dev/zero has more than 262,144 characters: it is no study$"):
        study_file.read("/dev/zero")


def test_values_stay_text_and_order_stays(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("mqrar: {lrs: [3e-4, 1e-3], seeds: [0]}\nlength_gen:\n")
    assert study_file.read(str(path)) == {"mqrar": {"lrs": ["3e-4", "1e-3"], "seeds": ["0"]}, "length_gen": ""}


@pytest.mark.parametrize("name", ["mqrar-author", "mqrar-author-without-biases", "plateau", "plateau-causes", "n-back"])
def test_each_sweep_of_a_recall_study_is_a_comparison(name: str) -> None:
    """One seed or number of pairs at a time, all methods, none twice."""
    (part,) = study_file.parts(study_file.read(name), lambda said: said or "float32")
    sweeps = [registry.task("mqrar").cells(config) for config in part.configs]
    for config in part.configs:
        assert len(config.attention) > 1 or config.kv_pairs == (64,)
        assert len(config.kv_pairs) == len(config.n_back) == 1
    cells = [cell for sweep in sweeps for cell in sweep]
    assert len(set(cells)) == len(cells)
