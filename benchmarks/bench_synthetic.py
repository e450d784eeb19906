"""What the AI-generated detector costs: the compact tower from decoded pixels, and the whole stage beside its frozen tower.

    python benchmarks/bench_synthetic.py --images ../shared/data/images [--num 64] [--rounds 3]

One thread. Images have to be at least 256 pixels a side. `tower` is prepare (choose and cut the crops) and forward; `frozen` is the
semantic tower's own prepare and forward, which a run pays anyway; `stage` is all of the stage `synthetic` with both towers, and
`added` is what it costs beyond the frozen tower. Times are CPU time, medians of rounds; one line goes to
benchmarks/results/synthetic.jsonl.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import tyro

from curation import compact
from curation.decode import DecodeError, ImageBatch, decode_for
from curation.labelled import SUFFIXES
from curation.stages.synthetic import Synthetic
from curation.towers import Compact, EffNet, loaded
from pipelines.run_folder import commit, versions

RESULTS = Path(__file__).parent / "results" / "synthetic.jsonl"


def main(images: Path, num: int = 64, rounds: int = 3) -> None:
    """Measure and append."""
    torch.set_num_threads(1)
    encoded, pixels, views, headers = [], [], [], []
    for path in sorted(path for path in images.rglob("*") if path.suffix.lower() in SUFFIXES)[:: max(1, 900 // num)]:
        try:
            header, view, full = decode_for(path.read_bytes(), "pixels")
        except DecodeError:
            continue
        if min(full.shape[:2]) >= 256 and len(pixels) < num:
            encoded.append(path.read_bytes())
            pixels.append(full)
            views.append(view)
            headers.append(header)
    small, frozen, stage = loaded(Compact(), "cpu"), loaded(EffNet(depths=True), "cpu"), Synthetic().load("cpu")
    strips = small.tower.prepare(pixels)

    def whole() -> None:
        for i in range(len(pixels)):
            stage(ImageBatch([""], [encoded[i]], [pixels[i]], [headers[i]], views=[views[i]]))

    parts: dict[str, Callable[[], object]] = {
        "boxes": lambda: [compact.boxes(image) for image in pixels],
        "prepare": lambda: [small.tower.prepare([image]) for image in pixels],
        "forward": lambda: small.pooled(strips),
        "frozen": lambda: [frozen.pooled(frozen.tower.prepare([view])) for view in views],
        "stage": whole,
    }
    found: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(rounds):
        for name, part in parts.items():
            start = time.process_time()
            part()
            found[name].append((time.process_time() - start) / len(pixels) * 1e3)
    cost = {name: round(statistics.median(times), 2) for name, times in found.items()}
    tower = cost["prepare"] + cost["forward"]
    line = {
        "images": len(pixels),
        "megapixels": round(float(np.mean([image.size / 3e6 for image in pixels])), 3),
        "ms_per_image": cost,
        "tower_images_per_s": round(1e3 / tower, 1),
        "added_over_frozen": round((cost["stage"] - cost["frozen"]) / cost["frozen"], 3),
        "crops": compact.NUM_CROPS,
        "rounds": rounds,
        "commit": commit(),
        "versions": versions(),
    }
    with RESULTS.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line))


if __name__ == "__main__":
    tyro.cli(main)
