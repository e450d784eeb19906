"""The order of a packed set: a pure function of the chosen uids, their buckets, the seed and the batch size.

    read_keys     selection -> Keys, streamed
    plan          Keys -> Plan, with the batches in order and the rows that fill each

Arrays only, nothing in Python per row, so that 100 million rows fit on one machine (benchmarks/results/pack.jsonl has the bytes a row).
"""

import hashlib
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

KEY_COLUMNS = ["uid", "shard", "bucket_height", "bucket_width"]
REMAINDERS = ("pad", "short", "drop")


class Keys(NamedTuple):
    """What decides the order. One entry per chosen image; sorted by shard, then by draw, which is the order inside the pieces."""

    high: np.ndarray  # uint64 (N,): the draw's first 8 bytes
    low: np.ndarray  # uint64 (N,): the other 8
    bucket: np.ndarray  # int16 (N,), into `buckets`
    buckets: list[tuple[int, int]]  # (height, width), sorted
    shards: list[str]  # sorted
    starts: np.ndarray  # int64 (num_shards + 1,): where each shard's entries begin

    def __len__(self) -> int:
        return len(self.high)

    def place(self, entries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(shard, row of its piece), int32 each, of entries."""
        shard = np.searchsorted(self.starts, entries, "right") - 1
        return shard.astype(np.int32), (entries - self.starts[shard]).astype(np.int32)


class Plan(NamedTuple):
    """Batches in order. B batches, R rows in all of them together."""

    entries: np.ndarray  # int64 (R,): the entry of Keys that each row is
    lengths: np.ndarray  # int64 (B,): rows in the row group
    num_rows: np.ndarray  # int64 (B,): those of them that are images, the first ones; the others are padding
    bucket: np.ndarray  # int16 (B,)
    remainder: np.ndarray  # int64: entries that stand in no batch


def draws(uids: pa.Array, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A random place in an order for each uid: 16 bytes of blake2b as two uint64 (N,), the same on every machine."""
    prefix = f"{seed} ".encode()
    texts = uids.cast(pa.binary()).to_pylist()
    found = np.frombuffer(b"".join([hashlib.blake2b(prefix + text, digest_size=16).digest() for text in texts]), ">u8")
    return found[::2].astype(np.uint64), found[1::2].astype(np.uint64)


def read_keys(selection: str | Path, seed: int) -> Keys:
    """Keys of a selection's file, whose rows may be in any order; its columns stream through memory."""
    return keys_of(pq.ParquetFile(selection).iter_batches(batch_size=1 << 16, columns=KEY_COLUMNS), seed)


def keys_of(batches: Iterable[pa.RecordBatch], seed: int) -> Keys:
    """Keys of batches with KEY_COLUMNS."""
    high, low, sizes, shard = [np.empty(0, np.uint64)], [np.empty(0, np.uint64)], [np.empty(0, np.int32)], [np.empty(0, np.int32)]
    numbers: dict[str, int] = {}
    for batch in batches:
        first, second = draws(batch["uid"], seed)
        high.append(first)
        low.append(second)
        sizes.append(batch["bucket_height"].to_numpy() << 16 | batch["bucket_width"].to_numpy())
        names = batch["shard"].dictionary_encode()
        known = [numbers.setdefault(name, len(numbers)) for name in names.dictionary.to_pylist()]
        shard.append(np.array(known, np.int32)[names.indices.to_numpy()])
    shards = sorted(numbers)
    renumbered = np.empty(len(shards), np.int32)
    renumbered[[numbers[name] for name in shards]] = np.arange(len(shards))
    high, low, sizes, shard = map(_joined, (high, low, sizes, shard))
    shard = renumbered[shard]
    order = np.lexsort((low, high, shard))
    high, low, sizes, shard = (values[order] for values in (high, low, sizes, shard))
    twice = np.flatnonzero((high[1:] == high[:-1]) & (low[1:] == low[:-1]))
    assert not len(twice), f"the selection holds {len(twice)} uids twice, the first in shard {shards[shard[twice[0]]]}"
    found, bucket = np.unique(sizes, return_inverse=True)
    starts = np.searchsorted(shard, np.arange(len(shards) + 1))
    return Keys(high, low, bucket.astype(np.int16), [(int(size) >> 16, int(size) & 0xFFFF) for size in found], shards, starts)


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    whole = np.concatenate(parts)
    parts.clear()  # so that nothing is in memory twice
    return whole


def plan(keys: Keys, good: np.ndarray, batch_size: int, remainder: str) -> Plan:
    """Cut every bucket's images, in the order of their draws, into batches, and put the batches in order.

    `good` bool (N,) says which entries can be packed. What is over in a bucket after whole batches is, by `remainder`: "pad", one more
    batch, filled up with rows of the same bucket from its beginning (marked as padding); "short", one short batch; "drop", in no batch.

    A batch stands where the draw of one of its rows, picked at random, would stand: neighbours in the packed set are neighbours in
    the pieces, so that a piece is read nearly in sequence, and a bucket with few images is not drawn to an end.
    """
    assert remainder in REMAINDERS, remainder
    index = np.flatnonzero(good)
    order = index[np.lexsort((keys.low[index], keys.high[index], keys.bucket[index]))]
    ends = np.searchsorted(keys.bucket[order], np.arange(len(keys.buckets)), "right")
    entries, num_rows, lengths, left = [np.empty(0, np.int64)], [], [], [np.empty(0, np.int64)]
    for start, end in pairwise([0, *ends]):
        members = order[start:end]
        rest = len(members) % batch_size
        if rest and remainder == "drop":
            left.append(members[-rest:])
            members, rest = members[:-rest], 0
        real = np.full(-(-len(members) // batch_size), batch_size)
        if rest:
            real[-1] = rest
        num_rows.append(real)
        entries.append(members)
        if rest and remainder == "pad":
            entries.append(np.resize(members, batch_size - rest))
        lengths.append(np.full(len(real), batch_size) if remainder == "pad" else real)
    bucket = np.repeat(np.arange(len(keys.buckets), dtype=np.int16), [len(real) for real in num_rows])
    entries, num_rows, lengths = np.concatenate(entries), np.concatenate([[], *num_rows]), np.concatenate([[], *lengths])
    num_rows, lengths = num_rows.astype(np.int64), lengths.astype(np.int64)
    first = np.cumsum(lengths) - lengths
    picked = entries[first + (keys.low[entries[first]] % num_rows.astype(np.uint64)).astype(np.int64)]
    order = np.lexsort((keys.low[picked], keys.high[picked]))
    first, lengths = first[order], lengths[order]
    rows = np.repeat(first - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())
    return Plan(entries[rows], lengths, num_rows[order], bucket[order], np.concatenate(left))
