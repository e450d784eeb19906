"""The plan of a packed set: exact shapes, nothing lost, and an order that only uids, seed and batch size decide."""

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.shuffle import REMAINDERS, Keys, Plan, draws, keys_of, plan

SHAPES = [(32, 32), (32, 48), (48, 32)]
ROWS = st.lists(st.tuples(st.integers(0, 999), st.integers(0, 2), st.integers(0, 4)), unique_by=lambda row: row[0], max_size=40)
SCHEMA = pa.schema([("uid", pa.string()), ("shard", pa.string()), ("bucket_height", pa.int32()), ("bucket_width", pa.int32())])


def table_of(rows: list[tuple[int, int, int]]) -> pa.Table:
    """(number, bucket, shard) of each image as a selection."""
    return pa.Table.from_pylist(
        [dict(zip(SCHEMA.names, (f"s{s}/{u}", f"s{s}", *SHAPES[b]), strict=True)) for u, b, s in rows],
        SCHEMA,
    )


def named(keys: Keys, table: pa.Table, seed: int) -> np.ndarray:
    """The uid of every entry, found without `Keys`' own order: by shard, then by draw."""
    uids = table["uid"].to_pylist()
    bits = dict(zip(uids, zip(*draws(table["uid"].combine_chunks(), seed), strict=True), strict=True)) if uids else {}
    return np.array(sorted(uids, key=lambda uid: (uid.partition("/")[0], bits[uid])), object)


def batches_of(order: Plan, names: np.ndarray) -> list[tuple[int, list[str], list[str]]]:
    """(bucket, images, padding) of each batch."""
    ends = [0, *np.cumsum(order.lengths)]
    rows = [names[order.entries[start:end]].tolist() for start, end in pairwise(ends)]
    return [(b, r[:n], r[n:]) for b, r, n in zip(order.bucket.tolist(), rows, order.num_rows.tolist(), strict=True)]


@given(ROWS, st.integers(1, 7), st.integers(0, 3), st.sampled_from(REMAINDERS), st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_every_image_stands_once_in_a_batch_of_its_bucket_whatever_the_order_of_rows(rows, size, seed, remainder, random):
    table = table_of(rows)
    keys = keys_of(table.to_batches(max_chunksize=5), seed)
    names = named(keys, table, seed)
    broken = {f"s{s}/{u}" for u, _, s in rows if u % 11 == 0}
    good = np.array([name not in broken for name in names], bool)
    order = plan(keys, good, size, remainder)
    batches = batches_of(order, names)
    images = [uid for _, found, _ in batches for uid in found]
    left = names[order.remainder].tolist()
    assert sorted([*images, *left, *broken]) == sorted(names), "images + remainder + errors = chosen"
    bucket = {f"s{s}/{u}": SHAPES[b] for u, b, s in rows}
    for b, found, padding in batches:
        assert {bucket[uid] for uid in found + padding} == {keys.buckets[b]} and found
        assert len(found) + len(padding) == size if remainder != "short" else len(found) <= size and not padding
    for b in range(len(keys.buckets)):
        assert sum(len(found) < size for other, found, _ in batches if other == b) <= (0 if remainder == "drop" else 1)
    assert bool(left) <= (remainder == "drop") and len(left) <= len(SHAPES) * (size - 1)
    random.shuffle(rows)
    again = plan(keys_of(table_of(rows).to_batches(max_chunksize=3), seed), good, size, remainder)
    assert all((a == b).all() for a, b in zip(order, again, strict=True))


@given(ROWS, st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_an_entry_is_found_in_its_shard_by_its_rank(rows, seed):
    table = table_of(rows)
    keys = keys_of(table.to_batches(), seed)
    names = named(keys, table, seed)
    shards, numbers = keys.place(np.arange(len(keys)))
    assert [keys.shards[shard] for shard in shards] == [name.partition("/")[0] for name in names]
    assert all((numbers[shards == shard] == np.arange((shards == shard).sum())).all() for shard in range(len(keys.shards)))


def test_another_seed_gives_another_order():
    table = table_of([(u, 0, 0) for u in range(40)])
    orders = [plan(keys_of(table.to_batches(), seed), np.ones(40, bool), 4, "pad") for seed in (0, 1)]
    first, second = (named(keys_of(table.to_batches(), seed), table, seed)[order.entries].tolist() for seed, order in enumerate(orders))
    assert first != second and sorted(first) == sorted(second)


def test_the_order_is_near_to_a_random_one():
    """Buckets come mixed, a rare one stands anywhere, and the place of an image says nothing about its shard or its number."""
    rows = [(u, 0 if u % 10 else 1, u // 500) for u in range(5000)] + [(9000 + u, 2, 0) for u in range(3)]
    places = []
    for seed in range(20):
        table = table_of(rows)
        keys = keys_of(table.to_batches(), seed)
        order = plan(keys, np.ones(len(keys), bool), 8, "short")
        numbers = np.array([int(name.partition("/")[2]) for name in named(keys, table, seed)[order.entries]])
        common = numbers[numbers < 9000]
        assert abs(np.corrcoef(np.arange(len(common)), common)[0, 1]) < 0.06
        runs = np.diff(np.flatnonzero(np.concatenate([[True], order.bucket[1:] != order.bucket[:-1]])))
        assert runs.max() < 60, "a bucket with a tenth of the images is never far away"
        places.append(float(np.flatnonzero(order.bucket == 2)[0] / len(order.bucket)))
    assert min(places) < 0.25 and max(places) > 0.75


def test_a_uid_that_is_chosen_twice_is_our_bug():
    with pytest.raises(AssertionError, match="twice"):
        keys_of(table_of([(1, 0, 0), (1, 1, 0)]).to_batches(), 0)
