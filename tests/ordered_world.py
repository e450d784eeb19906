"""`find_duplicates` on a table of `basics` in memory."""

import tempfile
from pathlib import Path

import pyarrow as pa

from curation import dedup
from curation.ordered import put_in_order
from curation.schema import DUPLICATES
from curation.shards import write_table


def find_duplicates(basics: pa.Table, *description: dedup.Dedup) -> pa.Table:
    """schema.DUPLICATES of all rows, as `k2 dedup` finds it."""
    with tempfile.TemporaryDirectory() as folder:
        write_table(basics, Path(folder, "basics.parquet"), "made")
        images = put_in_order([Path(folder, "basics.parquet")], Path(folder, "images.parquet"), "made")
        return pa.concat_tables([DUPLICATES.empty_table(), *dedup.find_duplicates(images, *description)])
