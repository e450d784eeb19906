"""After `bench_study.py`: held-out losses apart for images that the curated arm keeps and those that it removes, calm ones and busy ones.

    PYTHONPATH=$PWD python benchmarks/study_strata.py --images DIR --run RUN

A held-out set that nobody curated holds what curation removes, busy textures above all, and rewards a model for having seen them. This
annotates the held-out images, asks the rules of each (at 64 px, no draw), and adds lines `strata` to benchmarks/results/study.jsonl.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import tyro
from bench_study import HEAP, PRETRAIN, Judge, checkpoints, done, has, held_out_losses, record
from study_heap import Held, arm_policy, pools, write_quality

from curation.faults import encode
from curation.shards import write_bytes
from pipelines.annotate import annotate
from pipelines.dedup import dedup
from pipelines.filter import filter


def kept_by_rules(held: dict[str, Held], run: Path) -> dict[str, np.ndarray]:
    """Per family a bool (N,): what the curated arm keeps, duplicates aside (a styled image is a copy of its photograph)."""
    found = {}
    for name, family in held.items():
        place = run / "held" / name
        for i, one in enumerate(family.pictures):
            write_bytes(encode(one.pixels, container="PNG"), place / "source" / f"{i:04d}.png")
        if annotate(str(place / "source"), str(place), "offline", ray="off") or dedup(str(place)):
            raise SystemExit("a verb failed; see above, then start again")
        uids = sorted(pq.read_table(place / "annotations" / "basics", columns=["uid"])["uid"].to_pylist())
        write_quality(place, uids, [0.0] * len(uids))  # the policy of an arm joins it, and this one does not ask for it
        policy = place / "kept.sql"
        write_bytes(arm_policy("curated", 64, 0, HEAP, PRETRAIN.read_text()).encode(), policy)
        filter(str(place), str(policy))
        chosen = pq.read_table(place / "selection" / "kept.parquet", columns=["uid"])["uid"].to_pylist()
        numbers = {int(Path(uid).stem) for uid in chosen}
        found[name] = np.array([i in numbers for i in range(len(family.pictures))])
    return found


def main(images: str, run: str) -> None:
    """Measure and record.

    Args:
        images: A folder with a MANIFEST.tsv.
        run: The run folder of the study, with its checkpoints.
    """
    torch.set_num_threads(1)
    *_, held = pools(images)
    kept = kept_by_rules(held, Path(run))
    judge = Judge(held, Path(run) / "codecs" / "64.safetensors", 64, embed=False)
    contrast = {name: latents.var((1, 2, 3)).numpy() for name, latents in judge.latents.items()}
    print(json.dumps({name: [int(which.sum()), len(which)] for name, which in kept.items()}), file=sys.stderr)
    for line in [line for line in done() if line["experiment"] == "data"]:
        key = {"arm": line["arm"], "seed": line["seed"]}
        if has(experiment="strata", **key):
            continue
        place = Path(run) / "train" / f"data-{line['arm'].replace('+', '_')}_64_{line['seed']}"
        *_, (_, model) = checkpoints(place)
        found = {}
        for name, latents in judge.latents.items():
            losses = held_out_losses(model, judge.encode, latents, judge.captions[name]).numpy()
            busy = contrast[name] > np.median(contrast[name])
            parts = {"kept": kept[name], "removed": ~kept[name], "calm": ~busy, "busy": busy}
            found[name] = {part: [round(float(losses[which].mean()), 5), int(which.sum())] for part, which in parts.items() if which.any()}
        record({"experiment": "strata", **key, "loss": found})


if __name__ == "__main__":
    tyro.cli(main)
