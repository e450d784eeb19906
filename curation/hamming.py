"""All pairs of 144-bit hashes within a Hamming distance: exact, in one process or partitioned. How time grows is in benchmarks/results.

The bits are dealt to three words. A pair within 12 bits differs in at most 4 bits of the first word, or 3 of the second, or 3 of
the third (were it 5, 4 and 4, the sum would be 13): the general pigeonhole principle (Qin et al., "GPH", ICDE 2018) on multi-index
hashing (Norouzi, Punjani and Fleet, arXiv 1307.2982). A word that may differ in t bits is cut into t + e bands, of which at least e
are equal: rows that agree in one of the choices of e bands are candidates, and their distance decides. A larger e means more
choices but longer keys, so fewer candidates; it grows with the number of rows and never changes what is found.

The choices that begin with the same band are searched together, one value of that band at a time, so that what is sorted fits in
the cache, and so that the work can be partitioned: a partition is some of the values of one first band.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from curation.schema import PHASH_BYTES

PHASH_BITS = 8 * PHASH_BYTES
NUM_WORDS = 3
WORD_BITS = PHASH_BITS // NUM_WORDS
# Nanoseconds of a key of one row (measured on a busy machine) and of a candidate pair (an estimate); and how much less than its bits
# a key of real hashes tells: 0.84 to 0.97 among 565 pictures. They choose a plan and never change what it finds.
SORT_COST, PAIR_COST, TELLING = 28, 10, 0.9
DENSE = 8  # where more than one row in so many has a candidate, all rows are compared: faster than to gather those
IN_CACHE = 1 << 15  # rows that are sorted at once, about
MIX = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: the high bits of a product depend on all bits of a key


@dataclass(frozen=True)
class Step:
    """The choices of bands of one word that begin with band `first`."""

    word: int
    first: int
    masks: tuple[int, ...]  # the bits of each choice

    @property
    def name(self) -> str:
        return f"{self.word}-{self.first}"


@dataclass(frozen=True)
class Plan:
    """How hashes within `max_bits` are searched: the bits of each band of each word, and how many bands are equal in a choice."""

    max_bits: int
    equal: int
    bands: tuple[tuple[int, ...], ...]

    @property
    def steps(self) -> list[Step]:
        return [
            Step(word, first, tuple(band + sum(rest) for rest in combinations(bands[first + 1 :], self.equal - 1)))
            for word, bands in enumerate(self.bands)
            for first, band in enumerate(bands[: len(bands) - self.equal + 1])
        ]

    @property
    def most_partitions(self) -> int:
        """Values of the smallest first band: a step cannot be cut finer."""
        return 1 << min(band.bit_count() for bands in self.bands for band in bands)


def plan_for(num_rows: int, max_bits: int) -> Plan:
    """The plan that costs least for so many rows.

    Raises:
        ValueError: `max_bits` is not in 0 to 40 (beyond, every second hash is near by chance).
    """
    if not 0 <= max_bits <= 40:
        raise ValueError(f"a Hamming distance of {max_bits} bits; choose 0 to 40 of {PHASH_BITS}")
    return min((_plan(max_bits, equal) for equal in range(1, 8)), key=lambda plan: _cost(plan, num_rows))


def _cost(plan: Plan, num_rows: int) -> float:
    pairs = (num_rows / 2 ** (TELLING * mask.bit_count() + 1) for step in plan.steps for mask in step.masks)
    return sum(SORT_COST + PAIR_COST * each for each in pairs)


def _plan(max_bits: int, equal: int) -> Plan:
    most = [(max(max_bits, 2) - 2 + i) // NUM_WORDS for i in range(NUM_WORDS)]  # the sum is max_bits - 2: not all can be exceeded
    return Plan(max_bits, equal, tuple(tuple(_every(t + equal, first) for first in range(t + equal)) for t in most))


def _every(count: int, first: int) -> int:
    """Every count-th bit of a word: no band is made of neighbours, which pictures share most."""
    return sum(1 << bit for bit in range(first, WORD_BITS, count))


def deal(hashes: np.ndarray) -> np.ndarray:
    """The bits of uint8 (N, 18) hashes as uint64 (N, 3) words; distances stay what they are.

    Of three bytes that follow each other each word has one, in turn the first, the second and the third.
    """
    words = np.zeros((len(hashes), NUM_WORDS, 8), np.uint8)
    for byte in range(PHASH_BYTES):
        row, place = divmod(byte, NUM_WORDS)
        words[:, (row + place) % NUM_WORDS, row] = hashes[:, byte]
    return words.view("<u8")[..., 0]


def near_pairs(
    hashes: np.ndarray, max_bits: int, num_asked: int | None = None, watch: Callable[[list], Iterable] = iter
) -> tuple[np.ndarray, np.ndarray]:
    """Rows (left, right), left < right, of uint8 (N, 18) `hashes` that differ in at most `max_bits`: each pair once, sorted.

    Args:
        num_asked: pairs of two rows from here on are left out (the mirrors of two images say nothing new).
        watch: wraps the steps, to show progress.

    Raises:
        ValueError: `max_bits` is not in 0 to 40.
    """
    plan = plan_for(len(hashes), max_bits)
    words, ids = deal(hashes), np.arange(len(hashes))
    num_asked = len(hashes) if num_asked is None else num_asked
    found = [pair for step in watch(plan.steps) for pair in search(plan, step, words, ids, num_asked)]
    return in_order(np.concatenate([np.empty((2, 0), np.int64), *found], axis=1))


def in_order(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (2, P) as sorted (left, right) with left < right."""
    left, right = pairs.min(0), pairs.max(0)
    order = np.lexsort((right, left))
    return left[order], right[order]


