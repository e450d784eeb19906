"""How well a detector tells generated images of unseen generators from real images of unseen sources: figures that are about nothing else.

A comparison is one generator against real images, scored by a model that saw neither. Its figures come from native-scale crops of one
size and one encoding (`curation.canonical`), and the AUROC also from pairs of like area only: image size alone tells many sources
apart, through the sharpness that a native crop of a small or large picture has. `curation.controls` measures what such cues are worth.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from scipy.special import expit
from sklearn.metrics import average_precision_score

from curation import probe
from curation.detector import Calibration, Detector, Rows, calibrated
from curation.probe import Labels, clopper_pearson

LOSSES = (0.05, 0.01)  # of real images
AREA_FACTOR = 2.0  # images of a pair differ in area by at most this factor
REAL_FOLDS = 3
MIN_GROUP = 8  # images of a generator or source below which its own figure says nothing
MIN_PAIRS = 200  # of like area
BINS = 10  # of the reliability diagram


class Comparison(NamedTuple):
    """Scores of one generator's images and of real ones by a model that saw neither."""

    generator: str
    fake: np.ndarray  # (n,) indices of the labelled images
    real: np.ndarray  # (m,)
    fake_scores: np.ndarray  # (n, V), NaN where an image has no such view
    real_scores: np.ndarray  # (m, V)


def applied(scores: np.ndarray, labels: Labels) -> Iterator[Comparison]:
    """Every generator against all real images, from scores (N, V) of a model that saw none of them, or of each out of fold."""
    real = np.flatnonzero(~labels.synthetic)
    for name in np.unique(labels.group[labels.synthetic]):
        fake = np.flatnonzero(labels.synthetic & (labels.group == name))
        yield Comparison(str(name), fake, real, scores[fake], scores[real])


def disjoint(rows: Rows, detector: Detector, raw: dict[str, np.ndarray], num_train: int, seed: int) -> Iterator[Comparison]:
    """The strict comparison on the images that a detector was fitted on: all is fitted again, without the generator and the sources.

    Real sources are dealt into 3 folds; per generator and fold the heads and the calibration are fitted on what is left. A branch with
    given scores keeps those: its own folds had left the image out. Generators of fewer than 8 images are passed over.

    Args:
        rows: What it was fitted on.
        detector: Its regularisation is taken over.
        raw: Scores (N, V) of each branch out of fold, as `detector.fit` returned them; calibration is fitted on those.
        num_train: Leading views that heads are fitted on.
        seed: Of the folds.
    """
    labels = rows.labels
    sources = np.random.default_rng(seed).permutation(np.unique(labels.group[~labels.synthetic]))
    folds = [np.isin(labels.group, fold) & ~labels.synthetic for fold in np.array_split(sources, REAL_FOLDS)]
    names, counts = np.unique(labels.group[labels.synthetic], return_counts=True)
    pairs = [(str(name), labels.synthetic & (labels.group == name), real) for name in names[counts >= MIN_GROUP] for real in folds]
    fitted = {
        branch: probe.heads_without(
            [fake | real for _, fake, real in pairs], vectors[:, :num_train], labels, (detector.info["heads"][branch]["strength"],)
        )
        for branch, vectors in rows.vectors.items()
        if branch not in rows.given
    }
    for name, fake, real in pairs:
        rest, held = ~fake & ~real, fake | real
        heads = {branch: next(found)[0] for branch, found in fitted.items()}
        scores = {branch: probe.linear_scores(rows.vectors[branch][held], head) for branch, head in heads.items()}
        scores |= {branch: values[held] for branch, values in rows.given.items()}
        how: Calibration = calibrated({branch: values[rest] for branch, values in raw.items()}, labels.at(rest))
        fused, is_fake = how.fused(scores), fake[held]
        yield Comparison(name, np.flatnonzero(fake), np.flatnonzero(real), fused[is_fake], fused[~is_fake])


# --- figures ---


