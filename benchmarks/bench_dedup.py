"""Duplicates: growth of `k2 dedup` with the number of images, and its recall on copies planted in real images, beside peers.

    python benchmarks/bench_dedup.py growth --sizes 10000 100000 1000000 10000000 >> benchmarks/results/dedup.jsonl
    python benchmarks/bench_dedup.py growth --sizes 10000 100000 1000000 --dim 512 >> benchmarks/results/dedup.jsonl
    python benchmarks/bench_dedup.py planted --images ../shared/data/images --peers DIR >> benchmarks/results/dedup.jsonl
    python benchmarks/bench_dedup.py picture

Made hashes are random with half of their bits set, as those of photographs are; one image in eleven is a copy, 2 to 12 bits from its
original, half of them mirrored. Made embeddings lie around Zipf-sized concepts; one in eleven is a copy with a cosine of about 0.95. Each
size runs in a process of its own (peak memory), with the images made beforehand by another.
"""

import csv
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from planted import COUNTS, plant

from curation.hamming import PHASH_BITS
from curation.schema import BASICS, COLORHASH_BYTES, PHASH_BYTES, embedding_schema
from curation.shards import write_table
from pipelines.dedup import dedup

HERE = Path(__file__).parent
SHARD = 100_000
MADE_COSINE = 0.9
PEERS = ("imagededup", "cleanvision")


def growth(sizes: tuple[int, ...] = (10_000, 100_000), dim: int = 0, seed: int = 0) -> None:
    """One JSON line per size: seconds, peak memory, recall of the planted copies.

    Args:
        sizes: Numbers of images.
        dim: Values of a made embedding; 0 for none: only exact and perceptual duplicates are timed.
        seed: Of what is made up.
    """
    for size in sizes:
        with tempfile.TemporaryDirectory() as run:
            for mode in ("make", "measure"):
                command = [sys.executable, __file__, mode, run, str(size), str(dim), str(seed)]
                lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
            print(json.dumps({"bench": "dedup_growth", "images": size, "dim": dim} | json.loads(lines[-1])), flush=True)


