"""Exact and perceptual duplicates: groups and their representatives, from the annotation `basics`. No pixel is looked at.

K2 removes duplicates with md5, a 12x12 phash and a colorhash (report, "Pretraining Data"): a phash ignores colour, so the
colorhash has to agree. The report gives no threshold. Ours (12 bits of 144, colour difference 10) were measured with copies
planted among 1,021 images (docs/log.md): they find 96 % of the copies at 60 % size and JPEG quality 60, 97 % of those that are
mirrored as well, and 93 % of crops of 1 %, and join no two different pictures; the first such pair comes at 16 bits. A crop of
5 % moves far more bits, so crops are left to embeddings (curation/semantic.py).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from curation.groups import join, numbered, ranks, stars
from curation.hamming import PHASH_BITS, near_pairs
from curation.ordered import COLUMNS, Ordered, spread
from curation.schema import COLORHASH_BYTES, DUPLICATES, PHASH_BYTES
from curation.shards import file_hash, fingerprint

COLOR_BINS, COLOR_BITS = 14, 3
SAME_BYTES = """SELECT "row" FROM images SEMI JOIN (SELECT md5 FROM images WHERE error IS NULL GROUP BY md5 HAVING count(*) > 1) USING (md5)
    WHERE error IS NULL"""
HASHES = "phash, phash_mirror, colorhash"
SAME_HASHES = f"""SELECT "row", "first" FROM images JOIN (SELECT {HASHES}, min("row") AS "first" FROM images
    WHERE error IS NULL AND bit_count(phash::BIT) = {PHASH_BITS // 2} GROUP BY {HASHES} HAVING count(*) > 1) USING ({HASHES})
    WHERE error IS NULL ORDER BY "row" """
ALONE = {"group": None, "group_size": 1, "kind": "unique", "representative": True, "distance": None, "mirrored": None}
NOTHING = (np.zeros(0, np.int64), np.zeros((0, PHASH_BYTES), np.uint8), np.zeros((0, PHASH_BYTES), np.uint8))
PIECE = 1 << 20  # pairs whose colours are compared together

# (row numbers (P,), uint8 (P, 18) phashes of the images, and of their mirrors), the rows rising from piece to piece
Hashes = Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]
# Pairs (left, right) of those rows of which an image is within so many bits of the other or of its mirror.
Search = Callable[[Hashes, int], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Dedup:
    """What counts as the same picture. `version` changes whenever the method does."""

    phash_bits: int = 12  # largest Hamming distance of the phash, to the image or to its mirror
    color_steps: int = 10  # largest sum over the 14 colour bins of the difference of their values (0 to 7)
    version: int = 2


def annotation_files(run_dir: str, stage: str = "basics") -> list[Path]:
    """The annotation of a stage in a run, sorted by name.

    Raises:
        FileNotFoundError: there is none.
    """
    files = sorted(Path(run_dir, "annotations", stage).glob("*.parquet"))
    if not files:
        raise FileNotFoundError(f"{run_dir} has no annotation {stage}; run `k2 annotate --source ... --out {run_dir}` first")
    return files


def made_by(files: list[Path], description: object) -> str:
    """The fingerprint of groups: it changes with a threshold, and with any byte of the annotations they are found from."""
    return fingerprint({"dedup": description, "files": {f"{file.parent.name}/{file.name}": file_hash(file) for file in files}})


def near_here(hashes: Hashes, max_bits: int, watch: Callable = iter) -> tuple[np.ndarray, np.ndarray]:
    """A Search in this process's memory."""
    rows, images, mirrors = (np.concatenate(part) for part in zip(NOTHING, *hashes, strict=True))
    left, right = near_pairs(np.concatenate([images, mirrors]), max_bits, len(rows), watch)
    return rows[left % max(len(rows), 1)], rows[right % max(len(rows), 1)]


def find_duplicates(images: Ordered, description: Dedup = Dedup(), search: Search = near_here) -> Iterator[pa.Table]:
    """schema.DUPLICATES in pieces, one row per image, in the order of uid.

    A broken image has its error and no values: no policy keeps it, so it may not stand for a group. Groups are stars around the
    image to keep (`groups.stars`), numbered in the order of their first uid. `search` finds the near hashes: in this process, or in
    partitions (pipelines/dedup.py); all find the same ones. Only images that equal or are near another are in memory.
    """
    (exact,) = images.numbers(SAME_BYTES, ("row",))
    equal, first = images.numbers(SAME_HASHES, ("row", "first"))
    left, right = search(_searched(images, equal[equal != first]), description.phash_bits)
    rows = np.unique(np.concatenate([exact, equal, left, right]))
    found = groups(images.take(rows, COLUMNS), np.searchsorted(rows, left), np.searchsorted(rows, right), description)
    for _, piece in spread(images, rows, found, ALONE):
        yield piece.cast(DUPLICATES)


def _searched(images: Ordered, copies: np.ndarray) -> Hashes:
    """The hashes that say something, without those of `copies`, which rise: of ten thousand equal ones one is enough."""
    for start, piece in images.pieces(("phash", "phash_mirror", "error")):
        good = np.flatnonzero(piece["error"].is_null().to_numpy())
        both = [bytes_of(piece[name].take(good)) for name in ("phash", "phash_mirror")]
        asked = telling(both[0]) & ~np.isin(start + good, copies, assume_unique=True)
        yield start + good[asked], both[0][asked], both[1][asked]


def groups(rows: pa.Table, left: np.ndarray, right: np.ndarray, description: Dedup) -> pa.Table:
    """The columns of schema.DUPLICATES but uid and error, for images that decode, sorted by uid, with the near pairs among them."""
    md5 = codes(rows["md5"])
    images, mirrors, colors = (bytes_of(rows[name]) for name in ("phash", "phash_mirror", "colorhash"))
    rank = ranks(rows)
    labels, left, right = _same(md5, images, mirrors, colors, left, right, description)

    # Files of one label are the same picture to the bit, so the best of them stands for all.
    best = np.full(int(labels.max(initial=-1)) + 1, len(rank))
    np.minimum.at(best, labels, rank)
    at = np.empty_like(rank)
    at[rank] = np.arange(len(rank))
    chosen = at[best[stars(left, right, best)[labels]]] if len(rank) else at

    number, size = numbered(chosen)
    alone = size == 1
    straight = hamming(images, images[chosen])
    flipped = np.minimum(hamming(images, mirrors[chosen]), hamming(mirrors, images[chosen]))
    columns = {
        "group": pa.array(number, mask=alone),
        "group_size": size,
        "kind": np.where(alone, "unique", np.where(md5 == md5[chosen], "exact", "perceptual")),
        "representative": chosen == np.arange(len(rank)),
        "distance": pa.array(np.minimum(straight, flipped), mask=alone),
        "mirrored": pa.array(flipped < straight, mask=alone),
    }
    schema = pa.schema([DUPLICATES.field(name) for name in columns])
    return pa.table(columns).cast(schema)


def _same(
    md5: np.ndarray,
    images: np.ndarray,
    mirrors: np.ndarray,
    colors: np.ndarray,
    left: np.ndarray,
    right: np.ndarray,
    description: Dedup,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels (N,) of images that are equal by md5 or by all their hashes, and pairs (left, right) of labels whose colours agree."""
    says = np.flatnonzero(telling(images))
    hashes = np.hstack([images, mirrors, colors])[says]
    code = codes(pa.FixedSizeBinaryArray.from_buffers(pa.binary(hashes.shape[1]), len(hashes), [None, pa.py_buffer(hashes)]))
    labels = join(len(md5), np.concatenate([np.arange(len(md5)), says]), np.concatenate([_first(md5)[md5], says[_first(code)[code]]]))
    near = np.zeros(len(left), bool)
    for start in range(0, len(left), PIECE):
        piece = slice(start, start + PIECE)
        steps = np.abs(color_values(colors[left[piece]]).astype(np.int64) - color_values(colors[right[piece]])).sum(1)
        near[piece] = steps <= description.color_steps
    return labels, labels[left[near]], labels[right[near]]


def telling(images: np.ndarray) -> np.ndarray:
    """Whether (N,) the bits of uint8 (N, 18) phashes say something.

    Where many coefficients are equal (a flat or nearly empty picture) the median splits them unevenly, and all such look alike.
    """
    return np.bitwise_count(images).sum(1, dtype=np.int64) == PHASH_BITS // 2


def _first(code: np.ndarray) -> np.ndarray:
    """The first row of each code; codes count up from 0 in the order of their first rows."""
    first = np.full(int(code.max(initial=-1)) + 1, len(code))
    np.minimum.at(first, code, np.arange(len(code)))
    return first


def codes(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Equal values of a column as equal numbers (N,), counted up in the order of their first rows."""
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return column.dictionary_encode().indices.to_numpy(zero_copy_only=False).astype(np.int64)


def bytes_of(column: pa.ChunkedArray) -> np.ndarray:
    """A column of fixed-size binary without nulls as uint8 (N, size)."""
    array = column.combine_chunks()
    assert array.null_count == 0, f"{array.null_count} of {len(array)} values are null"
    size = array.type.byte_width
    return np.frombuffer(array.buffers()[1] or b"", np.uint8)[array.offset * size : (array.offset + len(array)) * size].reshape(-1, size)


def hamming(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Bits (N,) that differ between the rows of two uint8 arrays (N, 18)."""
    return np.bitwise_count(a ^ b).sum(-1, dtype=np.int64)


def color_values(hashes: np.ndarray) -> np.ndarray:
    """uint8 (N, 6) colorhashes as their 14 bins (N, 14), values 0 to 7: black, grey, six faint hues, six bright hues."""
    assert hashes.shape[1:] == (COLORHASH_BYTES,), hashes.shape
    values = np.unpackbits(hashes, axis=1)[:, : COLOR_BINS * COLOR_BITS]
    return values.reshape(-1, COLOR_BINS, COLOR_BITS) @ np.array([4, 2, 1], np.uint8)
