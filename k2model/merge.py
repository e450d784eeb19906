"""PMA: the average of checkpoints of one run in place of an average kept while training (Li et al. 2025, arXiv:2505.12082).

K2 merges checkpoints of the stable part of its learning rate instead of keeping an EMA: as good, and no memory while training. How
they are weighted mattered little in the paper and in K2's report, their number and distance a bit (10 of them in the paper). Models are
streamed: of each checkpoint one piece of one tensor is in memory.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from k2model.checkpoint import flush
from k2model.layouts import Checkpoint, open_checkpoint
from k2model.tensor_files import New, Stored, write_file

METHODS = ("sma", "wma", "ema")
ALPHA = 0.2  # share of the newer checkpoint in `ema`; the paper has .1 and .2


def weights_of(method: str, num: int) -> list[float]:
    """The weight of each of `num` checkpoints, oldest first; their sum is 1.

    Args:
        method: `sma` all alike; `wma` 1, 2, 3 ... of their sum; `ema` .8 of the average so far and .2 of the next one.

    Raises:
        ValueError: there is no such method, or nothing to merge.
    """
    if num < 1:
        raise ValueError("there is no checkpoint to merge")
    if method == "sma":
        return [1 / num] * num
    if method == "wma":
        return [2 * (i + 1) / (num * (num + 1)) for i in range(num)]
    if method == "ema":
        return [(1 - ALPHA) ** (num - 1 - i) * (ALPHA if i else 1.0) for i in range(num)]
    raise ValueError(f"there is no merge method {method!r}; choose from {', '.join(METHODS)}")


def merge(checkpoints: Sequence[str | Path], weights: Sequence[float], out: str | Path, note: dict[str, Any]) -> dict[str, Any]:
    """Write the weighted sum of models as a checkpoint folder that is there whole or not at all.

    Args:
        checkpoints: Places of one model in one layout (what `open_checkpoint` reads), oldest first.
        weights: One for each. Sums are in float64, so that equal checkpoints give themselves, and one checkpoint its own bits.
        out: A new folder: model.safetensors (official layout, dtypes as stored), state.json and, if the last one has it, vae.safetensors.
        note: What is said of the merge in state.json, beside the checkpoints and their weights.

    Returns:
        state.json. `phase`, `step` and `config` are the last one's; there is no optimizer, so no run goes on from it.

    Raises:
        ValueError: the models differ; the text names the first tensor that does. Or `out` holds something else.
        FileNotFoundError: a checkpoint is not there.
    """
    out = Path(out)
    opened = [open_checkpoint(place) for place in checkpoints]
    check_alike(opened)
    codec = _codec([Path(place) for place in checkpoints])
    states = [_state(Path(place)) for place in checkpoints]
    sources = [
        {"path": str(place), "digest": one.digest(), "step": state.get("step"), "phase": state.get("phase"), "weight": weight}
        for place, one, state, weight in zip(checkpoints, opened, states, weights, strict=True)
    ]
    last = {key: states[-1][key] for key in ("step", "phase", "config") if key in states[-1]}
    state = last | {"merge": note | {"checkpoints": sources}}
    if out.exists():
        found = _state(out)
        if json.loads(json.dumps(state["merge"])) == found.get("merge"):
            return found
        raise ValueError(f"{out} exists and is not this merge. Choose a new --out, or delete it.")
    temporary = out.parent / f".{out.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tensors = [
        New(name, one.dtype, one.shape, lambda name=name: averaged([checkpoint.tensors[name] for checkpoint in opened], weights))
        for name, one in opened[-1].tensors.items()
    ]
    sizes = {"model.safetensors": write_file(tensors, temporary / "model.safetensors", {"format": "pt"})}
    if codec:
        shutil.copyfile(codec, temporary / codec.name)
        sizes[codec.name] = codec.stat().st_size
    state = last | {"files": sizes, "merge": state["merge"]}
    (temporary / "state.json").write_text(json.dumps(state, indent=1) + "\n")
    for path in (*temporary.iterdir(), temporary):
        flush(path)
    os.replace(temporary, out)
    return state


def averaged(stored: Sequence[Stored], weights: Sequence[float]) -> Iterator[Tensor]:
    """The weighted sum of one tensor of several files, piece by piece, in the dtype it is stored in."""
    for pieces in zip(*(one.pieces() for one in stored), strict=True):
        total = torch.zeros(len(pieces[0]), dtype=torch.float64)
        for piece, weight in zip(pieces, weights, strict=True):
            total.add_(piece.double(), alpha=weight)
        yield total.to(stored[0].dtype)


def check_alike(opened: Sequence[Checkpoint]) -> None:
    """The models have the same tensors.

    Raises:
        ValueError: they have not, or are stored in eight bits.
    """
    last = opened[-1]
    for one in opened:
        for name in last.tensors.keys() | one.tensors.keys() if one.tensors.keys() != last.tensors.keys() else ():
            if name not in one.tensors or name not in last.tensors:
                there, lacks = (last, one) if name in last.tensors else (one, last)
                raise ValueError(f"these models differ: {there.path} has {name}, {lacks.path} has not. Merge checkpoints of one run.")
        for name, wanted in last.tensors.items():
            found = one.tensors[name]
            if (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
                raise ValueError(
                    f"these models differ: {name} is {list(found.shape)} {found.dtype} in {one.path}, and {list(wanted.shape)} "
                    f"{wanted.dtype} in {last.path}. Merge checkpoints of one run."
                )
        if one.config != last.config:
            raise ValueError(
                f"these models differ: {one.path} is {one.config}, {last.path} is {last.config}. Merge checkpoints of one run."
            )
    small = next((name for name, stored in last.tensors.items() if stored.dtype.itemsize == 1), None)
    if small:
        raise ValueError(f"{last.path}: {small} has eight bits; their average would lose most of what differs. Merge before `k2 convert`.")


def _codec(places: Sequence[Path]) -> Path | None:
    """vae.safetensors of the last checkpoint; that of the others has to be the same, else latents mean different things."""
    codec = places[-1] / "vae.safetensors"
    if not codec.is_file():
        return None
    wanted = _hash(codec)
    for place in places[:-1]:
        if (other := place / codec.name).is_file() and _hash(other) != wanted:
            raise ValueError(
                f"{other} is another codec than {codec}: these models speak of different latents. Merge checkpoints of one run."
            )
    return codec


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _state(place: Path) -> dict[str, Any]:
    """state.json of a training checkpoint; nothing elsewhere."""
    path = place / "state.json"
    return json.loads(path.read_text()) if path.is_file() else {}
