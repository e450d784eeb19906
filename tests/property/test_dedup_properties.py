"""The duplicate search against comparing all pairs."""

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.csgraph import connected_components

from curation.dedup import COLUMNS, PHASH_BITS, Dedup, candidates, color_values, find_duplicates, hamming, hash_words
from curation.schema import BASICS, PHASH_BYTES


def hashes_near(rng: np.random.Generator, size: int, centres: int, flips: int) -> np.ndarray:
    """(size, 144) bits with half of them set, scattered around a few centres."""
    bits = rng.permuted(np.tile(np.arange(PHASH_BITS, dtype=np.uint8) % 2, (centres, 1)), axis=1)[rng.integers(centres, size=size)]
    for row in bits:
        for _ in range(int(rng.integers(flips + 1))):
            i, j = rng.choice(np.flatnonzero(row)), rng.choice(np.flatnonzero(row == 0))
            row[i], row[j] = 0, 1
    return bits


def made_up(seed: int, size: int, centres: int) -> pa.Table:
    """Annotations whose hashes crowd together, with some broken rows, some equal md5 and some flat pictures."""
    rng = np.random.default_rng(seed)
    phash, mirror = hashes_near(rng, size, centres, 6), hashes_near(rng, size, centres, 6)
    swap = rng.random(size) < 0.3
    phash[swap], mirror[swap] = mirror[swap].copy(), phash[swap].copy()
    phash[rng.random(size) < 0.1] = 0
    colors = np.packbits(rng.integers(0, 2, (size, 42), dtype=np.uint8) & (rng.random((size, 1)) < 0.5), axis=1)
    good = rng.random(size) > 0.1

    def column(values: list) -> list:
        return [value if ok else None for value, ok in zip(values, good, strict=True)]

    columns = {
        "uid": [f"{i:03d}" for i in rng.permutation(size)],
        "bytes": rng.integers(1, 4, size),
        "md5": [f"{value}" for value in rng.integers(0, 3 * size, size)],
        "width": column(rng.integers(1, 3, size).tolist()),
        "height": column(rng.integers(1, 3, size).tolist()),
        "format": column(rng.choice(["JPEG", "PNG", "WEBP"], size).tolist()),
        "phash": column([row.tobytes() for row in np.packbits(phash, axis=1)]),
        "phash_mirror": column([row.tobytes() for row in np.packbits(mirror, axis=1)]),
        "colorhash": column([row.tobytes() for row in colors]),
        "jpeg_quality": column(rng.integers(1, 100, size).tolist()),
        "error": [None if ok else "broken" for ok in good],
    }
    return pa.table(columns, schema=pa.schema([BASICS.field(name) for name in COLUMNS]))


def groups_by_all_pairs(basics: pa.Table, description: Dedup) -> set[frozenset[str]]:
    """The definition, written out."""
    rows = basics.filter(basics["error"].is_null())
    uids, md5 = rows["uid"].to_pylist(), np.array(rows["md5"].to_pylist())
    images, mirrors, colors = hash_words(rows["phash"]), hash_words(rows["phash_mirror"]), color_values(rows["colorhash"]).astype(int)
    telling = np.bitwise_count(images).sum(1) == 72
    same = md5[:, None] == md5
    for i in range(len(rows)):
        near = np.minimum(hamming(images, images[i]), np.minimum(hamming(images, mirrors[i]), hamming(mirrors, images[i])))
        same[i] |= (near <= description.phash_bits) & (np.abs(colors - colors[i]).sum(1) <= description.color_steps) & telling & telling[i]
    labels = connected_components(same, directed=False)[1]
    found = [frozenset(uid for uid, label in zip(uids, labels, strict=True) if label == one) for one in set(labels.tolist())]
    return {group for group in found if len(group) > 1}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 60), st.integers(1, 12), st.sampled_from([0, 5, 12, 20]), st.sampled_from([0, 10, 98]))
def test_the_groups_are_those_of_comparing_all_pairs(seed, size, centres, phash_bits, color_steps):
    basics, description = made_up(seed, size, centres), Dedup(phash_bits, color_steps)
    table = find_duplicates(basics, description)
    found: dict[int, set[str]] = {}
    for row in table.to_pylist():
        if row["group"] is not None:
            found.setdefault(row["group"], set()).add(row["uid"])
    assert {frozenset(group) for group in found.values()} == groups_by_all_pairs(basics, description)
    assert sorted(found) == list(range(len(found)))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 60), st.integers(1, 12))
def test_the_order_of_the_rows_changes_nothing_and_each_group_keeps_one(seed, size, centres):
    basics = made_up(seed, size, centres)
    table = find_duplicates(basics)
    assert table.equals(find_duplicates(basics.take(np.random.default_rng(seed).permutation(size))))
    rows = table.to_pylist()
    assert [row["uid"] for row in rows] == sorted(basics["uid"].to_pylist())
    for group in {row["group"] for row in rows} - {None}:
        members = [row for row in rows if row["group"] == group]
        assert sum(row["representative"] for row in members) == 1 and {row["group_size"] for row in members} == {len(members)}
    assert all(row["representative"] and row["group_size"] == 1 for row in rows if row["group"] is None and row["error"] is None)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 30))
def test_no_pair_within_the_threshold_is_left_out_of_the_candidates(seed, max_bits):
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2, (24, PHASH_BITS), dtype=np.uint8)
    for row in range(1, 24):  # a chain with steps on both sides of the threshold, at any places
        bits[row] = bits[row - 1]
        bits[row, rng.choice(PHASH_BITS, int(rng.integers(max_bits + 4)), replace=False)] ^= 1
    packed = [row.tobytes() for row in np.packbits(bits, axis=1)]
    words = hash_words(pa.chunked_array([pa.array(packed, pa.binary(PHASH_BYTES))]))
    listed = {
        tuple(sorted(pair)) for left, right in candidates(words, max_bits) for pair in zip(left.tolist(), right.tolist(), strict=True)
    }
    near = {(i, j) for i in range(24) for j in range(i + 1, 24) if (bits[i] != bits[j]).sum() <= max_bits}
    assert near <= listed
