"""The command line. Nothing heavy is imported before a command runs, so `--help` answers at once."""

import dataclasses
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sbeval.errors import SEEDS, InputError, choose

if TYPE_CHECKING:
    from sbeval.executor import Executor
    from sbeval.place import Place
    from sbeval.schema import Part

app = typer.Typer(
    help="Evaluate stick-breaking attention and its rivals (Tan et al., ICLR 2025, arXiv 2410.17980).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Attention = Annotated[
    list[str] | None,
    typer.Option("--attention", help="Method, with options as name:key=value,...; repeat for several.", metavar="SPEC"),
]
Seed = Annotated[
    list[int] | None, typer.Option(help="Seed of weights and data; repeat for several.", min=0, max=SEEDS[-1])
]
Preset = Annotated[
    str | None,
    typer.Option(
        help="quick (minutes on two cores), small (one GPU), h200, paper, or a task's own; quick on a CPU, else small."
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; the GPU if there is one.")]
Dtype = Annotated[str | None, typer.Option(help="Matrix products: float32, bfloat16, float16; bfloat16 on a GPU.")]
ResultsDir = Annotated[Path, typer.Option(help="Where tables, run files, checkpoints and figures go.")]
Force = Annotated[bool, typer.Option("--force", help="Run cells again that have a result.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the grid with its cost and stop.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the Python code that comes with a model of Hugging Face.")
]
Size = Annotated[str | None, typer.Option(help="Model: quick, 25m, 60m, nanogpt-60m, 125m, 350m, 1b, 3b.")]
TrainLen = Annotated[int | None, typer.Option(help="Tokens of a training sequence.")]
TrainTokens = Annotated[int | None, typer.Option(help="Tokens to train on; a preset's end at --max-epochs.")]
MaxEpochs = Annotated[
    float | None, typer.Option(help="Passes over the text at most: 4 of a preset; no bound on --train-tokens.")
]
Patience = Annotated[
    int | None, typer.Option(help="Looks at held-out loss without a new lowest after which training ends; 0: never.")
]
BatchTokens = Annotated[int | None, typer.Option(help="Tokens of one optimizer step.")]
MicroBatchTokens = Annotated[int | None, typer.Option(help="Tokens of one forward pass; all of a step's.")]
Lr = Annotated[float | None, typer.Option(help="Peak learning rate.")]
Optimizer = Annotated[str | None, typer.Option(help="adamw, or muon: that for matrices inside the blocks.")]
Schedule = Annotated[str | None, typer.Option(help="cosine, power or constant.")]
Packing = Annotated[str | None, typer.Option(help="stream, or documents: no attention across documents.")]
CorpusSpec = Annotated[
    str | None, typer.Option("--corpus", help="python, stdlib, a file or folder, or hf:NAME[:CONFIG].")
]
TokenizerSpec = Annotated[
    str | None, typer.Option("--tokenizer", help="bytes, bpe:SIZE, or a Hugging Face name or folder.")
]
TextField = Annotated[str | None, typer.Option(help="Field of the text in JSONL and parquet.")]
CorpusTokens = Annotated[int | None, typer.Option(help="Train tokens to keep of the corpus; all.")]
TensorBoard = Annotated[Path | None, typer.Option(help="Folder for TensorBoard logs.", metavar="DIR")]
ExecutorKind = Annotated[str, typer.Option(help="local, or ray.")]
Workers = Annotated[
    int | None, typer.Option(help="Cells at once: processes that share cores and GPUs out, or Ray's CPUs here.")
]
Address = Annotated[str | None, typer.Option(help="Ray cluster to join, as host:port or auto.")]
GpusPerCell = Annotated[float | None, typer.Option(help="GPUs of a Ray task, such as 0.25; one where there are any.")]


@app.command("length-gen")
def length_gen(
    preset: Preset = None,
    attention: Attention = None,
    seed: Seed = None,
    size: Size = None,
    train_len: TrainLen = None,
    eval_len: Annotated[int | None, typer.Option(help="Tokens of context to evaluate to.")] = None,
    train_tokens: TrainTokens = None,
    max_epochs: MaxEpochs = None,
    patience: Patience = None,
    batch_tokens: BatchTokens = None,
    micro_batch_tokens: MicroBatchTokens = None,
    lr: Lr = None,
    schedule: Schedule = None,
    packing: Packing = None,
    corpus: CorpusSpec = None,
    tokenizer: TokenizerSpec = None,
    text_field: TextField = None,
    corpus_tokens: CorpusTokens = None,
    documents: Annotated[int | None, typer.Option(help="Test documents to evaluate on, at most.")] = None,
    windows: Annotated[int | None, typer.Option(help="Disjoint windows of each document, at most.")] = None,
    window: Annotated[
        list[int] | None,
        typer.Option(
            help="Also perplexity as lm-eval has it, in disjoint windows of so many tokens; repeat for several."
        ),
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Evaluate this model: our checkpoint folder, or a Hugging Face folder or name.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    executor: ExecutorKind = "local",
    workers: Workers = None,
    address: Address = None,
    gpus_per_cell: GpusPerCell = None,
    device: Device = None,
    dtype: Dtype = None,
    results_dir: ResultsDir = Path("results"),
    force: Force = False,
    dry_run: DryRun = False,
    tensorboard: TensorBoard = None,
) -> None:
    """Train at one length, evaluate the loss at every position far past it."""
    given = dict(
        size=size, train_len=train_len, eval_len=eval_len, train_tokens=train_tokens, batch_tokens=batch_tokens,
        micro_batch_tokens=micro_batch_tokens, lr=lr, schedule=schedule, packing=packing, corpus=corpus,
        tokenizer=tokenizer, text_field=text_field, corpus_tokens=corpus_tokens, documents=documents, windows=windows,
        window=window, checkpoint=checkpoint, attention=attention, seeds=seed,
        trust_remote_code=trust_remote_code or None,
        max_epochs=max_epochs, patience=patience,
    )  # fmt: skip
    how = _how(executor, workers, address, gpus_per_cell)
    _family("length_gen", preset, given, device, dtype, results_dir, tensorboard, force=force, dry_run=dry_run, how=how)


@app.command()
def train(
    preset: Preset = None,
    attention: Attention = None,
    seed: Seed = None,
    size: Size = None,
    train_len: TrainLen = None,
    train_tokens: TrainTokens = None,
    max_epochs: MaxEpochs = None,
    patience: Patience = None,
    batch_tokens: BatchTokens = None,
    micro_batch_tokens: MicroBatchTokens = None,
    lr: Lr = None,
    schedule: Schedule = None,
    packing: Packing = None,
    corpus: CorpusSpec = None,
    tokenizer: TokenizerSpec = None,
    text_field: TextField = None,
    corpus_tokens: CorpusTokens = None,
    shard: Annotated[
        bool, typer.Option("--shard", help="Spread weights and optimizer over the processes (FSDP2), not copies (DDP).")
    ] = False,
    device: Device = None,
    dtype: Dtype = None,
    results_dir: ResultsDir = Path("results"),
    force: Force = False,
    dry_run: DryRun = False,
    tensorboard: TensorBoard = None,
) -> None:
    """Train the models that length-gen with the same options evaluates; under torchrun, on several GPUs."""
    given = dict(
        size=size, train_len=train_len, eval_len=train_len, train_tokens=train_tokens, batch_tokens=batch_tokens,
        micro_batch_tokens=micro_batch_tokens, lr=lr, schedule=schedule, packing=packing, corpus=corpus,
        tokenizer=tokenizer, text_field=text_field, corpus_tokens=corpus_tokens, attention=attention, seeds=seed,
        max_epochs=max_epochs, patience=patience,
    )  # fmt: skip
    _family(
        "length_gen", preset, given, device, dtype, results_dir, tensorboard, force=force, dry_run=dry_run, only=True,
        shard=shard,
    )  # fmt: skip


@app.command()
def mqrar(
    preset: Preset = None,
    attention: Attention = None,
    seed: Seed = None,
    kv_pairs: Annotated[list[int] | None, typer.Option(help="Key-value pairs N; repeat for several.")] = None,
    width: Annotated[list[int] | None, typer.Option(help="Width of the model; repeat for several.")] = None,
    lr: Annotated[list[float] | None, typer.Option(help="Peak learning rate; repeat for several.")] = None,
    n_back: Annotated[
        list[int] | None, typer.Option(help="The answer is the N-th last value; repeat for several.")
    ] = None,
    vocab_size: Annotated[int | None, typer.Option(help="Tokens V: half are keys, half values.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Positions L of an example, at least 4 N.")] = None,
    slot_power: Annotated[float | None, typer.Option(help="Exponent a of the slot law.")] = None,
    filler: Annotated[str | None, typer.Option(help="Other positions: value, padding or any token.")] = None,
    distinct: Annotated[
        list[str] | None, typer.Option(help="Draw keys, values, queries without replacement; repeat for several.")
    ] = None,
    key_pool: Annotated[int | None, typer.Option(help="Keys to draw from; V/2 - 1.")] = None,
    score_prefix: Annotated[bool | None, typer.Option(help="Score keys repeated in the prefix.")] = None,
    layers: Annotated[int | None, typer.Option(help="Layers of the model.")] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads.")] = None,
    positions: Annotated[bool | None, typer.Option(help="Add a learned table of absolute positions.")] = None,
    logit_scale: Annotated[
        float | None, typer.Option(help="Scale of stick-breaking's logits, times 1 / sqrt(head size); 1.5.")
    ] = None,
    dropout: Annotated[float | None, typer.Option(help="Dropout of embeddings and attention's output.")] = None,
    init_std: Annotated[
        float | None, typer.Option(help="Standard deviation of initial weights; 1 / sqrt(width).")
    ] = None,
    stored_rows: Annotated[
        int | None, typer.Option(help="Train in epochs on so many stored examples; 0: new ones at every step.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Examples of one optimizer step.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps at most.")] = None,
    schedule: Schedule = None,
    optimizer: Optimizer = None,
    weight_decay: Annotated[float | None, typer.Option(help="Weight decay.")] = None,
    stop_accuracy: Annotated[float | None, typer.Option(help="Validation accuracy at which training ends.")] = None,
    patience: Annotated[
        int | None, typer.Option(help="Steps without progress after which training ends; 0: never.")
    ] = None,
    test_rows: Annotated[int | None, typer.Option(help="Test examples.")] = None,
    executor: ExecutorKind = "local",
    workers: Workers = None,
    address: Address = None,
    gpus_per_cell: GpusPerCell = None,
    device: Device = None,
    dtype: Dtype = None,
    results_dir: ResultsDir = Path("results"),
    force: Force = False,
    dry_run: DryRun = False,
    tensorboard: TensorBoard = None,
) -> None:
    """Multi-query repeated associative recall: does each use of a variable return its latest value?"""
    given = dict(
        kv_pairs=kv_pairs, widths=width, lrs=lr, n_back=n_back, vocab_size=vocab_size, seq_len=seq_len,
        slot_power=slot_power, filler=filler, distinct=distinct, key_pool=key_pool, score_prefix=score_prefix,
        layers=layers, heads=heads, positions=positions, logit_scale=logit_scale, dropout=dropout, init_std=init_std,
        stored_rows=stored_rows, batch=batch, steps=steps, schedule=schedule, optimizer=optimizer,
        weight_decay=weight_decay, stop_accuracy=stop_accuracy, patience=patience, test_rows=test_rows,
        attention=attention, seeds=seed,
    )  # fmt: skip
    how = _how(executor, workers, address, gpus_per_cell)
    _family("mqrar", preset, given, device, dtype, results_dir, tensorboard, force=force, dry_run=dry_run, how=how)


@app.command("attention-map")
def attention_map(
    preset: Preset = None,
    attention: Attention = None,
    seed: Seed = None,
    checkpoint: Annotated[
        list[str] | None, typer.Option(help="Look into these models: checkpoint folders of mqrar; repeat for several.")
    ] = None,
    kv_pairs: Annotated[int | None, typer.Option(help="Key-value pairs N.")] = None,
    vocab_size: Annotated[int | None, typer.Option(help="Tokens V: half are keys, half values.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Positions L of an example, at least 4 N.")] = None,
    width: Annotated[int | None, typer.Option(help="Width of the model.")] = None,
    layers: Annotated[int | None, typer.Option(help="Layers of the model.")] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads.")] = None,
    lr: Lr = None,
    batch: Annotated[int | None, typer.Option(help="Examples of one optimizer step.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps at most.")] = None,
    optimizer: Optimizer = None,
    test_rows: Annotated[int | None, typer.Option(help="Test examples.")] = None,
    example: Annotated[
        int | None, typer.Option(help="Draw the first fitting test example from this number on.")
    ] = None,
    executor: ExecutorKind = "local",
    workers: Workers = None,
    address: Address = None,
    gpus_per_cell: GpusPerCell = None,
    device: Device = None,
    dtype: Dtype = None,
    results_dir: ResultsDir = Path("results"),
    force: Force = False,
    dry_run: DryRun = False,
    tensorboard: TensorBoard = None,
) -> None:
    """Where a model looks when a variable was assigned again: attention weights, drawn and measured."""
    given = dict(
        checkpoint=checkpoint, kv_pairs=kv_pairs, vocab_size=vocab_size, seq_len=seq_len, width=width, layers=layers,
        heads=heads, lr=lr, batch=batch, steps=steps, optimizer=optimizer, test_rows=test_rows, example=example,
        attention=attention, seeds=seed,
    )  # fmt: skip
    decided = ("attention", "vocab_size", "width", "layers", "heads", "lr", "batch", "steps", "optimizer")
    if checkpoint and (surplus := [f"--{name.replace('_', '-')}" for name in decided if given[name] is not None]):
        raise InputError(f"{' and '.join(surplus)}: a --checkpoint decides that already")
    how = _how(executor, workers, address, gpus_per_cell)
    _family(
        "attention_map", preset, given, device, dtype, results_dir, tensorboard, force=force, dry_run=dry_run, how=how
    )


@app.command("flip-flop")
def flip_flop(
    preset: Preset = None,
    attention: Attention = None,
    seed: Seed = None,
    lr: Annotated[list[float] | None, typer.Option(help="Peak learning rate; repeat for several.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens of an example: half are instructions.")] = None,
    p_ignore: Annotated[float | None, typer.Option(help="Chance that an instruction in training is `ignore`.")] = None,
    layers: Annotated[int | None, typer.Option(help="Layers of the model.")] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads.")] = None,
    width: Annotated[int | None, typer.Option(help="Width of the model.")] = None,
    batch: Annotated[int | None, typer.Option(help="Examples of one optimizer step.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps at most.")] = None,
    test_rows: Annotated[int | None, typer.Option(help="Examples of each test set.")] = None,
    executor: ExecutorKind = "local",
    workers: Workers = None,
    address: Address = None,
    gpus_per_cell: GpusPerCell = None,
    device: Device = None,
    dtype: Dtype = None,
    results_dir: ResultsDir = Path("results"),
    force: Force = False,
    dry_run: DryRun = False,
    tensorboard: TensorBoard = None,
) -> None:
    """Flip-flop language: write, read and ignore one bit; is every read the bit last written?"""
    given = dict(
        lrs=lr, seq_len=seq_len, p_ignore=p_ignore, layers=layers, heads=heads, width=width, batch=batch, steps=steps,
        test_rows=test_rows, attention=attention, seeds=seed,
    )  # fmt: skip
    how = _how(executor, workers, address, gpus_per_cell)
    _family("flip_flop", preset, given, device, dtype, results_dir, tensorboard, force=force, dry_run=dry_run, how=how)


@app.command("few-shot")
def few_shot(
    preset: Preset = None,
    task: Annotated[
        list[str] | None, typer.Option(help="Any task or group of lm-eval, or name:examples such as mmlu:5; repeat.")
    ] = None,
    suite: Annotated[list[str] | None, typer.Option(help="quick, linguistic, commonsense or paper; repeat.")] = None,
    checkpoint: Annotated[
        list[str] | None,
        typer.Option("--model", help="Our checkpoint folder, or a Hugging Face folder or name; repeat for several."),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of JSONL files with the items, instead of the hub.", metavar="DIR")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Items of each task at most.")] = None,
    attention: Attention = None,
    seed: Seed = None,
    size: Size = None,
    train_len: TrainLen = None,
    eval_len: Annotated[int | None, typer.Option(help="Tokens that a model reads at most.")] = None,
    train_tokens: TrainTokens = None,
    max_epochs: MaxEpochs = None,
    patience: Patience = None,
    batch_tokens: BatchTokens = None,
    micro_batch_tokens: MicroBatchTokens = None,
    lr: Lr = None,
    schedule: Schedule = None,
    packing: Packing = None,
    corpus: CorpusSpec = None,
    tokenizer: TokenizerSpec = None,
    text_field: TextField = None,
    corpus_tokens: CorpusTokens = None,
    executor: ExecutorKind = "local",
    workers: Workers = None,
    address: Address = None,
    gpus_per_cell: GpusPerCell = None,
    device: Device = None,
    dtype: Dtype = None,
    results_dir: ResultsDir = Path("results"),
    force: Force = False,
    dry_run: DryRun = False,
    tensorboard: TensorBoard = None,
) -> None:
    """Benchmarks through lm-eval, of models that length-gen trains or of any others: how do they compare?

    Models of others are asked as the preset paper says, unless another is named.
    """
    if checkpoint and preset is None:
        from sbeval import pretrained

        preset = None if any(map(pretrained.is_own, checkpoint)) else "paper"
    given = dict(
        # tasks that are named are all that is asked
        tasks=task, suites=suite or ([] if task else None), models=checkpoint,
        data_dir=None if data_dir is None else str(data_dir), limit=limit, size=size, train_len=train_len,
        eval_len=eval_len or train_len, train_tokens=train_tokens, batch_tokens=batch_tokens,
        micro_batch_tokens=micro_batch_tokens, lr=lr, schedule=schedule, packing=packing, corpus=corpus,
        tokenizer=tokenizer, text_field=text_field, corpus_tokens=corpus_tokens, attention=attention, seeds=seed,
        trust_remote_code=trust_remote_code or None,
        max_epochs=max_epochs, patience=patience,
    )  # fmt: skip
    how = _how(executor, workers, address, gpus_per_cell)
    _family("few_shot", preset, given, device, dtype, results_dir, tensorboard, force=force, dry_run=dry_run, how=how)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Our checkpoint folder.", metavar="CHECKPOINT")],
    out: Annotated[Path, typer.Argument(help="Folder to write, which must be new or empty.", metavar="OUT")],
    tokenizer: Annotated[
        str | None, typer.Option(help="That of training: bytes, bpe:SIZE with --corpus, a file, folder or name; none.")
    ] = None,
    corpus: CorpusSpec = None,
    text_field: TextField = None,
) -> None:
    """Write a checkpoint as a Hugging Face model, which loads where sbeval.hf is imported."""
    if not importlib.util.find_spec("transformers"):
        raise InputError("export needs transformers: pip install 'sbeval[hf]'")
    from sbeval import hf

    hf.export(checkpoint, out, hf.tokenizer_of(tokenizer, corpus, text_field or "text"))
    _say(str(out))


@app.command()
def table(
    family: Annotated[str, typer.Argument(help="few-shot")],
    format: Annotated[str, typer.Option(help="terminal, markdown, latex or csv.")] = "terminal",
    results_dir: ResultsDir = Path("results"),
) -> None:
    """Print a table of models by benchmarks, as papers have it, from the result table alone; needs no torch."""
    from sbeval import scores
    from sbeval.table import read

    choose("table", family.replace("-", "_"), ["few_shot"])
    shown = scores.render(read(results_dir / "few_shot.csv", required=scores.COLUMNS), format)
    if isinstance(shown, str):
        print(shown)
    else:
        Console().print(shown)


@app.command()
def doctor(device: Device = None, results_dir: ResultsDir = Path("results")) -> None:
    """Say what this machine can do: devices, attention methods, optional packages, which presets fit."""
    from sbeval import device as devices
    from sbeval.doctor import examine

    report = examine(devices.pick(device), results_dir)
    for section in report.sections:
        _print_table(section.title, section.headings, section.rows)
    if not report.able:
        raise typer.Exit(1)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="Results folder.", metavar="A")],
    second: Annotated[Path, typer.Argument(help="Another.", metavar="B")],
    format: Annotated[str, typer.Option(help="terminal, markdown or csv.")] = "terminal",
) -> None:
    """Set two results folders side by side: differences with intervals, rows only in one; needs no torch."""
    from sbeval.compare import render

    shown = render(first, second, format)
    if isinstance(shown, str):
        print(shown)
    else:
        Console().print(shown, soft_wrap=False)


