"""Exact and perceptual duplicates: groups and their representatives, from the annotation `basics`. No pixel is looked at.

K2 removes duplicates with md5, a 12x12 phash and a colorhash (report, "Pretraining Data"): a phash ignores colour, so the
colorhash has to agree. The report gives no threshold. Ours (12 bits of 144, colour difference 10) were measured with copies
planted among 1,021 images (docs/log.md): they find 96 % of the copies at 60 % size and JPEG quality 60, 97 % of those that are
mirrored as well, and 93 % of crops of 1 %, and join no two different pictures; the first such pair comes at 16 bits. A crop of
5 % moves far more bits, so crops are left to embeddings.

A group is a connected component: a burst of photographs is one group, even where its ends are further apart than the threshold.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from curation.schema import BASICS, COLORHASH_BYTES, DUPLICATES, PHASH_BYTES
from curation.shards import file_hash, fingerprint

PHASH_BITS = 8 * PHASH_BYTES
COLOR_BINS, COLOR_BITS = 14, 3
# Quality of a file, to choose a representative: IJG's scale for JPEG, above it where nothing was lost. Of the other containers
# (WebP, AVIF ...) we know no more than that they are usually saved well.
LOSSLESS, LOSSLESS_QUALITY, UNKNOWN_QUALITY = ("PNG", "BMP", "TIFF", "PPM", "TGA"), 101, 90
COLUMNS = ("uid", "bytes", "md5", "width", "height", "format", "phash", "phash_mirror", "colorhash", "jpeg_quality", "error")


@dataclass(frozen=True)
class Dedup:
    """What counts as the same picture. `version` changes whenever the method does."""

    phash_bits: int = 12  # largest Hamming distance of the phash, to the image or to its mirror
    color_steps: int = 10  # largest sum over the 14 colour bins of the difference of their values (0 to 7)
    version: int = 1


def basics_files(run_dir: str) -> list[Path]:
    """The annotation `basics` of a run, by name.

    Raises:
        FileNotFoundError: there is none.
    """
    files = sorted(Path(run_dir, "annotations", "basics").glob("*.parquet"))
    if not files:
        raise FileNotFoundError(f"{run_dir} has no annotation basics; run `k2 annotate --source ... --out {run_dir}` first")
    return files


def made_by(files: list[Path], description: Dedup) -> str:
    """The fingerprint of the groups: it changes with a threshold, and with any byte of the annotations they are found from."""
    return fingerprint({"dedup": description, "basics": {file.name: file_hash(file) for file in files}})


def read_basics(files: list[Path]) -> pa.Table:
    """The columns that duplicates are found from."""
    return pyarrow.dataset.dataset(files, format="parquet").to_table(columns=list(COLUMNS))


def find_duplicates(basics: pa.Table, description: Dedup = Dedup(), watch: Callable[[range], Iterable[int]] = iter) -> pa.Table:
    """schema.DUPLICATES, one row per row of `basics` (whatever their order), sorted by uid.

    A broken image has its error and no values: no policy keeps it, so it may not stand for a group. The representative has most
    pixels; then the best quality, most bytes, the first uid. Groups are numbered in the order of their first uid. `watch` wraps
    the 144 steps of the search, to show progress.
    """
    types = pa.schema([pa.field(name, BASICS.field(name).type) for name in COLUMNS])
    basics = basics.select(COLUMNS).cast(types).sort_by("uid").combine_chunks()
    good = basics["error"].is_null().to_numpy()
    rows = basics.filter(good)
    md5 = rows["md5"].combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False)
    images, mirrors = hash_words(rows["phash"]), hash_words(rows["phash_mirror"])
    labels = _components(md5, images, mirrors, color_values(rows["colorhash"]), description, watch)

    pixels = _integers(rows["width"]) * _integers(rows["height"])
    best_first = np.lexsort((-_integers(rows["bytes"]), -_quality(rows), -pixels))  # stable: equal ones stay in the order of uid
    _, first, inverse, count = np.unique(labels[best_first], return_index=True, return_inverse=True, return_counts=True)
    chosen, size = np.empty_like(labels), np.empty_like(labels)
    chosen[best_first], size[best_first] = best_first[first[inverse]], count[inverse]
    grouped = size > 1
    number = np.zeros_like(labels)
    _, first, inverse = np.unique(labels[grouped], return_index=True, return_inverse=True)
    number[grouped] = np.argsort(np.argsort(first))[inverse]

    straight = hamming(images, images[chosen])
    flipped = np.minimum(hamming(images, mirrors[chosen]), hamming(mirrors, images[chosen]))
    columns = {
        "group": (number, grouped),
        "group_size": (size, None),
        "kind": (np.where(~grouped, "unique", np.where(md5 == md5[chosen], "exact", "perceptual")), None),
        "representative": (chosen == np.arange(len(rows)), None),
        "distance": (np.minimum(straight, flipped), grouped),
        "mirrored": (flipped < straight, grouped),
    }
    cells = [_scatter(values, known, good, DUPLICATES.field(name).type) for name, (values, known) in columns.items()]
    return pa.Table.from_arrays([basics["uid"], *cells, basics["error"]], schema=DUPLICATES)


def _scatter(values: np.ndarray, known: np.ndarray | None, good: np.ndarray, kind: pa.DataType) -> pa.Array:
    """The values of the good rows as a column of all rows; null elsewhere, and where a value is not `known`."""
    out = np.zeros(len(good), values.dtype)
    out[good] = values
    null = ~good
    if known is not None:
        null[good] |= ~known
    return pa.array(out, mask=null).cast(kind)


# --- which images are the same ---


def _components(
    md5: np.ndarray, images: np.ndarray, mirrors: np.ndarray, colors: np.ndarray, description: Dedup, watch: Callable
) -> np.ndarray:
    """A label (N,) per image; images of one group share it. All arguments have N rows."""
    labels = md5
    # Where many coefficients are equal (a flat or nearly empty picture) the median splits them unevenly, and the bits say nothing.
    telling = np.flatnonzero(np.bitwise_count(images).sum(1) == PHASH_BITS // 2)
    # Files with the same hashes are the same picture; the search needs one of them, or ten thousand copies would be 50 million pairs.
    _, one, inverse = np.unique(np.hstack([images, mirrors, colors])[telling], axis=0, return_index=True, return_inverse=True)
    labels = _join(labels, telling, telling[one][inverse.reshape(-1)])
    nodes = telling[one]
    entries = np.concatenate([images[nodes], mirrors[nodes]])  # a mirrored copy is one whose phash is near another's mirror
    owner = np.concatenate([nodes, nodes])
    for left, right in candidates(entries, description.phash_bits, watch):
        use = labels[owner[left]] != labels[owner[right]]  # known already; and the two mirrors of two images say nothing new
        use &= (left < len(nodes)) | (right < len(nodes))
        left, right = left[use], right[use]
        near = hamming(entries[left], entries[right]) <= description.phash_bits
        left, right = owner[left[near]], owner[right[near]]
        near = np.abs(colors[left].astype(np.int64) - colors[right].astype(np.int64)).sum(1) <= description.color_steps
        if near.any():
            labels = _join(labels, left[near], right[near])
    return labels


def _join(labels: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Labels (N,) after joining the groups of image left[i] and image right[i]."""
    size = int(labels.max(initial=-1)) + 1
    edges = coo_array((np.ones(len(left), bool), (labels[left], labels[right])), shape=(size, size))
    return connected_components(edges, directed=False)[1].astype(np.int64)[labels] if size else labels


