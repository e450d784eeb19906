"""How good a sparse autoencoder is: what it keeps, how sparse it is, whether features mean one thing and come back in another seed.

The measures disagree with one another (VISAEBench 2026), so that none alone chooses a model; what decides here is the table of
damage (`artifacts`), against a linear probe and a difference of means on the same vectors.
"""

from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from curation import sae
from curation.protocol import auroc
from curation.sae import Sae

DENSE = 0.1  # a feature that fires on more of the images says little about one
MATCHED = 0.8  # correlation of activations from which two features are called the same
NEIGHBOURS = 10
ROWS = 8192  # pairs of rows are compared, so that more would cost much and change little
PER_SET = 8  # features of an SAE's probe


def measure(model: Sae, vectors: np.ndarray, k: int) -> dict[str, Any]:
    """What an SAE does with rows (N, d) that it has not seen. The explained variance is about the mean of these very rows."""
    rows = torch.from_numpy(vectors)
    values = sae.activations(model, rows)
    rate = (values > 0).float().mean(0)
    return {
        "num_rows": len(rows),
        "explained_variance": round(sae.explained_variance(model, rows), 4),
        "explained_variance_top_k": round(sae.explained_variance(model, rows, k), 4),
        "l0": round(float((values > 0).sum(1).float().mean()), 2),
        "never_fires": round(float((rate == 0).float().mean()), 4),
        "dense": round(float((rate > DENSE).float().mean()), 4),  # share of features that fire on over 10 % of the rows
    }


def monosemanticity(values: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """(m,) how alike the images are on which a feature fires: 0 as two images drawn by chance, 1 all the same; NaN below two images.

    The activation-weighted mean cosine over pairs of images of Pach et al. 2025 (arXiv:2504.02821). Cosines are bilinear, so the
    sum over pairs is (|sum a u|^2 - sum a^2) / 2: one product instead of N^2 / 2 pairs. Their scaling of the activations cancels.

    Args:
        values: (N, m), not negative.
        vectors: (N, d) of an image encoder; their mean is taken off before cosines, so that chance is 0.
    """
    centred = vectors - vectors.mean(0)
    unit = (centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)).astype(np.float64)
    a = values.astype(np.float64)
    squares = np.square(a).sum(0)
    pairs, alike = np.square(a.sum(0)) - squares, np.square(a.T @ unit).sum(1) - squares
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where((values > 0).sum(0) > 1, alike / pairs, np.nan)


def neighbours_kept(vectors: np.ndarray, rebuilt: np.ndarray, k: int = NEIGHBOURS) -> float:
    """Share of the k nearest neighbours (cosine about the mean) of each row (N, d) that are still among the k after reconstruction."""
    before, after = (_nearest(rows - vectors.mean(0), k) for rows in (vectors, rebuilt))
    return float(np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(before, after, strict=True)]))


def answers_kept(vectors: np.ndarray, rebuilt: np.ndarray, texts: np.ndarray) -> float:
    """Share of rows (N, d) that a zero-shot classifier with these class texts (C, d) answers as before, after reconstruction."""
    unit = texts / np.linalg.norm(texts, axis=1, keepdims=True)
    return float(((vectors @ unit.T).argmax(1) == (rebuilt @ unit.T).argmax(1)).mean())


def rebuild(model: Sae, vectors: np.ndarray) -> np.ndarray:
    """(N, d) rows as the SAE gives them back."""
    return (sae.activations(model, torch.from_numpy(vectors)) @ model.w_dec + model.b_dec).numpy()


def correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(m, m') Pearson correlations of the columns of (N, m) and (N, m'); 0 for a column that is constant."""
    scaled = []
    for values in (a, b):
        centred = values - values.mean(0)
        norm = np.linalg.norm(centred, axis=0)
        scaled.append(np.divide(centred, norm, out=np.zeros_like(centred), where=norm > 1e-12))
    return scaled[0].T @ scaled[1]


def best_matches(a: Sae, b: Sae, rows: np.ndarray, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per feature of `a` the feature of `b` whose activations on rows (N, d) correlate most, and that correlation."""
    one, two = (sae.activations(model, torch.from_numpy(rows)).numpy() for model in (a, b))
    found = correlations(one[:, features], two)
    return found.argmax(1), found.max(1)