@app.command()
def needle(
    preset: Preset = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="niah_single_1, ..., vt, cwe, fwe, qa_1, qa_2; repeat. The preset's: quick asks niah_single_1, others "
            "all 13."
        ),
    ] = None,
    length: Annotated[
        list[int] | None, typer.Option(help="Tokens of prompt and answer, 512 to 131072; repeat.")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Prompts of each task and length.")] = None,
    sample_seed: Annotated[int | None, typer.Option(help="Seed of the prompts; 42.", min=0)] = None,
    finetune: Annotated[
        int | None, typer.Option(help="Tokens of prompts to train on, at the training length, before asking.")
    ] = None,
    finetune_task: Annotated[list[str] | None, typer.Option(help="Tasks to train on; repeat. Those asked.")] = None,
    finetune_lr: Annotated[float | None, typer.Option(help="Peak learning rate of that training.")] = None,
    essays: Annotated[Path | None, typer.Option(help="Text to hide needles in: a file or folder. Walden.")] = None,
    squad: Annotated[Path | None, typer.Option(help="SQuAD v2, dev-v2.0.json, for qa_1.")] = None,
    hotpot: Annotated[Path | None, typer.Option(help="HotpotQA, hotpot_dev_distractor_v1.json, for qa_2.")] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            "--checkpoint", "--model", help="Ask this model: our checkpoint folder, or a Hugging Face folder or name."
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    attention: Attention = None,
    seed: Seed = None,
    size: Size = None,
    train_len: TrainLen = None,
    train_tokens: TrainTokens = None,
    max_epochs: MaxEpochs = None,
    patience: Patience = None,
    batch_tokens: BatchTokens = None,
    micro_batch_tokens: MicroBatchTokens = None,
    lr: Lr = None,
    schedule: Schedule = None,
    packing: Packing = None,
    corpus: CorpusSpec = None,
    tokenizer: TokenizerSpec = None,
    text_field: TextField = None,
    corpus_tokens: CorpusTokens = None,
    executor: ExecutorKind = "local",
    workers: Workers = None,
    address: Address = None,
    gpus_per_cell: GpusPerCell = None,
    device: Device = None,
    dtype: Dtype = None,
    results_dir: ResultsDir = Path("results"),
    force: Force = False,
    dry_run: DryRun = False,
    tensorboard: TensorBoard = None,
) -> None:
    """RULER's needles in haystacks: does a model find what stands anywhere in a text longer than it was trained on?"""
    files = {name: path and str(path) for name, path in (("essays", essays), ("squad", squad), ("hotpot", hotpot))}
    given = dict(
        tasks=task, lengths=length, samples=samples, sample_seed=sample_seed, finetune=finetune,
        finetune_tasks=finetune_task, finetune_lr=finetune_lr, **files, checkpoint=checkpoint, size=size,
        train_len=train_len, eval_len=train_len, train_tokens=train_tokens, batch_tokens=batch_tokens,
        micro_batch_tokens=micro_batch_tokens, lr=lr, schedule=schedule, packing=packing, corpus=corpus,
        tokenizer=tokenizer, text_field=text_field, corpus_tokens=corpus_tokens, attention=attention, seeds=seed,
        trust_remote_code=trust_remote_code or None,
        max_epochs=max_epochs, patience=patience,
    )  # fmt: skip
    how = _how(executor, workers, address, gpus_per_cell)
    _family("needle", preset, given, device, dtype, results_dir, tensorboard, force=force, dry_run=dry_run, how=how)


