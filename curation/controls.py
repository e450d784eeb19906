"""What a detector's figures could be for the wrong reasons: containers, sizes, sources, chance.

Print them beside the detector's: a format-only AUROC far from 0.5 says what the labelled set gives away without a picture; real
against real says how well the same vectors tell sources apart, which no detector should need.
"""

from typing import Any

import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier

from curation import probe
from curation.probe import Labels
from curation.protocol import applied, auroc, generators

SPLITS = 5  # of the real sources into two classes
FOLDS = 5
STRENGTH = 1.0


def format_only(container: np.ndarray, labels: Labels, seed: int) -> np.ndarray:
    """(N, 1) scores of boosted trees on container facts (N, F) alone, whole generators and sources held out."""
    scores, container = np.zeros((len(container), 1)), np.nan_to_num(container, nan=-1)  # a column of nothing but NaN is refused
    for mask in probe.group_folds(labels, seed):
        model = HistGradientBoostingClassifier(max_iter=60, max_leaf_nodes=8, min_samples_leaf=5, random_state=seed)
        if len(np.unique(labels.synthetic[~mask])) == 2:
            model.fit(container[~mask], labels.synthetic[~mask], sample_weight=probe.image_weights(labels.at(~mask)))
            scores[mask, 0] = model.decision_function(container[mask])
    return scores


def controls(container: np.ndarray, area: np.ndarray, vectors: np.ndarray, labels: Labels, scores: np.ndarray, seed: int) -> dict[str, Any]:
    """Mean AUROC over generators of format-only and area-only, and AUROCs of real against real and of permuted labels.

    Args:
        container: (N, F) facts of the files.
        area: (N,) pixels.
        vectors: (N, d) of one view, NaN where missing: what `real_against_real` and `permuted` are fitted on, split by images.
        labels: Of the N images.
        scores: (N,) of the detector in that view: `real_against_real_score` is how well they tell two halves of the real sources apart.
        seed: Of splits and permutations.
    """
    figures = {}
    there = ~np.isnan(vectors[:, 0])
    for name, values in (("format_only", format_only(container, labels, seed)), ("area_only", area[:, None].astype(float))):
        values[~there] = np.nan  # the same images that the detector is judged on
        mean = generators(applied(values, labels), area, 0).get("mean", {})
        figures[name], figures[f"{name}_like_area"] = mean.get("auroc"), mean.get("like_area")
    rng = np.random.default_rng(seed)
    real = there & ~labels.synthetic
    sources = np.unique(labels.group[real])
    told, by_score = [], []
    for _ in range(SPLITS if len(sources) > 1 else 0):
        half = np.isin(labels.group[real], rng.permutation(sources)[: len(sources) // 2])
        told.append(_by_images(vectors[real], half, rng))
        known = ~np.isnan(scores[real])
        one = auroc(scores[real][known & half], scores[real][known & ~half])
        by_score.append(max(one, 1 - one))
    shuffled = [_by_images(vectors[there], rng.permutation(labels.synthetic[there]), rng) for _ in range(SPLITS)]
    figures["real_against_real"] = round(float(np.mean(told)), 4) if told else None
    figures["real_against_real_score"] = round(float(np.mean(by_score)), 4) if by_score else None
    figures["permuted_labels"] = round(float(np.mean(shuffled)), 4)
    figures["random_split"] = round(_by_images(vectors[there], labels.synthetic[there], rng), 4)
    return figures


def _by_images(vectors: np.ndarray, positive: np.ndarray, rng: np.random.Generator) -> float:
    """AUROC of a head on (N, d) in 5 folds of images: sources are known, which is the point."""
    fold = rng.permutation(len(positive)) % FOLDS
    every = np.full(len(positive), "")
    scores = probe.fold_scores(vectors[:, None], Labels(positive, every, every), [fold == i for i in range(FOLDS)], 1, STRENGTH)[:, 0]
    return auroc(scores[positive], scores[~positive])
