"""From features to tags: which features answer to damage, and to nothing else.

Images (not pairs) are split by their bytes into three parts. On `fit` a feature is discovered: it fires on the damaged picture
and not on the clean one more often than the other way round (exact one-sided McNemar test, Benjamini-Hochberg over the
features). On `estimate` its threshold is set: with 95 % confidence at most `budget` of the clean pictures, of every style and of
every control lie above it (the umbrella order statistic of Tong, Feng and Li 2018). A feature that still fires on enough damaged
pictures there becomes a tag with the verdict "artifact". `report` takes no part in any choice and measures what came out.

A budget is a claim, and a claim needs pictures: 2 % takes 149 per family in `estimate`, 0.5 % takes 598.
"""

import csv
import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binom, binomtest, false_discovery_control

from curation.contrast import CONTROLS, DAMAGE, STYLES
from curation.schema import TAGS
from curation.shards import write_bytes

PARTS = {"fit": 0.6, "estimate": 0.8, "report": 1.0}  # cumulative shares; the SAE itself is trained on `fit` only
VERDICTS = ("artifact", "style", "content", "mixed", "unknown")
CONFIDENCE = 0.95


def part(encoded: bytes) -> str:
    """fit, estimate or report, from the image's bytes alone: the same picture is in the same part in every command."""
    position = int.from_bytes(hashlib.md5(encoded).digest()[:8], "big") / 2**64
    return next(name for name, end in PARTS.items() if position < end)


@dataclass(frozen=True)
class Tag:
    """One row of the tag table."""

    feature: int
    tag: str  # the damage that it answers to; several are joined by "+"
    verdict: str
    threshold: float


@dataclass(frozen=True)
class Rules:
    """When a feature becomes a tag."""

    budget: float = 0.04  # share of each clean or style family that may lie above the threshold
    false_discoveries: float = 0.01  # Benjamini-Hochberg, within each kind of damage
    recall: float = 0.2  # least share of one kind of damage above the threshold


Values = Mapping[str, np.ndarray]  # "clean" and every name of DAMAGE, STYLES, CONTROLS -> (n, m) feature values of the same n pictures


def discover(values: Values, damage: str, rate: float) -> np.ndarray:
    """Features (indices) that fire on damaged pictures and not on their clean originals, at a false discovery rate."""
    clean, damaged = values["clean"] > 0, values[damage] > 0
    gained, lost = (damaged & ~clean).sum(0), (clean & ~damaged).sum(0)
    p = binom.sf(gained - 1, gained + lost, 0.5)  # exact; 1 where nothing changed
    return np.flatnonzero(false_discovery_control(p) <= rate)


def allowed(num: int, budget: float) -> int | None:
    """How many of `num` pictures may lie above a threshold for the true share to be at most `budget` with 95 % confidence.

    None when even zero of so few proves nothing.
    """
    possible = binom.cdf(np.arange(num + 1), num, budget) <= 1 - CONFIDENCE
    return int(possible.sum()) - 1 if possible[0] else None


def check_number(num: int, budget: float) -> int:
    """`allowed`, for a split of `num` pictures that has to carry the claim.

    Raises:
        ValueError: too few pictures; the text says how many it takes.
    """
    above = allowed(num, budget)
    if above is None:
        needed = int(np.ceil(np.log(1 - CONFIDENCE) / np.log(1 - budget)))
        raise ValueError(f"{num} pictures in `estimate` cannot show a share of {budget:.1%}; it takes {needed}: give more images or budget")
    return above


def harmless(values: Values) -> list[str]:
    """The families in which nothing may be removed."""
    return [name for name in ("clean", *STYLES, *CONTROLS) if name in values]


def thresholds(values: Values, budget: float) -> np.ndarray:
    """(m,) per feature the value that keeps every harmless family of `values` within the budget.

    Raises:
        ValueError: too few pictures for any claim.
    """
    num = len(values["clean"])
    above = check_number(num, budget)
    return np.max([np.sort(values[name], axis=0)[num - 1 - above] for name in harmless(values)], axis=0)


def exchanged(values: Values, damage: str, rng: np.random.Generator) -> Values:
    """The same pairs with clean and damaged swapped in a random half of them: what `discover` finds there is a false discovery."""
    swap = (rng.random(len(values["clean"])) < 0.5)[:, None]
    clean, damaged = values["clean"], values[damage]
    return {"clean": np.where(swap, damaged, clean), damage: np.where(swap, clean, damaged)}


def select(fit: Values, estimate: Values, rng: np.random.Generator, rules: Rules = Rules()) -> tuple[list[Tag], dict[str, Any]]:
    """Tags with the verdict "artifact", at most one feature per kind of damage, and what was looked at on the way."""
    cut, chosen, funnel = thresholds(estimate, rules.budget), {}, {}
    for damage in (name for name in DAMAGE if name in fit):
        found = discover(fit, damage, rules.false_discoveries)
        recall = (estimate[damage][:, found] > cut[found]).mean(0) if len(found) else np.zeros(0)
        funnel[damage] = {
            "discovered": len(found),
            "discovered_in_exchanged_pairs": len(discover(exchanged(fit, damage, rng), damage, rules.false_discoveries)),
            "best_recall": round(float(recall.max(initial=0)), 4),
        }
        if funnel[damage]["best_recall"] >= rules.recall:
            chosen.setdefault(int(found[recall.argmax()]), []).append(damage)
    tags = [Tag(feature, "+".join(names), "artifact", float(cut[feature])) for feature, names in sorted(chosen.items())]
    return tags, funnel


def fires(values: np.ndarray, tags: list[Tag]) -> np.ndarray:
    """(n, m) -> (n,) bool: does any artifact tag hold?"""
    hit = np.zeros(len(values), bool)
    for tag in tags:
        if tag.verdict == "artifact":
            hit |= values[:, tag.feature] > tag.threshold
    return hit


def report(values: Values, tags: list[Tag]) -> dict[str, Any]:
    """Share of each family on which some tag fires, with its exact two-sided 95 % interval; and the worst harmless family."""

    def share(hit: np.ndarray) -> dict[str, Any]:
        interval = binomtest(int(hit.sum()), len(hit)).proportion_ci(CONFIDENCE, "exact")
        return {"num": len(hit), "share": round(float(hit.mean()), 4), "interval": [round(interval.low, 4), round(interval.high, 4)]}

    families = {name: share(fires(matrix, tags)) for name, matrix in values.items()}
    worst = max(harmless(values), key=lambda name: families[name]["share"])
    return {"any_tag": families, "worst_harmless": {"family": worst, **families[worst]}}


def write_csv(tags: list[Tag], model: str, path: Path) -> None:
    """The tag table, in the columns of schema.TAGS; a header alone when no feature qualified."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(TAGS.names)
    writer.writerows([model, tag.feature, tag.tag, tag.verdict, f"{tag.threshold:.6g}"] for tag in tags)
    write_bytes(buffer.getvalue().encode(), path)


def read_csv(path: Path) -> list[Tag]:
    """The rows of a tag table.

    Raises:
        ValueError: columns or verdicts that we do not know.
    """
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != TAGS.names:
            raise ValueError(f"{path} has the columns {reader.fieldnames}, not {TAGS.names}")
        rows = list(reader)
    for row in rows:
        if row["verdict"] not in VERDICTS:
            raise ValueError(f"{path}: verdict {row['verdict']!r} of feature {row['feature']}; choose from {', '.join(VERDICTS)}")
    return [Tag(int(row["feature"]), row["tag"], row["verdict"], float(row["threshold"])) for row in rows]