@app.command("run")
def run_study(
    study: Annotated[str, typer.Argument(help="quick, h200, paper, or a YAML file written as one of these.")],
    change: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Another value than the study's: needle.samples=20; repeat.", metavar="OPTION=VALUE"
        ),
    ] = None,
    executor: ExecutorKind = "local",
    workers: Workers = None,
    address: Address = None,
    gpus_per_cell: GpusPerCell = None,
    device: Device = None,
    dtype: Dtype = None,
    results_dir: ResultsDir = Path("results"),
    force: Force = False,
    dry_run: DryRun = False,
    show: Annotated[
        bool, typer.Option("--show", help="Print the study's file, to write another from, and stop.")
    ] = False,
) -> None:
    """A whole study: train each model once, run every family on it, and go on where a stopped run was."""
    from sbeval import device as devices
    from sbeval import distributed, schema
    from sbeval.place import Place

    if show:
        print(schema.text(study), end="")
        return
    if distributed.size() > 1:
        raise InputError("a study runs in one process: start it without torchrun, with --workers or --executor ray")
    how = _how(executor, workers, address, gpus_per_cell)
    where = devices.pick(device)
    parts = schema.parts(schema.read(study, change or ()), lambda said: devices.pick_dtype(dtype or said, where))
    _run(parts, Place(results_dir=results_dir, device=where, force=force), how, dry_run=dry_run, name=study)


