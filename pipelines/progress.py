"""How a long run stands: one line on stderr, and the same numbers as Prometheus metrics."""

import sys
import time
from collections import Counter
from collections.abc import Collection
from typing import Any

from tqdm import tqdm

from curation.annotate import Report
from pipelines.cluster import State, measure


class Progress:
    """Images per second, broken images, failed shards, what is in flight, time left, and where the time goes.

    Args:
        num_shards: Of the run.
        num_done: Of these, before it started.
        inferring: Names of the stages that run where the accelerator is.
    """

    def __init__(self, num_shards: int, num_done: int, inferring: Collection[str] = ()):
        self.rows = self.bad = self.failed = 0
        self.seconds: Counter[str] = Counter()
        self.state = State(num_shards - num_done, 0, 0, 0, 0)
        self.inferring, self.now, self.shown = inferring, Report("", []), 0.0
        self.bar = tqdm(total=num_shards, initial=num_done, unit="shard", desc="annotate", file=sys.stderr)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.close()

    def done(self, report: Report) -> None:
        """A shard is written."""
        self.rows, self.bad, self.now = self.rows + report.rows, self.bad + report.bad, Report("", [])
        self.seconds.update(report.seconds)
        measure("k2_shard_seconds", sum(report.seconds.values()))
        self._show(1)

    def fail(self) -> None:
        """A shard has failed for good."""
        self.failed += 1
        self._show(0)

    def batch(self, report: Report) -> None:
        """A shard that is worked on in this process has come so far."""
        self.now = report
        self._show(0)

    def stands(self, state: State) -> None:
        """Queue and pools changed, or time passed."""
        self.state = state
        for name, value in vars(state).items():
            measure(f"k2_{name}", value)
        measure("k2_shards_failed", self.failed)
        self._show(0)

    def _show(self, done: int) -> None:
        elapsed = max(self.bar.format_dict["elapsed"], 1e-9)
        words = [f"{(self.rows + self.now.rows) / elapsed:.0f} images/s", f"{self.bad + self.now.bad} broken", f"{self.failed} failed"]
        words.append(f"{self.state.in_flight} in flight")
        if spent := self.seconds + Counter(self.now.seconds):
            words.append(f"limit {limit(spent, self.inferring if self.state.servers else ())}")
        self.bar.set_postfix_str(", ".join(words), refresh=False)
        self.bar.update(done)
        if time.monotonic() - self.shown > 1:
            self.shown = time.monotonic()
            self.bar.refresh()


def limit(seconds: dict[str, float], elsewhere: Collection[str] = ()) -> str:
    """The part that takes the most of the workers' time, with its share: 'decode (41 %)'.

    `elsewhere` names the stages whose time is the inference workers' own: what counts of it is how long the others wait for them.
    """
    parts = {"inference" if name == "wait" else name: spent for name, spent in seconds.items() if name not in elsewhere}
    name = max(parts, key=parts.get)
    return f"{name} ({parts[name] / max(sum(parts.values()), 1e-9):.0%})"


class Meter:
    """Counts what one shard's report gained since the last batch, in the worker that makes it."""

    def __init__(self):
        self.last = Report("", [])

    def __call__(self, report: Report) -> None:
        for name in ("rows", "bad", "bytes"):
            gained = getattr(report, name) - getattr(self.last, name)
            measure({"rows": "k2_images_total", "bad": "k2_broken_total", "bytes": "k2_bytes_total"}[name], gained)
        for part, seconds in report.seconds.items():
            measure("k2_seconds_total", seconds - self.last.seconds.get(part, 0.0), part=part)
        self.last = Report(report.shard, [], report.rows, report.bad, report.bytes, dict(report.seconds))
