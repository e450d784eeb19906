"""`k2 train merge`: checkpoints of a training run to one model, in place of an average kept while training (PMA)."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro

from k2model import merge as pma
from pipelines.cli import call


def merge(
    run: tyro.conf.Positional[tuple[str, ...]],
    last: int = 10,
    every: int = 1,
    method: Literal["sma", "wma", "ema"] = "sma",
    out: str | None = None,
) -> int:
    """Average the last checkpoints of a training run; the result is a folder for k2 sample, k2 convert and --base.

    Merge checkpoints of the stable part of the learning rate, a fixed number of steps apart. The files of a run stay as they are.

    Args:
        run: The folder of a training run (with checkpoints/), or the folders of the checkpoints themselves, oldest first.
        last: Of a run: so many checkpoints of its last phase; fewer where it has fewer.
        every: Of a run: take each n-th checkpoint, counted back from the last.
        method: sma all alike, wma the newer the more, ema exponentially so. It matters little.
        out: The new folder; default RUN/merged/<method>-<how many>/<step>.
    """
    if last < 1 or every < 1:
        raise ValueError(f"--last {last} and --every {every} must be at least 1")
    places = [Path(place) for place in run]
    missing = next((place for place in places if not place.exists()), None)
    if missing:
        raise FileNotFoundError(f"{missing} does not exist. Give the folder of a training run, or folders of checkpoints.")
    note = {"method": method}
    if len(places) == 1 and (places[0] / "checkpoints").is_dir():
        chosen = choose(places[0], last, every)
        target = Path(out) if out else places[0] / "merged" / f"{method}-{len(chosen)}" / chosen[-1].name
    else:
        chosen = places
        if out is None:
            raise ValueError("give --out: the new folder")
        target = Path(out)
    if target.resolve().parent.name == "checkpoints":
        raise ValueError(f"--out {target} lies among the checkpoints of a run, which would resume from it. Choose another folder.")
    state = pma.merge(chosen, pma.weights_of(method, len(chosen)), target, note)
    used = [{key: one[key] for key in ("path", "step", "weight")} for one in state["merge"]["checkpoints"]]
    print(json.dumps({"out": str(target), "method": method, "checkpoints": used, "bytes": state["files"]["model.safetensors"]}))
    return 0


def choose(run: Path, last: int, every: int) -> list[Path]:
    """The checkpoints of a run to merge, oldest first: whole ones of the last one's phase, each `every`-th from the end, at most `last`.

    Raises:
        ValueError: the run has none with a model.
    """
    phase, chosen = None, []
    places = [place for place in (run / "checkpoints").iterdir() if place.name.isdigit() and (place / "model.safetensors").is_file()]
    for place in sorted(places, key=lambda place: int(place.name), reverse=True):
        try:
            state = json.loads((place / "state.json").read_text())
            if any((place / name).stat().st_size != size for name, size in state["files"].items()):
                continue
        except (OSError, ValueError, KeyError):  # torn: `checkpoint.latest` passes over it too
            continue
        phase = phase or state.get("phase")
        if state.get("phase") == phase:
            chosen.append(place)
    if not chosen:
        raise ValueError(f"{run}/checkpoints holds no whole checkpoint of a model. Train first; a LoRA run has no model to merge.")
    return chosen[::every][:last][::-1]


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    return call(merge, argv, "k2 train merge")


if __name__ == "__main__":
    sys.exit(main())
