"""Time and recall of the duplicate search against the number of images, beside comparing all pairs.

    python benchmarks/bench_dedup.py --sizes 10000 100000 1000000 >> benchmarks/results/dedup.jsonl

Hashes are random with half of their bits set, as those of photographs are; one image in eleven is a copy, 2 to 12 bits from its
original. Both searches run in one process on the same hashes; all pairs (numpy popcount, row by row) only up to 20,000 images.
"""

import json
import sys
import time

import numpy as np
import pyarrow as pa
import tyro

from curation.dedup import PHASH_BITS, Dedup, find_duplicates, hamming, hash_words
from curation.schema import COLORHASH_BYTES, PHASH_BYTES

ALL_PAIRS = 20_000


def basics_of(size: int, rng: np.random.Generator) -> tuple[pa.Table, np.ndarray, np.ndarray]:
    """Made-up `basics` of `size` images; the rows of the copies, and of their originals."""
    bits = rng.permuted(np.tile(np.arange(PHASH_BITS, dtype=np.uint8) % 2, (size, 1)), axis=1)
    copies = np.arange(size - size // 11, size)
    originals = rng.choice(copies[0], len(copies), replace=False)
    for copy, original in zip(copies, originals, strict=True):
        bits[copy] = bits[original]
        swaps = int(rng.integers(1, Dedup().phash_bits // 2 + 1))
        for value in (0, 1):
            bits[copy, rng.choice(np.flatnonzero(bits[original] == value), swaps, replace=False)] = 1 - value
    columns = {
        "uid": [f"{i:09d}" for i in range(size)],
        "bytes": np.full(size, 100_000),
        "md5": [f"{i:032x}" for i in range(size)],
        "width": np.full(size, 512),
        "height": np.full(size, 512),
        "format": ["JPEG"] * size,
        "phash": _hashes(bits),
        "phash_mirror": _hashes(rng.permuted(bits, axis=1)),
        "colorhash": pa.array([bytes(COLORHASH_BYTES)] * size, pa.binary(COLORHASH_BYTES)),
        "jpeg_quality": np.full(size, 90),
        "error": pa.nulls(size, pa.string()),
    }
    return pa.table(columns), copies, originals


def _hashes(bits: np.ndarray) -> pa.Array:
    return pa.array([row.tobytes() for row in np.packbits(bits, axis=1)], pa.binary(PHASH_BYTES))


def all_pairs(basics: pa.Table) -> int:
    """The pairs within the threshold, by comparing each image with all later ones."""
    images, mirrors = hash_words(basics["phash"]), hash_words(basics["phash_mirror"])
    limit, found = Dedup().phash_bits, 0
    for i in range(len(images) - 1):
        near = hamming(images[i + 1 :], images[i]) <= limit
        near |= hamming(mirrors[i + 1 :], images[i]) <= limit
        near |= hamming(images[i + 1 :], mirrors[i]) <= limit
        found += int(near.sum())
    return found


def bench(sizes: tuple[int, ...] = (10_000, 100_000), seed: int = 0) -> None:
    """One JSON line per size.

    Args:
        sizes: Numbers of images.
        seed: Of the made-up hashes.
    """
    for size in sizes:
        basics, copies, originals = basics_of(size, np.random.default_rng(seed))
        start = time.perf_counter()
        groups = np.array(find_duplicates(basics)["group"].to_pylist(), dtype=float)
        line = {"bench": "dedup", "images": size, "seconds": round(time.perf_counter() - start, 2), "copies": len(copies)}
        line["recall"] = float((groups[copies] == groups[originals]).mean())
        if size <= ALL_PAIRS:
            start = time.perf_counter()
            line["pairs"] = all_pairs(basics)
            line["all_pairs_seconds"] = round(time.perf_counter() - start, 2)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(tyro.cli(bench))