def candidates(
    entries: np.ndarray, max_bits: int, watch: Callable[[range], Iterable[int]] = iter
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of rows (left, right) of `entries` (N, 3) that may lie within `max_bits`; no such pair is left out.

    Multi-index hashing (Norouzi, Punjani and Fleet, arXiv 1307.2982): of max_bits // 2 + 1 bands of bits, one differs in at most
    one bit. So for each bit, the rows that agree in all other bits of its band are candidates: 144 sorts instead of N^2 distances.
    Yielded in pieces of at most N pairs; a pair can come several times.
    """
    num_bands = max(max_bits // 2 + 1, 3)  # a band has at most 48 bits, which fit in a word
    # A band is every num_bands-th bit, so that none is made of the low frequencies alone, which pictures share most.
    steps = [(band, place) for band in range(num_bands) for place in range(len(range(band, PHASH_BITS, num_bands)))]
    for i in watch(range(len(steps))):
        band, place = steps[i]
        if place == 0:
            bits = np.unpackbits(entries.astype("<u8").view(np.uint8), axis=1)[:, band:PHASH_BITS:num_bands]
            packed = np.packbits(bits, axis=1, bitorder="little")
            words = np.pad(packed, ((0, 0), (0, 8 - packed.shape[1]))).view("<u8")[:, 0]
        key = words & ~np.uint64(1 << place)
        order = np.argsort(key)
        key = key[order]
        left, step = np.arange(len(order)), 0
        while True:
            step += 1
            left = left[left + step < len(order)]
            left = left[key[left] == key[left + step]]
            if not len(left):
                break
            yield order[left], order[left + step]


def hash_words(column: pa.ChunkedArray) -> np.ndarray:
    """A column of 18-byte hashes as uint64 (N, 3), zero padded: what `hamming` takes."""
    values = np.frombuffer(b"".join(column.to_pylist()), np.uint8).reshape(-1, PHASH_BYTES)
    return np.pad(values, ((0, 0), (0, -PHASH_BYTES % 8))).view("<u8")


def hamming(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Bits (N,) that differ between the rows of two uint64 arrays (N, 3)."""
    return np.bitwise_count(a ^ b).sum(1, dtype=np.int64)


def color_values(column: pa.ChunkedArray) -> np.ndarray:
    """A column of colorhashes as its 14 bins (N, 14), values 0 to 7: black, grey, six faint hues, six bright hues."""
    values = np.frombuffer(b"".join(column.to_pylist()), np.uint8).reshape(-1, COLORHASH_BYTES)
    values = np.unpackbits(values, axis=1)[:, : COLOR_BINS * COLOR_BITS]
    return values.reshape(-1, COLOR_BINS, COLOR_BITS) @ np.array([4, 2, 1], np.uint8)


def _integers(column: pa.ChunkedArray) -> np.ndarray:
    return column.to_numpy().astype(np.int64)


def _quality(rows: pa.Table) -> np.ndarray:
    """Quality (N,) of the files, to choose a representative."""
    jpeg = rows["jpeg_quality"].fill_null(UNKNOWN_QUALITY).to_numpy()
    return np.where(np.isin(rows["format"].to_pylist(), LOSSLESS), LOSSLESS_QUALITY, jpeg)
