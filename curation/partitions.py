"""The searches of hamming.py and semantic.py in partitions: tasks from Parquet files to Parquet files, so that one machine's memory bounds
one partition and not the corpus, and so that a killed job goes on.

A file of partitions has one row group per partition that has rows: a task reads its own row group from each file.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation.cells import Cells, places, read_vectors, units
from curation.dedup import Hashes, bytes_of
from curation.groups import integers
from curation.hamming import Plan, deal, in_order, parts_of, search
from curation.semantic import Found, Semantic, merged, search_cells, visitors
from curation.shards import read_fingerprint, write_row_groups, write_table

PARTS = b"k2.partitions"
CHUNK = 1 << 21  # images in one file of hashes, about
ROW_BYTES = 150  # memory of a task per hash of its partition; measured before words were rows, not since
COPIES = 6  # memory of a task per byte of its partition's vectors, measured
WORDS = ("word0", "word1", "word2")


@dataclass(frozen=True)
class Item:
    """One task: a chunk to cut into partitions (`step` is None), or a partition of a step to search."""

    number: int
    step: int | None = None

    @property
    def name(self) -> str:
        return f"chunk {self.number}" if self.step is None else f"partition {self.step}-{self.number}"


def write_partitions(table: pa.Table, partition: np.ndarray, path: Path, made_by: str) -> None:
    """Write the rows of a table by their partition (N,), in their order, whole or not at all."""
    order = np.argsort(partition, kind="stable")
    found, starts = np.unique(partition[order], return_index=True)
    stops = np.append(starts, len(order))[1:]
    pieces = (table.take(order[start:stop]) for start, stop in zip(starts, stops, strict=True))
    write_row_groups(pieces, path, table.schema.with_metadata({PARTS: json.dumps(found.tolist()).encode()}), made_by)


def read_partition(paths: list[Path], partition: int) -> pa.Table:
    """The rows of one partition in all files, in the order of the files."""
    tables = []
    for path in paths:
        with pq.ParquetFile(path) as file:
            parts = json.loads(file.schema_arrow.metadata[PARTS])
            piece = file.read_row_group(parts.index(partition)) if partition in parts else file.schema_arrow.empty_table()
            tables.append(piece.replace_schema_metadata(None))
    return pa.concat_tables(tables)


def done(path: Path, made_by: str) -> bool:
    """Whether the file is there, made for the same search."""
    return read_fingerprint(path) == made_by


# --- near hashes ---


@dataclass(frozen=True)
class HashSearch:
    """A search of the phashes in `folder`/hashes/<chunk>.parquet, as `write_hashes` writes them; the rows are below `num_images`.

    An entry is a hash: image `row` has the id `row`, its mirror the id num_images + row. The chunks of the mirrors are numbered on
    from those of the images, so that ids rise.
    """

    folder: Path
    plan: Plan
    num_chunks: int
    num_partitions: int
    num_images: int
    made_by: str

    def entries(self, step: int) -> list[Path]:
        return [self.folder / "entries" / self.plan.steps[step].name / f"{chunk:06d}.parquet" for chunk in range(2 * self.num_chunks)]

    def pairs(self, item: Item) -> Path:
        return self.folder / "pairs" / f"{item.step:02d}-{item.number:06d}.parquet"

    def items(self) -> tuple[list[Item], list[Item]]:
        """The tasks of the two passes."""
        chunks = [Item(chunk) for chunk in range(2 * self.num_chunks)]
        return chunks, [Item(number, step) for step in range(len(self.plan.steps)) for number in range(self.num_partitions)]

    def run(self, item: Item) -> None:
        """Do one task, if it is not done."""
        self._cut(item.number) if item.step is None else self._search(item)

    def _cut(self, number: int) -> None:
        mirrors, chunk = divmod(number, self.num_chunks)
        missing = [i for i in range(len(self.plan.steps)) if not done(self.entries(i)[number], self.made_by)]
        if not missing:
            return
        table = pq.read_table(hashes_path(self.folder, chunk), columns=["row", "mirror" if mirrors else "image"])
        ids, words = integers(table["row"]) + mirrors * self.num_images, deal(bytes_of(table[1]))
        entries = pa.table({"id": ids, **{name: words[:, i] for i, name in enumerate(WORDS)}})
        for i in missing:
            partition = parts_of(self.plan, self.plan.steps[i], words, self.num_partitions)
            write_partitions(entries, partition, self.entries(i)[number], self.made_by)

    def _search(self, item: Item) -> None:
        if done(self.pairs(item), self.made_by):
            return
        table = read_partition(self.entries(item.step), item.number)
        ids, words = integers(table["id"]), np.stack([table[name].to_numpy() for name in WORDS], axis=1)
        del table
        found = list(search(self.plan, self.plan.steps[item.step], words, ids, self.num_images))
        left, right = in_order(np.concatenate([np.empty((2, 0), np.int64), *found], axis=1) % max(self.num_images, 1))
        write_table(pa.table({"left": left, "right": right}), self.pairs(item), self.made_by)

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """All pairs of images."""
        tables = pa.concat_tables(pq.read_table(self.pairs(item)).replace_schema_metadata(None) for item in self.items()[1])
        return integers(tables["left"]), integers(tables["right"])


def hashes_path(folder: Path, chunk: int) -> Path:
    return folder / "hashes" / f"{chunk:06d}.parquet"


def write_hashes(hashes: Hashes, folder: Path, made_by: str) -> int:
    """Write hashes as columns row, image and mirror of chunks; returns the number of chunks."""
    num_chunks, held = 0, 0
    pieces: list[pa.Table] = []

    def write() -> None:
        nonlocal num_chunks, held
        if held and not done(hashes_path(folder, num_chunks), made_by):
            write_table(pa.concat_tables(pieces), hashes_path(folder, num_chunks), made_by)
        num_chunks, held = num_chunks + bool(held), 0
        pieces.clear()

    for rows, images, mirrors in hashes:
        pieces.append(pa.table({"row": rows, "image": binary(images), "mirror": binary(mirrors)}))
        held += len(rows)
        if held >= CHUNK:
            write()
    write()
    return num_chunks


def binary(data: np.ndarray) -> pa.Array:
    """uint8 (N, size) as a column of fixed-size binary."""
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(data.shape[1]), len(data), [None, pa.py_buffer(np.ascontiguousarray(data))])


# --- near vectors ---


@dataclass(frozen=True, eq=False)
class VectorSearch:
    """A search of the vectors in a tower's annotation files; `rows[i]` of files[i] are compared, under the numbers `ids[i]`."""

    folder: Path
    files: list[Path]
    rows: list[np.ndarray]
    ids: list[np.ndarray]
    cells: Cells
    description: Semantic
    num_partitions: int
    made_by: str

    def entries(self) -> list[Path]:
        return [self.folder / "cells" / f"{number:06d}.parquet" for number in range(len(self.files))]

    def pairs(self, item: Item) -> Path:
        return self.folder / "pairs" / f"{item.number:06d}.parquet"

    def nearest(self, item: Item) -> Path:
        return self.folder / "nearest" / f"{item.number:06d}.parquet"

    def items(self) -> tuple[list[Item], list[Item]]:
        """The tasks of the two passes."""
        return [Item(number) for number in range(len(self.files))], [Item(number, 0) for number in range(self.num_partitions)]

    def run(self, item: Item) -> None:
        """Do one task, if it is not done."""
        if item.step is None:
            path = self.entries()[item.number]
            if not done(path, self.made_by):
                table = self.placed(item.number)
                partition = integers(table["cell"]) * self.num_partitions // len(self.cells.centroids)
                write_partitions(table, partition, path, self.made_by)
        elif not done(self.pairs(item), self.made_by):
            found = self.found(read_partition(self.entries(), item.number))
            write_table(pa.table({"id": found.ids, "nearest": found.nearest}), self.nearest(item), self.made_by)
            pairs = {"left": found.left, "right": found.right, "cosine": found.cosine}
            write_table(pa.table(pairs), self.pairs(item), self.made_by)

    def placed(self, number: int) -> pa.Table:
        """The rows of one file with their cells: one entry per row and cell it is looked for in."""
        vectors = read_vectors(self.files[number], self.rows[number])
        home, visits = places(units(vectors, self.cells.mean), self.cells, self.description.probes, self.description.reach)
        cell, at_home, row = visitors(home, visits)
        data = np.ascontiguousarray(vectors[row])
        return pa.table({"cell": cell, "at_home": at_home, "id": self.ids[number][row], "vector": binary(data.view(np.uint8))})

    def found(self, table: pa.Table) -> Found:
        """What is found among entries of whole cells."""
        cell, ids, at_home = integers(table["cell"]), integers(table["id"]), table["at_home"].to_numpy()
        vectors = bytes_of(table["vector"]).view("<f2")
        order = np.lexsort((ids, ~at_home, cell))
        return merged(list(search_cells(cell[order], at_home[order], order, ids, vectors, self.cells.mean, self.description)))

    def result(self) -> Found:
        """What all partitions found."""

        def parts() -> Iterator[Found]:
            for item in self.items()[1]:
                pairs, nearest = pq.read_table(self.pairs(item)), pq.read_table(self.nearest(item))
                columns = (pairs["left"], pairs["right"], pairs["cosine"], nearest["id"], nearest["nearest"])
                yield Found(*(column.to_numpy() for column in columns))

        return merged(parts())

    def here(self) -> Found:
        """The same in one process's memory."""
        return self.found(pa.concat_tables(self.placed(number) for number in range(len(self.files))))