def generators(comparisons: Iterable[Comparison], area: np.ndarray, view: int) -> dict[str, Any]:
    """Figures of one view: per generator (those with 8 images in it), their mean, and the generator of the lowest AUROC.

    Of a generator with several comparisons a figure is the mean. Average precision is that of classes of equal weight. `like_area` is
    the AUROC over pairs whose areas differ by a factor of at most 2; None where there are few.
    """
    found: dict[str, list[list[float]]] = {}
    nums: dict[str, int] = {}
    for one in comparisons:
        fake, real = one.fake_scores[:, view], one.real_scores[:, view]
        has_fake, has_real = ~np.isnan(fake), ~np.isnan(real)
        if has_fake.sum() < MIN_GROUP or not has_real.any():
            continue
        areas = area[one.fake[has_fake]], area[one.real[has_real]]
        fake, real = fake[has_fake], real[has_real]
        truth = np.r_[np.ones(len(fake)), np.zeros(len(real))]
        balanced = np.r_[np.full(len(fake), 1 / len(fake)), np.full(len(real), 1 / len(real))]
        precision = average_precision_score(truth, np.r_[fake, real], sample_weight=balanced)
        recalls = [float((fake > np.quantile(real, 1 - loss, method="higher")).mean()) for loss in LOSSES]
        found.setdefault(one.generator, []).append([auroc(fake, real), like_area(fake, real, *areas), precision, *recalls])
        nums[one.generator] = len(fake)
    entries = []
    for name, figures in found.items():
        means = [float(np.mean(known)) if (known := column[~np.isnan(column)]).size else None for column in np.array(figures, float).T]
        entry: dict[str, Any] = {"generator": name, "num": nums[name], **dict(zip(_NAMES, map(_rounded, means), strict=True))}
        for recall in _NAMES[3:]:
            entry[f"{recall} interval"] = [_rounded(x) for x in clopper_pearson(round(entry[recall] * nums[name]), nums[name])]
        entries.append(entry)
    if not entries:
        return {"generators": []}
    means = {name: _mean([entry[name] for entry in entries]) for name in _NAMES}
    return {"generators": entries, "mean": means, "worst": min(entries, key=lambda entry: entry["auroc"])}


_NAMES = ("auroc", "like_area", "average_precision", *(f"recall at {loss:.0%}" for loss in LOSSES))


def auroc(fake: np.ndarray, real: np.ndarray) -> float:
    """Probability that a generated image has the higher score (ties count half)."""
    ordered = np.sort(real)
    below, upto = np.searchsorted(ordered, fake, "left"), np.searchsorted(ordered, fake, "right")
    return float((below + upto).mean() / 2 / len(real))


def like_area(fake: np.ndarray, real: np.ndarray, fake_area: np.ndarray, real_area: np.ndarray) -> float:
    """The same over pairs whose areas differ by a factor of at most AREA_FACTOR; NaN with fewer than MIN_PAIRS."""
    wins, pairs = 0.0, 0
    for score, area in zip(fake, fake_area, strict=True):
        others = real[np.abs(np.log2(real_area / area)) <= np.log2(AREA_FACTOR)]
        wins, pairs = wins + (score > others).sum() + (score == others).sum() / 2, pairs + len(others)
    return float(wins / pairs) if pairs >= MIN_PAIRS else np.nan


def losses(shares: np.ndarray, labels: Labels, allowed: float = LOSSES[0]) -> dict[str, Any]:
    """What a policy that removes `real_share` <= `allowed` does: of real images (all, per kind, per source), and of generators.

    Args:
        shares: (N,), NaN where an image does not have the view.
        labels: Of the N images.
        allowed: The wanted loss.
    """
    there = ~np.isnan(shares)

    def removed(mask: np.ndarray, name: str) -> dict[str, Any]:
        num, hits = int(mask.sum()), int((shares[mask] <= allowed).sum())
        return {"name": name, "num": num, "removed": _rounded(hits / num), "interval": [_rounded(x) for x in clopper_pearson(hits, num)]}

    result: dict[str, Any] = {"allowed": allowed}
    for title, values, real in (("kinds", labels.kind, True), ("sources", labels.group, True), ("generators", labels.group, False)):
        mask = there & (labels.synthetic != real)
        result[title] = [removed(mask & (values == name), str(name)) for name in np.unique(values[mask])]
    for title, mask in (("real", there & ~labels.synthetic), ("synthetic", there & labels.synthetic)):
        result[title] = removed(mask, title) if mask.any() else None
    return result


def reliability(log_odds: np.ndarray, synthetic: np.ndarray) -> dict[str, Any]:
    """Expected calibration error (Naeini et al. 2015) of probabilities at a prior of one half, in 10 bins, and the bins.

    Classes are weighted equally; images without a score are left out.
    """
    there = ~np.isnan(log_odds)
    probability, truth = expit(log_odds[there]), synthetic[there]
    share = truth.mean()
    weights = np.where(truth, 0.5 / share, 0.5 / (1 - share)) / len(truth)
    bin_of = np.minimum((probability * BINS).astype(int), BINS - 1)
    bins, error = [], 0.0
    for index in range(BINS):
        mask = bin_of == index
        if mask.any():
            weight = weights[mask].sum()
            said, was = float(weights[mask] @ probability[mask] / weight), float(weights[mask] @ truth[mask] / weight)
            bins.append({"said": _rounded(said), "was": _rounded(was), "num": int(mask.sum())})
            error += weight * abs(said - was)
    return {"ece": _rounded(error), "brier": _rounded(float(weights @ (probability - truth) ** 2)), "bins": bins}


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _rounded(float(np.mean(known))) if known else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(float(value), 4)
