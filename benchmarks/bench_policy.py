"""A policy over many images: `k2 filter` at 100 thousand, a million and ten million rows, beside others who apply the same rules.

    python benchmarks/bench_policy.py [--rounds 3] [--peer-python /path/to/python]

The annotations are made up: 100 shards, all columns of basics (captions, hashes), duplicates in one file, synthetic, provenance,
artifacts with eight codes an image. `k2 filter` is the command itself in a process of its own: shipped policy, checks, funnel,
tags, buckets and crops, the selection sorted by uid and written. The peers (policy_peers.py, also processes, with polars and
pandas of `--peer-python`) do less: they join the same files by uid, apply the rules of the numeric columns as one mask and write
the uids that they keep, sorted.
Appends one JSON line to benchmarks/results/policy.jsonl. On a machine with other work read cpu_seconds and ratios.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tyro

from curation.schema import ARTIFACTS, BASICS, DUPLICATES, PROVENANCE, SYNTHETIC
from curation.shards import write_table
from pipelines.run_folder import commit, versions

SHARDS = 100
CODES = 8
PEERS = Path(__file__).parent / "policy_peers.py"
WORDS = np.array(
    [
        "a",
        "cat",
        "dog",
        "red",
        "old",
        "house",
        "river",
        "at",
        "night",
        "in",
        "the",
        "snow",
        "with",
        "two",
        "people",
        "under",
        "blue",
        "trees",
        "close",
        "view",
        "of",
    ]
)


def write_run(run: Path, rows: int, rng: np.random.Generator) -> None:
    """RUN/annotations of `rows` made-up images in 100 shards."""
    all_uids, size = [], rows // SHARDS
    for shard in range(SHARDS):
        name = f"laion-{shard:05d}"
        keys = np.char.mod("%09d", np.arange(shard * size, (shard + 1) * size))
        uids = np.char.add(f"{name}/", keys)
        all_uids.append(uids)
        broken = rng.random(size) < 0.002
        write_table(basics(name, keys, uids, broken, rng), run / f"annotations/basics/{name}.parquet", "made")
        error = pa.array(np.where(broken, "broken", None), pa.string())
        score = pa.array(rng.beta(0.4, 2, size).astype(np.float32), mask=broken)
        share = pa.array(rng.random(size, dtype=np.float32), mask=broken)
        words = [pa.nulls(size, SYNTHETIC.field(name).type) for name in ("p_pixels", "p_semantics", "declared", "kind")]
        write_table(pa.table([uids, score, *words, share, error], schema=SYNTHETIC), run / f"annotations/synthetic/{name}.parquet", "made")
        said = {name: pa.nulls(size, PROVENANCE.field(name).type) for name in PROVENANCE.names}
        said |= {"uid": uids, "declared_ai": pa.array(rng.random(size) < 0.001, mask=broken), "error": error}
        write_table(pa.table(said).cast(PROVENANCE), run / f"annotations/provenance/{name}.parquet", "made")
        offsets = pa.array(np.arange(size + 1, dtype=np.int32) * CODES)
        features, values = rng.integers(0, 2048, size * CODES, dtype=np.int32), rng.random(size * CODES, dtype=np.float32)
        structs = pa.StructArray.from_arrays([features, values], fields=list(ARTIFACTS.field("codes").type.value_type))
        codes = pa.ListArray.from_arrays(offsets, structs)
        write_table(pa.table([uids, codes, error], schema=ARTIFACTS), run / f"annotations/artifacts/{name}.parquet", "made")
    uids = np.concatenate(all_uids)
    copy = rng.random(len(uids)) < 0.1
    group = pa.array(rng.integers(0, len(uids), len(uids)), mask=~copy)
    kind = np.where(copy, "perceptual", "unique")
    none = np.zeros(len(uids), np.int16)
    columns = [uids, group, np.where(copy, 2, 1).astype(np.int32), kind, ~copy, none, none.astype(bool), pa.nulls(len(uids), pa.string())]
    write_table(pa.table(columns, schema=DUPLICATES), run / "annotations/duplicates/all.parquet", "made", row_group_size=100_000)


def basics(name: str, keys: np.ndarray, uids: np.ndarray, broken: np.ndarray, rng: np.random.Generator) -> pa.Table:
    """One shard of `basics`; most images pass most rules."""
    size = len(uids)
    words = WORDS[rng.integers(0, len(WORDS), (12, size))]
    caption = words[0]
    for more in words[1:]:
        caption = np.char.add(np.char.add(caption, " "), more)
    columns: dict[str, object] = {
        "uid": uids,
        "shard": np.full(size, name),
        "key": keys,
        "caption": caption,
        "caption_source": np.full(size, "txt"),
        "bytes": rng.integers(20_000, 900_000, size),
        "md5": pa.array([row.tobytes().hex() for row in rng.integers(0, 256, (size, 16), np.uint8)]),
        "error": pa.array(np.where(broken, "truncated JPEG", None), pa.string()),
    }
    facts: dict[str, object] = {
        "width": rng.integers(200, 3000, size, dtype=np.int32),
        "height": rng.integers(200, 3000, size, dtype=np.int32),
        "num_frames": np.ones(size, np.int32),
        "format": np.full(size, "JPEG"),
        "mode": np.full(size, "RGB"),
        "rgb_entropy": rng.normal(6.5, 1.2, size).astype(np.float32),
        "laplacian_var": rng.lognormal(6.5, 1.2, size).astype(np.float32),
        "complexity": rng.gamma(4, 0.04, size).astype(np.float32),
        "jpeg_quality": rng.integers(5, 100, size).astype(np.int16),
    }
    for hashed in ("phash", "phash_mirror", "colorhash"):
        width = BASICS.field(hashed).type.byte_width
        raw = pa.py_buffer(rng.bytes(size * width))
        facts[hashed] = pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), size, [None, raw])
    for part in BASICS.names:
        if part not in columns and part not in facts:  # ratios, borders and whatever is added
            facts[part] = pa.array(rng.beta(0.2, 6, size)).cast(BASICS.field(part).type, safe=False)
    valid = pa.array(~broken)
    for part, values in facts.items():
        array = values if isinstance(values, pa.Array) else pa.array(values)
        columns[part] = pc.if_else(valid, array, pa.scalar(None, array.type))
    return pa.table({field.name: pa.array(columns[field.name]).cast(field.type) for field in BASICS}).cast(BASICS)


def timed(command: list[str], log: Path) -> dict[str, float]:
    """Wall and CPU seconds and peak memory of a process."""
    start = time.perf_counter()
    with open(log, "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=Path(__file__).parents[1])
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}:\n{log.read_text()[-2000:]}")
    return {
        "seconds": round(time.perf_counter() - start, 2),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 2),
        "peak_gb": round(used.ru_maxrss / 2**20, 2),
    }


def main(
    sizes: tuple[int, ...] = (100_000, 1_000_000, 10_000_000),
    peer_python: str | None = None,
    pandas_up_to: int = 1_000_000,
    rounds: int = 3,
) -> None:
    """Measure and record.

    Args:
        sizes: Rows.
        peer_python: A Python that has polars and pandas; without it only k2 is measured.
        pandas_up_to: Rows; pandas holds the whole table and its joins in memory.
        rounds: How often each is run; the median by wall time counts.
    """
    found = []
    for rows in sizes:
        with tempfile.TemporaryDirectory(prefix="k2-bench-") as folder:
            run, log = Path(folder, "run"), Path(folder, "log")
            write_run(run, rows, np.random.default_rng(0))
            k2 = [sys.executable, "-m", "pipelines.cli", "filter", "--run", str(run), "--policy", "pretrain_256"]
            commands = {"k2 filter": k2}
            if peer_python:
                peers = ["polars"] + (["pandas"] if rows <= pandas_up_to else [])
                commands |= {name: [peer_python, str(PEERS), name, str(run), f"{folder}/{name}.parquet"] for name in peers}
            taken = {name: [] for name in commands}
            for _ in range(rounds):
                for name, command in commands.items():
                    taken[name].append(timed(command, log))
            line = {name: sorted(runs, key=lambda one: one["seconds"])[len(runs) // 2] for name, runs in taken.items()}
            funnel = json.loads((run / "selection/pretrain_256.funnel.json").read_text())
            size = sum(file.stat().st_size for file in run.glob("annotations/*/*.parquet"))
            found.append({"rows": rows, "kept": funnel["num_kept"], "annotations_gb": round(size / 2**30, 2)} | line)
            print(json.dumps(found[-1]), flush=True)
    line = {"policy": "pretrain_256", "sizes": found, "rounds": rounds, "machine": platform.processor() or platform.machine()}
    line |= {"cores": os.cpu_count(), "commit": commit(), "versions": versions()}
    with open(Path(__file__).parent / "results" / "policy.jsonl", "a") as results:
        results.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
