"""A training process that is told to end, or that hangs."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.survival import AGAIN, HUNG, Signals, Watchdog

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_becomes_a_word_and_the_handlers_come_back(name):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with Signals() as asked:
        assert asked.by is None
        os.kill(os.getpid(), number)
        assert asked.by == name
    assert signal.getsignal(number) is before


def test_a_second_interrupt_stops_at_once():
    with pytest.raises(KeyboardInterrupt), Signals() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        assert asked.by == "SIGINT"
        os.kill(os.getpid(), signal.SIGINT)


def test_a_step_may_take_a_multiple_of_the_median_and_never_less_than_the_floor(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("pipelines.survival.time.monotonic", lambda: now[0])
    dog = Watchdog(floor=30, factor=10, first=500)
    allowed = []
    monkeypatch.setattr(dog, "_allow", allowed.append)
    dog.beat()
    for took in (1, 2, 90, 2, 8):
        now[0] += took
        dog.beat()
    assert allowed == [500, 30, 30, 30, 30, 30] and dog.limit == 30
    with dog.allowing(1000):
        now[0] += 900  # a checkpoint: it counts for no step
    now[0] += 7
    dog.beat()
    assert allowed[6] == 1000 and list(dog._steps) == [1, 2, 90, 2, 8, 7] and dog.limit == 45
    with pytest.raises(ValueError, match="factor above 1"):
        Watchdog(factor=1)


HANGS = """
import threading
from pipelines.survival import Watchdog
with Watchdog(floor=0.2, first=0.2) as dog:
    dog.beat()
    dog.beat()
    with dog.allowing(0.2):
        pass
    def stuck_in_a_disk(): threading.Event().wait()
    stuck_in_a_disk()
"""
STUCK = """
import re
import pipelines.survival as survival
survival.GRACE = 0.1
with survival.Watchdog(floor=0.2, first=0.2) as dog:
    re.match("(a*)*b", "a" * 60)  # in C, for ages, and no other thread of Python gets a turn
"""


@pytest.mark.parametrize(("program", "code", "said"), [(HANGS, HUNG, "in stuck_in_a_disk"), (STUCK, 1, "in match")])
def test_a_process_that_hangs_ends_and_says_where(program, code, said):
    """The second is one that our thread cannot end, because the interpreter itself is stuck."""
    done = subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == code and said in done.stderr, done.stderr
    assert ("no step has ended for 0 s" in done.stderr) == (code == HUNG)


def test_steps_that_end_in_time_end_nothing():
    with Watchdog(floor=60) as dog:
        dog.beat()
    assert dog._ended and AGAIN not in (0, 1, 2, HUNG)
