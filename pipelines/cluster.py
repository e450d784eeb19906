"""Run a function over items, in this process or on Ray actors. The only importer of ray; knows nothing of images.

    run(make, items)                      -> Outcome per item, in any order
    run(make, items, serve=make_server)   two pools: workers hand messages to servers, which hold the accelerators

`make()` runs once in each worker and returns a function of one item (heavy state is loaded there). An item that fails, or whose
worker dies, goes to the end of the queue and is tried again, TRIES times in all; the others go on meanwhile. Pools follow the
cluster: actors of lost nodes are replaced where there is room, and nodes that join get actors.

What is in flight is bounded: a worker has one item, and its messages fill at most its share of a quarter of the object store.
"""

import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.pools import Pool
from pipelines.survival import AGAIN

TRIES = 3
FREE_TRIES = 20  # tries that end with a lost node count against no item, up to so many
SENDS = 3  # servers that may die on one message
TICK_SECONDS = 2.0  # how often pools are compared with the cluster
PATIENCE_SECONDS = 30.0  # without any worker, before a warning
STORE_SHARE = 0.25  # of the object store, for messages
USER_MODULE = "k2_user_recipe"  # a user's recipe file: only the driver has it, so it travels to the workers by value

log = logging.getLogger(__name__)

Make = Callable[..., Callable[[Any], Any]]


@dataclass(frozen=True)
class Outcome:
    """An item with what its function returned, or with the error of its last try."""

    item: Any
    value: Any = None
    error: str | None = None
    tries: int = 1


@dataclass
class State:
    """How a run stands: what `watch` sees."""

    queued: int
    in_flight: int
    workers: int
    servers: int
    retries: int


@dataclass
class _Task:
    """An item on its way."""

    item: Any
    given: Any  # what the function gets: the item, or what `after_death` made of it
    tries: int = 0
    free: int = 0
    nodes: frozenset[str] = frozenset()  # alive when it was handed out


def run(
    make: Make,
    items: Iterable[Any],
    address: str = "auto",
    num_workers: int | None = None,
    serve: Make | None = None,
    num_servers: int | None = None,
    after_death: Callable[[Any], Any] = lambda item: item,
    watch: Callable[[State], None] = lambda state: None,
) -> Iterator[Outcome]:
    """Yield one Outcome per item.

    Args:
        make: picklable; called once per worker, as `make(ask=...)` where there are servers: `ask(message)` hands a message to a server
            and returns a function that waits for its answer. A message may say its size as `nbytes`.
        items: picklable.
        address: "off" (this process), "auto" (a running Ray cluster, else one on this machine) or a Ray address.
        num_workers: Ray actors with a CPU each; default as many as there is room for.
        serve: picklable; called once per server, returns a function of one message.
        num_servers: default one per GPU of the cluster. Without GPUs there are none unless asked for, and `make()` is called without `ask`.
        after_death: what to give the next worker when one died on an item.
        watch: called whenever something changed, and every few seconds.

    Raises:
        ValueError: more workers or servers than the cluster has room for.
        RuntimeError: a worker cannot start (its cause is in the text).
    """
    items = list(items)
    if not items:
        return
    if address == "off":
        yield from _here(make, items, watch)
    else:
        with _joined(address) as ray:
            yield from _Job(ray, make, items, num_workers, serve, num_servers, after_death, watch).outcomes()


