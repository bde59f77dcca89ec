"""A pool of worker processes on this machine, each running one item at a time.

    worker      0        1        2        3        4        5
    GPU of 4    0        1        2        3        0        1

Each worker is a pool of one process, so that a death can be attributed to its item: the others continue, and the
replacement runs on the same GPU. Compile caches on disk are shared: Inductor and Triton write by renaming.
"""

import multiprocessing
import os
import pickle
import select
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from sbeval.runtime.signals import terminable, unheard

# retries of an item whose worker died
RETRIES = 3
# seconds that a worker has to save a checkpoint after the driver died
GRACE_S = 30
# seconds for the last lines of a worker that ended
ANSWER_S = 1

Item = TypeVar("Item")
Result = TypeVar("Result")
# returns the items that are ready once an item is done
Then = Callable[[Item], Sequence[Item]]
# receives the number of a worker and its message, None if it died
Hear = Callable[[int, Any], None]

# in a worker: its number, and the connection to the driver
_me: tuple[int, Connection] | None = None


@dataclass(frozen=True, slots=True)
class Lost:
    """No result: the worker died at each attempt, for this reason."""

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
    """Yield each item with the result of `work`, or with Lost if its worker died repeatedly.

    gpus: values of CUDA_VISIBLE_DEVICES, assigned to workers round-robin; empty: as in this process. A worker prefers
    items that one of its own made ready: it has compiled the code of their model. An item whose worker died is retried
    at once, from the second time on alone, after all others: it may need their memory.
    """
    # item, deaths, and the worker that made it ready
    waiting: list[tuple[Item, int, _Worker | None]] = [(item, 0, None) for item in reversed(items)]
    alone: list[tuple[Item, int, _Worker | None]] = []
    begun: dict[Future[Result], tuple[_Worker, Item, int]] = {}
    with _workers(workers if then else min(workers, len(items)), gpus, hear) as free:
        while waiting or begun or alone:
            if not waiting and not begun:
                waiting.append(alone.pop())
            while waiting and free:
                worker = _least_busy(free, begun.values())
                own = (index for index in reversed(range(len(waiting))) if waiting[index][2] is worker)
                item, deaths, _ = waiting.pop(next(own, -1))
                free.remove(worker)
                begun[worker.submit(work, item)] = worker, item, deaths
            for future in wait(begun, return_when=FIRST_COMPLETED).done:
                worker, item, deaths = begun.pop(future)
                free.append(worker)
                if not isinstance(future.exception(), BrokenProcessPool):
                    yield item, future.result()
                else:
                    cause = worker.renew()
                    if deaths < RETRIES:
                        (alone if deaths else waiting).append((item, deaths + 1, worker))
                        continue
                    yield item, Lost(f"its process died {deaths + 1} times, at last {cause}")
                waiting.extend((new, 0, worker) for new in reversed(then(item) if then else ()))


def tell(message: tuple[Any, ...]) -> None:
    """Send a small message from a worker to `hear` in the driver; do nothing elsewhere, or if nothing listens."""
    if _me is not None:
        number, connection = _me
        _send(connection, (number, message))


def _send(connection: Connection, message: object) -> None:
    data = pickle.dumps(message)
    # writes up to PIPE_BUF are atomic: no interleaving with other workers, no partial message after a kill
    assert len(data) + 4 <= select.PIPE_BUF, message
    # a worker whose driver was killed still has to save its checkpoint
    with suppress(BrokenPipeError):
        connection.send_bytes(data)


class _Worker:
    """A process that starts with its first item. gpu: its CUDA_VISIBLE_DEVICES; None: that of this process."""

    pool: ProcessPoolExecutor
    _process: BaseProcess | None

    def __init__(self, number: int, workers: int, gpu: str | None, connection: Connection | None) -> None:
        self.number, self.gpu, self._connection = number, gpu, connection
        self._options = (os.getpid(), number, workers, gpu, connection)
        self._begin()

    def submit(self, work: Callable[[Item], Result], item: Item) -> Future[Result]:
        # what a terminal sends to all processes is for this one, which lets the others save
        with unheard():
            try:
                return self._submit(work, item)
            except BrokenProcessPool:
                # it died while idle
                self.renew()
                return self._submit(work, item)

    def _submit(self, work: Callable[[Item], Result], item: Item) -> Future[Result]:
        future = self.pool.submit(_guarded, work, item)
        # a pool that broke forgets its process
        self._process = next(iter((self.pool._processes or {}).values()), self._process)
        return future

    def renew(self) -> str:
        """Replace a process that died, and return what is known of its death."""
        self.end()
        cause = _cause(self._process.exitcode if self._process else None, self._errors.last)
        self._begin()
        if self._connection is not None:
            _send(self._connection, (self.number, None))
        return cause

    def end(self) -> None:
        """Wait until the process has ended."""
        self.pool.shutdown(wait=True, cancel_futures=True)
        self._errors.close()

    def terminate(self) -> None:
        for process in list((self.pool._processes or {}).values()):
            process.terminate()

    def _begin(self) -> None:
        # CUDA cannot be used in a forked process
        context = multiprocessing.get_context("spawn")
        self._errors, self._process = _Errors(), None
        options = (*self._options, self._errors.sender)
        self.pool = ProcessPoolExecutor(1, mp_context=context, initializer=_begin, initargs=options)


