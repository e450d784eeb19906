"""Write rate of one shard of embeddings: fixed-size binary against list columns, to Parquet as `k2 annotate` writes it.

    python benchmarks/bench_embedding_write.py

Every round writes the same float16 vectors once in each layout, in turn, so that a busy machine slows all of them alike; the
rate is the median over rounds. Two costs are timed apart: making the Arrow column from the tower's array, and writing it
(no dictionary, into memory). Appends one JSON line to benchmarks/results/embedding_write.jsonl.
"""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

RESULTS = Path(__file__).parent / "results" / "embedding_write.jsonl"


def binary_column(vectors: np.ndarray) -> pa.Array:
    """fixed_size_binary, as `curation.stages.embedding` hands it over: one bytes object per image."""
    return pa.array([row.tobytes() for row in vectors], pa.binary(2 * vectors.shape[1]))


def list_column(vectors: np.ndarray) -> pa.Array:
    """list<halffloat>, made without a copy of the values: the best case of a list column."""
    rows, dim = vectors.shape
    return pa.ListArray.from_arrays(pa.array(np.arange(rows + 1, dtype=np.int32) * dim), pa.array(vectors.reshape(-1)))


def fixed_list_column(vectors: np.ndarray) -> pa.Array:
    """fixed_size_list<halffloat>, also without a copy."""
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])


def fixed_list_float32_column(vectors: np.ndarray) -> pa.Array:
    """fixed_size_list<float>: what one gets without thinking about it; twice the bytes."""
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.astype(np.float32).reshape(-1)), vectors.shape[1])


LAYOUTS: dict[str, Callable[[np.ndarray], pa.Array]] = {
    "fixed_size_binary_fp16": binary_column,
    "list_fp16": list_column,
    "fixed_size_list_fp16": fixed_list_column,
    "fixed_size_list_fp32": fixed_list_float32_column,
}
OURS = "fixed_size_binary_fp16"
COMPRESSIONS = ("zstd", "none")  # zstd is what `curation.shards` writes


def write(column: pa.Array, compression: str) -> int:
    """Size in bytes of the Parquet file."""
    sink = pa.BufferOutputStream()
    table = pa.table({"vector": column})
    with pq.ParquetWriter(sink, table.schema, compression=compression, use_dictionary=False, write_statistics=True) as writer:
        writer.write_table(table, row_group_size=len(table))
    return sink.getvalue().size


def measure(rows: int = 10_000, dim: int = 1280, rounds: int = 5) -> dict:
    """Rates in MB of float16 per second for each layout, and how many times slower each is than fixed-size binary."""
    vectors = np.random.default_rng(0).standard_normal((rows, dim)).astype(np.float16)
    cases = [(name, compression) for compression in COMPRESSIONS for name in LAYOUTS]
    making = {name: [] for name in LAYOUTS}
    writing = {case: [] for case in cases}
    sizes = {}
    for _ in range(rounds + 1):  # the first one warms up and is not counted
        columns = {}
        for name, make in LAYOUTS.items():
            start = time.perf_counter()
            columns[name] = make(vectors)
            making[name].append(time.perf_counter() - start)
        for name, compression in cases:
            start = time.perf_counter()
            sizes[name, compression] = write(columns[name], compression)
            writing[name, compression].append(time.perf_counter() - start)
    make = {name: statistics.median(seconds[1:]) for name, seconds in making.items()}
    result = {"rows": rows, "dim": dim, "rounds": rounds, "make_mb_per_s": {n: round(vectors.nbytes / 1e6 / s, 1) for n, s in make.items()}}
    for compression in COMPRESSIONS:
        write_s = {name: statistics.median(writing[name, compression][1:]) for name in LAYOUTS}
        both_s = {name: write_s[name] + make[name] for name in LAYOUTS}
        result[compression] = {
            "write_mb_per_s": {name: round(vectors.nbytes / 1e6 / seconds, 1) for name, seconds in write_s.items()},
            "write_times_slower": {name: round(seconds / write_s[OURS], 2) for name, seconds in write_s.items()},
            "make_and_write_times_slower": {name: round(seconds / both_s[OURS], 2) for name, seconds in both_s.items()},
            "file_mb": {name: round(sizes[name, compression] / 1e6, 1) for name in LAYOUTS},
        }
    return result


def main() -> int:
    line = {
        "benchmark": "embedding_write",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), "system": platform.platform()},
        "versions": {"python": platform.python_version(), "pyarrow": pa.__version__, "numpy": np.__version__},
        **measure(),
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with open(RESULTS, "a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line))
    return 0


if __name__ == "__main__":
    sys.exit(main())
