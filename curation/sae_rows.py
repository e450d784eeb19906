"""Training rows as a stream: pieces in a shuffled order, a few pieces' rows shuffled together, never all in memory.

Position is data: every batch comes with the cursor of the next one. A cursor is three integers, and names the same next row in any
process: the order of pieces depends on (seed, epoch), the order of rows on (seed, epoch, bundle).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow.parquet as pq

from curation.fitted import check_identity, read_json
from curation.tags import PARTS, part
from curation.towers import Tower

TOGETHER = 8  # pieces whose rows are in memory and shuffled at once


class Cursor(NamedTuple):
    """Where the next batch starts."""

    epoch: int = 0
    bundle: int = 0  # of the epoch: so many times TOGETHER pieces are behind it
    offset: int = 0  # rows of the bundle that are behind it


class Piece(Protocol):
    """Something whose rows (n, d) can be read again and again: rows in memory, or a row group of a file."""

    def rows(self, name: str) -> np.ndarray:
        """The rows of the part `name` (fit, estimate or report)."""


@dataclass(frozen=True)
class InMemory:
    """Rows per part that are in memory."""

    parts: dict[str, np.ndarray]

    def rows(self, name: str) -> np.ndarray:
        return self.parts[name]


@dataclass(frozen=True)
class RowGroup:
    """A row group of an annotation with float16 vectors; its rows' parts come from the uids' hashes."""

    path: Path
    number: int
    dim: int

    def rows(self, name: str) -> np.ndarray:
        return self.all_parts()[name]

    def all_parts(self) -> dict[str, np.ndarray]:
        """Part -> rows (n, d) float16, without those that have no vector."""
        table = pq.ParquetFile(self.path).read_row_group(self.number, columns=["uid", "vector"]).drop_null()
        vectors = np.frombuffer(b"".join(table["vector"].to_pylist()), "<f2").reshape(-1, self.dim)
        parts = np.array([part(uid.encode()) for uid in table["uid"].to_pylist()], dtype=object)
        return {name: vectors[parts == name] for name in PARTS}


def row_groups(run: str, tower: Tower) -> list[RowGroup]:
    """The row groups of RUN/annotations/<tower>/, in order.

    Raises:
        ValueError: there is no such annotation, or it is of another tower.
    """
    paths = sorted(Path(run, "annotations", tower.name).glob("*.parquet"))
    if not paths:
        raise ValueError(f"{run} has no annotations/{tower.name}; run `k2 annotate` with a recipe that holds this tower")
    described = read_json(Path(run) / "run.json")["description"]["stages"][tower.name]["description"]["tower"]
    check_identity(run, described["identity"], tower.identity, "sae")
    return [RowGroup(path, number, tower.dim) for path in paths for number in range(pq.ParquetFile(path).num_row_groups)]


def survey(pieces: Sequence[RowGroup], most: dict[str, int], seed: int) -> tuple[dict[str, int], dict[str, np.ndarray]]:
    """(number of rows per part, at most `most[part]` rows of each, from pieces in a random order). One pass over all pieces."""
    counts, kept = dict.fromkeys(most, 0), {name: [] for name in most}
    for index in np.random.default_rng([seed, 0x5AE]).permutation(len(pieces)):
        for name, rows in pieces[index].all_parts().items():
            free = most[name] - sum(map(len, kept[name]))
            kept[name].append(rows[:free])
            counts[name] += len(rows)
    return counts, {name: np.concatenate(rows) for name, rows in kept.items()}


def shuffled(
    pieces: Sequence[Piece], batch_size: int, seed: int, cursor: Cursor | None = None, together: int = TOGETHER
) -> Iterator[tuple[np.ndarray, Cursor]]:
    """Endless (batch of rows of the part fit (B, d), cursor of the next batch), from the cursor on.

    Every row comes once in an epoch; a batch may hold the end of one bundle and the start of the next.
    """
    epoch, bundle, offset = cursor or Cursor()
    waiting: list[np.ndarray] = []
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(len(pieces))
        for number in range(bundle, -(-len(order) // together)):
            rows = np.concatenate([pieces[i].rows("fit") for i in order[number * together : (number + 1) * together]])
            rows = rows[np.random.default_rng([seed, epoch, number]).permutation(len(rows))]
            while len(rows) - offset >= (wanted := batch_size - sum(map(len, waiting))):
                batch = np.concatenate([*waiting, rows[offset : offset + wanted]])
                waiting, offset = [], offset + wanted
                yield batch, Cursor(epoch, number, offset)
            if offset < len(rows):
                waiting.append(rows[offset:])
            offset = 0
        epoch, bundle = epoch + 1, 0
