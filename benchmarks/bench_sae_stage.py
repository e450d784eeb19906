"""Embeddings per CPU second of the stage `artifacts`: all features, or only the tagged ones.

    OMP_NUM_THREADS=1 python benchmarks/bench_sae_stage.py

From vectors in memory to the Arrow column that is written, for a random SAE of the size of a SigLIP-2 one (768 x 6144) and of the
offline one (1280 x 512). Beside it in the same run, what one would write without thinking of bytes: the same columns in float32 by
torch, whose last bits depend on batch and threads (`differs` counts the values that do). CPU time of this process, so that other jobs
do not count; the median over rounds. Appends one JSON line to benchmarks/results/sae_stage.jsonl.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from curation import exact, sae

RESULTS = Path(__file__).parent / "results" / "sae_stage.jsonl"
SIZES = {"siglip_768x6144": (768, 6144), "effnet_1280x512": (1280, 512)}
TAGS, ROWS, ROUNDS, K = 60, 16384, 7, 32
BATCH = 128  # what `k2 annotate` hands over


def random_sae(dim: int, num: int, rng: np.random.Generator) -> sae.Sae:
    """Unit decoder rows, tied; thresholds that about one row in a hundred passes."""
    w_dec = rng.normal(size=(num, dim)).astype(np.float32)
    w_dec /= np.linalg.norm(w_dec, axis=1, keepdims=True)
    zeros = torch.zeros(num)
    return sae.Sae(torch.from_numpy(w_dec.T.copy()), zeros, torch.from_numpy(w_dec), torch.zeros(dim), torch.full((num,), 2.3), {})


def seconds(function: Callable[[], object]) -> float:
    """Median CPU time of a call."""
    found = []
    for _ in range(ROUNDS):
        start = time.process_time()
        function()
        found.append(time.process_time() - start)
    return statistics.median(found)


def in_batches(function: Callable[[np.ndarray], object], vectors: np.ndarray, size: int) -> list[object]:
    """The function over the vectors, `size` rows at a time."""
    return [function(vectors[start : start + size]) for start in range(0, len(vectors), size)]


def measure(dim: int, num: int) -> dict[str, object]:
    """Rates of one size of SAE."""
    rng = np.random.default_rng(0)
    model, vectors = random_sae(dim, num, rng), rng.normal(size=(ROWS, dim)).astype(np.float32)
    tagged = exact.columns(model, rng.choice(num, TAGS, replace=False))
    everything = exact.columns(model)
    w, b, cut = model.w_enc[:, tagged.features], model.b_enc[tagged.features], model.threshold[tagged.features]

    def float32(rows: np.ndarray) -> np.ndarray:
        pre = torch.from_numpy(rows) @ w + b
        return torch.where(pre > cut, pre, torch.zeros_like(pre)).numpy()

    few = vectors[:1024]
    rates = {
        "tags": ROWS / seconds(lambda: in_batches(lambda rows: exact.codes(tagged, rows), vectors, BATCH)),
        "tags_float32_torch": ROWS / seconds(lambda: in_batches(float32, vectors, BATCH)),
        "all_top_k": len(few) / seconds(lambda: in_batches(lambda rows: exact.codes(everything, rows, K), few, BATCH)),
        "all_top_k_float32_torch": len(few)
        / seconds(lambda: in_batches(lambda rows: sae.encode(model, torch.from_numpy(rows), K), few, BATCH)),
    }
    one, other = (np.concatenate(in_batches(float32, vectors, size)) for size in (1, BATCH))
    exact_one, exact_other = (np.concatenate(in_batches(lambda rows: exact.values(tagged, rows), vectors, size)) for size in (1, BATCH))
    return {
        "rows_per_cpu_s": {name: round(rate) for name, rate in rates.items()},
        "tags_million_per_minute": round(60 * rates["tags"] / 1e6, 2),
        "differs_with_the_batch": {"ours": int((exact_one != exact_other).sum()), "float32_torch": int((one != other).sum())},
        "largest_difference": float(np.abs(exact_other - other).max()),
    }


def main() -> None:
    """Measure both sizes and append the line."""
    line = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s)",
        "tags": TAGS,
        "batch": BATCH,
        "k": K,
    } | {name: measure(*size) for name, size in SIZES.items()}
    with open(RESULTS, "a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line, indent=1))


if __name__ == "__main__":
    main()