class _Errors:
    """The standard error of a worker, which appears on that of this process; `last` is its last line."""

    def __init__(self) -> None:
        self._receiver, self.sender = multiprocessing.Pipe(duplex=False)
        self._lines: deque[str] = deque(maxlen=1)
        self._thread = threading.Thread(target=self._pass_on, daemon=True)
        self._thread.start()

    @property
    def last(self) -> str:
        return self._lines[0] if self._lines else ""

    def close(self) -> None:
        """Wait for what a process that ended has written; its own children may still hold the other end."""
        self.sender.close()
        self._thread.join(timeout=ANSWER_S)

    def _pass_on(self) -> None:
        with self._receiver, open(os.dup(self._receiver.fileno()), encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.strip():
                    self._lines.append(line.strip())
                print(line, end="", file=sys.stderr, flush=True)


def _cause(code: int | None, last: str) -> str:
    """Describe a death by exit code, negative for a signal, and the last line of standard error."""
    if code is not None and code < 0:
        how = f"by {signal.Signals(-code).name}"
    else:
        how = "without an exit code" if code is None else f"with exit code {code}"
    # what the kernel sends when memory runs out, and nothing else says
    hint = "is the machine short of memory?" if code == -signal.SIGKILL else ""
    return ": ".join(filter(None, [how, last or hint]))


def _least_busy(free: Sequence[_Worker], begun: Any) -> _Worker:
    """Return the first free worker on the GPU with the fewest busy workers."""
    busy = Counter(worker.gpu for worker, *_ in begun)
    return min(free, key=lambda worker: (busy[worker.gpu], worker.number))


@contextmanager
def _workers(count: int, gpus: Sequence[str], hear: Hear | None) -> Iterator[list[_Worker]]:
    """Yield workers that end with the block; on an error running work is terminated, after saving."""
    with _listening(hear) as connection:
        workers = [
            _Worker(number, count, gpus[number % len(gpus)] if gpus else None, connection) for number in range(count)
        ]
        try:
            with terminable():
                # a copy, which the caller changes
                yield list(workers)
        except BaseException:
            for worker in workers:
                worker.terminate()
            raise
        finally:
            for worker in workers:
                worker.end()


@contextmanager
def _listening(hear: Hear | None) -> Iterator[Connection | None]:
    """Yield the connection to which workers send messages, while a thread passes these to `hear`."""
    if hear is None:
        yield None
        return
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def listen() -> None:
        # close it if `hear` raises, so that no sender blocks
        with receiver:
            while (message := receiver.recv()) is not None:
                hear(*message)

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield sender
    finally:
        with sender:
            _send(sender, None)
            thread.join()


def _guarded(work: Callable[[Item], Result], item: Item) -> Result:
    """Run `work`; on an interrupt exit at once, without waiting for the queue."""
    try:
        return work(item)
    except KeyboardInterrupt:
        os._exit(1)


def _begin(
    driver: int, number: int, workers: int, gpu: str | None, connection: Connection | None, errors: Connection
) -> None:
    """Set up a worker: its GPU, its share of the CPUs, and a thread that stops it if the driver died."""
    global _me
    own = os.dup(2)
    os.dup2(errors.fileno(), 2)
    errors.close()
    _me = None if connection is None else (number, connection)
    if gpu is not None:
        # before anything queries the GPUs; inherited by child processes
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    import torch

    share = max(1, torch.get_num_threads() // workers)
    torch.set_num_threads(share)
    # before Inductor is imported; by default it starts a process per CPU
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(share))

    def watch() -> None:
        while os.getppid() == driver:
            time.sleep(1)
        # nobody passes on what it says from here on
        os.dup2(own, 2)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
