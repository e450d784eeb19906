"""Semantic duplicates (SemDeDup, arXiv 2303.09540): images whose embeddings nearly agree, found inside k-means cells.

Crops, mirrored copies and edits that move too many bits of a phash. A threshold belongs to one tower and is measured, never
carried over: the cosines of another tower mean something else (docs/log.md).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from curation.cells import SAMPLE, Cells, kmeans, num_cells, places, units
from curation.dedup import bytes_of, hamming, telling
from curation.groups import integers, numbered, ranks, stars
from curation.hamming import PHASH_BITS
from curation.schema import SEMANTIC

# Per tower, measured on planted 5 % crops and on all pairs of real images: the cosine, and the phash bits that confirm it. Half of
# the bits of two unrelated images differ (72, give or take 6), so 48 is no evidence for a pair but strong evidence against chance.
MEASURED = {"effnet": (0.80, 48)}
ALONE = {"group": None, "group_size": 1, "representative": True, "cosine": None}
TILE = 2048  # rows of a block of cosines
LARGE = 16_384  # a cell with more images is cut again


@dataclass(frozen=True)
class Semantic:
    """What counts as the same content. `version` changes whenever the method does."""

    tower: str
    cosine: float  # smallest cosine of two vectors, the corpus mean taken off
    phash_bits: int = PHASH_BITS  # largest Hamming distance of the phash, to the image or its mirror; all bits: not asked
    min_side: int = 192  # sprites are enlarged by the tower and come out alike; no bucket of K2 takes images under 256, a crop may be less
    probes: int = 4  # cells in which an image near a border is looked for
    version: int = 1

    @property
    def reach(self) -> float:
        """Distance of two unit vectors with that cosine."""
        return (2 - 2 * self.cosine) ** 0.5


def description_for(tower: str, cosine: float | None = None) -> Semantic:
    """The description for a tower.

    Raises:
        ValueError: no threshold was measured for the tower and none is given, or it is not in 0 to 1.
    """
    if cosine is None and tower not in MEASURED:
        raise ValueError(
            f"no cosine threshold was measured for the tower {tower!r} (known: {', '.join(MEASURED)}), and those of another do not hold; "
            "measure one with `python benchmarks/bench_dedup.py planted`, and give it as --cosine"
        )
    if cosine is not None and not 0 < cosine < 1:
        raise ValueError(f"--cosine {cosine}: choose a value between 0 and 1")
    measured, bits = MEASURED.get(tower, (None, PHASH_BITS))
    return Semantic(tower, measured if cosine is None else cosine, bits)


def comparable(rows: pa.Table, description: Semantic) -> np.ndarray:
    """Whether (N,) rows of `basics` without broken images are compared at all: large enough, and not flat (see dedup.telling)."""
    side = np.minimum(integers(rows["width"]), integers(rows["height"]))
    return (side >= description.min_side) & telling(bytes_of(rows["phash"]))


@dataclass(frozen=True, eq=False)
class Found:
    """Pairs (left, right) of ids with their cosine, and for ids the largest cosine to any other image that was looked at."""

    left: np.ndarray
    right: np.ndarray
    cosine: np.ndarray
    ids: np.ndarray
    nearest: np.ndarray

    def at(self, rows: np.ndarray) -> "Found":
        """The same with the pairs as places in `rows` (R,), which rise and hold all of them."""
        return replace(self, left=np.searchsorted(rows, self.left), right=np.searchsorted(rows, self.right))


def near_vectors(ids: np.ndarray, vectors: np.ndarray, cells: Cells, description: Semantic) -> Iterator[Found]:
    """What `search_cells` finds among all of (N, dim) vectors, as the tower gives them; `ids` (N,) rises."""
    home, visits = places(units(vectors, cells.mean), cells, description.probes, description.reach)
    yield from search_cells(*visitors(home, visits), ids, vectors, cells.mean, description)


def visitors(home: np.ndarray, visits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(cell, at home, row), one entry per row and cell it is looked for in: sorted by cell, those at home first, then by row."""
    row, column = np.nonzero(visits >= 0)
    cell = np.concatenate([home, visits[row, column]])
    rows = np.concatenate([np.arange(len(home)), row])
    at_home = np.arange(len(cell)) < len(home)
    order = np.lexsort((rows, ~at_home, cell))
    return cell[order], at_home[order], rows[order]


def search_cells(
    cell: np.ndarray, at_home: np.ndarray, row: np.ndarray, ids: np.ndarray, vectors: np.ndarray, mean: np.ndarray, description: Semantic
) -> Iterator[Found]:
    """The near pairs of each cell; entries as `visitors` gives them, `ids` and `vectors` by row."""
    starts = np.flatnonzero(np.diff(cell, prepend=-1))
    for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), len(cell)], strict=True):
        rows = row[start:stop]
        yield search_cell(ids[rows], vectors[rows], int(at_home[start:stop].sum()), mean, description)


