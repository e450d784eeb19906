"""All pairs of 144-bit hashes within a Hamming distance: exact, in one process or partitioned. Time grows about as N^1.3 (benchmarks).

The bits are dealt to three parts. A pair within 12 bits differs in at most 4 bits of the first part, or 3 of the second, or 3 of
the third (were it 5, 4 and 4, the sum would be 13): the general pigeonhole principle (Qin et al., "GPH", ICDE 2018) on multi-index
hashing (Norouzi, Punjani and Fleet, arXiv 1307.2982). A part that may differ in t bits is cut into t + e bands, of which at least e
are equal: rows that agree in one of the choices of e bands are candidates, and their distance decides. A larger e means more
choices but longer keys, so fewer candidates; it grows with the number of rows (`bands_for`) and never changes what is found.

The choices that begin with the same band are searched together, one value of that band at a time, so that what is sorted fits in
the cache, and so that the work can be partitioned: a partition is some of the values of one first band.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np

from curation.schema import PHASH_BYTES

PHASH_BITS = 8 * PHASH_BYTES
Words = list[np.ndarray]  # the bits of N hashes, dealt to three uint64 arrays (N,), one per part
# What a key of one row costs against one candidate pair, measured; and how much less than its bits a key of real hashes tells.
SORT_COST, PAIR_COST, TELLING = 60, 100, 0.8
IN_CACHE = 1 << 18  # rows that are sorted at once
PIECE = 1 << 20  # candidates that are looked at together


@dataclass(frozen=True)
class Step:
    """The choices of bands of one part that begin with band `first`."""

    part: int
    first: int
    shift: int  # of the first band in the part's word
    width: int  # how many of its bits tell the partitions apart
    masks: tuple[int, ...]  # the bits of each choice

    @property
    def name(self) -> str:
        return f"{self.part}-{self.first}"


@dataclass(frozen=True)
class Plan:
    """How hashes within `max_bits` are searched; `sizes` bits go to each part."""

    max_bits: int
    sizes: tuple[int, ...]
    steps: tuple[Step, ...]

    @property
    def masks(self) -> list[tuple[int, int]]:
        """(part, mask) of every choice, in the order of the search."""
        return [(step.part, mask) for step in self.steps for mask in step.masks]


def plan_for(num_rows: int, max_bits: int) -> Plan:
    """The plan that costs least for so many rows.

    Raises:
        ValueError: `max_bits` is not in 0 to 40 (beyond, every second hash is near by chance).
    """
    if not 0 <= max_bits <= 40:
        raise ValueError(f"a Hamming distance of {max_bits} bits; choose 0 to 40 of {PHASH_BITS}")
    return min((_plan(max_bits, equal) for equal in range(1, 8)), key=lambda plan: _cost(plan, num_rows))


def _cost(plan: Plan, num_rows: int) -> float:
    pairs = (num_rows / 2 ** (TELLING * mask.bit_count() + 1) for _, mask in plan.masks)
    return sum(SORT_COST + PAIR_COST * each for each in pairs)


def _plan(max_bits: int, equal: int) -> Plan:
    most = [(max(max_bits, 2) - 2 + i) // 3 for i in range(3)]  # their sum is max_bits - 2, so they cannot all be exceeded
    bands = [t + equal for t in most]
    sizes, left = [], PHASH_BITS
    for i in range(3):
        room = 64 * (2 - i)  # what the parts after this one can hold
        sizes.append(min(64, max(left - room, round(left * bands[i] / sum(bands[i:])))))
        left -= sizes[-1]
    steps = []
    for part, (size, count, t) in enumerate(zip(sizes, bands, most, strict=True)):
        edges = [size * i // count for i in range(count + 1)]
        band = [((1 << (stop - start)) - 1) << start for start, stop in pairwise(edges)]
        for first in range(t + 1):
            masks = tuple(band[first] | sum(rest) for rest in combinations(band[first + 1 :], equal - 1))
            steps.append(Step(part, first, edges[first], min(edges[first + 1] - edges[first], 12), masks))
    return Plan(max_bits, tuple(sizes), tuple(steps))


def deal(hashes: np.ndarray, sizes: tuple[int, ...]) -> Words:
    """The bits of uint8 (N, 18) hashes as three words; distances stay what they are.

    Bits far apart in the hash come together, so that no band is made of the low frequencies alone, which pictures share most.
    """
    order = np.arange(PHASH_BITS) * 55 % PHASH_BITS
    words = [np.empty(len(hashes), np.uint64) for _ in sizes]
    for start in range(0, len(hashes), PIECE):
        bits = np.unpackbits(hashes[start : start + PIECE], axis=1)
        at = 0
        for word, size in zip(words, sizes, strict=True):
            packed = np.packbits(bits[:, order[at : at + size]], axis=1, bitorder="little")
            whole = np.zeros((len(packed), 8), np.uint8)
            whole[:, : packed.shape[1]] = packed
            word[start : start + PIECE] = whole.view("<u8")[:, 0]
            at += size
    return words


def near_pairs(
    hashes: np.ndarray, max_bits: int, num_asked: int | None = None, watch: Callable[[tuple], Iterable] = iter
) -> tuple[np.ndarray, np.ndarray]:
    """Rows (left, right), left < right, of uint8 (N, 18) `hashes` that differ in at most `max_bits`: each pair once, sorted.

    Args:
        num_asked: pairs of two rows from here on are left out (the mirrors of two images say nothing new).
        watch: wraps the steps, to show progress.

    Raises:
        ValueError: `max_bits` is not in 0 to 40.
    """
    plan = plan_for(len(hashes), max_bits)
    words, ids = deal(hashes, plan.sizes), np.arange(len(hashes))
    num_asked = len(hashes) if num_asked is None else num_asked
    found = [pair for step in watch(plan.steps) for pair in search(plan, step, words, ids, num_asked)]
    return in_order(np.concatenate([np.empty((2, 0), np.int64), *found], axis=1))


def in_order(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (2, P) as sorted (left, right) with left < right."""
    left, right = pairs.min(0), pairs.max(0)
    order = np.lexsort((right, left))
    return left[order], right[order]


