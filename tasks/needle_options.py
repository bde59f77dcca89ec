"""Options and presets of needles in haystacks (see `sbeval.tasks.needle`), and the files that its tasks need."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from sbeval.config import DATA, LATER, MODEL, TASK, TRAINING, option
from sbeval.errors import InputError, choose
from sbeval.tables.published import LONGEST, RULER_TASKS, SHORTEST
from sbeval.tasks import length_gen

# option and file of the questions of RULER's qa tasks
FILES = {
    "qa_1": ("squad", "SQuAD v2's dev-v2.0.json"),
    "qa_2": ("hotpot", "HotpotQA's hotpot_dev_distractor_v1.json"),
}

FINETUNE_LR = 1e-3
# depths that needles can have
MOST_NEEDLES = 40
# options of how a model is fine-tuned
TUNING = ("finetune_lrs", "finetune_batch_tokens", "finetune_needles", "finetune_rest", "finetune_prompts")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(length_gen.Config):
    """Tasks and lengths for the models that length-gen trains with the same options, or for that of `checkpoint`."""

    tasks: tuple[str, ...] = option(
        (), TASK, f"{', '.join(RULER_TASKS)}. Default: all whose files are given.", flag="--task", metavar="NAME"
    )
    lengths: tuple[int, ...] = option(
        (512, 1024, 2048), TASK, f"Tokens of prompt and answer, {SHORTEST} to {LONGEST}.", flag="--length"
    )
    samples: int = option(500, TASK, "Prompts of each task and length.")
    sample_seed: int = option(42, TASK, "Seed of the prompts.")
    essays: str | None = option(None, DATA, "File or folder of text to hide needles in. Default: Walden.")
    squad: str | None = option(None, DATA, "SQuAD v2, dev-v2.0.json, for qa_1.")
    hotpot: str | None = option(None, DATA, "HotpotQA, hotpot_dev_distractor_v1.json, for qa_2.")
    finetune: int = option(0, TRAINING, "Tokens of prompts to fine-tune on before evaluation, at most.")
    finetune_tasks: tuple[str, ...] = option(
        (), TRAINING, "Tasks to fine-tune on. Default: those evaluated.", flag="--finetune-task", metavar="NAME"
    )
    finetune_lrs: tuple[float, ...] = option(
        (),
        TRAINING,
        f"Learning rate of fine-tuning; of several, validation chooses. Default: {FINETUNE_LR}.",
        LATER,
        flag="--finetune-lr",
    )
    finetune_batch_tokens: int | None = option(
        None, TRAINING, "Tokens of an optimizer step of fine-tuning. Default: --batch-tokens.", LATER
    )
    finetune_needles: int = option(8, TRAINING, "Needles and questions of a prompt to fine-tune on, at most.", LATER)
    finetune_rest: float = option(
        0.1, TRAINING, "Weight of the loss on all other text of prompts, beside that on answers.", LATER
    )
    finetune_prompts: int = option(20_000, TRAINING, "Different prompts to fine-tune on, about.", LATER)
    checkpoint: str | None = option(
        None,
        MODEL,
        "Evaluate this model instead: our checkpoint folder, or a Hugging Face folder or name.",
        LATER,
        flag="--checkpoint --model",
    )
    # not used by needle, but part of the ids of published cells; the recipe is `packed` of models that are fine-tuned
    finetune_recipe: str = field(default="", metadata=LATER)
    finetune_lr: float = FINETUNE_LR
    eval_len: int = 4096
    documents: int = 32
    windows: int = 1
    window: tuple[int, ...] = field(default=(), metadata=LATER)
    window_octaves: bool = field(default=False, metadata=LATER)
    eval_corpus: tuple[str, ...] = field(default=(), metadata=LATER)
    fixed_targets: int = field(default=0, metadata=LATER)
    bos: str = field(default="once", metadata=LATER)

    def __post_init__(self) -> None:
        # zero-argument super does not work in a class with slots
        length_gen.Config.__post_init__(self)
        for name in (*self.tasks, *self.finetune_tasks):
            choose("needle task", name, RULER_TASKS)
        if wrong := [length for length in self.lengths if not SHORTEST <= length <= LONGEST]:
            raise InputError(f"--length must be {SHORTEST} to {LONGEST} tokens; got {wrong[0]}")
        if not self.lengths:
            raise InputError("needle needs a length (--length)")
        for name, least in (("samples", 1), ("finetune", 0)):
            if (given := getattr(self, name)) < least:
                raise InputError(f"--{name} must be at least {least}; got {given}")
        self._check_tuning()
        if lacking := [name for name in self.tasks if name in FILES and getattr(self, FILES[name][0]) is None]:
            raise InputError(_lacks(lacking[0]))
        if questions := [name for name in self.finetune_tasks if name in FILES]:
            raise InputError(f"{questions[0]} cannot be fine-tuned on: its questions are those of the test")

    def _check_tuning(self) -> None:
        if wrong := [rate for rate in self.finetune_lrs if not 0 < rate < math.inf]:
            raise InputError(f"--finetune-lr must be above 0 and finite; got {wrong[0]}")
        if not 1 <= self.finetune_needles <= MOST_NEEDLES:
            raise InputError(f"--finetune-needles must be 1 to {MOST_NEEDLES}; got {self.finetune_needles}")
        if not 0 <= self.finetune_rest < math.inf:
            raise InputError(f"--finetune-rest must be at least 0 and finite; got {self.finetune_rest}")
        for name in ("finetune_batch_tokens", "finetune_prompts"):
            if (amount := getattr(self, name)) is not None and amount < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1; got {amount}")


# 4,578 steps, 1 to 3 minutes of a card at 25m; a method that solves the tasks ends earlier
BUDGET: dict[str, Any] = {"finetune": 4578 * 32768, "finetune_batch_tokens": 32768}
ANSWERED: dict[str, Any] = {"lengths": (1024, 2048, 4096, 8192, 16384), "samples": 100}

PRESETS = {
    # 1.3 M parameters: every step in minutes on two cores, but 410,000 tokens of fine-tuning, a four-hundredth of the
    # others', are too few to find a needle
    "quick": length_gen.preset(
        Config, "quick", tokenizer="bpe:1024", train_len=512, eval_len=512, train_tokens=50 * 4096, batch_tokens=4096,
        tasks=("niah_single_1",), lengths=(512, 1024, 2048), samples=20, finetune=100 * 4096, finetune_lrs=(3e-3,),
        finetune_prompts=500,
    ),
    "small": length_gen.preset(Config, "small", **ANSWERED, **BUDGET),
    # the models of length-gen's preset h200, and two more methods
    "h200": length_gen.preset(
        Config, "h200", attention=("stick_breaking", "rope", "alibi", "forgetting"), **ANSWERED, **BUDGET
    ),
    # RULER as published: all tasks, 500 samples, 4k to 128k, nothing fine-tuned
    "paper": length_gen.preset(
        Config, "paper", attention=("stick_breaking", "rope"), lengths=tuple(4096 << octave for octave in range(6))
    ),
}  # fmt: skip


def settled(config: Config) -> Config:
    """Return a config whose options of fine-tuning are at their defaults where they change nothing."""
    if config.finetune:
        rates = tuple(sorted(set(config.finetune_lrs))) or (FINETUNE_LR,)
        return dataclasses.replace(config, finetune_lrs=rates, finetune_recipe="packed")
    defaults: dict[str, Any] = {
        entry.name: entry.default for entry in dataclasses.fields(Config) if entry.name in TUNING
    }
    return dataclasses.replace(config, **defaults)


def notes(config: Config) -> list[str]:
    """Return lines on tasks that lack their file, files that no task uses, and a model that is not fine-tuned."""
    lines = _about_files(config)
    if not_finetuned(config):
        lines.append(f"{config.checkpoint} is not fine-tuned: only checkpoint folders of ours are")
    return lines


def not_finetuned(config: Config) -> bool:
    """Return whether fine-tuning is skipped: the checkpoint is not one of ours."""
    from sbeval.pretrained import load

    given = config.checkpoint
    return bool(config.finetune) and given is not None and not load.is_own(given)


def evaluated_tasks(config: Config) -> list[str]:
    with_files = [name for name in RULER_TASKS if name not in FILES or getattr(config, FILES[name][0]) is not None]
    return list(dict.fromkeys(config.tasks or with_files))


def _lacks(name: str) -> str:
    option, what = FILES[name]
    return f"{name} is not run without its questions: give --{option} PATH to {what}"


def _about_files(config: Config) -> list[str]:
    absent = {name: option for name, (option, _) in FILES.items() if name not in evaluated_tasks(config)}
    if not config.tasks:
        return [_lacks(name) for name in absent]
    return [
        f"--{option} is not used: {name} is not among the tasks; give --task {name} too"
        for name, option in absent.items()
        if getattr(config, option) is not None
    ]