def search_cell(ids: np.ndarray, vectors: np.ndarray, num_home: int, mean: np.ndarray, description: Semantic) -> Found:
    """Pairs of which one at least is at home here (the first `num_home` rows), by blocks of cosines."""
    if len(ids) > LARGE:
        count = num_cells(len(ids))
        inner = Cells(mean, kmeans(units(vectors[:: max(1, len(ids) // (SAMPLE * count))], mean), count))
        home, visits = places(units(vectors, mean), inner, description.probes, description.reach)
        if np.bincount(home).max() < len(ids) / 2:  # else it cannot be cut: nearly all are equal
            return merged(list(search_cells(*visitors(home, visits), ids, vectors, mean, description)))
    unit = units(vectors, mean)
    best = np.full(len(ids), -1, np.float32)
    found = []
    for down in range(0, len(ids), TILE):
        for across in range(0, min(num_home, down + TILE), TILE):
            a, b = unit[down : down + TILE], unit[across : min(across + TILE, num_home)]
            cosine = a @ b.T
            # Of two at home, one is above the diagonal and one below: the upper half counts once.
            rows, columns = np.arange(down, down + len(a)), np.arange(across, across + len(b))
            cosine[rows[:, None] <= columns] = -1
            best[rows] = np.maximum(best[rows], cosine.max(1))
            best[columns] = np.maximum(best[columns], cosine.max(0))
            i, j = np.nonzero(cosine >= description.cosine)
            found.append((rows[i], columns[j], cosine[i, j]))
    left, right, cosine = (np.concatenate(part) for part in zip(*found, strict=True)) if found else (np.zeros(0, int),) * 3
    return Found(ids[left], ids[right], cosine.astype(np.float32), ids, best)


def merged(parts: Iterable[Found]) -> Found:
    """All parts as one: each pair once (left < right, sorted), each id once with its largest cosine."""
    none = np.zeros(0, np.int64)
    pairs, nearest = [(none, none, none.astype(np.float32))], np.full(0, -2, np.float32)
    for part in parts:
        pairs.append((np.minimum(part.left, part.right), np.maximum(part.left, part.right), part.cosine))
        more = int(part.ids.max(initial=-1)) + 1 - len(nearest)
        if more > 0:
            nearest = np.append(nearest, np.full(more, -2, np.float32))
        np.maximum.at(nearest, part.ids, part.nearest)
    left, right, cosine = (np.concatenate(column) for column in zip(*pairs, strict=True))
    order = np.lexsort((-cosine, right, left))
    left, right, cosine = left[order], right[order], cosine[order]
    first = np.ones(len(left), bool)
    first[1:] = (left[1:] != left[:-1]) | (right[1:] != right[:-1])
    ids = np.flatnonzero(nearest > -2)
    return Found(left[first], right[first], cosine[first], ids, nearest[ids])


def confirmed(found: Found, images: np.ndarray, mirrors: np.ndarray, description: Semantic) -> Found:
    """Only the pairs whose phashes are near enough; uint8 (N, 18) hashes of the images and their mirrors, by id."""
    left, right = found.left, found.right
    bits = np.minimum(hamming(images[left], images[right]), hamming(images[left], mirrors[right]))
    near = np.minimum(bits, hamming(mirrors[left], images[right])) <= description.phash_bits
    return replace(found, left=left[near], right=right[near], cosine=found.cosine[near])


def groups(rows: pa.Table, known: np.ndarray, kept: np.ndarray, found: Found, description: Semantic) -> tuple[Found, pa.Table]:
    """The pairs that phashes confirm, and the columns of schema.SEMANTIC that are about groups, one row per row of `rows`.

    Args:
        rows: images that decode, as `basics` has them, sorted by uid.
        known: bool (R,), the rows that have a vector.
        kept: (R,), the place of the row that stands for each row among its duplicates: only such rows are compared.
        found: pairs of places in `rows`.
    """
    found = confirmed(found, bytes_of(rows["phash"]), bytes_of(rows["phash_mirror"]), description)
    chosen = stars(found.left, found.right, ranks(rows))[kept]
    chosen = np.where(known, chosen, np.arange(len(chosen)))
    number, size = numbered(chosen)
    cosine = np.full(len(chosen), np.nan)
    for one, other in ((found.left, found.right), (found.right, found.left)):
        to_it = chosen[one] == other
        cosine[one[to_it]] = found.cosine[to_it]
    columns = {
        "group": pa.array(number, mask=size == 1),
        "group_size": size,
        "representative": chosen == np.arange(len(chosen)),
        "cosine": pa.array(cosine, mask=np.isnan(cosine)),
    }
    return found, pa.table(columns).cast(pa.schema([SEMANTIC.field(name) for name in columns]))
