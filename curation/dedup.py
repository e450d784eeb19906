"""Exact and perceptual duplicates: groups and their representatives, from the annotation `basics`. No pixel is looked at.

K2 removes duplicates with md5, a 12x12 phash and a colorhash (report, "Pretraining Data"): a phash ignores colour, so the
colorhash has to agree. The report gives no threshold. Ours (12 bits of 144, colour difference 10) were measured with copies
planted among 1,021 images (docs/log.md): they find 96 % of the copies at 60 % size and JPEG quality 60, 97 % of those that are
mirrored as well, and 93 % of crops of 1 %, and join no two different pictures; the first such pair comes at 16 bits. A crop of
5 % moves far more bits, so crops are left to embeddings (curation/semantic.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset

from curation.groups import join, numbered, ranks, spread, stars
from curation.hamming import PHASH_BITS, near_pairs
from curation.schema import BASICS, COLORHASH_BYTES, DUPLICATES
from curation.shards import file_hash, fingerprint

COLOR_BINS, COLOR_BITS = 14, 3
PIECE = 1 << 20  # pairs whose colours are compared together
COLUMNS = ("uid", "bytes", "md5", "width", "height", "format", "phash", "phash_mirror", "colorhash", "jpeg_quality", "error")

# Rows (left, right) of uint8 (N, 18) hashes that differ in at most so many bits; the last argument is hamming.near_pairs' num_asked.
Search = Callable[[np.ndarray, int, int], tuple[np.ndarray, np.ndarray]]


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


def read_basics(files: list[Path]) -> pa.Table:
    """The columns that duplicates are found from."""
    return pyarrow.dataset.dataset(files, format="parquet").to_table(columns=list(COLUMNS))


def by_uid(basics: pa.Table) -> pa.Table:
    """The columns that duplicates are found from, sorted by uid: nothing depends on the order of shards.

    Texts have 64-bit offsets: the md5 of 67 million images are more than the 2 GB that 32-bit ones reach.
    """
    kinds = {name: BASICS.field(name).type for name in COLUMNS} | {"uid": pa.large_string(), "md5": pa.large_string()}
    return basics.select(COLUMNS).cast(pa.schema(list(kinds.items()))).sort_by("uid").combine_chunks()


def find_duplicates(basics: pa.Table, description: Dedup = Dedup(), search: Search = near_pairs) -> pa.Table:
    """schema.DUPLICATES, one row per row of `basics` (whatever their order), sorted by uid.

    A broken image has its error and no values: no policy keeps it, so it may not stand for a group. Groups are stars around the
    image to keep (`groups.stars`), numbered in the order of their first uid. `search` finds the near hashes: in this process, or in
    partitions (pipelines/dedup.py); all find the same ones.
    """
    basics = by_uid(basics)
    uids, errors, good = short(basics["uid"]), basics["error"], basics["error"].is_null().to_numpy()
    rows = basics.drop_columns(["uid", "error"])
    rows = rows if good.all() else rows.filter(good)
    del basics  # at ten million images, each copy of the columns is a gigabyte
    md5 = codes(rows["md5"])
    images, mirrors, colors = (bytes_of(rows[name]) for name in ("phash", "phash_mirror", "colorhash"))
    rank = ranks(rows)
    del rows
    labels, left, right = _same(md5, images, mirrors, colors, description, search)

    # Files of one label are the same picture to the bit, so the best of them stands for all.
    best = np.full(int(labels.max(initial=-1)) + 1, len(rank))
    np.minimum.at(best, labels, rank)
    at = np.empty_like(rank)
    at[rank] = np.arange(len(rank))
    chosen = at[best[stars(left, right, best)[labels]]] if len(rank) else at

    number, size = numbered(chosen)
    grouped = size > 1
    straight, flipped = np.zeros(len(rank), np.int64), np.zeros(len(rank), np.int64)
    mine, theirs = np.flatnonzero(grouped), chosen[grouped]
    straight[grouped] = hamming(images[mine], images[theirs])
    flipped[grouped] = np.minimum(hamming(images[mine], mirrors[theirs]), hamming(mirrors[mine], images[theirs]))
    columns = {
        "group": (number, grouped),
        "group_size": (size, None),
        "kind": (np.where(~grouped, "unique", np.where(md5 == md5[chosen], "exact", "perceptual")), None),
        "representative": (chosen == np.arange(len(rank)), None),
        "distance": (np.minimum(straight, flipped), grouped),
        "mirrored": (flipped < straight, grouped),
    }
    cells = [spread(values, good, known, DUPLICATES.field(name).type) for name, (values, known) in columns.items()]
    return pa.Table.from_arrays([uids, *cells, errors], schema=DUPLICATES)


def short(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A text column with 32-bit offsets, in pieces that they reach."""
    pieces = [column.slice(start, PIECE).cast(pa.string()) for start in range(0, len(column), PIECE)]
    return pa.chunked_array([chunk for piece in pieces for chunk in piece.chunks], pa.string())


def _same(
    md5: np.ndarray, images: np.ndarray, mirrors: np.ndarray, colors: np.ndarray, description: Dedup, search: Search
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels (N,) of images that are equal by md5 or by all their hashes, and pairs (left, right) of labels that are near."""
    says = np.flatnonzero(telling(images))
    # The search needs one of the files with the same hashes, or ten thousand copies would be 50 million pairs.
    hashes = np.hstack([images, mirrors, colors])[says]
    code = codes(pa.FixedSizeBinaryArray.from_buffers(pa.binary(hashes.shape[1]), len(hashes), [None, pa.py_buffer(hashes)]))
    one = says[_first(code)]
    labels = join(len(md5), np.concatenate([np.arange(len(md5)), says]), np.concatenate([_first(md5)[md5], one[code]]))

    entries = np.concatenate([images[one], mirrors[one]])  # a mirrored copy is one whose phash is near another's mirror
    left, right = search(entries, description.phash_bits, len(one))
    left, right = one[left % max(len(one), 1)], one[right % max(len(one), 1)]
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
