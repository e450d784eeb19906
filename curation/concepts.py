"""Over-represented concepts: hierarchical k-means, and a weight per image that balances them (arXiv 2405.15613).

K2 clusters its midtraining images like this (report, "Midtraining Data"). The web has many images of few concepts, and k-means puts
most of its centroids where most images are. Resampling flattens that: each step keeps the images nearest to each centroid, as many
from every cluster, and clusters those again. The centroids of one level are the points of the next.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa

from curation.cells import Cells, kmeans, nearest, units
from curation.schema import CONCEPTS

SAMPLE = 64  # training images per leaf: with 4 sqrt(N) leaves, training costs as much per image however many there are
MOST_LEAVES = 16_384


@dataclass(frozen=True)
class Concepts:
    """How concepts are found. `version` changes whenever the method does."""

    tower: str
    levels: tuple[int, ...]  # clusters per level, the finest first
    num_resamplings: int = 5
    version: int = 1


def levels_for(num_images: int) -> tuple[int, ...]:
    """Three levels: 64 images to a leaf or more, eight clusters of one level to one of the next."""
    leaves = max(1, min(num_images // 64, int(4 * num_images**0.5), MOST_LEAVES))
    return (leaves, max(1, leaves // 8), max(1, leaves // 64))


def check_levels(levels: tuple[int, ...], num_images: int) -> None:
    """Raises ValueError where levels do not fall, or there are more leaves than images."""
    if not levels or min(levels) < 1 or any(a < b for a, b in pairwise(levels)):
        raise ValueError(f"--levels {levels}: give clusters per level, the finest first, as 512 64 8")
    if levels[0] > num_images:
        raise ValueError(f"--levels {levels}: more leaves than the {num_images} images that have a vector")


@dataclass(frozen=True, eq=False)
class Tree:
    """cells: mean and leaf centroids. parents[i] (K_i,): the cluster of level i + 1 that each cluster of level i is in."""

    cells: Cells
    parents: tuple[np.ndarray, ...]


def fit_tree(sample: np.ndarray, description: Concepts) -> Tree:
    """The tree of a sample (S, dim) of vectors as the tower gives them."""
    mean = sample.astype(np.float64).mean(0).astype(np.float32)
    points, levels = units(sample, mean), []
    for count in description.levels:
        levels.append(_level(points, count, description.num_resamplings))
        points = levels[-1]
    parents = tuple(nearest(low, high)[1][:, 0] for low, high in pairwise(levels))
    return Tree(Cells(mean, levels[0]), parents)


def _level(points: np.ndarray, count: int, num_resamplings: int) -> np.ndarray:
    """Centroids (count, dim): k-means, then k-means again of the points nearest to each centroid, as many from each cluster.

    Half of a mean cluster is taken: what the paper's configuration for web images does.
    """
    centroids = kmeans(points, count)
    each = len(points) // count // 2
    for _ in range(num_resamplings if each > 1 else 0):
        squared, cluster = (found[:, 0] for found in nearest(points, centroids))
        order = np.lexsort((squared, cluster))
        starts = np.searchsorted(cluster[order], np.arange(count))
        near = np.sort(order[np.arange(len(order)) - starts[cluster[order]] < each])
        if len(near) < count:
            break
        centroids = kmeans(points[near], count)
    return centroids


def leaves(vectors: np.ndarray, tree: Tree) -> np.ndarray:
    """The leaf (N,) of (N, dim) vectors as the tower gives them."""
    return nearest(units(vectors, tree.cells.mean), tree.cells.centroids)[1][:, 0]


def paths(leaf: np.ndarray, tree: Tree) -> np.ndarray:
    """Clusters (N, levels) of leaves (N,), the coarsest first."""
    path = [leaf]
    for parents in tree.parents:
        path.append(parents[path[-1]])
    return np.stack(path[::-1], axis=1)


def weights(path: np.ndarray, counted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(weight (N,), sizes (N, levels)) of leaves or images with their paths (N, levels).

    Top down, every cluster shares evenly among those of its children that have images; a leaf among its images (section 4.3 of the
    paper, without its cap: an image whose weight is over 1 / target is simply always taken). `counted` (N,) images each make up sizes;
    their weights have mean 1. The others weigh what their leaf does.
    """
    num_levels = path.shape[1]
    sizes = np.stack([np.bincount(path[:, i], counted)[path[:, i]].astype(np.int64) for i in range(num_levels)], axis=1)
    share = np.ones(len(path))
    parent = np.zeros(len(path), np.int64)
    for i in range(num_levels):
        pairs = np.unique(np.stack([parent[counted > 0], path[counted > 0, i]]), axis=1)
        children = np.bincount(pairs[0], minlength=parent.max() + 1)
        share /= np.maximum(children[parent], 1)
        parent = path[:, i]
    return int(counted.sum()) * share / np.maximum(sizes[:, -1], 1), sizes


def leaf_table(tree: Tree, counted: np.ndarray) -> pa.Table:
    """The columns leaf, path, sizes and weight of schema.CONCEPTS, one row per leaf; `counted` (leaves,) images are in each."""
    leaf = np.arange(len(counted))
    path = paths(leaf, tree)
    weight, sizes = weights(path, counted)
    columns = {"leaf": leaf, "path": path.tolist(), "sizes": sizes.tolist(), "weight": weight}
    return pa.table(columns).cast(pa.schema([CONCEPTS.field(name) for name in columns])).combine_chunks()