def stability(a: Sae, b: Sae, rows: np.ndarray) -> dict[str, Any]:
    """How many features of `a` come back in `b`, an SAE of another seed, on rows (N, d): features matched one to one for the largest
    sum of correlations (Kuhn and Munkres; scipy). Features that never fire here are left out, and counted."""
    one, two = (sae.activations(model, torch.from_numpy(rows)).numpy() for model in (a, b))
    alive = [np.flatnonzero((values > 0).any(0)) for values in (one, two)]
    found = correlations(one[:, alive[0]], two[:, alive[1]])
    i, j = linear_sum_assignment(-found)
    atoms = [rows / rows.norm(dim=1, keepdim=True) for rows in (a.w_dec[alive[0][i]], b.w_dec[alive[1][j]])]
    return {
        "compared": [len(alive[0]), len(alive[1])],
        "mean_correlation": round(float(found[i, j].mean()), 4),
        "matched": round(float((found[i, j] >= MATCHED).mean()), 4),
        "mean_decoder_cosine": round(float((atoms[0] * atoms[1]).sum(1).mean()), 4),
    }


def artifacts(model: Sae, contrast: Any) -> dict[str, dict[str, float]]:
    """Damage -> AUROC against clean pictures on `report`, of what was fitted on `fit` (all severities together).

    "feature": the one SAE feature that is best on `fit`; "features": a logistic probe on the PER_SET best ones; "probe": one on the
    vector itself; "means": the difference of the two means. A probe has seen labels and is what a tag has to come near to.

    Raises:
        ValueError: a part has no pictures, or the set has no clean or no damaged ones.
    """
    roles = np.array([family.role for family in contrast.families])
    names = sorted({family.name for family in contrast.families if family.role == "damage"})
    parts = {name: contrast.part == name for name in ("fit", "report")}
    if not (roles == "clean").any() or not names or not all(chosen.any() for chosen in parts.values()):
        counts = {name: int(chosen.sum()) for name, chosen in parts.items()}
        raise ValueError(f"a contrast set needs clean and damaged pictures in fit and report; this one has {names} and pictures {counts}")
    found = {}
    for damage in names:
        of_damage = np.array([family.name == damage and family.role == "damage" for family in contrast.families])
        sets = {}
        for name, chosen in parts.items():
            clean, damaged = (_rows(contrast.vectors[chosen][:, columns]) for columns in (roles == "clean", of_damage))
            sets[name] = (np.concatenate([clean, damaged]), np.repeat([False, True], [len(clean), len(damaged)]))
        (x, y), (x_report, y_report) = sets["fit"], sets["report"]
        if y.all() or not y.any() or y_report.all() or not y_report.any():
            continue
        values, values_report = (sae.activations(model, torch.from_numpy(rows)).numpy() for rows in (x, x_report))
        single = np.array([auroc(values[y, j], values[~y, j]) for j in range(values.shape[1])])
        best = np.argsort(-single, kind="stable")[:PER_SET]
        direction = x[y].mean(0) - x[~y].mean(0)
        scores = {
            "feature": values_report[:, best[0]],
            "features": _probe(values[:, best], y, values_report[:, best]),
            "probe": _probe(x, y, x_report),
            "means": x_report @ direction,
        }
        found[damage] = {name: round(auroc(score[y_report], score[~y_report]), 4) for name, score in scores.items()}
        found[damage]["best"] = int(best[0])
    return found


def _probe(x: np.ndarray, y: np.ndarray, report: np.ndarray) -> np.ndarray:
    scaler = StandardScaler().fit(x)
    fitted = LogisticRegression(C=0.1, max_iter=500, class_weight="balanced").fit(scaler.transform(x), y)
    return fitted.decision_function(scaler.transform(report))


def _rows(vectors: np.ndarray) -> np.ndarray:
    flat = vectors.reshape(-1, vectors.shape[-1])
    return flat[np.isfinite(flat).all(1)]


def _nearest(rows: np.ndarray, k: int) -> np.ndarray:
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    alike = unit @ unit.T
    np.fill_diagonal(alike, -2)
    return np.argpartition(-alike, k - 1, axis=1)[:, :k]
