"""Groups of images that show the same thing, each with the one to keep; shared by every kind of duplicate.

A group is a star: each member was itself found to be the same as its representative. Connected components would chain: among
billions of images a and z end up in one group because each letter looks like the next, and all but one are removed though most
were never compared with the one that is kept.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

# Quality of a file, to choose a representative: IJG's scale for JPEG, above it where nothing was lost. Of the other containers
# (WebP, AVIF ...) we know no more than that they are usually saved well.
LOSSLESS, LOSSLESS_QUALITY, UNKNOWN_QUALITY = ("PNG", "BMP", "TIFF", "PPM", "TGA"), 101, 90


def ranks(rows: pa.Table) -> np.ndarray:
    """Place (N,) of each image among those to keep, 0 is the best: most pixels; then the best quality, most bytes, the first uid.

    `rows` are rows of `basics` without broken images, sorted by uid.
    """
    pixels = integers(rows["width"]) * integers(rows["height"])
    lossless = pc.is_in(rows["format"], pa.array(LOSSLESS, pa.string())).to_numpy()
    quality = np.where(lossless, LOSSLESS_QUALITY, rows["jpeg_quality"].fill_null(UNKNOWN_QUALITY).to_numpy())
    best_first = np.lexsort((-integers(rows["bytes"]), -quality, -pixels))  # stable: equal ones stay in the order of uid
    place = np.empty_like(best_first)
    place[best_first] = np.arange(len(best_first))
    return place


def integers(column: pa.ChunkedArray) -> np.ndarray:
    """A column without nulls as int64 (N,)."""
    return column.to_numpy().astype(np.int64)


def join(num_rows: int, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Labels (N,): rows that are joined by pairs (left[i], right[i]), directly or through others, share one."""
    edges = coo_array((np.ones(len(left), bool), (left, right)), shape=(num_rows, num_rows))
    return connected_components(edges, directed=False)[1].astype(np.int64) if num_rows else np.zeros(0, np.int64)


def stars(left: np.ndarray, right: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """The representative (N,) of each row: the best-ranked neighbour that is one, or the row itself.

    In the order of `rank`, a row that no representative is a neighbour of becomes a representative. The pairs (left[i], right[i])
    may come in any order, and several times; no two ranks are equal. All rows that wait for no better one are decided together.
    """
    at = np.argsort(rank)
    rank = np.empty_like(at)
    rank[at] = np.arange(len(at))
    swap = rank[left] > rank[right]
    better, worse = np.where(swap, right, left), np.where(swap, left, right)
    member = np.zeros(len(rank), bool)
    open_better, open_worse = better[better != worse], worse[better != worse]
    waits, closed = np.zeros(len(rank), bool), np.zeros(len(rank), bool)
    while len(open_better):
        waits[open_worse] = True
        decided = ~waits[open_better]
        member[open_worse[decided]] = True
        waits[open_worse] = False
        closed[open_better[decided]] = True
        closed |= member
        go_on = ~(closed[open_better] | closed[open_worse])
        open_better, open_worse = open_better[go_on], open_worse[go_on]
    use = member[worse] & ~member[better]
    best = np.full(len(rank), len(rank))
    np.minimum.at(best, worse[use], rank[better[use]])
    chosen = np.arange(len(rank))
    chosen[member] = at[best[member]]
    return chosen


def numbered(chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(number, size) (N,) of each row's group, numbered in the order of its first row; -1 and 1 for a row of its own."""
    size = np.bincount(chosen, minlength=len(chosen))[chosen]
    grouped = np.flatnonzero(size > 1)
    number = np.full(len(chosen), -1)
    _, first, inverse = np.unique(chosen[grouped], return_index=True, return_inverse=True)
    number[grouped] = np.argsort(np.argsort(first))[inverse]
    return number, size
