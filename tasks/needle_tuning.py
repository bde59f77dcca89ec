"""Fine-tuning of models on needles in haystacks, and the prompts and models that their evaluation opens too."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs

from sbeval.models.config import ModelConfig
from sbeval.sweep.cell import TrainingStep, step_id
from sbeval.tasks.needle_options import PACKED, Config
from sbeval.tasks.text_cell import TextStep
from sbeval.tasks.text_training import open_tokenizer, train_config
from sbeval.training.config import TrainConfig
from sbeval.training.text_model import likely_vocabulary

if TYPE_CHECKING:
    import torch

    from sbeval.data.tokenizer import Tokenizer
    from sbeval.evaluation.ruler_prompts import Prompt, Writer
    from sbeval.evaluation.ruler_texts import Sources
    from sbeval.pretrained.load import Pretrained
    from sbeval.runtime.progress import Progress
    from sbeval.sweep.context import RunContext

# options of fine-tuning, besides those of the training on text
TUNING = ("checkpoint", "finetune", "finetune_lr", "finetune_tasks", "essays", "squad", "hotpot", *PACKED)
# tokens of prompts in a forward pass; a GPU decodes a few long prompts no sooner than many
BATCH_TOKENS = {"cpu": 1 << 13, "cuda": 1 << 19}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning(TextStep, TrainingStep):
    """The fine-tuning of one model by the recipe `answers`, the same for all tasks that it is evaluated on."""

    config: Config

    @property
    def title(self) -> str:
        return f"fine-tune {self.model_title}"

    @property
    def flops(self) -> float:
        return 3 * self.flops_per_token(self.config.train_len) * self.config.finetune

    @property
    def leaves(self) -> ModelConfig:
        return self.model(likely_vocabulary(self.config.tokenizer))

    @property
    def length(self) -> int:
        """Tokens of the sequences that the model was trained on."""
        from sbeval.training import checkpoint

        spec = self.config.checkpoint
        return (spec and checkpoint.training_length(Path(spec))) or self.config.train_len

    def schedule(self) -> TrainConfig:
        """Return steps and optimizer settings."""
        config = self.config
        return train_config(
            config, tokens=config.finetune, length=self.length, lr=config.finetune_lr, seed=self.seed, sparse=True
        )

    def train(self, context: "RunContext", progress: "Progress") -> Path:
        """Train and fine-tune, unless finished checkpoints exist, and return the checkpoint folder."""
        _, writer = open_writer(self.config, progress)
        return self.run(self.train_model(context, progress), writer, context, progress)

    def run(self, trained: str, writer: "Writer", context: "RunContext", progress: "Progress") -> Path:
        """Fine-tune the model of checkpoint `trained`, unless a finished checkpoint exists, and return the folder."""
        from sbeval.evaluation.ruler_prompts import PromptBatches
        from sbeval.models.decoder import Decoder
        from sbeval.pretrained import load
        from sbeval.training.trainer import Trainer

        digest = load.digest(trained)
        pretrained = loaded(trained, digest, context.device, self.dtype, self.config.trust_remote_code)
        pretrained.check_tokenizer(writer.tokenizer, trained)
        assert isinstance(pretrained.model, Decoder), "only our models are fine-tuned"
        training, names = self.schedule(), self.config.finetune_tasks
        length = training.length
        kinds = [writer.path(name, length, self.seed, use="train").stem for name in names]
        each = -(-training.steps * training.batch // len(names))
        written: list[list[Prompt]] = []
        for name in names:
            task = progress.add(f"write fine-tuning prompts of {name} at {length}", total=each)
            written.append(writer.prompts(name, length, self.seed, each, use="train", advance=task.advance))
            task.close()
        prompts = [prompt for together in zip(*written, strict=True) for prompt in together]
        batches = PromptBatches(prompts, writer.tokenizer, length, training.batch)
        with context.checkpoint([digest, training, kinds], progress) as folder:
            tokenizer = writer.tokenizer.digest
            trainer = Trainer(pretrained.model.config, training, batches, folder, context.device, tokenizer=tokenizer)
            if trainer.state.step == 0:
                trainer.model.load_state_dict(pretrained.model.state_dict())
            task = progress.add(self.title, training.steps, completed=trainer.state.step)
            with context.logger(step_id(self)) as log:
                trainer.run(task, log=log)
            task.close()
        return folder


def open_writer(config: Config, progress: "Progress") -> "tuple[Tokenizer, Writer]":
    """Return the model's tokenizer and the writer of its prompts: with a BOS for models that are not ours."""
    from sbeval.evaluation.ruler_prompts import Writer
    from sbeval.pretrained import load

    cache_dir = Path(platformdirs.user_cache_dir("sbeval"))
    ours = config.checkpoint is None or load.is_own(config.checkpoint)
    text = open_tokenizer(config, progress)
    return text, Writer(text, sources(config), cache_dir, prefix=() if ours else text.prefix)


def sources(config: Config) -> "Sources":
    """Return the texts that prompts are made of."""
    return _sources(config.essays, config.squad, config.hotpot)


@functools.lru_cache(maxsize=1)
def _sources(essays: str | None, squad: str | None, hotpot: str | None) -> "Sources":
    from sbeval.evaluation import ruler_texts

    return ruler_texts.load(essays, squad, hotpot)


@functools.lru_cache(maxsize=2)
def loaded(spec: str, digest: str, device: "torch.device", dtype: str, trust: bool) -> "Pretrained":
    """Load the model of consecutive cells once; the digest changes when another is saved to the same path."""
    from sbeval.pretrained import load

    return load.load(spec, device, dtype, trust_remote_code=trust)
