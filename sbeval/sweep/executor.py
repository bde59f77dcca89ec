"""Executors: run tasks in this process, in worker processes, or as Ray tasks.

If a worker dies (killed, out of memory, a lost host), its task is retried by another worker, so work that writes
checkpoints resumes from the last one. Results are yielded as they complete, in any order.
"""

import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sbeval.errors import InputError, choose
from sbeval.runtime.signals import terminable
from sbeval.sweep import pool
from sbeval.sweep.pool import RETRIES, Hear, Item, Lost, Result, Then

KINDS = ("local", "ray")
# seconds that a Ray cluster has to answer
ANSWER_S = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class Executor:
    """Options of an executor.

    workers: processes that share this machine and its GPUs, or CPUs of a local Ray cluster; None: this process alone
    (`local`), or all CPUs that Ray finds. address: of a running Ray cluster. gpus_per_cell: fraction of a GPU that a
    Ray task reserves; None: a whole GPU if there are any.
    """

    kind: str = "local"
    workers: int | None = None
    address: str | None = None
    gpus_per_cell: float | None = None

    def __post_init__(self) -> None:
        choose("executor", self.kind, KINDS)
        if self.workers is not None and self.workers < 1:
            raise InputError(f"--workers must be at least 1; got {self.workers}")
        if self.gpus_per_cell is not None and not 0 <= self.gpus_per_cell < math.inf:
            raise InputError(f"--gpus-per-cell must be at least 0; got {self.gpus_per_cell}")
        if self.kind == "local" and (self.address or self.gpus_per_cell is not None):
            raise InputError("--address and --gpus-per-cell are for --executor ray")
        if self.address and self.workers:
            raise InputError("--workers starts a Ray cluster here and --address joins another: give one of them")

    @property
    def alone(self) -> bool:
        """True if tasks run in this process."""
        return self.kind == "local" and (self.workers or 1) == 1

    def run(
        self,
        work: Callable[[Item], Result],
        items: Sequence[Item],
        then: Then[Item] | None = None,
        *,
        gpus: Sequence[str] = (),
        hear: Hear | None = None,
    ) -> Iterator[tuple[Item, Result | Lost]]:
        """Yield each item with the result of `work`, or with Lost if its worker died repeatedly.

        then: called after the result of an item was consumed; returns the items that are now ready, which run before
        those that wait. Exceptions of `work` propagate and cancel the other items. Outside this process `work` and
        items must be picklable. gpus: see `pool.run`; Ray assigns GPUs itself. hear: receives the messages that workers
        send by `pool.tell`.
        """
        if self.alone:
            return _in_process(work, items, then)
        if self.kind == "ray":
            return _in_ray(work, items, self, then)
        return pool.run(work, items, self.workers or 1, then, gpus=gpus, hear=hear)


def _in_process(
    work: Callable[[Item], Result], items: Sequence[Item], then: Then[Item] | None
) -> Iterator[tuple[Item, Result | Lost]]:
    waiting = list(reversed(items))
    while waiting:
        item = waiting.pop()
        yield item, work(item)
        waiting.extend(reversed(then(item) if then else ()))


def _in_ray(
    work: Callable[[Item], Result], items: Sequence[Item], how: Executor, then: Then[Item] | None
) -> Iterator[tuple[Item, Result | Lost]]:
    try:
        import ray
        from ray.exceptions import OutOfMemoryError, RayTaskError, WorkerCrashedError
    except ImportError:
        raise InputError("--executor ray needs the ray package: pip install 'sbeval[ray]'") from None
    with _cluster(ray, how), terminable():

        def call(work: Callable[[Item], Result], item: Item) -> Result:
            return work(item)

        # retry a task whose worker dies, not one that raises
        task: Any = ray.remote(max_retries=RETRIES, num_cpus=1, num_gpus=_share(ray, how))(call)
        # submit `work` per task: its state may have changed
        pending = {task.remote(work, item): item for item in items}
        while pending:
            (ready,), _ = ray.wait(list(pending), num_returns=1)
            item = pending.pop(ready)
            try:
                result = ray.get(ready)
            except (WorkerCrashedError, OutOfMemoryError) as error:
                result = Lost(str(error).splitlines()[0])
            except RayTaskError as error:
                raise error.cause from None
            yield item, result
            pending |= {task.remote(work, new): new for new in (then(item) if then else ())}


def _share(ray: Any, how: Executor) -> float:
    """Return the fraction of a GPU that a task reserves; InputError if there are too few: it would wait forever."""
    available = float(ray.cluster_resources().get("GPU", 0))
    if how.gpus_per_cell is None:
        return min(1.0, available)
    if how.gpus_per_cell > available:
        raise InputError(f"--gpus-per-cell {how.gpus_per_cell:g} is more than the Ray cluster has: {available:g} GPUs")
    return how.gpus_per_cell


@contextmanager
def _cluster(ray: Any, how: Executor) -> Iterator[None]:
    """Connect to the cluster at the address, or run a local one for the duration of the block."""
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    local = {} if how.address else {"num_cpus": how.workers} | quiet
    if how.address:
        _check_answers(how.address)
    ray.init(how.address or "local", **local)
    try:
        yield
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Raise InputError where no cluster answers: in a process of its own, since Ray tries for minutes, unstoppable."""
    joins = "import ray, sys; print(flush=True); ray.init(sys.argv[1], logging_level='ERROR', log_to_driver=False)"
    command = [sys.executable, "-c", joins, address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as probe:
        assert probe.stdout is not None
        # the time of the import is this machine's
        probe.stdout.readline()
        try:
            said = probe.communicate(timeout=ANSWER_S)[1].strip()
        except subprocess.TimeoutExpired:
            probe.kill()
            raise InputError(f"no Ray cluster answers at {address} within {ANSWER_S} s: is it running?") from None
    if probe.returncode:
        raise InputError(f"no Ray cluster at {address}: {said.splitlines()[-1] if said else 'it gives no reason'}")
