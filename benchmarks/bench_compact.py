"""What the compact tower's parts are worth: trained in variants on half of the groups, judged on the other half.

    python benchmarks/bench_compact.py --images / --manifest all.tsv --pairs PAIRS [--steps 200] [--only both "pairs alone"]

Every variant differs from `both` in one thing, and has the same steps, seed and held-out generators and real sources. The figure is the
mean over held-out generators (of 8 images and more) of the AUROC against held-out real images, by the network's own head, on whole
images and on native 256 px crops after one JPEG, at most 24 images of a group; with the standard error of that mean over the generators.
`crops` judges the network of `both` with other numbers of crops. One JSON line each goes to benchmarks/results/compact.jsonl.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from tqdm import tqdm

from curation import canonical, compact, compact_train
from curation.compact_train import Pairs, Pictures, Recipe
from curation.decode import DecodeError, decode
from curation.labelled import Entry
from curation.protocol import MIN_GROUP, auroc
from pipelines.compact import labelled
from pipelines.run_folder import commit, versions

RESULTS = Path(__file__).parent / "results" / "compact.jsonl"
VIEWS = ("whole", "crop")
JUDGED = 24  # images of a group
CROPS = (1, 2, 4, 8, 16)
VARIANTS: dict[str, dict[str, Any]] = {  # recipe fields, and names of modules to replace while it trains and is judged
    "both": {},
    "pairs alone": {"generated": False},
    "generated alone": {"pairs": False},
    "no damage loss": {"damaged": 0},
    "no handling": {"handling": False},
    "crops of 64": {"side": 64, "num": 16, "crops": 48, "paired": 12, "damaged": 16},
    "crops of 224": {"side": 224, "num": 1, "crops": 8, "paired": 2, "damaged": 4},
    "shallow": {"depths": {1: 24, 2: 40}},
    "deepest alone": {"depths": {6: 320}},
    "all layers train": {"frozen": 0},
    "head alone": {"frozen": 7},
}


def main(images: str, manifest: str, pairs: Path, steps: int = 200, only: tuple[str, ...] = (), seed: int = 0) -> None:
    """Train, judge and append."""
    torch.set_num_threads(1)
    rows = labelled(images, manifest)
    pictures = Pictures([Path(images, row.path) for row in rows], np.array([r.synthetic for r in rows]), np.array([r.group for r in rows]))
    held_out = compact_train.folds(pictures, 2, seed)[0]
    aligned = Pairs.read(sorted(pairs.glob("*.npz")))
    judged = [row for name in sorted(held_out) for row in [r for r in rows if r.group == name][:JUDGED]]
    for name in only or VARIANTS:
        change = dict(VARIANTS[name])
        start = time.process_time()
        with changed(change):
            recipe = replace(
                Recipe(steps=steps, seed=seed), **{key: change[key] for key in ("crops", "paired", "damaged") if key in change}
            )
            given = pictures if change.get("generated", True) else without_generated(pictures)
            left = aligned if change.get("pairs", True) else None
            *history, network = compact_train.train(given, left, recipe, held_out, "cpu")
            trained = time.process_time() - start
            line = {"variant": name, "steps": steps, "train_cpu_s": round(trained), "loss": history[-1], "num": compact.NUM_CROPS}
            write(line, network, judged, images)
            for num in CROPS if name == "both" else ():
                compact.NUM_CROPS = num
                write({"variant": "crops", "steps": steps, "num": num}, network, judged, images)


@contextmanager
def changed(change: dict[str, Any]) -> Iterator[None]:
    """The modules as a variant has them, and as they were afterwards."""
    kept = {module: dict(vars(module)) for module in (compact, compact_train)}
    depths, side = change.get("depths", compact.DEPTHS), change.get("side", compact.SIDE)
    compact.DEPTHS, compact.SIDE, compact.NUM_CROPS = depths, side, change.get("num", compact.NUM_CROPS)
    compact.DIM = compact_train.DIM = sum(depths.values())
    compact_train.SIDE, compact_train.FROZEN = side, change.get("frozen", compact_train.FROZEN)
    if not change.get("handling", True):
        compact_train.handled = lambda square, side, rng: square if square.shape[0] == side else square[:side, :side]
        compact_train.region = native_region
    try:
        yield
    finally:
        for module, names in kept.items():
            vars(module).update(names)


def native_region(image: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    """A random square of `side`, as it is on disk."""
    missing = [max(0, side - length) for length in image.shape[:2]]
    image = np.pad(image, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="symmetric")
    top, left = (int(rng.integers(length - side + 1)) for length in image.shape[:2])
    return np.ascontiguousarray(image[top : top + side, left : left + side])


def without_generated(pictures: Pictures) -> Pictures:
    """The real images alone."""
    rows = np.flatnonzero(~pictures.synthetic)
    return Pictures([pictures.paths[i] for i in rows], pictures.synthetic[rows], pictures.group[rows])


@torch.inference_mode()
def write(line: dict[str, Any], network: compact.Network, judged: list[Entry], images: str) -> None:
    """Judge a network on images that it has not seen, and append the line."""
    network = network.to(memory_format=torch.channels_last)
    scores, kept = [], []
    for row in tqdm(judged, desc=f"judge {line['variant']}"):
        try:
            pixels, _ = decode(Path(images, row.path).read_bytes())
        except DecodeError:
            continue
        seen = (
            [pixels]
            if not canonical.fits(*pixels.shape[:2])
            else [pixels, *(canonical.canonical(canonical.crop(pixels), v) for v in VIEWS[1:])]
        )
        found = [score(network, image) for image in seen]
        scores.append(found + [np.nan] * (len(VIEWS) - len(found)))
        kept.append(row)
    table, synthetic, group = np.array(scores), np.array([r.synthetic for r in kept]), np.array([r.group for r in kept])
    for i, view in enumerate(VIEWS):
        there = ~np.isnan(table[:, i])
        names = [n for n in np.unique(group[synthetic]) if (there & (group == n)).sum() >= MIN_GROUP]
        each = [auroc(table[there & (group == n), i], table[there & ~synthetic, i]) for n in names]
        line[view] = {
            "auroc": round(float(np.mean(each)), 4),
            "error": round(float(np.std(each) / len(each) ** 0.5), 4),
            "generators": len(each),
        }
    line |= {"judged": len(kept), "commit": commit(), "versions": versions()}
    with RESULTS.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)


def score(network: compact.Network, image: np.ndarray) -> float:
    """The mean log odds of an image's crops."""
    strip = torch.from_numpy(compact.strip(image)).permute(2, 0, 1)[None].float()
    return network.head(network(compact.crops_of(strip))).mean().item()


if __name__ == "__main__":
    tyro.cli(main)
