"""Which images make global batch i of a phase, and which of them a rank reads. Order is data: nothing here has a state.

Batch i is a pure function of the packed sets, their weights, the seed and i. It does not depend on the number of ranks,
on gradient accumulation or on what was read before, so a run goes on at any world size where it was stopped, and a step is
walked back to its images.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from k2model.data import Packed

CYCLE = 1000  # row groups after which every packed set has exactly its share


class Group(NamedTuple):
    """A row group of one of the packed sets."""

    source: int  # which packed set
    epoch: int  # of that set, from 0
    number: int  # into `Packed.groups`


class Part(NamedTuple):
    """Rows of one row group that one rank reads at once: what a micro-batch is made of."""

    group: Group
    rows: list[int]
    num_valid: int  # rows after these repeat others, so that all ranks have equal shapes; their weight is 0
    first: int  # images of the global batch before this row group

    @property
    def places(self) -> list[int]:
        """Of the valid rows among the images of the global batch, counted through its row groups and the rows of each."""
        return [self.first + row for row in self.rows[: self.num_valid]]


class Order:
    """The sequence of global batches of a phase.

    A set of weight w gives the share w of all row groups; each set is read in epochs of its own, in an order that changes with
    the epoch. With `hold_out` so many row groups of every set are never trained on: `held_out` names them, for validation.

    Args:
        sets: packed sets of one resolution.
        weights: one positive number per set, in any unit. Shares are rounded to 1 / 1000.
        num_groups: row groups per global batch.
        seed: of the run.
        hold_out: row groups of each set that are kept back, at most a tenth of it.

    Raises:
        ValueError: a weight is not positive, a set is empty, or a number is out of range.
    """

    def __init__(self, sets: Sequence[Packed], weights: Sequence[float], num_groups: int, seed: int, hold_out: int = 0):
        if not sets or len(sets) != len(weights) or not all(np.isfinite(weight) and weight > 0 for weight in weights):
            raise ValueError(f"every packed set needs a positive weight; got {len(sets)} sets and weights {list(weights)}")
        if num_groups < 1 or hold_out < 0:
            raise ValueError(f"num_groups must be 1 or more and hold_out 0 or more; got {num_groups} and {hold_out}")
        if empty := [packed.directory for packed in sets if not len(packed)]:
            raise ValueError(f"{empty[0]} is empty: nothing can be read from it. Leave it out, or pack something")
        self.sets, self.num_groups, self.seed = list(sets), num_groups, seed
        shuffled = [_permutation(len(packed), seed, 0, 2) for packed in sets]
        kept_back = [min(hold_out, len(packed) // 10) for packed in sets]
        self.held_out = [Group(k, 0, int(n)) for k, order in enumerate(shuffled) for n in order[: kept_back[k]]]
        self._trained = [np.sort(order[kept_back[k] :]) for k, order in enumerate(shuffled)]
        counts = _shares(np.asarray(weights, float))
        self._cycle = np.repeat(np.arange(len(sets)), counts)
        self._counts = counts
        self._permuted = lru_cache(2 * len(sets) + 2)(_permutation)  # of the last epochs and cycles: a million row groups take a while

    def group(self, j: int) -> Group:
        """Row group j of the phase; global batch i holds those from i * num_groups on."""
        cycle, place = divmod(j, CYCLE)
        drawn = self._cycle[self._permuted(CYCLE, self.seed, cycle, 1)] if len(self.sets) > 1 else self._cycle
        source = int(drawn[place])
        before = cycle * int(self._counts[source]) + int((drawn[:place] == source).sum())
        trained = self._trained[source]
        epoch, index = divmod(before, len(trained))
        return Group(source, epoch, int(trained[self._permuted(len(trained), self.seed, epoch)[index]]))

    @property
    def num_batches(self) -> int:
        """Global batches in which as many row groups are read as there are: an epoch, of a mixture on average."""
        return -(-sum(map(len, self._trained)) // self.num_groups)

    def batch(self, i: int) -> list[Group]:
        """The row groups of global batch i."""
        return [self.group(j) for j in range(i * self.num_groups, (i + 1) * self.num_groups)]

    def describe(self, group: Group) -> dict:
        """The entry of `dataset.json`: file, row_group, bucket_height, bucket_width, num_rows."""
        return self.sets[group.source].groups[group.number]

    def num_images(self, i: int) -> int:
        """Images of global batch i; padding is not counted."""
        return sum(self.describe(group)["num_rows"] for group in self.batch(i))

    def share(self, i: int, rank: int = 0, world: int = 1, max_rows: int | None = None) -> list[Part]:
        """What a rank reads of global batch i: as many parts for every rank, each part of one shape for all ranks of its row group.

        Ranks take whole row groups in turn; where there are more ranks than row groups, they share one by its rows.

        Args:
            i: number of the global batch.
            rank: from 0.
            world: number of data-parallel ranks.
            max_rows: most images in a part; larger row groups are read in several parts.

        Raises:
            ValueError: `world` neither divides `num_groups` nor is a multiple of it.
        """
        check_world(self.num_groups, world)
        ranks = max(1, world // self.num_groups)  # that share one row group
        largest = -(-max(packed.description["batch_size"] for packed in self.sets) // ranks)
        pieces = 1 if max_rows is None else -(-largest // max_rows)
        groups = self.batch(i)
        counts = [self.describe(group)["num_rows"] for group in groups]
        firsts = [0, *accumulate(counts)]
        return [
            _piece(groups[j], counts[j], firsts[j], rank % ranks + ranks * k, ranks * pieces)
            for j in range(rank // ranks, len(groups), max(1, world // ranks))
            for k in range(pieces)
        ]


def check_world(num_groups: int, world: int) -> None:
    """Refuse a number of ranks that cannot read a global batch in equal parts.

    Raises:
        ValueError: `world` neither divides `num_groups` nor is a multiple of it.
    """
    if num_groups % world and world % num_groups:
        fits = [n for n in range(1, num_groups + 1) if num_groups % n == 0]
        raise ValueError(
            f"{world} data-parallel ranks cannot share global batches of {num_groups} row groups evenly. "
            f"Use {', '.join(map(str, fits))} or a multiple of {num_groups} ranks, or change the recipe's num_groups"
        )


def _piece(group: Group, num_rows: int, first: int, k: int, num_pieces: int) -> Part:
    """Every `num_pieces`-th row from row k on, filled up with repeats to the length of the longest piece."""
    rows = list(range(k, num_rows, num_pieces))
    missing = -(-num_rows // num_pieces) - len(rows)
    return Part(group, rows + [rows[-1] if rows else 0] * missing, len(rows), first)


def _shares(weights: np.ndarray) -> np.ndarray:
    """Weights as whole numbers of at least 1 that add up to CYCLE, by largest remainder."""
    exact = weights / weights.sum() * CYCLE
    counts = np.maximum(np.floor(exact).astype(int), 1)
    while counts.sum() != CYCLE:
        step = 1 if counts.sum() < CYCLE else -1
        free = np.where((counts > 1) | (step > 0), step * (exact - counts), -np.inf)
        counts[int(free.argmax())] += step
    return counts


def _permutation(length: int, seed: int, key: int, stream: int = 0) -> np.ndarray:
    """The permutation of (seed, key). It sorts raw Philox bits, whose sequence NumPy promises to keep.

    Streams are apart: 0 the epochs of a set, 1 the cycles of a mixture, 2 what is held out.
    """
    return np.argsort(np.random.Philox(key=[seed, key], counter=[0, 0, 0, stream]).random_raw(length), kind="stable")
