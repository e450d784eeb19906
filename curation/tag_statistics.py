"""The statistics of tags: exact tests on pairs, effect sizes with intervals, thresholds that keep a budget. Arrays in, arrays out.

Pictures are the unit: every function takes at most one row per picture and family. Firing means a value above zero, which is above
the feature's own JumpReLU threshold.
"""

from collections.abc import Mapping

import numpy as np
from scipy.stats import beta, binom, mannwhitneyu, norm, rankdata

CONFIDENCE = 0.95


def mcnemar(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(n, m) values of n pictures before and after a change -> per feature (m,): pictures on which it began to fire, on which it
    stopped, and the exact one-sided p-value of McNemar's test (1 where nothing changed)."""
    fired, fires = before > 0, after > 0
    gained, lost = (fires & ~fired).sum(0), (fired & ~fires).sum(0)
    return gained, lost, binom.sf(gained - 1, gained + lost, 0.5)


def matched_odds_ratio(gained: int, lost: int) -> tuple[float, float, float]:
    """Of a pair's two members, how much more often only the changed one fires: the estimate and its exact 95 % interval.

    The interval is Clopper and Pearson's of gained / (gained + lost), as odds; half a pair is added to both where one is 0.
    """
    low, high = clopper_pearson(gained, gained + lost)
    odds = [share / (1 - share) if share < 1 else float("inf") for share in (low, high)]
    add = 0.5 * (min(gained, lost) == 0)
    return (gained + add) / (lost + add), *odds


def clopper_pearson(hits: int, num: int) -> tuple[float, float]:
    """Exact two-sided 95 % interval of a share; (0, 1) of nothing."""
    tail = (1 - CONFIDENCE) / 2
    low = float(beta.ppf(tail, hits, num - hits + 1)) if hits else 0.0
    return low, float(beta.ppf(1 - tail, hits + 1, num - hits)) if hits < num else 1.0


def upper_bound(hits: int, num: int) -> float:
    """The largest share that `hits` of `num` do not refute: exact one-sided 95 %; 1 of nothing."""
    return float(beta.ppf(CONFIDENCE, hits + 1, num - hits)) if hits < num else 1.0


def auroc(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """(p, ...), (n, ...) -> (...): chance that a positive lies above a negative, ties counted half; NaN of nothing."""
    if not len(positive) or not len(negative):
        return np.full(positive.shape[1:], np.nan)
    return mannwhitneyu(positive, negative, axis=0, method="asymptotic").statistic / (len(positive) * len(negative))


def auroc_interval(positive: np.ndarray, negative: np.ndarray) -> tuple[float, float, float]:
    """(p,), (n,) -> AUROC and its 95 % interval (DeLong et al. 1988, on the logit scale). Cliff's delta is 2 AUROC - 1."""
    p, n = len(positive), len(negative)
    both = rankdata(np.concatenate([positive, negative]))
    above = (both[:p] - rankdata(positive)) / n  # of each positive: share of the negatives below it
    below = 1 - (both[p:] - rankdata(negative)) / p
    area = float(above.mean())
    if not 0 < area < 1:
        bound = 0.05 ** (1 / min(p, n))  # no variance to be seen: what so few pictures leave open
        return (area, bound, 1.0) if area else (area, 0.0, 1 - bound)
    error = np.sqrt(above.var(ddof=1) / p + below.var(ddof=1) / n) / (area * (1 - area))
    logit = np.log(area / (1 - area)) + np.array([-1, 1]) * norm.ppf(0.5 + CONFIDENCE / 2) * error
    return area, *(float(x) for x in 1 / (1 + np.exp(-logit)))


def dose(values: np.ndarray, severities: np.ndarray) -> np.ndarray:
    """(n, m) values at severities (n,), 0 for clean -> (m,) Spearman's correlation; 0 of a feature that never changes."""
    ranks, of = rankdata(values, axis=0), rankdata(severities)
    ranks, of = ranks - ranks.mean(0), of - of.mean()
    scale = np.sqrt((ranks**2).sum(0) * (of**2).sum())
    return np.divide(ranks.T @ of, scale, out=np.zeros(values.shape[1]), where=scale > 0)


def allowed(num: int, budget: float) -> int | None:
    """How many of `num` pictures may lie above a threshold for the true share to be at most `budget` with 95 % confidence
    (the umbrella order statistic of Tong, Feng and Li 2018). None when even zero of so few proves nothing.
    """
    possible = binom.cdf(np.arange(num + 1), num, budget) <= 1 - CONFIDENCE
    return int(possible.sum()) - 1 if possible[0] else None


def provable(num: int, budget: float) -> float:
    """The budget that a family of `num` pictures can show: the asked one, or the smallest that so few allow."""
    return max(budget, 1 - (1 - CONFIDENCE) ** (1 / num)) if num else 1.0


def thresholds(harmless: Mapping[str, np.ndarray], budget: float) -> np.ndarray:
    """family -> (n, m) values; (m,) per feature the value that keeps every family within its provable budget."""
    cuts = [np.sort(v, axis=0)[len(v) - 1 - (allowed(len(v), budget) or 0)] for v in harmless.values() if len(v)]
    return np.max(cuts, axis=0)


def reach(hit: np.ndarray, groups: np.ndarray, least: int = 4) -> dict[str, float | int]:
    """Does a tag hold whatever is shown? `hit` (n,) bool on damaged pictures, `groups` (n,) their sources or concepts.

    Of the groups with `least` pictures or more: how many there are, the share of them in which it holds at all, the recall in the worst
    one, and the share of all hits that the largest one has.
    """
    names = [name for name in np.unique(groups) if (groups == name).sum() >= least]
    recalls = np.array([hit[groups == name].mean() for name in names]) if names else np.zeros(1)
    shares = [float((hit & (groups == name)).sum() / max(hit.sum(), 1)) for name in names]
    return {
        "num_groups": len(names),
        "reached": round(float((recalls > 0).mean()), 3),
        "worst_recall": round(float(recalls.min()), 3),
        "largest_share": round(max(shares, default=1.0), 3),
    }


def matched(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(n, m), (n, k) values of two SAEs on the same rows -> (m,) the largest correlation of each feature with one of the other."""
    left, right = (
        (v - v.mean(0)) / np.maximum(np.linalg.norm(v - v.mean(0), axis=0), 1e-12) for v in (values.astype(float), others.astype(float))
    )
    return (left.T @ right).max(1) if right.shape[1] else np.zeros(left.shape[1])