@app.command()
def plot(
    figure: Annotated[
        list[str] | None,
        typer.Argument(help="Figures: attention-map, length-gen, mqrar, mqrar-splits, ...; all if none is named."),
    ] = None,
    format: Annotated[
        list[str] | None, typer.Option(help="png, pdf or html; repeat for several. png and pdf if not given.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the figures; results/figures.", metavar="DIR")] = None,
    results_dir: ResultsDir = Path("results"),
) -> None:
    """Redraw figures from the result tables alone; needs no torch."""
    from sbeval.draw import draw_figures

    names = [name.replace("-", "_") for name in figure or []]
    for path in draw_figures(results_dir, names, format or ("png", "pdf"), out, say=_say):
        _say(str(path))


@app.command()
def report(
    out: Annotated[Path | None, typer.Option(help="File to write; results/report.html.", metavar="PATH")] = None,
    results_dir: ResultsDir = Path("results"),
) -> None:
    """Write one HTML page of all results: the paper's claims beside them, figures to hover over; needs no torch."""
    from sbeval.report import write

    _say(str(write(results_dir, out, say=_say)))


bench = typer.Typer(help="Time kernels and models beside their peers, on a GPU.", no_args_is_help=True)
app.add_typer(bench, name="bench")
Lengths = Annotated[list[int] | None, typer.Option(help="Tokens of a sequence; repeat for several.", min=1)]


