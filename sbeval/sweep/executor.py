"""Where the items of a long list are worked on: in this process, in several, or as Ray tasks.

A worker that dies (killed, out of memory, a lost host) costs what it had in hand, which another worker begins again, so
work that leaves checkpoints goes on from the last. Results come back as they are ready, in any order.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sbeval.errors import InputError, choose
from sbeval.sweep import pool
from sbeval.sweep.pool import RETRIES, Hear, Item, Lost, Result, Then, terminable

KINDS = ("local", "ray")


@dataclass(frozen=True, slots=True, kw_only=True)
class Executor:
    """How to run. workers: processes that share this machine and its GPUs, or the CPUs of a local Ray cluster; None is
    this process alone (`local`), or all that Ray finds. address: of a running Ray cluster. gpus_per_cell: share of a
    GPU that a Ray task takes; None is a whole one where there are any."""

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
        """Whether the work runs in this process."""
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
        """Yield each item with what `work` makes of it, or Lost where its worker died again and again.

        `then` is asked what can begin now when what came of an item has been taken; that comes before what waits.
        What `work` raises is raised here, and ends the others. Where this is not this process alone, `work` and items
        must be picklable. gpus: see `pool.run`; Ray gives GPUs out itself. hear: told what `pool.tell` says in workers.
        """
        if self.alone:
            return _here(work, items, then)
        if self.kind == "ray":
            return _in_ray(work, items, self, then)
        return pool.run(work, items, self.workers or 1, then, gpus=gpus, hear=hear)


def _here(
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

        # a task that raises is not run again, one whose worker dies is
        task: Any = ray.remote(max_retries=RETRIES, num_cpus=1, num_gpus=_share(ray, how))(call)
        # `work` goes with each item: it may know more by then
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
    """Share of a GPU that a task takes. InputError where there are too few: it would wait for ever."""
    there = float(ray.cluster_resources().get("GPU", 0))
    if how.gpus_per_cell is None:
        return min(1.0, there)
    if how.gpus_per_cell > there:
        raise InputError(f"--gpus-per-cell {how.gpus_per_cell:g} is more than the Ray cluster has: {there:g} GPUs")
    return how.gpus_per_cell


@contextmanager
def _cluster(ray: Any, how: Executor) -> Iterator[None]:
    """The cluster at the address, or one of this machine for the length of the block."""
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    here = {} if how.address else {"num_cpus": how.workers} | quiet
    try:
        ray.init(how.address or "local", **here)
    except ConnectionError as error:
        raise InputError(f"no Ray cluster at {how.address}: {error}") from None
    try:
        yield
    finally:
        ray.shutdown()
