"""Without a GPU, Triton kernels are interpreted: that, and how many threads there are, is said before imports.

With one most of the time goes into compiling: kernels' tests are then dealt out singly to many processes, where without
one a module's stay together, in two.
"""

import importlib.util
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

# tests run in two processes, and start others: each with threads for all cores would wait for the others'
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

GPU = torch.cuda.is_available()
KERNELS = Path(__file__).parent / "kernels"
# tests and a process of its own for each take 0.7 GB of the GPU's memory
PROCESSES = 16

if GPU:
    # the processes of the tests keep all cores busy
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
else:
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    return min(PROCESSES, len(os.sched_getaffinity(0))) if GPU else 2


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    # commands leave signals ignored that were so when they began, as in the background or under nohup: tests send them
    for name, action in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(name) is signal.SIG_IGN:
            signal.signal(name, action)
    if GPU and config.option.dist == "loadscope":
        config.option.dist = "loadgroup"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what takes long where another test does nearly the same; SBEVAL_TESTS=full runs everything."""
    for item in items:
        if GPU and KERNELS not in item.path.parents:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    if os.environ.get("SBEVAL_TESTS") != "full":
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: SBEVAL_TESTS=full runs it"))


@pytest.fixture(scope="session")
def odd_models() -> Any:
    """The module of tiny, odd models beside this one."""
    pytest.importorskip("transformers")
    spec = importlib.util.spec_from_file_location("odd_models", Path(__file__).with_name("odd_models.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    def switch(mode: str) -> None:
        with warnings.catch_warnings():
            # once a process; the mode is changed before the warning, which must not end the test with the mode on
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype", UserWarning)
            torch.cuda.set_sync_debug_mode(mode)

    switch("error")
    try:
        yield
    finally:
        switch("default")


@pytest.fixture
def waiting_is_an_error() -> Callable[[], AbstractContextManager[None]]:
    """A context in which an operation that waits for the GPU raises RuntimeError."""
    return _waiting_is_an_error


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of four short documents to train on and four to test on."""
    folder = tmp_path_factory.mktemp("texts")
    for number in range(4):
        for role in ("train", "test"):
            words = (f"{role} {number}: the {i * (number + 3) % 17}th word; " for i in range(20))
            (folder / f"{role}{number}.txt").write_text("".join(words))
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home folder, so that nothing is read from or written to the user's."""
    import matplotlib

    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        # fonts are listed once a machine
        patch.setenv("MPLCONFIGDIR", matplotlib.get_cachedir())
        patch.setenv("HOME", str(folder))
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield folder
