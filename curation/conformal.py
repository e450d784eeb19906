"""How many real images score as high: the share that a threshold loses, promised from real images that no fit had seen.

Mondrian split conformal prediction (Vovk, Gammerman and Shafer 2005; Bates et al. 2023 for outliers): for an image of kind k with score s

    real_share = (1 + n_k * share of the calibration images of kind k with a score >= s) / (n_k + 1)

Removing what has `real_share <= 0.05` loses at most 5 % of real images of every kind, whatever the score is, as long as a new real
image is like one drawn from the calibration images. Every source counts the same within a kind, so that the largest one does not set
the threshold for all others. Images of a source that is unlike all of them are not covered: no calibration can.

A kind with fewer than `LEAST` images says too little, and uses the images of all kinds.
"""

from typing import Any, NamedTuple

import numpy as np
from scipy.special import expit
from scipy.stats import beta

LEAST = 40  # images of a kind: below, one of them is more than a promise of 5 % has room for
SHARES = (0.01, 0.05, 0.15)  # the thresholds that are written down: strict, wanted, and the end of the review band
WHOLE = ""  # the kind of all kinds together


class Reals(NamedTuple):
    """Scores of real images, out of fold; arrays have one entry per image."""

    scores: np.ndarray  # float64 log odds
    kind: np.ndarray  # str
    weight: np.ndarray  # within its kind, sum 1
    weight_in_all: np.ndarray  # over all images, sum 1


def calibrate(scores: np.ndarray, kind: np.ndarray, source: np.ndarray) -> Reals:
    """Weights for the scores (N,) of real images: within a kind every source the same, over all images every kind and source."""
    weight = np.zeros(len(scores))
    for name in np.unique(kind):
        mask = kind == name
        _, index, counts = np.unique(source[mask], return_inverse=True, return_counts=True)
        weight[mask] = 1 / counts[index] / len(counts)
    _, index, counts = np.unique(source, return_inverse=True, return_counts=True)
    return Reals(scores.astype(np.float64), kind.astype(str), weight, 1 / counts[index] / len(counts))


def kinds_of(reals: Reals) -> list[str]:
    """The kinds that have thresholds of their own."""
    names, counts = np.unique(reals.kind, return_counts=True)
    return [str(name) for name, count in zip(names, counts, strict=True) if count >= LEAST]


def real_share(reals: Reals, scores: np.ndarray, kind: np.ndarray) -> np.ndarray:
    """(M,) float32 conformal p-values of M images with `scores` and (predicted) `kind`."""
    own = kinds_of(reals)
    shares = np.empty(len(scores))
    for name in {*own, WHOLE}:
        asked = kind == name if name else ~np.isin(kind, own)
        if asked.any():
            ordered, above, num, _ = _tail(reals, name)
            shares[asked] = (1 + num * above[np.searchsorted(ordered, scores[asked], side="left")]) / (num + 1)
    return shares.astype(np.float32)


def thresholds(reals: Reals) -> dict[str, dict[str, Any]]:
    """Per kind (and "all"): the lowest score whose `real_share` is at most 1 %, 5 %, 15 %, as log odds and as probability.

    `loss` is the 95 % interval of the share of real images that the threshold truly loses, from the number of images it was set on: the
    coverage of split conformal prediction is Beta distributed (Vovk 2012). With unequal weights the number is Kish's effective one, and
    the interval an approximation. Null where there are too few images for the share.
    """
    found = {}
    for name in [WHOLE, *kinds_of(reals)]:
        ordered, above, num, effective = _tail(reals, name)
        entry: dict[str, Any] = {"num": num, "effective": round(effective, 1)}
        for share in SHARES:
            allowed = np.flatnonzero((1 + num * above) / (num + 1) <= share)
            # at[i] counts scores >= ordered[i]: the first that is allowed lies just above ordered[i - 1].
            cut = float(np.nextafter(ordered[allowed[0] - 1], np.inf)) if len(allowed) and allowed[0] else None
            a = share * (effective + 1)
            interval = [round(float(x), 4) for x in beta.ppf([0.025, 0.975], a, effective + 1 - a)]
            values = {"log_odds": round(cut, 4), "p_synthetic": round(float(expit(cut)), 4), "loss": interval} if cut is not None else None
            entry[f"{share:g}"] = values
        found[name or "all"] = entry
    return found


def _tail(reals: Reals, name: str) -> tuple[np.ndarray, np.ndarray, int, float]:
    """(sorted scores (n,), weight at or above each of them and 0 (n + 1,), n, effective n) of one kind or of all."""
    mask = reals.kind == name if name else np.ones(len(reals.kind), bool)
    scores, weight = reals.scores[mask], (reals.weight if name else reals.weight_in_all)[mask]
    order = np.argsort(scores, kind="stable")
    above = np.append(np.cumsum(weight[order][::-1])[::-1] / weight.sum(), 0.0)
    return scores[order], above, len(scores), float(weight.sum() ** 2 / (weight**2).sum())