def make(run: str, size: int, dim: int, seed: int) -> None:
    """Made-up annotations of a run, and truth.npz: the rows of the copies and of their originals."""
    rng = np.random.default_rng(seed)
    copies = np.arange(size - size // 11, size)
    originals = np.sort(rng.choice(copies[0], len(copies), replace=False))
    np.savez(f"{run}/truth.npz", copies=copies, originals=originals)
    phash, mirror = _hashes(size, rng), _hashes(size, rng)
    if not dim:
        for start in range(0, len(copies), SHARD):
            piece, source = copies[start : start + SHARD], originals[start : start + SHARD]
            half = len(piece) // 2
            phash[piece[:half]], mirror[piece[half:]] = _moved(phash[source[:half]], rng), _moved(phash[source[half:]], rng)
    centres = rng.standard_normal((max(size // 500, 10), dim)).astype(np.float32)
    share = 1 / np.arange(1, len(centres) + 1)
    concept = rng.choice(len(centres), size, p=share / share.sum())
    concept[copies] = concept[originals]
    for start in range(0, size, SHARD):
        rows = np.arange(start, min(start + SHARD, size))
        uids = [f"{row:09d}" for row in rows]
        columns: dict[str, Any] = {field.name: pa.nulls(len(rows), field.type) for field in BASICS}
        columns |= {
            "uid": uids,
            "shard": ["s"] * len(rows),
            "key": uids,
            "md5": [f"{row:032x}" for row in rows],
            "format": ["JPEG"] * len(rows),
        }
        columns |= {
            name: np.full(len(rows), value) for name, value in {"bytes": 100_000, "width": 512, "height": 512, "jpeg_quality": 90}.items()
        }
        columns |= {"phash": _binary(phash[rows]), "phash_mirror": _binary(mirror[rows])}
        columns["colorhash"] = _binary(np.zeros((len(rows), COLORHASH_BYTES), np.uint8))
        name = f"{start // SHARD:06d}.parquet"
        write_table(pa.table(columns, schema=BASICS), f"{run}/annotations/basics/{name}", "made")
        if dim:
            noise = np.random.default_rng((seed, start)).standard_normal((len(rows), dim), np.float32)
            vectors = centres[concept[rows]] + noise
            late = rows >= copies[0]
            source = originals[rows[late] - copies[0]]
            for shard in np.unique(source // SHARD):  # a copy is its original and a third of its own noise
                there = source // SHARD == shard
                count = min(SHARD, size - shard * SHARD)
                old = np.random.default_rng((seed, int(shard) * SHARD)).standard_normal((count, dim), np.float32)[source[there] % SHARD]
                at = np.flatnonzero(late)[there]
                vectors[at] = centres[concept[rows[at]]] + old + vectors[at] * 0.3 - centres[concept[rows[at]]] * 0.3
            table = pa.table(
                {"uid": uids, "vector": _binary(vectors.astype("<f2").view(np.uint8)), "error": pa.nulls(len(rows), pa.string())}
            )
            write_table(table.cast(embedding_schema(dim)), f"{run}/annotations/made/{name}", "made")


def _hashes(size: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 (size, 18) hashes with half of their bits set."""
    packed = np.empty((size, PHASH_BYTES), np.uint8)
    for start in range(0, size, SHARD):
        rows = min(SHARD, size - start)
        bits = np.tile(np.arange(PHASH_BITS, dtype=np.uint8) % 2, (rows, 1))
        packed[start : start + rows] = np.packbits(rng.permuted(bits, axis=1), axis=1)
    return packed


def _moved(hashes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Hashes with 1 to 6 of the set bits and as many of the others turned over."""
    bits = np.unpackbits(hashes, axis=1)
    swaps = rng.integers(1, 7, len(bits))
    for value in (0, 1):
        chance = np.where(np.unpackbits(hashes, axis=1) == value, rng.random(bits.shape), 2)
        places = np.argpartition(chance, 6, axis=1)[:, :6]
        use = np.arange(6) < swaps[:, None]
        bits[np.nonzero(use)[0], places[use]] = 1 - value
    return np.packbits(bits, axis=1)


def _binary(data: np.ndarray) -> pa.Array:
    data = np.ascontiguousarray(data)
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(data.shape[1]), len(data), [None, pa.py_buffer(data)])


def measure(run: str, size: int, dim: int, seed: int) -> None:
    """One JSON line about one `k2 dedup`."""
    start, cpu = time.perf_counter(), time.process_time()
    assert dedup(run, "made" if dim else None, MADE_COSINE if dim else None) == 0
    line = {"seconds": round(time.perf_counter() - start, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
    line["peak_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)
    truth = np.load(f"{run}/truth.npz")
    table = pq.read_table(f"{run}/annotations/{'semantic' if dim else 'duplicates'}/all.parquet")
    group = table["group"].fill_null(-1).to_numpy()
    same = (group[truth["copies"]] == group[truth["originals"]]) & (group[truth["copies"]] >= 0)
    print(json.dumps(line | {"copies": len(same), "recall": round(float(same.mean()), 5), "groups": int(group.max()) + 1}))


def planted(images: Path, peers: Path | None = None, seed: int = 0, work: Path | None = None) -> None:
    """Copies found in real images, per method and kind of copy; and pairs that it joins though neither is a copy of the other.

    Args:
        images: Folder with MANIFEST.tsv (path, label); images labelled real are used.
        peers: Folder with a virtual environment per peer (imagededup, cleanvision).
        seed: Which images are copied.
        work: Folder for the copies and the run; default a temporary one.
    """
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(work or scratch)
        with open(images / "MANIFEST.tsv") as file:
            real = [images / row["path"] for row in csv.DictReader(file, delimiter="\t") if row["label"] == "real"]
        truth = plant(real, work / "planted", seed)
        recipe = work / "recipe.py"
        recipe.write_text(
            "from curation.stages.basics import Basics\nfrom curation.stages.embedding import Embedding\n"
            "from curation.towers import EffNet\nstages = (Basics(), Embedding(EffNet()))\n"
        )
        for command in (
            ["annotate", "--source", f"{work}/planted", "--out", f"{work}/run", "--recipe", f"{recipe}:stages", "--ray", "off"],
            ["dedup", "--run", f"{work}/run", "--tower", "effnet"],
        ):
            subprocess.run([sys.executable, "-m", "pipelines.cli", *command], check=True, stdout=sys.stderr)
        for name in ("duplicates", "semantic"):
            table = pq.read_table(f"{work}/run/annotations/{name}/all.parquet", columns=["uid", "group"])
            groups: dict[int, set[str]] = {}
            for uid, group in zip(table["uid"].to_pylist(), table["group"].to_pylist(), strict=True):
                if group is not None:
                    groups.setdefault(group, set()).add(uid.split("/", 1)[1])
            _report(f"k2 dedup, {name}", list(groups.values()), truth, seed)
        for peer in PEERS if peers else ():
            command = [f"{peers}/{peer}/bin/python", str(HERE / "dedup_peers.py"), peer, f"{work}/planted"]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            _report(peer, [set(group) for group in json.loads(done.stdout.splitlines()[-1])], truth, seed)


def _report(method: str, groups: list[set[str]], truth: dict[str, str], seed: int) -> None:
    """One JSON line; a group is a set of file names of which each is said to equal some other."""
    hits, others = set(), set()
    for group in groups:
        hits |= {copy for copy in group & truth.keys() if truth[copy] in group}
        roots = sorted({truth.get(name, name) for name in group})
        others |= {tuple(roots)} if len(roots) > 1 else set()
    found = {kind: sum(copy.startswith(f"{kind}/") for copy in hits) for kind in COUNTS}
    line = {"bench": "dedup_planted", "method": method, "seed": seed} | {kind: f"{found[kind]}/{COUNTS[kind]}" for kind in COUNTS}
    print(json.dumps(line | {"other_groups": sorted(others)}), flush=True)


def picture(results: Path = HERE / "results" / "dedup.jsonl", out: Path = HERE.parent / "docs" / "images" / "dedup_growth.png") -> None:
    """The growth curves of the newest line of each size.

    Args:
        results: JSON lines of `growth`.
        out: The picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [json.loads(line) for line in results.read_text().splitlines()]
    newest = {(line["dim"], line["images"]): line for line in lines if line.get("bench") == "dedup_growth"}
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for dim in sorted({dim for dim, _ in newest}):
        points = sorted((images, line) for (d, images), line in newest.items() if d == dim)
        label = f"embeddings, {dim} values" if dim else "hashes (exact and perceptual)"
        for axis, key in zip(axes, ("cpu_seconds", "peak_gb"), strict=True):
            axis.loglog([images for images, _ in points], [line[key] for _, line in points], "o-", label=label)
    span = np.array([1e4, 1e7])
    axes[0].loglog(span, span * 2e-5, "k:", lw=1, label="linear")
    axes[0].set(xlabel="images", ylabel="CPU seconds, one process", title="k2 dedup: time")
    axes[1].set(xlabel="images", ylabel="GB", title="peak memory")
    axes[0].legend(frameon=False)
    for axis in axes:
        axis.grid(alpha=0.3)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    if sys.argv[1] in ("make", "measure"):
        {"make": make, "measure": measure}[sys.argv[1]](sys.argv[2], *map(int, sys.argv[3:]))
    else:
        sys.exit(tyro.extras.subcommand_cli_from_dict({"growth": growth, "planted": planted, "picture": picture}))
