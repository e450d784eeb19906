"""Embeddings cut into cells by k-means, so that like images are found without comparing all pairs, and pairs near a border too.

Vectors have the corpus mean taken off and unit length: a tower whose values are all positive gives every two images a cosine of
some tenths, which the mean carries. A sample chosen by uid trains mean and cells, on one thread, so both are the same whatever the
order of shards, the number of workers and the size of the corpus in memory.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
import pyarrow.parquet as pq
from threadpoolctl import threadpool_limits

PER_CELL = 1024  # images in a cell on average; more where there would be over 4 sqrt(N) cells, and finding the cell cost most
SAMPLE, LEAST = 64, 1 << 14  # training images per cell, and at least
BLOCK = 4096  # rows that are multiplied together: fixed, because the last bits of a product depend on its shape


@dataclass(frozen=True, eq=False)
class Cells:
    """Mean (dim,) and centroids (K, dim), float32."""

    mean: np.ndarray
    centroids: np.ndarray


def draws(uids: list[str]) -> np.ndarray:
    """A number (N,) in 0 to 1 per uid, evenly spread, always the same for the same uid: blake2b, 53 bits."""
    digests = b"".join(hashlib.blake2b(uid.encode(), digest_size=8).digest() for uid in uids)
    return (np.frombuffer(digests, "<u8") >> np.uint64(11)) / 2.0**53


def read_vectors(path: str | Path, rows: np.ndarray) -> np.ndarray:
    """float16 (len(rows), dim) vectors of rows of a tower's annotation that have one."""
    column = pq.read_table(path, columns=["vector"])["vector"].combine_chunks().take(rows)
    assert column.null_count == 0, f"{path}: {column.null_count} of the rows asked for have no vector"
    data = np.frombuffer(column.buffers()[1] or b"", "<f2")
    dim = column.type.byte_width // 2
    return data[column.offset * dim : (column.offset + len(column)) * dim].reshape(-1, dim)


def num_cells(num_rows: int) -> int:
    """How many cells so many images are cut into."""
    return max(1, min(num_rows // PER_CELL, int(4 * num_rows**0.5)))


def num_samples(num_rows: int) -> int:
    """How many of so many images train mean and cells."""
    return min(num_rows, max(SAMPLE * num_cells(num_rows), LEAST))


def sample_rows(draw: np.ndarray, among: np.ndarray, count: int) -> np.ndarray:
    """Rows of the `count` images with the smallest draws (N,) `among` (N,) those that may be drawn, in their order."""
    allowed = draw[among]
    largest = np.partition(allowed, count - 1)[count - 1] if 0 < count < len(allowed) else np.inf
    rows = np.flatnonzero(among & (draw <= largest))
    return rows[np.argsort(draw[rows], kind="stable")][:count]


def fit_cells(sample: np.ndarray, count: int) -> Cells:
    """Mean and `count` centroids of a sample (S, dim) of vectors as the tower gives them, S >= count."""
    mean = sample.astype(np.float64).mean(0).astype(np.float32)
    return Cells(mean, kmeans(units(sample, mean), count))


def units(vectors: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """float32 (N, dim) of unit length, the mean taken off. A vector equal to the mean becomes zero: like no other."""
    centred = vectors.astype(np.float32) - mean
    return centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-6)


def kmeans(vectors: np.ndarray, count: int, num_steps: int = 10) -> np.ndarray:
    """Centroids (count, dim) of float32 (N, dim) vectors, N >= count; the same on any number of cores."""
    assert len(vectors) >= count, (len(vectors), count)
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        with threadpool_limits(1):
            model = faiss.Kmeans(
                vectors.shape[1], count, niter=num_steps, seed=1, min_points_per_centroid=1, max_points_per_centroid=1 << 30
            )
            model.train(np.ascontiguousarray(vectors, np.float32))
    finally:
        faiss.omp_set_num_threads(before)
    return model.centroids.reshape(count, -1).copy()


def nearest(vectors: np.ndarray, centroids: np.ndarray, count: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """(squared distances, centroids) (N, count) of the `count` nearest centroids of float32 (N, dim) vectors, nearest first."""
    index = faiss.IndexFlatL2(centroids.shape[1])
    index.add(centroids)
    count = min(count, len(centroids))
    squared, found = np.empty((len(vectors), count), np.float32), np.empty((len(vectors), count), np.int64)
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        with threadpool_limits(1):
            for start in range(0, len(vectors), BLOCK):
                piece = slice(start, start + BLOCK)
                squared[piece], found[piece] = index.search(vectors[piece], count)
    finally:
        faiss.omp_set_num_threads(before)
    return squared, found


def places(vectors: np.ndarray, cells: Cells, probes: int, reach: float) -> tuple[np.ndarray, np.ndarray]:
    """(home (N,), visits (N, probes - 1)) of unit vectors: the nearest cell, and others whose border is within reach / 2; -1 for none.

    Two images within `reach` of each other in two cells have the plane between the centroids c and d between them, so one of them is
    within reach / 2 of it; the distance to that plane is (|x - d|^2 - |x - c|^2) / (2 |c - d|). Only the nearest `probes` cells
    are looked at, so that a pair can be lost where many borders meet (the recall is in docs/log.md).
    """
    squared, found = nearest(vectors, cells.centroids, probes)
    home, others = found[:, 0], found[:, 1:]
    visits = np.full(others.shape, -1)
    for start in range(0, len(vectors), BLOCK):
        piece = slice(start, start + BLOCK)
        apart = np.linalg.norm(cells.centroids[home[piece], None] - cells.centroids[others[piece]], axis=2)
        near = squared[piece, 1:] - squared[piece, :1] <= reach * apart
        visits[piece] = np.where(near, others[piece], -1)
    return home, visits
