"""Checkpoints: a folder per step, whole or not at all, of safetensors and one JSON file. No pickles.

`checkpoints/<step>/model.safetensors` is in the layout of the released model. `state.json` lists the other files with
their sizes, and holds the step, the phase, the cursor and the description of the run.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file, save_file
from torch import Tensor


class Checkpoint(NamedTuple):
    step: int
    state: dict[str, Any]  # what was handed to `save`
    directory: Path

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of `<name>.safetensors`, on the CPU."""
        return load_file(self.directory / f"{name}.safetensors")


def save(directory: Path, step: int, files: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> Path:
    """Write `directory`/<step>: each of `files` as `<name>.safetensors`, and `state.json`.

    It is written under a temporary name, flushed to the disk and renamed, so a killed process leaves no half of one.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for torn in directory.glob(".*.tmp"):
        shutil.rmtree(torn)
    target, temporary = directory / f"{step:06d}", directory / f".{step:06d}.tmp"
    temporary.mkdir()
    sizes = {}
    for name, tensors in files.items():
        path = temporary / f"{name}.safetensors"
        save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, path)
        _flush(path)
        sizes[path.name] = path.stat().st_size
    path = temporary / "state.json"
    path.write_text(json.dumps({"step": step, "files": sizes, **state}, indent=1) + "\n")
    _flush(path)
    if target.exists():  # a torn one: `latest` would have found it otherwise
        shutil.rmtree(target)
    os.replace(temporary, target)
    _flush(directory)
    return target


def latest(directory: Path) -> Checkpoint | None:
    """The whole checkpoint with the highest step; None without one. Torn ones (missing or short files) are passed over."""
    places = [place for place in directory.glob("[0-9]*") if place.name.isdigit()] if directory.is_dir() else []
    for place in sorted(places, key=lambda place: int(place.name), reverse=True):
        try:
            state = json.loads((place / "state.json").read_text())
            whole = all((place / name).stat().st_size == size for name, size in state["files"].items())
        except (OSError, ValueError, KeyError):
            continue
        if whole:
            return Checkpoint(state["step"], state, place)
    return None


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
