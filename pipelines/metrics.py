"""What a training run says of itself: one row a step in metrics.jsonl, the same in TensorBoard, and in wandb where it is asked for.

metrics.jsonl is the record: pictures and reports are made from it, and a run that resumes at step N cuts it there. TensorBoard is told to
forget what it has after N; wandb does not take a step twice, and the steps that are repeated are the same.

The losses of single images lie beside it in losses.f32: little-endian float32, one after the other and nothing else. First those of a
step's images; then, where there was a validation, those of the images held out, each at all its times. A row says where its own begin
(`losses_at`, counted in values).

Not in the rows: a batch of k2 has 2048, which are 15 KB of JSON, and 7 GB in 500,000 steps that every picture would parse again. Four
bytes an image are 4 GB in which a reader seeks. Not the highest few: which are too high is asked later, and one image over its epochs
or two runs side by side need all. Small batches go the same way, so that there is one. Losses are written before the row that names
them, and both are on the disk before a checkpoint, so that a run that resumes cuts both at its step. After the last row there can be
the losses of one more step: it was killed before its row came, or they were not finite and it has none.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from curation.shards import write_bytes

LOSSES, VALUE = "losses.f32", np.dtype("<f4")


class Metrics:
    """The writer of a run, on one rank. A context manager: what is buffered is written at the end, whatever ended it.

    Args:
        place: Folder of the training run: metrics.jsonl, losses.f32, and tensorboard/ with events.
        step: The step that the run goes on from; 0 at its start. What was written after it is cut off.
        tensorboard: Write events; needs the package tensorboard.
        wandb: A project of Weights & Biases to log to; its own settings come from WANDB_* variables (WANDB_MODE=offline keeps all here).
        config: What wandb shows as the run's configuration.

    Raises:
        ValueError: metrics.jsonl or losses.f32 does not hold the steps up to `step`, or a package is missing.
    """

    def __init__(
        self, place: Path, step: int, tensorboard: bool = False, wandb: str | None = None, config: Mapping[str, Any] | None = None
    ):
        self.path = place / "metrics.jsonl"
        place.mkdir(parents=True, exist_ok=True)
        writer, run = _tensorboard() if tensorboard else None, _wandb() if wandb else None  # before anything is cut
        cut(place, step)
        self._file = open(self.path, "a")  # noqa: SIM115  it is closed by `close`
        self._losses = open(place / LOSSES, "ab")  # noqa: SIM115
        self._events = writer(place / "tensorboard", purge_step=step + 1 if step else None) if writer else None
        self._run = None
        if run:
            name = hashlib.blake2b(str(place.resolve()).encode(), digest_size=8).hexdigest()  # one run per folder, resumed or not
            self._run = run.init(project=wandb, id=name, name=place.name, dir=place, resume="allow", config=dict(config or {}))

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def keep(self, losses: np.ndarray) -> int:
        """Losses of single images, of any shape, before the row that they belong to; gives its `losses_at`."""
        at = self._losses.tell() // VALUE.itemsize
        self._losses.write(np.asarray(losses, VALUE).tobytes())
        self._losses.flush()
        return at

    def write(self, row: Mapping[str, Any]) -> None:
        """One row; `step` counts from 1. Maps and lists of numbers become scalars `name/key` and `name/i` of TensorBoard and wandb."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        curves = scalars({key: value for key, value in row.items() if key not in ("step", "cursor")})
        values = {name: value for name, value in curves if not name.endswith("losses_at")}
        if self._events:
            for name, value in values.items():
                self._events.add_scalar(name, value, row["step"])
        if self._run:
            self._run.log(values, step=row["step"])

    def picture(self, name: str, step: int, path: Path) -> None:
        """A picture (PNG or JPEG on disk, as a sample grid) for TensorBoard and wandb, of a step whose row is written."""
        if not (self._events or self._run):
            return
        pixels = np.asarray(Image.open(path).convert("RGB"))
        if self._events:
            self._events.add_image(name, pixels, step, dataformats="HWC")
        if self._run:
            self._run.log({name: _wandb().Image(pixels)}, step=step)

    def sync(self) -> None:
        """What was written is on the disk: before a checkpoint, which must not be ahead of its metrics."""
        for file in (self._losses, self._file):
            os.fsync(file.fileno())
        if self._events:
            self._events.flush()

    def close(self) -> None:
        """No more rows."""
        self._losses.close()
        self._file.close()
        if self._events:
            self._events.close()
        if self._run:
            self._run.finish()


def cut(place: Path, step: int) -> None:
    """Leave the steps 1 to `step` of metrics.jsonl and losses.f32; what a killed run wrote after its last checkpoint, half lines too, goes.

    Raises:
        ValueError: they are not all there; nothing was cut.
    """
    path, losses = place / "metrics.jsonl", place / LOSSES
    kept = []
    if path.exists() and step:
        with open(path, "rb") as file:
            kept = [line for line, _ in zip(file, range(step), strict=False)]
    try:
        rows = [json.loads(line) for line in kept]
        found = [row["step"] for row in rows]
    except (ValueError, KeyError, TypeError):
        rows, found = [], []
    if found != list(range(1, step + 1)):
        raise ValueError(
            f"{path} does not hold the steps 1 to {step} of the checkpoint it belongs to ({len(kept)} rows). "
            "Put it back, or resume from an older checkpoint, or start again in another folder."
        )
    end = end_of(rows[-1]) * VALUE.itemsize if rows else 0
    if end > (size := losses.stat().st_size if losses.exists() else 0):
        raise ValueError(
            f"{losses} has {size} bytes and not the {end} of the steps 1 to {step}. "
            "Put it back, or resume from an older checkpoint, or start again in another folder."
        )
    write_bytes(b"".join(kept), path)
    if size:
        os.truncate(losses, end)


def end_of(row: Mapping[str, Any]) -> int:
    """Values of losses.f32 up to the end of a row's own; 0 for a row that has none."""
    if "losses_at" in (check := row.get("validation") or {}):
        return check["losses_at"] + check["images"] * len(check["by_t"])
    return row["losses_at"] + row["images"] if "losses_at" in row else 0


def read_losses(place: Path, at: int, count: int) -> np.ndarray | None:
    """(count,) float32 of losses.f32 from value `at` on: of a row's images in the order of the step (`report_step.step_images`), or of
    `validation`, its images times its times, a line of times for each image in the order of `Order.held_out`. None if they are not there.
    """
    path = place / LOSSES
    found = np.fromfile(path, VALUE, count, offset=at * VALUE.itemsize) if path.exists() else np.empty(0, VALUE)
    return found if len(found) == count else None


def read_rows(path: Path, start: int = 0, stop: int | None = None) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, or of its lines `start` to `stop`; a line that is still being written is left out. No file: no rows."""
    rows = []
    with open(path, "rb") if path.exists() else nullcontext(()) as lines:
        for line in islice(lines, start, stop):
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
    return rows


def scalars(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """(name, value) of every number in a row, those in maps and lists too; None and texts are passed over."""
    for key, value in row.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from scalars(value, f"{name}/")
        elif isinstance(value, list | tuple):
            yield from scalars({str(i): item for i, item in enumerate(value)}, f"{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield name, float(value)


def _tensorboard() -> Any:
    """The class of torch's writer."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(f"TensorBoard events need the package tensorboard: pip install 'k2-data-engine[train]' ({error})") from error
    return SummaryWriter


def _wandb() -> Any:
    """The module; only where a run asks for it."""
    try:
        import wandb
    except ImportError as error:
        raise ValueError(f"--wandb needs the package wandb: pip install wandb ({error})") from error
    return wandb