@bench.command("kernel")
def bench_kernel(
    length: Lengths = None,
    head_dim: Annotated[list[int] | None, typer.Option(help="Size of a head; repeat for several.", min=1)] = None,
    heads: Annotated[int, typer.Option(help="Query heads.", min=1)] = 12,
    cache: Annotated[list[int] | None, typer.Option(help="Keys to decode against; repeat.", min=1)] = None,
    device: Device = None,
    dtype: Dtype = None,
    results_dir: ResultsDir = Path("results"),
) -> None:
    """Attention kernels: time, throughput, memory and error of each, in one run."""
    from sbeval import bench as benchmarks
    from sbeval import device as devices

    place = devices.pick(device)
    found = benchmarks.problems(
        sorted(length or (1024, 4096, 16384, 65536)), head_dim or (64, 128), heads, cache or (16384, 65536)
    )
    Console().print(benchmarks.kernel(found, place, devices.pick_dtype(dtype, place), results_dir, _say))
    _draw(results_dir, ["kernel", "kernel_error"])


@bench.command("model")
def bench_model(
    size: Annotated[list[str] | None, typer.Option(help="Model: 25m, 125m, 350m, 1b, ...; repeat.")] = None,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.", min=1)] = 4096,
    batch: Annotated[int, typer.Option(help="Sequences of a step.", min=1)] = 4,
    attention: Attention = None,
    device: Device = None,
    dtype: Dtype = None,
    results_dir: ResultsDir = Path("results"),
) -> None:
    """Models: tokens per second of training and evaluation with each attention method."""
    from sbeval import bench as benchmarks
    from sbeval import device as devices

    place = devices.pick(device)
    found = [benchmarks.ModelProblem(size=name, length=length, batch=batch) for name in size or ("350m", "1b")]
    shown = benchmarks.model(
        found, attention or ("stick_breaking", "rope"), place, devices.pick_dtype(dtype, place), results_dir
    )
    Console().print(shown)
    _say(str(results_dir / "model.csv"))
    _draw(results_dir, ["model"])