def ranks(function: Callable[..., int | None], given: dict, num_workers: int, storage: str, address: str = "auto", tries: int = 20) -> int:
    """Run `function(**given)` as the ranks of a process group, with Ray Train: one GPU each where the cluster has any, else a CPU.

    `storage` is a folder that all nodes see. When a rank or node is lost, or a rank returns AGAIN, all start again, up to `tries`
    times. Returns 0, or what a rank returned. Needs `ray[train]`.
    """
    with _joined(address) as ray:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        found = Path(storage, "code")  # a result of Ray Train has no room for it without a checkpoint of its own
        found.unlink(missing_ok=True)

        def rank(arguments: dict) -> None:
            code = function(**arguments)
            if code == AGAIN:
                raise RuntimeError("a rank was asked to end")
            if code:
                found.write_text(str(code))

        room = ScalingConfig(num_workers=num_workers, use_gpu="GPU" in ray.cluster_resources())
        run = RunConfig(storage_path=storage, failure_config=FailureConfig(max_failures=tries))
        TorchTrainer(rank, train_loop_config=given, scaling_config=room, run_config=run).fit()
        return int(found.read_text()) if found.exists() else 0


def measure(name: str, value: float, **labels: str) -> None:
    """Add to a Prometheus metric of Ray's endpoint: a counter if the name ends in _total, a histogram if in _seconds, else a gauge.

    Does nothing outside Ray. Labels must have few values: Prometheus keeps a series for each.
    """
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return
    from ray.util import metrics

    if name not in _METERS:
        keys = tuple(labels)
        if name.endswith("_total"):
            _METERS[name] = metrics.Counter(name, tag_keys=keys).inc
        elif name.endswith("_seconds"):
            _METERS[name] = metrics.Histogram(name, boundaries=[0.1, 1, 10, 60, 600, 3600], tag_keys=keys).observe
        else:
            _METERS[name] = metrics.Gauge(name, tag_keys=keys).set
    if value > 0 or not name.endswith("_total"):  # Ray refuses to count zero
        _METERS[name](value, tags=labels)


_METERS: dict[str, Callable] = {}


def _here(make: Make, items: list[Any], watch: Callable[[State], None]) -> Iterator[Outcome]:
    function = make()
    queue, retries = deque((item, 1) for item in items), 0
    while queue:
        item, tries = queue.popleft()
        watch(State(len(queue), 1, 1, 0, retries))
        try:
            yield Outcome(item, function(item), tries=tries)
        except Exception as error:  # any failure of an item is an Outcome; the caller decides what it means
            cause = f"{type(error).__name__}: {error}"
            log.warning("%s failed (try %d of %d): %s", getattr(item, "name", item), tries, TRIES, cause)
            if tries < TRIES:
                queue.append((item, tries + 1))
                retries += 1
            else:
                yield Outcome(item, error=cause, tries=tries)


class _joined:
    """The Ray module, connected; what this started is shut down again."""

    def __init__(self, address: str):
        self.address = address

    def __enter__(self) -> Any:
        import ray

        self.ours = not ray.is_initialized()
        if self.ours:
            place = {"include_dashboard": False} if self.address == "auto" else {"address": self.address}
            ray.init(**place, log_to_driver=False, logging_level=logging.ERROR)
        if USER_MODULE in sys.modules:
            ray.cloudpickle.register_pickle_by_value(sys.modules[USER_MODULE])
        return ray

    def __exit__(self, *_: Any) -> None:
        if self.ours:
            sys.modules["ray"].shutdown()


class _ServersLost(Exception):
    """Every server that this worker knew has died."""


class _Worker:
    """The Ray actor of the first pool: the function that `make` returned, and nothing else."""

    def start(self, make: Make, max_bytes: int | None) -> None:
        # Not in __init__: an exception here is the task's own, with its type and text; there it is only "the actor died".
        self.service = None if max_bytes is None else _Service(max_bytes)
        self.function = make() if self.service is None else make(ask=self.service.ask)

    def call(self, given: Any, servers: list[Any]) -> Any:
        if self.service is not None:
            self.service.servers = servers
        return self.function(given)


class _Server:
    """The Ray actor of the second pool."""

    def start(self, serve: Make, one_at_a_time: bool) -> None:
        self.function = serve()
        # On an accelerator a second message is unpacked and copied over while the first is computed.
        self.turn = threading.Semaphore(1 if one_at_a_time else 2)

    def call(self, message: Any) -> Any:
        with self.turn:
            return self.function(message)

    def live(self) -> None:
        """Never returns: its reference ends when the server dies."""
        threading.Event().wait()


