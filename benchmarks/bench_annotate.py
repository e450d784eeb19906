"""What the engine costs beside the work itself: the stage `basics` under a plain loop, `--ray off` and Ray, in one run.

    python benchmarks/bench_annotate.py --images DIR [--rounds 3]

The loop is what people write by hand: open with Pillow, hash with imagehash, no rows for broken files, nothing written.
`plain` runs our own stage function without engine, so `off / plain` is the price of sources, checks and Parquet.
Appends one JSON line to benchmarks/results/annotate.jsonl. Times are medians of interleaved rounds; read ratios, not seconds.
"""

import io
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import imagehash
import tyro
from PIL import Image

from curation.decode import DecodeError, ImageBatch, decode, decode_for
from curation.sources import list_shards, read_samples
from curation.stages.basics import compute
from pipelines.annotate import annotate
from pipelines.run_folder import commit, versions


def by_hand(files: list[bytes]) -> None:
    """Pillow and imagehash, straight from their READMEs."""
    for content in files:
        picture = Image.open(io.BytesIO(content)).convert("RGB")
        imagehash.phash(picture, hash_size=12)
        imagehash.colorhash(picture, binbits=3)


def plain(files: list[bytes]) -> None:
    """Our stage function, no engine."""
    for content in files:
        header, view, _ = decode_for(content, "view")
        compute(ImageBatch(["x"], [content], [], [header], views=[view]))


def timed(function, *args) -> float:
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def main(images: str, rounds: int = 3) -> None:
    """Measure and record.

    Args:
        images: A folder of images.
        rounds: How often each is run; the median counts.
    """
    files = []
    for shard in list_shards(images):
        for batch in read_samples(shard):
            for content in batch["image"].to_pylist():
                try:
                    decode(content)
                except DecodeError:
                    continue
                files.append(content)
    seconds: dict[str, list[float]] = {"by_hand": [], "plain": [], "off": [], "ray_2_workers": []}
    for _ in range(rounds):
        seconds["by_hand"].append(timed(by_hand, files))
        seconds["plain"].append(timed(plain, files))
        for name, ray, workers in (("off", "off", None), ("ray_2_workers", "auto", 2)):
            with tempfile.TemporaryDirectory() as run:
                seconds[name].append(timed(annotate, images, run, "basics", ray, workers))
    median = {name: round(statistics.median(values), 3) for name, values in seconds.items()}
    line = {
        "images": len(files),
        "seconds": median,
        "spread": {name: [round(min(v), 3), round(max(v), 3)] for name, v in seconds.items()},
        "off_over_plain": round(median["off"] / median["plain"], 3),
        "plain_over_by_hand": round(median["plain"] / median["by_hand"], 3),
        "ray_over_off": round(median["ray_2_workers"] / median["off"], 3),
        "machine": platform.processor() or platform.machine(),
        "commit": commit(),
        "versions": versions(),
    }
    with open(Path(__file__).parent / "results" / "annotate.jsonl", "a") as results:
        results.write(json.dumps(line) + "\n")
    print(json.dumps(line))


if __name__ == "__main__":
    tyro.cli(main)
