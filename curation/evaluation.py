"""The report card of a detector: what is kept with a fit, what `k2 synthetic eval` prints, and what the figures are drawn from."""

from typing import Any

import numpy as np

from curation import detector, protocol
from curation.conformal import real_share
from curation.controls import controls, format_only
from curation.detector import SEMANTICS, VIEWS, Detector, Rows
from curation.labelled import JUDGED, Images
from curation.protocol import Comparison

WHOLE, CROP = JUDGED.index("whole"), JUDGED.index("crop")
FIGURED = ("crop", *JUDGED[len(VIEWS) :], "whole")  # views with figures of their own, the strict one first
CURVE = tuple(np.geomspace(0.002, 0.5, 25).round(5).tolist())  # losses of real images


def of_fit(rows: Rows, images: Images, fitted: Detector, raw: dict[str, np.ndarray], seed: int) -> dict[str, Any]:
    """On the images that it was fitted on, all that is fitted being fitted again without the generator, the sources, or both."""
    labels = rows.labels
    comparisons = list(protocol.disjoint(rows, fitted, raw, len(VIEWS), seed))
    log_odds = detector.cross_calibrated(raw, labels)
    shares = detector.cross_real_shares(log_odds, _unseen_kinds(rows, fitted, log_odds.shape), labels)
    alone = {name: detector.cross_calibrated({name: scores}, labels) for name, scores in raw.items()} if len(raw) > 1 else {}
    return _card(images, comparisons, log_odds, shares, alone, seed)


def of_new(fitted: Detector, images: Images, seed: int = 0) -> dict[str, Any]:
    """On images that it has not seen."""
    raw = detector.raw_scores(fitted, images.vectors)
    log_odds, alone = fitted.calibration.fused(raw), fitted.calibration.log_odds(raw)
    kinds = detector.kinds_of(fitted.kinds, images.vectors[SEMANTICS]) if fitted.kinds else np.full(log_odds.shape, "")
    shares = np.stack([real_share(fitted.reals, log_odds[:, i], kinds[:, i]) for i in range(log_odds.shape[1])], 1).astype(float)
    shares[np.isnan(log_odds)] = np.nan
    comparisons = list(protocol.applied(log_odds, images.labels))
    return _card(images, comparisons, log_odds, shares, alone if len(alone) > 1 else {}, seed)


def _unseen_kinds(rows: Rows, fitted: Detector, shape: tuple[int, int]) -> np.ndarray:
    """The kind (N, V) of each image by a head that had not seen its source."""
    if fitted.kinds is None:
        return np.full(shape, "")
    vectors, labels = rows.vectors[SEMANTICS], rows.labels
    kinds = detector.kinds_of(fitted.kinds, vectors).astype(object)
    sources = [~labels.synthetic & (labels.group == name) for name in np.unique(labels.group[~labels.synthetic])]
    for own, heads in zip(sources, detector.kinds_without(sources, vectors, labels), strict=True):
        kinds[own] = detector.kinds_of(heads, vectors[own])
    return kinds.astype(str)


def _card(
    images: Images, comparisons: list[Comparison], log_odds: np.ndarray, shares: np.ndarray, alone: dict[str, np.ndarray], seed: int
) -> dict[str, Any]:
    """Plain JSON values. `log_odds` and `shares` are (N, V) of scores that no image had a part in; `alone` those of each branch."""
    labels, area = images.labels, images.area
    both = labels.synthetic.any() and not labels.synthetic.all()
    result: dict[str, Any] = {
        "num": {
            "real": int((~labels.synthetic).sum()),
            "synthetic": int(labels.synthetic.sum()),
            "with_crop": int((~np.isnan(log_odds[:, CROP])).sum()),
            "unreadable": images.num_bad,
            "sources": len(np.unique(labels.group[~labels.synthetic])),
            "generators": len(np.unique(labels.group[labels.synthetic])),
        },
        "losses": {name: protocol.losses(shares[:, i], labels) for name, i in (("whole", WHOLE), ("crop", CROP))},
    }
    if not both:
        return result
    result["views"] = {view: protocol.generators(comparisons, area, JUDGED.index(view)) for view in FIGURED}
    result["alone"] = {
        name: protocol.generators(protocol.applied(scores, labels), area, CROP).get("mean") for name, scores in alone.items()
    }
    result["reliability"] = {name: protocol.reliability(log_odds[:, i], labels.synthetic) for name, i in (("whole", WHOLE), ("crop", CROP))}
    branch = SEMANTICS if SEMANTICS in images.vectors else next(iter(images.vectors))
    if (~np.isnan(log_odds[:, CROP])).sum() > 2 * protocol.MIN_GROUP:
        result["controls"] = controls(images.container, area, images.vectors[branch][:, CROP], labels, log_odds[:, CROP], seed)
    no_crop = np.isnan(log_odds[:, CROP])
    others = {"format only": format_only(images.container, labels, seed), "area only": area[:, None].astype(float)}
    result["curves"] = {"loss": list(CURVE), "detector": _curve(comparisons, CROP)}
    for scores in others.values():
        scores[no_crop] = np.nan
    result["curves"] |= {name: _curve(list(protocol.applied(scores, labels)), 0) for name, scores in others.items()}
    return result


def _curve(comparisons: list[Comparison], view: int) -> list[float]:
    """Recall, mean over comparisons of generators with 8 images, at each loss of CURVE."""
    found = []
    for one in comparisons:
        fake, real = one.fake_scores[:, view], one.real_scores[:, view]
        fake, real = fake[~np.isnan(fake)], real[~np.isnan(real)]
        if len(fake) >= protocol.MIN_GROUP and len(real):
            cuts = np.quantile(real, 1 - np.array(CURVE), method="higher")
            found.append((fake[:, None] > cuts).mean(0))
    return np.mean(found, 0).round(4).tolist() if found else []
