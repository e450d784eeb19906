"""What a training process does when it is told to end, and when it hangs.

`Signals` turns SIGTERM (Kubernetes, spot machines, torchrun), SIGUSR1 (Slurm before its time limit) and the first SIGINT into a word that
the loop reads after each step; it then writes a checkpoint and exits with AGAIN. `Watchdog` ends a process whose step never ends, so
that its launcher starts it again.
"""

import faulthandler
import os
import signal
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

AGAIN = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, start the same command again
HUNG = 76  # start it again too, and look at the stacks on stderr
GRACE = 60.0  # seconds after which a process is ended whose interpreter is stuck, so that no thread of ours can


class Signals:
    """Which signal asked this process to end, if any: `with Signals() as asked: ... if asked.by: ...`.

    One process of many may get the signal alone: let all agree (`parallel.agree(bool(asked.by), world)`) before they act.
    A second SIGINT is a KeyboardInterrupt, as without this. Outside the main thread, where Python gives no signals, nothing is asked.
    """

    def __init__(self) -> None:
        self.by: str | None = None  # SIGTERM, SIGUSR1 or SIGINT
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                self._before[number] = signal.signal(number, self._got)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _got(self, number: int, frame: FrameType | None) -> None:
        self.by = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)


class Watchdog:
    """Ends the process with HUNG, after the stacks of all threads on stderr, when a step takes too long: `with Watchdog() as dog: ...`.

    A rank that waits for a lost one waits in a collective, which PyTorch ends after its own timeout; this is for everything else
    (a disk, a data loader, a driver) and needs no help of what hangs.

    Args:
        floor: seconds that any step may take. The first is given `first`: it compiles and fills the readers.
        factor: a step may take this many times the median of the last hundred.
        first: seconds until the first beat.
    """

    def __init__(self, floor: float = 600.0, factor: float = 20.0, first: float = 3600.0):
        if not (floor > 0 and factor > 1 and first > 0):
            raise ValueError(f"floor and first must be positive seconds and factor above 1; got {floor}, {first} and {factor}")
        self.floor, self.factor, self.first = floor, factor, first
        self._steps: deque[float] = deque(maxlen=100)
        self._began: float | None = None  # of this step, without what `allowing` covered
        self._changed = threading.Condition()
        self._deadline = 0.0
        self._ended = False

    @property
    def limit(self) -> float:
        """Seconds that a step may take now."""
        return max(self.floor, self.factor * statistics.median(self._steps)) if self._steps else max(self.floor, self.first)

    def __enter__(self) -> Self:
        self._allow(self.limit)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify()
        faulthandler.cancel_dump_traceback_later()

    def beat(self) -> None:
        """A step has ended."""
        now = time.monotonic()
        if self._began is not None:
            self._steps.append(now - self._began)
        self._began = now
        self._allow(self.limit if self._steps else max(self.floor, self.first))

    @contextmanager
    def allowing(self, seconds: float) -> Iterator[None]:
        """For what is not a step, as samples or a checkpoint: it may take `seconds`, and counts for no step."""
        began = time.monotonic()
        self._allow(max(seconds, self.limit))
        try:
            yield
        finally:
            if self._began is not None:
                self._began += time.monotonic() - began
            self._allow(self.limit)

    def _allow(self, seconds: float) -> None:
        with self._changed:
            self._deadline = time.monotonic() + seconds
            self._changed.notify()
        faulthandler.dump_traceback_later(seconds + GRACE, exit=True, file=sys.__stderr__)  # from C: needs no interpreter

    def _watch(self) -> None:
        with self._changed:
            while not self._ended and (left := self._deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            if self._ended:
                return
        print(
            f"k2 train: no step has ended for {self.limit:.0f} s or more; the stacks of all threads follow", file=sys.__stderr__, flush=True
        )
        faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        os._exit(HUNG)
