"""The images of a run in the order of their uids, in one file on disk: a row number stands for a uid, and no table is in memory whole.

DuckDB sorts and joins; what does not fit into its memory goes to disk beside the file.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation.groups import integers
from curation.schema import BASICS
from curation.shards import write_row_groups

COLUMNS = ("uid", "bytes", "md5", "width", "height", "format", "phash", "phash_mirror", "colorhash", "jpeg_quality", "error")
ORDERED = pa.schema([pa.field("row", pa.int64(), nullable=False), *(BASICS.field(name) for name in COLUMNS)])
GROUP_ROWS = 1 << 18  # of a row group, here and in the tables that are made from it: so many images are in memory at once
LEAST_MEMORY = 1e9  # bytes that DuckDB is given at least


class Ordered:
    """`path` has schema ORDERED, sorted by uid; its rows are 0, 1, 2 ... Queries see it as `images`, and use `memory` bytes."""

    def __init__(self, path: Path, memory: float = LEAST_MEMORY):
        self.path, self.memory = path, memory
        with pq.ParquetFile(path) as file:
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        self.starts = np.cumsum([0, *sizes])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def pieces(self, columns: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
        """(first row, the columns of the rows from there on), one row group at a time."""
        with pq.ParquetFile(self.path) as file:
            for group, start in enumerate(self.starts[:-1].tolist()):
                yield start, file.read_row_group(group, columns=list(columns)).replace_schema_metadata(None)

    def take(self, rows: np.ndarray, columns: Sequence[str]) -> pa.Table:
        """The columns of `rows` (R,), which rise."""
        taken = [pa.schema([ORDERED.field(name) for name in columns]).empty_table()]
        for start, piece in self.pieces(columns):
            first, last = np.searchsorted(rows, [start, start + len(piece)])
            if last > first:
                taken.append(piece.take(rows[first:last] - start))
        return pa.concat_tables([piece.cast(taken[0].schema) for piece in taken])

    def query(self, sql: str, **tables: Any) -> Iterator[pa.Table]:
        """What a query about `images` and the `tables` finds, GROUP_ROWS or fewer rows at a time."""
        with _connected(self.path.parent, self.memory) as con:
            con.execute(f"CREATE VIEW images AS FROM read_parquet({text(self.path)})")
            for name, table in tables.items():
                con.register(name, table)
            yield from _batches(con, sql)

    def numbers(self, sql: str, names: Sequence[str]) -> list[np.ndarray]:
        """Columns (R,) of integers that a query finds."""
        tables = list(self.query(sql))
        return [np.concatenate([np.zeros(0, np.int64), *(integers(table[name]) for table in tables)]) for name in names]


def put_in_order(files: Sequence[Path], path: Path, made_by: str, memory: float = LEAST_MEMORY) -> Ordered:
    """Write the columns of `basics` files that duplicates are found from, sorted by uid: nothing depends on the order of shards."""

    def rows() -> Iterator[pa.Table]:
        start = 0
        with _connected(path.parent, memory) as con:
            names = ", ".join(COLUMNS)
            for table in _batches(con, f"SELECT {names} FROM read_parquet([{', '.join(map(text, files))}]) ORDER BY uid"):
                number = pa.array(np.arange(start, start + len(table)))
                yield table.add_column(0, ORDERED.field("row"), number)
                start += len(table)

    path.parent.mkdir(parents=True, exist_ok=True)
    write_row_groups(rows(), path, ORDERED, made_by)
    return Ordered(path, memory)


def spread(
    images: Ordered, rows: np.ndarray, found: pa.Table, others: dict[str, Any], known: np.ndarray | None = None
) -> Iterator[tuple[int, pa.Table]]:
    """(first row, uid, the columns of `found`, error), piece by piece: `found` is of `rows` (R,), which rise, and `others` of all others.

    A broken image and one that is not `known` (N,) has nulls.
    """
    table = pa.concat_tables([found, pa.Table.from_pylist([others], found.schema)]).combine_chunks()
    for start, piece in images.pieces(("uid", "error")):
        first, last = np.searchsorted(rows, [start, start + len(piece)])
        index = np.full(len(piece), len(rows))
        index[rows[first:last] - start] = np.arange(first, last)
        null = piece["error"].is_valid().to_numpy()
        if known is not None:
            null |= ~known[start : start + len(piece)]
        taken = table.take(pa.array(index, mask=null))
        yield start, taken.add_column(0, "uid", piece["uid"]).append_column("error", piece["error"])


@contextmanager
def _connected(spill: Path, memory: float) -> Iterator[duckdb.DuckDBPyConnection]:
    con = duckdb.connect(config={"autoinstall_known_extensions": False, "autoload_known_extensions": False})
    try:
        con.execute("SET temp_directory = $1", [str(spill / "spill")])
        con.execute("SET memory_limit = $1", [f"{int(max(memory, LEAST_MEMORY) / 1e6)}MB"])
        con.execute("SET preserve_insertion_order = false")  # keeping it costs memory; where order matters we sort
        con.execute("SET python_enable_replacements = false")
        yield con
    finally:
        con.close()


def _batches(con: duckdb.DuckDBPyConnection, sql: str) -> Iterator[pa.Table]:
    held: list[pa.RecordBatch] = []
    for batch in con.sql(sql).to_arrow_reader(GROUP_ROWS):
        if held and sum(map(len, held)) + len(batch) > GROUP_ROWS:
            yield pa.Table.from_batches(held)
            held = []
        held.append(batch)
    if held:
        yield pa.Table.from_batches(held)


def text(path: str | Path) -> str:
    """A path as SQL says it."""
    return "'" + str(path).replace("'", "''") + "'"
