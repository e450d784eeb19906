"""Run a function over items, in this process or on Ray actors. The only importer of ray; knows nothing of images.

    run(make, items) -> Outcome per item, in any order

`make()` runs once in each worker and returns a function of one item (heavy state is loaded there). An item that fails,
or whose worker dies, goes to the end of the queue and is tried once more; the others go on meanwhile.
"""

import logging
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

TRIES = 2
USER_MODULE = "k2_user_recipe"  # a user's recipe file: only the driver has it, so it travels to the workers by value

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """An item with what its function returned, or with the error of its last try."""

    item: Any
    value: Any = None
    error: str | None = None


def run(
    make: Callable[[], Callable[[Any], Any]], items: Iterable[Any], address: str = "auto", num_workers: int | None = None
) -> Iterator[Outcome]:
    """Yield one Outcome per item.

    Args:
        make: picklable; called once per worker.
        items: picklable.
        address: "off" (this process), "auto" (a running Ray cluster, else one on this machine) or a Ray address.
        num_workers: Ray actors; default one per GPU of the cluster, else one per CPU.

    Raises:
        ValueError: more workers than the cluster has room for.
        RuntimeError: a worker cannot start (its cause is in the text).
    """
    items = list(items)
    if not items:
        return
    yield from _here(make, items) if address == "off" else _on_ray(make, items, address, num_workers)


def _here(make: Callable[[], Callable[[Any], Any]], items: list[Any]) -> Iterator[Outcome]:
    function = make()
    queue = deque((item, 1) for item in items)
    while queue:
        item, tries = queue.popleft()
        try:
            yield Outcome(item, function(item))
        except Exception as error:  # any failure of an item is an Outcome; the caller decides what it means
            log.warning("%s failed (try %d of %d): %s", getattr(item, "name", item), tries, TRIES, error)
            if tries < TRIES:
                queue.append((item, tries + 1))
            else:
                yield Outcome(item, error=f"{type(error).__name__}: {error}")


class _Worker:
    """The Ray actor: the function that `make` returned, and nothing else."""

    def __init__(self, make: Callable[[], Callable[[Any], Any]]):
        self.function = make()

    def ready(self) -> bool:
        return True

    def call(self, item: Any) -> Any:
        return self.function(item)


def _on_ray(make: Callable[[], Callable[[Any], Any]], items: list[Any], address: str, num_workers: int | None) -> Iterator[Outcome]:
    import ray

    ours = not ray.is_initialized()
    if ours:
        place = {"include_dashboard": False} if address == "auto" else {"address": address}
        ray.init(**place, log_to_driver=False, logging_level=logging.ERROR)
    try:
        resources = ray.cluster_resources()
        num_gpus = int(resources.get("GPU", 0))
        room = num_gpus or int(resources.get("CPU", 1))
        if num_workers is not None and not 1 <= num_workers <= room:
            raise ValueError(f"--workers {num_workers} does not fit: the Ray cluster has room for 1 to {room}")
        worker_class = ray.remote(num_cpus=1, num_gpus=1 if num_gpus else 0)(_Worker)
        if USER_MODULE in sys.modules:
            ray.cloudpickle.register_pickle_by_value(sys.modules[USER_MODULE])
        shared_make = ray.put(make)
        idle = [worker_class.remote(shared_make) for _ in range(min(num_workers or room, len(items)))]
        _await_start(ray, idle)
        queue = deque((item, 1) for item in items)
        busy: dict[Any, tuple[Any, Any, int]] = {}
        while queue or busy:
            while queue and idle:
                item, tries = queue.popleft()
                worker = idle.pop()
                busy[worker.call.remote(item)] = (worker, item, tries)
            (reference,), _ = ray.wait(list(busy), num_returns=1)
            worker, item, tries = busy.pop(reference)
            try:
                value = ray.get(reference)
            except ray.exceptions.RayError as error:
                if isinstance(error, ray.exceptions.RayTaskError):
                    cause = f"{type(error.cause).__name__}: {error.cause}"
                else:
                    cause = "the worker died (killed, out of memory, or its node is lost)"
                    ray.kill(worker)
                    worker = worker_class.remote(shared_make)
                    _await_start(ray, [worker])
                log.warning("%s failed (try %d of %d): %s", getattr(item, "name", item), tries, TRIES, cause)
                if tries < TRIES:
                    queue.append((item, tries + 1))
                else:
                    yield Outcome(item, error=cause)
            else:
                yield Outcome(item, value)
            idle.append(worker)
    finally:
        if ours:
            ray.shutdown()


def _await_start(ray: Any, workers: list[Any]) -> None:
    """A worker that cannot start (missing weights, import error) would fail every item: end the job with its cause."""
    try:
        ray.get([worker.ready.remote() for worker in workers])
    except ray.exceptions.RayError as error:
        raise RuntimeError(f"a worker cannot start: {getattr(error, 'cause', None) or error}") from error