def band_values(step: Step, words: Words) -> np.ndarray:
    """The value (N,) of the step's first band: rows with different values meet in another step, if they are near at all."""
    values = (words[step.part] >> np.uint64(step.shift)) & np.uint64((1 << step.width) - 1)
    return values.astype(np.uint8 if step.width <= 8 else np.uint16)


def search(plan: Plan, step: Step, words: Words, ids: np.ndarray, num_asked: int) -> Iterator[np.ndarray]:
    """Pairs (2, P) of `ids` within plan.max_bits that this step is the first to find; `ids` (N,) rises."""
    if len(ids) <= IN_CACHE:
        yield from _search(plan, step, words, ids, num_asked)
        return
    values = band_values(step, words)
    order = np.argsort(values, kind="stable")
    ends = np.bincount(values, minlength=1 << step.width).cumsum()
    start = 0
    for stop in ends.tolist():
        if stop - start > 1:
            rows = order[start:stop]
            yield from _search(plan, step, [word[rows] for word in words], ids[rows], num_asked)
        start = stop


def _search(plan: Plan, step: Step, words: Words, ids: np.ndarray, num_asked: int) -> Iterator[np.ndarray]:
    row_bits = np.uint64((1 << max(len(ids) - 1, 1).bit_length()) - 1)
    rows = np.arange(len(ids), dtype=np.uint64)
    for mask in step.masks:
        # One sorted word holds a hash of the key (equal keys have equal hashes; the few others fail the distance) and the row.
        key = words[step.part] & np.uint64(mask)
        key *= np.uint64(0x9E3779B97F4A7C15)
        key &= ~row_bits
        key |= rows
        key.sort()
        left, ahead = np.flatnonzero(key[1:] ^ key[:-1] <= row_bits), 1
        while len(left):
            for start in range(0, len(left), PIECE):
                piece = left[start : start + PIECE]
                near = _near(plan, (step.part, mask), words, key[piece] & row_bits, key[piece + ahead] & row_bits)
                near = ids[near]
                near = near[:, near.min(0) < num_asked]
                if near.shape[1]:
                    yield near
            ahead += 1
            left = left[left + ahead < len(key)]
            left = left[key[left + ahead] ^ key[left] <= row_bits]


def _near(plan: Plan, choice: tuple[int, int], words: Words, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The pairs (2, P) of rows within plan.max_bits that no earlier choice finds, so that each pair comes once."""
    rows = np.stack([left, right]).astype(np.int64)
    distance = sum(np.bitwise_count(word[rows[0]] ^ word[rows[1]]) for word in words)
    rows = rows[:, distance <= plan.max_bits]
    differ = [word[rows[0]] ^ word[rows[1]] for word in words]
    new = np.ones(rows.shape[1], bool)
    for part, mask in plan.masks:
        if (part, mask) == choice or not len(new):
            break
        new &= (differ[part] & np.uint64(mask)) != 0
    # A different key with the same hash is left to the choice whose key is equal.
    return rows[:, new & ((differ[choice[0]] & np.uint64(choice[1])) == 0)]
