"""A selection as training shards: crop, resize, bucket, shuffle. A row group of a packed shard is a training batch of one bucket.

An external shuffle in two passes, both of them items for workers:

    pieces.make_piece    one source shard -> its chosen images, cropped, resized and encoded (.pieces/<shard>.arrow)
    shuffle.plan         uids, buckets, seed and what could not be decoded -> which row of which piece stands where
    write_file           one packed shard: its rows out of the pieces, a row group at a time
    describe             dataset.json, the commit point

K2 crops and resizes ahead of time, because doing it while training made CPU and I/O load uneven, and shuffles and packs so
that one worker reads a batch of one aspect ratio (report, "Data loading").
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from curation.pieces import ROW_FORMAT, Piece
from curation.schema import PACKED
from curation.shards import is_done, write_row_groups
from curation.shuffle import REMAINDERS, Keys, Plan

OPEN_PIECES = 256  # memory-mapped at once by one worker


@dataclass(frozen=True)
class Packing:
    """What decides the bytes of a packed set."""

    policy: str
    selection: str  # hash of the selection's file
    resolution: int
    batch_size: int
    seed: int
    remainder: str = "pad"  # what becomes of the images over after the last whole batch of a bucket: see shuffle.plan
    batches_per_file: int = 64
    row_format: str = ROW_FORMAT

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.batches_per_file < 1:
            raise ValueError(f"batch_size and batches_per_file must be 1 or more; got {self.batch_size} and {self.batches_per_file}")
        if self.remainder not in REMAINDERS:
            raise ValueError(f"--remainder {self.remainder!r}: choose from {', '.join(REMAINDERS)}")


@dataclass(frozen=True, eq=False)
class PackedFile:
    """One packed shard to write: what a worker needs to know of the plan."""

    name: str
    pieces: np.ndarray  # int32 (R,): the shard that each row comes from
    rows: np.ndarray  # int32 (R,): its row in that shard's piece
    lengths: np.ndarray  # int64 (B,): rows in each row group
    num_rows: np.ndarray  # int64 (B,): those that are not padding


def packed_files(keys: Keys, plan: Plan, packing: Packing) -> Iterator[PackedFile]:
    """The packed shards of a plan, in order."""
    ends = np.concatenate([[0], np.cumsum(plan.lengths)])
    for number, first in enumerate(range(0, len(plan.lengths), packing.batches_per_file)):
        here = slice(first, first + packing.batches_per_file)
        rows = plan.entries[ends[first] : ends[min(here.stop, len(plan.lengths))]]
        yield PackedFile(f"{number:05d}.parquet", *keys.place(rows), plan.lengths[here], plan.num_rows[here])


def write_file(file: PackedFile, pieces: list[Path], out_dir: Path, made_by: str) -> int:
    """Write one packed shard, whole or not at all; returns the rows written now. `pieces` are those of all shards, by number.

    Only the rows themselves are read, and one row group is in memory at a time.
    """
    path = out_dir / file.name
    if is_done(path, made_by):
        return 0
    opened = lru_cache(OPEN_PIECES)(lambda number: Piece(pieces[number]))

    def row_groups() -> Iterator[pa.Table]:
        end = 0
        for length, num_rows in zip(file.lengths, file.num_rows, strict=True):
            start, end = end, end + length
            places = zip(file.pieces[start:end].tolist(), file.rows[start:end].tolist(), strict=True)
            table = pa.Table.from_batches([opened(piece).row(row) for piece, row in places])
            padding = pa.array(np.arange(length) >= num_rows)
            yield table.append_column(PACKED.field("padding"), padding).select(PACKED.names)

    write_row_groups(row_groups(), path, PACKED, made_by)
    return len(file.rows)


def describe(keys: Keys, plan: Plan, packing: Packing, errors: list[dict[str, Any]], remainder: list[str], made_by: str) -> dict[str, Any]:
    """What dataset.json holds. `errors` are the images that could not be packed, `remainder` the uids that stand in no batch."""
    batches = []
    for i, (bucket, length, num_rows) in enumerate(zip(plan.bucket.tolist(), plan.lengths.tolist(), plan.num_rows.tolist(), strict=True)):
        number, row_group = divmod(i, packing.batches_per_file)
        high, wide = keys.buckets[bucket]
        place = {"file": f"{number:05d}.parquet", "row_group": row_group, "bucket_height": high, "bucket_width": wide}
        batches.append(place | {"num_rows": num_rows} | ({"num_padding": length - num_rows} if length > num_rows else {}))
    num_rows = int(plan.num_rows.sum())
    assert len(keys) == num_rows + len(errors) + len(remainder), (len(keys), num_rows, len(errors), len(remainder))
    return {
        "fingerprint": made_by,
        "policy": packing.policy,
        "resolution": packing.resolution,
        "batch_size": packing.batch_size,
        "seed": packing.seed,
        "num_chosen": len(keys),
        "num_rows": num_rows,
        "num_padding": int(plan.lengths.sum()) - num_rows,
        "num_batches": len(batches),
        "batches": batches,
        "errors": sorted(({"uid": row["uid"], "error": row["error"]} for row in errors), key=lambda row: row["uid"]),
        "remainder": sorted(remainder),
    }