@bench.command("skipping")
def bench_skipping(
    checkpoint: Annotated[str, typer.Option(help="Checkpoint folder of a stick-breaking model.")],
    corpus: Annotated[
        str, typer.Option(help="Text to read: python, stdlib, a file or folder, or hf:NAME[:CONFIG].")
    ] = "stdlib",
    tokenizer: Annotated[str, typer.Option(help="The model's: bytes, bpe:SIZE, or a Hugging Face name.")] = "bytes",
    length: Lengths = None,
    device: Device = None,
    dtype: Dtype = None,
    results_dir: ResultsDir = Path("results"),
) -> None:
    """Block skipping on what a trained model computes: forward and decoding, layer by layer, beside softmax."""
    from sbeval import device as devices
    from sbeval import skipping, sweep
    from sbeval.place import Place
    from sbeval.tasks import length_gen

    place = devices.pick(device)
    config = length_gen.Config(corpus=corpus, tokenizer=tokenizer)
    with sweep.progress_of(Place(results_dir=results_dir, device=place)) as progress:
        text = length_gen.open_corpus(config, progress)
    lengths = sorted(length or (2048, 4096, 8192, 16384, 32768, 65536))
    shown = skipping.measure(checkpoint, text.test, lengths, place, devices.pick_dtype(dtype, place), results_dir)
    Console().print(shown)
    _draw(results_dir, ["skipping"])