def parts_of(plan: Plan, step: Step, words: np.ndarray, count: int) -> np.ndarray:
    """The part (N,), uint16 under `count` <= 2^16, of each row: rows whose first bands are equal have the same."""
    value = (words[:, step.word] & np.uint64(plan.bands[step.word][step.first])) * MIX
    value >>= np.uint64(32)
    value *= np.uint64(count)
    value >>= np.uint64(32)
    return value.astype(np.uint16)


def search(plan: Plan, step: Step, words: np.ndarray, ids: np.ndarray, num_asked: int) -> Iterator[np.ndarray]:
    """Pairs (2, P) of `ids` within plan.max_bits that this step is the first to find, left < right; `ids` (N,) rises."""
    if len(ids) <= IN_CACHE:
        yield ids[_search(plan, step, words, np.searchsorted(ids, num_asked))]
        return
    count = min(-(-len(ids) // IN_CACHE), 1 << 16)
    parts = parts_of(plan, step, words, count)
    order = np.argsort(parts, kind="stable")
    num_asked = np.searchsorted(ids, num_asked)
    ends = np.bincount(parts, minlength=count).cumsum()
    start = 0
    for stop in ends.tolist():
        if stop - start > 1:
            rows = order[start:stop]
            found = _search(plan, step, words.take(rows, axis=0), np.searchsorted(rows, num_asked))
            yield ids[rows[found]]
        start = stop


def _search(plan: Plan, step: Step, words: np.ndarray, num_asked: int) -> np.ndarray:
    row_bits = np.uint64((1 << max(len(words) - 1, 1).bit_length()) - 1)
    rows = np.arange(len(words), dtype=np.uint64)
    mine, other = (np.ascontiguousarray(words[:, word % NUM_WORDS]) for word in (step.word, step.word + 1))
    found = [np.empty((2, 0), np.int64)]
    for mask in step.masks:
        # One sorted word holds a hash of the key (equal keys have equal hashes; the few others fail the distance) and the row.
        key = mine & np.uint64(mask)
        key *= MIX
        key &= ~row_bits
        key |= rows
        key.sort()
        row = (key & row_bits).view(np.int64)
        look = other[row]  # most candidates differ too much in this word alone
        ahead, same = 1, key[1:] ^ key[:-1] <= row_bits
        while np.count_nonzero(same) > len(same) // DENSE:
            near = np.flatnonzero(same & (np.bitwise_count(look[ahead:] ^ look[:-ahead]) <= plan.max_bits))
            found.append(np.stack([row[near], row[near + ahead]]))
            ahead += 1
            same = key[ahead:] ^ key[:-ahead] <= row_bits
        left = np.flatnonzero(same)
        while len(left):
            near = left[np.bitwise_count(look[left] ^ look[left + ahead]) <= plan.max_bits]
            found.append(np.stack([row[near], row[near + ahead]]))
            ahead += 1
            left = left[left + ahead < len(key)]
            left = left[key[left + ahead] ^ key[left] <= row_bits]
    rows = np.concatenate(found, axis=1)
    return _new(plan, step, words, rows[:, rows[0] < num_asked])


def _new(plan: Plan, step: Step, words: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Each pair of rows (2, P) once, of those within plan.max_bits that no earlier step finds."""
    differ = words[rows[0]] ^ words[rows[1]]
    new = np.bitwise_count(differ).sum(1, dtype=np.uint8) <= plan.max_bits
    rows, differ = rows[:, new], differ[new]
    equal = [[word & np.uint64(band) == 0 for band in bands] for word, bands in zip(differ.T, plan.bands, strict=True)]
    here = equal[step.word]
    new = here[step.first] & (sum(band.astype(np.uint8) for band in here) >= plan.equal)  # false where only the hashes of two keys agree
    for earlier in equal[: step.word]:
        new &= sum(band.astype(np.uint8) for band in earlier) < plan.equal
    for band in here[: step.first]:
        new &= ~band
    code = np.unique(rows[0, new] * len(words) + rows[1, new])
    return np.stack(np.divmod(code, max(len(words), 1)))
