"""Items worked on in processes of this machine, one at a time in each.

    worker      0        1        2        3        4        5
    GPU of 4    0        1        2        3        0        1

Each worker is a pool of one process, so that it is known whose died: the others go on, and the process that takes its
place is on the same GPU. Caches on disk of what was compiled are shared: Inductor and Triton rename what they write.
"""

import multiprocessing
import os
import pickle
import select
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any, TypeVar

# times that an item is begun again after its worker died
RETRIES = 3
# seconds that a worker has to save what it trains when the driver ends
GRACE_S = 30

Item = TypeVar("Item")
Result = TypeVar("Result")
# what can begin when an item is done
Then = Callable[[Item], Sequence[Item]]
# who is told what the worker of this number said, None when it died
Hear = Callable[[int, Any], None]

# in a worker: its number, and the driver's ear
_me: tuple[int, Connection] | None = None


@dataclass(frozen=True, slots=True)
class Lost:
    """No result: the worker died each time, for this reason."""

    reason: str


def run(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    workers: int,
    then: Then[Item] | None = None,
    *,
    gpus: Sequence[str] = (),
    hear: Hear | None = None,
) -> Iterator[tuple[Item, Result | Lost]]:
    """Yield each item with what `work` makes of it, or Lost where its worker died again and again.

    gpus: what CUDA_VISIBLE_DEVICES says in the workers, in turn; none is what it says here. An item whose worker died
    begins again at once, the next time when all others are done, alone: it may want more memory than they leave.
    """
    waiting = [(item, 0) for item in reversed(items)]
    alone: list[tuple[Item, int]] = []
    begun: dict[Future[Result], tuple[_Worker, Item, int]] = {}
    with _workers(workers if then else min(workers, len(items)), gpus, hear) as free:
        while waiting or begun or alone:
            if not waiting and not begun:
                waiting.append(alone.pop())
            while waiting and free:
                worker, (item, deaths) = _least_busy(free, begun.values()), waiting.pop()
                free.remove(worker)
                begun[worker.submit(work, item)] = worker, item, deaths
            for future in wait(begun, return_when=FIRST_COMPLETED).done:
                worker, item, deaths = begun.pop(future)
                free.append(worker)
                if not isinstance(future.exception(), BrokenProcessPool):
                    yield item, future.result()
                else:
                    worker.renew()
                    if deaths < RETRIES:
                        (alone if deaths else waiting).append((item, deaths + 1))
                        continue
                    yield item, Lost(f"its process died {deaths + 1} times; is the machine short of memory?")
                waiting.extend((new, 0) for new in reversed(then(item) if then else ()))


def tell(message: tuple[Any, ...]) -> None:
    """In a worker, say something small to who hears at the driver; elsewhere, and where nobody does, nothing."""
    if _me is not None:
        number, ear = _me
        _say(ear, (number, message))


def _say(ear: Connection, what: object) -> None:
    said = pickle.dumps(what)
    # the system writes so much at once: nothing mixes with what others say, or is cut short by a kill
    assert len(said) + 4 <= select.PIPE_BUF, what
    # a worker whose driver was killed has yet to save what it trains
    with suppress(BrokenPipeError):
        ear.send_bytes(said)


@contextmanager
def terminable() -> Iterator[None]:
    """Make SIGTERM what Ctrl-C is, so that what stops says so, and workers do not outlive their driver."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Worker:
    """A process that starts with its first item. gpu: what CUDA_VISIBLE_DEVICES says in it; None: what it says here."""

    def __init__(self, number: int, workers: int, gpu: str | None, ear: Connection | None) -> None:
        self.number, self.gpu, self._ear = number, gpu, ear
        self._options = (os.getpid(), number, workers, gpu, ear)
        self.pool = self._pool()

    def submit(self, work: Callable[[Item], Result], item: Item) -> Future[Result]:
        try:
            return self.pool.submit(_guarded, work, item)
        except BrokenProcessPool:
            # it died with nothing in hand
            self.renew()
            return self.pool.submit(_guarded, work, item)

    def renew(self) -> None:
        """Put another process in the place of one that died."""
        self.pool.shutdown()
        self.pool = self._pool()
        if self._ear is not None:
            _say(self._ear, (self.number, None))

    def terminate(self) -> None:
        for process in list((self.pool._processes or {}).values()):
            process.terminate()

    def _pool(self) -> ProcessPoolExecutor:
        # a forked process could not use the GPU
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(1, mp_context=context, initializer=_begin, initargs=self._options)


def _least_busy(free: Sequence[_Worker], begun: Any) -> _Worker:
    """The first of the free workers on the GPU where the fewest others are at work."""
    busy = Counter(worker.gpu for worker, *_ in begun)
    return min(free, key=lambda worker: (busy[worker.gpu], worker.number))


@contextmanager
def _workers(count: int, gpus: Sequence[str], hear: Hear | None) -> Iterator[list[_Worker]]:
    """Workers that end with the block: what runs then is told to stop, saves and does so."""
    with _listening(hear) as ear:
        found = [_Worker(number, count, gpus[number % len(gpus)] if gpus else None, ear) for number in range(count)]
        try:
            with terminable():
                # a copy, which shrinks and grows
                yield list(found)
        except BaseException:
            for worker in found:
                worker.terminate()
            raise
        finally:
            for worker in found:
                worker.pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _listening(hear: Hear | None) -> Iterator[Connection | None]:
    """What workers speak into, each message in one piece, while a thread hands it on."""
    if hear is None:
        yield None
        return
    heard, ear = multiprocessing.Pipe(duplex=False)

    def listen() -> None:
        # so that nobody who speaks on waits when this ends early
        with heard:
            while (said := heard.recv()) is not None:
                hear(*said)

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield ear
    finally:
        with ear:
            _say(ear, None)
            thread.join()


def _guarded(work: Callable[[Item], Result], item: Item) -> Result:
    """Work; a process that is told to stop does so once that is done, without a wait for its queue."""
    try:
        return work(item)
    except KeyboardInterrupt:
        os._exit(1)


def _begin(driver: int, number: int, workers: int, gpu: str | None, ear: Connection | None) -> None:
    """Take a GPU and a share of the CPUs, and stop when the driver is gone without a word."""
    global _me
    _me = None if ear is None else (number, ear)
    if gpu is not None:
        # before anything looks at the GPUs; all that this process starts sees this one too
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    import torch

    share = max(1, torch.get_num_threads() // workers)
    torch.set_num_threads(share)
    # before the compiler looks; it would start processes for all CPUs
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(share))

    def watch() -> None:
        while os.getppid() == driver:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
