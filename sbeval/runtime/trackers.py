"""Where training curves are shown as they grow: TensorBoard, Weights & Biases, trackio. Run files hold them anyway.

tensorboard:FOLDER    wandb:PROJECT    trackio:PROJECT
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from sbeval.errors import InputError, choose

# logs the numbers of a step
Log = Callable[[int, dict[str, float]], None]
# what each needs: a module, and how it is installed
PACKAGES = {
    "tensorboard": ("torch.utils.tensorboard", "'sbeval[tensorboard]'"),
    "wandb": ("wandb", "wandb"),
    "trackio": ("trackio", "trackio"),
}


def check(specs: Sequence[str]) -> None:
    """Raise InputError unless each is `kind:where`, and its package is installed."""
    for spec in specs:
        kind, _, where = spec.partition(":")
        choose("tracker", kind, PACKAGES)
        if not where:
            raise InputError(f"--track {kind} needs a {'folder' if kind == 'tensorboard' else 'project'}: {kind}:NAME")
        _package(kind)


@contextmanager
def opened(specs: Sequence[str], name: str) -> Iterator[Log | None]:
    """Yield a function that logs the training `name` to each tracker; None without any. Raise InputError as `check`."""
    check(specs)
    with ExitStack() as stack:
        logs = []
        for spec in specs:
            kind, _, where = spec.partition(":")
            log, close = (_tensorboard if kind == "tensorboard" else _hosted)(_package(kind), where, name)
            stack.callback(close)
            logs.append(log)

        def every(step: int, numbers: dict[str, float]) -> None:
            for log in logs:
                log(step, numbers)

        yield every if logs else None


def _package(kind: str) -> Any:
    module, install = PACKAGES[kind]
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(f"--track {kind}:... needs the {kind} package: pip install {install}") from None


def _tensorboard(module: Any, where: str, name: str) -> tuple[Log, Callable[[], None]]:
    folder = Path(where) / name
    try:
        writer = module.SummaryWriter(folder)
    except OSError as error:
        raise InputError(f"cannot write TensorBoard logs to {folder}: {error.strerror}") from None

    def log(step: int, numbers: dict[str, float]) -> None:
        for metric, value in numbers.items():
            writer.add_scalar(metric, value, step)
        writer.flush()

    return log, writer.close


def _hosted(module: Any, where: str, name: str) -> tuple[Log, Callable[[], None]]:
    """Begin a run of Weights & Biases, or of trackio, which has the same functions."""
    run = module.init(project=where, name=name)
    return lambda step, numbers: run.log(numbers, step=step), run.finish