def _draw(results_dir: Path, names: list[str]) -> None:
    from sbeval.draw import draw_figures

    for path in draw_figures(results_dir, names):
        _say(str(path))


def _print_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table in a terminal; elsewhere plain lines whose columns are in line, however wide."""
    console = Console()
    if console.is_terminal:
        shown = Table(*headings, title=title)
        for row in rows:
            shown.add_row(*row)
        console.print(shown, markup=False)
        return
    widths = [max(len(row[place]) for row in (headings, *rows)) for place in range(len(headings))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (headings, *rows))
    _say("\n".join([title, *(f"  {line.rstrip()}" for line in lines), ""]))


def _say(line: object) -> None:
    Console().print(line, highlight=False, soft_wrap=True, markup=False)


def _how(kind: str, workers: int | None, address: str | None, gpus_per_cell: float | None) -> "Executor":
    from sbeval import distributed
    from sbeval.executor import Executor

    how = Executor(kind=kind, workers=workers, address=address, gpus_per_cell=gpus_per_cell)
    if distributed.size() > 1 and not how.alone:
        raise InputError("--workers and --executor ray start processes of their own: leave them out, or torchrun")
    return how


def _family(
    name: str, preset: str | None, given: dict[str, Any], device: str | None, dtype: str | None, results_dir: Path,
    tensorboard: Path | None, *, force: bool, dry_run: bool, only: bool = False, shard: bool = False,
    how: "Executor | None" = None,
) -> None:  # fmt: skip
    """Run one family: preset and options to config, config to cells, cells to table and figure; `only` trains."""
    from sbeval import device as devices
    from sbeval import distributed, registry, study, sweep
    from sbeval.place import Place
    from sbeval.schema import Part, uncut

    module = registry.task(name)
    if distributed.size() > 1 and name != "length_gen":
        raise InputError(f"{name.replace('_', '-')} runs in one process: start it without torchrun")
    where = devices.pick(distributed.local_device(device))
    preset = preset or ("quick" if where.type == "cpu" else "small")
    changes = {
        key: tuple(value) if isinstance(value, list) else value for key, value in given.items() if value is not None
    }
    config = dataclasses.replace(
        module.PRESETS[choose("preset", preset, module.PRESETS)],
        dtype=devices.pick_dtype(dtype, where),
        **uncut(changes),
    )
    part = Part(family=name, preset=preset, config=config)
    with distributed.joined(where) as world:
        place = Place(
            results_dir=results_dir, device=where, force=force, tensorboard=tensorboard, world=world, shard=shard
        )
        if not only or dry_run:
            _run([part], place, how or sweep.HERE, dry_run=dry_run)
        elif not _resumable(lambda: study.train(part, place, _console(place)), force):
            raise typer.Exit(1)


def _run(parts: "list[Part]", place: "Place", how: "Executor", *, dry_run: bool, name: str | None = None) -> None:
    """Run what has no result yet, or say what that would cost: of a study, which has a name, as a table."""
    from sbeval import plan, study

    console = _console(place)
    for line in study.notes(parts):
        study.say(console, line)
    if not dry_run:
        if not _resumable(lambda: study.run(parts, place, console, how), place.force):
            raise typer.Exit(1)
    elif name is None:
        plan.list_cells(parts[0], place, console, how)
    else:
        console.print(plan.table(f"Study {name}", parts, place))


def _console(place: "Place") -> Console:
    """Where to say things: of several processes one speaks."""
    return Console(quiet=not place.world.leads)


def _resumable(work: Callable[[], bool], force: bool) -> bool:
    from sbeval.pool import terminable

    try:
        with terminable():
            return work()
    except KeyboardInterrupt:
        then = "starts over" if force else "goes on from there"
        print(f"sbeval: stopped; what is done is kept, and the same command {then}", file=sys.stderr)
        raise typer.Exit(130) from None


def main() -> None:
    """Run the command line; an error of the user's is one line and exit code 2."""
    try:
        app()
    except InputError as error:
        print(f"sbeval: {error}", file=sys.stderr)
        sys.exit(2)