class _Service:
    """What a worker knows of the servers: hands each message to the one with the least of its own, and again when that one dies."""

    def __init__(self, max_bytes: int):
        self.max_bytes, self.servers = max_bytes, []
        self.open: dict[Any, tuple[Any, int]] = {}  # answer reference -> its server, bytes

    def ask(self, message: Any) -> Callable[[], Any]:
        import ray

        nbytes = getattr(message, "nbytes", 0)
        while self.open and nbytes + sum(size for _, size in self.open.values()) > self.max_bytes:
            for reference in ray.wait(list(self.open), num_returns=1)[0]:
                del self.open[reference]
        held = ray.put(message)
        sent = [self._send(held, nbytes)]

        def answer() -> Any:
            for left in reversed(range(SENDS)):
                reference, server = sent[0]
                try:
                    return ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause if isinstance(error.cause, Exception) else error from None
                except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError) as error:
                    self.servers = [other for other in self.servers if other is not server]
                    if not left:
                        raise RuntimeError(f"{SENDS} inference workers died on one batch") from error
                    sent[0] = self._send(held, nbytes)
                finally:
                    self.open.pop(reference, None)

        return answer

    def _send(self, held: Any, nbytes: int) -> tuple[Any, Any]:
        if not self.servers:
            raise _ServersLost("all inference workers died")
        loads = [sum(server is other for other, _ in self.open.values()) for server in self.servers]
        server = self.servers[loads.index(min(loads))]
        reference = server.call.remote(held)
        self.open[reference] = (server, nbytes)
        return reference, server


