"""The duplicate search against comparing all pairs."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ordered_world import find_duplicates

from curation import hamming as index
from curation.dedup import COLUMNS, Dedup, bytes_of, color_values, hamming
from curation.groups import ranks, stars
from curation.hamming import PHASH_BITS, near_pairs
from curation.schema import BASICS


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
    rows = basics.filter(basics["error"].is_null()).sort_by("uid")
    uids, md5 = rows["uid"].to_pylist(), np.array(rows["md5"].to_pylist())
    images, mirrors = bytes_of(rows["phash"]), bytes_of(rows["phash_mirror"])
    colors = color_values(bytes_of(rows["colorhash"])).astype(int)
    telling = np.bitwise_count(images).sum(1) == 72
    same, near = md5[:, None] == md5, np.zeros((len(rows), len(rows)), bool)
    for i in range(len(rows)):
        far = np.minimum(hamming(images, images[i]), np.minimum(hamming(images, mirrors[i]), hamming(mirrors, images[i])))
        near[i] = (far <= description.phash_bits) & (np.abs(colors - colors[i]).sum(1) <= description.color_steps) & telling & telling[i]
        equal = (images == images[i]).all(1) & (mirrors == mirrors[i]).all(1) & (colors == colors[i]).all(1)
        same[i] |= equal & telling & telling[i]
    for middle in range(len(rows)):  # equal to an equal one
        same |= same[:, middle : middle + 1] & same[middle]
    near = same | (same.astype(int) @ near @ same.astype(int) > 0)
    group_of: dict[int, int] = {}
    for i in np.argsort(ranks(rows)):  # best first: who is near no image that is kept, is kept
        kept = [j for j in group_of if group_of[j] == j and near[i, j]]
        group_of[i] = kept[0] if kept else i
    found = [frozenset(uids[i] for i in group_of if group_of[i] == one) for one in set(group_of.values())]
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
@given(
    st.integers(0, 2**32),
    st.sampled_from([0, 1, 2, 5, 12, 13, 23, 40]),
    st.integers(1, 5),
    st.sampled_from([8, 1 << 18]),
    st.integers(0, 24),
)
def test_exactly_the_pairs_within_the_threshold_are_found_each_once(seed, max_bits, equal, in_cache, num_asked):
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2, (24, PHASH_BITS), dtype=np.uint8)
    for row in range(1, 24):  # a chain with steps on both sides of the threshold, at any places
        bits[row] = bits[row - 1]
        bits[row, rng.choice(PHASH_BITS, int(rng.integers(max_bits + 4)), replace=False)] ^= 1
    with pytest.MonkeyPatch.context() as patch:  # every plan, whatever the number of rows would choose; in one piece and in many
        patch.setattr(index, "plan_for", lambda num_rows, bits: index._plan(bits, min(equal, 2) if bits > 13 else equal))
        patch.setattr(index, "IN_CACHE", in_cache)
        left, right = near_pairs(np.packbits(bits, axis=1), max_bits, num_asked)
    near = [(i, j) for i in range(num_asked) for j in range(i + 1, 24) if (bits[i] != bits[j]).sum() <= max_bits]
    assert list(zip(left.tolist(), right.tolist(), strict=True)) == near


@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(0, 80))
def test_each_member_of_a_star_is_a_neighbour_of_its_representative_and_no_two_representatives_are(seed, size, num_pairs):
    rng = np.random.default_rng(seed)
    left, right, rank = rng.integers(0, size, num_pairs), rng.integers(0, size, num_pairs), rng.permutation(size)
    chosen = stars(left, right, rank)
    pairs = {frozenset(pair) for pair in zip(left.tolist(), right.tolist(), strict=True)}
    assert all(frozenset((i, int(chosen[i]))) in pairs and rank[chosen[i]] < rank[i] for i in range(size) if chosen[i] != i)
    kept = [i for i in range(size) if chosen[i] == i]
    assert not any(frozenset((i, j)) in pairs for i in kept for j in kept if i < j)
    order = rng.permutation(num_pairs)
    assert (chosen == stars(right[order], left[order], rank)).all()
