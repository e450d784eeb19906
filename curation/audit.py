"""How many AI-generated images are left in a selection, from a random sample that a person has looked at.

    sample -> a table to fill in (with known AI images among it, which measure the person) -> share left, with a confidence bound

Exact bounds (Clopper and Pearson 1934) of a sample of all images take an auditor who sees everything. A person does not: what they
find is corrected by how much of the known AI images they found, in the adjusted count of Rogan and Gladen (1978),

    share = (found + specificity - 1) / (sensitivity + specificity - 1)

and the bound takes the worst end of every interval that goes into it. Bonferroni's inequality makes it hold without any assumption on
how they vary together; it is wider than the intervals of Lang and Reiczigel (2014), which are approximate, and never too narrow.

All of it speaks of the images that were there when the sample was drawn, and of what the auditor can see.
"""

import csv
import hashlib
import io
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import beta

ANSWERS = ("ai", "real", "unsure")
COLUMNS = ("number", "image", "ai")  # what a person sees; `ai` is to be filled in


class Counts(NamedTuple):
    """What an audit found."""

    num: int  # images of the sample, without known ones
    found: int  # of these, called AI-generated (unsure counts: a bound must not gain from doubt)
    num_known: int = 0  # known AI images among them
    found_known: int = 0
    num_clean: int = 0  # known real images, where there are any: how often the auditor (or classifier) is wrong about them
    flagged_clean: int = 0


class Left(NamedTuple):
    """Share of AI-generated images."""

    share: float  # adjusted count, 0 to 1
    low: float
    high: float  # both at the wanted confidence, one-sided each
    confidence: float


def upper(found: int, num: int, confidence: float = 0.95) -> float:
    """One-sided Clopper-Pearson bound: the largest share under which `found` or fewer of `num` are not rarer than 1 - confidence."""
    return 1.0 if found >= num else float(beta.ppf(confidence, found + 1, num - found))


def lower(found: int, num: int, confidence: float = 0.95) -> float:
    """The bound from below."""
    return 0.0 if found <= 0 else float(beta.ppf(1 - confidence, found, num - found + 1))


def needed(claim: float, found: int = 0, confidence: float = 0.95) -> int:
    """How many images must be checked, with at most `found` AI-generated among them, to claim a share under `claim`.

    Raises:
        ValueError: the claim is no share, or the confidence.
    """
    if not (0 < claim < 1 and 0 < confidence < 1 and found >= 0):
        raise ValueError(f"claim {claim} and confidence {confidence} must lie between 0 and 1, and found ({found}) must not be negative")
    low, high = found, found + 1
    while upper(found, high, confidence) > claim:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if upper(found, middle, confidence) <= claim else (middle, high)
    return high


def left(counts: Counts, confidence: float = 0.95) -> Left:
    """The share of AI-generated images in what was sampled, by the adjusted count, with conservative one-sided bounds.

    Without known images the auditor is taken to see all and to be never wrong. Known AI images correct what the auditor overlooks;
    known real ones (or a classifier's confusion) what is called AI and is not. Every rate in the formula takes an equal part of
    1 - confidence, and its own worst end.

    Raises:
        ValueError: the counts contradict each other, or there is nothing to judge by.
    """
    pairs = [(counts.found, counts.num), (counts.found_known, counts.num_known), (counts.flagged_clean, counts.num_clean)]
    if counts.num < 1 or any(not 0 <= hits <= num for hits, num in pairs):
        raise ValueError(f"an audit needs images, and finds no more than there are; got {counts}")
    each = 1 - (1 - confidence) / sum(num > 0 for _, num in pairs)
    (found, low, high), sensitivity, false = (
        (hits / num, lower(hits, num, each), upper(hits, num, each)) if num else (unmeasured,) * 3
        for (hits, num), unmeasured in zip(pairs, (0.0, 1.0, 0.0), strict=True)
    )
    return Left(
        adjusted(found, sensitivity[0], false[0], found),
        min(adjusted(low, sensitivity[2], f, 0.0) for f in false[1:]),
        max(adjusted(high, sensitivity[1], f, 1.0) for f in false[1:]),
        confidence,
    )


def adjusted(found: float, sensitivity: float, false: float, unknown: float) -> float:
    """Rogan and Gladen's share from the share that was found, the share of AI images and that of real ones that is called AI.

    Held to 0 and 1; `unknown` where a finding says nothing (sensitivity not above the false share).
    """
    return float(np.clip((found - false) / (sensitivity - false), 0, 1)) if sensitivity > false else unknown


# --- the sample ---


def draw(uids: Sequence[str], known: Sequence[str], sample: int, seed: int) -> list[str]:
    """A random sample of `uids` without repeats, with all of `known` (names of known AI images) mixed in at random places.

    Raises:
        ValueError: the sample is larger than the selection.
    """
    if not 0 < sample <= len(uids):
        raise ValueError(f"a sample of {sample} from {len(uids)} images: give a number from 1 to {len(uids)}")
    rng = np.random.default_rng(seed)
    chosen = [uids[i] for i in np.sort(rng.choice(len(uids), sample, replace=False))] + list(known)
    return [chosen[i] for i in rng.permutation(len(chosen))]


def blind(name: str, seed: int) -> str:
    """What the table calls an image: a name that does not say whether it is a known one."""
    return hashlib.blake2b(f"{seed} {name}".encode(), digest_size=6).hexdigest()


def sheet(names: Sequence[str]) -> str:
    """The table to fill in, as CSV: number (as on the contact sheet), image, and an empty column `ai`."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows((i, name, "") for i, name in enumerate(names, 1))
    return stream.getvalue()


def read_checked(text: str, names: Sequence[str], known: Collection[str]) -> Counts:
    """The counts of a table that a person has filled in.

    Args:
        text: The CSV.
        names: All images of the sample, as the table calls them.
        known: Those of them that are known AI images.

    Raises:
        ValueError: a column is missing, an answer is no answer, rows are not filled in, or were taken out.
    """
    rows = list(csv.DictReader(io.StringIO(text)))
    if not rows or any(name not in rows[0] for name in COLUMNS):
        raise ValueError(f"the table must have the columns {', '.join(COLUMNS)} and rows; `k2 synthetic audit --sample N` writes one")
    answers = {row["image"]: (row["ai"] or "").strip().lower() for row in rows}
    if set(answers) != set(names) or len(rows) != len(names):
        raise ValueError(
            f"the table has {len(answers)} images in {len(rows)} rows, the sample had {len(names)}; leave the rows as they were"
        )
    empty = [row["number"] for row in rows if not (row["ai"] or "").strip()]
    if empty:
        raise ValueError(f"{len(empty)} of {len(rows)} rows have no answer, the first is number {empty[0]}; write ai, real or unsure")
    wrong = sorted(set(answers.values()) - set(ANSWERS))
    if wrong:
        raise ValueError(f"{wrong[0]!r} is no answer; write one of {', '.join(ANSWERS)}")
    found = {name for name, answer in answers.items() if answer != "real"} - set(known)
    certain = {name for name in known if answers[name] == "ai"}  # in doubt about a known one, the auditor missed it
    return Counts(len(answers) - len(known), len(found), len(known), len(certain))