class _Job:
    """One run on Ray: queue, pools, and what is in flight."""

    def __init__(self, ray, make, items, num_workers, serve, num_servers, after_death, watch):
        self.ray, self.after_death, self.watch = ray, after_death, watch
        self.queue = deque(_Task(item, item) for item in items)
        self.num_workers, self.num_servers = num_workers, num_servers
        self.busy: dict[Any, tuple[Any, _Task]] = {}
        self.idle: list[Any] = []
        self.lives: dict[Any, Any] = {}  # reference that ends with its server -> server
        self.retries = 0
        self.alive = frozenset(self._nodes())
        gpus = self._room({"GPU": 1})
        self.serves = serve is not None and bool(num_servers or (num_servers is None and gpus))
        self.server_needs = {"GPU": 1, "CPU": 1} if gpus else {"CPU": 1}
        options = {"num_cpus": 1, "num_gpus": self.server_needs.get("GPU", 0), "max_concurrency": 4}
        self.servers = Pool(ray, "an inference worker", ray.remote(**options)(_Server), (ray.put(serve), not gpus))
        share = self._message_share() if self.serves else None
        self.workers = Pool(ray, "a worker", ray.remote(num_cpus=1)(_Worker), (ray.put(make), share))
        self._check_room()

    def outcomes(self) -> Iterator[Outcome]:
        try:
            next_tick, last_ready = 0.0, time.monotonic()
            while self.queue or self.busy:
                now = time.monotonic()
                if now >= next_tick:
                    self._grow()
                    next_tick = now + TICK_SECONDS
                self._hand_out()
                if self.workers.ready and (self.servers.ready or not self.serves):
                    last_ready = now
                elif now - last_ready > PATIENCE_SECONDS:
                    log.warning("waiting for room: Ray has %s free; other jobs may hold the rest", self.ray.available_resources())
                    last_ready = now
                self.watch(State(len(self.queue), len(self.busy), len(self.workers.ready), len(self.servers.ready), self.retries))
                waiting = [*self.busy, *self.workers.starting, *self.servers.starting, *self.lives]
                done, _ = self.ray.wait(waiting, num_returns=1, timeout=TICK_SECONDS) if waiting else (time.sleep(TICK_SECONDS), None)
                for reference in done or ():
                    yield from self._ended(reference)
        finally:
            self.workers.close()
            self.servers.close()

    def _ended(self, reference: Any) -> Iterator[Outcome]:
        if reference in self.workers.starting:
            if (worker := self.workers.started(reference)) is not None:
                self.idle.append(worker)
        elif reference in self.servers.starting:
            if (server := self.servers.started(reference)) is not None:
                self.lives[server.live.remote()] = server
        elif reference in self.lives:
            log.warning("an inference worker died; its batches go to the others")
            self.servers.drop(self.lives.pop(reference))
        else:
            yield from self._finished(reference)

    def _finished(self, reference: Any) -> Iterator[Outcome]:
        worker, task = self.busy.pop(reference)
        try:
            value = self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            failed_itself = isinstance(error, self.ray.exceptions.RayTaskError)
            lost = not failed_itself or isinstance(error.cause, _ServersLost)
            if failed_itself:
                cause = f"{type(error.cause).__name__}: {error.cause}"
                self.idle.append(worker)
            else:
                cause = "the worker died (killed, out of memory, or its node is lost)"
                task.given = self.after_death(task.item)
                self.workers.drop(worker)
            if lost and task.free < FREE_TRIES and not task.nodes <= self._nodes().keys():
                task.free, task.tries = task.free + 1, task.tries - 1  # a node went away: that says nothing of the item
            name = getattr(task.item, "name", task.item)
            log.warning("%s failed (try %d of %d): %s", name, task.tries, TRIES, cause)
            if task.tries < TRIES:
                self.queue.append(task)
                self.retries += 1
            else:
                yield Outcome(task.item, error=cause, tries=task.tries)
        else:
            self.idle.append(worker)
            yield Outcome(task.item, value, tries=task.tries)

    def _hand_out(self) -> None:
        while self.queue and self.idle and (self.servers.ready or not self.serves):
            worker, task = self.idle.pop(), self.queue.popleft()
            task.tries, task.nodes = task.tries + 1, self.alive
            self.busy[worker.call.remote(task.given, list(self.servers.ready))] = (worker, task)

    def _grow(self) -> None:
        """Bring the pools to what is wanted and what the cluster has room for now."""
        self.alive = frozenset(self._nodes())
        num_servers = min(self.num_servers or sys.maxsize, self._room(self.server_needs)) if self.serves else 0
        self.servers.grow(num_servers)
        room = max(self._room({"CPU": 1}) - num_servers, 0)
        self.workers.grow(min(self.num_workers or room, room, len(self.queue) + len(self.busy)))

    def _check_room(self) -> None:
        servers = self._room(self.server_needs)
        asked = self.num_servers if self.num_servers is not None else servers
        if self.serves and not 1 <= asked <= servers:
            raise ValueError(f"--infer-workers {asked} does not fit: the Ray cluster has room for 1 to {servers}")
        room = self._room({"CPU": 1}) - (asked if self.serves else 0)
        if not 1 <= (self.num_workers if self.num_workers is not None else 1) <= room:
            beside = f" beside {asked} inference workers" if self.serves else ""
            raise ValueError(f"--workers {self.num_workers or 1} does not fit: the Ray cluster has room for 1 to {room}{beside}")

    def _nodes(self) -> dict[str, dict[str, float]]:
        """Node id -> resources of the nodes that are alive."""
        return {node["NodeID"]: node["Resources"] for node in self.ray.nodes() if node["Alive"]}

    def _room(self, needs: dict[str, float]) -> int:
        """Actors with these needs that the nodes can hold, were they empty."""
        return sum(int(min(node.get(name, 0) // amount for name, amount in needs.items())) for node in self._nodes().values())

    def _message_share(self) -> int:
        """Bytes that the messages of one worker may hold in its node's object store."""
        nodes = [node for node in self._nodes().values() if node.get("CPU")]
        return int(min(STORE_SHARE * node["object_store_memory"] / node["CPU"] for node in nodes))
