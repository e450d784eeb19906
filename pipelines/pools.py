"""Ray actors of one kind: as many as wanted, replaced when they die. Ray itself is handed in: only `pipelines.cluster` imports it."""

import logging
import time
from dataclasses import dataclass, field
from typing import Any

START_TRIES = 3

log = logging.getLogger(__name__)


@dataclass
class Pool:
    """Actors of one kind, started with `start(*arguments)`."""

    ray: Any
    what: str
    kind: Any  # the remote class
    arguments: tuple[Any, ...]
    starting: dict[Any, Any] = field(default_factory=dict)  # reference -> actor
    ready: list[Any] = field(default_factory=list)
    failures: int = 0  # starts that failed in a row
    ever: bool = False
    rest_until: float = 0.0

    def grow(self, wanted: int) -> None:
        """Start actors until there are `wanted`, ready or starting."""
        while len(self.ready) + len(self.starting) < wanted and time.monotonic() >= self.rest_until:
            actor = self.kind.remote()
            self.starting[actor.start.remote(*self.arguments)] = actor

    def started(self, reference: Any) -> Any | None:
        """The actor whose start has ended, or None where it failed.

        Raises:
            RuntimeError: it failed and nothing else of this pool runs: it would fail everywhere (missing weights, import error).
        """
        actor = self.starting.pop(reference)
        try:
            self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            self.ray.kill(actor)
            self.failures += 1
            ours = isinstance(error, self.ray.exceptions.RayTaskError)
            cause = (
                (getattr(error, "cause", None) or error) if ours else "it died while starting (killed, out of memory, or its node is lost)"
            )
            if not self.ready and (self.failures >= START_TRIES or (ours and not self.ever)):
                raise RuntimeError(f"{self.what} cannot start: {cause}") from error
            # One of several, perhaps on a node that is going away: the others go on.
            log.warning("%s cannot start, tried again: %s", self.what, cause)
            self.rest_until = time.monotonic() + 2.0**self.failures
            return None
        self.failures, self.ever = 0, True
        self.ready.append(actor)
        return actor

    def drop(self, actor: Any) -> None:
        """Forget an actor that died."""
        self.ray.kill(actor)
        self.ready = [other for other in self.ready if other is not actor]

    def close(self) -> None:
        for actor in [*self.ready, *self.starting.values()]:
            self.ray.kill(actor)
