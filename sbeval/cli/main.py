"""The command line. Commands import heavy modules when they run, so that `--help` is fast."""

import importlib.util
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from sbeval import __version__
from sbeval.cli import options, results, sweeps
from sbeval.cli.bench import bench
from sbeval.cli.options import TOOLS, Device, ResultsDir
from sbeval.errors import InputError, reason
from sbeval.runtime import signals, streams
from sbeval.runtime.console import print_table, say


class _Commands(options.Commands):
    """All commands: what fails outside of sbeval is an InputError, where no place that knows more has said so."""

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            # not when Python ends, where an error could not be told
            sys.stdout.flush()
            return result
        except BrokenPipeError:
            raise
        except (OSError, EOFError) as error:
            name = getattr(error, "filename", None)
            raise InputError(f"cannot read or write {name}: {reason(error)}" if name else reason(error)) from error
        except KeyboardInterrupt:
            signals.ignore()
            raise


app = typer.Typer(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Evaluate stick-breaking attention and its baselines (Tan et al., ICLR 2025, arXiv 2410.17980).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
sweeps.add(app)

CorpusSpec = Annotated[
    str | None, typer.Option("--corpus", help="python, stdlib, a file or folder, or hf:NAME[:CONFIG].")
]
TextField = Annotated[str | None, typer.Option(help="Field of the text in JSONL and parquet.")]


def _version(asked: bool) -> None:
    if asked:
        print(f"sbeval {__version__}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Evaluate stick-breaking attention and its baselines (Tan et al., ICLR 2025, arXiv 2410.17980)."""


@app.command(rich_help_panel=TOOLS)
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder of sbeval.", metavar="CHECKPOINT")],
    out: Annotated[Path, typer.Argument(help="Output folder, which must be new or empty.", metavar="OUT")],
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Tokenizer of training, to be given: bytes, bpe:SIZE with --corpus, a file, folder or name; or none."
        ),
    ] = None,
    corpus: CorpusSpec = None,
    text_field: TextField = None,
    code: Annotated[
        bool, typer.Option("--code", help="Add the code by which trust_remote_code=True loads it in other tools.")
    ] = False,
    push: Annotated[
        str | None, typer.Option(help="Then upload it to this repository of the Hugging Face hub.", metavar="USER/NAME")
    ] = None,
) -> None:
    """Export a checkpoint as a Hugging Face model, which loads after `import sbeval.hf`."""
    if not importlib.util.find_spec("transformers"):
        raise InputError("export needs transformers: pip install 'sbeval[hf]'")
    from sbeval import hf, hf_card

    hf.export(checkpoint, out, hf.tokenizer_of(tokenizer, corpus, text_field or "text"), code=code)
    say(str(out))
    if push is not None:
        say(hf_card.push(out, push))


@app.command(rich_help_panel=TOOLS)
def doctor(device: Device = None, results_dir: ResultsDir = Path("results")) -> None:
    """Report what this machine can run: devices, attention methods, optional packages, presets that fit."""
    from sbeval.doctor import examine
    from sbeval.runtime import device as devices

    report = examine(devices.pick(device), results_dir)
    for section in report.sections:
        print_table(section.title, section.headings, section.rows)
    if not report.able:
        raise typer.Exit(1)


results.add(app)
app.add_typer(bench, name="bench", rich_help_panel=TOOLS)


def main() -> None:
    """Run the command line; a mistake in its options, or an InputError, is printed as one line, with exit code 2."""
    with streams.guarded(), signals.terminable():
        try:
            sys.exit(app(standalone_mode=False) or 0)
        except options.UsageError as error:
            line = options.mistake(error)
        except InputError as error:
            line = str(error)
        # standard error may be what cannot be written
        with suppress(OSError):
            if line:
                print(f"sbeval: {line}", file=sys.stderr)
        sys.exit(2)
